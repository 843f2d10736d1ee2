"""read_codes of HQQLinear: what hqq makes of it, bit by bit, over the same codes."""

import pytest
import torch
from torch import nn

from peft_kernels.codes.layers import is_in_codes, read_codes
from peft_kernels.ops import dequantize

hqq = pytest.importorskip("hqq.core.quantize")


def in_codes(bits=4, axis=1, dtype=torch.float32, group=64, **options):
    torch.manual_seed(0)
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, **options)
    return hqq.HQQLinear(nn.Linear(128, 96), config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2, 1])
def test_bit_by_bit(bits, axis, dtype):
    layer = in_codes(bits, axis, dtype)
    found = read_codes(layer)
    assert is_in_codes(layer) and found.codes.data_ptr() == layer.W_q.data_ptr()
    assert found.scales is layer.meta["scale"] and found.shifts is layer.meta["zero"]
    assert torch.equal(dequantize(found, dtype), layer.dequantize())


@pytest.mark.parametrize("options", [{"group": None}, {"view_as_float": True}], ids=str)
def test_one_group_a_row_and_codes_seen_as_floats(options):
    layer = in_codes(**options)
    assert torch.equal(dequantize(read_codes(layer)), layer.dequantize())


def test_what_is_not_read_says_why():
    layer = in_codes()
    layer.meta["zero_scale"] = torch.stack((layer.meta.pop("zero"), layer.meta.pop("scale")))
    assert "kept elsewhere" in read_codes(layer)
    layer.meta = None
    assert "isn't in codes yet" in read_codes(layer)
