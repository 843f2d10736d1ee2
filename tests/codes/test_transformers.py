"""read_codes of transformers' FP8Linear: each element times the scale of its block."""

import pytest
import torch
from torch import nn

from peft_kernels.codes.layers import is_in_codes, read_codes
from peft_kernels.ops import dequantize, quantize

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")


def in_codes(n, k, block):
    """By our own quantize, whose codes and scales lie as there."""
    torch.manual_seed(0)
    layer = fp8.FP8Linear(k, n, block_size=block)
    found = quantize(torch.randn(n, k), "fp8", by="block")
    layer.weight.data = found.codes
    layer.weight_scale_inv.data = found.scales.view(layer.weight_scale_inv.shape)
    return layer


@pytest.mark.parametrize(("n", "k"), [(256, 384), (200, 130), (5, 7)])
def test_blocks(n, k):
    layer = in_codes(n, k, (128, 128))
    found = read_codes(layer)
    assert is_in_codes(layer) and found.codes.data_ptr() == layer.weight.data_ptr()
    assert found.scales.data_ptr() == layer.weight_scale_inv.data_ptr()
    expected, scales = layer.weight.detach().float(), layer.weight_scale_inv.detach()
    for i in range(n):
        for j in range(k):
            expected[i, j] *= scales[i // 128, j // 128]
    assert torch.equal(dequantize(found), expected)


def test_one_scale_and_powers_of_two():
    layer = in_codes(128, 128, (128, 128))
    layer.block_size = None
    layer.weight_scale_inv.data = torch.tensor(0.25)
    expected = layer.weight.detach().float() / 4
    assert torch.equal(dequantize(read_codes(layer)), expected)
    layer.weight_scale_inv = nn.Parameter(torch.tensor(0.25).to(torch.float8_e8m0fnu), False)
    assert torch.equal(dequantize(read_codes(layer)), expected)


def test_weights_that_are_not_in_codes_say_so():
    layer = in_codes(128, 128, (128, 128))
    layer.weight = nn.Parameter(torch.zeros(128, 128))
    assert "isn't in codes yet" in read_codes(layer)
