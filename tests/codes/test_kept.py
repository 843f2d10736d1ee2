"""A weight in a module's buffers: the same tensors, and what they are beside them."""

import torch
from torch import nn

from peft_kernels.codes.kept import as_tensor, keep_weight, kept_weight, of_tensor
from peft_kernels.codes.layers import is_in_codes, read_codes
from peft_kernels.nn import QuantizedLinear
from peft_kernels.ops import QuantizedWeight, dequantize, quantize


def test_the_tensors_are_the_weights_own():
    weight, module = quantize(torch.randn(16, 64)), nn.Module()
    keep_weight(module, weight)
    found = kept_weight(module)
    assert torch.equal(dequantize(found), dequantize(weight))
    assert found.codes.data_ptr() == weight.codes.data_ptr()
    assert found.scales.data_ptr() == weight.scales.data_ptr()
    tensors = [*module.parameters(), *module.buffers()]
    assert not any(one.is_floating_point() or one.shape == weight.shape for one in tensors)
    assert of_tensor(as_tensor(module.coded)) == module.coded


def test_our_own_layer_is_read():
    codes = torch.randn(8, 32).to(torch.float8_e4m3fn)
    weight = QuantizedWeight(codes, torch.rand(2, 1), (8, 32), 32, block_rows=4)
    layer = QuantizedLinear(weight)
    assert is_in_codes(layer)
    assert torch.equal(dequantize(read_codes(layer)), dequantize(weight))
