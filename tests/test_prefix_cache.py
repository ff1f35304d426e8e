"""The prefix cache against the obvious: compare the prompt with every prompt ever seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.memory.block_manager import BlockManager
from minipaged.memory.prefix_cache import PrefixCache

prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=16), max_size=12)


def common_blocks(tokens, others, block_size):
    """Full blocks of the longest prefix that `tokens` has in common with any of the others."""
    longest = 0
    for other in others:
        equal = 0
        while equal < min(len(tokens), len(other)) and tokens[equal] == other[equal]:
            equal += 1
        longest = max(longest, equal)
    return longest // block_size


@given(prompts=prompts, block_size=st.integers(1, 4))
def test_with_room_for_all_every_prefix_is_found(prompts, block_size):
    manager = BlockManager(block_size, 200, prefix_cache=PrefixCache(block_size))
    expected_hits = 0
    for seq, tokens in enumerate(prompts):
        expected = min(
            common_blocks(tokens, prompts[:seq], block_size), (len(tokens) - 1) // block_size
        )
        assert manager.adopt_prefix(seq, tokens) == expected * block_size
        expected_hits += expected * block_size
        manager.append(seq, len(tokens) - expected * block_size)
        manager.mark_computed(seq, tokens)
        manager.free(seq)
        manager.check_integrity()
    cache = manager.prefix_cache
    assert cache.num_hit_tokens == expected_hits
    assert cache.num_queried_tokens == sum(map(len, prompts))
    assert manager.device.num_used == 0
    assert manager.device.num_cached == len(cache)


class Colliding(PrefixCache):
    """Whose hash is nearly worthless."""

    def chain(self, before, tokens):
        return bytes([super().chain(before, tokens)[0] % 3])


@given(prompts=prompts, block_size=st.integers(1, 3), num_blocks=st.integers(16, 20))
def test_a_collision_is_a_miss_and_never_a_wrong_hit(prompts, block_size, num_blocks):
    manager = BlockManager(block_size, num_blocks, prefix_cache=Colliding(block_size, seed=0))
    contents = {}  # block -> the tokens up to its end
    for seq, tokens in enumerate(prompts):
        found = manager.adopt_prefix(seq, tokens)
        for i in range(found // block_size):
            block = manager.tables[seq].blocks[i]
            assert contents[block] == tokens[: (i + 1) * block_size]
        manager.append(seq, len(tokens) - found)
        for i in range(found // block_size, len(tokens) // block_size):
            contents[manager.tables[seq].blocks[i]] = tokens[: (i + 1) * block_size]
        manager.mark_computed(seq, tokens)
        manager.free(seq)
        manager.check_integrity()


def fill(manager, seq, tokens):
    """Compute a sequence and let it end; returns the tokens that were found."""
    found = manager.adopt_prefix(seq, tokens)
    manager.append(seq, len(tokens) - found)
    manager.mark_computed(seq, tokens)
    manager.free(seq)
    return found


@given(
    texts=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=16), st.sampled_from([b"", b"a", b"b"])
        ),
        max_size=12,
    ),
    block_size=st.integers(1, 4),
    num_swapped=st.integers(0, 3),
)
def test_sequences_of_different_salts_share_nothing(texts, block_size, num_swapped):
    """And who finds nothing of others cannot tell by the time it takes what they sent."""
    manager = BlockManager(block_size, 400, 400, prefix_cache=PrefixCache(block_size))
    owners = {}  # block -> the salt it was written for
    for seq, (tokens, salt) in enumerate(texts):
        alone = [text for text, other in texts[:seq] if other == salt]
        num_known = common_blocks(tokens[:-1], alone, block_size)
        found = manager.adopt_prefix(seq, tokens, salt=salt)
        assert found == num_known * block_size, f"of {tokens} with salt {salt}, after {texts[:seq]}"
        manager.append(seq, len(tokens) - found)
        for _ in range(num_swapped):  # on its way it may leave and come back
            manager.swap_out([seq])
            manager.swap_in([seq])
        manager.mark_computed(seq, tokens, salt)
        for block in manager.tables[seq].blocks[: len(tokens) // block_size]:
            assert owners.setdefault(block, salt) == salt, f"block {block} serves two salts"
        if not num_swapped:
            manager.free(seq)
        manager.check_integrity()


def test_the_least_recently_used_prefix_goes_first_from_its_end():
    manager = BlockManager(2, 6, prefix_cache=PrefixCache(2))
    a, b = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]
    fill(manager, 1, a)
    fill(manager, 2, b)
    assert manager.device.num_cached == 6
    fill(manager, 3, [*a, 0])  # a is used again, so b is older now; one block is needed
    # b lost its last block alone; of b the first two are still found.
    assert len(manager.cached_prefix([*b, 0])) == 2
    assert len(manager.cached_prefix([*a, 0])) == 3
    fill(manager, 4, [20, 21, 22, 23, 24])  # three more: two of b, and the last of a
    assert len(manager.cached_prefix([*b, 0])) == 0
    assert len(manager.cached_prefix([*a, 0])) == 3


def test_nothing_is_forgotten_while_blocks_are_free():
    manager = BlockManager(1, 10, prefix_cache=PrefixCache(1))
    fill(manager, 1, [1, 2, 3])
    fill(manager, 2, [4, 5, 6, 7])
    assert manager.prefix_cache.num_evictions == 0
    fill(manager, 3, [8, 9, 10, 11])
    assert manager.prefix_cache.num_evictions == 1


def test_at_least_one_token_is_left_to_compute():
    manager = BlockManager(2, 10, prefix_cache=PrefixCache(2))
    fill(manager, 1, [1, 2, 3, 4])
    assert fill(manager, 2, [1, 2, 3, 4]) == 2
    assert fill(manager, 3, [1, 2, 3, 4, 5]) == 4


def test_each_engine_has_hashes_of_its_own_unless_told():
    tokens = (1, 2)
    assert PrefixCache(2).chain(b"", tokens) != PrefixCache(2).chain(b"", tokens)
    assert PrefixCache(2, 5).chain(b"", tokens) == PrefixCache(2, 5).chain(b"", tokens)
    assert PrefixCache(2, 5).chain(b"", tokens) != PrefixCache(2, 6).chain(b"", tokens)


def test_the_hash_covers_the_prefix():
    cache = PrefixCache(2, 0)
    first = cache.chain(b"", (1, 2))
    assert cache.chain(first, (3, 4)) != cache.chain(b"", (3, 4))
    assert cache.hit_rate == 0
    with pytest.raises(KeyError):
        cache.forget(0)
