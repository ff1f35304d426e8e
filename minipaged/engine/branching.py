"""How the outputs of requests fork, take their next tokens, and end (section 4.4).

Parallel sampling forks once, when the prompt is computed; a beam search at every step.  Owns
which sequence belongs to which request, and turns decisions into the block manager's fork
and free, by way of the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from minipaged.decoding.beam_search import BeamSearch, Candidate
from minipaged.decoding.sampler import Draw, SampledToken, sample, token_logprobs
from minipaged.engine.completion import Completion
from minipaged.engine.request_state import RequestState
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence, SequenceId
from minipaged.scheduling.scheduler import Scheduler


class Branching:
    """All sequences that are alive, and what becomes of them in a step.

    forks, completed, ended: what happened in the running step, for observers; see StepRecord.
    """

    def __init__(self, scheduler: Scheduler, seed: int) -> None:
        self.scheduler = scheduler
        self.seed = seed
        self.owners: dict[SequenceId, RequestState] = {}
        self.forks: list[tuple[SequenceId, SequenceId]] = []
        self.completed: list[SequenceId] = []
        self.ended: list[SequenceId] = []
        self._num_sequences = 0

    def first_sequence(
        self, token_ids: Iterable[int], params: SamplingParams, arrival: int, cache_salt: bytes
    ) -> Sequence:
        """The sequence of a new request's prompt, which is its first output later."""
        key = self._random_key(arrival, params, 0)
        sequence = Sequence(self._num_sequences, token_ids, key, cache_salt)
        self._num_sequences += 1
        return sequence

    def draw(
        self, growing: list[Completion], logits: Tensor
    ) -> list[tuple[Completion, SampledToken]]:
        """The next token of every output: drawn, or found by the beam search it belongs to.

        Row i of the logits is that of growing[i].  Outputs fork on the way.
        """
        rows: list[int] = []
        drawing: list[Completion] = []
        beams: dict[RequestState, list[int]] = {}
        for row, completion in enumerate(growing):
            state = self.owners[completion.sequence.seq_id]
            if state.search is not None:
                beams.setdefault(state, []).append(row)
                continue
            children = [completion] if state.group.has_forked else self._fork_samples(state)
            drawing += children
            rows += [row] * len(children)
        tokens: list[tuple[Completion, SampledToken]] = []
        if drawing:
            draws = [Draw(c.sequence, c.params, c.end_token_ids) for c in drawing]
            chosen = logits if rows == list(range(len(logits))) else logits[rows]
            tokens += zip(drawing, sample(chosen, draws), strict=True)
        for state, beam_rows in beams.items():
            tokens += self._advance_beams(state, logits[beam_rows])
        return tokens

    def _fork_samples(self, state: RequestState) -> list[Completion]:
        """Let a prompt that was just computed become the samples of its request."""
        group = state.group
        (first,) = state.growing.values()
        group.has_forked = True
        for index in range(1, group.params.width):
            key = self._random_key(group.arrival, group.params, index)
            state.completions.append(self._fork(state, first, key))
        return list(state.growing.values())

    def _fork(
        self, state: RequestState, parent: Completion, random_key: tuple[int, ...] = (0,)
    ) -> Completion:
        """One more output of a request that shares everything with another one so far."""
        child = parent.sequence.fork(self._num_sequences, random_key)
        self._num_sequences += 1
        self.scheduler.fork(state.group, parent.sequence.seq_id, child)
        self.owners[child.seq_id] = state
        self.forks.append((parent.sequence.seq_id, child.seq_id))
        return state.fork(parent, child)

    def _advance_beams(
        self, state: RequestState, logits: Tensor
    ) -> list[tuple[Completion, SampledToken]]:
        """One step of a beam search: beams fork, go on, or let go of their blocks (section 4.4)."""
        search, beams = state.search, list(state.growing.values())
        assert search is not None
        running, complete = search.step(logits)
        for candidate in complete:
            beam = beams[candidate.beam]
            hypothesis = beam.fork(beam.sequence.fork(-1))  # it is complete and needs no blocks
            hypothesis.append(_beam_token(search, candidate))
            state.complete(hypothesis, candidate.cumulative_logprob)
            self.completed.append(beam.sequence.seq_id)
        if not running:
            state.growing.clear()
            return []
        # Children hold the blocks of their parent before any parent lets go of them.  The first
        # child takes the parent's place.
        going_on: dict[int, list[Completion]] = {}
        order = []
        for candidate in running:
            heirs = going_on.setdefault(candidate.beam, [])
            beam = beams[candidate.beam]
            heirs.append(self._fork(state, beam) if heirs else beam)
            order.append(heirs[-1])
        for place, beam in enumerate(beams):
            if place not in going_on:
                self._drop(state, beam)
        state.reorder(order)
        return [
            (completion, _beam_token(search, candidate))
            for completion, candidate in zip(order, running, strict=True)
        ]

    def _drop(self, state: RequestState, completion: Completion) -> None:
        """Free the blocks of a beam that does not go on, while others of its request do."""
        del state.growing[completion.sequence.seq_id]
        self.ended.append(completion.sequence.seq_id)
        self._take_out(state, completion.sequence)

    def _take_out(self, state: RequestState, sequence: Sequence) -> None:
        """Let a sequence leave its request, which goes on without it."""
        self.scheduler.drop(state.group, sequence)
        del self.owners[sequence.seq_id]

    def let_go(self, state: RequestState) -> None:
        """Free the blocks of the outputs that ended in this step."""
        if not state.growing:
            self.release(state)
            return
        for sequence in list(state.group.sequences):
            if sequence.seq_id not in state.growing:
                self._take_out(state, sequence)

    def release(self, state: RequestState) -> None:
        """Free all blocks of a request that ended, or is aborted."""
        for sequence in state.group.sequences:
            del self.owners[sequence.seq_id]
        self.scheduler.remove(state.group)

    def end_step(self, states: list[RequestState]) -> None:
        """Note the outputs that ended; their blocks are still held, so that they can be seen."""
        for state in states:
            for completion in state.retire():
                self.completed.append(completion.sequence.seq_id)
            ids = (sequence.seq_id for sequence in state.group.sequences)
            self.ended += [seq_id for seq_id in ids if seq_id not in state.growing]

    def forget_step(self) -> None:
        """Begin a new list of what happened."""
        for events in (self.forks, self.completed, self.ended):
            events.clear()

    def _random_key(self, arrival: int, params: SamplingParams, index: int) -> tuple[int, ...]:
        """Of the random stream of a request's output number `index`."""
        if params.seed is not None:
            return (params.seed, index)
        return (self.seed, arrival, index)


def _beam_token(search: BeamSearch, candidate: Candidate) -> SampledToken:
    row, num_likeliest = search.logprobs[[candidate.beam]], search.params.logprobs or 0
    (logprobs,) = token_logprobs(row, [candidate.token_id], num_likeliest)
    return SampledToken(candidate.token_id, logprobs)
