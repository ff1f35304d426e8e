"""Fills a decoder with the tensors of a checkpoint, one parameter at a time.

The decoder was built without memory.  Each parameter is allocated once, in the type the
engine runs in, and its parts are converted straight into it, so that there is never more
than one copy of the model.  Every tensor is checked: present, known, of the right shape,
finite.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from minipaged.errors import ModelLoadError
from minipaged.models.decoder import Decoder
from minipaged.models.layouts import Layout
from minipaged.models.linear import PackedLinear, can_pack
from minipaged.models.shard import Part


class TensorSource(Protocol):
    """A checkpoint: names and shapes at once, contents one by one.

    read: the elements of one tensor at these indices of each dimension, and no others.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor: ...


def fill(
    decoder: Decoder,
    source: TensorSource,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """Load all parameters, then pack what can be packed on a CPU, module by module."""
    can_be_packed = torch.device(device).type == "cpu" and can_pack(dtype)
    stored = {layout.strip_prefix(name): name for name in source.shapes()}
    _check_names(decoder, layout, stored)
    tied = decoder.config.tie_word_embeddings
    if tied and "lm_head.weight" in stored:
        _check_tied(decoder, source, layout, stored)
    for path, module in list(decoder.named_modules()):
        if tied and path == "lm_head":
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            decoder.collectives.check()
            filled = torch.empty(parameter.shape, dtype=dtype)
            if decoder.shard.holds(f"{path}.{name}"):
                _fill_parameter(filled, f"{path}.{name}", decoder, source, layout, stored)
            else:
                filled.zero_()
            setattr(module, name, nn.Parameter(filled.to(device), requires_grad=False))
        if isinstance(module, nn.Linear) and can_be_packed:
            parent, _, child = path.rpartition(".")
            setattr(decoder.get_submodule(parent), child, PackedLinear(module))
    if tied:
        decoder.lm_head.weight = decoder.embed_tokens.weight
        if can_be_packed:
            # The embedding looks rows up and needs the plain matrix, so there are two of this
            # one.  A packed head is worth it: with SmolLM2 in float32 it takes 10 ms instead
            # of 24 of a step of 32 sequences.
            decoder.lm_head = PackedLinear(cast(nn.Linear, decoder.lm_head))


def _check_names(decoder: Decoder, layout: Layout, stored: dict[str, str]) -> None:
    tied = decoder.config.tie_word_embeddings
    wanted = {
        part for name, _ in decoder.named_parameters() for part in layout.sources(name)
    }  # of a tied head, named_parameters gives the embedding only
    missing = sorted(wanted - stored.keys())
    if missing:
        raise ModelLoadError(
            f"the checkpoint lacks {_listed(missing)}; it is incomplete, or its config.json "
            "describes another model"
        )
    extra = sorted(
        name
        for name in stored.keys() - wanted
        if not re.fullmatch(layout.ignored, name) and not (tied and name == "lm_head.weight")
    )
    if extra:
        raise ModelLoadError(
            f"the checkpoint has {_listed(extra)}, which a {decoder.config.family} model with "
            "this config.json does not have; the result would not be that model"
        )


def _check_tied(
    decoder: Decoder, source: TensorSource, layout: Layout, stored: dict[str, str]
) -> None:
    """A head beside a tied embedding must be the same: it may have been trained apart."""
    (embedding,) = layout.sources("embed_tokens.weight")
    rows = slice(decoder.vocabulary.start, decoder.vocabulary.stop)
    part = (rows, slice(decoder.config.hidden_size))
    head, tokens = (source.read(stored[n], part) for n in ("lm_head.weight", embedding))
    if not torch.equal(head, tokens):
        raise ModelLoadError(
            f"tensor {stored['lm_head.weight']!r} is not that of the embedding, though config.json "
            "says tie_word_embeddings; set it to false there if the head was trained"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}"


def _fill_parameter(
    filled: Tensor,
    name: str,
    decoder: Decoder,
    source: TensorSource,
    layout: Layout,
    stored: dict[str, str],
) -> None:
    """Read this rank's rows and columns of all tensors that make a parameter."""
    shard, config = decoder.shard, decoder.whole_config
    parts = shard.rows(config, name) or [Part(len(filled), range(len(filled)))]
    dimensions = []
    if filled.dim() == 2:
        columns = shard.columns(config, name)
        dimensions = [columns or Part(filled.shape[1], range(filled.shape[1]))]
    targets = filled.split([len(part.kept) for part in parts])
    for (part, rows), target in zip(_places(layout.sources(name), parts), targets, strict=True):
        transposed = re.fullmatch(layout.transposed, part) is not None
        _read_into(target, source, stored[part], [rows, *dimensions], transposed)


def _places(tensors: Sequence[str], parts: list[Part]) -> list[tuple[str, Part]]:
    """Where the rows of each part are: in a tensor of its own, or behind each other in one."""
    if len(tensors) == len(parts):
        return list(zip(tensors, parts, strict=True))
    (tensor,) = tensors
    *starts, total = itertools.accumulate((part.total for part in parts), initial=0)
    return [
        (tensor, Part(total, range(start + part.kept.start, start + part.kept.stop)))
        for start, part in zip(starts, parts, strict=True)
    ]


def _read_into(
    target: Tensor, source: TensorSource, name: str, parts: list[Part], transposed: bool
) -> None:
    """Convert a part of one tensor into its rows of a parameter, checking both."""
    if transposed:
        target, parts = target.T, parts[::-1]
    shape, expected = list(source.shapes()[name]), [part.total for part in parts]
    if shape != expected:
        raise ModelLoadError(
            f"tensor {name!r} has shape {shape} and config.json asks for {expected}; they are of "
            "different models"
        )
    tensor = source.read(name, tuple(slice(p.kept.start, p.kept.stop) for p in parts))
    if not torch.isfinite(tensor).all():
        raise ModelLoadError(
            f"tensor {name!r} has elements that are infinite or not a number; the file is "
            "damaged, or was saved after a failed training"
        )
    target.copy_(tensor)
