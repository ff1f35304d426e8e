"""Who and what is let in: keys, hosts, bodies; every refusal in OpenAI's shape and one sentence."""

import hmac
import json
import logging
import random
import socket
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import RunningServer, connect, exchange, post, read_answer, wait_for
from strategies import Workload

from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.errors import ConfigurationError
from minipaged.serving import gate
from minipaged.serving.failures import APIError
from minipaged.serving.gate import Gate, Keys

MAX_BODY = 20_000


@pytest.fixture(scope="module")
def server():
    """Without keys."""
    options = EngineOptions(num_blocks=12, max_num_seqs=4, dtype="float32")
    running = RunningServer(load_engine("tiny", options), max_queued=5, max_body=MAX_BODY)
    yield running
    running.check_no_leak()
    running.stop()


@pytest.fixture
def log():
    """What is logged during the test, by any part of the server."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(handler.format(record))
    names = ("uvicorn.error", "asyncio", "minipaged")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield lines
    for name in names:
        logging.getLogger(name).removeHandler(handler)


def refusal(answer, status):
    """The sentence of an answer that must be a refusal."""
    got, headers, body = answer
    assert got == status, (got, body)
    assert headers["Content-Type"] == "application/json"
    (error,) = json.loads(body).values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in {
        *("invalid_request_error", "authentication_error", "not_found_error"),
        *("rate_limit_error", "server_error"),
    }
    assert "Traceback" not in error["message"]
    assert "\n" not in error["message"]
    assert 0 < len(error["message"]) < 400
    return error["message"]


def completion(**fields):
    return post("/v1/completions", {"prompt": "ROMEO:", "max_tokens": 1, **fields})


def chat(**fields):
    return post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **fields})


def raw(body):
    return post("/v1/completions", body)


def get(path, *headers, method="GET", host="localhost"):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


CASES = {
    # The body as a whole.
    "no JSON": (raw(b"{"), 400, "no JSON that can be read"),
    "nothing": (raw(b""), 400, "must be a JSON object"),
    "a list": (raw(b"[1]"), 400, "must be a JSON object"),
    "a number": (raw(b"1"), 400, "must be a JSON object"),
    "no UTF-8": (raw(b'{"prompt": "\xff"}'), 400, "no JSON that can be read"),
    "half a character": (raw(b'{"prompt": "\\ud800"}'), 400, "prompt"),
    "half a character as a name": (raw(b'{"prompt": "a", "\\ud800": 1}'), 400, ""),
    "deep": (raw(b"[" * 9000), 400, "no JSON that can be read"),
    "a long number": (raw(b'{"prompt": "a", "seed": %s}' % (b"9" * 9000)), 400, ""),
    "not a number": (raw(b'{"prompt": "a", "temperature": NaN}'), 400, "temperature"),
    "infinity": (raw(b'{"prompt": "a", "temperature": Infinity}'), 400, "temperature"),
    "very large": (raw(b'{"prompt": "a", "temperature": 1e999}'), 400, "temperature"),
    "too large": (raw(b" " * (MAX_BODY + 1)), 413, f"larger than {MAX_BODY} bytes"),
    "another kind": (
        post("/v1/completions", b"{}", "Content-Type: text/plain"),
        *(415, "sent as 'text/plain'"),
    ),
    "a form": (
        post("/v1/completions", b"{}", "Content-Type: application/x-www-form-urlencoded"),
        *(415, "send it as application/json"),
    ),
    # Fields.
    "no prompt": (raw(b"{}"), 400, "'prompt'"),
    "no prompt but null": (completion(prompt=None), 400, "'prompt'"),
    "an empty prompt": (completion(prompt=""), 400, "'prompt'"),
    "no prompts": (completion(prompt=[]), 400, "'prompt'"),
    "an empty prompt of several": (completion(prompt=["a", ""]), 400, "'prompt'"),
    "a prompt of text and tokens": (completion(prompt=["a", 1]), 400, "'prompt'"),
    "a prompt of truths": (completion(prompt=[True]), 400, "'prompt'"),
    "a negative token": (completion(prompt=[-1]), 400, "'prompt'"),
    "many wrong tokens": (completion(prompt=[-1] * 3000), 400, "'prompt'"),
    "a token beyond the vocabulary": (completion(prompt=[1024]), 400, "0 to 1023"),
    "a stop token beyond it": (completion(stop_token_ids=[9999]), 400, "0 to 1023"),
    "many prompts": (completion(prompt=["a"] * 1025), 400, "1024"),
    "more prompts than wait": (completion(prompt=["a"] * 6), 400, "the queue holds 5"),
    "an unknown field": (completion(temprature=1), 400, "field 'temprature': there is no such"),
    "many unknown fields": (
        completion(**{f"x{i}": 1 for i in range(1000)}),
        *(400, "field 'x0': there is no such field"),
    ),
    "text for a number": (completion(temperature="hot"), 400, "field 'temperature'"),
    "a number as text": (completion(max_tokens="1"), 400, "field 'max_tokens'"),
    "truth for a number": (completion(n=True), 400, "field 'n'"),
    "half a token": (completion(max_tokens=1.5), 400, "field 'max_tokens'"),
    "no output": (completion(n=0), 400, "field 'n'"),
    "many outputs": (completion(n=129), 400, "field 'n'"),
    "no tokens": (completion(max_tokens=0), 400, "field 'max_tokens'"),
    "cold": (completion(temperature=-0.1), 400, "field 'temperature'"),
    "top_p": (completion(top_p=0), 400, "field 'top_p'"),
    "logprobs": (completion(logprobs=21), 400, "field 'logprobs'"),
    "a negative seed": (completion(seed=-1), 400, "field 'seed'"),
    "a long stop string": (completion(stop="x" * 129), 400, "field 'stop'"),
    "an empty stop string": (completion(stop=""), 400, "field 'stop'"),
    "many stop strings": (completion(stop=["x"] * 17), 400, "field 'stop'"),
    "many stop tokens": (completion(stop_token_ids=[1] * 65), 400, "field 'stop_token_ids'"),
    "stream options": (completion(stream_options={"x": 1}), 400, "field 'stream_options'"),
    # What contradicts itself, or can never be served.
    "best of fewer": (completion(n=3, best_of=2), 400, "best_of is 2, below n 3"),
    "greedy samples": (completion(n=2, temperature=0), 400, "temperature is 0"),
    "min above max": (completion(min_tokens=2), 400, "min_tokens is 2"),
    "hot beams": (completion(use_beam_search=True, temperature=1, best_of=2), 400, "temperature"),
    "a priority": (completion(priority=1), 400, "knows no priorities"),
    "the best as a stream": (completion(n=1, best_of=2, stream=True), 400, "cannot be streamed"),
    "beyond the context": (completion(prompt=[1] * 512), 400, "the model's context 512"),
    "beyond the pool": (completion(prompt=[1] * 190, max_tokens=9), 400, "the whole pool has 12"),
    "beyond the batch": (completion(n=5, max_tokens=2), 400, "max_num_seqs is 4"),
    "another model": (completion(model="gpt-5"), 404, "there is no model 'gpt-5'"),
    "a model of another name": (completion(model="x" * 9999), 404, "there is no model 'xxx"),
    "a path as model": (completion(model="../../etc/passwd"), 404, "there is no model"),
    # Chats.
    "no messages": (chat(messages=[]), 400, "'messages'"),
    "wrong messages": (chat(messages=[1] * 5000), 400, "'messages'"),
    "a robot": (chat(messages=[{"role": "robot", "content": ""}]), 400, "'messages'"),
    "an image": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "text": ""}]}]),
        *(400, "'messages'"),
    ),
    "top without logprobs": (chat(top_logprobs=2), 400, "logprobs is false"),
    "no template": (chat(), 400, "no chat template"),
    # Paths and methods.
    "no such path": (get("/v1/engines"), 404, "there is nothing at /v1/engines"),
    "a path with a slash": (get("/health/"), 404, "there is nothing at /health/"),
    "a file": (get("/../../etc/passwd"), 404, "there is nothing at"),
    "a file as model": (get("/v1/models/../../etc/passwd"), 404, "there is no model"),
    "a hidden file": (get("/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd%00"), 404, "no model"),
    "no UTF-8 in the path": (get("/v1/models/%ff%fe"), 404, "there is no model"),
    "GET": (get("/v1/completions"), 405, "does not know the method GET"),
    "DELETE": (get("/v1/models", method="DELETE"), 405, "does not know the method DELETE"),
    "OPTIONS": (get("/v1/completions", method="OPTIONS"), 405, "the method OPTIONS"),
    "an odd method": (get("/v1/models", method="BREW"), 405, "the method BREW"),
    # Hosts: a page elsewhere may give its own name the address of this machine.
    "another host": (get("/v1/models", host="evil.example:8000"), 403, "for host 'evil.example"),
    "nearly this host": (get("/health", host="localhost.evil.example"), 403, "does not answer"),
    "another address": (get("/v1/models", host="169.254.169.254"), 403, "does not answer"),
    "an empty host": (get("/v1/models", host=""), 403, "does not answer for host ''"),
    "an odd host": (get("/v1/models", host="localhost:80:80"), 403, "does not answer"),
    "no host": (b"GET /v1/models HTTP/1.0\r\n\r\n", 403, "does not answer for host ''"),
    # What is no HTTP at all.
    "no HTTP": (b"hello\r\n\r\n", 400, "no HTTP/1.1 request"),
    "no host in HTTP/1.1": (b"GET /health HTTP/1.1\r\n\r\n", 400, "no HTTP/1.1 request"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "no HTTP/1.1 request"),
    "huge headers": (get("/health", f"X-A: {'a' * 600_000}"), 400, "headers are too long"),
    "two lengths": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
        b"Content-Length: 2\r\n\r\n{}",
        *(400, "no HTTP/1.1 request"),
    ),
    "a negative length": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        *(400, "no HTTP/1.1 request"),
    ),
    "an endless length": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999999999999999\r\n\r\n{}",
        *(413, "the body is larger"),
    ),
    "chunks that are none": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        *(400, "no HTTP/1.1 request"),
    ),
    "endless chunks": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 5,
        *(413, "the body is larger"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_client_gets_wrong_is_told_in_one_sentence(server, name, log):
    request, status, words = CASES[name]
    assert words in refusal(exchange(server.port, request), status)
    alive = exchange(server.port, completion())
    assert alive[0] == 200
    assert not log


def test_a_wrong_method_is_told_the_right_ones(server):
    _, headers, _ = exchange(server.port, get("/v1/completions"))
    assert headers["Allow"] == "POST"


def test_nonsense_after_a_refusal_harms_nobody(server, log):
    """An answer was given before the body was read, and then the body is broken."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    with connect(server.port) as sock, sock.makefile("rb") as file:
        sock.sendall(head)
        assert read_answer(file)[0] == 415
        sock.sendall(b"nonsense\r\n")
        assert file.read() == b""
    assert exchange(server.port, completion())[0] == 200
    assert not log


def test_a_defect_is_told_as_one_and_no_more(server, monkeypatch, log):
    """No stack trace to clients; the log has it."""

    def fail(text):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.inner.tokenizer, "encode", fail)
    message = refusal(exchange(server.port, completion()), 500)
    assert message == "the server failed on this request; its log says why"
    monkeypatch.undo()
    wait_for(lambda: log)
    assert "ZeroDivisionError: secret" in log[0]
    assert exchange(server.port, completion())[0] == 200


def test_a_body_that_comes_too_slowly_is_refused(monkeypatch):
    monkeypatch.setattr(Gate.__init__, "__defaults__", (None, MAX_BODY, 0.2))
    server = RunningServer(Workload((), 4, 16, 4, 64).engine(), max_body=MAX_BODY)
    try:
        request = completion()
        with connect(server.port) as sock, sock.makefile("rb") as file:
            sock.sendall(request[:-1])
            assert "took longer than 0.2 s" in refusal(read_answer(file), 408)
            assert file.read() == b"", "the connection must not be kept for the rest"
        with connect(server.port) as sock:  # while others send as they like
            sock.sendall(request[:-1])
            answer = exchange(server.port, post("/v1/completions", {"prompt": [1]}))
            assert answer[0] == 200
    finally:
        server.stop()


def test_whoever_says_nothing_loses_the_connection(log):
    """At the beginning, within the headers, and within a body that is refused already."""
    server = RunningServer(Workload((), 4, 16, 4, 64).engine())
    server.server.config.timeout_keep_alive = 0.3
    request = completion()
    beginnings = [b"", request[:20], post("/v1/completions", b"{}", "Content-Type: a/b")[:-1]]
    try:
        for beginning in beginnings:
            with connect(server.port) as sock:
                sock.sendall(beginning)
                while sock.recv(65536):
                    pass
        assert not server.server.server_state.connections
        assert not log
    finally:
        server.stop()


readable = st.text(string.ascii_letters + string.digits + string.punctuation, min_size=1)


@given(keys=st.lists(readable, min_size=1, max_size=5), given_key=readable, data=st.data())
def test_a_key_is_accepted_if_and_only_if_it_is_one_of_them(keys, given_key, data):
    """Also one that begins or ends like a right one; all are compared, whichever fits."""
    near = data.draw(st.sampled_from(keys))
    given_key = data.draw(
        st.sampled_from([given_key, near, near[:-1], near + "x", near.swapcase(), ""])
    )
    scheme = data.draw(st.sampled_from(["Bearer", "bearer", "Basic", ""]))
    compared, compare_digest = [], hmac.compare_digest
    checked = Keys(keys)
    with pytest.MonkeyPatch.context() as patch:

        def compare(a, b):
            compared.append((a, b))
            return compare_digest(a, b)

        patch.setattr(gate.hmac, "compare_digest", compare)
        if scheme.lower() == "bearer" and given_key in keys:
            checked.check(f"{scheme} {given_key}")
        else:
            with pytest.raises(APIError, match="missing or wrong"):
                checked.check(f"{scheme} {given_key}")
    assert len(compared) == len(keys)
    assert all(len(a) == len(b) == 32 for a, b in compared)


@given(keys=st.lists(readable, min_size=1, max_size=5, unique=True))
def test_salts_are_the_keys_own(keys):
    isolated, shared = Keys(keys, isolate=True), Keys(keys)
    salts = {isolated.check(f"Bearer {key}") for key in keys}
    assert len(salts) == len(keys)
    assert {shared.check(f"Bearer {key}") for key in keys} == {b""}
    assert Keys().check(None) == b""


@pytest.mark.parametrize("key", ["", " a", "a ", "ä", "a\nb", "a\x7f"])
def test_keys_that_no_header_carries_are_refused(key):
    with pytest.raises(ConfigurationError, match="API key number 2 of 2 is empty or has"):
        Keys(["fine", key])
    with pytest.raises(ConfigurationError, match="give some with --api-key"):
        Keys([], isolate=True)


@pytest.mark.parametrize("isolate", [False, True])
def test_keys_and_what_they_share(isolate):
    """Whoever has another key sees nothing of what was asked with the first, if so wished."""
    options = EngineOptions(
        num_blocks=32, block_size=4, dtype="float32", enable_prefix_caching=True
    )
    keys = ("first-key", "second-key")
    server = RunningServer(load_engine("tiny", options), api_keys=keys, isolate_keys=isolate)

    def ask(*headers, path="/v1/completions"):
        body = {"prompt": list(range(50, 63)), "max_tokens": 2}
        return exchange(server.port, post(path, body, *headers))

    def cached(key):
        status, _, body = ask(f"Authorization: Bearer {key}")
        assert status == 200
        return json.loads(body)["usage"]["prompt_tokens_details"]["cached_tokens"]

    try:
        assert cached(keys[0]) == 0
        assert cached(keys[0]) == 12
        assert cached(keys[1]) == (0 if isolate else 12)
        assert cached(keys[1]) == 12
        for header in (
            *("X-Nothing: 1", "Authorization: Bearer", "Authorization: Bearer wrong"),
            *("Authorization: first-key", "Authorization: Basic first-key"),
            *("Authorization: Bearer first-key,second-key", "Authorization: Bearer First-Key"),
            "Authorization: Bearer f\xefrst-key".encode().decode("latin-1"),
        ):
            answer = ask(header)
            assert "API key is missing or wrong" in refusal(answer, 401)
            assert answer[1]["WWW-Authenticate"] == "Bearer"
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
            refusal(exchange(server.port, get(path)), 401)
            right = get(path, f"Authorization: Bearer {keys[1]}")
            assert exchange(server.port, right)[0] in (200, 404)
        assert exchange(server.port, get("/health"))[0] == 200
        # Who has no key learns nothing, not even by a large body.
        assert ask(path="/v1/nothing")[0] == 401
        server.check_no_leak()
    finally:
        server.stop()


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1", "[::1]:80", "[::1]"])
def test_hosts_under_which_this_machine_knows_itself(server, host):
    assert exchange(server.port, get("/v1/models", host=host))[0] == 200


def test_random_bytes_harm_nobody(server, log):
    rng = random.Random(0)
    right = completion()
    for _ in range(60):
        request = bytearray(right)
        for _ in range(rng.randrange(1, 6)):
            request[rng.randrange(len(request))] = rng.randrange(256)
        with connect(server.port) as sock:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda sock=sock: sock.recv(65536), b""))
        assert b"Traceback" not in answer
    assert exchange(server.port, right)[0] == 200
    assert not log
