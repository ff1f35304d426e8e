"""How one request wants its tokens drawn and when it ends.

Names, defaults and meanings are those of vLLM's `SamplingParams`.  Only validation lives
here; the arithmetic is in `decoding/sampler.py`, the stopping in `decoding/stopping.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from minipaged.errors import InvalidRequestError

LARGEST_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Decoding options of one request.

    temperature: 0 is greedy; 1 is the model's own distribution.
    top_k: draw among the k most likely tokens; 0 or -1 for all.
    top_p: draw among the fewest most likely tokens whose probabilities reach top_p.
    min_p: drop tokens less likely than min_p times the likeliest.
    repetition_penalty: above 1 discourages tokens of the prompt and the output (CTRL, 2019).
    presence_penalty, frequency_penalty: subtracted from the logits of output tokens, once or
        once per occurrence (OpenAI's definition).
    max_tokens: output tokens at most; None is as many as the context and the pool allow.
    min_tokens: output tokens before an end-of-sequence or stop token may be drawn.
    stop: strings that end the output (and are cut off it unless include_stop_str_in_output).
    stop_token_ids: tokens that end the output like the model's end-of-sequence token.
    ignore_eos: go on after the model's end-of-sequence token.
    logprobs: report the log-probability of each token and of this many likeliest ones.
    seed: of this request's random streams; None derives them from the engine's seed.
    n: outputs to return.
    best_of: outputs to draw, of which the n most probable are returned; None is n.  With beam
        search it is the beam width.
    use_beam_search: keep the best_of likeliest partial outputs at every step; draws nothing.
    length_penalty: a hypothesis scores its log-probability / length ** length_penalty, so that
        more than 0 favours long ones.
    early_stopping: when a beam search ends: True, with best_of hypotheses complete; False, when
        a partial one of this length could not score better any more; "never", when one of any
        length could not.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    seed: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if not isinstance(self.stop, (str, Iterable, type(None))):
            raise InvalidRequestError(
                f"stop is {self.stop!r}; it must be a text or a list of texts"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        if isinstance(self.stop_token_ids, (int, str)):
            raise InvalidRequestError(
                f"stop_token_ids is {self.stop_token_ids!r}; it must be a list of token ids"
            )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._check_types()
        inf = math.inf
        self._check_range("temperature", 0, 1e6, "0 is greedy")
        self._check_range("top_k", -1, 2**31 - 1, "0 or -1 keeps every token")
        self._check_range("top_p", 0, 1, "1 keeps every token", open_below=True)
        self._check_range("min_p", 0, 1, "0 keeps every token")
        self._check_range("repetition_penalty", 0.01, 100, "1 changes nothing")
        self._check_range("presence_penalty", -2, 2, "0 changes nothing")
        self._check_range("frequency_penalty", -2, 2, "0 changes nothing")
        self._check_range("max_tokens", 1, inf, "None is as many as fit")
        self._check_range("min_tokens", 0, inf, "0 sets no minimum")
        self._check_range("logprobs", 0, LARGEST_LOGPROBS, "None reports none")
        self._check_range("seed", 0, 2**63 - 1, "None derives one from the engine's seed")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; "
                "lower it or raise max_tokens"
            )
        self._check_width()
        if self.use_beam_search:
            self._check_beam_search()
        if "" in stop:
            raise InvalidRequestError(
                "a stop string is empty and would end every output at once; leave it out"
            )

    @property
    def width(self) -> int:
        """Sequences that run for this request at a time: its samples, or its beams."""
        return self.best_of or self.n

    @property
    def is_ranked(self) -> bool:
        """Whether the outputs returned are the most probable ones of more."""
        return self.width > self.n or self.use_beam_search

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that no random number is drawn."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits, so that they must be counted."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def _check_types(self) -> None:
        whole = ("n", "best_of", "top_k", "min_tokens", "max_tokens", "logprobs", "seed")
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        real = ("temperature", "top_p", "min_p", "length_penalty", *penalties)
        for name in (*whole, *real):
            value: Any = getattr(self, name)
            optional = name in ("best_of", "max_tokens", "logprobs", "seed")
            wanted, article = (int, "a whole number") if name in whole else (float, "a number")
            fits = isinstance(value, (int, wanted)) and not isinstance(value, bool)
            if not fits and not (value is None and optional):
                raise InvalidRequestError(f"{name} is {value!r}; it must be {article}")
        for text in self.stop:
            if not isinstance(text, str):
                raise InvalidRequestError(f"a stop string is {text!r}; it must be text")
        for token in self.stop_token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise InvalidRequestError(
                    f"a stop token id is {token!r}; it must be a whole number, 0 or more"
                )

    def _check_width(self) -> None:
        self._check_range("n", 1, math.inf, "1 is one output")
        self._check_range("best_of", 1, math.inf, "None is as many as n")
        if self.width < self.n:
            raise InvalidRequestError(
                f"best_of is {self.best_of}, below n {self.n}; raise it or lower n"
            )
        if self.greedy and self.width > 1 and not self.use_beam_search:
            raise InvalidRequestError(
                f"temperature is 0 and {self.width} outputs are asked for, which would all be "
                "the same; raise the temperature, set n and best_of to 1, or use beam search"
            )
        if not self.use_beam_search and (self.length_penalty != 1 or self.early_stopping):
            raise InvalidRequestError(
                f"length_penalty {self.length_penalty} and early_stopping {self.early_stopping} "
                "mean something to beam search only; set use_beam_search or leave them out"
            )

    def _check_beam_search(self) -> None:
        """What only drawing knows has no meaning for a search."""
        if self.early_stopping not in (True, False, "never"):
            raise InvalidRequestError(
                f'early_stopping is {self.early_stopping!r}; it must be True, False or "never"'
            )
        self._check_range("length_penalty", -10, 10, "1 is the mean log-probability")
        neutral: dict[str, tuple[Any, ...]] = {
            "temperature": (0,),
            "top_k": (0, -1),
            "top_p": (1,),
            "min_p": (0,),
            "repetition_penalty": (1,),
            "presence_penalty": (0,),
            "frequency_penalty": (0,),
            "stop": ((),),
        }
        for name, allowed in neutral.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidRequestError(
                    f"{name} is {value!r} with beam search, which scores the model's own "
                    f"probabilities and draws nothing; set it to {allowed[0]!r}"
                )

    def _check_range(
        self, name: str, low: float, high: float, remedy: str, open_below: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None:
            return
        above = value > low if open_below else value >= low
        finite = -math.inf < value < math.inf
        if not (finite and above and value <= high):
            left = "(" if open_below else "["
            right = "inf)" if high == math.inf else f"{high}]"
            raise InvalidRequestError(
                f"{name} is {value}; it must lie in {left}{low}, {right}, and {remedy}"
            )
