"""T1: every paged attention equals contiguous attention, whatever the shapes and the blocks.

All in float64, so that the tolerance leaves no room for a wrong formula.  The cache is full
of NaN but for the slots that a sequence filled, and the tables are padded with an id that
no cache has: a read of anything else fails or shows.
"""

import logging
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.attention import attention_backend, build
from minipaged.attention.batch import PagedBatch
from minipaged.attention.contiguous import contiguous_attention
from minipaged.attention.gathered import GatheredAttention
from minipaged.attention.native import NativeAttention
from minipaged.errors import ConfigurationError
from minipaged.memory.block_table import DROPPED
from minipaged.memory.kv_cache import KVCache, KVCacheShape


@dataclass(frozen=True)
class Case:
    """Sequences as (context, new tokens); the seed fixes numbers and block permutation."""

    block_size: int
    kv_heads: int
    group: int
    head_dim: int
    sequences: tuple[tuple[int, int], ...]
    seed: int
    window: int | None = None

    @property
    def contexts(self):
        return [context for context, _ in self.sequences]

    @property
    def queries(self):
        return [new for _, new in self.sequences]


@st.composite
def sequence_shapes(draw):
    context = draw(st.integers(1, 70))
    return context, draw(st.one_of(st.just(1), st.integers(1, context), st.just(context)))


cases = st.builds(
    Case,
    block_size=st.sampled_from([1, 2, 3, 8, 16, 32]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),  # 1 is MHA; kv_heads 1 is MQA
    head_dim=st.sampled_from([1, 2, 8, 20]),
    sequences=st.lists(sequence_shapes(), min_size=1, max_size=6).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    window=st.one_of(st.none(), st.integers(1, 40), st.integers(1, 5)),
)


def place(case):
    """A batch over randomly permuted blocks, and the keys and values written through it.

    With a sliding window the blocks that no query sees are poisoned and gone from the tables.
    """
    needed = [-(-context // case.block_size) for context in case.contexts]
    num_blocks = sum(needed) + 3
    order = random.Random(case.seed).sample(range(num_blocks), num_blocks)
    tables = [[order.pop() for _ in range(n)] for n in needed]
    shape = KVCacheShape(1, num_blocks, case.block_size, case.kv_heads, case.head_dim)
    cache = KVCache(shape, torch.float64, debug=True)
    whole = PagedBatch.from_lists(case.block_size, case.contexts, case.contexts, tables)
    kv = torch.randn(2, sum(case.contexts), case.kv_heads, case.head_dim, dtype=torch.float64)
    cache.write(0, torch.from_numpy(whole.slots()), *kv)
    if case.window is not None:
        for table, (context, new) in zip(tables, case.sequences, strict=True):
            for logical in range(max(0, context - new - case.window + 1) // case.block_size):
                cache.poison(table[logical])
                table[logical] = DROPPED
        cache.swap_out([])
    batch = PagedBatch.from_lists(case.block_size, case.queries, case.contexts, tables, case.window)
    return batch, cache, kv


# The kernels, which know fewer head sizes, are in test_kernels.py.
ON_THE_CPU = ["reference", "torch", "native"]


@pytest.mark.parametrize("backend", ON_THE_CPU)
@given(case=cases)
def test_paged_equals_contiguous(backend, case):
    torch.manual_seed(case.seed)
    batch, cache, kv = place(case)
    heads = case.kv_heads * case.group
    query = torch.randn(sum(case.queries), heads, case.head_dim, dtype=torch.float64)
    keys, values = (part.split(case.contexts) for part in kv)
    expected = torch.cat(
        [
            contiguous_attention(q, k, v, case.window)
            for q, k, v in zip(query.split(case.queries), keys, values, strict=True)
        ]
    )
    actual = attention_backend(backend)(batch)(query, cache.keys[0], cache.values[0])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@given(case=cases)
def test_the_oracle_against_a_sum_written_out(case):
    """The oracle itself, token by token and head by head, with numpy's exp."""
    rng = np.random.default_rng(case.seed)
    context, new = case.sequences[0]
    context, new = min(context, 12), min(new, 12, context)
    heads = case.kv_heads * case.group
    query = rng.standard_normal((new, heads, case.head_dim))
    key, value = rng.standard_normal((2, context, case.kv_heads, case.head_dim))
    tensors = map(torch.from_numpy, (query, key, value))
    actual = contiguous_attention(*tensors, case.window).numpy()
    for i in range(new):
        for head in range(heads):
            kv_head = head // case.group
            position = context - new + i
            seen = range(max(0, position + 1 - (case.window or context)), position + 1)
            scores = [query[i, head] @ key[j, kv_head] / case.head_dim**0.5 for j in seen]
            weights = np.exp(np.array(scores) - max(scores))
            expected = sum(w * value[j, kv_head] for w, j in zip(weights, seen, strict=True))
            np.testing.assert_allclose(actual[i, head], expected / weights.sum(), rtol=1e-9)


def test_large_scores_do_not_overflow():
    case = Case(4, 1, 1, 8, ((30, 30),), 0)
    torch.manual_seed(0)
    batch, cache, _ = place(case)
    query = 1e5 * torch.randn(30, 1, 8, dtype=torch.float64)
    for backend in ON_THE_CPU:
        out = attention_backend(backend)(batch)(query, cache.keys[0], cache.values[0])
        assert torch.isfinite(out).all(), backend


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_stays_near_the_oracle(dtype, tolerance):
    case = Case(16, 3, 3, 64, ((200, 1), (17, 17), (130, 40), (1, 1)), 5)
    torch.manual_seed(5)
    batch, cache, _ = place(case)
    query = torch.randn(sum(case.queries), 9, 64, dtype=torch.float64)
    expected = attention_backend("reference")(batch)(query, cache.keys[0], cache.values[0])
    for backend in ON_THE_CPU:
        keys, values = cache.keys[0].to(dtype), cache.values[0].to(dtype)
        actual = attention_backend(backend)(batch)(query.to(dtype), keys, values)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@given(case=cases)
def test_positions_and_slots_of_the_new_tokens(case):
    batch, _, _ = place(case)
    positions, slots = [], []
    for (context, new), table in zip(case.sequences, batch.block_tables, strict=True):
        for position in range(context - new, context):
            positions.append(position)
            block, offset = table[position // case.block_size], position % case.block_size
            slots.append(block * case.block_size + offset)
    assert batch.positions().tolist() == positions
    assert batch.slots().tolist() == slots
    assert batch.query_starts.tolist() == np.cumsum([0, *case.queries]).tolist()


def test_an_unknown_attention_names_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"no attention 'flash'.*reference, torch"):
        attention_backend("flash")


def test_native_is_what_it_says_where_there_is_a_compiler():
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    assert isinstance(attention_backend("native"), NativeAttention)


@pytest.mark.parametrize(
    ("name", "value", "what", "remedy"),
    [
        ("CXX", "no-such-compiler", "no C++ compiler 'no-such-compiler'", "install g++"),
        (
            "TORCH_EXTENSIONS_DIR",
            "/dev/null/extensions",
            "cannot be kept in /dev/null/extensions",
            "set TORCH_EXTENSIONS_DIR",
        ),
    ],
)
def test_native_falls_back_with_one_warning(monkeypatch, caplog, name, value, what, remedy):
    monkeypatch.setenv(name, value)
    build.native_attention.cache_clear()
    with caplog.at_level(logging.WARNING, "minipaged"):
        assert isinstance(attention_backend("native"), GatheredAttention)
    (message,) = caplog.messages
    assert what in message
    assert remedy in message


@pytest.mark.slow
def test_what_a_killed_linker_left_is_linked_again(monkeypatch, tmp_path):
    """It writes the library in the end, and all at once as far as its name tells."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build.find_compiler()
    source = tmp_path / "one.cpp"
    source.write_text(
        "#include <pybind11/pybind11.h>\n"
        'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("one", [] { return 1; }); }\n'
    )
    folder = build._build_folder("one", [source], [])
    folder.mkdir()
    (folder / f"{folder.name}.so").touch()
    assert build.load("one", [source], []).one() == 1
    assert build.load("one", [source], []).one() == 1, "and once more, from what was kept"


def test_what_is_made_for_one_processor_is_not_kept_for_another(monkeypatch):
    sources = [build.SOURCES / "native_attention.cpp"]
    here = [build._build_folder("x", sources, flags) for flags in ([], ["-march=native"])]
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    there = [build._build_folder("x", sources, flags) for flags in ([], ["-march=native"])]
    assert here[0] == there[0]
    assert here[1] != there[1]


def test_importing_compiles_nothing():
    code = "import minipaged.attention, sys; print('torch.utils.cpp_extension' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
