"""read_codes: the library's own tensors, and the values that the library makes of them."""

import pytest
import torch
from torch import nn

from peft_kernels.codes.layers import is_in_codes, read_codes
from peft_kernels.ops import dequantize
from peft_kernels.ops.lora_linear import linear_of_codes

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_four_bits(nested, storage):
    layer = bitsandbytes.nn.Linear4bit(
        64, 32, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    assert is_in_codes(layer) and "isn't in codes yet" in read_codes(layer)
    layer = layer.to("cpu")
    found = read_codes(layer)
    assert found.codes.data_ptr() == layer.weight.data_ptr()
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantize(found), expected)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    for kind in ("nf4", "fp4"):  # bitsandbytes keeps its bounds in the dtype of who comes first
        bitsandbytes.functional.quantize_4bit(torch.ones(64), quant_type=kind)
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_under_another_default_dtype(default_dtype, kind):
    """In which the library makes the book and, loading, the offset, but doesn't compute."""
    layer = bitsandbytes.nn.Linear4bit(64, 32, compress_statistics=True, quant_type=kind).to("cpu")
    loaded = bitsandbytes.nn.Linear4bit(64, 32)
    state = {key: value for key, value in layer.state_dict().items() if key != "bias"}
    codes = state.pop("weight")
    state = {key.removeprefix("weight."): value for key, value in state.items()}
    loaded.weight = bitsandbytes.nn.Params4bit.from_prequantized(codes, state, device="cpu")
    assert loaded.weight.quant_state.offset.dtype is not torch.float32
    x = torch.randn(2, 64, dtype=torch.float32)
    for one in (layer, loaded):
        found, kept = read_codes(one), one.weight.quant_state
        expected = bitsandbytes.functional.dequantize_4bit(one.weight.data, kept).float()
        torch.testing.assert_close(dequantize(found, kept.dtype).float(), expected)
        y = linear_of_codes(x, found)
        torch.testing.assert_close(y, x @ dequantize(found).T)


@pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="bitsandbytes packs no codes here"
)
@pytest.mark.parametrize("nested", [True, False])
def test_codes_that_a_state_dict_has_unpacked(nested):
    """Of which bitsandbytes leaves scales that weren't nested as they were packed."""
    layer = bitsandbytes.nn.Linear4bit(128, 32, compress_statistics=nested, quant_type="nf4")
    layer = layer.to("cpu").eval()
    before = dequantize(read_codes(layer))
    with torch.no_grad():
        layer(torch.randn(1, 128))
    assert "packed" in read_codes(layer)
    layer.state_dict()
    found = dequantize(read_codes(layer))
    assert (found - before).norm() < 0.01 * before.norm()


def test_eight_bits_before_the_first_call_and_after():
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    before = dequantize(read_codes(layer))
    layer(torch.randn(1, 64))
    found = read_codes(layer)
    assert found.codes.data_ptr() == layer.state.CB.data_ptr()
    assert torch.equal(dequantize(found), before)


def test_other_layers_are_none_s():
    class Own(bitsandbytes.nn.Linear4bit):
        pass

    for layer in (nn.Linear(4, 4), Own(64, 32)):
        assert not is_in_codes(layer) and read_codes(layer) is None
