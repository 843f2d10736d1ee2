"""Every plan of the Triton kernels against float64, in the interpreter."""

import importlib
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import peft_kernels
from peft_kernels.triton.common import blocks, chips, launch
from peft_kernels.triton.lora_linear import launch as launchers
from peft_kernels.triton.lora_linear import modelled, tilings
from peft_kernels.triton.lora_linear import plans as lora_plans

op = importlib.import_module("peft_kernels.ops.lora_linear")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("y", "s", "dx", "da", "db")
SCALE = torch.tensor(0.7, dtype=torch.float64)
SEED = torch.tensor(-1234567890123)  # negative: all 64 bits count


class Case:
    """Inputs of a forward and backward, and the same through the reference."""

    def __init__(self, m, n, k, r, dtype=BF16, adapter_dtype=F32, dropout_p=0.3, bias=True):
        torch.manual_seed(m + n + k + r)
        inputs = op.example_inputs(m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype, bias=bias)
        self.x, self.weight = inputs["x"], inputs["weight"]
        self.lora_a, self.lora_b, self.bias = inputs["lora_a"], inputs["lora_b"], inputs.get("bias")
        self.dy = torch.randn(m, n).to(dtype)
        self.dropout_p = dropout_p
        self.seed = SEED if dropout_p else None

    def run(self, fwd, bwd, wide=False) -> dict[str, Tensor]:
        def cast(tensor):
            return tensor.double() if wide and tensor is not None else tensor

        x, weight, a, b = map(cast, (self.x, self.weight, self.lora_a, self.lora_b))
        drop = (self.dropout_p, self.seed)
        y, s = fwd(x, weight, cast(self.bias), a, b, 1.0, SCALE, *drop)
        gradients = bwd(cast(self.dy), x, weight, a, b, s, 1.0, SCALE, *drop, True, True, True)
        return dict(zip(NAMES, (y, s, *gradients), strict=True))

    def triton(self, plan) -> dict[str, Tensor]:
        with lora_plans.force(plan):
            return self.run(launchers.lora_linear_fwd, launchers.lora_linear_bwd)

    def check(self, plan) -> None:
        exact = self.run(op.lora_linear_fwd_ref, op.lora_linear_bwd_ref, wide=True)
        eager = self.run(op.lora_linear_fwd_ref, op.lora_linear_bwd_ref)
        for name, out in self.triton(plan).items():
            assert out.dtype is eager[name].dtype and out.shape == eager[name].shape, name
            limit = max(1.5 * error(eager[name], exact[name]), 1e-6)
            assert error(out, exact[name]) <= limit, name
            assert error(torch.zeros_like(out), exact[name]) > limit, f"{name}: no control"


def error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name in NAMES:
        assert torch.equal(left[name], right[name]), name


def backwards():
    """Runs the programs of a grid in the opposite order."""
    builder = interpreter.InterpreterBuilder
    forwards = builder.set_grid_idx

    def set_grid_idx(self, x, y, z):
        sizes = self.grid_dim
        forwards(self, sizes[0] - 1 - x, sizes[1] - 1 - y, sizes[2] - 1 - z)

    return patch.object(builder, "set_grid_idx", set_grid_idx)


plans = pytest.mark.parametrize("plan", lora_plans.PLANS)


# ---- shapes and dtypes -----------------------------------------------------------------------


@plans
@pytest.mark.parametrize("r", [1, 3, 16, 33, 130])
def test_every_rank(plan, r):
    Case(70, 75, 53, r).check(plan)


@plans
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(F32, F32), (BF16, BF16), (F16, F32), (F16, F16)], ids=str
)
def test_every_dtype(plan, dtype, adapter_dtype):
    Case(70, 75, 53, 18, dtype, adapter_dtype).check(plan)


@plans
@pytest.mark.parametrize("m", [1, 5, 65])
def test_few_rows(plan, m):
    Case(m, 67, 130, 4).check(plan)


@plans
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 131), (131, 1)])
def test_narrow_layers(plan, n, k):
    Case(70, n, k, 2, dropout_p=0.0).check(plan)


@plans
def test_without_bias_and_dropout(plan):
    Case(70, 75, 53, 5, bias=False, dropout_p=0.0).check(plan)


@plans
def test_no_rows(plan):
    out = Case(0, 7, 9, 3).triton(plan)
    assert out["y"].shape == (0, 7) and out["s"].shape == (0, 3) and out["dx"].shape == (0, 9)
    assert not out["da"].any() and out["da"].shape == (3, 9)
    assert not out["db"].any() and out["db"].shape == (7, 3)


@plans
@pytest.mark.parametrize("arch", [*chips.ARCHS, "other"])
@pytest.mark.parametrize("m", [9, 150])
def test_shipped_tiles(plan, arch, m):
    """The tiles that a GPU gets, whose sizes are not those of the case."""
    with patch.object(chips, "arch_name", lambda device: arch):
        Case(m, 140, 150, 20).check(plan)


@pytest.mark.parametrize(("adapter_dtype", "size"), [(F16, 1.0), (F32, 1.0), (F32, 1e-9)], ids=str)
def test_without_tensor_cores(adapter_dtype, size):
    """float16's products on a T4, whose small operands are float32 as they are and aren't scaled.

    An S of 1e-9 would be nothing in float16.
    """
    case = Case(70, 75, 53, 18, F16, adapter_dtype)
    case.lora_a *= size
    with patch.object(chips, "arch_name", lambda device: chips.NO_TENSOR_CORES):
        case.check("library")


@pytest.mark.long
@plans
@pytest.mark.parametrize("m", [40, 150])
def test_a_small_gpu(plan, m):
    """Few programs, each with several blocks of columns and rows; nothing is split."""
    with patch.object(chips, "SAFE", replace(chips.SAFE, cores=1)):
        Case(m, 300, 100, 20).check(plan)


# ---- sums in parts ---------------------------------------------------------------------------


def in_parts(splits):
    """Splits the sums over k of y and dx, whatever the model says."""
    tiling = tilings.tiling
    return patch.object(
        tilings, "tiling", lambda *args: replace(tiling(*args), splits=splits)
    )  # fmt: skip


fused = pytest.mark.parametrize("plan", ["i", "ii"])


@fused
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)], ids=str
)
def test_parts_of_every_dtype(plan, dtype, adapter_dtype):
    """Of 150 columns in blocks of 32 the last of 4 parts has none."""
    with in_parts(4):
        Case(70, 75, 150, 18, dtype, adapter_dtype).check(plan)


@fused
@pytest.mark.parametrize(("m", "r", "splits"), [(1, 64, 2), (5, 33, 8), (9, 1, 4)])
def test_parts_of_few_rows(plan, m, r, splits):
    with in_parts(splits):
        Case(m, 67, 200, r, bias=m > 1, dropout_p=0.3 if m > 1 else 0.0).check(plan)


@fused
def test_parts_of_nothing(plan):
    with in_parts(4):
        out = Case(0, 7, 9, 3).triton(plan)
    assert out["y"].shape == (0, 7) and out["s"].shape == (0, 3) and out["dx"].shape == (0, 9)
    assert not out["da"].any() and not out["db"].any()


@fused
def test_parts_with_a_gain(plan):
    case = Case(20, 35, 150, 20, dropout_p=0.0)
    gain = torch.rand(35) + 0.5
    inputs = case.x, case.weight, case.bias, case.lora_a, case.lora_b
    wide = [tensor.double() for tensor in inputs]
    base = torch.nn.functional.linear(wide[0], wide[1])
    exact = gain.double() * (base + SCALE * wide[0] @ wide[3].T @ wide[4].T) + wide[2]
    with in_parts(4), lora_plans.force(plan):
        y, s = launchers.with_gain(*inputs[:3], gain, *inputs[3:], 1.0, SCALE, 0.0, None)
    assert error(y, exact) < 1.5 * error(exact.to(BF16), exact)
    assert error(s, wide[0] @ wide[3].T) < 1e-6


@fused
def test_parts_are_added_in_one_order(plan):
    case = Case(20, 140, 200, 20)
    with in_parts(4):
        expected = case.triton(plan)
        with backwards():
            assert_same_bits(case.triton(plan), expected)


@fused
def test_parts_of_a_scale_and_seed_on_the_device(plan):
    case = Case(20, 35, 150, 4)
    with in_parts(2):
        expected = case.triton(plan)
        with patch.object(launch, "on_device", lambda tensor: True):
            assert_same_bits(case.triton(plan), expected)


# ---- the same bits ---------------------------------------------------------------------------


@plans
@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=pytest.mark.long)], ids=str)
def test_strides(plan, dtype):
    """Transposed weight (Conv1D), x by columns, adapters and dy out of larger tensors."""
    case = Case(37, 45, 50, 17, dtype)
    expected = case.triton(plan)
    case.weight = case.weight.T.contiguous().T
    case.x = case.x.T.contiguous().T
    case.dy = torch.cat([case.dy, case.dy], dim=1)[:, : case.dy.shape[1]]
    case.lora_a = case.lora_a.repeat_interleave(2, dim=0)[::2]
    case.lora_b = case.lora_b.T.contiguous().T
    case.bias = case.bias.repeat_interleave(2)[::2]
    assert case.weight.stride() == (1, 45) and not case.dy.is_contiguous()
    if plan == "library" and dtype is F32:
        # the library picks another kernel, and with it another order of summation
        for name, out in case.triton(plan).items():
            torch.testing.assert_close(out, expected[name], msg=name)
    else:
        assert_same_bits(case.triton(plan), expected)


@pytest.mark.long
@plans
def test_the_order_of_programs_does_not_matter(plan):
    """A race, or a sum whose order depends on the schedule, would show."""
    case = Case(70, 75, 150, 33)
    expected = case.triton(plan)
    with backwards():
        assert_same_bits(case.triton(plan), expected)


@plans
@pytest.mark.parametrize("scale_dtype", [F32, torch.float64], ids=str)
def test_scale_and_seed_on_the_device(plan, scale_dtype):
    """The kernel loads them itself; here "the device" is the interpreter's memory."""
    case = Case(20, 35, 30, 4)
    expected = case.triton(plan)
    with (
        patch.object(launch, "on_device", lambda tensor: True),
        patch.dict(globals(), SCALE=SCALE.to(scale_dtype)),
    ):
        assert_same_bits(case.triton(plan), expected)


@pytest.mark.parametrize("splits", [2, 8, 16])
@pytest.mark.parametrize("r", [5, 40])
def test_s_in_parts_that_the_last_launch_adds_up(splits, r):
    """More than k has blocks, too: then some are zeros. The bits are those of any repetition."""
    case = Case(70, 72, 136, r)
    with patch.object(modelled, "parts_of_s", lambda *asked: splits):
        case.check("library")
        first, second = case.triton("library"), case.triton("library")
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    assert error(first["s"], case.triton("library")["s"]) < 1e-6


@pytest.mark.parametrize("plan", ["i", "library"])
@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_what_is_needed(plan, needed):
    case = Case(20, 35, 30, 4)
    expected = case.triton(plan)
    needs = [index == needed for index in range(3)]

    def bwd(*args):
        return launchers.lora_linear_bwd(*args[:-3], *needs)

    with lora_plans.force(plan):
        out = case.run(launchers.lora_linear_fwd, bwd)
    for name, wanted in zip(("dx", "da", "db"), needs, strict=True):
        if wanted:
            assert torch.equal(out[name], expected[name]), name
        else:
            assert out[name].numel() == 0, name


# ---- details the sizes above can't reach -----------------------------------------------------


@triton.jit
def _offsets_kernel(base, out, first_row, row_stride, BLOCK: tl.constexpr):
    rows = first_row + tl.arange(0, BLOCK)
    pointers = blocks.pointers(base, rows, rows, row_stride, 1)
    where = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + where, pointers.to(tl.int64) - base.to(tl.int64))


def test_offsets_have_64_bits():
    out = torch.empty(4, 4, dtype=torch.int64)
    first, stride = 87_383, 3 * 12_288
    _offsets_kernel[(1,)](torch.empty(1, dtype=torch.uint8), out, first, stride, BLOCK=4)
    rows = first + torch.arange(4)
    assert torch.equal(out, rows[:, None] * stride + rows)
    assert out.max() > 2**31


@triton.jit
def _rounded_kernel(values, out, BLOCK: tl.constexpr):
    where = tl.arange(0, BLOCK)
    tl.store(out + where, blocks.rounded(tl.load(values + where), tl.bfloat16))


def test_bfloat16_rounding_in_the_interpreter():
    """Its own conversion truncates and loses carries; ours must be torch's."""
    values = torch.tensor([1.0, 1.9999999, -1.0 - 2**-8, 1.0 + 3 * 2**-8, 3e38, 0.0, 1e-40, -7.3])
    out = torch.empty(8, dtype=BF16)
    _rounded_kernel[(1,)](values, out, BLOCK=8)
    assert torch.equal(out, values.to(BF16))


@plans
def test_float16_range(plan):
    """dS of 1e6 and more, which float16 doesn't hold, and S of 1e-6, which it holds badly."""
    case = Case(20, 35, 30, 4, F16, F32, dropout_p=0.0)
    case.lora_b *= 3e6
    case.lora_a *= 1e-7
    case.check(plan)
    assert case.triton(plan)["y"].isfinite().all()


@pytest.mark.parametrize(
    ("plan", "forward", "backward"),
    [
        ("i", {"shrink_kernel", "tile_kernel"}, {"tile_kernel"}),
        ("ii", {"in_loop_kernel"}, {"tile_kernel"}),
        ("library", {"shrink_kernel", "add_low_rank_kernel"}, {"add_low_rank_kernel"}),
    ],
)
@pytest.mark.parametrize("splits", [1, 2])
def test_the_backend_launches_its_kernels(plan, forward, backward, splits):
    """The reference has the same results: that it isn't what ran shows here alone."""
    launched = []

    def run_and_note(kernel, *rest):
        launched.append(kernel.fn.__name__)
        launch_run(kernel, *rest)

    launch_run = launch.run
    inputs = op.example_inputs(20, 35, 30, 4)
    for name in ("x", "lora_a", "lora_b"):
        inputs[name].requires_grad_()
    if splits > 1:
        forward, backward = forward | {"add_low_rank_kernel"}, backward | {"add_low_rank_kernel"}
    note = patch.object(launch, "run", run_and_note)
    with note, in_parts(splits), lora_plans.force(plan), peft_kernels.backend("triton"):
        y = op.lora_linear(**inputs)
        assert set(launched) == forward
        launched.clear()
        y.sum().backward()
    assert set(launched) == backward | {"from_dy_kernel", "grad_a_kernel", "sum_partials_kernel"}
