"""One request inside the engine: its sequence group and the outputs that grow from it.

Owns how a request becomes several outputs, and which of them its caller gets to see.
"""

from __future__ import annotations

from minipaged.decoding.beam_search import BeamSearch
from minipaged.engine.completion import Completion
from minipaged.engine.outputs import RequestOutput
from minipaged.request.sequence import FinishReason, Sequence, SequenceGroup, SequenceId


class RequestState:
    """Follows one request from its prompt to the last token of its last output.

    first: what the prompt's sequence will become; the others are forked from it.
    num_cached_tokens: of the prompt, found in the prefix cache when it began.
    """

    def __init__(self, group: SequenceGroup, prompt: str | None, first: Completion) -> None:
        self.group = group
        self.prompt = prompt
        self.prompt_token_ids = first.sequence.token_ids.copy()
        self.num_cached_tokens: int | None = None  # until its first step
        self.growing: dict[SequenceId, Completion] = {first.sequence.seq_id: first}
        self.completions: list[Completion] = [first]  # samples by index, or complete hypotheses
        self.search: BeamSearch | None = None
        if group.params.use_beam_search:
            self.search = BeamSearch(group.params, first.end_token_ids, first.max_tokens)
            self.completions = []

    @property
    def finish_reason(self) -> FinishReason | None:
        """How the first output ended; None while any output grows."""
        if self.growing:
            return None
        return self.ranked()[0].finish_reason

    def fork(self, parent: Completion, child: Sequence) -> Completion:
        """Begin another output where the parent's stands."""
        completion = self.growing[child.seq_id] = parent.fork(child)
        return completion

    def complete(self, hypothesis: Completion, cumulative_logprob: float) -> None:
        """Keep a complete hypothesis of a beam search, and the best `width` of all."""
        assert self.search is not None
        hypothesis.cumulative_logprob = cumulative_logprob
        hypothesis.score = self.search.score(
            cumulative_logprob, hypothesis.sequence.num_output_tokens
        )
        self.completions.append(hypothesis)
        self.completions.sort(key=lambda c: -(c.score or 0.0))
        del self.completions[self.group.params.width :]

    def reorder(self, beams: list[Completion]) -> None:
        """Put the running beams in the order of the search, which is that of their rows."""
        self.growing = {beam.sequence.seq_id: beam for beam in beams}
        self.group.sequences[:] = [beam.sequence for beam in beams]

    def retire(self) -> list[Completion]:
        """Let the outputs that ended grow no more; returns them."""
        ended = [c for c in self.growing.values() if c.finish_reason is not None]
        for completion in ended:
            del self.growing[completion.sequence.seq_id]
        return ended

    def abort(self) -> None:
        """End all outputs where they stand."""
        for completion in self.growing.values():
            completion.abort()
        if self.search is not None:
            self.completions += self.growing.values()
        self.growing.clear()

    def ranked(self) -> list[Completion]:
        """The outputs, the best first where not all of them are returned.

        Of a beam search the complete hypotheses come before those that still grow.
        """
        if self.search is not None:
            return [*self.completions, *self.growing.values()]
        if self.group.params.is_ranked:
            return sorted(self.completions, key=lambda c: -c.cumulative_logprob)
        return self.completions

    def output(self) -> RequestOutput:
        """The request as its caller sees it now."""
        best = self.ranked()[: self.group.params.n]
        return RequestOutput(
            request_id=self.group.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.output(index) for index, completion in enumerate(best)],
            finished=not self.growing,
            num_cached_tokens=self.num_cached_tokens or 0,
        )
