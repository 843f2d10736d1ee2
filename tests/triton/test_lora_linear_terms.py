"""The plans that write a float32 A as terms of bfloat16 first, in the interpreter."""

import importlib
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from peft_kernels.tools.report.traffic import lora_linear as traffic
from peft_kernels.triton.common import chips, launch
from peft_kernels.triton.lora_linear import launch as launchers
from peft_kernels.triton.lora_linear import plans as lora_plans
from peft_kernels.triton.lora_linear import tilings

op = importlib.import_module("peft_kernels.ops.lora_linear")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SEED = torch.tensor(-1234567890123)
plans = pytest.mark.parametrize("plan", lora_plans.TERM_PLANS)


def inputs_of(m, n, k, r, dtype=BF16, adapter_dtype=F32):
    torch.manual_seed(m + n + k + r)
    return op.example_inputs(m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype)


def forward(fwd, inputs, dropout_p):
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    seed = SEED if dropout_p else None
    return fwd(x, weight, bias, inputs["lora_a"], inputs["lora_b"], 0.7, None, dropout_p, seed)


def by_plan(plan, inputs, dropout_p=0.3):
    with lora_plans.force(plan):
        return forward(launchers.lora_linear_fwd, inputs, dropout_p)


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def check(plan, *sizes, dropout_p=0.3):
    """y and S within the limits of every plan's test."""
    inputs = inputs_of(*sizes)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    exact = forward(op.lora_linear_fwd_ref, wide, dropout_p)
    eager = forward(op.lora_linear_fwd_ref, inputs, dropout_p)
    for out, right, plain in zip(by_plan(plan, inputs, dropout_p), exact, eager, strict=True):
        limit = max(1.5 * error(plain, right), 1e-6)
        assert out.dtype is plain.dtype and out.shape == plain.shape
        assert error(out, right) <= limit
        assert error(torch.zeros_like(out), right) > limit, "no control"


def launched(call):
    """The names of the kernels that a call launches."""
    names = []
    run = launch.run

    def note(kernel, *rest):
        names.append(kernel.fn.__name__)
        run(kernel, *rest)

    with patch.object(launch, "run", note):
        call()
    return names


# ---- the terms -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 513), (16, 70)])
def test_the_terms_hold_a_float32(shape):
    a = torch.randn(shape) * torch.logspace(-20, 20, shape[1])
    terms = launch.in_terms(a, BF16, 3)
    assert terms.shape == (3, *shape) and terms.dtype is BF16 and terms.is_contiguous()
    assert torch.equal(terms[0], a.to(BF16))
    assert torch.equal(terms.double().sum(0), a.double())


def test_terms_of_strides_and_of_nothing():
    a = torch.randn(20, 6)
    assert torch.equal(launch.in_terms(a.T, BF16, 3).double().sum(0), a.T.double())
    assert launch.in_terms(a[:0], BF16, 3).shape == (3, 0, 6)


# ---- y and S ---------------------------------------------------------------------------------


@plans
@pytest.mark.parametrize("r", [1, 16, 33, 70])
def test_every_rank(plan, r):
    check(plan, 70, 75, 53, r)


@plans
@pytest.mark.parametrize(("m", "n", "k"), [(1, 67, 130), (5, 1, 131), (70, 131, 1)])
def test_few_rows_and_narrow_layers(plan, m, n, k):
    check(plan, m, n, k, 4, dropout_p=0.0)


@pytest.mark.parametrize("plan", ["i_terms", "ii_terms"])
@pytest.mark.parametrize("arch", [*chips.ARCHS, "other"])
def test_shipped_tiles(plan, arch):
    with patch.object(chips, "arch_name", lambda device: arch):
        check(plan, 70, 75, 150, 13)


@pytest.mark.parametrize("splits", [2, 8])
def test_parts(splits):
    """Of 150 columns in blocks of 32 the last parts have none."""
    tiling = tilings.tiling
    in_parts = lambda *args: replace(tiling(*args), splits=splits)  # noqa: E731 one line of a patch
    with patch.object(tilings, "tiling", in_parts):
        check("ii_terms", 20, 67, 150, 12)


@plans
def test_nothing(plan):
    y, s = by_plan(plan, inputs_of(0, 7, 9, 3))
    assert y.shape == (0, 7) and s.shape == (0, 3)
    y, s = by_plan(plan, inputs_of(5, 7, 0, 3))
    assert y.shape == (5, 7) and not s.any()


@plans
def test_strides(plan):
    """Adapters and x out of larger tensors, and by columns."""
    inputs = inputs_of(37, 45, 50, 17)
    expected = by_plan(plan, inputs)
    inputs["lora_a"] = inputs["lora_a"].repeat_interleave(2, dim=0)[::2]
    inputs["lora_b"] = inputs["lora_b"].T.contiguous().T
    inputs["x"] = inputs["x"].T.contiguous().T
    assert all(map(torch.equal, by_plan(plan, inputs), expected))
    inputs["lora_a"] = inputs["lora_a"].T.contiguous().T
    assert all(map(torch.equal, by_plan(plan, inputs), expected))


# ---- who has them ----------------------------------------------------------------------------


@plans
def test_a_is_written_once_a_call(plan):
    inputs = inputs_of(70, 40, 130, 12)
    assert launched(lambda: by_plan(plan, inputs)).count("terms_kernel") == 1
    base = plan.removesuffix(lora_plans.IN_TERMS)
    assert "terms_kernel" not in launched(lambda: by_plan(base, inputs))


@plans
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(BF16, BF16), (F16, F32), (F32, F32)])
def test_other_dtypes_take_the_plan_without(plan, dtype, adapter_dtype):
    """float16's terms are scaled by tile, and the others have one term."""
    inputs = inputs_of(9, 12, 30, 5, dtype, adapter_dtype)
    expected = by_plan(plan.removesuffix(lora_plans.IN_TERMS), inputs)
    assert "terms_kernel" not in launched(lambda: by_plan(plan, inputs))
    assert all(map(torch.equal, by_plan(plan, inputs), expected))


def test_able():
    """All that `tune` and the first call of a shape measure."""
    case = lora_plans.Problem("fwd", BF16, F32, 8, 64, 64, 16, False)
    dense, in_terms = lora_plans.PLANS, lora_plans.TERM_PLANS
    assert case.able("sm_80") == dense + in_terms
    assert replace(case, r=17).able("sm_80") == (*dense, "i_terms", "library_terms")
    assert replace(case, adapter_dtype=BF16).able("sm_80") == dense
    assert replace(case, dtype=F16).able("sm_80") == dense
    assert replace(case, direction="bwd").able("sm_80") == ("i", "library")
    assert replace(case, codes="4-bit/64").able("sm_80") == lora_plans.CODES_PLANS


def test_a_plan_in_terms_that_cannot_serve_is_replaced():
    device = torch.device("cpu")
    case = lora_plans.Problem("fwd", BF16, F32, 8, 64, 64, 16, False)
    for plan, base in zip(lora_plans.TERM_PLANS, ("i", "i", "library"), strict=True):
        with lora_plans.force(plan):
            assert lora_plans.choose(device, case) == plan
            assert lora_plans.choose(device, replace(case, direction="bwd")) == base


@pytest.mark.parametrize("plan", ["i", "library"])
def test_bytes(plan):
    """A read, three terms written and read: 4 + 6 + 6 bytes of each number where there were 4."""
    m, n, k, r = 66, 70, 150, 20
    (without, _), (terms, _) = (
        traffic.count(p, m, n, k, r) for p in (plan, plan + lora_plans.IN_TERMS)
    )
    assert terms.bytes_moved - without.bytes_moved == (6 + 6) * r * k
    assert terms.launches == without.launches + 1
    assert terms.extra_passes == without.extra_passes and terms.atomics == 0
