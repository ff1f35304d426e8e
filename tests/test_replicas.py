"""Two replicas behind one endpoint, in real processes of Ray; the choice by prefix is real too."""

import asyncio
import json
import os
import signal
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.request.sampling_params import SamplingParams

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'minipaged[ray]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BLOCKS = 64


@pytest.fixture(scope="module")
def url():
    """Where two replicas of the shipped model are served, with two keys that are set apart."""
    from ray import serve

    from minipaged.serving.replicas import Arguments, build

    os.environ["MINIPAGED_API_KEY"] = "one two"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )
    try:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve.start(http_options={"port": port})
        arguments = Arguments(num_replicas=2, num_blocks=BLOCKS, isolate_keys=True)
        serve.run(build(arguments), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        del os.environ["MINIPAGED_API_KEY"]
        serve.shutdown()
        ray.shutdown()


def complete(url, prompt, key="one", **fields):
    fields = {"prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/completions", json=fields, headers=headers, timeout=120)


def cached(answer):
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def stream(url, prompt, **fields):
    """A stream of many tokens, to be used in a `with` statement."""
    fields = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True, **fields}
    headers = {"Authorization": "Bearer one"}
    return httpx.stream("POST", f"{url}/v1/completions", json=fields, headers=headers, timeout=120)


def states():
    """How the engine of each replica stands."""
    from ray import serve

    return serve.get_deployment_handle("replica", "default").broadcast("state").results()


def both_live():
    try:
        return len(states()) == 2
    except ray.exceptions.RayError:  # one of them has just died
        return False


def until(condition, seconds=60):
    """Wait for something that takes a moment."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.1)


def test_answers_are_those_of_one_engine(url):
    prompts = ["ROMEO:", "To be, or", "O, what light", "KING:"]
    answer = complete(url, prompts, max_tokens=12).json()
    engine = load_engine("tiny", EngineOptions(num_blocks=BLOCKS))
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, SamplingParams(temperature=0, max_tokens=12))
    texts = {}
    while engine.has_unfinished_requests:
        texts.update((output.request_id, output.outputs[0].text) for output in engine.step())
    assert {str(c["index"]): c["text"] for c in answer["choices"]} == texts


def test_a_prompt_goes_where_its_prefix_is(url):
    before = [state.steps for state in states()]
    # Where one replica was sent a prompt more than the other before, two may go to the same.
    tokens, others = (31, 32, 33), []
    assert [cached(complete(url, [token] * 40)) for token in tokens] == [0, 0, 0]
    assert all(now.steps > then for now, then in zip(states(), before, strict=True)), (
        "three prompts that have nothing in common were sent to one replica"
    )
    for last in range(3):
        others += [complete(url, [token] * 40 + [last]) for token in tokens]
    assert [cached(answer) for answer in others] == [32] * 9
    assert cached(complete(url, [31] * 40, key="two")) == 0, "another key found the prefix"


def test_requests_that_come_together_are_shared_out(url):
    """All of them are routed before the first one is accepted anywhere."""
    prompts = [[token] * 20 for token in range(50, 58)]
    before = [state.prefix_queried_tokens for state in states()]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(url, prompt), prompts))
    assert {answer.status_code for answer in answers} == {200}
    now = [state.prefix_queried_tokens for state in states()]
    shares = [after - then for after, then in zip(now, before, strict=True)]
    assert min(shares) >= sum(shares) / 4, f"tokens that the replicas were sent: {shares}"


def test_what_a_replica_refuses_reaches_the_client(url):
    answer = complete(url, [5] * 600)
    assert answer.status_code == 400
    assert "the prompt has 600 tokens and the model's context 512" in answer.text
    assert complete(url, "ROMEO:", key="three").status_code == 401


def test_a_client_that_goes_frees_its_blocks(url):
    before = sum(state.steps for state in states())
    with stream(url, "ROMEO:") as response:
        next(response.iter_lines())
    until(lambda: sum(state.running + state.exclusive_blocks for state in states()) == 0)
    assert sum(state.steps for state in states()) < before + 400, "it ran to its end"


def test_a_replica_that_dies_ends_its_requests_and_is_replaced(url):
    with stream(url, [41] * 40) as one, stream(url, [42] * 40) as two:
        lines = [response.iter_lines() for response in (one, two)]
        for line in lines:
            next(line)
        os.kill(replica_processes()[0], signal.SIGKILL)
        ends = [json.loads(last(line).removeprefix("data: ")) for line in lines]
    lost = [end["error"] for end in ends if "error" in end]
    whole = [end for end in ends if "choices" in end]
    assert [error["type"] for error in lost] == ["server_error"]
    assert "the replica that had this request has ended" in lost[0]["message"]
    assert [end["choices"][0]["finish_reason"] for end in whole] == ["length"]
    assert complete(url, "ROMEO:").status_code == 200, "the other replica serves on"
    until(both_live, 120)


def last(lines):
    """The last event before [DONE]."""
    return [line for line in lines if line and line != "data: [DONE]"][-1]


def replica_processes():
    """Process ids of the replicas, by the names that Ray gives to its processes."""
    found = []
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                name = Path(f"/proc/{process}/cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::ServeReplica:default:replica"):
                found.append(int(process))
    return found


def test_calls_reach_a_replica_whose_queue_is_full():
    """Else they would wait outside for as long as it takes, and not be refused."""
    from minipaged.serving.replicas import Arguments, build

    (replicas,) = build(Arguments(max_num_seqs=3, max_queued=5))._bound_deployment.init_args
    assert replicas._bound_deployment.max_ongoing_requests >= 100 + 3 + 5


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_prefix_cache_can_be_left_out(prefix_cache):
    """As a model with a sliding window needs it."""
    from minipaged.serving.replicas import Arguments, build

    (replicas,) = build(Arguments(prefix_cache=prefix_cache))._bound_deployment.init_args
    _, options, _ = replicas._bound_deployment.init_args
    assert EngineOptions(**options).enable_prefix_caching == prefix_cache


def a_router():
    from minipaged.serving.replicas import PrefixAwareRouter

    router = PrefixAwareRouter.__new__(PrefixAwareRouter)  # the rest of it needs a cluster
    router.initialize_state(16, 4)
    return router


def pending(name, token):
    """What Ray has of a request that it has not sent yet."""
    from ray.serve._private.common import RequestMetadata
    from ray.serve.request_router import PendingRequest

    from minipaged.serving.stream import NewRequest

    calls = [[NewRequest(name, [token] * 40, SamplingParams())]]
    metadata = RequestMetadata(request_id=name, internal_request_id=name)
    return PendingRequest(args=calls, kwargs={}, metadata=metadata, future=Future())


def test_what_is_chosen_for_counts_until_it_is_sent_or_given_up():
    router = a_router()
    replicas = [SimpleNamespace(replica_id=name) for name in ("one", "two")]

    def choose(request):
        ranked = asyncio.run(router.choose_replicas(replicas, request))
        return ranked[0][0].replica_id

    requests = [pending(str(i), token=i) for i in range(6)]
    chosen = [choose(request) for request in requests]
    assert sorted(chosen) == ["one"] * 3 + ["two"] * 3
    assert choose(requests[0]) == chosen[0], "a second choice for one request is no second request"
    router.on_request_routed(requests[0], chosen[0], None)
    del requests[1:]
    assert choose(pending("last", token=9)) != chosen[0], "five have given up, one was sent"


def test_only_what_was_routed_counts_as_a_load():
    """Ray says that a call to all replicas has ended, too, and never that it was routed."""
    router = a_router()
    router.on_request_completed("one", "to all")
    router.on_request_routed(pending("sent", token=7), "one", None)
    for replica in ("one", "two"):
        router.on_request_completed(replica, "to all")
    assert {name: router._loads[name] for name in ("one", "two")} == {"one": 1, "two": 0}
    for _ in range(2):
        router.on_request_completed("one", "sent")
    assert router._loads["one"] == 0
    assert not router._routed


def test_no_replica_at_all_is_an_answer_too():
    """While all are being replaced, Ray refuses a call with an error that is no RayError."""
    from ray.serve.exceptions import DeploymentUnavailableError

    from minipaged.serving.replicas import ReplicaLostError, Replicas
    from minipaged.serving.stream import NewRequest, Stream

    class Unavailable:
        """A handle on such a deployment."""

        generate = state = property(lambda self: self)

        def options(self, **_):
            return self

        def remote(self, _):
            return self

        def broadcast(self, _):
            return self

        def __aiter__(self):
            return self

        async def __anext__(self):
            raise DeploymentUnavailableError(None)

        async def results_async(self):
            raise DeploymentUnavailableError(None)

    async def ask():
        replicas = Replicas(Unavailable())
        requests = [NewRequest("0", [7], SamplingParams())]
        with pytest.raises(ReplicaLostError):
            await replicas.add(requests)
        with pytest.raises(ReplicaLostError):
            await replicas.state()
        stream = Stream(requests)
        await replicas._pump(stream, Unavailable())
        with pytest.raises(ReplicaLostError):
            await stream.finished()

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"num_replicas": 0}, "num_replicas"), ({"modle": "tiny"}, "modle")],
)
def test_wrong_arguments_are_named(given, message):
    from pydantic import ValidationError

    from minipaged.serving.replicas import Arguments

    with pytest.raises(ValidationError, match=message):
        Arguments(**given)
