"""Beam search: which partial outputs go on, which are complete, when the search ends.

Owns the decisions about one request, on numbers alone: log-probabilities in, (beam, token)
pairs out.  Forking and freeing the beams' blocks accordingly is the engine's work.  Same
results as `transformers`, whose rules for length penalty and early stopping these are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minipaged.request.sampling_params import SamplingParams


class Candidate(NamedTuple):
    """One more token behind one of the running beams.

    beam: which of the running beams, by its place.
    logprob: of the token; cumulative_logprob: of the output with it.
    """

    beam: int
    token_id: int
    logprob: float
    cumulative_logprob: float


class BeamSearch:
    """The search of one request.

    end_token_ids: tokens that complete a hypothesis.
    max_tokens: tokens of an output at most; a hypothesis of that length is complete.
    After every `step` the running beams are those of its result, the likeliest first.
    """

    def __init__(
        self, params: SamplingParams, end_token_ids: tuple[int, ...], max_tokens: int
    ) -> None:
        self.params = params
        self.end_token_ids = frozenset(end_token_ids)
        self.max_tokens = max_tokens
        self.length = 0
        self.cumulative_logprobs = [0.0]  # of the running beams; the prompt is the first one
        self.best_scores: list[float] = []  # of the complete hypotheses that are kept
        self.logprobs = torch.empty(0, 0)  # of every token behind the beams of the last step

    def score(self, cumulative_logprob: float, length: int) -> float:
        """What hypotheses are compared by."""
        raise NotImplementedError("Task 9.2: BeamSearch.score is still to be written")

    def step(self, logits: Float[Tensor, "beams vocab"]) -> tuple[list[Candidate], list[Candidate]]:
        """The next running beams, and the candidates that are complete and good enough to keep.

        logits: of the running beams, in order.  No running beams means that the search is over.
        """
        raise NotImplementedError("Task 9.4: BeamSearch.step is still to be written")

    def _likeliest(self, logits: Tensor) -> list[Candidate]:
        """The best continuations of all beams, enough that `width` of them are no ends."""
        raise NotImplementedError("Task 9.1: BeamSearch._likeliest is still to be written")

    def _keep(self, candidate: Candidate) -> bool:
        """Whether a complete hypothesis is among the best; it may push out the worst one."""
        raise NotImplementedError("Task 9.2: BeamSearch._keep is still to be written")

    def _is_over(self) -> bool:
        raise NotImplementedError("Task 9.3: BeamSearch._is_over is still to be written")
