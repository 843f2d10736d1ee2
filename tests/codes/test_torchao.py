"""read_codes of torchao's tensors: the values that torchao makes of them, over the same codes."""

import pytest
import torch
from torch import nn

from peft_kernels.codes.layers import is_in_codes, read_codes
from peft_kernels.ops import dequantize, quantize
from peft_kernels.ops.lora_linear import linear_of_codes

quantization = pytest.importorskip("torchao.quantization")
from torchao.quantization import granularity, quant_api  # noqa: E402

N, K = 384, 256
ASYMMETRIC = quantization.MappingType.ASYMMETRIC
BY_32 = quantization.PerGroup(32)
CONFIGS = {
    "int8 by row": quantization.Int8WeightOnlyConfig(),
    "int8 by group": quantization.Int8WeightOnlyConfig(granularity=BY_32),
    "int8 of all": quantization.Int8WeightOnlyConfig(granularity=quantization.PerTensor()),
    "int4": quantization.IntxWeightOnlyConfig(torch.int4, BY_32),
    "int4 with zeros": quantization.IntxWeightOnlyConfig(torch.int4, BY_32, ASYMMETRIC),
    "int3 by row": quantization.IntxWeightOnlyConfig(torch.int3, mapping_type=ASYMMETRIC),
    "float8": quant_api.Float8WeightOnlyConfig(),
}
SHARES = {
    "tensor": quantization.PerTensor(),
    "row": quantization.PerRow(),
    "block": granularity.PerBlock([128, 128]),
}


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(K, N).to(dtype)


def in_codes(config, dtype=torch.float32):
    layer = linear(dtype)
    quantization.quantize_(layer, config)
    return layer


def in_nf4(dtype=torch.float32, block=64):
    layer = linear(dtype)
    weight = quantization.to_nf4(layer.weight.detach(), block, N * K // block // 3)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_affine(name, dtype):
    layer = in_codes(CONFIGS[name], dtype)
    found = read_codes(layer)
    assert is_in_codes(layer) and found.codes is layer.weight.qdata
    assert found.scales is layer.weight.scale or found.shifts is not None
    # Zeros are taken off before the product there and after it here.
    rtol = 0 if found.shifts is None else torch.finfo(dtype).eps
    atol = 0 if found.shifts is None else 1e-7
    expected = layer.weight.dequantize()
    torch.testing.assert_close(dequantize(found, dtype), expected, rtol=rtol, atol=atol)


def test_zeros_are_shifts():
    assert read_codes(in_codes(CONFIGS["int4 with zeros"])).shifts is not None
    assert read_codes(in_codes(CONFIGS["int4"])).shifts is None


@pytest.mark.parametrize("block", [32, 64])
def test_nf4(block):
    layer = in_nf4(block=block)
    found = read_codes(layer)
    assert found.codes is layer.weight.quantized_data and found.nested is not None
    assert found.scales.data_ptr() == layer.weight.quantized_scalers.data_ptr()
    expected = layer.weight.get_original_weight()
    torch.testing.assert_close(dequantize(found), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nf4_of_halves_is_rounded_as_there(dtype):
    layer = in_nf4(dtype)
    expected = layer.weight.get_original_weight()
    assert torch.equal(dequantize(read_codes(layer), dtype), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nf4_whose_dtype_alone_was_changed(dtype):
    """float() leaves the tensors that scales are made of as they were."""
    layer = in_nf4(dtype).float()
    found, expected = read_codes(layer), layer.weight.get_original_weight()
    torch.testing.assert_close(dequantize(found), expected, rtol=1e-6, atol=0)
    x = torch.randn(3, K)
    torch.testing.assert_close(linear_of_codes(x, found), x @ expected.T)


def test_what_is_not_read_says_why():
    dynamic = quantization.Int8DynamicActivationInt8WeightConfig()
    assert read_codes(in_codes(dynamic)) == "x in codes as well"
    layer = in_codes(CONFIGS["int8 by row"])
    layer.weight.act_pre_scale = torch.ones(K)
    assert read_codes(layer) == "x scaled by column"
    layer = in_codes(CONFIGS["int8 by row"])
    layer.weight.qdata = layer.weight.qdata.t().contiguous().t()
    assert "one after another" in read_codes(layer)


def test_other_weights_are_nones():
    assert not is_in_codes(linear()) and read_codes(linear()) is None


@pytest.mark.parametrize("by", SHARES)
def test_float8_by_any_share_is_our_fp8(by):
    plain = linear().weight.detach()
    layer = linear()
    theirs = quantization.Float8Tensor.from_hp(plain, granularity=SHARES[by])
    layer.weight = nn.Parameter(theirs, requires_grad=False)
    assert torch.equal(dequantize(read_codes(layer)), theirs.dequantize())
    found = quantize(plain, "fp8", by=by)
    assert torch.equal(found.codes.view(torch.uint8), theirs.qdata.view(torch.uint8))
    assert torch.equal(found.scales, theirs.scale.flatten())
