"""Files of real services: the formats as published, and what is said of a line that is wrong."""

import json
from pathlib import Path

import pytest

from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.evaluation.arrivals import TimedRequest
from minipaged.evaluation.traces import at_random, at_rate, read_trace

DATA = Path(__file__).parents[2] / "shared" / "data"

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118.5,GPT-4,417,276,693,API log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 1025, "output_length": 4, "hash_ids": [0, 2, 3]}
"""


def conversation(*lengths):
    return {"conversations": [{"from": "someone", "value": "word " * n} for n in lengths]}


SHAREGPT = json.dumps(
    [conversation(10, 9), conversation(10), conversation(3, 9), conversation(2000, 9)]
)


def words(text):
    return len(text.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AZURE, [TimedRequest(0, 374, 44), TimedRequest(4.314579, 396, 109)]),
        (AZURE_2024, [TimedRequest(0, 2162, 5), TimedRequest(0.99007, 2399, 6)]),
        # A response of 0 tokens failed: there is nothing to serve.
        (BURSTGPT, [TimedRequest(0, 472, 18), TimedRequest(113.5, 417, 276)]),
        (
            MOONCAKE,
            [
                TimedRequest(0, 700, 5, ((0, 512), (1, 512))),
                TimedRequest(3, 1025, 4, ((0, 512), (2, 512), (3, 512))),
            ],
        ),
        # One turn, a question of 3 tokens, one of 2,000: left out, as in vLLM's benchmark.
        (SHAREGPT, [TimedRequest(0, 10, 9)]),
    ],
    ids=["azure-2023", "azure-2024", "burstgpt", "mooncake", "sharegpt"],
)
def test_a_trace_is_read(tmp_path, text, expected):
    path = tmp_path / "trace"
    path.write_text(text)
    requests = read_trace(path, words)
    assert [r[1:] for r in requests] == [r[1:] for r in expected]
    assert [r.arrival for r in requests] == pytest.approx([r.arrival for r in expected], abs=1e-6)


def test_requests_with_the_same_hashes_begin_alike(tmp_path):
    path = tmp_path / "trace"
    path.write_text(MOONCAKE)
    first, second = read_trace(path)
    tokens, others = first.token_ids(-1), second.token_ids(-2)
    assert (len(tokens), len(others)) == (700, 1025)
    assert tokens[:512] == others[:512]
    assert tokens[512] != others[512]


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Request tokens,Response tokens\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1 of .* names nothing; it needs CSV with TIMESTAMP"),
        (HEAD, r"has no request; it needs CSV"),
        ("time,tokens\n1,2\n", r"line 1 of .* names time, tokens; it needs CSV"),
        (HEAD + "2023-11-16 18:15:46.1,12,many\n", r"line 2 of .* invalid literal .* 'many'"),
        (HEAD + "2023-11-16 18:15:46.1,12\n", r"line 2 of .* is no request: GeneratedTokens is"),
        (HEAD + "yesterday,12,3\n", r"line 2 of .* is no request: Invalid isoformat"),
        (HEAD + "2023-11-16 18:15:46.1,0,3\n", r"line 2 of .* need at least 1 token"),
        (
            HEAD + "2023-11-16 18:15:46.5,1,3\n2023-11-16 18:15:45.5,1,3\n",
            r"line 3 of .* arrives 1 s before the request above; sort",
        ),
        ('{"timestamp": 0}\n', r"line 1 of .* is no request: there is no 'hash_ids'"),
        ('{"timestamp": 0\n', r"line 1 of .* is no JSON"),
        (
            '{"timestamp": 0, "input_length": 1.5, "output_length": 4, "hash_ids": []}\n',
            r"line 1 of .* input_length is 1\.5, not a whole number",
        ),
        # A time that is no number is neither before nor after another one.
        (BURST + "5,4,3\nnan,4,3\n", r"line 3 of .* is no request: it arrives at nan s"),
        (BURST + "inf,4,3\n", r"line 2 of .* is no request: it arrives at inf s"),
        (
            '{"timestamp": 1%s, "input_length": 1, "output_length": 4, "hash_ids": []}'
            % ("0" * 400),
            r"line 1 of .* is no request: .*too large for a float",
        ),
        ('[{"id": 1}]', r"entry 1 of .* is no conversation: there is no 'conversations'"),
        ("[1,", r"is no JSON"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, message):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=message):
        read_trace(path, words)


def test_conversations_need_a_tokenizer(tmp_path):
    path = tmp_path / "trace"
    path.write_text(SHAREGPT)
    with pytest.raises(InvalidRequestError, match="name a model with --tokenizer"):
        read_trace(path)


def test_another_rate_stretches_all_gaps():
    requests = [TimedRequest(t, 1, 1) for t in (0.0, 1.0, 4.0)]
    assert [r.arrival for r in at_rate(requests, 1.5)] == [0.0, 0.5, 2.0]
    with pytest.raises(ConfigurationError, match="rate is 0"):
        at_rate(requests, 0)
    with pytest.raises(InvalidRequestError, match="all requests of the trace arrive at once"):
        at_rate(requests[:1], 1)


def test_a_short_trace_serves_for_many_requests():
    requests = [TimedRequest(0, n, 1) for n in (1, 2, 3)]
    drawn = list(at_random(requests, 10, 1000, seed=0))
    assert [r.prompt for r in drawn[:5]] == [1, 2, 3, 1, 2]
    assert drawn[-1].arrival == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    ("name", "requests", "prompt", "output"),
    [
        ("azure_llm_2023_conversation.csv", 19_366, 1154.7, 211.1),
        ("mooncake_conversation.jsonl", 12_031, 12_035, 343),
    ],
)
def test_the_published_files(name, requests, prompt, output):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here; it is public, see the README")
    trace = read_trace(path)
    assert len(trace) == requests
    assert sum(r.prompt for r in trace) / requests == pytest.approx(prompt, rel=0.01)
    assert sum(r.output for r in trace) / requests == pytest.approx(output, rel=0.01)
