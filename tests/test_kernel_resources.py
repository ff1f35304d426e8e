"""Every kernel is compiled for real GPUs where nvcc is installed, and its costs are read off."""

import shutil

import pytest
import torch

from minipaged.errors import ConfigurationError
from minipaged.evaluation.kernel_resources import kernel_resources, parse_ptxas

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z11step1_naiveIfEv9AttentionIT_S1_E' for 'sm_80'
ptxas info    : Function properties for _Z11step1_naiveIfEv9AttentionIT_S1_E
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 520 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4wideILi128EEvPf' for 'sm_90'
ptxas info    : Function properties for _Z4wideILi128EEvPf
    40 bytes stack frame, 64 bytes spill stores, 80 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 520 bytes cmem[0]
"""


def test_the_report_is_read():
    naive, wide = parse_ptxas(REPORT)
    assert (naive.architecture, naive.registers) == ("sm_80", 40)
    assert (naive.shared_bytes, naive.spill_bytes) == (0, 0)
    assert (wide.architecture, wide.registers) == ("sm_90", 255)
    assert (wide.shared_bytes, wide.spill_bytes) == (1024, 64)
    if shutil.which("c++filt"):
        assert (naive.kernel, wide.kernel) == ("step1_naive<float>", "wide<128>")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_sizes", "architectures", "float8_cache"),
    [
        (torch.bfloat16, (128,), ["sm_80"], False),
        (torch.bfloat16, (128,), ["sm_90"], True),
        (torch.float16, (128,), ["sm_80", "sm_90"], False),
        (torch.float32, (128,), ["sm_80", "sm_90"], False),
        (torch.bfloat16, (64, 80, 96, 256), ["sm_80"], False),  # which has less shared memory
    ],
    ids=str,
)
def test_every_kernel_compiles_without_a_warning(dtype, head_sizes, architectures, float8_cache):
    resources = kernel_resources(dtype, head_sizes, float8_cache, architectures)
    for architecture in architectures:
        found = {r.kernel: r for r in resources if r.architecture == architecture}
        for name in ("step1_naive", "step5_online", "paged_attention_v1", "paged_attention_v2"):
            assert any(kernel.startswith(name) for kernel in found), name
        eight_bits = {kernel for kernel in found if "fp8_e4m3" in kernel}
        assert any("paged_attention_v1" in kernel for kernel in eight_bits) == float8_cache
        # A word or two of 255 registers is nothing; an array that spills is.  Attention that
        # converts 8 bits needs a few words more.
        spilling = {
            kernel: r.spill_bytes
            for kernel, r in found.items()
            if r.spill_bytes > (32 if kernel in eight_bits else 16)
        }
        assert not spilling, f"on {architecture} these need more registers than there are"
        assert all(0 < r.registers <= 255 for r in found.values())


def test_no_nvcc(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"no nvcc .*cuda-toolkit"):
        kernel_resources(torch.bfloat16, [128])
