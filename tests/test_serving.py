"""The server as OpenAI's client meets it: every answer is the offline engine's (T4).

And as the worst of clients do: whenever they go, every block is freed (T5).
"""

import asyncio
import json
import random
import socket
import time
from itertools import accumulate

import openai
import pytest
from servers import (
    PATIENCE,
    RunningServer,
    check_all_free,
    connect,
    exchange,
    post,
    read_answer,
    read_metrics,
    tiny_with_template,
    wait_for,
)

from minipaged import LLM, SamplingParams
from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.errors import InvalidRequestError
from minipaged.serving.async_engine import QueueFullError
from minipaged.serving.failures import APIError
from minipaged.serving.protocol import CompletionRequest
from minipaged.serving.service import Service

OPTIONS = {
    "dtype": "float64",  # so that the company of others does not change the rounding
    "block_size": 8,
    "num_blocks": 64,
    "max_num_seqs": 12,
    "policy": "priority",
    "preemption": "swap",
    "enable_prefix_caching": True,
}
ENDLESS = {"prompt": "ROMEO:", "max_tokens": 500, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_with_template(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(model):
    running = RunningServer(load_engine(model, EngineOptions(**OPTIONS)), max_queued=100)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def offline(model):
    return LLM(model, **OPTIONS)


@pytest.fixture
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    ) as client:
        yield client
    server.check_no_leak()


VLLM = {
    *("use_beam_search", "ignore_eos", "min_tokens", "top_k", "min_p", "repetition_penalty"),
    *("stop_token_ids", "include_stop_str_in_output", "length_penalty", "early_stopping"),
    *("skip_special_tokens", "priority"),
}
CASES = {
    "greedy": {"temperature": 0, "max_tokens": 20},
    "sampled": {"temperature": 0.9, "seed": 3, "max_tokens": 24},
    "samples": {"n": 3, "seed": 4, "max_tokens": 12, "ignore_eos": True},
    "best": {"n": 2, "best_of": 4, "seed": 5, "max_tokens": 9},
    "beams": {"n": 2, "best_of": 3, "use_beam_search": True, "max_tokens": 8, "temperature": 0},
    "long beams": {
        **{"n": 1, "best_of": 3, "use_beam_search": True, "max_tokens": 12, "temperature": 0},
        **{"length_penalty": 2.0, "early_stopping": True},
    },
    "logprobs": {"logprobs": 4, "seed": 6, "max_tokens": 7},
    "samples with logprobs": {"logprobs": 0, "n": 2, "seed": 7, "max_tokens": 7},
    "stop": {"stop": ["e ", "\n"], "seed": 8, "max_tokens": 60, "ignore_eos": True},
    "stop with logprobs": {
        **{"stop": ["worlds and", "\n\n"], "logprobs": 2, "seed": 8, "max_tokens": 60},
        "ignore_eos": True,
    },
    "one stop": {"stop": "th", "seed": 8, "max_tokens": 60, "include_stop_str_in_output": True},
    "penalties": {
        **{"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
        **{"temperature": 0, "max_tokens": 20},
    },
    "narrow": {"top_k": 5, "top_p": 0.8, "min_p": 0.05, "seed": 9, "max_tokens": 15},
    "forced": {"min_tokens": 12, "max_tokens": 12, "seed": 10},
    "stop tokens": {"stop_token_ids": list(range(200, 260)), "seed": 11, "max_tokens": 40},
    "later": {"priority": 3, "seed": 12, "max_tokens": 10},
}
PROMPTS = ["ROMEO:", ["First Citizen:\nBefore we", "JULIET:\nO Romeo", "ROMEO:"]]


def as_openai(params):
    """The fields as the client takes them: those of vLLM in the body as extras."""
    own = {name: value for name, value in params.items() if name not in VLLM}
    extra = {name: value for name, value in params.items() if name in VLLM}
    return {"model": "tiny", **own, "extra_body": extra}


def streams(params):
    return not params.get("use_beam_search") and params.get("best_of", 1) <= params.get("n", 1)


def outputs_of(offline, prompt, params):
    """What the offline engine gives, choice by choice, and the tokens of prompts and outputs."""
    params = dict(params)
    priority = params.pop("priority", 0)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    results = offline.generate(
        prompts, SamplingParams(**params), priority=[priority] * len(prompts)
    )
    outputs = [output for result in results for output in result.outputs]
    usage = (
        sum(len(result.prompt_token_ids) for result in results),
        sum(len(output.token_ids) for output in outputs),
    )
    return outputs, usage


def check_usage(usage, expected):
    assert (usage.prompt_tokens, usage.completion_tokens) == expected
    assert usage.total_tokens == sum(expected)
    assert 0 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def check_logprobs(got, output, tokenizer, num_likeliest):
    tokens = [tokenizer.decode([i], skip_special_tokens=False) for i in output.token_ids]
    assert got.tokens == tokens
    assert got.text_offset == [0, *accumulate(map(len, tokens[:-1]))]
    own = [of_step[i].logprob for of_step, i in zip(output.logprobs, output.token_ids, strict=True)]
    assert got.token_logprobs == pytest.approx(own, abs=1e-9)
    for top, of_step in zip(got.top_logprobs, output.logprobs, strict=True):
        assert num_likeliest <= len(top) <= num_likeliest + 1 or len(set(tokens)) < len(tokens)
        for token_id, entry in of_step.items():
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            assert top[text] == pytest.approx(entry.logprob, abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_completions_are_those_of_the_offline_engine(client, offline, name):
    params, prompt = CASES[name], PROMPTS[1]
    expected, usage = outputs_of(offline, prompt, params)
    answer = client.completions.create(prompt=prompt, **as_openai(params))
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert abs(answer.created - time.time()) < PATIENCE
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    for choice, output in zip(answer.choices, expected, strict=True):
        assert (choice.text, choice.finish_reason) == (output.text, output.finish_reason)
        if "logprobs" in params:
            check_logprobs(choice.logprobs, output, offline.engine.tokenizer, params["logprobs"])
        else:
            assert choice.logprobs is None
    check_usage(answer.usage, usage)


@pytest.mark.parametrize("name", [name for name in CASES if streams(CASES[name])])
def test_a_stream_put_together_is_the_whole_answer(client, offline, name):
    params, prompt = CASES[name], PROMPTS["n" in CASES[name]]
    expected, usage = outputs_of(offline, prompt, params)
    events = list(
        client.completions.create(
            prompt=prompt, stream=True, stream_options={"include_usage": True}, **as_openai(params)
        )
    )
    last = events.pop()
    assert last.choices == []
    check_usage(last.usage, usage)
    assert len({event.id for event in events}) == 1
    for index, output in enumerate(expected):
        pieces = [c for event in events for c in event.choices if c.index == index]
        assert "".join(piece.text for piece in pieces) == output.text
        reasons = [piece.finish_reason for piece in pieces]
        assert reasons == [None] * (len(pieces) - 1) + [output.finish_reason]
        if "logprobs" in params:
            logprobs = pieces[0].logprobs
            for piece in pieces[1:]:
                logprobs.tokens += piece.logprobs.tokens
                logprobs.token_logprobs += piece.logprobs.token_logprobs
                logprobs.top_logprobs += piece.logprobs.top_logprobs
                logprobs.text_offset += piece.logprobs.text_offset
            check_logprobs(logprobs, output, offline.engine.tokenizer, params["logprobs"])
    assert all(event.usage is None for event in events)


def test_a_stream_without_the_usage_ends_with_the_text(client):
    events = list(client.completions.create(model="tiny", prompt="ROMEO:", stream=True))
    assert events[-1].choices[0].finish_reason is not None


def test_prompts_may_be_token_ids(client, offline):
    texts = PROMPTS[1]
    token_ids = [offline.engine.tokenizer.encode(text) for text in texts]
    answers = [
        client.completions.create(model="tiny", prompt=prompt, temperature=0)
        for prompt in (texts, token_ids)
    ]
    assert answers[0].choices == answers[1].choices
    one = client.completions.create(model="tiny", prompt=token_ids[0], temperature=0)
    assert one.choices == answers[0].choices[:1]


TALK = [
    {"role": "system", "content": "You are Romeo."},
    {
        "role": "user",
        "content": [{"type": "text", "text": text} for text in ("Good ", "day")],
    },
]
PLAIN = [TALK[0], {"role": "user", "content": "Good day"}]


def test_chats_are_those_of_the_offline_engine(client, offline):
    params = {"n": 2, "seed": 1, "logprobs": True, "top_logprobs": 3}
    (expected,) = offline.chat(
        PLAIN, SamplingParams(n=2, seed=1, logprobs=3, max_tokens=9, ignore_eos=True)
    )
    request = {"model": "tiny", "messages": TALK, **params, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(max_completion_tokens=9, **request)
    assert answer.object == "chat.completion"
    for choice, output in zip(answer.choices, expected.outputs, strict=True):
        assert choice.message.role == "assistant"
        assert (choice.message.content, choice.finish_reason) == (output.text, "length")
        for i, token in enumerate(choice.logprobs.content):
            of_step, token_id = output.logprobs[i], output.token_ids[i]
            assert token.logprob == pytest.approx(of_step[token_id].logprob, abs=1e-9)
            assert bytes(token.bytes).decode() == token.token
            likeliest = [entry.logprob for entry in token.top_logprobs]
            assert len(likeliest) == 3
            assert likeliest == sorted(likeliest, reverse=True)
    check_usage(answer.usage, (len(expected.prompt_token_ids), 18))
    events = list(
        client.chat.completions.create(
            max_tokens=9, stream=True, stream_options={"include_usage": True}, **request
        )
    )
    check_usage(events.pop().usage, (len(expected.prompt_token_ids), 18))
    for index, output in enumerate(expected.outputs):
        deltas = [c for event in events for c in event.choices if c.index == index]
        assert deltas[0].delta.role == "assistant"
        assert all(delta.delta.role is None for delta in deltas[1:])
        assert "".join(delta.delta.content or "" for delta in deltas) == output.text
        assert deltas[-1].finish_reason == "length"
        told = [t for delta in deltas if delta.logprobs for t in delta.logprobs.content]
        assert len(told) == 9


@pytest.mark.parametrize("as_parts", [False, True], ids=["text", "parts"])
def test_a_message_of_half_a_character_is_refused_and_an_empty_one_is_not(server, as_parts):
    def say(text):
        content = [{"type": "text", "text": text}] if as_parts else text
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        status, _, answer = exchange(server.port, post("/v1/chat/completions", body))
        return status, json.loads(answer)

    status, answer = say("hi \ud800")
    assert status == 400
    assert "messages" in answer["error"]["message"]
    assert say("")[0] == say("\U0001f600")[0] == 200


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(client, server):
    long = [{"role": "user", "content": "good day " * 120}]
    answer = client.chat.completions.create(
        model="tiny", messages=long, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == server.inner.context_length
    assert answer.choices[0].finish_reason == "length"


def test_models(client):
    (listed,) = client.models.list().data
    model = client.models.retrieve("tiny")
    assert listed == model
    assert (model.id, model.object, model.max_model_len, model.vocab_size) == (
        *("tiny", "model"),
        *(512, 1024),
    )
    for name in ("gpt-5", "a/b", "../../etc/passwd", "%2e%2e/x"):
        with pytest.raises(openai.NotFoundError, match="there is no model") as error:
            client.models.retrieve(name)
        assert error.value.code == "model_not_found"


def test_metrics_count_what_was_sent(client, server):
    prompt = list(range(100, 141))  # 41 tokens: 5 full blocks
    before = read_metrics(server.url)
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=6,
            temperature=0,
            stream=stream,
            stream_options={"include_usage": True} if stream else None,
            extra_body={"ignore_eos": True},
        )
        usage = list(answer)[-1].usage if stream else answer.usage
        assert usage.prompt_tokens_details.cached_tokens == (40 if stream else 0)
    client.completions.create(
        model="tiny",
        prompt=prompt[:9],
        max_tokens=3,
        n=2,
        stop="\x00",
        seed=1,
        extra_body={"ignore_eos": True},
    )
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        client.completions.create(model="tiny", prompt=[5000])
    after = read_metrics(server.url)
    changed = {
        name.removeprefix("minipaged_"): after[name] - before.get(name, 0)
        for name in after
        if after[name] != before.get(name, 0) and not name.split()[0].endswith(("_sum", "_created"))
    }
    steps = changed.pop("steps_total")
    assert 15 <= steps <= 17
    cached = changed.pop("blocks pool=device state=cached")
    assert changed.pop("blocks pool=device state=free", 0) == -cached
    assert changed == {
        "prompt_tokens_total": 41 + 41 + 9,
        "cached_prompt_tokens_total": 40 + 8,
        "prefix_cache_queries_total": 41 + 41 + 9,
        "prefix_cache_hits_total": 40 + 8,
        "generation_tokens_total": 6 + 6 + 2 * 3,
        "requests_total outcome=length": 3,
        "requests_total outcome=refused": 1,
        "time_to_first_token_seconds_count": 3,
        "inter_token_latency_seconds_count": 5 + 5 + 2,
        "request_latency_seconds_count": 3,
    }
    device = sum(after[f"minipaged_blocks pool=device state={s}"] for s in STATES)
    assert device == OPTIONS["num_blocks"]


STATES = ("exclusive", "shared", "cached", "free")


def test_preemption_by_swapping_is_seen_in_the_metrics_and_not_in_the_text(client, server, offline):
    before = read_metrics(server.url)
    params = {"temperature": 0, "max_tokens": 90, "ignore_eos": True}
    prompts = [f"{name}:" for name in ("ROMEO", "JULIET", "NURSE", "KING", "QUEEN", "PUCK")]
    expected, _ = outputs_of(offline, prompts, params)
    answer = client.completions.create(prompt=prompts, **as_openai(params))
    assert [c.text for c in answer.choices] == [output.text for output in expected]
    after = read_metrics(server.url)
    name = "minipaged_preemptions_total mode=swap"
    assert after[name] > before[name]


def test_the_health_of_the_server(server):
    status, headers, body = exchange(
        server.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    assert "server" not in headers


def test_a_full_queue_says_when_to_come_back(server):
    short = {"prompt": [5], "max_tokens": 1}
    with server.held():
        connections = []
        for size in (60, 40):
            sock = connect(server.port)
            sock.sendall(post("/v1/completions", {**short, "prompt": [[5]] * size}))
            connections.append(sock)
        wait_for(lambda: server.server.engine.num_queued == 100)
        status, headers, body = exchange(server.port, post("/v1/completions", short))
        assert status == 429
        assert 1 <= int(headers["Retry-After"]) <= 60
        assert json.loads(body)["error"]["code"] == "queue_full"
    for sock in connections:
        with sock, sock.makefile("rb") as file:
            assert read_answer(file)[0] == 200
    assert exchange(server.port, post("/v1/completions", short))[0] == 200
    server.check_no_leak()


@pytest.mark.parametrize(
    ("refusal", "outcome"),
    [
        (QueueFullError(3, 3, 1), "queue_full"),
        (InvalidRequestError("too long"), "refused"),
        (APIError(429, "full", "queue_full"), "queue_full"),
        (APIError(400, "too long"), "refused"),
    ],
    ids=repr,
)
def test_refusals_are_counted_wherever_they_come_from(refusal, outcome):
    """An engine in another process says APIError, and is counted like one that is here."""

    class Refusing:
        def __init__(self):
            self.observers = []

        async def add(self, requests):
            raise refusal

    service = Service(Refusing(), "tiny", None, 512, 1024)
    with pytest.raises(type(refusal)):
        asyncio.run(service.complete(CompletionRequest(prompt=[5]), b""))
    counted = {
        sample.labels["outcome"]: sample.value
        for metric in service.metrics._ended.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    assert counted == {outcome: 1}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("is_waiting", [True, False], ids=["waiting", "running"])
def test_a_disconnect_aborts(server, stream, is_waiting):
    """At once, not when the answer would have been complete; also of what still waits."""
    outcome = "minipaged_requests_total outcome="
    before = read_metrics(server.url)
    body = {**ENDLESS, "max_tokens": 200, "stream": stream}
    if not is_waiting:
        sock = connect(server.port)
        sock.sendall(post("/v1/completions", body))
        wait_for(lambda: server.server.engine.num_unfinished == 1)
    with server.held():
        if is_waiting:
            sock = connect(server.port)
            sock.sendall(post("/v1/completions", body))
            wait_for(lambda: server.server.engine.num_unfinished == 1)
        sock.close()
        wait_for(lambda: not server.server.server_state.tasks)
    server.check_no_leak()
    after = read_metrics(server.url)
    assert after[outcome + "abort"] - before.get(outcome + "abort", 0) == 1
    assert after.get(outcome + "length", 0) == before.get(outcome + "length", 0)


def leave(port, how, rng):
    """A client that goes at some moment."""
    body = {**ENDLESS, "n": rng.choice([1, 3]), "temperature": 1, "stream": rng.random() < 0.5}
    body |= {"prompt": rng.choice(["ROMEO:", "word " * 30, ["a", "b"]]), "max_tokens": 90}
    request = post("/v1/completions", body)
    sock = connect(port)
    if how == "in the headers":
        sock.sendall(request[: rng.randrange(request.index(b"\r\n\r\n"))])
    elif how == "in the body":
        sock.sendall(request[: rng.randrange(request.index(b"\r\n\r\n") + 4, len(request))])
    else:
        sock.sendall(request)
    if how == "while it comes":
        for _ in range(rng.randrange(1, 5)):
            sock.recv(rng.randrange(1, 2000)) if body["stream"] else time.sleep(0.01)
    if how == "after another request":  # which is read when the first one has ended
        sock.sendall(request)
    time.sleep(rng.choice([0, 0.001, 0.02, 0.1]))
    if how == "half":
        sock.shutdown(socket.SHUT_WR)
    elif rng.random() < 0.5:  # a reset in the place of an end
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    else:
        sock.close()
    return sock


MOMENTS = ["in the headers", "in the body", "at once", "while it comes", "half"]


@pytest.mark.parametrize("seed", range(2))
def test_whoever_leaves_gives_his_blocks_back(server, offline, seed):
    """T5 over HTTP; and those who stay get their text."""
    rng = random.Random(seed)
    (expected,) = outputs_of(offline, "KING", {"temperature": 0, "max_tokens": 30})[0]
    staying = connect(server.port)
    staying.sendall(post("/v1/completions", {"prompt": "KING", "temperature": 0, "max_tokens": 30}))
    socks = [leave(server.port, how, rng) for how in rng.sample(MOMENTS * 5, 20)]
    with server.held():
        socks += [leave(server.port, how, rng) for how in MOMENTS if how != "while it comes"]
    with staying, staying.makefile("rb") as file:
        status, _, body = read_answer(file)
    assert status == 200
    assert json.loads(body)["choices"][0]["text"] == expected.text
    server.check_no_leak()
    metrics = check_all_free(server.url)
    states = [metrics[f"minipaged_blocks pool=device state={s}"] for s in ("cached", "free")]
    assert sum(states) == OPTIONS["num_blocks"]
    for sock in socks:
        sock.close()


def test_whoever_leaves_after_two_requests_is_noticed(server):
    """The second one waits unread behind the first; both end."""
    for seed in range(3):
        leave(server.port, "after another request", random.Random(seed))
    server.check_no_leak()


def test_one_connection_for_many_requests(server):
    """Kept alive, and several requests sent before the first answer; whole ones and streams."""
    bodies = [{"prompt": "ROMEO:", "max_tokens": n, "temperature": 0} for n in (3, 7, 5)]
    bodies[1]["stream"] = True
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nxyz"
    head = b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    options = b"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n"
    wrong = post("/v1/completions", b"{", "X-Filler: x")
    big = post("/v1/completions", b"x" * (5 << 20))
    with connect(server.port) as sock, sock.makefile("rb") as file:
        for together in (True, False):
            requests = [post("/v1/completions", body) for body in bodies]
            requests[1:1] = [get, head, wrong, options, big]
            got = []
            if together:
                sock.sendall(b"".join(requests[:4] + requests[5:]))
                sock.sendall(requests[4])
                requests = requests[:4] + requests[5:] + [requests[4]]
            for request in requests:
                if not together:
                    sock.sendall(request)
                method = request.split()[0].decode()
                status, _, body = read_answer(file, method)
                got.append((request, status, body))
            by_request = {request: (status, body) for request, status, body in got}
            assert by_request[get][0] == 200
            assert by_request[head] == (405, b"")
            assert by_request[options][0] == 405
            assert by_request[wrong][0] == 400
            assert by_request[big][0] == 413
            for body in bodies:
                status, answer = by_request[post("/v1/completions", body)]
                assert status == 200
                if not body.get("stream"):
                    usage = json.loads(answer)["usage"]
                    assert usage["completion_tokens"] == body["max_tokens"]
                else:
                    assert answer.endswith(b"data: [DONE]\n\n")
    server.check_no_leak()


def test_bodies_in_chunks_and_bodies_that_wait_for_leave(server):
    body = json.dumps({"prompt": "ROMEO:", "max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert exchange(server.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)[0] == 200
    length = b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(body)
    with connect(server.port) as sock, sock.makefile("rb") as file:
        sock.sendall(head + length)
        assert file.readline() == b"HTTP/1.1 100 Continue\r\n"
        while file.readline() != b"\r\n":
            pass
        sock.sendall(body)
        assert read_answer(file)[0] == 200
    too_long = b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
    assert exchange(server.port, head + too_long)[0] == 413


def test_a_client_that_reads_nothing_is_cut_off_and_holds_nobody_up(model):
    options = {**OPTIONS, "num_blocks": 400, "enable_prefix_caching": False, "debug": False}
    server = RunningServer(
        load_engine(model, EngineOptions(**options)), send_buffer=4096, stalled=1
    )
    try:
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        stalled.connect(("127.0.0.1", server.port))
        body = {**ENDLESS, "n": 4, "temperature": 1, "max_tokens": 120, "stream": True}
        body["logprobs"] = 20  # a kilobyte for a token
        stalled.sendall(post("/v1/completions", body))
        wait_for(lambda: server.server.engine.num_unfinished == 1)
        status, _, answer = exchange(server.port, post("/v1/completions", {"prompt": "KING"}))
        assert status == 200
        assert json.loads(answer)["usage"]["completion_tokens"] == 16
        assert server.server.server_state.tasks, "the answer was sent although nobody reads it"
        server.check_no_leak()
        metrics = check_all_free(server.url)
        assert metrics["minipaged_blocks pool=device state=free"] == 400
        with pytest.raises(ConnectionResetError):
            wait_for(lambda: not stalled.send(b"x"))
        wait_for(lambda: not server.server.server_state.connections)
    finally:
        server.stop()
