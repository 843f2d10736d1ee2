"""lora_linear over weights in codes: against the weight itself, dequantised, in float64.

In each build, in test_lora_linear.py; the formats' own libraries in integrations/.
"""

import os
from pathlib import Path

import pytest
import torch
from errors import assert_as_good_as
from random_codes import BOOK, PLANES, problem, weight_of

import peft_kernels
from peft_kernels.ops import NestedScales, QuantizedWeight, dequantize, lora_linear
from peft_kernels.ops._gguf_blocks import BLOCKS
from peft_kernels.ops._quantized import arguments_of
from peft_kernels.ops.lora_linear import linear_of_codes
from peft_kernels.tools.bench.measure import saved_bytes
from peft_kernels.tools.bench.peak import peak_bytes


def run(x, weight, a, b, bias, dy, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, a, b, bias)]
    y = lora_linear(leaves[0], weight, leaves[1], leaves[2], bias=leaves[3], scale=0.5, **options)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def element(weight, i, j):
    """One element, by the definition."""
    e = i * weight.shape[1] + j
    block = e // weight.block
    if weight.block_rows > 1:
        block = i // weight.block_rows * -(-weight.shape[1] // weight.block) + j // weight.block
    scale = weight.scales.flatten()[block].float()
    shift = 0 if weight.shifts is None else weight.shifts[block].float()
    if weight.nested is not None:
        nested = weight.nested
        scale = nested.book[int(scale)] * nested.scales[block // nested.block] + nested.offset
    if weight.book is None:
        return weight.codes.flatten()[e].float() * weight.unit * scale + shift
    byte = int(weight.codes.flatten()[e // 2])
    return weight.book[byte & 15 if e % 2 else byte >> 4] * scale + shift


@pytest.mark.parametrize("kind", PLANES)
def test_dequantize_is_the_definition(kind):
    weight = weight_of(5, 33, block=32, kind=kind)
    expected = torch.stack([element(weight, i, j) for i in range(5) for j in range(33)])
    torch.testing.assert_close(dequantize(weight), expected.view(5, 33), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", [*PLANES, *BLOCKS])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_against_float64(m, kind, p, backend):
    n, k = (37, 70) if kind in PLANES and m > 7 else (13, 512)
    weight = weight_of(n, k, kind=kind)
    x, a, b, bias = problem(m, n, k)
    dy = torch.randn(m, n)
    with peft_kernels.backend(backend):
        found = run(x, weight, a, b, bias, dy, dropout_p=p, seed=5)
    plain = dequantize(weight)
    wide = [tensor.double() for tensor in (x, plain, a, b, bias, dy)]
    exact = run(*wide, dropout_p=p, seed=5)
    with peft_kernels.backend("reference"):
        eager = run(x, plain, a, b, bias, dy, dropout_p=p, seed=5)
    names = "y", "dx", "da", "db", "d_bias"
    for name, one, other, reference in zip(names, found, eager, exact, strict=True):
        assert_as_good_as(one, other, reference, name)


@pytest.mark.parametrize("kind", ["nested", "flat", "int8", "q4_K"])
@pytest.mark.parametrize("m", [1, 3, 8, 9, 40, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_as_good_as_a_weight_in_halves(dtype, m, kind):
    """Where the processor multiplies bfloat16 the weight is rounded to it; else not at all."""
    weight = weight_of(70, 256, kind=kind)
    x, a, b, bias = problem(m, 70, 256, dtype)
    dy = torch.randn(m, 70).to(dtype)
    found = run(x, weight, a, b, bias, dy, dropout_p=0.2, seed=3)
    wide = [tensor.double() for tensor in (x, dequantize(weight), a, b, bias, dy)]
    exact = run(*wide, dropout_p=0.2, seed=3)
    with peft_kernels.backend("reference"):
        eager = run(x, dequantize(weight, dtype), a, b, bias, dy, dropout_p=0.2, seed=3)
    names = "y", "dx", "da", "db", "d_bias"
    for name, one, other, reference in zip(names, found, eager, exact, strict=True):
        assert_as_good_as(one, other, reference, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_that_share_rows_and_columns(dtype):
    """A row's sums are the same, whoever has them: many rows, and a depth of few rows a block."""
    n, k = 13, 8192
    weight = weight_of(n, k)
    x, a, b, bias = problem(130, n, k, dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4, 6):
            torch.set_num_threads(count)
            found.append(lora_linear(x, weight, a, b, bias=bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)
    exact = lora_linear(*(t.double() for t in (x, dequantize(weight), a, b)), bias=bias.double())
    eager = torch.nn.functional.linear(x, dequantize(weight, dtype), bias) + (x @ a.T.to(dtype)) @ (
        b.T.to(dtype)
    )
    assert_as_good_as(found[0], eager, exact, "y")


def test_nothing_of_the_weights_size_is_allocated_or_kept():
    n = k = 1024
    weight = weight_of(n, k)
    x, a, b, bias = problem(16, n, k, r=8)
    dy = torch.randn(16, n)
    step = lambda: run(x, weight, a, b, bias, dy)  # noqa: E731
    step()
    nested = weight.nested.scales, weight.nested.book, weight.nested.offset
    held = [weight.codes, weight.scales, *nested, weight.book, a, b, bias, x]
    forward = lambda: lora_linear(x, weight, a.requires_grad_(), b)  # noqa: E731
    assert saved_bytes(forward, held) == 4 * 16 * 8  # S
    peak = peak_bytes(step)
    assert peak is None or peak < n * k  # a quarter of it in float32


def test_gradients_go_on_after_evaluation():
    weight = weight_of(32, 64)
    x, a, b, bias = problem(4, 32, 64)
    dy = torch.randn(4, 32)
    before = run(x, weight, a, b, bias, dy)
    with torch.no_grad():
        lora_linear(x, weight, a, b, bias=bias)
    for one, other in zip(before, run(x, weight, a, b, bias, dy), strict=True):
        assert torch.equal(one, other)


def test_weights_made_in_inference_mode_train():
    """As HQQ's zeros are; autograd saves none of these."""
    weight = weight_of(32, 64)
    x, a, b, bias = problem(4, 32, 64)
    dy = torch.randn(4, 32)
    with torch.inference_mode():
        nested = weight.nested._replace(scales=weight.nested.scales.clone())
        made = weight._replace(codes=weight.codes.clone(), nested=nested)
    for one, other in zip(
        run(x, weight, a, b, bias, dy), run(x, made, a, b, bias, dy), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["nested", "int8", "q4_0"])
def test_compiled(kind):
    weight = weight_of(32, 64, kind=kind)
    x, a, b, _ = problem(4, 32, 64)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    found, expected = (
        torch.autograd.grad(one(leaves[0], weight, *leaves[1:]).sum(), leaves)
        for one in (compiled, lora_linear)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_of_any_dimensions_and_under_vmap():
    weight = weight_of(32, 64)
    x, a, b, _ = problem(6, 32, 64)
    y = lora_linear(x, weight, a, b)
    assert torch.equal(lora_linear(x.view(2, 3, 64), weight, a, b), y.view(2, 3, 32))
    mapped = torch.func.vmap(lambda row: lora_linear(row, weight, a, b))(x)
    torch.testing.assert_close(mapped, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nested", "int8", "q4_0"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_gradients(kind, p):
    weight = weight_of(24, 64, kind=kind)
    x, a, b, bias = (one.requires_grad_() for one in problem(4, 24, 64))

    def penalty(base):
        y = lora_linear(x, base, a, b, bias=bias, dropout_p=p, seed=3)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, a, b, bias))

    for one, other in zip(penalty(weight), penalty(dequantize(weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("r", [0, 6])
def test_transforms(r):
    weight = weight_of(24, 64)
    x, a, b, bias = problem(4, 24, 64, r=r)

    def layer(x):
        return lora_linear(x, weight, a, b, bias=bias)

    values = dequantize(weight) + b @ a
    close = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x), **close)
    _, along = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(along, x @ values.T, **close)
    slope = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(slope, values.sum(0).expand(4, 64), **close)


@pytest.mark.parametrize("change", ["unit", "shifts", "both"])
@pytest.mark.parametrize("m", [3, 40])
def test_nested_scales_beside_a_unit_and_shifts(m, change):
    weight = weight_of(24, 70)
    if change != "shifts":
        weight = weight._replace(unit=0.3)
    if change != "unit":
        weight = weight._replace(shifts=torch.randn(weight.scales.shape))
    x, a, b, bias = problem(m, 24, 70)
    dy = torch.randn(m, 24)
    y, dx, *_ = run(x, weight, a, b, bias, dy)
    values = dequantize(weight) + 0.5 * b @ a
    torch.testing.assert_close(y, x @ values.T + bias, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dx, dy @ values, rtol=1e-4, atol=1e-3)


def test_nested_scales_without_values():
    weight = weight_of(24, 64)
    there = weight._replace(
        codes=weight.codes.to("meta"), scales=weight.scales.to("meta"), book=BOOK.to("meta"),
        nested=NestedScales(*(t.to("meta") if torch.is_tensor(t) else t for t in weight.nested)),
    )  # fmt: skip
    x, a, b, bias = (one.to("meta") for one in problem(4, 24, 64))
    assert lora_linear(x, there, a, b, bias=bias).shape == (4, 24)


def test_ops_are_registered_as_torch_expects():
    weight = weight_of(8, 64)
    x, a, b, bias = problem(3, 8, 64)
    ops = torch.ops.peft_kernels
    options = 0.5, None, 0.0, None
    forward = x, *arguments_of(weight), bias, a, b, *options
    torch.library.opcheck(ops.lora_linear_codes.default, forward)
    s = x @ a.T
    backward = torch.randn(3, 8), x, *arguments_of(weight), a, b, s, *options, True, True, False
    torch.library.opcheck(ops.lora_linear_codes_bwd.default, backward)


HALVES = torch.randn(256, dtype=torch.bfloat16)
EVERY_OTHER = torch.randn(512)[::2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": HALVES[:1]}, r"nested.scales must be contiguous float32; got torch.bfloat16"),
        ({"book": HALVES}, r"nested.book must be contiguous float32; got torch.bfloat16"),
        ({"book": EVERY_OTHER}, r"nested.book must be contiguous float32; .* strides \(2,\)"),
        ({"offset": HALVES[0]}, r"nested.offset must be contiguous float32; got torch.bfloat16"),
        ({"offset": torch.ones(2)}, r"nested.offset must be one number; got \(2,\)"),
        ({"offset": torch.ones((), device="meta")}, "nested.offset must be on .* cpu; got meta"),
    ],
)
def test_bad_nested_scales_are_named(change, message):
    """A GPU would read a book with strides as one without."""
    x, a, b, _ = problem(4, 32, 64)
    weight = weight_of(32, 64)
    with pytest.raises(ValueError, match=message):
        lora_linear(x, weight._replace(nested=weight.nested._replace(**change)), a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "block_rows must be at least 1"),
        ({"layout": "q2_K"}, "layout must be one of planes, q8_0"),
        ({"layout": "q4_K"}, "blocks of 256"),
        ({"shifts": torch.zeros(3)}, "shifts must be 32 contiguous"),
        ({"codes": torch.zeros(5, dtype=torch.uint8)}, "codes must be 1024 contiguous torch.uint8"),
        ({"scales": torch.zeros(3)}, "scales must be 32 contiguous torch.uint8"),
        ({"book": torch.zeros(8)}, r"book must be \[16\]"),
        ({"book": EVERY_OTHER[:16]}, r"weight.book must be contiguous float32"),
        ({"book": HALVES[:16]}, r"weight.book must be contiguous float32"),
        ({"nested": NestedScales(torch.ones(2), torch.ones(256), 256, torch.ones(()))}, "1 scales"),
        ({"shape": (32, 32)}, "k = 32"),
    ],
)
def test_bad_weights_are_named(change, message):
    x, a, b, _ = problem(4, 32, 64)
    with pytest.raises(ValueError, match=message):
        lora_linear(x, weight_of(32, 64)._replace(**change), a, b)


def test_bad_factors_are_named():
    x, a, b, bias = problem(4, 32, 64)
    weight = weight_of(32, 64)
    with pytest.raises(ValueError, match=r"\[r, 64\] and \[32, r\]"):
        lora_linear(x, weight, a, b[1:])
    with pytest.raises(ValueError, match=r"bias has shape \(31,\)"):
        lora_linear(x, weight, a, b, bias=bias[1:])
    with pytest.raises(TypeError, match="lora_a must be"):
        lora_linear(x, weight, a.double(), b.double())
    with pytest.raises(ValueError, match="dropout_p"):
        lora_linear(x, weight, a, b, dropout_p=1.0)


@pytest.mark.parametrize("m", [1, 7, 40, 200])
def test_rank_0_is_the_base_alone(m):
    weight = weight_of(37, 70)
    x, a, b, bias = problem(m, 37, 70, r=0)
    dy = torch.randn(m, 37)
    found = run(x, weight, a, b, bias, dy)
    y, dx = (
        x.double() @ dequantize(weight).double().T + bias,
        dy.double() @ dequantize(weight).double(),
    )
    torch.testing.assert_close(found[0].double(), y, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found[1].double(), dx, rtol=1e-5, atol=2e-5)
    assert found[2].shape == (0, 70) and found[3].shape == (37, 0)


@pytest.mark.parametrize("op", ["lora_linear_codes", "lora_linear_codes_bwd"])
def test_a_cpu_has_a_kernel(op):
    """What passes above on the reference as well isn't served by it."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{op}", "CPU")


def test_bfloat16_goes_by_pairs_where_the_processor_takes_them():
    """There the weight is rounded to it: 1 + 2^-9 is 1, and two halves of a row cancel."""
    k = 512
    codes = torch.ones(9, k, dtype=torch.int8)
    scales = torch.tensor([1 + 2**-9, 1.0]).repeat(9)
    weight = QuantizedWeight(codes, scales, (9, k), k // 2)
    x = torch.ones(9, k, dtype=torch.bfloat16)
    x[:, k // 2 :] = -1
    y = linear_of_codes(x, weight)
    assert y.eq(0.0 if multiplies_bf16() else 0.5).all()


@pytest.mark.parametrize("m", [1, 8])
def test_few_rows_of_bfloat16_go_by_pairs_too(m):
    """Of 4 bits the book is rounded."""
    k, book = 512, torch.ones(16)
    book[0] += 2**-9
    codes = torch.tensor([0, 17], dtype=torch.uint8).repeat_interleave(k // 4).repeat(9)
    weight = QuantizedWeight(codes, torch.ones(9 * k // 64), (9, k), 64, book)
    x = torch.ones(m, k, dtype=torch.bfloat16)
    x[:, k // 2 :] = -1
    assert linear_of_codes(x, weight).eq(0.0 if multiplies_bf16() else 0.5).all()


def multiplies_bf16():
    flags = Path("/proc/cpuinfo")
    has = flags.exists() and "avx512_bf16" in flags.read_text()
    return has and os.environ.get("PEFT_KERNELS_ISA", "avx512") == "avx512"
