"""An OpenAI-compatible endpoint as a load client sees it: its address, its model, its requests.

Owns what has to be asked before anything is measured, and the bodies of the requests.  When they
are sent, and what becomes of them, is load_client.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import numpy as np

from minipaged.errors import ConfigurationError
from minipaged.evaluation.arrivals import TimedRequest

PATIENCE = 30.0  # seconds in which an endpoint has to say what it serves

# For endpoints that keep their vocabulary to themselves: nearly every tokenizer has each of these
# words, with the space before it, as one token.
WORDS = """
the of and to in a is that for it was on are as with his they at be this from have or by one had not
but what all were when we there can an your which their said if do will each about how up out them
then she many some so these would other into has more her two like him see time could no make than
first been its who now people my made over did down only way find use may water long little very
after words called just where most know
""".split()  # noqa: SIM905


class DueRequest(NamedTuple):
    """A request that is ready to be sent.

    due: seconds since the beginning of the run.
    prompt, output: tokens that were drawn for it.
    body: JSON.
    """

    due: float
    prompt: int
    output: int
    body: bytes


@dataclass(frozen=True)
class Endpoint:
    """Where to send requests, and which ones fit.

    base_url: without the /v1.
    context_length: tokens of a prompt and its output together.
    vocab_size: None where the endpoint does not tell it; prompts are then words, not token ids.
    """

    base_url: str
    model: str
    headers: dict[str, str]
    context_length: int
    vocab_size: int | None

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its output may have by our own count of them.

        A tenth less for words, which a tokenizer may cut, or put a token in front of.
        """
        return self.context_length if self.vocab_size else self.context_length * 9 // 10

    def requests(
        self, timed: Iterable[TimedRequest], rng: np.random.Generator, ignore_eos: bool
    ) -> list[DueRequest]:
        """Random prompts of these lengths; those that share a prefix begin alike.

        No two calls make the same prompts or prefixes, so that a prefix cache finds only what
        the requests of one call have in common.
        """
        salt = int(rng.integers(2**32))
        due = []
        for request in timed:
            tokens = [
                token
                for id_, length in request.prefix
                for token in self._draw(length, np.random.default_rng((salt, id_)))
            ][: request.prompt]
            tokens += self._draw(request.prompt - len(tokens), rng)
            body = self._body(tokens, request.output, int(rng.integers(2**31)), ignore_eos)
            due.append(DueRequest(request.arrival, request.prompt, request.output, body))
        return due

    def _draw(self, count: int, rng: np.random.Generator) -> list[int]:
        return rng.integers(self.vocab_size or len(WORDS), size=count).tolist()

    def _body(self, tokens: list[int], output: int, seed: int, ignore_eos: bool) -> bytes:
        words = " ".join(WORDS[token] for token in tokens) if self.vocab_size is None else None
        content: dict[str, Any] = {
            "model": self.model,
            "prompt": tokens if words is None else words,
            "max_tokens": output,
            "temperature": 0,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ignore_eos:
            content["ignore_eos"] = True
        return json.dumps(content).encode()


def find_endpoint(
    base_url: str, model: str | None, api_key: str | None, max_context: int | None
) -> Endpoint:
    """Ask an endpoint which models it has; the first, if none is named.

    max_context: tokens, where they are fewer than the model's or it does not tell.
    Raises ConfigurationError, with the remedy, for whatever it does not answer as it should.
    """
    base_url = base_url.rstrip("/").removesuffix("/v1")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ConfigurationError(
            "the key has characters that no header may hold; give it in printable ASCII"
        )
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    entries = _models(base_url, headers)
    if model is None and entries:
        model = next(iter(entries))
    if model is None or model not in entries:
        raise ConfigurationError(
            f"there is no model {model!r} at {base_url}; it has "
            f"{', '.join(map(repr, entries)) or 'none'}, of which --model may name one"
        )
    told = entries[model]
    served = told.get("max_model_len")
    if not isinstance(served, int):
        served = None
    if served is None and max_context is None:
        raise ConfigurationError(
            f"{base_url} does not tell how many tokens {model} takes (max_model_len); "
            "say so with --max-context"
        )
    context_length = min(n for n in (served, max_context) if n is not None)
    if context_length < 4:
        raise ConfigurationError(
            f"the context is {context_length} tokens; a prompt and its output need at least 4"
        )
    vocab_size = told.get("vocab_size")
    return Endpoint(
        base_url,
        model,
        headers,
        context_length,
        vocab_size if isinstance(vocab_size, int) else None,
    )


def _models(base_url: str, headers: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The entries of /v1/models, by name."""
    url = f"{base_url}/v1/models"
    try:
        # What the environment names as a proxy is none of what is measured.
        with httpx.Client(headers=headers, timeout=PATIENCE, trust_env=False) as client:
            response = client.get(url)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last one for a..b
        raise ConfigurationError(
            f"nothing answers at {url} ({str(error) or type(error).__name__}); start a server with "
            "minipaged serve, or name another with --base-url"
        ) from error
    if response.status_code in (401, 403):
        raise ConfigurationError(
            f"{url} refuses the key ({response.status_code}); give another with --api-key or "
            "MINIPAGED_API_KEY"
        )
    try:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}")
        return {entry["id"]: entry for entry in response.json()["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{url} gives no list of models ({error}); name an OpenAI-compatible endpoint with "
            "--base-url"
        ) from error
