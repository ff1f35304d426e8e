"""The served schema tells the truth: what it allows is served, what it does not is refused."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from servers import RunningServer, exchange, post, tiny_with_template

from minipaged.engine.builder import EngineOptions, load_engine

TRUE = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
    # Not positive_data_acceptance: fields that are right by themselves may contradict each other
    # or ask for more than this pool holds.  What is refused for that is looked at below.
    # Not use_after_free, ensure_resource_availability and the like: nothing is created or deleted.
    # Not ignored_auth: keys are the server's option and not in the schema; see test_gate.py.
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tiny_with_template(tmp_path_factory.mktemp("tiny"))
    options = EngineOptions(num_blocks=64, max_num_seqs=8, dtype="float32")
    running = RunningServer(load_engine(model, options), max_queued=50)
    yield running
    running.check_no_leak()
    running.stop()


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def only_true_integers(body):
    """JSON Schema takes 1.0 for an integer; the API, like OpenAI's, does not."""

    def number(text):
        value = float(text)
        return int(value) if value.is_integer() else value

    return json.loads(json.dumps(body), parse_float=number)


def check_operation(operation, check, mode, max_examples):
    """With drawn requests, which the schema allows or does not."""
    run = given(case=operation.as_strategy(generation_mode=mode))(check)
    options = {"derandomize": True, "deadline": None, "database": None}
    health = list(HealthCheck)
    settings(max_examples=max_examples, suppress_health_check=health, **options)(run)()


OPERATIONS = [
    *("GET /health", "GET /metrics", "GET /v1/models", "GET /v1/models/{name}"),
    *("POST /v1/completions", "POST /v1/chat/completions"),
]


def test_these_are_all_operations(schema):
    found = {f"{each.ok().method.upper()} {each.ok().path}" for each in schema.get_all_operations()}
    assert found >= set(OPERATIONS)
    assert {each for each in found if "/v1" in each} == set(OPERATIONS[2:])


@pytest.mark.parametrize(
    ("name", "mode"),
    # Of what is asked with GET, nothing can be wrong: any text may be the name of a model.
    [(name, GenerationMode.POSITIVE) for name in OPERATIONS]
    + [(name, GenerationMode.NEGATIVE) for name in OPERATIONS if name.startswith("POST")],
)
def test_every_operation_does_what_the_schema_says(schema, name, mode):
    method, path = name.split()
    operation = schema[path][method]

    def check(case):
        if mode is GenerationMode.POSITIVE and method == "POST":
            case.body = {**only_true_integers(case.body), "max_tokens": 2}
        case.call_and_validate(checks=TRUE)

    check_operation(operation, check, mode, 30 if method == "POST" else 5)


CONTRADICTIONS = (
    *("best_of is", "outputs are asked for", "min_tokens is", "with beam search"),
    *("mean something to beam search only", "cannot be streamed", "the beam width is"),
)
TOO_MUCH = ("the whole pool has", "max_num_seqs is")


def test_what_the_schema_allows_is_refused_only_for_a_contradiction_or_the_size(schema):
    """All that is right field by field is served, if this server can."""
    statuses = set()

    def check(case):
        case.body = {**only_true_integers(case.body), "max_tokens": 3, "prompt": [1, 2]}
        for name in ("model", "priority", "stop_token_ids"):  # whose limits are this server's
            case.body.pop(name, None)
        answer = case.call()
        statuses.add(answer.status_code)
        if answer.status_code != 200:
            assert answer.status_code == 400, answer.text
            message = answer.json()["error"]["message"]
            assert any(reason in message for reason in CONTRADICTIONS + TOO_MUCH), message

    check_operation(schema["/v1/completions"]["POST"], check, GenerationMode.POSITIVE, 30)
    assert statuses == {200, 400}


def test_the_schema_names_every_status_and_both_kinds_of_answer(schema):
    raw = schema.raw_schema
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = raw["paths"][path]["post"]["responses"]
        assert set(answers) >= {"200", "400", "401", "404", "413", "415", "429", "500", "503"}
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    text = json.dumps(raw)
    assert "HTTPValidationError" not in text, "FastAPI's own shape of errors is not ours"
    assert '"422"' not in text
    for operation in raw["paths"].values():
        for method in operation.values():
            for status, answer in method["responses"].items():
                if status.startswith(("4", "5")):
                    reference = answer["content"]["application/json"]["schema"]["$ref"]
                    assert reference.endswith("/ErrorResponse")


def test_null_is_as_good_as_leaving_a_field_out(schema, server):
    """The schema says so, and it is so."""
    fields = schema.raw_schema["components"]["schemas"]["CompletionRequest"]
    optional = fields["properties"].keys() - set(fields["required"])
    for name in optional:
        assert {"type": "null"} in fields["properties"][name]["anyOf"], name
    body = {"prompt": [1, 2], **dict.fromkeys(optional)}
    status, _, answer = exchange(server.port, post("/v1/completions", body))
    assert status == 200, answer
    assert json.loads(answer)["usage"]["completion_tokens"] <= 16
