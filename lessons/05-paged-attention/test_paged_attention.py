"""Lesson 5: where the tokens of a step are, and attention over blocks (T1), in float64."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st

from minipaged.attention import paged
from minipaged.attention.batch import PagedBatch
from minipaged.attention.contiguous import contiguous_attention
from minipaged.course.narration import story
from minipaged.memory.kv_cache import KVCache, KVCacheShape, TorchCacheOperations

sizes = st.sampled_from([4, 2, 3, 1])
NOWHERE = PagedBatch.PADDING  # stands in a table where there is no block


@dataclass(frozen=True)
class Step:
    """The sequences of a step: tokens in the cache before it and new ones, and their tables."""

    block_size: int
    sequences: tuple[tuple[int, int], ...]
    tables: tuple[tuple[int, ...], ...]

    @property
    def new(self):
        return [new for _, new in self.sequences]

    @property
    def contexts(self):
        return [old + new for old, new in self.sequences]

    def rows(self):
        """(sequence, position) of every new token."""
        return [
            (seq, position)
            for seq, (old, new) in enumerate(self.sequences)
            for position in range(old, old + new)
        ]

    def batch(self):
        """The batch of it, and a story that begins with it."""
        story.begin("block size, new tokens, contexts, block tables")
        tables = [list(table) for table in self.tables]
        arguments = (self.block_size, self.new, self.contexts, tables)
        story.tell(f"batch = PagedBatch.from_lists{arguments}")
        return PagedBatch.from_lists(*arguments)


@st.composite
def steps(draw):
    block_size = draw(sizes)
    sequences = draw(
        st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=3)
    )
    needed = [-(-(old + new) // block_size) for old, new in sequences]
    blocks = draw(st.permutations(range(sum(needed) + 2)))
    tables = [tuple(blocks.pop() for _ in range(n)) for n in needed]
    return Step(block_size, tuple(sequences), tuple(tables))


def numbers(array, what, length):
    """What a learner's function gave, as a list; it must be an array of whole numbers."""
    story.tell(f"batch.{what}", f"{array}".replace("\n", ""))
    assert isinstance(array, np.ndarray), f"{what} gives an array of numpy, not {type(array)}"
    assert np.issubdtype(array.dtype, np.integer), f"{what} has whole numbers, not {array.dtype}"
    assert array.shape == (length,), f"{what} has {length} numbers, but its shape is {array.shape}"
    return array.tolist()


@pytest.mark.task("5.1")
@given(step=steps())
def test_a_sequence_begins_where_those_before_it_end(step):
    batch = step.batch()
    starts = numbers(batch.query_starts, "query_starts", len(step.sequences) + 1)
    for seq in range(len(step.sequences)):
        before = sum(step.new[:seq])
        assert starts[seq] == before, (
            f"the sequences before sequence {seq} have {before} new tokens together, "
            f"so that its first row is {before}, not {starts[seq]}"
        )
    assert starts[-1] == sum(step.new), f"there are {sum(step.new)} rows in all"


@pytest.mark.task("5.1")
@given(step=steps())
def test_the_new_tokens_are_the_last_of_their_sequence(step):
    batch = step.batch()
    rows = step.rows()
    positions = numbers(batch.positions(), "positions()", len(rows))
    for row, (seq, position) in enumerate(rows):
        old, new = step.sequences[seq]
        assert positions[row] == position, (
            f"row {row} is a new token of sequence {seq}, whose {new} new tokens come behind {old} "
            f"others: its position is {position}, not {positions[row]}"
        )


@pytest.mark.task("5.2")
@given(step=steps())
def test_every_new_token_has_the_slot_that_its_table_says(step):
    batch = step.batch()
    rows = step.rows()
    slots = numbers(batch.slots(), "slots()", len(rows))
    for row, (seq, position) in enumerate(rows):
        logical, offset = position // step.block_size, position % step.block_size
        block = step.tables[seq][logical]
        slot = block * step.block_size + offset
        assert slots[row] == slot, (
            f"row {row} is token {position} of sequence {seq}: logical block {logical}, offset "
            f"{offset}; that block lies in physical block {block}, so the slot is {slot}, "
            f"not {slots[row]}"
        )


@pytest.mark.task("5.2")
@given(blocks=st.lists(st.integers(2**27, 2**31 - 2), min_size=1, max_size=3, unique=True))
def test_the_slots_of_a_large_cache_are_large(blocks):
    step = Step(16, tuple((15, 1) for _ in blocks), tuple((block,) for block in blocks))
    slots = numbers(step.batch().slots(), "slots()", len(blocks))
    for slot, block in zip(slots, blocks, strict=True):
        assert slot == 16 * block + 15, (
            f"the last slot of block {block} is 16 * {block} + 15 = {16 * block + 15}, not {slot}; "
            "32 bits end at 2147483647"
        )


@st.composite
def writes(draw):
    """Block size, number of blocks, and the slots of two steps."""
    block_size, num_blocks = draw(sizes), draw(st.integers(1, 3))
    slots = draw(st.permutations(range(block_size * num_blocks)))
    first, second = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    return block_size, num_blocks, slots[:first], slots[first : first + second]


@pytest.mark.task("5.3")
@given(case=writes())
def test_a_token_lands_in_its_slot_and_nowhere_else(case):
    block_size, num_blocks, *slots_of_steps = case
    story.begin("blocks, block size, KV heads, head size; nothing is written yet")
    shape = (num_blocks, block_size, 2, 3)
    story.tell(f"keys = torch.full({shape}, nan); values = keys.clone()")
    keys = torch.full(shape, torch.nan, dtype=torch.float64)
    values = keys.clone()
    expected = {}  # slot -> number of the token that is in it
    for slots in filter(None, slots_of_steps):
        tokens = [10 * (len(expected) + i + 1) for i in range(len(slots))]
        expected |= dict(zip(slots, tokens, strict=True))
        key = torch.tensor(tokens, dtype=torch.float64).view(-1, 1, 1) + torch.arange(6).view(2, 3)
        story.start_call(f"write(keys, values, {slots}, key, value)")
        TorchCacheOperations().write(keys, values, torch.tensor(slots), key, -key)
        story.end_call("", f"the first numbers of the rows of key are {tokens}")
    for name, cache, sign in (("keys", keys, 1), ("values", values, -1)):
        for slot in range(num_blocks * block_size):
            block, offset = divmod(slot, block_size)
            there = cache[block, offset]
            where = f"{name}[{block}, {offset}], which is slot {slot},"
            if slot not in expected:
                check(there.isnan().all(), f"{where} belongs to nobody, and was written")
                continue
            token = sign * (expected[slot] + torch.arange(6).view(2, 3)).double()
            check(not there.isnan().all(), f"{where} should have been written, and was not")
            check(
                torch.equal(there, token),
                f"{where} should be {token.tolist()}, but is {there.tolist()}",
            )


@pytest.mark.task("5.3")
def test_the_other_layers_are_left_alone():
    cache = KVCache(KVCacheShape(3, 2, 4, 1, 2), torch.float64, debug=True)
    key, value = torch.randn(2, 3, 1, 2, dtype=torch.float64)
    cache.write(1, torch.tensor([6, 0, 3]), key, value)
    written = [int(layer.isfinite().sum()) for layer in (*cache.keys, *cache.values)]
    assert written == [0, 6, 0, 0, 6, 0], "three tokens of two numbers each, in layer 1 alone"


@dataclass(frozen=True)
class Case:
    """One token that looks at the first `end` tokens of its sequence.

    later: tokens behind those, which are in the cache and must not be seen.
    scale: of the query, and so of the scores.
    """

    block_size: int
    kv_heads: int
    group: int
    head_dim: int
    end: int
    later: int
    seed: int
    scale: float = 1.0

    def check(self):
        """Compare the attention over blocks with that over one piece."""
        generator = torch.Generator().manual_seed(self.seed)

        def small_numbers(*shape):
            return torch.randint(-4, 5, shape, generator=generator).double()

        context = self.end + self.later
        heads = self.kv_heads * self.group
        query = (small_numbers(heads, self.head_dim) + 0.5) / 4 * self.scale
        key, value = small_numbers(2, context, self.kv_heads, self.head_dim)
        if self.scale < 0:
            query, key = -query.abs(), key.abs() + 1  # every score is far below zero
        keys, values, table = self.place(key, value)
        expected = contiguous_attention(query[None], key[: self.end], value[: self.end])[0]
        self.tell(query, key, value, table)
        call = f"attend_over_blocks(query, keys, values, {table}, 0, {self.end})"
        story.start_call(call)
        actual = paged.attend_over_blocks(query, keys, values, table, 0, self.end)
        story.end_call("", "")
        agree(actual, expected, self.group)

    def place(self, key, value):
        """Key and value cache, full of NaN but for these tokens, and the table."""
        size = self.block_size
        needed = -(-len(key) // size)
        blocks = random.Random(self.seed).sample(range(needed + 2), needed)
        cache = torch.full((2, needed + 2, size, *key.shape[1:]), torch.nan).double()
        for position in range(len(key)):
            block = blocks[position // size]
            cache[0, block, position % size] = key[position]
            cache[1, block, position % size] = value[position]
        return *cache, [*blocks, NOWHERE]

    def tell(self, query, key, value, table):
        """The case, with the numbers of its first head if there are few."""
        story.begin(
            f"query heads: {len(query)}, KV heads: {self.kv_heads}, head size: {self.head_dim}, "
            f"tokens: {self.end}, in blocks of {self.block_size}"
        )
        if self.later:
            story.tell(f"# {self.later} later tokens are in the cache and must not be seen")
        if self.head_dim == 1:
            scores = (key[: self.end, 0] @ query[0]).tolist()
            blocks = [scores[i : i + self.block_size] for i in range(0, self.end, self.block_size)]
            story.tell(f"# scores of query head 0, by blocks: {blocks}")
            story.tell(f"# values of KV head 0: {value[: self.end, 0, 0].tolist()}")


def agree(actual, expected, group):
    """The attention of one token is that of the contiguous oracle."""
    check(
        actual.shape == expected.shape,
        f"the query has the shape {tuple(expected.shape)} and so has the result, "
        f"not {tuple(actual.shape)}",
    )
    check(
        actual.isfinite().all(),
        "the result is not finite. Slots that nobody wrote contain NaN here, and 0 times NaN is "
        "NaN; so are 0 / 0, inf / inf and inf - inf",
    )
    for head, (got, want) in enumerate(zip(actual, expected, strict=True)):
        check(
            torch.allclose(got.double(), want, rtol=1e-9, atol=1e-11),
            f"query head {head}, which reads KV head {head // group}, should get "
            f"{short(want)}; it gets {short(got)}, off by {(got.double() - want).abs().max():.1g}",
        )


def check(holds, message):
    """An assertion of which the message alone is shown: the tensors in it would bury that."""
    if not holds:
        raise AssertionError(message)


def short(numbers):
    return "[" + ", ".join(f"{x:.6g}" for x in numbers.tolist()) + "]"


shapes = {
    "block_size": st.sampled_from([2, 4, 3, 1, 8]),
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 3),  # 1 is MHA; kv_heads 1 is MQA
    "head_dim": st.integers(1, 4),
    "later": st.integers(0, 5),
    "seed": st.integers(0, 9),
}


@pytest.mark.task("5.4")
@given(
    case=st.builds(Case, **{**shapes, "block_size": st.just(8)}, end=st.integers(1, 8)),
)
def test_one_block_is_ordinary_attention(case):
    case.check()


@pytest.mark.task("5.4")
@given(case=st.builds(Case, **shapes, end=st.integers(1, 20)))
def test_many_blocks_equal_one_piece(case):
    case.check()


@pytest.mark.task("5.4")
@given(
    case=st.builds(
        Case, **shapes, end=st.integers(1, 12), scale=st.sampled_from([30.0, -30.0, 1e5, -1e5])
    )
)
def test_scores_may_have_any_size(case):
    case.check()


@pytest.mark.task("5.4")
@at_most(40)
@given(step=steps(), seed=st.integers(0, 9))
def test_a_whole_step_equals_contiguous_attention(step, seed):
    """Prompts, parts of prompts and single tokens, written and read through the tables."""
    torch.manual_seed(seed)
    batch = step.batch()
    shape = KVCacheShape(1, max(map(max, step.tables)) + 1, step.block_size, 2, 3)
    cache = KVCache(shape, torch.float64, debug=True)
    kv = torch.randn(2, sum(step.contexts), 2, 3, dtype=torch.float64)
    everything = Step(step.block_size, tuple((0, n) for n in step.contexts), step.tables)
    cache.write(0, torch.from_numpy(everything.batch().slots()), *kv)
    step.batch()
    query = torch.randn(sum(step.new), 4, 3, dtype=torch.float64)
    story.start_call("prepare(batch)(query, keys, values)")
    actual = paged.prepare(batch)(query, cache.keys[0], cache.values[0])
    story.end_call("", "2 KV heads, 4 query heads")
    keys, values = (part.split(step.contexts) for part in kv)
    for seq, part in enumerate(query.split(step.new)):
        expected = contiguous_attention(part, keys[seq], values[seq])
        first = sum(step.new[:seq])
        for row, want in enumerate(expected, start=first):
            agree(actual[row], want, 2)
