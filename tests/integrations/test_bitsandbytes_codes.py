"""quantize against bitsandbytes: the same codes and the same scales, bit by bit."""

import pytest
import torch

from peft_kernels.ops import quantize

functional = pytest.importorskip("bitsandbytes").functional


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "block"), [(256, 512, 64), (37, 64, 128), (48, 100, 32), (7, 5, 64)]
)
def test_four_bits(n, k, block, dtype, kind, nested):
    torch.manual_seed(n)
    weight = torch.randn(n, k).to(dtype)
    weight[0] = 0
    codes, theirs = functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=kind
    )
    found = quantize(weight, kind, block=block, nested=nested)
    assert torch.equal(found.codes, codes) and torch.equal(found.scales, theirs.absmax)
    assert torch.equal(found.book, theirs.code)
    if nested:
        assert torch.equal(found.nested.scales, theirs.state2.absmax)
        assert torch.equal(found.nested.book, theirs.state2.code)
        assert torch.equal(found.nested.offset, theirs.offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes(dtype):
    torch.manual_seed(0)
    weight = torch.randn(96, 128).to(dtype)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    found = quantize(weight, "int8")
    assert torch.equal(found.codes, codes) and torch.equal(found.scales, scales)
