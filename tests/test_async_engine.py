"""The engine behind an event loop: nobody gets other tokens (T4), nothing is left behind (T5)."""

import asyncio
import dataclasses
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Request, Workload, check_output, requests, workloads

from minipaged.engine.engine import Engine
from minipaged.errors import InvalidRequestError
from minipaged.request.sampling_params import SamplingParams
from minipaged.serving.async_engine import (
    LONGEST_RETRY_AFTER,
    AsyncEngine,
    EngineDiedError,
    QueueFullError,
    ShuttingDownError,
)
from minipaged.serving.stream import NewRequest

PATIENCE = 60


def run(scenario):
    """In an event loop of its own; nobody may hang."""
    return asyncio.run(asyncio.wait_for(scenario, PATIENCE))


def new(name, request):
    return NewRequest(
        name, list(request.prompt), SamplingParams(**request.params), request.priority
    )


LONG = Request((1, 2, 3), {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True})
SHORT = Request((4, 5), {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True})
REFUSED = Request((), {})


def small_engine(max_num_seqs=4, num_blocks=64):
    return Workload((), 4, num_blocks, max_num_seqs, 64).engine()


class Held:
    """The engine's runner, which computes a step when it is told to."""

    def __init__(self, engine):
        self.steps = threading.Semaphore(0)
        self.is_computing = threading.Event()
        execute = engine.runner.execute

        def wait_and_execute(plan):
            self.is_computing.set()
            assert self.steps.acquire(timeout=PATIENCE)
            self.is_computing.clear()
            return execute(plan)

        engine.runner.execute = wait_and_execute

    def go_on(self):
        """Never wait again."""
        self.steps.release(100_000)

    async def computing(self):
        """Return in the middle of a step."""
        while not self.is_computing.is_set():
            await asyncio.sleep(0.001)


async def idle(served):
    """Return when nobody is served any more; everything must be as before."""
    while served.num_unfinished:
        await asyncio.sleep(0.001)

    def check(engine):
        engine.check_integrity()
        manager = engine.scheduler.manager
        assert manager.device.num_used == manager.host.num_used == 0
        assert not engine.has_unfinished_requests

    await served.ask(check)
    assert served.num_queued == 0
    assert not served._streams


behaviours = st.one_of(
    st.just(("reads", 0)),
    st.just(("reads", 0)),
    st.tuples(st.just("reads slowly"), st.integers(1, 5)),
    st.tuples(st.just("is cancelled while adding"), st.integers(0, 4)),
    st.tuples(st.just("aborts after outputs"), st.integers(0, 6)),
    st.tuples(st.just("goes without a word"), st.integers(0, 3)),
)


async def turns(number):
    for _ in range(number):
        await asyncio.sleep(0)


@st.composite
def schedules(draw):
    """A workload, how each client behaves, what is added in one go, and when all is aborted."""
    workload = draw(workloads())
    # With a seed of its own, what a request gets does not depend on who came before it.
    seeded = [
        request
        if request.params.get("use_beam_search")
        else dataclasses.replace(request, params={**request.params, "seed": i})
        for i, request in enumerate(workload.requests)
    ]
    workload = dataclasses.replace(workload, requests=tuple(seeded))
    clients, names = [], list(range(len(seeded)))
    while names:
        together = names[: draw(st.integers(1, 3))]
        del names[: len(together)]
        clients.append((together, draw(behaviours), draw(st.booleans()) and draw(st.booleans())))
    return workload, clients, draw(st.none() | st.none() | st.integers(0, 60))


few = settings(max_examples=max(10, settings().max_examples // 3))


@few
@given(schedule=schedules())
def test_whoever_stays_gets_what_naive_generation_gives(schedule):
    """T4 and T5 through the event loop, whatever the others do."""
    workload, clients, abort_all_at = schedule
    seen, ended = {}, {}

    def observe(stream, output, when):
        before = seen.get(output.request_id, (0, 0))
        now = (when, sum(len(c.token_ids) for c in output.outputs))
        assert output.request_id in stream.request_ids
        assert stream.arrived <= when
        assert now[0] >= before[0]
        assert output.request_id not in ended, "an output came after the last one"
        seen[output.request_id] = now
        if output.finished:
            ended[output.request_id] = output

    async def client(served, together, behaviour, is_refused):
        what, number = behaviour
        await turns(3 * workload.requests[together[0]].arrival)
        prompts = [new(str(i), workload.requests[i]) for i in together]
        if is_refused:
            with pytest.raises(InvalidRequestError, match="the prompt is empty"):
                await served.add([*prompts, new("bad", REFUSED)])
            return {}
        adding = asyncio.ensure_future(served.add(prompts))
        if what == "is cancelled while adding":
            await turns(number)
            adding.cancel()
        try:
            stream = await adding
        except asyncio.CancelledError:
            return {}
        got = {}
        if what == "goes without a word":
            await turns(number)
            served.abort(stream)
            return got
        async for output in stream.outputs():
            got[int(output.request_id)] = output
            if what == "reads slowly":
                await asyncio.sleep(0.001 * number)
            if what == "aborts after outputs":
                number -= 1
                if number < 0:
                    break
        if what == "is cancelled while adding":
            return got  # it was too late to be cancelled, and it is served like others
        served.abort(stream)
        return got

    async def chaos(served):
        if abort_all_at is not None:
            await turns(abort_all_at)
            served.abort_all()

    async def scenario():
        served = AsyncEngine(workload.engine())
        served.observers.append(observe)
        results = await asyncio.gather(*(client(served, *each) for each in clients), chaos(served))
        await idle(served)
        assert seen.keys() == ended.keys()
        await served.stop()
        return {i: output for got in results[:-1] for i, output in got.items()}

    got = run(scenario())
    for together, (what, _), is_refused in clients:
        for i in together:
            output, request = got.get(i), workload.requests[i]
            leaves = what not in ("reads", "reads slowly") or is_refused
            is_aborted = output is not None and "abort" in [c.finish_reason for c in output.outputs]
            if is_aborted:
                assert abort_all_at is not None or leaves
                output = dataclasses.replace(output, finished=False)
            if leaves or is_aborted or abort_all_at is not None:
                request = dataclasses.replace(request, abort_at=0)
            check_output(request, output, request.expected(workload.decoder, 0))


@given(together=st.lists(requests, min_size=1, max_size=4), place=st.integers(0, 4))
def test_prompts_are_added_all_or_none(together, place):
    batch = [new(str(i), request) for i, request in enumerate(together)]
    batch = [dataclasses.replace(each, priority=0) for each in batch]
    batch.insert(place, new("bad", REFUSED))

    async def scenario():
        served = AsyncEngine(small_engine(max_num_seqs=16))
        with pytest.raises(InvalidRequestError):
            await served.add(batch)
        await idle(served)
        await served.stop()

    run(scenario())


@pytest.mark.parametrize("error", [InvalidRequestError("no"), RuntimeError("a defect")])
def test_none_is_added_whatever_the_error(error):
    engine = small_engine()
    add = engine.add_request
    engine.add_request = lambda name, *rest: (
        (_ for _ in ()).throw(error) if name == "2" else add(name, *rest)
    )

    async def scenario():
        served = AsyncEngine(engine)
        with pytest.raises(type(error)):
            await served.add([new(str(i), LONG) for i in range(4)])
        await idle(served)
        await served.stop()

    run(scenario())


@few
@given(limit=st.integers(1, 5), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_the_queue_holds_exactly_so_many(limit, sizes):
    """One request runs and is in the middle of a step: it does not count, all others do."""

    async def scenario():
        engine = small_engine(max_num_seqs=1)
        held = Held(engine)
        served = AsyncEngine(engine, limit)
        running = await served.add([new("running", LONG)])
        await held.computing()
        assert served.num_queued == 0
        adding, num_queued = [], 0
        for number, size in enumerate(sizes):
            batch = [new(f"{number}.{i}", SHORT) for i in range(size)]
            if number % 2:  # let the engine see those before, in the middle of its next step
                held.steps.release()
                await asyncio.gather(*adding)
                await held.computing()
            assert served.num_queued == num_queued
            if size > limit:
                with pytest.raises(InvalidRequestError, match=f"the queue holds {limit}"):
                    await served.add(batch)
            elif num_queued + size > limit:
                with pytest.raises(QueueFullError, match=f"{num_queued} requests wait") as refusal:
                    await served.add(batch)
                assert refusal.value.retry_after == 1  # nothing has ended yet
            else:
                adding.append(asyncio.ensure_future(served.add(batch)))
                await turns(1)
                num_queued += size
        held.go_on()
        served.abort(running)
        for stream in await asyncio.gather(*adding):
            assert all(output.finished for output in await stream.finished())
        await idle(served)
        stream = await served.add([new(f"later {i}", SHORT) for i in range(limit)])
        await stream.finished()
        await served.stop()

    run(scenario())


@given(ages=st.lists(st.floats(0, 1e6), max_size=64), limit=st.integers(1, 3))
def test_when_to_come_back_is_a_sane_number_of_seconds(ages, limit):
    async def scenario():
        served = AsyncEngine(small_engine(), limit)
        served._ends.extend(time.monotonic() - age for age in sorted(ages, reverse=True))
        assert isinstance(served._retry_after(), int)
        assert 1 <= served._retry_after() <= LONGEST_RETRY_AFTER
        await served.stop()

    run(scenario())


@pytest.mark.parametrize("when", ["not seen", "accepted", "has a token", "refused"])
def test_whoever_is_cancelled_while_adding_leaves_nothing(when):
    """At the moments at which the engine knows more than the one who waits for it."""

    async def scenario():
        engine = small_engine()
        held = Held(engine)
        served = AsyncEngine(engine)
        begun, ended = set(), {}

        def observe(_, output, when):
            begun.add(output.request_id)
            if output.finished:
                ended[output.request_id] = output.outputs[0].finish_reason

        served.observers.append(observe)
        before = await served.add([new("before", LONG)])
        await held.computing()
        request = REFUSED if when == "refused" else LONG
        adding = asyncio.ensure_future(served.add([new("a", LONG), new("b", request)]))
        await turns(2)
        if when != "not seen":
            # The event loop stands still, so that it hears of nothing.
            held.is_computing.clear()
            held.steps.release(2 if when == "has a token" else 1)
            end = time.monotonic() + PATIENCE
            while served._num_seen < 3 or not held.is_computing.is_set() or held.steps._value:
                assert time.monotonic() < end
                time.sleep(0.001)
            await turns(1)  # the answer has come, and whoever waits for it has not yet gone on
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        held.go_on()
        await before.finished()
        await idle(served)
        expected = {} if when == "refused" else {"a": "abort", "b": "abort"}
        assert ended == {**expected, "before": "length"}
        assert begun == ended.keys(), "whoever counts would wait for ever for the others' end"
        await served.stop()

    run(scenario())


def test_a_question_of_somebody_who_has_gone_is_not_asked():
    async def scenario():
        engine = small_engine()
        held = Held(engine)
        served = AsyncEngine(engine)
        stream = await served.add([new("a", LONG)])
        await held.computing()
        asked = []
        asking = asyncio.ensure_future(served.ask(asked.append))
        await turns(2)
        asking.cancel()
        await turns(2)
        held.go_on()
        await stream.finished()
        assert asked == []
        await served.stop()

    run(scenario())


@pytest.mark.parametrize("where", ["step", "abort"])
def test_when_the_engine_fails_nobody_hangs(where, caplog):
    async def scenario():
        engine = small_engine(max_num_seqs=2)
        held = Held(engine)
        served = AsyncEngine(engine)
        adding = [asyncio.ensure_future(served.add([new(str(i), LONG)])) for i in range(3)]
        while not all(add.done() for add in adding):
            held.steps.release()
            await asyncio.sleep(0.001)
        streams = await asyncio.gather(*adding)
        waiting = [asyncio.ensure_future(stream.finished()) for stream in streams]
        await held.computing()

        def fail(*_):
            raise RuntimeError("a defect of " + where)

        if where == "abort":
            engine.abort = fail
            served.abort(streams[0])
        else:
            engine.runner.execute = fail
        waiting += [
            asyncio.ensure_future(served.add([new("late", SHORT)])),
            asyncio.ensure_future(served.ask(Engine.check_integrity)),
        ]
        await turns(2)
        held.go_on()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        expected = [EngineDiedError] * 5
        if where == "step":  # these two come between the steps, before the one that fails
            expected[4] = type(None)
            assert isinstance(results[3], EngineDiedError) or not results[3]._newest
            results[3] = EngineDiedError()
        assert [type(result) for result in results] == expected
        assert served.died.is_set()
        assert not served.is_serving
        assert not served._streams
        for late in (served.add([new("later", SHORT)]), served.ask(Engine.check_integrity)):
            with pytest.raises(EngineDiedError):
                await late
        served.abort_all()
        await served.stop()

    run(scenario())
    assert f"a defect of {where}" in caplog.text


@few
@given(running=st.integers(0, 4), num_turns=st.integers(0, 30))
def test_stopping_ends_all_requests_where_they_stand(running, num_turns):
    async def scenario():
        served = AsyncEngine(engine := small_engine(max_num_seqs=2))
        streams = [await served.add([new(str(i), LONG)]) for i in range(running)]
        await turns(num_turns)
        late = asyncio.ensure_future(served.add([new("late", LONG)]))
        await turns(1)
        await served.stop()
        for stream in [*streams, await late]:
            (output,) = await stream.finished()
            assert output.outputs[0].finish_reason in ("abort", "length")
        assert not served._streams
        for late in (served.add([new("later", SHORT)]), served.ask(Engine.check_integrity)):
            with pytest.raises(ShuttingDownError):
                await late
        engine.check_integrity()
        assert engine.scheduler.manager.device.num_used == 0
        assert not served._thread.is_alive()

    run(scenario())


def test_a_reader_who_sleeps_costs_one_output():
    async def scenario():
        served = AsyncEngine(small_engine())
        asleep = await served.add([new("asleep", LONG)])
        awake = await served.add([new("awake", LONG)])
        await awake.finished()
        while served.num_unfinished:
            await asyncio.sleep(0.001)
        assert len(asleep._newest) == 1
        (output,) = [output async for output in asleep.outputs()]
        assert output.finished
        assert len(output.outputs[0].token_ids) == 40
        await served.stop()

    run(scenario())
