"""Generation of one request alone over contiguous keys and values: the oracle of T4.

No blocks, no batch, no scheduler: each layer's keys and values grow by concatenation.
Whatever the engine does to a request, its tokens must equal these.
"""

from __future__ import annotations

from collections.abc import Iterable

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

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append the new tokens' keys and values, then attend to all of them."""
        if layer in self._layers:
            old_key, old_value = self._layers[layer]
            key, value = torch.cat((old_key, key)), torch.cat((old_value, value))
        self._layers[layer] = key, value
        return contiguous_attention(query, key, value)


@torch.inference_mode()
def generate_alone(
    decoder: Decoder,
    prompt_token_ids: Iterable[int],
    params: SamplingParams,
    random_key: tuple[int, ...] = (0,),
    eos_token_ids: tuple[int, ...] = (),
) -> list[int]:
    """Output token ids of one request; stop strings, which need a tokenizer, are not looked for."""
    sequence = Sequence(0, prompt_token_ids, random_key)
    room = decoder.config.context_length - sequence.num_prompt_tokens
    max_tokens = min(params.max_tokens or room, room)
    ends = end_tokens(params, eos_token_ids)
    cache = ContiguousCache()
    while True:
        new = sequence.token_ids[sequence.num_computed_tokens :]
        positions = torch.arange(sequence.num_computed_tokens, len(sequence.token_ids))
        logits = decoder(torch.tensor(new), positions, cache.attend)
        sequence.num_computed_tokens = len(sequence.token_ids)
        (token,) = sample(logits[-1:], [Draw(sequence, params, ends)])
        sequence.token_ids.append(token.token_id)
        if stop_by_token(sequence, ends, max_tokens):
            return sequence.output_token_ids
