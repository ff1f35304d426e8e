"""Generation of one request alone over contiguous keys and values: the oracle of T4.

No blocks, no batch, no scheduler: each layer's keys and values grow by concatenation.
Whatever the engine does to a request, its tokens must equal these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.attention.contiguous import contiguous_attention
from minipaged.decoding.sampler import Draw, sample
from minipaged.decoding.stopping import end_tokens, stop_by_token
from minipaged.models.decoder import Decoder
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence


class ContiguousCache:
    """Keys and values of one sequence, [tokens, kv_heads, head_dim] per layer."""

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append the new tokens' keys and values, then attend to all of them."""
        raise NotImplementedError("Task 1.2: ContiguousCache.attend is still to be written")

    def copy(self) -> ContiguousCache:
        """A copy that grows by itself: what a fork costs without block tables."""
        raise NotImplementedError("Task 1.3: ContiguousCache.copy is still to be written")


def _compute(decoder: Decoder, cache: ContiguousCache, sequence: Sequence) -> Tensor:
    """Logits behind the last token of a sequence, [1, vocab]."""
    raise NotImplementedError("Task 1.4: _compute is still to be written")


def _most_tokens(decoder: Decoder, sequence: Sequence, params: SamplingParams) -> int:
    room = decoder.config.context_length - sequence.num_prompt_tokens
    return min(params.max_tokens or room, room)


@torch.inference_mode()
def generate_alone(
    decoder: Decoder,
    prompt_token_ids: Iterable[int],
    params: SamplingParams,
    random_key: tuple[int, ...] = (0,),
    eos_token_ids: tuple[int, ...] = (),
) -> list[int]:
    """One output of one request; stop strings, which need a tokenizer, are not looked for.

    random_key: of the stream that the output draws from; its last number is its index.
    """
    raise NotImplementedError("Task 1.5: generate_alone is still to be written")


class NaiveBeam(NamedTuple):
    """A partial output with a cache of its own."""

    sequence: Sequence
    cache: ContiguousCache
    logprob: float


@torch.inference_mode()
def beam_search_alone(
    decoder: Decoder,
    prompt_token_ids: Iterable[int],
    params: SamplingParams,
    eos_token_ids: tuple[int, ...] = (),
) -> list[tuple[list[int], float]]:
    """Token ids and score of the hypotheses of one request, the best first.

    Written on its own and in full: every continuation of every beam is listed and sorted.
    """
    prompt = Sequence(0, prompt_token_ids)
    width, max_tokens = params.width, _most_tokens(decoder, prompt, params)
    ends = end_tokens(params, eos_token_ids)
    beams = [NaiveBeam(prompt, ContiguousCache(decoder.config.sliding_window), 0.0)]
    done: list[tuple[list[int], float]] = []
    for length in range(1, max_tokens + 1):
        options = []
        for beam in beams:
            logprobs = torch.log_softmax(_compute(decoder, beam.cache, beam.sequence)[0], -1)
            for token_id, logprob in enumerate(logprobs.tolist()):
                if length > params.min_tokens or token_id not in ends:
                    options.append((beam.logprob + logprob, token_id, beam))
        options.sort(key=lambda option: -option[0])
        last = length == max_tokens
        for logprob, token_id, beam in options[:width]:
            if token_id in ends or last:
                tokens = [*beam.sequence.output_token_ids, token_id]
                done.append((tokens, logprob / length**params.length_penalty))
        done = sorted(done, key=lambda hypothesis: -hypothesis[1])[:width]
        # As many as `transformers` looks at; no more are needed, since each beam has each end once.
        options = options[: max(2, 1 + len(set(ends))) * width]
        going_on = [option for option in options if option[1] not in ends][:width]
        if last or not going_on:
            break
        if len(done) == width:
            longest = params.early_stopping == "never" and params.length_penalty > 0
            best = going_on[0][0] / (max_tokens if longest else length) ** params.length_penalty
            if params.early_stopping is True or best <= done[-1][1]:
                break
        beams = []
        for logprob, token_id, beam in going_on:
            sequence = beam.sequence.fork(0)
            sequence.token_ids.append(token_id)
            beams.append(NaiveBeam(sequence, beam.cache.copy(), logprob))
    return done[: params.n]
