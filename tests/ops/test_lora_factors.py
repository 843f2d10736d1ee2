"""multi_lora_linear over adapters in tensors of their own: what a bank of the same adapters gives.

Against float64, and in each build, in test_multi_lora_linear.py.
"""

import pytest
import torch
from peaks import of_all

import peft_kernels
from peft_kernels.ops import BankDropout, LoRAFactors, _lora_factors, multi_lora_linear
from peft_kernels.ops._lora_factors import bank_of
from peft_kernels.ops.multi_lora_linear import Routing

RANKS = (3, 8, 20)
SCALES = (2.0, 0.5, -1.5)
HALF = torch.bfloat16


def factors_of(n, k, dtype=torch.float32):
    a = [torch.randn(r, k).div(k**0.5).to(dtype) for r in RANKS]
    b = [torch.randn(n, r).div(r**0.5).to(dtype) for r in RANKS]
    return LoRAFactors(a, b, SCALES)


def problem(m=7, n=37, k=29, dtype=torch.float32, adapter_dtype=None):
    torch.manual_seed(0)
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).div(k**0.5).to(dtype)
    bias = torch.randn(n).to(dtype)
    return x, weight, bias, factors_of(n, k, adapter_dtype or dtype)


@pytest.fixture
def no_bank(monkeypatch):
    def refuse(factors):
        raise AssertionError("the adapters were copied into a bank")

    monkeypatch.setattr(_lora_factors, "bank_of", refuse)


@pytest.mark.parametrize("kind", [float, lambda scale: torch.tensor(scale, dtype=torch.float64)])
def test_scales_are_as_precise_as_float64_is(kind):
    x, weight, bias, factors = problem(dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    y = multi_lora_linear(x, weight, factors._replace(scales=[1 / 3, 0.1, 5 / 11]), ids, bias=bias)
    copied = factors._replace(scales=[kind(scale) for scale in (1 / 3, 0.1, 5 / 11)])
    for one in copied.a:
        one.requires_grad_()
    found = multi_lora_linear(x, weight, copied, ids, bias=bias)
    torch.testing.assert_close(found, y, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("ids", [(2, -1, 0, 2, 1, 0, 2), (-1,) * 7, (1,) * 7, (2,)])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float32), (HALF, HALF), (HALF, torch.float32)],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_is_what_a_bank_gives(ids, dtype, adapter_dtype, backend):
    x, weight, bias, factors = problem(dtype=dtype, adapter_dtype=adapter_dtype)
    ids = torch.tensor(ids)
    with peft_kernels.backend(backend):
        y = multi_lora_linear(x, weight, factors, ids, bias=bias)
        expected = multi_lora_linear(x, weight, bank_of(factors), ids, bias=bias)
    if backend == "auto":  # one kernel, which sums in one order
        assert torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected)


def test_without_gradients_nothing_is_copied(no_bank):
    x, weight, bias, factors = problem()
    for one in factors.a:
        one.requires_grad_()
    with torch.no_grad():
        multi_lora_linear(x, weight, factors, torch.tensor([0, 1, 2, 0, 1, 2, -1]), bias=bias)


def test_strides_do_not_matter():
    x, weight, bias, factors = problem()
    ids = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    turned = LoRAFactors(
        [a.T.contiguous().T for a in factors.a], [b.T.contiguous().T for b in factors.b], SCALES
    )
    y = multi_lora_linear(x, weight.T.contiguous().T, turned, ids, bias=bias)
    torch.testing.assert_close(y, multi_lora_linear(x, weight, factors, ids, bias=bias))


def test_rows_in_parts_of_several_dimensions_and_routed():
    x, weight, bias, factors = problem(m=12)
    parts = x.view(4, 3, -1)
    ids = torch.tensor([2, -1, 0, 1])
    y = multi_lora_linear(parts, weight, factors, Routing(ids), bias=bias)
    each = multi_lora_linear(x, weight, factors, ids.repeat_interleave(3), bias=bias)
    assert torch.equal(y, each.view_as(y))


def test_gradients_go_to_the_tensors_that_require_them():
    x, weight, bias, factors = problem(dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    leaves = [x, *factors.a[:2], *factors.b[:2]]
    for leaf in leaves:
        leaf.requires_grad_()
    y = multi_lora_linear(x, weight, factors, ids, bias=bias)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, dy)
    plain = x @ weight.T + bias
    rows = []
    for i, slot in enumerate(ids.tolist()):
        low = x[i] @ factors.a[slot].T @ factors.b[slot].T * SCALES[slot] if slot >= 0 else 0
        rows.append(plain[i] + low)
    expected = torch.autograd.grad(torch.stack(rows), leaves, dy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_scales_that_are_tensors_and_dropout():
    x, weight, bias, factors = problem()
    ids = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    tensors = factors._replace(scales=[torch.tensor(scale) for scale in SCALES])
    y = multi_lora_linear(x, weight, tensors, ids, bias=bias)
    torch.testing.assert_close(y, multi_lora_linear(x, weight, factors, ids, bias=bias))
    dropout = BankDropout(torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64), torch.arange(3))
    dropped = multi_lora_linear(x, weight, factors, ids, bias=bias, dropout=dropout)
    of_bank = multi_lora_linear(x, weight, bank_of(factors), ids, bias=bias, dropout=dropout)
    assert torch.equal(dropped, of_bank) and not torch.equal(dropped, y)


def test_op_is_registered_as_torch_expects():
    x, weight, bias, factors = problem()
    ids = torch.tensor([0, 1, 2, 0, 1, 2, -1], dtype=torch.int32)
    arguments = x, weight, bias, list(factors.a), list(factors.b), list(SCALES), ids
    torch.library.opcheck(torch.ops.peft_kernels.multi_lora_linear_apart.default, arguments)


def test_compiles():
    x, weight, bias, factors = problem()
    ids = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    compiled = torch.compile(multi_lora_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = compiled(x, weight, factors, ids, bias=bias)
    assert torch.equal(y, multi_lora_linear(x, weight, factors, ids, bias=bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: f._replace(a=[], b=[], scales=[]), ValueError, "at least one adapter"),
        (lambda f: f._replace(scales=SCALES[:2]), ValueError, "got 3, 3 and 2"),
        (lambda f: f._replace(a=[a[:, 1:] for a in f.a]), ValueError, r"must be \[r, 29\]"),
        (lambda f: f._replace(b=[b[1:] for b in f.b]), ValueError, r"\[37, r\]"),
        (lambda f: f._replace(b=[f.b[1], *f.b[1:]]), ValueError, r"\[37, r\]"),
        (lambda f: f._replace(a=[a.double() for a in f.a]), TypeError, "torch.float64"),
        (lambda f: f._replace(b=[f.b[0].half(), *f.b[1:]]), TypeError, "one dtype"),
    ],
)
def test_bad_factors_are_named(change, error, message):
    x, weight, bias, factors = problem()
    with pytest.raises(error, match=message):
        multi_lora_linear(x, weight, change(factors), torch.zeros(7, dtype=torch.int32), bias=bias)


def test_bad_ids_and_trained_are_named():
    x, weight, _, factors = problem()
    with pytest.raises(ValueError, match=r"ids must be in \[-1, 3\)"):
        multi_lora_linear(x, weight, factors, torch.full((7,), 3))
    with pytest.raises(ValueError, match="trained must be None"):
        multi_lora_linear(x, weight, factors, torch.zeros(7, dtype=torch.int32), trained=[])


def test_no_copy_of_the_factors_is_held():
    """Of B one strip for each thread is transposed at a time."""
    slots, n, k, r = 16, 4096, 64, 16
    factors = LoRAFactors(
        [torch.randn(r, k) for _ in range(slots)],
        [torch.randn(n, r) for _ in range(slots)],
        [1.0] * slots,
    )
    x, weight = torch.randn(slots, k), torch.randn(n, k)
    ids = torch.arange(slots, dtype=torch.int32)
    with torch.no_grad():
        peak = of_all(lambda: multi_lora_linear(x, weight, factors, ids))
    assert 4 * slots * n <= peak < 4 * slots * n + slots * n * r * 4 / 8  # y, and strips
