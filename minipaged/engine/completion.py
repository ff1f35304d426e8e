"""One growing output: its sequence, and the text its tokens have become.

Owns the way from a token to output: end tokens, detokenizing, stop strings, the part of the
text that may already be shown.
"""

from __future__ import annotations

import copy

from minipaged.decoding.sampler import Logprob, SampledToken
from minipaged.decoding.stopping import num_held_back, stop_by_string, stop_by_token
from minipaged.engine.outputs import CompletionOutput
from minipaged.models.detokenizer import IncrementalDetokenizer
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import FinishReason, Sequence


class Completion:
    """Follows one sequence of a request from its first output token to its last.

    end_token_ids: tokens that end the output.
    max_tokens: output tokens at most, the context's and the pool's limits included.
    """

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        end_token_ids: tuple[int, ...],
        max_tokens: int,
        detokenizer: IncrementalDetokenizer | None,
    ) -> None:
        self.sequence = sequence
        self.params = params
        self.end_token_ids = end_token_ids
        self.max_tokens = max_tokens
        self.finish_reason: FinishReason | None = None
        self.cumulative_logprob = 0.0
        self.score: float | None = None
        self._detokenizer = detokenizer
        self._text = ""
        self._num_shown = 0
        self._logprobs: list[dict[int, Logprob]] = []

    def fork(self, sequence: Sequence) -> Completion:
        """The same output so far, to go on with a fork of the sequence."""
        child = copy.copy(self)
        child.sequence = sequence
        child._logprobs = self._logprobs.copy()
        if self._detokenizer is not None:
            child._detokenizer = self._detokenizer.fork()
        return child

    def append(self, token: SampledToken) -> str:
        """Add a token to the sequence; returns the text that may be shown for it.

        Sets `finish_reason` if the output ends with it.
        """
        sequence = self.sequence
        sequence.token_ids.append(token.token_id)
        if token.logprobs is not None:
            self.cumulative_logprob += token.logprobs[token.token_id].logprob
            self._logprobs.append(token.logprobs)
        self.finish_reason = stop_by_token(sequence, self.end_token_ids, self.max_tokens)
        new = ""
        if self._detokenizer is not None:
            if self.finish_reason != "stop":  # an end token is not part of the text
                new = self._detokenizer.append(token.token_id)
            if self.finish_reason is not None:
                new += self._detokenizer.finish()
        self._text += new
        if sequence.num_output_tokens >= self.params.min_tokens:
            cut = stop_by_string(self._text, len(new), self.params)
            if cut is not None:
                self._text = self._text[:cut]
                self.finish_reason = "stop"
        return self._show()

    def abort(self) -> None:
        """End the output where it stands, and show the text that was held back until now."""
        self.finish_reason = "abort"
        if self._detokenizer is not None:
            self._text += self._detokenizer.finish()
        self._show()

    def _show(self) -> str:
        held_back = 0 if self.finish_reason else num_held_back(self.params)
        shown = max(self._num_shown, len(self._text) - held_back)
        new = self._text[self._num_shown : shown]
        self._num_shown = shown
        return new

    def output(self, index: int) -> CompletionOutput:
        """The output as its caller sees it now."""
        wants_logprobs = self.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=self._text[: self._num_shown],
            token_ids=self.sequence.output_token_ids,
            logprobs=list(self._logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            cumulative_logprob=self.cumulative_logprob
            if wants_logprobs or self.params.is_ranked
            else None,
            score=self.score,
        )
