"""A packed linear layer is a linear layer."""

import pytest
import torch
from torch import nn

from minipaged.models.linear import PackedLinear, can_pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 33, 500])
@torch.inference_mode()
def test_packed_equals_plain(dtype, bias, rows):
    if not can_pack(dtype):
        pytest.skip(f"this build of torch cannot pack {dtype}")
    torch.manual_seed(rows)
    linear = nn.Linear(48, 80, bias=bias, dtype=dtype)
    x = torch.randn(rows, 48, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_stay_plain(dtype):
    assert not can_pack(dtype)


def test_without_onednn_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    can_pack.cache_clear()
    assert not can_pack(torch.float32)
    can_pack.cache_clear()
