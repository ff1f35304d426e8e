"""Lists of requests to measure with: made up from a seed, or read from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minipaged.errors import InvalidRequestError


class WorkloadRequest(NamedTuple):
    """A prompt and how many tokens to generate for it, whatever they are."""

    prompt_token_ids: list[int]
    output_length: int


def uniform_workload(
    num_requests: int, shortest: int, longest: int, vocab_size: int, seed: int
) -> list[WorkloadRequest]:
    """Prompts of random tokens; prompt and output lengths are uniform in shortest..longest."""
    if not 1 <= shortest <= longest:
        raise InvalidRequestError(
            f"--shortest is {shortest} and --longest {longest}; both are tokens of at least 1, "
            "and the first must not exceed the second"
        )
    if num_requests < 1:
        raise InvalidRequestError(f"--num-requests is {num_requests}; at least 1 is needed")
    random = np.random.default_rng(seed)
    lengths = random.integers(shortest, longest, size=(num_requests, 2), endpoint=True)
    return [
        WorkloadRequest(random.integers(vocab_size, size=prompt).tolist(), int(output))
        for prompt, output in lengths
    ]


def read_file(path: Path, encoding: str = "utf-8") -> str:
    """A text file; InvalidRequestError says why it cannot be read."""
    try:
        return path.read_text(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}") from error


def read_workload(path: Path, vocab_size: int, seed: int) -> list[WorkloadRequest]:
    """Requests from a file with {"prompt_length": ..., "output_length": ...} on every line."""
    random = np.random.default_rng(seed)
    requests = []
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        try:
            entry = json.loads(line)
            prompt, output = entry["prompt_length"], entry["output_length"]
            if not (
                isinstance(prompt, int) and isinstance(output, int) and min(prompt, output) > 0
            ):
                raise ValueError("both lengths must be whole numbers of at least 1")
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError(
                f'line {number} of {path} is not {{"prompt_length": 10, "output_length": 20}}: '
                f"{error}"
            ) from error
        requests.append(WorkloadRequest(random.integers(vocab_size, size=prompt).tolist(), output))
    if not requests:
        raise InvalidRequestError(f"{path} has no request; give it at least one line")
    return requests
