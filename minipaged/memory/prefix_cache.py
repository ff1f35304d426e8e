"""Full blocks found again by the tokens in them and in front of them (section 4.4, and beyond).

Keys and values of a token depend on every token before it, so a block can be used again only
where its whole prefix is the same.  Owns that knowledge: which block holds which prefix.  How
long a block that nobody holds is kept is the allocator's business; it tells this file when
one is given away.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

from minipaged.errors import ConfigurationError
from minipaged.memory.block_allocator import BlockId

PrefixHash = bytes
Tokens = tuple[int, ...]


class Entry(NamedTuple):
    """A block that is known: its tokens, and the block of the tokens before them."""

    block: BlockId
    parent: BlockId | None
    tokens: Tokens


class PrefixCache:
    """From the hash of a whole prefix to the block with its last tokens.

    The hash of a block covers the hash of the block before it, so that one look-up compares
    the whole prefix.  It only says where to look: tokens and parent are compared too, so that
    a collision is a miss and never a wrong hit.

    seed: of the hash; None draws one, so that nobody can know hashes before, and prepare
        prompts that collide.
    """

    def __init__(self, block_size: int, seed: int | None = None) -> None:
        if seed is not None and not 0 <= seed < 2**128:
            raise ConfigurationError(
                f"prefix_cache_seed is {seed}; it must be a whole number from 0 to 2**128 - 1, "
                "or None to draw a secret one"
            )
        self.block_size = block_size
        self._key = secrets.token_bytes(16) if seed is None else seed.to_bytes(16, "little")
        self._entries: dict[PrefixHash, Entry] = {}
        self._hashes: dict[BlockId, PrefixHash] = {}
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def hit_rate(self) -> float:
        """Share of the tokens asked for that were found, 0 to 1."""
        return self.num_hit_tokens / max(1, self.num_queried_tokens)

    def chain(self, before: PrefixHash, tokens: Tokens) -> PrefixHash:
        """Hash of a block's tokens behind a prefix; the hash of the empty prefix is the salt."""
        digest = hashlib.blake2b(before, digest_size=16, key=self._key)
        digest.update(array("q", tokens).tobytes())
        return digest.digest()

    def look_up(self, prefix: PrefixHash, parent: BlockId | None, tokens: Tokens) -> BlockId | None:
        """The block with these tokens behind that parent; None if there is none."""
        entry = self._entries.get(prefix)
        if entry is None or entry.parent != parent or entry.tokens != tokens:
            return None
        return entry.block

    def find(
        self, token_ids: Sequence[int], most_blocks: int, salt: PrefixHash = b""
    ) -> list[BlockId]:
        """The longest known prefix of these tokens, in full blocks, at most `most_blocks`.

        salt: what the first block is chained to; sequences of different salts share nothing.
        """
        blocks: list[BlockId] = []
        prefix = salt
        for start in range(0, most_blocks * self.block_size, self.block_size):
            tokens = tuple(token_ids[start : start + self.block_size])
            prefix = self.chain(prefix, tokens)
            block = self.look_up(prefix, blocks[-1] if blocks else None, tokens)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(
        self, prefix: PrefixHash, parent: BlockId | None, tokens: Tokens, block: BlockId
    ) -> bool:
        """Make a full block known; False, and nothing changed, if the hash is taken already."""
        if prefix in self._entries:
            return False
        self._entries[prefix] = Entry(block, parent, tokens)
        self._hashes[block] = prefix
        return True

    def forget(self, block: BlockId) -> None:
        """The block is given away and will have other contents."""
        del self._entries[self._hashes.pop(block)]
        self.num_evictions += 1

    def check_integrity(self, is_remembered: Callable[[BlockId], bool]) -> None:
        """Assert that every entry can be reached: its parent is known, its block remembered."""
        known = {entry.block for entry in self._entries.values()}
        assert known == self._hashes.keys(), f"blocks known twice: {self._entries}"
        for entry in self._entries.values():
            assert len(entry.tokens) == self.block_size, f"a block that is not full: {entry}"
            assert entry.parent is None or entry.parent in known, f"no way leads to {entry}"
            assert is_remembered(entry.block), f"{entry} may be overwritten"
