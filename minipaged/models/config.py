"""What a decoder-only transformer looks like: the sizes and switches that tell the families apart.

Owns the description alone.  Reading one from a checkpoint is the loader's work, building
the network from it is `decoder.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minipaged.errors import ConfigurationError

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `scaling` names how it is stretched beyond the trained length.

    `linear` divides every frequency by `factor`.  `llama3` divides only the low frequencies
    and blends in between (LLaMA 3.1); it reads the last three fields.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Sizes (counts of elements) and switches of one decoder.

    `rope` is None for models with learned positions; those look up row
    `position + learned_position_offset` (OPT keeps two rows in front).  `sliding_window` is how
    many tokens a query sees in every layer, itself included; None is all of them.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    gated_mlp: bool = True
    rope: RopeConfig | None = RopeConfig()
    learned_position_offset: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        heads = ("num_heads", "num_kv_heads", "head_dim")
        others = ("vocab_size", "hidden_size", "num_layers", "intermediate_size", "max_positions")
        for name in (*heads, *others):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"the model's {name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigurationError(
                f"the model's sliding_window is {self.sliding_window}; it must be at least 1"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigurationError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads "
                "evenly; num_heads must be a multiple of num_kv_heads"
            )
        if self.rope is not None and self.head_dim % 2:
            raise ConfigurationError(
                f"rotary embeddings turn pairs of elements, so head_dim must be even, "
                f"not {self.head_dim}"
            )

    @property
    def qkv_size(self) -> int:
        """Elements that the fused projection makes per token: queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def context_length(self) -> int:
        """Tokens a sequence may reach."""
        return self.max_positions

    @property
    def num_weights(self) -> int:
        """Elements of all matrices that a token is multiplied with."""
        attention = self.hidden_size * (self.qkv_size + self.num_heads * self.head_dim)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.gated_mlp else 2)
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of KV cache that one token takes in all layers (section 3: 800 KB for OPT-13B)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_size
