"""PagedAttention (Kwon et al., SOSP 2023) as code to read, run and trust.

>>> from minipaged import LLM, SamplingParams
>>> LLM().generate("ROMEO:", SamplingParams(max_tokens=32))
"""

from __future__ import annotations

from typing import Any

__all__ = ["LLM", "Engine", "EngineOptions", "SamplingParams"]

_HOMES = {
    "LLM": "minipaged.engine.llm",
    "Engine": "minipaged.engine.engine",
    "EngineOptions": "minipaged.engine.builder",
    "SamplingParams": "minipaged.request.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `import minipaged` stays quick."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minipaged' has no attribute {name!r}")
