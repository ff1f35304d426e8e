"""The engine: requests in, one iteration after the other, text out.

`step` is the whole of it: the scheduler plans, the runner computes, the sampler draws, and
every request takes its token.  Building an engine from a model is `builder.py`'s work,
waiting for all requests of a list `llm.py`'s.
"""

from __future__ import annotations

import contextlib
import functools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass

import numpy as np

from minipaged.decoding.stopping import end_tokens
from minipaged.engine.branching import Branching
from minipaged.engine.completion import Completion
from minipaged.engine.model_runner import Runner
from minipaged.engine.outputs import RequestOutput
from minipaged.engine.request_state import RequestState
from minipaged.engine.trace import StepRecord, TableRecord
from minipaged.errors import InvalidRequestError
from minipaged.models.detokenizer import IncrementalDetokenizer
from minipaged.models.tokenizer import Tokenizer
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import RequestId, SequenceGroup, SequenceId
from minipaged.scheduling.policy import urgent_first
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.step_plan import StepPlan

Prompt = str | Sequenced[int]


@dataclass
class Timings:
    """Seconds spent in each part since the engine started; `model` includes the attention."""

    scheduler: float = 0.0
    model: float = 0.0
    sampler: float = 0.0
    output: float = 0.0

    def add(self, scheduler: float, model: float, sampler: float, output: float) -> None:
        """Count one more step."""
        self.scheduler += scheduler
        self.model += model
        self.sampler += sampler
        self.output += output


def _ends_all_if_it_fails(
    step: Callable[[Engine], list[RequestOutput]],
) -> Callable[[Engine], list[RequestOutput]]:
    """What a failing step had planned to copy and swap is lost: nobody can go on from there."""

    @functools.wraps(step)
    def guarded(engine: Engine) -> list[RequestOutput]:
        try:
            return step(engine)
        except BaseException:
            for request_id in list(engine._requests):
                with contextlib.suppress(Exception):
                    engine.abort(request_id)
            engine._branching.forget_step()
            raise

    return guarded


class Engine:
    """Serves many requests at a time from one model and one pool of blocks.

    Between two steps every invariant holds; `check_integrity` asserts them.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        vocab_size: int,
        context_length: int,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: tuple[int, ...] = (),
        seed: int = 0,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.context_length = context_length
        # A configuration may name an end token that the vocabulary, which was cut, has no more.
        self.eos_token_ids = tuple(i for i in eos_token_ids if 0 <= i < vocab_size)
        self.seed = seed
        self.timings = Timings()
        self.observers: list[Callable[[StepRecord], None]] = []
        self.num_steps = 0
        self._num_requests = 0
        self._requests: dict[RequestId, RequestState] = {}
        self._branching = Branching(scheduler, seed)

    def add_request(
        self,
        request_id: RequestId,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        cache_salt: bytes = b"",
    ) -> None:
        """Queue a prompt, given as text or as token ids.

        priority: 0 is the most urgent; others need the scheduling policy "priority".
        cache_salt: requests of different salts find nothing of each other in the prefix cache.
        Raises InvalidRequestError, with nothing changed, if it can never be served.
        """
        if request_id in self._requests:
            raise InvalidRequestError(
                f"request id {request_id!r} is in use; choose another or abort that one first"
            )
        params = params or SamplingParams()
        self._check_priority(priority)
        if not isinstance(cache_salt, bytes):
            raise InvalidRequestError(f"cache_salt is {cache_salt!r}; it must be bytes")
        ends = end_tokens(params, self.eos_token_ids)
        if params.min_tokens and len(set(ends)) >= self.vocab_size:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens} and every token of the vocabulary ends the "
                "output; leave out min_tokens or some stop_token_ids"
            )
        if params.use_beam_search and params.width > self.vocab_size:
            raise InvalidRequestError(
                f"the beam width is {params.width} and the vocabulary has {self.vocab_size} tokens "
                "for the first step to choose from; lower best_of or n"
            )
        token_ids = self._tokens(prompt, params)
        max_tokens = self._max_tokens(len(token_ids), params)
        arrival = self._num_requests
        sequence = self._branching.first_sequence(token_ids, params, arrival, cache_salt)
        group = SequenceGroup(request_id, [sequence], params, arrival, priority)
        # The last token is never computed, so it needs no slot.
        self.scheduler.add(group, len(token_ids) + max_tokens - 1)
        self._num_requests += 1
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer, params.skip_special_tokens, token_ids
            )
        first = Completion(sequence, params, ends, max_tokens, detokenizer)
        state = RequestState(group, prompt if isinstance(prompt, str) else None, first)
        self._requests[request_id] = state
        self._branching.owners[sequence.seq_id] = state

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether another step has anything to do."""
        return self.scheduler.has_unfinished

    @_ends_all_if_it_fails
    def step(self) -> list[RequestOutput]:
        """Run one iteration; returns the requests that got a token, as they stand now.

        If it raises, all requests are aborted.  A Ctrl-C may fall into that, and leave it half
        done: enter `Interrupt` around the steps, as `LLM.generate` does.
        """
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan.is_empty:
            return []
        planned = time.perf_counter()
        logits = self.runner.execute(plan)
        computed = time.perf_counter()
        growing = self._mark_computed(plan)
        owners = self._branching.owners
        states = list(dict.fromkeys(owners[c.sequence.seq_id] for c in growing))
        tokens = self._branching.draw(growing, logits)
        sampled = time.perf_counter()
        new_text = {c.sequence.seq_id: c.append(token) for c, token in tokens}
        self._branching.end_step(states)
        outputs = [state.output() for state in states]
        end = time.perf_counter()
        self.timings.add(planned - start, computed - planned, sampled - computed, end - sampled)
        if self.observers:
            self._observe(plan, end - start, states, new_text)
        self._branching.forget_step()
        self.num_steps += 1
        for state in states:
            self._branching.let_go(state)
            if not state.growing:
                del self._requests[state.group.request_id]
        return outputs

    def abort(self, request_id: RequestId) -> RequestOutput | None:
        """End a request at once and free its blocks; None if there is no such request."""
        state = self._requests.get(request_id)
        if state is None:
            return None
        state.abort()
        self._branching.release(state)
        del self._requests[request_id]
        return state.output()

    def table_records(self) -> tuple[TableRecord, ...]:
        """All block tables as they stand."""
        owners, manager = self._branching.owners, self.scheduler.manager
        return tuple(
            TableRecord(
                seq_id,
                owners[seq_id].group.request_id,
                tuple(table.held_blocks),
                table.num_tokens,
                table.num_dropped,
                table.allocator is manager.host,
            )
            for seq_id, table in manager.tables.items()
        )

    def check_integrity(self) -> None:
        """Assert, between two steps, that queues, tables and reference counts agree."""
        self.scheduler.check_integrity()
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        assert {group.request_id for group in queued} == self._requests.keys()
        alive = {sequence.seq_id for group in queued for sequence in group.sequences}
        assert alive == self._branching.owners.keys()

    def _tokens(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's token ids, checked against the model's vocabulary and context."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError(
                    "the model has no tokenizer, so the prompt must be a list of token ids, "
                    "not text"
                )
            try:
                prompt.encode()
            except UnicodeEncodeError:  # as from bytes of the command line that are not UTF-8
                raise InvalidRequestError(
                    "the prompt has characters that are not Unicode text; give it in UTF-8"
                ) from None
            token_ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise InvalidRequestError(
                f"a prompt is {prompt!r}; it must be a text or a list of token ids"
            )
        else:
            token_ids = [int(t) if isinstance(t, np.integer) else t for t in prompt]
        if not token_ids:
            raise InvalidRequestError("the prompt is empty; give it at least one token")
        for name, ids in (("prompt", token_ids), ("stop_token_ids", params.stop_token_ids)):
            for token_id in ids:
                is_whole = isinstance(token_id, int) and not isinstance(token_id, bool)
                if not is_whole or not 0 <= token_id < self.vocab_size:
                    raise InvalidRequestError(
                        f"token {token_id!r} of {name} is outside the vocabulary; "
                        f"it must be a whole number from 0 to {self.vocab_size - 1}"
                    )
        if len(token_ids) >= self.context_length:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens and the model's context "
                f"{self.context_length}, one of which the output needs; shorten the prompt"
            )
        return token_ids

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Output tokens at most: what is asked for, but the context holds no more than it does."""
        room = self.context_length - num_prompt_tokens
        if params.max_tokens is not None:
            return min(params.max_tokens, room)
        manager, budget = self.scheduler.manager, self.scheduler.max_num_batched_tokens

        def is_too_much(max_tokens: int) -> bool:
            num_tokens = num_prompt_tokens + max_tokens - 1
            needed = manager.most_blocks(num_prompt_tokens, num_tokens, params.width, budget)
            return needed > manager.device.num_blocks

        # Without a wish the pool is a limit too.
        return max(1, bisect_left(range(1, room + 1), True, key=is_too_much))

    def _mark_computed(self, plan: StepPlan) -> list[Completion]:
        """Count the tokens of a step that is done; returns the outputs that get a token."""
        owners = self._branching.owners
        growing = []
        for item in plan.scheduled:
            state = owners[item.seq_id]
            if state.num_cached_tokens is None:
                state.num_cached_tokens = item.num_computed_tokens
            completion = state.growing[item.seq_id]
            completion.sequence.num_computed_tokens = item.context_length
            if item.samples:
                growing.append(completion)
        manager = self.scheduler.manager
        if manager.tracks_contents:
            for state in dict.fromkeys(owners[item.seq_id] for item in plan.scheduled):
                for sequence in state.group.sequences:
                    manager.mark_computed(sequence.seq_id, sequence.token_ids, sequence.cache_salt)
        return growing

    def _check_priority(self, priority: int) -> None:
        if not isinstance(priority, int) or isinstance(priority, bool) or priority < 0:
            raise InvalidRequestError(
                f"priority is {priority!r}; it must be a whole number, and 0 is the most urgent"
            )
        if priority > 0 and self.scheduler.policy is not urgent_first:
            raise InvalidRequestError(
                f"priority is {priority} and the order of service knows no priorities; "
                'set the engine\'s policy to "priority" or leave it 0'
            )

    def _observe(
        self,
        plan: StepPlan,
        seconds: float,
        states: list[RequestState],
        new_text: dict[SequenceId, str],
    ) -> None:
        branching = self._branching
        scheduler, manager = self.scheduler, self.scheduler.manager
        cache = manager.prefix_cache
        record = StepRecord(
            step=self.num_steps,
            seconds=seconds,
            plan=plan,
            block_size=manager.block_size,
            num_blocks=manager.device.num_blocks,
            tables=self.table_records(),
            running=tuple(group.request_id for group in scheduler.running),
            waiting=tuple(group.request_id for group in scheduler.waiting),
            finished={
                state.group.request_id: state.finish_reason
                for state in states
                if state.finish_reason is not None
            },
            new_text=new_text,
            num_preemptions=scheduler.num_preemptions,
            forks=tuple(branching.forks),
            num_swaps=scheduler.preemption.num_swaps,
            num_host_blocks=manager.host.num_blocks,
            completed=tuple(branching.completed),
            ended=tuple(branching.ended),
            cached_blocks=tuple(manager.device.cached_blocks),
            num_hit_tokens=cache.num_hit_tokens if cache is not None else 0,
            num_queried_tokens=cache.num_queried_tokens if cache is not None else 0,
        )
        for observer in self.observers:
            observer(record)
