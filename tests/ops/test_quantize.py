"""quantize: each code is the nearest, each scale the largest magnitude of its block.

Bit by bit as bitsandbytes, in integrations/test_bitsandbytes_codes.py.
"""

import pytest
import torch

from peft_kernels.ops import _quantize, dequantize, lora_linear, quantize

FLOAT8 = torch.float8_e4m3fn


def flat_codes(weight):
    codes = weight.codes.flatten()
    n, k = weight.shape
    return torch.stack((codes >> 4, codes & 15), 1).flatten()[: n * k].long()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "k", "block"), [(8, 64, 64), (5, 33, 32), (3, 100, 128)])
def test_each_code_is_the_nearest(kind, n, k, block):
    torch.manual_seed(0)
    plain = torch.randn(n, k)
    plain[0, :2] = 0
    weight = quantize(plain, kind, block=block, nested=False)
    flat = torch.nn.functional.pad(plain.flatten(), (0, -n * k % block)).view(-1, block)
    assert torch.equal(weight.scales, flat.abs().amax(1))
    parts = plain.flatten() / weight.scales.repeat_interleave(block)[: n * k]
    far = (parts[:, None] - weight.book).abs()
    chosen = far.gather(1, flat_codes(weight)[:, None])[:, 0]
    torch.testing.assert_close(chosen, far.amin(1), rtol=0, atol=1e-6)


def test_scales_in_codes_are_near_to_what_they_stand_for():
    torch.manual_seed(0)
    plain = torch.randn(64, 256)
    flat, nested = (quantize(plain, nested=nested) for nested in (False, True))
    assert torch.equal(flat.codes, nested.codes) and nested.scales.dtype is torch.uint8
    error = (dequantize(flat) - dequantize(nested)).norm() / dequantize(flat).norm()
    assert 0 < error < 0.01


@pytest.mark.parametrize(
    ("kind", "most"), [("nf4", 0.11), ("fp4", 0.15), ("int8", 0.01), ("fp8", 0.04)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_lost(kind, most, dtype):
    torch.manual_seed(0)
    plain = torch.randn(32, 256).to(dtype)
    found = dequantize(quantize(plain, kind), dtype)
    assert found.dtype is dtype
    assert ((found - plain).float().norm() / plain.float().norm()) < most


@pytest.mark.parametrize(("n", "k"), [(256, 128), (130, 300), (3, 5), (1, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("by", ["tensor", "row", "block"])
def test_fp8_is_the_nearest_by_its_scale(by, n, k):
    torch.manual_seed(0)
    plain = torch.randn(n, k) * torch.rand(n, 1)
    rows, columns = {"tensor": (n, k), "row": (1, k), "block": (128, 128)}[by]
    expected = torch.empty(n, k)
    for i in range(0, n, max(rows, 1)):
        for j in range(0, k, max(columns, 1)):
            part = plain[i : i + rows, j : j + columns]
            scale = part.abs().max() / 448
            expected[i : i + rows, j : j + columns] = (part / scale).to(FLOAT8).float() * scale
    weight = quantize(plain, "fp8", by=by)
    assert weight.codes.dtype is FLOAT8 and torch.equal(dequantize(weight), expected)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("shape", [(24, 40), (3, 0), (0, 40)])
def test_any_strides_and_no_elements(kind, shape):
    torch.manual_seed(0)
    n, k = shape
    plain = torch.randn(k, n).T
    weight, x = quantize(plain, kind), torch.randn(2, k)
    assert torch.equal(dequantize(weight), dequantize(quantize(plain.contiguous(), kind)))
    y = lora_linear(x, weight, torch.zeros(1, k), torch.zeros(n, 1))
    torch.testing.assert_close(y, x @ dequantize(weight).T, rtol=1e-4, atol=1e-4)


def test_fp8_computes():
    weight = quantize(torch.randn(130, 200), "fp8", by="block")
    x, a, b = torch.randn(5, 200), torch.randn(4, 200), torch.randn(130, 4)
    y = lora_linear(x.double(), weight, a.double(), b.double())
    torch.testing.assert_close(lora_linear(x, weight, a, b).double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp8"])
def test_zeros_stay_zeros(kind):
    plain = torch.zeros(3, 64)
    plain[1] = torch.randn(64)
    found = dequantize(quantize(plain, kind, nested=False))
    assert found[0].eq(0).all() and found[2].eq(0).all() and found[1].ne(0).any()


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (torch.zeros(2, 64), {"kind": "nf5"}, ValueError, "kind must be one of nf4, fp4, int8"),
        (torch.full((2, 64), 7e4), {"kind": "int8"}, ValueError, "within 65504 for int8.*70000"),
        (torch.zeros(64), {}, ValueError, r"weight must be \[n, k\]; got shape \(64,\)"),
        (torch.zeros(2, 64).double(), {}, TypeError, "got torch.float64"),
        (torch.zeros(2, 64), {"block": 48}, ValueError, "block must be a power of 2"),
        (
            torch.zeros(2, 64),
            {"kind": "fp8", "by": "column"},
            ValueError,
            "by must be one of tensor",
        ),
    ],
)
def test_bad_input_is_named(weight, options, error, message):
    with pytest.raises(error, match=message):
        quantize(weight, **options)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp8"])
def test_the_default_dtype_is_no_matter(kind):
    weight = torch.randn(32, 64)
    expected = quantize(weight, kind)
    for one in (_quantize.book_of, _quantize._dynamic_book):
        one.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = quantize(weight, kind)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(dequantize(found), dequantize(expected))
