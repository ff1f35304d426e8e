"""One decoder for every family: OPT, GPT-2, LLaMA, Mistral, Qwen2, Qwen3.

The network sees a flat list of tokens, prompt and decoding tokens of all sequences mixed,
and never learns where one sequence ends: only attention needs to know, and attention is
the `attend` callback.  The engine passes one that pages, the training script one that does
not.  Queries, keys and values are one projection, and so are gate and up.

A tensor-parallel rank builds it of its own heads and rows, and adds up with the others what they
compute: the embedding once, and each layer's attention and MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minipaged.models import rotary
from minipaged.models.collectives import ONE_RANK, Collectives
from minipaged.models.config import Activation, ModelConfig
from minipaged.models.shard import WHOLE, Shard


class Attend(Protocol):
    """Attention over everything that each token may see, itself included."""

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
    ) -> Float[Tensor, "tokens heads head_dim"]: ...


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _norm(config: ModelConfig, size: int) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)


class Embedding(nn.Embedding):
    """PyTorch's initializes even what is on `meta`, by code that takes a second to import."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, index: int, collectives: Collectives = ONE_RANK
    ) -> None:
        super().__init__()
        self.config, self.index, self.collectives = config, index, collectives
        hidden, attended = config.hidden_size, config.num_heads * config.head_dim
        widened = config.intermediate_size * (2 if config.gated_mlp else 1)
        self.attention_norm = _norm(config, hidden)
        self.qkv_proj = nn.Linear(hidden, config.qkv_size, bias=config.qkv_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.o_proj = nn.Linear(attended, hidden, bias=config.output_bias)
        self.mlp_norm = _norm(config, hidden)
        self.up_proj = nn.Linear(hidden, widened, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=config.mlp_bias)

    def forward(
        self,
        residual: Float[Tensor, "tokens hidden"],
        rotation: tuple[Tensor, Tensor] | None,
        attend: Attend,
    ) -> Float[Tensor, "tokens hidden"]:
        attended = self._attention(self.attention_norm(residual), rotation, attend)
        residual = residual + self.collectives.all_reduce(attended)
        return residual + self.collectives.all_reduce(self._mlp(self.mlp_norm(residual)))

    def _attention(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, attend: Attend
    ) -> Tensor:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = self.qkv_proj(x).view(len(x), heads + 2 * kv_heads, self.config.head_dim)
        query_and_key, value = qkv.split((heads + kv_heads, kv_heads), dim=1)
        if self.config.qk_norm:
            query, key = query_and_key.split((heads, kv_heads), dim=1)
            query_and_key = torch.cat((self.q_norm(query), self.k_norm(key)), dim=1)
        if rotation is not None:
            query_and_key = rotary.rotate(query_and_key, *rotation)
        query, key = query_and_key.split((heads, kv_heads), dim=1)
        return self.o_proj(attend(self.index, query, key, value).flatten(1))

    def _mlp(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.config.activation]
        up = self.up_proj(x)
        if self.config.gated_mlp:
            gate, up = up.chunk(2, dim=-1)
            return self.down_proj(activation(gate) * up)
        return self.down_proj(activation(up))


class Decoder(nn.Module):
    """Token ids in, logits out; the rows of `up_proj` are gate first, then up, if gated.

    whole_config: of the model; `config` is what this rank has of it.
    """

    rotation_table: Tensor

    def __init__(
        self,
        whole_config: ModelConfig,
        shard: Shard = WHOLE,
        collectives: Collectives = ONE_RANK,
    ) -> None:
        super().__init__()
        self.whole_config, self.shard, self.collectives = whole_config, shard, collectives
        self.config = config = shard.local_config(whole_config)
        self.vocabulary = shard.vocabulary(config).kept
        self.embed_tokens = Embedding(len(self.vocabulary), config.hidden_size)
        if config.rope is None:
            rows = config.max_positions + config.learned_position_offset
            self.embed_positions = Embedding(rows, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, collectives) for i in range(config.num_layers)
        )
        self.final_norm = _norm(config, config.hidden_size)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, len(self.vocabulary), bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("rotation_table", torch.empty(0), persistent=False)

    def forward(
        self,
        token_ids: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        attend: Attend,
        logits_at: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows vocab"]:
        """Logits of the tokens at `logits_at` (all if None); the others skip the largest matrix."""
        x = self._embed(token_ids)
        rotation = None
        if self.config.rope is None:
            x = x + self.embed_positions(positions + self.config.learned_position_offset)
        else:
            rotation = rotary.look_up(self._rotation_table(x.dtype), positions)
        for layer in self.layers:
            x = layer(x, rotation, attend)
        if logits_at is not None:
            x = x[logits_at]
        logits = self.lm_head(self.final_norm(x))
        return self.collectives.gather_logits(logits, self.config.vocab_size)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Each rank looks up the tokens whose rows it has; together they have them all."""
        rows = token_ids - self.vocabulary.start
        elsewhere = (rows < 0) | (rows >= len(self.vocabulary))
        x = self.embed_tokens(rows.masked_fill(elsewhere, 0))
        return self.collectives.all_reduce(x.masked_fill(elsewhere.unsqueeze(-1), 0))

    def _rotation_table(self, dtype: torch.dtype) -> Tensor:
        """The table of all positions, made at the first step: the loader builds on `meta`."""
        assert self.config.rope is not None
        if self.rotation_table.numel() == 0 or self.rotation_table.dtype != dtype:
            self.rotation_table = rotary.rotation_table(
                self.config.rope, self.config.head_dim, self.config.context_length, dtype
            ).to(self.embed_tokens.weight.device)
        return self.rotation_table
