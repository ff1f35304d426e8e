"""Fills a decoder with the tensors of a checkpoint, one parameter at a time.

The decoder was built without memory.  Each parameter is allocated once, in the type the
engine runs in, and its parts are converted straight into it, so that there is never more
than one copy of the model.  Every tensor is checked: present, known, of the right shape,
finite.
"""

from __future__ import annotations

import re
from typing import Protocol

import torch
from torch import Tensor, nn

from minipaged.errors import ModelLoadError
from minipaged.models.decoder import Decoder
from minipaged.models.families import Family
from minipaged.models.linear import PackedLinear, can_pack


class TensorSource(Protocol):
    """A checkpoint: names and shapes at once, contents one by one."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor: ...


def fill(decoder: Decoder, source: TensorSource, family: Family, dtype: torch.dtype) -> None:
    """Load all parameters, then pack what can be packed, module by module."""
    stored = {family.strip_prefix(name): name for name in source.shapes()}
    _check_names(decoder, family, stored)
    tied = decoder.lm_head.weight is decoder.embed_tokens.weight
    for path, module in list(decoder.named_modules()):
        if tied and path == "lm_head":
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            parts = family.sources(f"{path}.{name}")
            tensors = [(stored[part], bool(re.fullmatch(family.transposed, part))) for part in parts]
            filled = _read_parameter(source, tensors, parameter, dtype)
            setattr(module, name, nn.Parameter(filled, requires_grad=False))
        if isinstance(module, nn.Linear) and can_pack(dtype):
            parent, _, child = path.rpartition(".")
            setattr(decoder.get_submodule(parent), child, PackedLinear(module))
    if tied:  # the embedding looks rows up, so its weight has to stay plain
        decoder.lm_head.weight = decoder.embed_tokens.weight


def _check_names(decoder: Decoder, family: Family, stored: dict[str, str]) -> None:
    tied = decoder.lm_head.weight is decoder.embed_tokens.weight
    wanted = {
        part for name, _ in decoder.named_parameters() for part in family.sources(name)
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
        if not re.fullmatch(family.ignored, name) and not (tied and name == "lm_head.weight")
    )
    if extra:
        raise ModelLoadError(
            f"the checkpoint has {_listed(extra)}, which a {decoder.config.family} model with "
            "this config.json does not have; the result would not be that model"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}"


def _read_parameter(
    source: TensorSource, parts: list[tuple[str, bool]], parameter: Tensor, dtype: torch.dtype
) -> Tensor:
    """Stack the parts (name, transposed) row upon row into a fresh tensor."""
    filled = torch.empty(parameter.shape, dtype=dtype)
    row = 0
    for name, transposed in parts:
        tensor = source.read(name)
        if transposed:
            tensor = tensor.T
        rows = len(tensor) if len(parts) > 1 else len(filled)
        target = filled[row : row + rows]
        row += rows
        if tensor.shape != target.shape:
            _refuse_shape(name, tensor, parameter, len(parts))
        if not torch.isfinite(tensor).all():
            raise ModelLoadError(
                f"tensor {name!r} has elements that are infinite or not a number; the file is "
                "damaged, or was saved after a failed training"
            )
        target.copy_(tensor)
    if row != len(filled):
        _refuse_shape(name, tensor, parameter, len(parts))
    return filled


def _refuse_shape(name: str, tensor: Tensor, parameter: Tensor, num_parts: int) -> None:
    where = f"as one of {num_parts} parts of" if num_parts > 1 else "for"
    raise ModelLoadError(
        f"tensor {name!r} has shape {list(tensor.shape)}, which does not fit {where} the shape "
        f"{list(parameter.shape)} that config.json asks for"
    )
