"""The tensors, configuration and tokenizer of a GGUF file of LLaMA architecture.

The `gguf` package maps the file and dequantizes.  What is added here is what the format
leaves to its reader: the names, the order of rotary pairs, the meaning of the metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from torch import Tensor

from minipaged.errors import ModelLoadError
from minipaged.models.config import ModelConfig, RopeConfig
from minipaged.models.tokenizer import Tokenizer

# How text is cut into words before the merges of byte-level BPE, by tokenizer.ggml.pre.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-bpe": CONTRACTIONS + WORDS % r"\p{N}{1,3}",
    "qwen2": CONTRACTIONS + WORDS % r"\p{N}",
}
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4


class Reader(gguf.GGUFReader):
    """The same, three times as fast: for each of 100,000 words NumPy would make a new memmap."""

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        """The bytes of the file, which stays mapped."""
        return self._bytes

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._bytes = mapped.view(np.ndarray)


class GGUFFile:
    """One file, mapped; a tensor is dequantized when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = Reader(path)
            self._metadata = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the reader fails in many ways on what is no GGUF
            raise ModelLoadError(
                f"{path} is no GGUF file, or is cut short ({error}); download it again"
            ) from error
        architecture = self._metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelLoadError(
                f"{path} is of architecture {architecture!r}; of GGUF files only 'llama' is "
                "supported, so choose a Hugging Face directory of this model"
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._shapes = {  # outermost dimension first; the file has them reversed
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.config = self._read_config()

    def _get(self, name: str, default: Any = None) -> Any:
        value = self._metadata.get(f"llama.{name}", default)
        if value is None:
            raise ModelLoadError(f"{self.path} has no metadata llama.{name}; it is incomplete")
        return value

    def _read_config(self) -> ModelConfig:
        heads, hidden = self._get("attention.head_count"), self._get("embedding_length")
        eos = self._metadata.get("tokenizer.ggml.eos_token_id")
        scaling = self._metadata.get("llama.rope.scaling.type", "none")
        if scaling not in ("none", "linear") or "rope_freqs.weight" in self._tensors:
            raise ModelLoadError(
                f"{self.path} stretches its rotary embedding ({scaling}, or by rope_freqs), which "
                "is not supported for GGUF; choose a Hugging Face directory of this model"
            )
        return ModelConfig(
            family="llama",
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            hidden_size=hidden,
            num_layers=self._get("block_count"),
            num_heads=heads,
            num_kv_heads=self._get("attention.head_count_kv", heads),
            head_dim=self._get("attention.key_length", hidden // heads),
            intermediate_size=self._get("feed_forward_length"),
            max_positions=self._get("context_length"),
            norm_eps=self._get("attention.layer_norm_rms_epsilon"),
            rope=RopeConfig(
                self._get("rope.freq_base", 10_000.0),
                scaling,
                self._metadata.get("llama.rope.scaling.factor", 1.0),
            ),
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            tie_word_embeddings="output.weight" not in self._tensors,
            bos_token_id=self._metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=() if eos is None else (eos,),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, outermost dimension first."""
        return self._shapes

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """Part of one tensor in float32, its rows in the order of Hugging Face.

        part: whole heads, where the rows are those of queries or keys.  Its rows alone are read;
            of a row all is, for it is quantized in blocks.
        """
        tensor = self._tensors[name]
        rows, *columns = part
        values = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        # What was not quantized is still the mapped file, which must not be written.
        result = torch.from_numpy(values if values.flags.writeable else values.copy())
        if ".attn_q." in name or ".attn_k." in name:
            result = neighbours_to_halves(result, len(result) // self.config.head_dim)
        return result[:, columns[0]] if columns else result

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer of the metadata."""
        metadata = {
            name.removeprefix("tokenizer.ggml."): value for name, value in self._metadata.items()
        }
        kind = metadata.get("model")
        if kind != "gpt2":
            raise ModelLoadError(
                f"{self.path} has a tokenizer of kind {kind!r}; of GGUF files only byte-level BPE "
                "('gpt2') is supported, so choose a Hugging Face directory of this model"
            )
        tokens: list[str] = metadata["tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["merges"]]
        pre = metadata.get("pre", "default")
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=merges,
                ignore_merges=pre == "llama-bpe",
            )
        )
        backend.pre_tokenizer = _pre_tokenizer(pre, self.path)
        backend.decoder = decoders.ByteLevel()
        for token, kind in zip(tokens, metadata.get("token_type", []), strict=False):
            if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN):
                added = AddedToken(token, special=kind == CONTROL_TOKEN, normalized=False)
                backend.add_special_tokens([added]) if added.special else backend.add_tokens(
                    [added]
                )
        special = {
            f"{name}_token": tokens[metadata[f"{name}_token_id"]]
            for name in ("bos", "eos")
            if f"{name}_token_id" in metadata
        }
        if metadata.get("add_bos_token", pre == "llama-bpe"):  # LLaMA 3's need not say it
            bos = special["bos_token"]
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, metadata["bos_token_id"])]
            )
        return Tokenizer(backend, self._metadata.get("tokenizer.chat_template"), special)


def _pre_tokenizer(name: str, path: Path) -> Any:
    if name in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])
    raise ModelLoadError(
        f"{path} cuts its text into words by the rule {name!r}; supported are default, gpt-2, "
        f"smollm, {', '.join(SPLITS)}"
    )


def neighbours_to_halves(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head from pairs (2i, 2i + 1) to pairs (i, i + head_dim / 2).

    GGUF files of LLaMA models rotate neighbouring elements; the decoder rotates halves.
    """
    heads = rows.unflatten(0, (num_heads, -1, 2))  # head, pair, which of the pair
    return heads.transpose(1, 2).reshape(rows.shape)
