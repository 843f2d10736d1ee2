"""dora_linear and dora_norm over weights in codes, against the same over their values."""

import pytest
import torch

from peft_kernels.ops import (
    QuantizedWeight,
    dequantize,
    dora_linear,
    dora_norm,
    dora_squares,
    quantize,
)
from peft_kernels.ops import _weight_rows as weight_rows
from peft_kernels.tools.bench.measure import saved_bytes

N, R = 37, 3


def blocks(n, k):
    codes = torch.randint(0, 256, (n * k // 32, 34), dtype=torch.uint8)
    codes[:, :2] = torch.rand(len(codes)).mul(0.01).half().view(torch.uint8).view(-1, 2)
    return QuantizedWeight(codes, torch.empty(0), (n, k), 32, layout="q8_0")


def with_shifts(n, k):
    codes = torch.randint(-128, 127, (n, k), dtype=torch.int8)
    scales, shifts = torch.rand(n, k // 16), torch.randn(n, k // 16)
    return QuantizedWeight(codes, scales, (n, k), 16, unit=0.01, shifts=shifts)


def by_tensor(n, k):
    codes = torch.randint(-128, 127, (n, k), dtype=torch.int8)
    return QuantizedWeight(codes, torch.rand(1), (n, k), n * k, unit=0.01)


def in_tiles(n, k):
    codes = torch.randn(n, k).to(torch.float8_e4m3fn)
    return QuantizedWeight(codes, torch.rand(-(-n // 4), -(-k // 8)), (n, k), 8, block_rows=4)


WEIGHTS = {
    "nf4": lambda n, k: quantize(torch.randn(n, k), "nf4"),
    "nf4, flat": lambda n, k: quantize(torch.randn(n, k), "nf4", nested=False, block=128),
    "int8": lambda n, k: quantize(torch.randn(n, k), "int8"),
    "q8_0": blocks,
    "shifts": with_shifts,
    "by tensor": by_tensor,
    "tiles": in_tiles,
}


def make(kind, k, dtype=torch.float32):
    torch.manual_seed(0)
    weight = WEIGHTS[kind](N, k)
    x, a, b = torch.randn(2, 3, k), torch.randn(R, k) * 0.1, torch.randn(N, R)
    return weight, [x.to(dtype), a, b, torch.rand(N) + 0.5, torch.randn(N).to(dtype)]


def step(weight, tensors, **options):
    x, a, b, magnitude, bias = leaves = [t.detach().requires_grad_() for t in tensors]
    y = dora_linear(x, weight, a, b, magnitude, bias=bias, scale=0.7, **options)
    y.sin().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 6, 1 << 20], ids=str)
def test_rows_are_those_of_the_weight(kind, rows, monkeypatch):
    """Few at a time, and all at once; an odd number of columns where blocks may have it."""
    for k in (64, 33) if kind.startswith(("nf4", "int8", "by", "tiles")) else (64,):
        weight, _ = make(kind, k)
        monkeypatch.setattr(weight_rows, "_ELEMENTS", rows * k)
        found = list(weight_rows.values_by_rows(weight))
        assert torch.equal(torch.cat(found), dequantize(weight))
        if rows == 6 and k == 64:
            assert max(map(len, found)) < N


@pytest.mark.parametrize("kind", WEIGHTS)
def test_is_that_over_the_values(kind):
    weight, tensors = make(kind, 64)
    exact = [t.double() for t in tensors]
    values = dequantize(weight).double()
    torch.testing.assert_close(
        dora_squares(weight).double(), values.square().sum(1), rtol=1e-5, atol=1e-6
    )
    norm = dora_norm(weight, *tensors[1:3], 0.7)
    assert norm.dtype is torch.float32
    torch.testing.assert_close(
        norm.double(), dora_norm(values, *exact[1:3], 0.7), rtol=1e-5, atol=1e-6
    )
    for one, other in zip(step(weight, tensors), step(values, exact), strict=True):
        assert (one.double() - other).norm() < 2e-6 * max(other.norm(), 1) * 10


def test_halves_autocast_and_dropout():
    weight, tensors = make("nf4", 64, torch.bfloat16)
    exact = step(dequantize(weight).double(), [t.double() for t in tensors])
    for one, other in zip(step(weight, tensors), exact, strict=True):
        assert (one.double() - other).norm() < 0.03 * other.norm()
    wide = [t.float() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        x, a, b, magnitude, bias = wide
        y = dora_linear(x, weight, a, b, magnitude, bias=bias, scale=0.7)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, step(weight, tensors)[0])
    found = step(weight, wide, dropout_p=0.5, seed=3)
    expected = step(dequantize(weight), wide, dropout_p=0.5, seed=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_keeps_nothing_of_the_weights_size():
    n = k = 512
    weight, x = quantize(torch.randn(n, k), "nf4"), torch.randn(4, k, requires_grad=True)
    a, b = torch.randn(2, k, requires_grad=True), torch.randn(n, 2, requires_grad=True)
    magnitude = torch.rand(n, requires_grad=True)
    held = [x, a, b, magnitude, *weight.nested[:2], weight.codes, weight.scales, weight.book]

    def forward():
        return dora_linear(x, weight, a, b, magnitude)

    assert saved_bytes(forward, held) < 4 * n * 16


def test_bad_input_is_named():
    weight, (x, a, b, magnitude, bias) = make("nf4", 64)
    with pytest.raises(ValueError, match="magnitude has shape"):
        dora_linear(x, weight, a, b, magnitude[1:])
    with pytest.raises(ValueError, match="bias must be"):
        dora_linear(x, weight, a, b, magnitude, bias=bias.double())
    with pytest.raises(ValueError, match="must end in weight's k"):
        dora_linear(x[..., 1:], weight, a, b, magnitude)
