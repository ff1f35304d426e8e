"""Lesson 13: kernels whose threads work together equal contiguous attention (T8)."""

import ctypes

import numpy as np
import pytest
import quick_kernels
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st
from lesson_kernels import Emulator, check_decoding, compiled, fail_as_reported
from test_attention import Case

from minipaged.course.narration import story

HEAD_SIZES = (6, 16)  # rows of 3 and of 8 chunks: with an idle lane, and without
WARP = 32


KERNELS = Emulator(*HEAD_SIZES, versions=("step2", "step3", "step5"))


@st.composite
def decoding_cases(draw, most=60):
    contexts = draw(st.lists(st.integers(1, most), min_size=1, max_size=2))
    return Case(
        block_size=draw(st.sampled_from([1, 2, 3, 4, 16])),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from(HEAD_SIZES)),
        sequences=tuple((context, 1) for context in contexts),
        seed=draw(st.integers(0, 2**16)),
    )


large_scores = st.sampled_from([1.0, 1.0, 300.0, -1.0])


@pytest.mark.task("13.1")
@given(case=decoding_cases(), larger=large_scores)
@at_most(30)
def test_step2_equals_contiguous_attention(case, larger):
    check_decoding(KERNELS, case, "step2", larger)


@pytest.mark.task("13.1")
@given(case=decoding_cases(most=300))
@at_most(10)
def test_step2_with_more_tokens_than_threads(case):
    check_decoding(KERNELS, case, "step2")


PROBE = r"""
#include "numbers.cuh"

__global__ void probe(Global<const double> in, Global<double> out, int low, int high, bool sum) {
    const double value = in[threadIdx.x];
    out[threadIdx.x] =
        sum ? sum_over_lanes(value, low, high) : largest_of_lanes(value, low, high);
}

extern "C" __attribute__((visibility("default"))) const char* run(double* in, double* out,
                                                                  int low, int high, bool sum) {
    static std::string error;
    error.clear();
    try {
        LAUNCH(probe, 1, 64, 0, 0, global_array<const double>(in, 64, "in"),
               global_array<double>(out, 64, "out"), low, high, sum);
    } catch (const std::exception& report) {
        error = report.what();
    }
    return error.c_str();
}
"""


def probe(sources):
    """A kernel of two warps that calls one of the two functions, and nothing else."""
    source, library = sources / "probe.cpp", sources / "probe.so"
    source.write_text(PROBE)
    headers = quick_kernels.headers()
    quick_kernels.compile_cpp("-shared", "-include", headers, source, "-o", library)
    function = ctypes.CDLL(str(library)).run
    array = np.ctypeslib.ndpointer(np.float64)
    function.argtypes = [array, array, ctypes.c_int, ctypes.c_int, ctypes.c_bool]
    function.restype = ctypes.c_char_p
    return function


powers = st.integers(0, 5).map(lambda bits: 2**bits)


@pytest.mark.task("13.2")
@pytest.mark.parametrize("fold", ["sum_over_lanes", "largest_of_lanes"])
@given(
    values=st.lists(st.integers(-9, 9), min_size=2 * WARP, max_size=2 * WARP),
    bounds=st.tuples(powers, powers).map(sorted),
)
@at_most(60)
def test_lanes_are_folded(fold, values, bounds):
    low, high = bounds
    story.begin()
    story.tell(f"warp 0: value = {values[:WARP]}")
    story.tell(f"warp 1: value = {values[WARP:]}")
    story.tell(f"{fold}(value, {low}, {high})")
    given_values, got = np.array(values, dtype=float), np.full(2 * WARP, np.nan)
    report = compiled(probe)(given_values, got, low, high, fold == "sum_over_lanes")
    if report:
        fail_as_reported(report.decode())
    # The bits of a lane's number from `low` up to below `high`.
    bits = high - low
    for thread in range(2 * WARP):
        others = [i for i in range(2 * WARP) if (i ^ thread) & ~bits == 0]
        parts = given_values[others]
        wanted = parts.sum() if fold == "sum_over_lanes" else parts.max()
        if got[thread] != wanted:
            lanes = [i % WARP for i in others]
            raise AssertionError(
                f"lane {thread % WARP} of warp {thread // WARP} has {got[thread]:g}; it must have "
                f"{wanted:g}, the {fold.partition('_')[0]} of lanes {lanes}"
            )


@pytest.mark.task("13.3")
@given(case=decoding_cases(), larger=large_scores)
@at_most(30)
def test_step3_equals_contiguous_attention(case, larger):
    check_decoding(KERNELS, case, "step3", larger)


@pytest.mark.task("13.4")
@given(case=decoding_cases(), larger=large_scores)
@at_most(30)
def test_step5_equals_contiguous_attention(case, larger):
    check_decoding(KERNELS, case, "step5", larger)
