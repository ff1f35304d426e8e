"""What part of a model each tensor-parallel rank has (section 4.6; Megatron-LM, section 3).

Attention is cut by heads, the MLP by its inner rows, embedding and LM head by the vocabulary;
norms and positions are whole on every rank.  Plain arithmetic on ranges: reading the parts is the
work of `weights.py`, adding up what the ranks compute that of `distributed/`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from minipaged.errors import ConfigurationError
from minipaged.models.config import ModelConfig


class Part(NamedTuple):
    """The rows, or the columns, that a rank keeps of the `total` that a matrix has."""

    total: int
    kept: range

    def scaled(self, factor: int) -> Part:
        """The same where each of them, a head, is `factor` rows."""
        return Part(self.total * factor, range(self.kept.start * factor, self.kept.stop * factor))


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`; rank 0 of 1 has the whole model."""

    rank: int = 0
    size: int = 1

    def part_of(self, total: int) -> Part:
        """One of `size` even parts: they cover all, and differ by one element at most."""
        raise NotImplementedError("Task 18.1: Shard.part_of is still to be written")

    def heads(self, config: ModelConfig) -> Part:
        """The query heads of this rank."""
        raise NotImplementedError("Task 18.1: Shard.heads is still to be written")

    def kv_heads(self, config: ModelConfig) -> Part:
        """The KV heads that they read; where there are fewer than ranks, some ranks share one."""
        raise NotImplementedError("Task 18.1: Shard.kv_heads is still to be written")

    def mlp(self, config: ModelConfig) -> Part:
        """Inner rows of the MLP, of gate and up alike."""
        return self.part_of(config.intermediate_size)

    def vocabulary(self, config: ModelConfig) -> Part:
        """Tokens whose rows of the embedding and of the LM head this rank has."""
        return self.part_of(config.vocab_size)

    def local_config(self, config: ModelConfig) -> ModelConfig:
        """The model with this rank's numbers of heads and MLP rows; the vocabulary stays whole.

        Raises ConfigurationError if the heads cannot be divided among so many ranks.
        """
        possible = possible_sizes(config)
        if self.size not in possible:
            numbers = ", ".join(map(str, possible))
            raise ConfigurationError(
                f"the model's {config.num_heads} query heads and {config.num_kv_heads} key-value "
                f"heads cannot be divided among {self.size} ranks; start as many ranks as one of "
                f"these: {numbers}"
            )
        return dataclasses.replace(
            config,
            num_heads=len(self.heads(config).kept),
            num_kv_heads=len(self.kv_heads(config).kept),
            intermediate_size=len(self.mlp(config).kept),
        )

    def rows(self, config: ModelConfig, parameter: str) -> list[Part] | None:
        """Rows of a parameter, for each of the matrices stacked in it; None is all of it.

        config: of the whole model.
        parameter: its name in the decoder, such as "layers.0.qkv_proj.weight".
        """
        raise NotImplementedError("Task 18.2: Shard.rows is still to be written")

    def columns(self, config: ModelConfig, parameter: str) -> Part | None:
        """Columns of a parameter: the inputs of a layer that takes what the rank computed."""
        raise NotImplementedError("Task 18.2: Shard.columns is still to be written")

    def holds(self, parameter: str) -> bool:
        """Whether this rank has any of it: a bias of what is summed must be in the sum once."""
        raise NotImplementedError("Task 18.2: Shard.holds is still to be written")


WHOLE = Shard()


def possible_sizes(config: ModelConfig) -> list[int]:
    """Numbers of ranks that divide the query heads, and divide or are divided by the KV heads."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    most = min(heads, config.intermediate_size, config.vocab_size)
    return [
        size
        for size in range(1, most + 1)
        if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]
