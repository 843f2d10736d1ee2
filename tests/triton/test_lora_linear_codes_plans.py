"""The Triton kernels over weights in codes against float64, in the interpreter."""

from unittest.mock import patch

import pytest
import torch
from overlapping import overlapping
from random_codes import PLANES, problem, weight_of

import peft_kernels
from peft_kernels.ops import _quantized as op
from peft_kernels.ops import dequantize, lora_linear
from peft_kernels.ops._gguf_blocks import BLOCKS
from peft_kernels.ops.lora_linear import linear_of_codes, lora_linear_bwd_ref, lora_linear_fwd_ref
from peft_kernels.tools.report.traffic import lora_linear_codes as traffic
from peft_kernels.tools.report.traffic.counted import Traffic
from peft_kernels.triton.common import chips, launch
from peft_kernels.triton.lora_linear import plans as lora_plans
from peft_kernels.triton.lora_linear_codes import launch as launchers

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("y", "s", "dx", "da", "db")
SCALE = torch.tensor(0.7, dtype=torch.float64)
SEED = torch.tensor(-1234567890123)
NEEDS = (True, True, True)

plans = pytest.mark.parametrize("plan", lora_plans.CODES_PLANS)


class Case:
    """Inputs of a forward and backward over a weight in codes."""

    def __init__(self, m, n, k, kind, *, r=6, dtype=F32, block=64, dropout_p=0.3, bias=True):
        self.weight = weight_of(n, k, kind=kind, block=block)
        self.x, self.lora_a, self.lora_b, self.bias = problem(m, n, k, dtype, r)
        self.bias = self.bias if bias else None
        self.dy = torch.randn(m, n).to(dtype)
        self.drop = dropout_p, SEED if dropout_p else None

    def triton(self, plan, needs=NEEDS):
        weight, options = op.arguments_of(self.weight), (1.0, SCALE, *self.drop)
        with lora_plans.force(plan):
            y, s = launchers.lora_linear_codes(
                self.x, *weight, self.bias, self.lora_a, self.lora_b, *options
            )
            gradients = launchers.lora_linear_codes_bwd(
                self.dy, self.x, *weight, self.lora_a, self.lora_b, s, *options, *needs
            )
        return dict(zip(NAMES, (y, s, *gradients), strict=True))

    def over(self, weight, wide):
        """The reference over a dense weight."""

        def cast(tensor):
            return tensor.double() if wide and tensor is not None else tensor

        x, weight, a, b = map(cast, (self.x, weight, self.lora_a, self.lora_b))
        options = 1.0, SCALE, *self.drop
        y, s = lora_linear_fwd_ref(x, weight, cast(self.bias), a, b, *options)
        gradients = lora_linear_bwd_ref(cast(self.dy), x, weight, a, b, s, *options, *NEEDS)
        return dict(zip(NAMES, (y, s, *gradients), strict=True))

    def check(self, plan):
        exact = self.over(dequantize(self.weight), wide=True)
        eager = self.over(dequantize(self.weight, self.x.dtype), wide=False)
        for name, out in self.triton(plan).items():
            assert out.dtype is eager[name].dtype and out.shape == eager[name].shape, name
            limit = max(1.5 * error(eager[name], exact[name]), 1e-6)
            assert error(out, exact[name]) <= limit, name
            assert error(torch.zeros_like(out), exact[name]) > limit, f"{name}: no control"


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def assert_same_bits(left, right):
    for name in NAMES:
        assert torch.equal(left[name], right[name]), name


# ---- layouts, shapes, dtypes -------------------------------------------------------------------


@plans
@pytest.mark.parametrize("kind", [*PLANES, *BLOCKS])
@pytest.mark.parametrize("m", [1, 40])
def test_every_layout(plan, kind, m):
    n, k = (37, 70) if kind in PLANES and m > 1 else (13, 256)
    Case(m, n, k, kind).check(plan)


@plans
@pytest.mark.parametrize(
    ("kind", "block", "k"),
    [
        ("flat", 32, 96),  # runs shorter than a tile, and a tail of one
        ("nested", 32, 160),
        ("shifted", 16, 48),
        ("nested", 128, 256),  # a run over several tiles
        ("flat", 96, 192),  # no power of two
        ("flat", 64, 100),  # blocks that begin in the midst of a row
        ("flat", 32, 33),  # rows that begin in the midst of a byte
        ("flat", 4096, 64),  # one scale for all
    ],
)
def test_every_way_that_scales_lie(plan, kind, block, k):
    Case(35, 70, k, kind, block=block).check(plan)


@pytest.mark.parametrize(
    ("weight", "runs"),
    [
        (weight_of(8, 128, kind="nested"), True),
        (weight_of(8, 128, kind="int8"), True),
        (weight_of(8, 128, kind="e4m3"), True),
        (weight_of(8, 96, kind="flat", block=64), False),
        (weight_of(8, 33, kind="flat", block=32), False),
        (weight_of(8, 192, kind="flat", block=96), False),
        (weight_of(16, 32, kind="e4m3 by 16 x 16"), False),
        (weight_of(8, 256, kind="q4_K"), False),
    ],
)
def test_what_lies_in_runs(weight, runs):
    taken = launchers._weight_of(op.arguments_of(weight), weight.shape[1])
    assert taken.constants()["IN_RUNS"] is runs


@plans
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["nested", "int8", "e4m3", "q4_K"])
def test_every_dtype(plan, dtype, kind):
    Case(40, 70, 256, kind, dtype=dtype, r=18).check(plan)


def test_every_code_of_e4m3():
    """The bits are taken apart by hand: older chips have no conversion."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = op.QuantizedWeight(codes.view(2, 128), torch.ones(2), (2, 128), 128)
    taken = launchers._weight_of(op.arguments_of(weight), 128)
    found = launchers.dequantized(taken, F32).flatten()
    torch.testing.assert_close(found, codes.float(), rtol=0, atol=0, equal_nan=True)


@plans
@pytest.mark.parametrize("arch", [*chips.ARCHS, "other"])
@pytest.mark.parametrize("m", [9, 150])
def test_shipped_tiles(plan, arch, m):
    with patch.object(chips, "arch_name", lambda device: arch):
        Case(m, 140, 192, "nested", r=20, dtype=BF16).check(plan)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_where_launches_overlap(dtype):
    """P Q is added last there, and dx is as elsewhere."""
    with overlapping() as seconds:
        Case(40, 70, 128, "nested", dtype=dtype).check("fused")
    assert seconds[-1] == "codes_tile" and seconds.count("codes_tile") == 1


@plans
def test_ranks_of_several_blocks(plan):
    Case(20, 35, 64, "nested", r=70).check(plan)


@plans
def test_the_base_alone(plan):
    """Rank 0, as an adapter that is off has it."""
    weight = weight_of(35, 64, kind="nested")
    x, _, _, bias = problem(9, 35, 64)
    x.requires_grad_()
    with lora_plans.force(plan), peft_kernels.backend("triton"):
        found = linear_of_codes(x, weight, bias)
        (dx,) = torch.autograd.grad(found, x, dy := torch.randn(9, 35))
    torch.testing.assert_close(found, torch.nn.functional.linear(x, dequantize(weight), bias))
    torch.testing.assert_close(dx, dy @ dequantize(weight))


@plans
def test_without_bias_and_dropout(plan):
    Case(20, 35, 64, "nested", dropout_p=0.0, bias=False).check(plan)


@plans
def test_no_rows(plan):
    out = Case(0, 7, 64, "nested").triton(plan)
    assert out["y"].shape == (0, 7) and out["dx"].shape == (0, 64)
    assert not out["da"].any() and not out["db"].any()


# ---- the same bits -------------------------------------------------------------------------------


@plans
def test_strides(plan):
    case = Case(37, 45, 64, "nested", r=17)
    expected = case.triton(plan)
    case.x = case.x.T.contiguous().T
    case.dy = torch.cat([case.dy, case.dy], dim=1)[:, : case.dy.shape[1]]
    case.lora_a = case.lora_a.repeat_interleave(2, dim=0)[::2]
    case.lora_b = case.lora_b.T.contiguous().T
    case.bias = case.bias.repeat_interleave(2)[::2]
    for name, out in case.triton(plan).items():
        torch.testing.assert_close(out, expected[name], msg=name)


@plans
def test_scale_and_seed_on_the_device(plan):
    case = Case(20, 35, 64, "nested")
    expected = case.triton(plan)
    with patch.object(launch, "on_device", lambda tensor: True):
        assert_same_bits(case.triton(plan), expected)


@plans
@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_what_is_needed(plan, needed):
    case = Case(20, 35, 64, "nested")
    expected = case.triton(plan)
    out = case.triton(plan, [index == needed for index in range(3)])
    for index, name in enumerate(("dx", "da", "db")):
        if index == needed:
            assert torch.equal(out[name], expected[name]), name
        else:
            assert out[name].numel() == 0, name


# ---- what runs, and what it moves ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "forward", "backward"),
    [
        ("fused", {"shrink_kernel", "codes_tile_kernel"}, {"codes_tile_kernel"}),
        ("scratch", {"dequantize_kernel"}, {"dequantize_kernel"}),
    ],
)
def test_the_backend_launches_its_kernels(plan, forward, backward):
    """The reference has the same results: that it isn't what ran shows here alone."""
    launched = []

    def run_and_note(kernel, *rest):
        launched.append(kernel.fn.__name__)
        launch_run(kernel, *rest)

    launch_run = launch.run
    weight = weight_of(35, 64)
    x, a, b, _ = (tensor.requires_grad_() for tensor in problem(20, 35, 64))
    note = patch.object(launch, "run", run_and_note)
    with note, lora_plans.force(plan), peft_kernels.backend("triton"):
        y = lora_linear(x, weight, a, b)
        assert forward <= set(launched)
        launched.clear()
        y.sum().backward()
    assert backward <= set(launched) and {"from_dy_kernel", "grad_a_kernel"} <= set(launched)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_traffic(kind):
    """Widened in the tile, bytes moved are near the floor; a scratch is written and read beyond."""
    sizes = 16, 128, 256, 8
    weight = 2 * 128 * 256  # in bfloat16
    fused, scratch = (traffic.count(plan, kind, *sizes) for plan in lora_plans.CODES_PLANS)
    for one, other in zip(fused, scratch, strict=True):
        assert one.atomics == other.atomics == 0
        assert other.bytes_moved - other.bytes_floor > 1.9 * weight
        assert one.bytes_moved - one.bytes_floor < weight


def test_traffic_is_that_of_the_sizes_alone():
    """What is compared with a record can't depend on which entries of a book random codes need."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(traffic.count("fused", "nf4", 16, 128, 256, 8))
    assert found[0] == found[1] == found[2]


def test_fused_reads_each_code_once_and_writes_no_weight():
    case = Case(16, 70, 256, "nested", dtype=BF16, dropout_p=0.0)
    with Traffic() as seen:
        case.triton("fused")
    codes = [access for access in seen.of(case.weight.codes) if access.argument == "codes"]
    assert [access.read for access in codes] == [70 * 256 // 2] * 2  # forward and backward
    assert [access.requests for access in codes] == [70 * 256 // 2] * 2
    written = {access.shape for access in seen.accesses if access.written}
    assert (70, 256) not in written and (256, 70) not in written
    with Traffic() as seen:
        case.triton("scratch")
    assert any(access.shape == (70, 256) for access in seen.accesses if access.written)
