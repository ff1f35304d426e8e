"""Lesson 17: an engine behind an event loop: nobody hangs, no text is lost, nothing leaks (T5)."""

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time

import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st
from strategies import Request, Workload, check_output

from minipaged.course.narration import story
from minipaged.course.notation import manager_state
from minipaged.course.stubs import STILL_OPEN
from minipaged.engine.outputs import CompletionOutput, RequestOutput
from minipaged.errors import InvalidRequestError
from minipaged.request.sampling_params import SamplingParams
from minipaged.serving.async_engine import (
    LONGEST_RETRY_AFTER,
    AsyncEngine,
    EngineDiedError,
    QueueFullError,
    ShuttingDownError,
)
from minipaged.serving.stream import NewRequest, Stream

# Seconds, for what takes milliseconds.  With a planted bug in the file, what hangs is a bug.
PATIENCE = 1.5 if os.environ.get("HYPOTHESIS_PROFILE") == "planted" else 5


pytestmark = pytest.mark.usefixtures("one_thread")


class StillWaitingError(BaseException):
    """Somebody waits for what does not come; no Exception, or a smaller example is waited for."""


async def soon(awaitable, what):
    """Its result; if that does not come, `what` says what was missed."""
    try:
        return await asyncio.wait_for(awaitable, PATIENCE)
    except asyncio.TimeoutError:
        raise StillWaitingError(f"after {PATIENCE} s {what}") from None


async def turns(number):
    """Let the event loop turn so often."""
    for _ in range(number):
        await asyncio.sleep(0)


async def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise StillWaitingError(f"after {PATIENCE} s {what}")
        await asyncio.sleep(0.001)


def run(scene):
    """Play a scene in an event loop of its own, which no thread and no executor can keep open."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(scene)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=1))
        loop.close()


class Logged(logging.Handler):
    """The errors of which the engine's thread wrote a traceback into the log."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def emit(self, record):
        if record.exc_info:
            self.errors.append(record.exc_info[1])


THREAD = ("_leave", "_run", "_make_calls")
ADMISSION = ("_check_admission", "_retry_after", "_accept", "_end")


def check_written(names):
    """Raise what an open function would raise; in a thread it would be raised at any time."""
    for name in names:
        for constant in getattr(AsyncEngine, name).__code__.co_consts:
            if STILL_OPEN in str(constant):
                raise NotImplementedError(constant)


def serve(engine, scene, max_queued=256, needs=THREAD):
    """Play a scene with an AsyncEngine; if its thread dies or does not end, say so."""
    check_written(needs)
    died, logged = [], Logged()
    hook, threading.excepthook = threading.excepthook, lambda args: died.append(args.exc_value)
    logging.getLogger("minipaged").addHandler(logged)

    async def play():
        served = AsyncEngine(engine, max_queued)
        join = served._thread.join
        served._thread.join = lambda: join(PATIENCE)  # so that stop() comes back in any case
        acting = asyncio.ensure_future(scene(served))
        try:
            while not acting.done() and not died:
                await asyncio.wait([acting], timeout=0.02)
            if died:
                raise died_of(died[0])
            result = await acting
            await soon(served.stop(), "stop() has not come back")
            assert not died, died_of(died[0])
            assert not served._thread.is_alive(), (
                f"{PATIENCE} s after stop() the engine's thread has not come to an end"
            )
            return result
        except EngineDiedError as error:
            raise (logged.errors[0] if logged.errors else error) from error
        finally:
            if served._thread.is_alive():  # it must not disturb the next test
                served._is_stopping = True
                engine.step = end_the_thread
                if served._has_work.acquire(timeout=0.2):
                    served._has_work.notify()
                    served._has_work.release()
                join(0.2)

    try:
        return run(play())
    finally:
        threading.excepthook = hook
        logging.getLogger("minipaged").removeHandler(logged)


def died_of(error):
    return AssertionError(
        f"the engine's thread has died of {type(error).__name__} ({error}); nobody was told, so "
        "all who wait for it would wait for ever"
    )


def end_the_thread():
    raise SystemExit


# 17.1: the mailbox


def output(name, num_tokens, is_last):
    completion = CompletionOutput(
        0, "word " * num_tokens, [7] * num_tokens, finish_reason="stop" if is_last else None
    )
    return RequestOutput(name, None, [1], [completion], is_last)


def length(output):
    return len(output.outputs[0].token_ids)


def mailbox(names):
    story.begin()
    story.tell(f"stream = Stream of the requests {', '.join(names)}")
    return Stream([NewRequest(name, [1], SamplingParams()) for name in names])


def put(stream, name, num_tokens, is_last):
    end = ", its last one" if is_last else ""
    story.tell(f"stream.put(output of {name} with {num_tokens} tokens{end})")
    stream.put(output(name, num_tokens, is_last))


@st.composite
def puts(draw):
    """How many outputs each request has, their order, and how often the loop turns after each."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    names = [name for name, count in zip("ABC", counts, strict=False) for _ in range(count)]
    order = draw(st.permutations(names))
    pauses = draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    return dict(zip("ABC", counts, strict=False)), list(zip(order, pauses, strict=True))


async def write(stream, counts, order):
    so_far = dict.fromkeys(counts, 0)
    for name, pause in order:
        so_far[name] += 1
        put(stream, name, so_far[name], so_far[name] == counts[name])
        await turns(pause)


async def read(stream, counts, num_turns, got):
    async for news in stream.outputs():
        name = news.request_id
        story.tell("await anext(outputs)", f"{name} with {length(news)} tokens")
        assert length(news) > max(got[name], default=0), (
            f"the reader has seen {max(got[name], default=0)} tokens of {name} and gets an output "
            f"with {length(news)} after it: an older one, or the same again"
        )
        got[name].append(length(news))
        await turns(num_turns)


async def write_and_read(stream, counts, order, num_turns):
    """Everything happens in this event loop, so that a reader who has not ended never will."""
    got = {name: [] for name in counts}
    reading = asyncio.ensure_future(read(stream, counts, num_turns, got))
    await turns(1)
    await write(stream, counts, order)
    await turns(20 * (num_turns + 2))
    if not reading.done():
        last = {name: max(lengths, default=0) for name, lengths in got.items()}
        raise AssertionError(
            "everything was put, and the reader still waits: it was not woken, or the last output "
            f"of a request was lost; tokens seen: {last}, and should be {counts}"
        )
    reading.result()
    return got


@pytest.mark.task("17.1")
@given(puts=puts(), num_turns=st.integers(0, 9))
def test_a_reader_of_any_speed_ends_with_all_the_text(puts, num_turns):
    counts, order = puts

    async def scene():
        return await write_and_read(mailbox(list(counts)), counts, order, num_turns)

    for name, lengths in run(scene()).items():
        assert lengths[-1] == counts[name], f"the last output of {name} was not the one to stay"


@pytest.mark.task("17.1")
@given(count=st.integers(1, 6))
def test_a_reader_who_is_fast_enough_misses_nothing(count):
    async def scene():
        return await write_and_read(mailbox(["A"]), {"A": count}, [("A", 5)] * count, 0)

    expected = list(range(1, count + 1))
    got = run(scene())["A"]
    assert got == expected, f"there was time to read the outputs {expected}; read were {got}"


@pytest.mark.task("17.1")
def test_a_reader_who_has_stopped_costs_one_output_of_each_request():
    async def scene():
        stream = mailbox(["A", "B"])
        for count in range(1, 1001):
            stream.put(output("A", count, False))
            stream.put(output("B", count, count == 1000))
        stream.put(output("A", 1001, True))
        story.tell("a thousand outputs of A and of B are put, and nobody reads")
        assert len(stream._newest) <= 2, (
            f"{len(stream._newest)} outputs are kept for a reader who has stopped reading; the "
            "newest of each of the 2 requests is enough"
        )

        async def all_that_is_left():
            return [news async for news in stream.outputs()]

        left = await soon(all_that_is_left(), "the reader still waits: an output was lost")
        assert {news.request_id: length(news) for news in left} == {"A": 1001, "B": 1000}

    run(scene())


@pytest.mark.task("17.1")
@pytest.mark.parametrize("is_waiting", [True, False], ids=["waits", "comes later"])
@pytest.mark.parametrize("has_news", [True, False], ids=["news", "no news"])
def test_whoever_waits_hears_of_a_failure(is_waiting, has_news):
    async def scene():
        stream, got = mailbox(["A"]), {"A": []}
        reading = read(stream, {"A": 2}, 0, got)
        if is_waiting:
            reading = asyncio.ensure_future(reading)
            await turns(2)
        if has_news:
            put(stream, "A", 1, False)
        story.tell("stream.fail(EngineDiedError())")
        stream.fail(EngineDiedError())
        with pytest.raises(EngineDiedError):
            await soon(reading, "the reader still waits: nobody told it of the failure")
        assert got["A"] == [1] * has_news, "what was there before the failure is not lost by it"

    run(scene())


# 17.2: the engine's thread


def ask_for(max_tokens, prompt=(1, 2, 3), **params):
    fixed = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    return Request(prompt, {**fixed, **params})


LONG, SHORT, REFUSED = ask_for(40), ask_for(2, (4, 5)), Request((), {})
MEDIUM = ask_for(6)


def new(name, request):
    return NewRequest(name, list(request.prompt), SamplingParams(**request.params))


def small_engine(max_num_seqs=4, num_blocks=64):
    return Workload((), 4, num_blocks, max_num_seqs, 64).engine()


class Held:
    """Stands before an engine's step, which goes on when it is told to."""

    def __init__(self, engine):
        self.permits = threading.Semaphore(0)
        self.is_stepping = threading.Event()
        self.execute = engine.runner.execute

        def wait_and_execute(plan):
            self.is_stepping.set()
            if not self.permits.acquire(timeout=4 * PATIENCE):
                raise SystemExit
            self.is_stepping.clear()
            return self.execute(plan)

        engine.runner.execute = wait_and_execute

    async def in_a_step(self):
        await until(self.is_stepping.is_set, "the engine has not begun a step, and has work to do")

    def next_step(self):
        self.is_stepping.clear()
        self.permits.release()

    def go_on(self):
        self.permits.release(1000)  # more than there are steps; each one takes time


async def let_in(served, **requests):
    """What `add` does, but without asking who may come in: that is the next task."""
    stream = Stream([new(name, request) for name, request in requests.items()])
    served._streams.update((name, stream) for name in requests)

    def add(engine):
        for name, request in requests.items():
            engine.add_request(name, list(request.prompt), new(name, request).params)

    await soon(served.ask(add), "the engine has not heard of a request that was left for it")
    return stream


def questions(number):
    return f"{number} question{'s' * (number != 1)}"


def fail(*_):
    raise RuntimeError("a failure, as this test wants it")


async def none_hangs(asking, what):
    """Every question is answered, or refused because the engine has failed."""
    for question in asking:
        with contextlib.suppress(EngineDiedError):
            await soon(question, what)


async def outputs_of(stream):
    missing = "a request has not ended, and the engine has nothing else to do"
    return await soon(stream.finished(), missing)


@pytest.mark.task("17.2")
@at_most(40)
@given(script=st.lists(st.sampled_from(["ask", "ask", "request", "turn"]), min_size=1, max_size=12))
def test_calls_are_made_in_order_between_two_steps_by_one_thread(script):
    story.begin("an event loop leaves these for the engine, one after the other")
    engine, steppers, made = small_engine(), set(), []
    is_stepping = threading.Event()
    step = engine.step

    def watched_step():
        steppers.add(threading.get_ident())
        is_stepping.set()
        outputs = step()
        is_stepping.clear()
        return outputs

    engine.step = watched_step

    async def scene(served):
        asking, streams = [], []

        def call(number):
            made.append((number, threading.get_ident(), is_stepping.is_set()))

        asking.append(served.ask(lambda _: call(0)))
        for what in script:
            story.tell(what)
            if what == "request":
                name = str(len(streams))
                streams.append(await let_in(served, **{name: SHORT}))
            elif what == "turn":
                await turns(1)
            else:
                number = len(asking)
                asking.append(asyncio.ensure_future(served.ask(lambda _, n=number: call(n))))
                await turns(1)
        await soon(asyncio.gather(*asking[1:], asking[0]), "a question was never answered")
        for stream in streams:
            await outputs_of(stream)
        return served._thread.ident

    thread = serve(engine, scene)
    numbers = [number for number, _, _ in made]
    assert sorted(numbers) == list(range(len(made))), f"calls were made twice or never: {numbers}"
    later = [number for number in numbers if number]  # the first one was asked last
    assert later == sorted(later), f"calls were made in the order {later}: a queue keeps theirs"
    threads = {ident for _, ident, _ in made} | steppers
    assert threads == {thread}, "somebody other than the engine's thread called the engine"
    assert not any(inside for _, _, inside in made), "a call was made in the middle of a step"


@pytest.mark.task("17.2")
@at_most(25)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=4),
    pauses=st.lists(st.integers(0, 20), min_size=4, max_size=4),
)
def test_everybody_gets_their_own_tokens(sizes, pauses):
    story.begin("(prompt, output) tokens of the requests, which come one after the other")
    story.tell(f"sizes = {sizes}")
    asked = [ask_for(n, tuple(range(1, prompt + 1))) for prompt, n in sizes]
    workload = Workload(tuple(asked), 4, 24, 2, 16)

    async def scene(served):
        streams = []
        for number, request in enumerate(asked):
            streams.append(await let_in(served, **{str(number): request}))
            await turns(pauses[number])
        return [await outputs_of(stream) for stream in streams]

    for request, (got,) in zip(asked, serve(workload.engine(), scene), strict=True):
        check_output(request, got, request.expected(workload.decoder, 0))


@pytest.mark.task("17.2")
def test_an_idle_engine_sleeps_and_can_be_woken():
    story.begin("an engine that has nothing to do")

    async def idle_seconds():
        """Of processor time, in a usual moment of 50 ms."""
        seconds = []
        for _ in range(5):
            before = time.process_time()
            await asyncio.sleep(0.05)
            seconds.append(time.process_time() - before)
        return sorted(seconds)[2]

    async def scene(served):
        for number in range(2):
            await soon(served.ask(id), "a question to the sleeping engine woke nobody")
            story.tell(f"question {number} is answered")
            spent = await idle_seconds()
            assert spent < 0.005, (
                f"in 50 ms with nothing to do the process computed for {1000 * spent:.0f} ms: the "
                "thread goes round and round where it should sleep in `self._has_work.wait()`"
            )
            await outputs_of(await let_in(served, **{str(number): SHORT}))
            story.tell(f"request {number} is served")

    serve(small_engine(), scene)


@pytest.mark.task("17.2")
def test_a_busy_engine_answers_after_the_step_at_hand():
    story.begin("a request of 40 tokens, and a question in the middle of some of its steps")
    engine = small_engine()
    held = Held(engine)

    async def scene(served):
        try:
            stream = await let_in(served, A=LONG)
            for number in range(4):
                await held.in_a_step()
                asking = asyncio.ensure_future(served.ask(lambda engine: engine.num_steps))
                await turns(2)
                assert not asking.done(), "a question was answered in the middle of a step"
                held.next_step()
                steps = await soon(asking, "a question was not answered after the step at hand")
                story.tell(f"question {number}", f"answered after {steps} steps")
                assert steps <= number + 2, f"it had to wait for {steps - number} steps"
        finally:
            held.go_on()
        await outputs_of(stream)

    serve(engine, scene)


@pytest.mark.task("17.2")
@pytest.mark.parametrize("what", ["call", "step"])
def test_the_event_loop_is_not_kept_waiting(what):
    story.begin(f"the engine is in the middle of a {what}, and somebody leaves a question")
    engine = small_engine()
    is_inside, was_left, waited = threading.Event(), threading.Event(), []

    def linger():
        if not waited:
            is_inside.set()
            waited.append(was_left.wait(1))

    if what == "step":
        step = engine.step
        engine.step = lambda: (linger(), step())[1]

    async def scene(served):
        asking = [asyncio.ensure_future(served.ask(lambda _: what == "call" and linger()))]
        if what == "step":
            await let_in(served, A=SHORT)
        await until(is_inside.is_set, f"the {what} has not begun")
        asking.append(asyncio.ensure_future(served.ask(id)))
        await turns(2)
        story.tell("served.ask(...)", "left for the engine")
        was_left.set()
        await soon(asyncio.gather(*asking), "a question was never answered")
        await until(lambda: not served.num_unfinished, "a request has not ended")

    serve(engine, scene)
    assert waited == [True], (
        f"the event loop could not leave a call while a {what} went on, and with it all clients "
        "stood still: hold the lock to look at the calls, not to make them"
    )


@pytest.mark.task("17.2")
@at_most(40)
@given(num_questions=st.integers(1, 4), is_busy=st.booleans(), num_turns=st.integers(0, 10))
def test_nobody_is_left_behind_when_it_stops(num_questions, is_busy, num_turns):
    story.begin(f"the engine is {'busy' if is_busy else 'idle'}, and is stopped")
    engine = small_engine()

    async def scene(served):
        if is_busy:  # a request for which nobody waits
            prompt, params = list(LONG.prompt), SamplingParams(**LONG.params)
            await soon(served.ask(lambda e: e.add_request("A", prompt, params)), "nothing comes")
        await turns(num_turns)
        asking = [asyncio.ensure_future(served.ask(id)) for _ in range(num_questions)]
        await turns(1)
        story.tell(f"{questions(num_questions)}, then stop() is called")
        await served.stop()
        await soon(asyncio.gather(*asking), "a question that was left before stop() has no answer")
        with pytest.raises(ShuttingDownError):
            await soon(served.ask(id), "a question after stop() is neither answered nor refused")

    serve(engine, scene)


@pytest.mark.task("17.2")
@pytest.mark.parametrize("num_behind", [1, 3])
def test_a_call_that_raises_takes_no_other_with_it(num_behind):
    story.begin("in the middle of a step a call is left that raises, and behind it")
    engine = small_engine()
    held = Held(engine)

    async def scene(served):
        try:
            await let_in(served, A=LONG)
            await held.in_a_step()
            served._leave(fail)
            asking = [asyncio.ensure_future(served.ask(id)) for _ in range(num_behind)]
            await turns(2)
            story.tell(questions(num_behind))
        finally:
            held.go_on()
        await none_hangs(asking, "a question behind a call that raised was never answered")
        await soon(served.died.wait(), "nobody was told that the engine failed")

    serve(engine, scene)


@pytest.mark.task("17.2")
@pytest.mark.parametrize("num_questions", [0, 2])
def test_when_a_step_fails_nobody_hangs(num_questions, caplog):
    story.begin("a step raises a RuntimeError; A waits for its tokens")
    story.tell(f"left in the middle of that step: {questions(num_questions)}")
    engine = small_engine()
    held = Held(engine)

    async def scene(served):
        try:
            stream = await let_in(served, A=LONG)
            waiting = asyncio.ensure_future(stream.finished())
            await held.in_a_step()
            held.execute = fail
            asking = [asyncio.ensure_future(served.ask(id)) for _ in range(num_questions)]
            await turns(2)
        finally:
            held.go_on()
        with pytest.raises(EngineDiedError):
            await soon(waiting, "whoever waits for tokens has not been told: call self._fail")
        await none_hangs(asking, "a question that had been left was never answered")
        assert served.died.is_set()
        assert not served.is_serving, "self._has_failed says that no more can be served"
        with pytest.raises(EngineDiedError):
            await soon(served.ask(id), "a question after the failure is not refused")

    serve(engine, scene)
    assert "as this test wants it" in caplog.text, "the log must say why the engine failed"


# 17.3: who is let in, and who goes


admit = functools.partial(serve, needs=(*ADMISSION, *THREAD))


async def all_quiet(served):
    """T5: when everybody has gone, everything is as it was before."""
    await until(
        lambda: not served.num_unfinished,
        f"{sorted(served._streams)} stand in self._streams, and nothing will ever come for them",
    )

    def check(engine):
        engine.check_integrity()
        manager = engine.scheduler.manager
        assert not engine.has_unfinished_requests, "the engine still serves a request nobody has"
        assert manager.device.num_used == 0, f"blocks are lost: {manager_state(manager)}"

    await soon(served.ask(check), "the engine does not answer any more")
    assert served.num_queued == 0, (
        f"nobody waits, and num_queued is {served.num_queued}: requests were left for the engine "
        "that it has not counted as seen, or has counted twice"
    )


def tell_added(names, what=""):
    story.tell(f"served.add([{', '.join(names)}])", what)


@pytest.mark.task("17.3")
@at_most(40)
@given(
    num_good=st.integers(1, 4),
    place=st.integers(0, 4),
    error=st.sampled_from([InvalidRequestError("no"), RuntimeError("a defect")]),
    is_busy=st.booleans(),
)
def test_all_are_let_in_or_none(num_good, place, error, is_busy):
    names = [f"good {number}" for number in range(num_good)]
    names.insert(place, "bad")
    story.begin(f"the engine refuses 'bad' with {type(error).__name__}")
    engine = small_engine(max_num_seqs=8)
    add = engine.add_request

    def add_or_refuse(name, *rest):
        if name == "bad":
            raise error
        return add(name, *rest)

    engine.add_request = add_or_refuse

    async def scene(served):
        before = [await soon(served.add([new("before", MEDIUM)]), "add waits")] if is_busy else []
        tell_added(names)
        with pytest.raises(type(error)):
            await soon(served.add([new(name, LONG) for name in names]), "add waits for ever")
        for stream in before:
            (got,) = await outputs_of(stream)
            assert len(got.outputs[0].token_ids) == 6, "a request of somebody else was ended"
        await all_quiet(served)
        stream = await soon(served.add([new("after", SHORT)]), "add waits for ever")
        await outputs_of(stream)

    admit(engine, scene)


@pytest.mark.task("17.3")
@at_most(25)
@given(limit=st.integers(1, 5), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_the_queue_holds_exactly_so_many(limit, sizes):
    story.begin(f"AsyncEngine(engine, max_queued={limit}), with one request running")
    engine = small_engine(max_num_seqs=1)
    held = Held(engine)

    async def scene(served):
        try:
            running = await soon(served.add([new("running", LONG)]), "add waits for ever")
            await held.in_a_step()
            adding, num_queued = [], 0
            for number, size in enumerate(sizes):
                batch = [new(f"{number}.{i}", SHORT) for i in range(size)]
                if number % 2:  # let the engine see those that came before
                    held.next_step()
                    await soon(asyncio.gather(*adding), "add waits for ever")
                    await held.in_a_step()
                assert served.num_queued == num_queued, (
                    f"{num_queued} requests wait, and num_queued is {served.num_queued}"
                )
                tell_added([request.request_id for request in batch], f"{num_queued} wait")
                if size > limit:
                    with pytest.raises(InvalidRequestError, match=f"the queue holds {limit}"):
                        await soon(served.add(batch), "add neither accepts nor refuses")
                elif num_queued + size > limit:
                    with pytest.raises(QueueFullError, match=f"{num_queued} requests wait") as full:
                        await soon(served.add(batch), "add neither accepts nor refuses")
                    assert full.value.retry_after == 1, "nothing has ended yet, so the guess is 1 s"
                else:
                    adding.append(asyncio.ensure_future(served.add(batch)))
                    await turns(1)
                    if adding[-1].done():
                        adding[-1].result()
                    num_queued += size
        finally:
            held.go_on()
        served.abort(running)
        story.tell("served.abort(stream of 'running')")
        for stream in await soon(asyncio.gather(*adding), "add waits for ever"):
            assert all(got.finished for got in await outputs_of(stream))
        await all_quiet(served)
        stream = await served.add([new(f"later {i}", SHORT) for i in range(limit)])
        await outputs_of(stream)

    admit(engine, scene, limit)


@pytest.mark.task("17.3")
@at_most(40)
@given(
    seconds=st.floats(1e-4, 300),
    count=st.integers(1, 64),
    is_regular=st.booleans(),
)
def test_when_to_come_back_follows_the_pace_at_which_requests_end(seconds, count, is_regular):
    how = f"every {seconds:g} s" if is_regular else f"together, {seconds * count:g} s ago"
    story.begin(f"the last requests that ended are {count}: {how}")

    async def scene(served):
        assert served._retry_after() == 1, "nothing has ended yet, so the guess is 1 s"
        now = time.monotonic()
        places = range(count, 0, -1) if is_regular else [count] * count
        served._ends.extend(now - seconds * ago for ago in places)
        story.tell("served._retry_after()")
        return served._retry_after()

    got = admit(small_engine(), scene)
    assert isinstance(got, int), f"Retry-After is a whole number of seconds, not {got!r}"
    assert 1 <= got <= LONGEST_RETRY_AFTER, f"{got} s are not between 1 and {LONGEST_RETRY_AFTER}"
    expected = min(seconds, LONGEST_RETRY_AFTER)
    assert expected - 0.01 <= got <= expected + 2, (
        f"{count} ended in the last {seconds * count:.1f} s, one every {seconds:.1f} s, and the "
        f"guess is {got} s"
    )


@pytest.mark.task("17.3")
def test_the_gravest_reason_is_given():
    story.begin("an engine that holds one request in its queue")

    async def scene(served):
        two = [new("A", SHORT), new("B", SHORT)]
        with pytest.raises(InvalidRequestError, match="2 prompts were sent at once"):
            await soon(served.add(two), "add waits for ever")
        served.stop_admitting()
        with pytest.raises(ShuttingDownError):
            await soon(served.add(two), "add waits for ever")
        served._has_failed = True
        with pytest.raises(EngineDiedError):
            await soon(served.add(two), "add waits for ever")
        served._has_failed = False

    admit(small_engine(), scene, 1)


@pytest.mark.task("17.3")
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_an_aborted_request_is_told_so_and_leaves_nothing(num_tokens):
    story.begin(f"A is aborted after {num_tokens} tokens, and B goes on")
    engine = small_engine()
    held = Held(engine)

    async def scene(served):
        try:
            aborted = await soon(served.add([new("A", LONG)]), "add waits for ever")
            for _ in range(num_tokens):
                await held.in_a_step()
                held.next_step()
            await held.in_a_step()
            served.abort(aborted)
            story.tell("served.abort(stream of A)")
            other = asyncio.ensure_future(served.add([new("B", SHORT)]))
            await turns(1)
        finally:
            held.go_on()
        (got,) = await soon(aborted.finished(), "A's client was never told that A has ended")
        reason = got.outputs[0].finish_reason
        assert reason == "abort", f"the last output of an aborted request says {reason!r}"
        (got,) = await outputs_of(await other)
        assert len(got.outputs[0].token_ids) == 2, "B has nothing to do with it"
        served.abort(aborted)  # once more: it has ended long ago
        await all_quiet(served)

    admit(engine, scene)


def wait_without_turning(condition):
    """The event loop stands still meanwhile, so that it hears of nothing."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the engine does not go on"
        time.sleep(0.001)


@pytest.mark.task("17.3")
@pytest.mark.parametrize("when", ["not seen", "accepted", "has a token", "refused"])
def test_whoever_is_cancelled_while_adding_leaves_nothing(when):
    """At the moments at which the engine knows more than the one who waits for it."""
    story.begin(f"whoever adds 'one' and 'two' is cancelled; for the engine they are: {when}")
    engine = small_engine()
    held = Held(engine)

    async def scene(served):
        try:
            before = await soon(served.add([new("before", LONG)]), "add waits for ever")
            await held.in_a_step()
            request = REFUSED if when == "refused" else LONG
            adding = asyncio.ensure_future(served.add([new("one", LONG), new("two", request)]))
            await turns(2)
            if when != "not seen":
                num_steps = engine.num_steps + (2 if when == "has a token" else 1)
                held.is_stepping.clear()
                held.permits.release(num_steps - engine.num_steps)
                wait_without_turning(
                    lambda: engine.num_steps >= num_steps and held.is_stepping.is_set()
                )
                await turns(1)  # the answer has come, and whoever waits for it has not gone on
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
        finally:
            held.go_on()
        await outputs_of(before)
        await all_quiet(served)

    admit(engine, scene)


@pytest.mark.task("17.3")
def test_an_abort_does_not_overtake_the_last_output():
    story.begin("A has ended, and its last output is on its way to an event loop that is busy")
    engine = small_engine()
    held = Held(engine)

    async def scene(served):
        try:
            stream = await soon(served.add([new("A", SHORT)]), "add waits for ever")
            await held.in_a_step()
        finally:
            held.go_on()
        wait_without_turning(lambda: not engine.has_unfinished_requests)
        served.abort(stream)
        story.tell("served.abort(stream of A)")
        # What is asked after it is answered after it; the event loop stands still until then.
        served._question(id).result(PATIENCE)
        (got,) = await soon(
            stream.finished(), "A's client was never told that A has ended: it was forgotten first"
        )
        assert got.outputs[0].finish_reason == "length", "A had ended before it was aborted"
        await all_quiet(served)

    admit(engine, scene)


@pytest.mark.task("17.3")
def test_an_engine_that_has_failed_is_left_alone():
    story.begin("a step fails; in the middle of it A was aborted, and somebody asked something")
    engine = small_engine()
    held, aborted = Held(engine), []
    step, abort = engine.step, engine.abort

    def watched_step():
        engine.abort = abort  # when a step fails, the engine itself ends what it had
        try:
            return step()
        finally:
            engine.abort = aborted.append

    engine.step = watched_step

    async def scene(served):
        try:
            stream = await soon(served.add([new("A", LONG)]), "add waits for ever")
            await held.in_a_step()
            held.execute = fail
            served.abort(stream)
            asking = asyncio.ensure_future(served.ask(id))
            await turns(2)
        finally:
            held.go_on()
        await none_hangs([asking], "a question that had been left was never answered")
        await soon(served.died.wait(), "nobody was told that the engine failed")

    admit(engine, scene)
    assert not aborted, "after a failure nobody knows what is in the engine: do not call it"


behaviours = st.sampled_from(
    ["reads", "reads", "reads slowly", "is cancelled while adding", "aborts", "goes at once"]
)


@pytest.mark.task("17.3")
@at_most(30)
@given(
    clients=st.lists(
        st.tuples(behaviours, st.integers(0, 8), st.integers(1, 2)), min_size=1, max_size=6
    )
)
def test_whoever_stays_gets_their_tokens_whatever_the_others_do(clients):
    """T4 and T5 through the event loop."""
    story.begin("clients, who come one after the other")
    for number, (what, count, size) in enumerate(clients):
        story.tell(f"client {number}: {what}, {count}, with {size} requests")
    workload = Workload((), 2, 24, 3, 16)

    async def client(served, number, what, count, size):
        await turns(4 * number)
        asked = {f"{number}.{i}": ask_for(3 + 4 * i + number, (1, 2 + i, 3)) for i in range(size)}
        adding = asyncio.ensure_future(
            served.add([new(name, request) for name, request in asked.items()])
        )
        if what == "is cancelled while adding":
            await turns(count)
            adding.cancel()
        try:
            stream = await adding
        except asyncio.CancelledError:
            return
        if what == "goes at once":
            served.abort(stream)
            return
        last = {}
        async for news in stream.outputs():
            last[news.request_id] = news
            if what == "reads slowly":
                await asyncio.sleep(0.001 * count)
            if what == "aborts" and count <= 0:
                served.abort(stream)
                return
            count -= 1
        for name, request in asked.items():
            check_output(request, last[name], request.expected(workload.decoder, 0))

    async def scene(served):
        acting = [client(served, number, *who) for number, who in enumerate(clients)]
        await soon(asyncio.gather(*acting), "a client still waits for its answer")
        await all_quiet(served)

    admit(workload.engine(), scene)


@pytest.mark.task("17.3")
@at_most(25)
@given(num_requests=st.integers(1, 4), num_turns=st.integers(0, 30))
def test_stopping_ends_all_requests_where_they_stand(num_requests, num_turns):
    story.begin(f"{num_requests} requests of 40 tokens, then stop()")
    engine = small_engine(max_num_seqs=2)

    async def scene(served):
        streams = [
            await soon(served.add([new(str(i), LONG)]), "add waits") for i in range(num_requests)
        ]
        await turns(num_turns)
        await served.stop()
        for stream in streams:
            (got,) = await soon(stream.finished(), "a client was not told of the end")
            assert got.outputs[0].finish_reason in ("abort", "length")
        with pytest.raises(ShuttingDownError):
            await soon(served.add([new("late", SHORT)]), "add waits for ever")

    admit(engine, scene)
    engine.check_integrity()
    used = engine.scheduler.manager.device.num_used
    assert used == 0, f"{used} blocks are still held after the end"
