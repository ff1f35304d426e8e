"""The tensors of a Hugging Face directory, read from its safetensors files by memory mapping."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipaged.errors import ModelLoadError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class SafetensorsFiles:
    """One file, or the shards that model.safetensors.index.json lists.

    A tensor is read when it is asked for; only the bytes of the part asked for are touched.
    """

    def __init__(self, directory: Path) -> None:
        self._files = {}
        self._file_of: dict[str, Path] = {}
        for path in _find_files(directory):
            try:
                self._files[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(
                    f"{path} is damaged or cut short ({error}); download it again"
                ) from error
            for name in self._files[path].keys():  # noqa: SIM118 (not a dictionary)
                self._file_of[name] = path
        self._shapes = {
            name: tuple(self._files[path].get_slice(name).get_shape())
            for name, path in self._file_of.items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return self._shapes

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """Part of one tensor, in the type of the checkpoint."""
        return self._files[self._file_of[name]].get_slice(name)[part]


def _find_files(directory: Path) -> list[Path]:
    whole = directory / "model.safetensors"
    if whole.exists():  # what else lies there is an adapter, or another form of the same
        return [whole]
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelLoadError(f"{index} is no index of shards: {error!r}") from error
        missing = [shard for shard in shards if not (directory / shard).exists()]
        if missing:
            raise ModelLoadError(
                f"{index.name} lists {missing[0]}, which is not in {directory}; download it too"
            )
        return [directory / shard for shard in shards]
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise ModelLoadError(
            f"{directory} has its weights as a pickle only ({pickles[0]}), which can run any "
            "code; only safetensors and GGUF are read, so convert it first"
        )
    raise ModelLoadError(f"{directory} has no *.safetensors file; is the download complete?")
