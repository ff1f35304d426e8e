"""One request inside the engine: its sequence group, and the text its tokens have become.

Owns the way from a drawn token to output: end tokens, detokenizing, stop strings, the part
of the text that may already be shown.
"""

from __future__ import annotations

from minipaged.decoding.sampler import Logprob, SampledToken
from minipaged.decoding.stopping import num_held_back, stop_by_string, stop_by_token
from minipaged.engine.outputs import CompletionOutput, RequestOutput
from minipaged.models.detokenizer import IncrementalDetokenizer
from minipaged.request.sequence import FinishReason, Sequence, SequenceGroup


class RequestState:
    """Follows one request from its prompt to its last token.

    end_token_ids: tokens that end the output.
    max_tokens: output tokens at most, the context's and the pool's limits included.
    """

    def __init__(
        self,
        group: SequenceGroup,
        prompt: str | None,
        end_token_ids: tuple[int, ...],
        max_tokens: int,
        detokenizer: IncrementalDetokenizer | None,
    ) -> None:
        self.group = group
        self.prompt = prompt
        self.prompt_token_ids = self.sequence.token_ids.copy()
        self.end_token_ids = end_token_ids
        self.max_tokens = max_tokens
        self.finish_reason: FinishReason | None = None
        self._detokenizer = detokenizer
        self._text = ""
        self._num_shown = 0
        self._logprobs: list[dict[int, Logprob]] = []

    @property
    def sequence(self) -> Sequence:
        """The one sequence of the group."""
        (sequence,) = self.group.sequences
        return sequence

    def append(self, token: SampledToken) -> str:
        """Add a drawn token to the sequence; returns the text that may be shown for it.

        Sets `finish_reason` if the output ends with it.
        """
        sequence = self.sequence
        sequence.token_ids.append(token.token_id)
        if token.logprobs is not None:
            self._logprobs.append(token.logprobs)
        self.finish_reason = stop_by_token(sequence, self.end_token_ids, self.max_tokens)
        new = ""
        if self._detokenizer is not None:
            if self.finish_reason != "stop":  # an end token is not part of the text
                new = self._detokenizer.append(token.token_id)
            if self.finish_reason is not None:
                new += self._detokenizer.finish()
        self._text += new
        params = self.group.params
        if sequence.num_output_tokens >= params.min_tokens:
            cut = stop_by_string(self._text, len(new), params)
            if cut is not None:
                self._text = self._text[:cut]
                self.finish_reason = "stop"
        return self._show()

    def abort(self) -> str:
        """End the output where it stands; returns the text that was held back until now."""
        self.finish_reason = "abort"
        if self._detokenizer is not None:
            self._text += self._detokenizer.finish()
        return self._show()

    def _show(self) -> str:
        held_back = 0 if self.finish_reason else num_held_back(self.group.params)
        shown = max(self._num_shown, len(self._text) - held_back)
        new = self._text[self._num_shown : shown]
        self._num_shown = shown
        return new

    def output(self) -> RequestOutput:
        """The request as its caller sees it now."""
        sequence = self.sequence
        completion = CompletionOutput(
            index=0,
            text=self._text[: self._num_shown],
            token_ids=sequence.output_token_ids,
            logprobs=None if self.group.params.logprobs is None else list(self._logprobs),
            finish_reason=self.finish_reason,
        )
        return RequestOutput(
            request_id=self.group.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion],
            finished=self.finish_reason is not None,
        )
