"""Lesson 17: pieces of a stream that make up the whole, and keys that time does not tell."""

import asyncio
import hmac
import json
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.course.narration import story
from minipaged.decoding.sampler import Logprob
from minipaged.engine.outputs import CompletionOutput, RequestOutput

pytest.importorskip("fastapi", reason='tasks 17.4 and 17.5 need pip install "minipaged[serving]"')

from minipaged import LLM
from minipaged.serving import gate
from minipaged.serving.answers import Growth
from minipaged.serving.failures import APIError
from minipaged.serving.gate import Keys
from minipaged.serving.protocol import CompletionRequest
from minipaged.serving.service import Service
from minipaged.serving.stream import Stream

PATIENCE = 30  # seconds, for what takes less than one


pytestmark = pytest.mark.usefixtures("one_thread")


# 17.4: what is new


@st.composite
def growing(draw):
    """Outputs of one request as they grow: in each state, characters and tokens of each."""
    states = [(0, 0, False)]
    for _ in range(draw(st.integers(1, 6))):
        chars, tokens, _ = states[-1]
        # A token may give no text for now, because it is held back, or several characters.
        grown = draw(st.sampled_from([0, 0, 1, 2, 5]))
        states.append((chars + grown, tokens + draw(st.integers(1, 3)), False))
    chars, tokens, _ = states[-1]
    return [*states[1:], (chars + draw(st.integers(0, 3)), tokens + draw(st.integers(0, 1)), True)]


@st.composite
def histories(draw):
    """What a reader sees of some requests with n outputs each: states may be skipped."""
    n, num_requests = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seen = {}
    for request in range(num_requests):
        lives = [draw(growing()) for _ in range(n)]
        longest = max(map(len, lives))
        steps = [[life[min(step, len(life) - 1)] for life in lives] for step in range(longest)]
        seen[request] = [step for step in steps[:-1] if draw(st.booleans())] + [steps[-1]]
    # In any order between the requests, and in their own order within each.
    order = draw(st.permutations([request for request, steps in seen.items() for _ in steps]))
    return n, num_requests, [(request, seen[request].pop(0)) for request in order]


def completion(index, num_chars, num_tokens, is_last):
    text = (f"{index}abcdefghijklmnopqrstuvwxyz" * 3)[:num_chars]
    token_ids = [100 * index + place for place in range(num_tokens)]
    logprobs = [{token: Logprob(-0.5, 1)} for token in token_ids]
    reason = ("stop" if index % 2 else "length") if is_last else None
    return CompletionOutput(index, text, token_ids, logprobs, reason)


def watch(history):
    """Give a Growth what a reader sees; returns the pieces of each output, and all at the end."""
    n, num_requests, seen = history
    story.begin()
    names = [f"R{request}" for request in range(num_requests)]
    story.tell(f"growth = Growth({names}, n={n})")
    growth, pieces, whole = Growth(names, n), {}, {}
    for request, states in seen:
        outputs = [completion(index, *state) for index, state in enumerate(states)]
        done = all(is_last for _, _, is_last in states)
        told = ", ".join(
            f"{o.text!r} {len(o.token_ids)} tokens {o.finish_reason or ''}".strip() for o in outputs
        )
        story.tell(f"growth.pieces(R{request}: {told})")
        for piece in growth.pieces(RequestOutput(names[request], None, [1], outputs, done)):
            story.tell("", f"piece of output {piece.index}: {piece.text!r} {piece.token_ids}")
            assert piece.text or piece.finish_reason, (
                "a piece without text and without a finish reason tells nothing: leave it out"
            )
            pieces.setdefault(piece.index, []).append(piece)
        for index, one in enumerate(outputs):
            whole[request * n + index] = one
    return pieces, whole


@pytest.mark.task("17.4")
@given(history=histories())
def test_the_pieces_put_together_are_the_whole(history):
    pieces, whole = watch(history)
    assert pieces.keys() == whole.keys(), (
        f"there were pieces of the outputs {sorted(pieces)}; output i of request r of n each is "
        f"number r n + i, so they are {sorted(whole)}"
    )
    for index, final in whole.items():
        text = "".join(piece.text for piece in pieces[index])
        assert text == final.text, f"output {index} is {final.text!r}, and was told as {text!r}"
        tokens = [token for piece in pieces[index] for token in piece.token_ids]
        assert tokens == final.token_ids, (
            f"output {index} has the tokens {final.token_ids}, and was told as {tokens}"
        )
        logprobs = [entry for piece in pieces[index] for entry in piece.logprobs]
        assert logprobs == final.logprobs, "each token's logprobs are told once, with the token"


@pytest.mark.task("17.4")
@given(history=histories())
def test_the_end_of_each_output_is_told_once_and_last(history):
    pieces, whole = watch(history)
    for index, final in whole.items():
        reasons = [piece.finish_reason for piece in pieces[index]]
        assert any(reasons), (
            f"output {index} ended with {final.finish_reason!r}, and none of its pieces said so: a "
            "piece with the end is told even if no text comes with it"
        )
        assert reasons == [None] * (len(reasons) - 1) + [final.finish_reason], (
            f"output {index} ended with {final.finish_reason!r}; its pieces said {reasons}: "
            "one that has ended is in every later output of its request, as long as another grows"
        )


class InTheLoop:
    """Serves one answer after the other, and needs no thread for it."""

    def __init__(self, engine):
        self.engine = engine
        self.observers = []

    async def add(self, requests):
        self.stream = Stream(requests)
        for new in requests:
            self.engine.add_request(new.request_id, new.prompt, new.params)
        return self.stream

    async def serve(self, answer):
        """Step until the answer is complete, so fast that its reader misses some outputs."""

        async def step():
            while self.engine.has_unfinished_requests:
                for output in [*self.engine.step(), *self.engine.step()]:
                    self.stream.put(output)
                await asyncio.sleep(0)

        answer, _ = await asyncio.wait_for(asyncio.gather(answer, step()), PATIENCE)
        return answer


@pytest.mark.task("17.4")
def test_a_stream_and_an_answer_say_the_same():
    story.begin("one request twice through the service, streamed and whole")
    request = {
        "prompt": ["ROMEO:", "First Citizen:"],
        "max_tokens": 12,
        "n": 2,
        "seed": 1,
        "temperature": 0.8,
        "stop": ["you"],
        "logprobs": 1,
    }
    story.tell(f"POST /v1/completions {json.dumps(request)}")

    async def scene():
        engines = InTheLoop(LLM(num_blocks=64).engine)
        engine = engines.engine
        service = Service(engines, "tiny", engine.tokenizer, engine.context_length, 0)
        exchange = await service.complete(CompletionRequest(**request), b"")
        whole = await engines.serve(exchange.whole())
        exchange = await service.complete(CompletionRequest(**request, stream=True), b"")

        async def read():
            return [event async for event in exchange.events()]

        return whole, await engines.serve(read())

    whole, events = asyncio.run(scene())
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in events)
    *events, done = [event.removeprefix("data: ").strip() for event in events]
    assert done == "[DONE]"
    texts, tokens, reasons = {}, {}, {}
    for event in map(json.loads, events):
        assert "error" not in event, event
        for choice in event["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["text"]
            tokens.setdefault(index, []).extend(choice["logprobs"]["tokens"])
            reasons.setdefault(index, []).append(choice["finish_reason"])
    for choice in whole.choices:
        assert texts[choice.index] == choice.text, (
            f"choice {choice.index} is {choice.text!r}, and was streamed as {texts[choice.index]!r}"
        )
        assert tokens[choice.index] == choice.logprobs.tokens
        assert reasons[choice.index][-1] == choice.finish_reason


# 17.5: the key

keys = st.text("abXY01-_", min_size=1, max_size=6)


def refusal(known, header):
    with pytest.raises(APIError) as error:
        known.check(header)
    return error.value


@pytest.mark.task("17.5")
@given(accepted=st.lists(keys, min_size=1, max_size=4, unique=True), data=st.data())
def test_the_right_key_is_let_in_and_no_other(accepted, data):
    story.begin()
    story.tell(f"keys = Keys({accepted}, isolate=True)")
    known = Keys(accepted, isolate=True)
    salts = []
    for key in accepted:
        for header in (f"Bearer {key}", f"bearer {key}", f"Bearer  {key} "):
            story.tell(f"keys.check({header!r})")
            salts.append(known.check(header))
    assert salts[::3] == salts[1::3] == salts[2::3], "a key has the same salt every time"
    assert len(set(salts)) == len(accepted), "each key has a salt of its own"
    wrong = data.draw(keys.filter(lambda key: key not in accepted))
    headers = [None, "", "Bearer", "Bearer ", f"Bearer {wrong}", f"Bearer x{accepted[0]}"]
    headers += [accepted[0], f"Basic {accepted[0]}", f"Bearer {accepted[0]} {accepted[0]}"]
    headers += [f"Bearer {accepted[0]}é"]
    for header in headers:
        story.tell(f"keys.check({header!r})")
        error = refusal(known, header)
        assert error.status == 401, f"a request without a right key is 401, not {error.status}"
        challenge = (error.headers or {}).get("WWW-Authenticate")
        assert challenge == "Bearer", "a 401 says in WWW-Authenticate what would be accepted"
        assert accepted[0] not in error.message or len(accepted[0]) < 4, (
            "an error must not repeat a key: it ends up in logs"
        )


@pytest.mark.task("17.5")
def test_without_keys_everybody_is_let_in():
    story.begin("keys = Keys()")
    for header in (None, "", "Bearer anything", "nonsense"):
        assert Keys().check(header) == b"", "where there are no keys, nobody needs one"


class Watched(bytes):
    """A digest that knows how it was compared."""

    how: list

    def __eq__(self, other):
        self.how.append("==")
        return bytes(self) == bytes(other)

    def __hash__(self):
        self.how.append("hash")
        return hash(bytes(self))


@pytest.mark.task("17.5")
@pytest.mark.parametrize("given_key", ["first", "second", "third", "none", ""])
def test_the_time_it_takes_tells_nothing(given_key, monkeypatch):
    story.begin("keys = Keys(['first', 'second', 'third'])")
    story.tell(f"keys.check('Bearer {given_key}')")
    known, how = Keys(["first", "second", "third"]), []
    watched = []
    for digest in known._digests:
        watched.append(Watched(digest))
        watched[-1].how = how
    known._digests = watched
    compare = hmac.compare_digest

    def counted(a, b):
        how.append("compare_digest")
        return compare(a, b)

    for module in (hmac, secrets, gate):
        if hasattr(module, "compare_digest"):
            monkeypatch.setattr(module, "compare_digest", counted)
    if given_key in ("first", "second", "third"):
        known.check(f"Bearer {given_key}")
    else:
        refusal(known, f"Bearer {given_key}")
    assert set(how) <= {"compare_digest"}, (
        f"digests were compared by {set(how) - {'compare_digest'}}, which stops at the first byte "
        "that differs, and so tells by its time how many were right"
    )
    assert how.count("compare_digest") == 3, (
        f"{how.count('compare_digest')} of 3 keys were compared: how soon it ends tells which one "
        "was right"
    )
