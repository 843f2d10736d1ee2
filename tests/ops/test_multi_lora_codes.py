"""multi_lora_linear over weights in codes, against the same over their values."""

import pytest
import torch

from peft_kernels.ops import LoRAFactors, QuantizedWeight, dequantize, multi_lora_linear, quantize
from peft_kernels.ops.multi_lora_linear import (
    BankDropout,
    example_bank,
    example_ids,
    example_trained,
)

N, K, RANKS = 24, 40, (3, 8, 0, 17)
KINDS = [("nf4", True), ("nf4", False), ("int8", True), ("q8_0", False)]


def make(m=9, kind="nf4", nested=True, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(m, K).to(dtype)
    if kind == "q8_0":
        weight = blocks()
        x = torch.randn(m, 64).to(dtype)
    else:
        weight = quantize(torch.randn(N, K) * K**-0.5, kind, nested=nested)
    bank = example_bank(*weight.shape, RANKS, dtype=dtype)
    ids = example_ids(m, len(RANKS), "skewed")
    ids[0] = 1
    return x, weight, bank, ids, torch.randn(N).to(dtype)


def blocks():
    codes = torch.randint(0, 256, (N * 2, 34), dtype=torch.uint8)
    codes[:, :2] = torch.rand(N * 2).mul(0.01).half().view(torch.uint8).view(-1, 2)
    return QuantizedWeight(codes, torch.empty(0), (N, 64), 32, layout="q8_0")


def step(x, weight, bank, ids, bias, dropout=None, slots=(0, 1)):
    x = x.clone().requires_grad_()
    trained = example_trained(bank, slots)
    y = multi_lora_linear(x, weight, bank, ids, bias=bias, trained=trained, dropout=dropout)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(one.grad for one in (*trained.a, *trained.b))]


def assert_close(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_is_that_over_the_values(kind, nested):
    x, weight, bank, ids, bias = make(kind=kind, nested=nested)
    found = step(x, weight, bank, ids, bias)
    assert_close(found, step(x, dequantize(weight), bank, ids, bias))
    assert all(one.any() for one in found)
    with torch.no_grad():
        assert torch.equal(multi_lora_linear(x, weight, bank, ids, bias=bias), found[0])


@pytest.mark.parametrize("m", [1, 2, 8])
def test_few_rows_train_too(m):
    """These are filled up to as many as are summed in one order."""
    x, weight, bank, ids, bias = make(m)
    found = step(x, weight, bank, ids, bias)
    assert_close(found, step(x, dequantize(weight), bank, ids, bias))


def test_dropout_and_ids_of_rows_in_a_batch():
    x, weight, bank, _, bias = make(m=12)
    shares = torch.tensor([0.5, 0.2, 0.0, 0.0], dtype=torch.float64)
    dropout = BankDropout(shares, torch.arange(4))
    x, ids = x.view(4, 3, K), torch.tensor([0, 1, -1, 3])
    found = step(x, weight, bank, ids, bias, dropout)
    assert_close(found, step(x, dequantize(weight), bank, ids, bias, dropout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype):
    x, weight, bank, ids, bias = make(dtype=dtype)
    bank = bank._replace(a=bank.a.float(), b=bank.b.float())
    found = step(x, weight, bank, ids, bias)
    exact = step(
        x.double(),
        dequantize(weight).double(),
        bank._replace(a=bank.a.double(), b=bank.b.double()),
        ids,
        bias.double(),
    )
    for one, other in zip(found, exact, strict=True):
        assert (one.double() - other).norm() < 0.02 * other.norm()
    with torch.autocast("cpu", dtype), torch.no_grad():
        y = multi_lora_linear(x.float(), weight, bank, ids, bias=bias.float())
    torch.testing.assert_close(y, found[0])


def test_rows_without_an_adapter_are_the_bare_layers():
    x, weight, bank, _, bias = make()
    none = torch.full((9,), -1)
    ids = torch.tensor([-1, 0, 1, -1, 3, 3, 2, -1, 0])
    found = multi_lora_linear(x, weight, bank, ids, bias=bias)
    bare = multi_lora_linear(x, weight, bank, none, bias=bias)
    assert torch.equal(found[ids < 0], bare[ids < 0])
    torch.testing.assert_close(bare, torch.nn.functional.linear(x, dequantize(weight), bias))


def test_adapters_in_tensors_of_their_own():
    x, weight, _, _, bias = make()
    a = [torch.randn(r, K).requires_grad_() for r in (2, 5)]
    b = [torch.randn(N, r).requires_grad_() for r in (2, 5)]
    ids = torch.tensor([0, 1, -1, 0, 1, 1, 0, -1, 0])
    found = []
    for one in (weight, dequantize(weight)):
        y = multi_lora_linear(x, one, LoRAFactors(a, b, [0.5, 2.0]), ids, bias=bias)
        found.append([y, *torch.autograd.grad(y.sin().sum(), (*a, *b))])
    assert_close(*found)


def test_saves_nothing_of_the_weights_size():
    n = k = 256
    weight = quantize(torch.randn(n, k), "nf4")
    bank, sizes = example_bank(n, k, (4,)), []
    trained = example_trained(bank, (0,))
    x = torch.randn(3, k, requires_grad=True)

    def note(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        multi_lora_linear(x, weight, bank, torch.zeros(3, dtype=torch.int32), trained=trained)
    assert sizes and max(sizes) == n * k // 2  # the codes


def test_bad_input_is_named():
    x, weight, bank, ids, _ = make()
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., k\]"):
        multi_lora_linear(x[:, 1:], weight, bank, ids)
    with pytest.raises(ValueError, match=r"weight\.codes must be"):
        multi_lora_linear(x, weight._replace(codes=weight.codes[1:]), bank, ids)
    with pytest.raises(ValueError, match="ids"):
        multi_lora_linear(x, weight, bank, ids + 99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_a_row_does_not_depend_on_its_batch(kind, nested, dtype):
    x, weight, bank, ids, bias = make(140, kind, nested, dtype)
    whole = multi_lora_linear(x, weight, bank, ids, bias=bias)
    for first, last in ((0, 1), (0, 3), (5, 13), (0, 9), (2, 42), (0, 129)):
        part = multi_lora_linear(x[first:last], weight, bank, ids[first:last], bias=bias)
        assert torch.equal(part, whole[first:last])
