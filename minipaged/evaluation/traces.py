"""Requests of real services, read from the files in which they were published.

Azure's LLM inference traces (CSV, 2023 and 2024), BurstGPT (CSV), Mooncake (JSON lines, with
hashes of the prompts' blocks), and conversations in the form of ShareGPT (JSON), which have
texts and no times.  Which one a file is, its columns say.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

import numpy as np

from minipaged.errors import InvalidRequestError
from minipaged.evaluation.arrivals import TimedRequest, check_rate
from minipaged.evaluation.prefix_replay import hash_ids
from minipaged.evaluation.workload import read_file

MOONCAKE_BLOCK = 512  # tokens of a prompt that one of its hashes stands for
FORMATS = (
    "CSV with TIMESTAMP, ContextTokens, GeneratedTokens (Azure) or Timestamp, Request tokens, "
    "Response tokens (BurstGPT), JSON lines with timestamp, input_length, output_length "
    "(Mooncake), or a JSON list of conversations (ShareGPT)"
)

Row = Mapping[str, object]


def read_trace(path: Path, count_tokens: Callable[[str], int] | None = None) -> list[TimedRequest]:
    """All requests of a file, from second 0 on.

    count_tokens: for conversations, whose texts have to be measured; they get no times of their
        own, and arrive together: see `at_rate`.
    Raises InvalidRequestError, with the number of the line, for what cannot be read.
    """
    text = read_file(path, "utf-8-sig")
    if text.lstrip().startswith("["):
        requests = _conversations(path, text, count_tokens)
    else:
        requests = _timed(path, text)
    if not requests:
        raise InvalidRequestError(f"{path} has no request; it needs {FORMATS}")
    start = requests[0].arrival
    return [request._replace(arrival=request.arrival - start) for request in requests]


def _timed(path: Path, text: str) -> list[TimedRequest]:
    lines = text.splitlines()
    rows: Iterator[tuple[int, Row]]
    if text.lstrip().startswith("{"):
        rows, read = _json_rows(path, lines), _mooncake
    else:
        reader = csv.DictReader(lines)
        columns = set(reader.fieldnames or ())
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
            read = _azure
        elif {"Timestamp", "Request tokens", "Response tokens"} <= columns:
            read = _burstgpt
        else:
            found = ", ".join(sorted(columns)) or "nothing"
            raise InvalidRequestError(f"line 1 of {path} names {found}; it needs {FORMATS}")
        rows = ((reader.line_num, row) for row in reader)
    requests: list[TimedRequest] = []
    for number, row in rows:
        try:
            request = read(row)
            if request.output == 0:
                continue  # failed in the service, or was cut off: there is nothing to serve
            if request.prompt < 1 or request.output < 0:
                raise ValueError("prompt and output need at least 1 token")
            if not math.isfinite(request.arrival):
                raise ValueError(f"it arrives at {request.arrival} s")
            if requests and request.arrival < requests[-1].arrival:
                raise ValueError(
                    f"it arrives {requests[-1].arrival - request.arrival:g} s before the request "
                    "above; sort the file by time"
                )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else error
            raise InvalidRequestError(f"line {number} of {path} is no request: {what}") from error
        requests.append(request)
    return requests


def _json_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidRequestError(f"line {number} of {path} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise InvalidRequestError(f"line {number} of {path} is no object: {line[:40]}")
        yield number, row


def _whole(row: Row, name: str) -> int:
    value = row[name]
    number = int(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return number


def _azure(row: Row) -> TimedRequest:
    # Seven digits of a second in 2023, six and a time zone in 2024.
    day_and_time, _, fraction = str(row["TIMESTAMP"]).removesuffix("+00:00").partition(".")
    digits = fraction or "0"
    seconds = datetime.fromisoformat(day_and_time + "+00:00").timestamp()
    arrival = seconds + int(digits) / 10 ** len(digits)
    return TimedRequest(arrival, _whole(row, "ContextTokens"), _whole(row, "GeneratedTokens"))


def _burstgpt(row: Row) -> TimedRequest:
    arrival = float(str(row["Timestamp"]))
    return TimedRequest(arrival, _whole(row, "Request tokens"), _whole(row, "Response tokens"))


def _mooncake(row: Row) -> TimedRequest:
    prefix = tuple((block, MOONCAKE_BLOCK) for block in hash_ids(row))
    prompt, output = _whole(row, "input_length"), _whole(row, "output_length")
    return TimedRequest(_whole(row, "timestamp") / 1000, prompt, output, prefix)


def _conversations(
    path: Path, text: str, count_tokens: Callable[[str], int] | None
) -> list[TimedRequest]:
    """First question and answer of every conversation, as vLLM's benchmark takes them.

    Those of less than 4 tokens, and prompts above 1,024 or both together above 2,048, are left
    out, as there.
    """
    if count_tokens is None:
        raise InvalidRequestError(
            f"{path} has texts, whose tokens have to be counted; name a model with --tokenizer"
        )
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"{path} is no JSON: {error}") from error
    requests = []
    for number, entry in enumerate(entries, start=1):
        try:
            turns = [turn["value"] for turn in entry["conversations"]]
            if len(turns) < 2:
                continue
            prompt, output = count_tokens(turns[0]), count_tokens(turns[1])
        except (KeyError, TypeError) as error:
            raise InvalidRequestError(
                f"entry {number} of {path} is no conversation: there is no {error}"
            ) from error
        if min(prompt, output) >= 4 and prompt <= 1024 and prompt + output <= 2048:
            requests.append(TimedRequest(0.0, prompt, output))
    return requests


def at_rate(requests: list[TimedRequest], rate: float) -> list[TimedRequest]:
    """The same requests at another mean rate, in requests per second: all gaps grow alike."""
    check_rate(rate)
    duration = requests[-1].arrival
    if duration == 0:
        raise InvalidRequestError(
            "all requests of the trace arrive at once, so that their rate cannot be changed; "
            "let them arrive at random"
        )
    factor = len(requests) / rate / duration
    return [request._replace(arrival=request.arrival * factor) for request in requests]


def at_random(
    requests: list[TimedRequest], rate: float, count: int, seed: int
) -> Iterator[TimedRequest]:
    """So many requests with these lengths as a Poisson process, from the first on again and again.

    One after the other, so that a million of them need no memory.
    """
    check_rate(rate)
    rng = np.random.default_rng(seed)
    time = 0.0
    for number in range(count):
        time += float(rng.exponential(1 / rate))
        yield requests[number % len(requests)]._replace(arrival=time)
