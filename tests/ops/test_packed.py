"""HQQ's, GPTQ's and AWQ's layouts: each element read by itself, and LoRA linear over them."""

import pytest
import torch

from peft_kernels.ops import QuantizedWeight, dequantize, lora_linear

N, K, GROUP = 24, 64, 16
AWQ_SHIFT = {0: 0, 1: 16, 2: 4, 3: 20, 4: 8, 5: 24, 6: 12, 7: 28}  # of column j of eight


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def in_gptq(bits=4, version="", ordered=True):
    torch.manual_seed(bits)
    groups = torch.arange(K) // GROUP
    groups = groups if ordered else groups[torch.randperm(K)]
    zeros, scales = words(K // GROUP, -(-N * bits // 32)), torch.rand(K // GROUP, N).half() + 0.5
    codes, layout = words(K * bits // 32, N), f"gptq_{version}{bits}"
    return QuantizedWeight(codes, scales, (N, K), GROUP, groups.int(), shifts=zeros, layout=layout)


def in_awq():
    torch.manual_seed(0)
    scales = torch.rand(K // GROUP, N).half() + 0.5
    codes, zeros = words(K, N // 8), words(K // GROUP, N // 8)
    return QuantizedWeight(codes, scales, (N, K), GROUP, shifts=zeros, layout="awq_4")


def in_hqq(bits, by_rows):
    """Groups in rows ``[96, 16]`` or in columns ``[16, 96]``."""
    torch.manual_seed(bits)
    rows, columns = (N * K // GROUP, GROUP) if by_rows else (GROUP, N * K // GROUP)
    parts = 10 if bits == 3 else 8 // bits
    count = -(-rows // parts), columns
    codes = torch.randint(0, 2**30 if bits == 3 else 256, count)
    codes = codes.to(torch.int32 if bits == 3 else torch.uint8)
    shape = (rows, 1) if by_rows else (1, columns)
    scales, zeros = torch.rand(shape) + 0.5, torch.rand(shape) * 4
    return QuantizedWeight(codes, scales, (N, K), GROUP, shifts=zeros, layout=f"hqq_{bits}")


def part(word, shift, bits):
    return (int(word) % 2**32 >> shift) % 2**bits


def gptq_element(weight, bits, i, j):
    each, group = 32 // bits, int(weight.book[j])
    code = part(weight.codes[j // each, i], j % each * bits, bits)
    zero = part(weight.shifts[group, i // each], i % each * bits, bits)
    return (code - zero - ("v1" in weight.layout)) * float(weight.scales[group, i])


def awq_element(weight, i, j):
    shift = AWQ_SHIFT[i % 8]
    code, zero = (part(w[g, i // 8], shift, 4) for w, g in (
        (weight.codes, j), (weight.shifts, j // GROUP)
    ))  # fmt: skip
    return (code - zero) * float(weight.scales[j // GROUP, i])


def hqq_element(weight, bits, i, j):
    columns, parts = weight.codes.shape[1], 10 if bits == 3 else 8 // bits
    row, column = divmod(i * K + j, columns)
    which, word = divmod(row, weight.codes.shape[0])
    code = part(weight.codes[word, column], bits * (parts - 1 - which), bits)
    scales, zeros = (t.expand(row + 1, columns) if len(t) == 1 else t.expand(-1, columns)
                     for t in (weight.scales, weight.shifts))  # fmt: skip
    return (code - zeros[row, column]) * scales[row, column]


def by_element(element, *arguments):
    values = [float(element(*arguments, i, j)) for i in range(N) for j in range(K)]
    return torch.tensor(values).view(N, K)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("version", ["", "v1_"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits, version, ordered):
    weight = in_gptq(bits, version, ordered)
    assert torch.equal(dequantize(weight), by_element(gptq_element, weight, bits))


def test_awq():
    weight = in_awq()
    assert torch.equal(dequantize(weight), by_element(awq_element, weight))


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_hqq(bits, by_rows):
    weight = in_hqq(bits, by_rows)
    assert torch.equal(dequantize(weight), by_element(hqq_element, weight, bits))


@pytest.mark.parametrize("weight", [in_gptq(), in_awq(), in_hqq(4, True)], ids=lambda w: w.layout)
def test_lora_linear_keeps_none_of_the_weight(weight):
    x, a, b = torch.randn(5, K), torch.randn(3, K), torch.randn(N, 3)
    dy, kept = torch.randn(5, N), []

    def run(weight, *tensors, dy):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = lora_linear(leaves[0], weight, *leaves[1:])
        return [y, *torch.autograd.grad(y, leaves, dy)]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = run(weight, x, a, b, dy=dy)
    assert all(t.dtype is not torch.float32 or t.numel() < N * K for t in kept)
    plain = dequantize(weight).double()
    expected = run(plain, x.double(), a.double(), b.double(), dy=dy.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("weight", "change", "message"),
    [
        (in_awq(), {"layout": "awq_3"}, "layout must be one of planes, .*hqq_8.*gptq_4.*awq_4"),
        (in_awq(), {"shape": (28, K)}, "eights of columns, by which n = 28"),
        (in_awq(), {"block": 0}, "block must be at least 1"),
        (in_awq(), {"block": 24}, r"weight.shifts must be \[3, 3\] int32 in awq_4; got \[4, 3\]"),
        (in_awq(), {"shifts": None}, "weight.shifts must be the zeros of awq_4"),
        (in_gptq(), {"codes": words(7, N)}, r"weight.codes must be \[8, 24\] int32 in gptq_4"),
        (in_gptq(), {"book": None}, r"weight.book must be the group of each of k, \[64\]"),
        (in_gptq(), {"scales": torch.ones(4, 23)}, r"weight.scales must be \[4, 24\] floats"),
        (in_hqq(4, True), {"codes": words(48, 16)}, r"weight.codes must be \[rows, columns\]"),
        (in_hqq(4, True), {"shape": (N, K + 1)}, r"must hold \[24, 65\] elements of 4 bits"),
        (in_hqq(4, True), {"scales": torch.ones(7)}, r"weight.scales must be \[96, 1\] or"),
        (in_hqq(4, True), {"shifts": torch.ones(96, 1).half()}, "weight.shifts must be"),
    ],
)
def test_bad_weights_are_named(weight, change, message):
    weight = weight._replace(**change)
    n, k = weight.shape
    with pytest.raises(ValueError, match=message):
        lora_linear(torch.randn(2, k), weight, torch.randn(3, k), torch.randn(n, 3))


def test_mixed_devices_are_named():
    x, a, b = torch.randn(2, K), torch.randn(3, K), torch.randn(N, 3)
    weight = in_awq()
    with pytest.raises(ValueError, match="shifts"):
        lora_linear(x, weight._replace(shifts=weight.shifts.to("meta")), a, b)
