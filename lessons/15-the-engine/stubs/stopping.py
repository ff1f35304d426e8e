"""When an output ends: end tokens, stop strings, the maximum length.

Owns the decision alone.  Where the text comes from is the detokenizer's work, what happens
to a finished sequence the engine's.
"""

from __future__ import annotations

from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import FinishReason, Sequence


def end_tokens(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that end an output: the request's own, and the model's unless they are ignored."""
    own = tuple(params.stop_token_ids)
    return own if params.ignore_eos else (*own, *eos_token_ids)


def stop_by_token(
    sequence: Sequence, end_token_ids: tuple[int, ...], max_tokens: int
) -> FinishReason | None:
    """Whether the last token ends the output; an end token on the last place counts as "stop"."""
    raise NotImplementedError("Task 15.3: stop_by_token is still to be written")


def stop_by_string(text: str, num_new: int, params: SamplingParams) -> int | None:
    """Length to which `text` is cut by the first stop string in it, or None.

    num_new: characters at its end that were not looked at before.
    """
    raise NotImplementedError("Task 15.3: stop_by_string is still to be written")


def num_held_back(params: SamplingParams) -> int:
    """Characters at the end of a growing text that may yet turn out to begin a stop string."""
    raise NotImplementedError("Task 15.3: num_held_back is still to be written")
