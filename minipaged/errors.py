"""Every error that a user can cause, as a type of its own.

Each message is one sentence that names the value, the limit and the remedy.  The command
line prints it and ends with exit code 2; Python callers catch the type.
"""

from __future__ import annotations


class MinipagedError(Exception):
    """Base of all errors that are the input's fault rather than a defect."""


class InvalidRequestError(MinipagedError, ValueError):
    """A prompt or its sampling parameters cannot be served, now or ever."""


class ConfigurationError(MinipagedError, ValueError):
    """An engine or model option is out of range, or two options contradict each other."""


class ModelLoadError(MinipagedError, RuntimeError):
    """A model cannot be found, or its files are of an unsupported kind or damaged."""


class OutOfBlocksError(MinipagedError, RuntimeError):
    """A pool has no free block left; the scheduler asks first, so only direct callers see it."""


class RankDiedError(MinipagedError, RuntimeError):
    """A tensor-parallel rank ended before the others, which cannot go on without it."""
