"""What a request gives back, under the names that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field

from minipaged.decoding.sampler import Logprob
from minipaged.request.sequence import FinishReason, RequestId


@dataclass(frozen=True)
class CompletionOutput:
    """One output of a request, so far or whole.

    text: without the stop string or end token; while it grows, without what may yet become one.
    token_ids: generated tokens, an end token included.
    logprobs: for each generated token, if asked for, that token's and the likeliest ones'.
    finish_reason: "stop", "length" or "abort"; None while it grows.
    cumulative_logprob: of the whole output, if logprobs or a choice among outputs needed it.
    score: what a complete hypothesis of a beam search is ranked by.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    cumulative_logprob: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its outputs; prompt is None if it was given as token ids.

    num_cached_tokens: of the prompt, found in the prefix cache rather than computed.
    """

    request_id: RequestId
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0

    @property
    def finish_reason(self) -> FinishReason | None:
        """How the first output ended, or that some did not; None while any output grows."""
        if not self.finished:
            return None
        reasons = [completion.finish_reason for completion in self.outputs]
        return "abort" if "abort" in reasons else reasons[0]
