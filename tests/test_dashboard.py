"""The dashboard tells the truth, holds nothing for those who have gone, and works in a browser."""

import asyncio
import base64
import hashlib
import itertools
import json
import os
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import shared_record
from strategies import Request, Workload, workloads

from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.engine.outputs import CompletionOutput, RequestOutput
from minipaged.request.sampling_params import SamplingParams
from minipaged.serving import dashboard, watch
from minipaged.serving.async_engine import AsyncEngine
from minipaged.serving.dashboard import event, page_and_policy, ranges
from minipaged.serving.latencies import Durations, Latencies
from minipaged.serving.server import Server, ServerOptions, open_socket, url_of
from minipaged.serving.stream import NewRequest, Stream
from minipaged.serving.watch import Watch

SCREENSHOTS = os.environ.get("MINIPAGED_SCREENSHOTS")
"""A folder for pictures of the page, if anybody wants to look at them."""
KEY = "a key of the tests"
PATIENCE = 60.0


pytestmark = pytest.mark.usefixtures("one_thread")


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


@contextmanager
def serving(port=0, **options):
    """A real server of the tiny model in a thread: its address, and itself."""
    options = ServerOptions(model="tiny", port=port, api_keys=[KEY], **options)
    with open_socket(options) as sock:
        engine = load_engine(
            "tiny",
            EngineOptions(
                num_blocks=96,
                enable_prefix_caching=True,
                preemption="swap",
                swap_space_gib=0.01,
                max_num_seqs=32,
                debug=True,
            ),
        )
        started = threading.Event()
        server = Server(engine, options, started.set)
        server.inside = engine  # nobody but a test looks at it from outside of its thread
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert started.wait(PATIENCE)
            yield url_of(sock), server
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server does not end"
    engine.check_integrity()
    assert engine.scheduler.manager.device.num_used == 0
    assert not engine.observers


@pytest.fixture(scope="module")
def server():
    with serving() as it:
        yield it


HEADERS = {"Authorization": f"Bearer {KEY}"}


def events_of(response):
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


def decoded(told):
    """The frames of an event, with names for numbers and a set for ranges of cached blocks."""
    cached, names = None, told["requests"]
    for frame in told["frames"]:
        if "cached" in frame:
            pairs = zip(frame["cached"][::2], frame["cached"][1::2], strict=True)
            cached = {block for first, n in pairs for block in range(first, first + n)}
        assert cached is not None, "the first frame says what is cached"
        tables = {
            seq: (names[request], tokens, dropped, bool(host), tuple(blocks))
            for seq, request, tokens, dropped, host, *blocks in frame["tables"]
        }
        yield {**frame, "cached": cached, "tables": tables}


def check_state(frame, engine):
    """A frame agrees with the block manager: owners, reference counts, cached, free, host."""
    manager = engine.scheduler.manager
    for pool, on_host in ((manager.device, False), (manager.host, True)):
        held = Counter(
            block
            for _, _, _, host, blocks in frame["tables"].values()
            if host == on_host
            for block in blocks
        )
        assert held == {b: pool.ref_count(b) for b in range(pool.num_blocks) if pool.ref_count(b)}
        if not on_host:
            assert frame["cached"] == set(pool.cached_blocks)
            assert held.keys().isdisjoint(frame["cached"])
            assert len(held) + len(frame["cached"]) <= pool.num_blocks
    groups = [*engine.scheduler.running, *engine.scheduler.waiting]
    requests = {s.seq_id: group.request_id for group in groups for s in group.sequences}
    assert {seq: table[0] for seq, table in frame["tables"].items()} == {
        seq: requests[seq] for seq in manager.tables
    }
    for seq, (_, tokens, dropped, _, _) in frame["tables"].items():
        table = manager.tables[seq]
        assert (tokens, dropped) == (table.num_tokens, table.num_dropped)


# What is told.


@settings(max_examples=25, deadline=None)
@given(workload=workloads(), pauses=st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_the_state_is_the_block_managers(workload, pauses):
    engine, seen = workload.engine(), Watch()
    seen.attach(engine)
    for i, request in enumerate(workload.requests):
        params = SamplingParams(**request.params)
        engine.add_request(f"request {i}", request.prompt, params, request.priority)
    state, next_step, pauses = None, 0, itertools.cycle(pauses)
    while True:
        for _ in range(next(pauses)):
            engine.step()
        news = seen.fetch(engine)
        told = json.loads(json.dumps(event(news, {}, time.monotonic())))
        frames = list(decoded(told))
        assert told["skipped"] == 0
        for frame in frames:
            if frame["step"] == next_step:
                next_step += 1
            assert frame["step"] == next_step - 1, "a step is missing"
            for source, destination, writer, *keepers in frame.get("copies", ()):
                # block 17 copied to 23: A writes, B keeps 17
                assert source != destination
                assert writer not in keepers
                # The prefix cache may have put an equal block in the place of a full one.
                if writer in frame["tables"] and not workload.prefix_caching:
                    assert destination in frame["tables"][writer][4]
        state = frames[-1] if frames else state
        check_state(state, engine)
        queued = [*engine.scheduler.running, *engine.scheduler.waiting]
        told_of = [told["requests"][number] for number, *_ in told["queue"]]
        assert told_of == [group.request_id for group in queued]
        assert sum(told["queued"].values()) == len(queued)
        if not engine.has_unfinished_requests:
            break
    assert told["counts"]["steps"] == engine.num_steps == next_step
    assert told["counts"]["preemptions"] == engine.scheduler.num_preemptions
    assert state["tables"] == {}
    assert seen.fetch(engine).frames == [], "nothing happened and something is told"
    seen.detach(engine)
    assert not engine.observers


def test_whoever_does_not_fetch_misses_steps_and_costs_no_memory():
    requests = tuple(
        Request((1 + i % 12,) * 9, {"max_tokens": 50, "ignore_eos": True}) for i in range(30)
    )
    engine, seen = Workload(requests, 1, 2000, 30, 60).engine(), Watch()
    seen.attach(engine)
    for i, request in enumerate(requests):
        engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
    while engine.has_unfinished_requests:
        engine.step()
        kept = sum(frame.num_entries for frame, _ in seen._frames)
        assert kept <= watch.MOST_ENTRIES
    news = seen.fetch(engine)
    assert news.num_skipped > 0
    assert news.num_skipped + len({f.step for f in news.frames}) == engine.num_steps
    assert news.counts["tokens"] == 30 * 50
    assert news.frames[-1].tables == ()
    assert not seen._frames


def test_no_text_and_no_token_is_told():
    seen = Watch()
    secret = "what somebody wrote"
    seen.observe(shared_record()._replace(new_text={0: secret}))
    engine = Workload((), 4, 6, 4, 8).engine()
    told = json.dumps(event(seen.fetch(engine), {}, 0.0))
    assert secret not in told
    assert "new_text" not in told


@given(st.sets(st.integers(0, 300)))
def test_ranges_say_the_same_in_fewer_words(blocks):
    told = ranges(blocks)
    pairs = list(zip(told[::2], told[1::2], strict=True))
    assert [b for first, n in pairs for b in range(first, first + n)] == sorted(blocks)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(pairs)), "two could be one"


# How long things took.


@given(st.lists(st.floats(1e-5, 100), min_size=1, max_size=200))
def test_percentiles_are_known_to_two_per_cent(durations):
    kept = Durations()
    for i, duration in enumerate(durations):
        kept.add(duration, 1000 + i * 0.2)
    expected = np.percentile(durations, [50, 90, 99], method="inverted_cdf")
    np.testing.assert_allclose(kept.percentiles(1000 + len(durations) * 0.2), expected, rtol=0.02)
    assert kept.percentiles(1000 + len(durations) * 0.2 + 61) is None


def output(request_id, num_tokens, reason=None):
    one = CompletionOutput(0, "", [1] * num_tokens, finish_reason=reason)
    return RequestOutput(request_id, None, [1], [one], finished=reason is not None)


def test_latencies_count_what_was_seen_from_its_beginning():
    latencies = Latencies()
    streams = {x: Stream([NewRequest(x, [1], SamplingParams())]) for x in "abc"}
    for stream in streams.values():
        stream.arrived = 100.0
    latencies.observe(streams["a"], output("a", 1), 100.5)  # time to first token: 0.5 s
    latencies.observe(streams["b"], output("b", 7), 100.5)  # its first one came unseen
    latencies.observe(streams["a"], output("a", 2, "length"), 100.7)
    latencies.observe(streams["b"], output("b", 7, "abort"), 104.0)  # brings no token
    latencies.observe(streams["c"], output("c", 0, "abort"), 104.0)  # never had one
    told = latencies.percentiles(105.0)
    assert told["first_token"] == pytest.approx([0.5] * 3, rel=0.02)
    assert told["inter_token"] == pytest.approx([0.2] * 3, rel=0.02)
    assert latencies.fetch_marks() == {
        "a": (100.0, 100.5, 100.7, "length"),
        "b": (100.0, None, 104.0, "abort"),
        "c": (100.0, None, 104.0, "abort"),
    }
    assert not latencies._last
    assert not latencies.fetch_marks()


# The page.


class Attributes(HTMLParser):
    """The names of all attributes in a page."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def handle_starttag(self, tag, attributes):
        self.names |= {name for name, _ in attributes}


def test_the_page_may_run_its_own_script_and_nothing_else(server):
    url, _ = server
    answer = httpx.get(url + "/")
    assert answer.status_code == 200, "the page itself needs no key"
    page, policy = answer.text, answer.headers["content-security-policy"]
    for name, tag in (("script", "script"), ("style", "style")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "__" not in page, "a part is missing"
    attributes = Attributes()
    attributes.feed(page)
    assert attributes.names.isdisjoint({"src", "style", "action"}), "the policy forbids it"
    assert not any(name.startswith("on") for name in attributes.names)
    addresses = set(re.findall(r"https?://[\w./]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name of SVG, which nobody fetches"
    assert "innerHTML" not in page, "text of models and clients must stay text"


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_text_stands_out_in_light_and_dark():
    page, _ = page_and_policy()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6});", block))
        for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    )
    for colors in (light, {**light, **dark}):
        for ground in ("bg", "card"):
            for text in ("fg", "dim", "warn", "good", "accent"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        assert contrast(colors["on-accent"], colors["accent"]) >= 4.5
        assert contrast(colors["dim"], colors["free"]) >= 4.5
        for ground in (*(f"owner-{i}" for i in range(7)), "used"):
            assert contrast(colors["ink"], colors[ground]) >= 4.5, ground


# The stream.


def complete(url, **body):
    body = {"prompt": "ROMEO:", "max_tokens": 20, "temperature": 0, **body}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_events_need_the_key(server):
    url, _ = server
    for headers in ({}, {"Authorization": "Bearer another"}):
        answer = httpx.get(f"{url}/dashboard/events", headers=headers)
        assert answer.status_code == 401
    assert httpx.get(f"{url}/dashboard/events?key={KEY}").status_code == 401


def test_the_events_follow_the_engine_and_let_go_of_it(server):
    url, running = server
    secret = "Rumpelstiltskin"
    with httpx.stream("GET", f"{url}/dashboard/events", headers=HEADERS, timeout=30) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response)
        first = next(events)
        assert first["about"]["num_blocks"] == 96
        assert first["frames"], "a new dashboard is told the whole state at once"
        answer = complete(url, prompt=f"{secret} speaks", n=3, temperature=1, ignore_eos=True)
        told, steps, text = [], set(), ""
        for news in events:
            told.append(news)
            text += json.dumps(news)
            steps |= {frame["step"] for frame in news["frames"]}
            if any(mark[3] is not None for mark in news["marks"]):
                ended = [news["requests"][mark[0]] for mark in news["marks"]]
                assert ended == [f"{answer['id']}-0"]
            if not sum(news["queued"].values()) and len(steps) >= 20:
                break
        check_state(list(decoded(told[-1]))[-1], running.inside)
        frames = [frame for news in told for frame in decoded(news)]
        assert sum(len(frame.get("forks", ())) for frame in frames) == 2
        assert told[-1]["counts"]["tokens"] == answer["usage"]["completion_tokens"]
        assert secret not in text
        assert answer["choices"][0]["text"] not in text
        assert len(running.inside.observers) == 1
    wait_until(lambda: not running.inside.observers)
    assert len(running.engine.observers) == 1, "the metrics remain"


def test_an_abort_is_told_though_no_step_follows(server):
    url, _ = server
    with httpx.stream("GET", f"{url}/dashboard/events", headers=HEADERS, timeout=30) as response:
        events = events_of(response)
        next(events)
        body = {"prompt": "ROMEO:", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=HEADERS) as answer:
            next(answer.iter_lines())
        state = {}
        for news in events:
            frames = list(decoded(news))
            state = frames[-1] if frames else state
            marks = [mark[4] for mark in news["marks"]]
            if "abort" in marks or "length" in marks:
                break
        while state["tables"]:
            state = (list(decoded(next(events))) or [state])[-1]


def test_no_more_dashboards_than_are_served(server, monkeypatch):
    url, running = server
    wait_until(lambda: not running.inside.observers)
    monkeypatch.setattr(dashboard, "MOST_WATCHERS", 1)
    with httpx.stream("GET", f"{url}/dashboard/events", headers=HEADERS, timeout=30) as response:
        events = events_of(response)  # which would close the connection if it was forgotten
        next(events)
        answer = httpx.get(f"{url}/dashboard/events", headers=HEADERS)
        assert answer.status_code == 429
        assert "close one of them" in answer.json()["error"]["message"]


def test_the_events_end_with_the_server():
    with serving() as (url, running):
        with httpx.stream("GET", f"{url}/dashboard/events", headers=HEADERS, timeout=30) as answer:
            events = events_of(answer)
            next(events)
            running.should_exit = True
            assert list(events) is not None, "the stream goes on"
        wait_until(lambda: not running.inside.observers)


def test_a_client_that_takes_nothing_does_not_keep_the_server():
    """The client's connection is full: whatever is sent waits for ever."""

    async def stall():
        workload = Workload((), 4, 16, 4, 8)
        engine = workload.engine()
        served = AsyncEngine(engine)
        about = {"about": None}
        stream = dashboard.Events(served, set(), about)
        taken = []

        async def receive():
            await asyncio.Event().wait()

        async def send(message):
            taken.append(message)
            if len(taken) > 1:
                await asyncio.Event().wait()

        sending = asyncio.ensure_future(stream({"type": "http"}, receive, send))
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        for i in range(20):
            requests = [NewRequest(f"{i}", [1, 2, 3], params)]
            await (await served.add(requests)).finished()
        assert len(engine.observers) == 1
        assert len(taken) == 2, "more was sent than was taken"
        served.stop_admitting()
        await asyncio.wait_for(sending, PATIENCE)
        assert not engine.observers
        assert not served.observers
        await served.stop()

    asyncio.run(stall())


# In a browser.


def text_of(browser, selector):
    return browser.ask(f"document.querySelector({selector!r}).textContent")


def facts(browser):
    """Blocks that are used, shared, cached, free, as the page has them."""
    return browser.ask(
        "Object.fromEntries([...document.querySelectorAll('#facts [data-fact]')].map("
        "(e) => [e.dataset.fact, Number(e.querySelector('b').textContent.replace(',', ''))]))"
    )


def block_tables(browser):
    """The block tables that the page shows: letter -> blocks."""
    rows = browser.ask(
        "[...document.querySelectorAll('#tables li[data-letter]')].map("
        "(row) => [row.dataset.letter, row.dataset.blocks.split(',').map(Number)])"
    )
    return dict(rows)


def log_in(browser, url):
    """Open the page, and give it the key unless this tab has it."""
    browser.open(url + "/")
    live = "document.querySelector('#connection').dataset.state === 'live'"
    browser.wait(f"document.querySelector('#key-dialog').open || {live}")
    if browser.ask("document.querySelector('#key-dialog').open"):
        browser.send("Input.insertText", text=KEY)
        browser.press("Enter")
    browser.wait(live)
    browser.wait("document.querySelector('#facts').textContent")
    browser.problems.clear()  # the refusal is one


@pytest.fixture
def page(server, browser):
    """The browser, at the page."""
    browser.look(1280, 900)
    log_in(browser, server[0])
    return browser


def picture(browser, name):
    if SCREENSHOTS:
        time.sleep(0.5)
        browser.picture(Path(SCREENSHOTS) / f"dashboard-{name}.png")


def settle(browser):
    browser.wait("document.querySelector('#stop').disabled")
    browser.wait("document.querySelector('[data-fact=used] b').textContent === '0'")


def test_a_prompt_is_sent_and_its_blocks_are_watched(server, page):
    (url, _), browser = server, page
    assert facts(browser)["used"] == 0
    picture(browser, "idle")
    hits = text_of(browser, "#hits-of")
    browser.click("#send")
    browser.wait("document.querySelector('#said').textContent.startsWith('done')")
    settle(browser)
    assert len(browser.ask("[...document.querySelectorAll('#answers li')].map((e) => 1)")) == 3
    browser.wait(f"document.querySelector('#hits-of').textContent !== {hits!r}")
    browser.wait("/\\d (ms|s|µs)/.test(document.querySelector('#first-token').textContent)")

    # Play from the beginning of the run, stop, and step to where three share a block.
    browser.click('[data-do="play"]')
    browser.wait("document.querySelectorAll('#tables li[data-letter]').length === 3")
    browser.click('[data-do="play"]')
    browser.wait("""document.querySelector('[data-do="play"]').textContent === 'Play'""")
    tables = block_tables(browser)
    assert list(tables) == ["A", "B", "C"]
    held = Counter(block for blocks in tables.values() for block in blocks)
    shown = facts(browser)
    assert shown["used"] == len(held)
    assert shown["shared"] == sum(n > 1 for n in held.values()) >= 1
    assert shown["used"] + shown["cached"] + shown["free"] == 96
    told = text_of(browser, "#log")
    assert "A forked to B; A forked to C" in told
    where = text_of(browser, "#where")
    browser.press("ArrowRight", 3)  # the focus is on the buttons
    browser.wait(f"document.querySelector('#where').textContent !== {where!r}")
    browser.wait(
        "/block \\d+ copied to \\d+: [ABC] writes, [ABC]/.test("
        "document.querySelector('#log').textContent)"
    )
    later = text_of(browser, "#where")
    browser.press("ArrowLeft", 3)
    browser.wait(f"document.querySelector('#where').textContent === {where!r}")
    assert later != where

    # From block to block with the keys: the shared one says who holds it.
    shared = min(block for block, n in held.items() if n == 3)
    browser.ask("document.querySelector('#key-button').focus()")
    browser.press("Tab")
    assert browser.ask("document.activeElement.id") == "device"
    browser.press("Home")
    browser.press("ArrowRight", shared)
    said = text_of(browser, "#detail")
    assert said.startswith(f"Block {shared}: A of request ")
    assert "reference count 3" in said
    assert "B of request" in said
    assert "C of request" in said
    picture(browser, "stepped")
    browser.click('[data-do="live"]')
    settle(browser)
    assert browser.problems == []
    assert all(address.startswith((url, "data:")) for address in browser.requests)


def test_beams_fork_and_stop_frees_the_blocks(server, page):
    (_, running), browser = server, page
    browser.look(1280, 900, "dark")
    browser.ask("document.querySelector('#how').focus()")
    browser.press("ArrowDown")
    assert browser.ask("document.querySelector('#how').value") == "beams"
    browser.type("#tokens", "30")
    browser.press("Enter")
    browser.wait("document.querySelector('#said').textContent.startsWith('done')")
    settle(browser)
    browser.wait("/forked to .*ended/.test(document.querySelector('#log').textContent)")
    assert len(browser.ask("[...document.querySelectorAll('#answers li')].map((e) => 1)")) == 3

    browser.ask("document.querySelector('#how').focus()")
    browser.press("ArrowUp")
    browser.type("#outputs", "3")
    browser.type("#tokens", "450")
    browser.click("#send")
    browser.wait("document.querySelector('#running li')")
    picture(browser, "busy-dark")
    browser.click("#stop")
    browser.wait("document.querySelector('#said').textContent.startsWith('stopped')")
    settle(browser)
    wait_until(lambda: running.inside.scheduler.manager.device.num_used == 0)

    browser.type("#tokens", "99999")  # more than the context holds is cut; more than the pool, not
    browser.type("#outputs", "16")
    browser.click("#send")
    browser.wait("document.querySelector('#said').dataset.state === 'wrong'")
    assert "whole pool has 96" in text_of(browser, "#said")
    assert [problem for problem in browser.problems if "400" not in problem] == []


def test_on_a_phone_nothing_is_wider_than_the_window(page):
    browser = page
    for scheme in ("light", "dark"):
        browser.look(360, 740, scheme, phone=True)
        browser.wait("innerWidth === 360")
        assert browser.ask("document.documentElement.scrollWidth") <= 360
        picture(browser, f"phone-{scheme}")
    browser.look(1280, 900)


CONTROLS = """
[...document.querySelectorAll("header button, main :is(button, input, select, textarea, canvas)")]
  .filter((e) => !e.disabled && e.offsetParent && e.getAttribute("role") !== "img")
  .map((e) => [e.id || e.dataset.do,
    e.labels?.length || e.getAttribute("aria-label") || e.textContent])
"""


def test_every_control_is_reached_with_tab_and_named(page):
    browser = page
    browser.ask("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        browser.press("Tab")
        reached.add(browser.ask("document.activeElement.id || document.activeElement.dataset.do"))
    controls = browser.ask(CONTROLS)
    assert len(controls) > 12
    for name, label in controls:
        assert name in reached, f"{name} cannot be reached"
        assert label, f"{name} has no name"


def test_a_hidden_page_holds_nothing_on_the_server(server, page):
    (_, running), browser = server, page
    wait_until(lambda: running.inside.observers)
    here = browser.send("Target.getTargetInfo")["targetInfo"]["targetId"]
    other = browser.send("Target.createTarget", url="about:blank")["targetId"]
    browser.send("Target.activateTarget", targetId=other)
    browser.wait("document.hidden")
    wait_until(lambda: not running.inside.observers)
    browser.send("Target.activateTarget", targetId=here)
    browser.wait("document.querySelector('#connection').dataset.state === 'live'")
    wait_until(lambda: running.inside.observers)
    browser.send("Target.closeTarget", targetId=other)


def test_the_page_waits_for_a_server_that_has_gone(browser):
    with serving() as (url, _):
        log_in(browser, url)
    browser.wait("document.querySelector('#connection').textContent.includes('trying again in')")
    with serving(port=int(url.rpartition(":")[2])):
        browser.wait("document.querySelector('#connection').dataset.state === 'live'")
        browser.open("about:blank")


def test_a_wrong_key_is_asked_for_again(server, browser):
    url, _ = server
    browser.open(url + "/")
    browser.ask("sessionStorage.clear()")
    browser.open(url + "/")
    browser.wait("document.querySelector('#key-dialog').open")
    browser.send("Input.insertText", text="wrong")
    browser.press("Enter")
    browser.wait("document.querySelector('#key-why').textContent.includes('not accept')")
    browser.wait("document.querySelector('#key-dialog').open")
    browser.send("Input.insertText", text=KEY)
    browser.press("Enter")
    browser.wait("document.querySelector('#connection').dataset.state === 'live'")
    assert KEY not in browser.ask("location.href") + " ".join(browser.requests)


def test_what_is_new_since_steps_that_were_not_told_is_not_marked(server, browser):
    log_in(browser, server[0])
    for step, is_known in ((4, True), (9, False)):
        frames = [{"step": number, "tables": [], "cached": []} for number in (3, step)]
        browser.ask(f"seen.frames = {json.dumps(frames)}; seen.place = 1")
        assert browser.ask("seen.before !== undefined") is is_known


def test_a_new_connection_counts_tokens_from_nothing(server, browser):
    log_in(browser, server[0])
    browser.wait("newest && panels.rates.length > 0")
    browser.ask("panels.rates = [[newest.at - 1, 1e6]]; newest = null; connection.open()")
    browser.wait("newest && newest.about")
    assert browser.ask("panels.rates.every(([, tokens]) => tokens < 1e6)")
