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
        return cumulative_logprob / length**self.params.length_penalty

    def step(self, logits: Float[Tensor, "beams vocab"]) -> tuple[list[Candidate], list[Candidate]]:
        """The next running beams, and the candidates that are complete and good enough to keep.

        logits: of the running beams, in order.  No running beams means that the search is over.
        """
        width = self.params.width
        self.length += 1
        running: list[Candidate] = []
        complete: list[Candidate] = []
        for rank, candidate in enumerate(self._likeliest(logits)):
            ends = candidate.token_id in self.end_token_ids or self.length >= self.max_tokens
            if ends and rank < width:
                complete.append(candidate)
            elif not ends and len(running) < width:
                running.append(candidate)
        kept = [candidate for candidate in complete if self._keep(candidate)]
        self.cumulative_logprobs = [candidate.cumulative_logprob for candidate in running]
        if self._is_over():
            running = []
        return running, kept

    def _likeliest(self, logits: Tensor) -> list[Candidate]:
        """The best continuations of all beams, enough that `width` of them are no ends."""
        if logits.dtype != torch.float64:
            logits = logits.float()
        self.logprobs = logprobs = torch.log_softmax(logits, dim=-1)
        if self.length <= self.params.min_tokens:
            logprobs = logprobs.clone()
            logprobs[:, list(self.end_token_ids)] = -math.inf
        before = torch.tensor(
            self.cumulative_logprobs, dtype=logprobs.dtype, device=logprobs.device
        )
        totals = (logprobs + before.unsqueeze(1)).flatten()
        wanted = max(2, 1 + len(self.end_token_ids)) * self.params.width
        values, places = totals.topk(min(wanted, len(totals)))
        candidates = []
        columns = (values.tolist(), places.tolist(), logprobs.flatten()[places].tolist())
        for total, place, logprob in zip(*columns, strict=True):
            beam, token_id = divmod(place, logits.shape[1])
            if total > -math.inf:
                candidates.append(Candidate(beam, token_id, logprob, total))
        return candidates

    def _keep(self, candidate: Candidate) -> bool:
        """Whether a complete hypothesis is among the best; it may push out the worst one."""
        score = self.score(candidate.cumulative_logprob, self.length)
        if len(self.best_scores) == self.params.width:
            if score <= self.best_scores[-1]:
                return False
            self.best_scores.pop()
        self.best_scores.append(score)
        self.best_scores.sort(reverse=True)
        return True

    def _is_over(self) -> bool:
        if not self.cumulative_logprobs or self.length >= self.max_tokens:
            return True
        if len(self.best_scores) < self.params.width:
            return False
        if self.params.early_stopping is True:
            return True
        length = self.length
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self.max_tokens
        return self.score(self.cumulative_logprobs[0], length) <= self.best_scores[-1]
