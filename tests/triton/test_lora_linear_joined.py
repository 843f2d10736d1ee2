"""Terms of float32 operands beside each other in one, as Hopper and Blackwell take them."""

import importlib
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl

from peft_kernels.triton.common import blocks, chips, launch
from peft_kernels.triton.lora_linear import launch as launchers
from peft_kernels.triton.lora_linear import plans as lora_plans

op = importlib.import_module("peft_kernels.ops.lora_linear")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("y", "s", "dx", "da", "db")
SEED = torch.tensor(-1234567890123)


def run(fwd, bwd, inputs, dy):
    seed = SEED
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    a, b = inputs["lora_a"], inputs["lora_b"]
    y, s = fwd(x, weight, bias, a, b, 0.7, None, 0.3, seed)
    gradients = bwd(dy, x, weight, a, b, s, 0.7, None, 0.3, seed, True, True, True)
    return dict(zip(NAMES, (y, s, *gradients), strict=True))


def on(arch, plan, inputs, dy):
    """The results of a chip's kernels, and the slots that each was launched with."""
    slots = {}
    launch_run = launch.run

    def note(kernel, grid, args, options):
        if "SLOTS" in options:
            slots[kernel.fn.__name__] = options["SLOTS"]
        launch_run(kernel, grid, args, options)

    with (
        patch.object(launch, "run", note),
        patch.object(chips, "arch_name", lambda device: arch),
        lora_plans.force(plan),
    ):
        return run(launchers.lora_linear_fwd, launchers.lora_linear_bwd, inputs, dy), slots


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("arch", chips.STAGED)
@pytest.mark.parametrize(
    ("plan", "r", "dtype", "adapter_dtype", "slots"),
    [
        ("i", 5, BF16, F32, (4, 4, 4)),
        ("ii", 16, BF16, F32, (4, 4, 4)),
        ("i", 17, BF16, F32, (4, 1, 4)),
        ("ii", 17, BF16, F32, (1, 1, 4)),
        ("i", 40, BF16, F32, (1, 1, 1)),
        # S and dS are float32, which two bfloat16 hold for a dB and dA in bfloat16
        ("i", 16, BF16, BF16, (1, 2, 2)),
        # float16's are scaled by tile, one after the other
        ("i", 16, F16, F32, (1, 1, 1)),
    ],
)
def test_against_float64(arch, plan, r, dtype, adapter_dtype, slots):
    torch.manual_seed(r)
    inputs = op.example_inputs(70, 75, 150, r, dtype=dtype, adapter_dtype=adapter_dtype)
    dy = torch.randn(70, 75).to(dtype)
    reference = op.lora_linear_fwd_ref, op.lora_linear_bwd_ref
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    exact, eager = run(*reference, wide, dy.double()), run(*reference, inputs, dy)
    found, launched = on(arch, plan, inputs, dy)
    first = "in_loop_kernel" if plan == "ii" else "shrink_kernel"
    assert launched == dict(zip((first, "from_dy_kernel", "grad_a_kernel"), slots, strict=True))
    for name, out in found.items():
        limit = max(1.5 * error(eager[name], exact[name]), 1e-6)
        assert error(out, exact[name]) <= limit, name
        assert error(torch.zeros_like(out), exact[name]) > limit, f"{name}: no control"


def test_other_chips_join_nothing():
    """Their tensor cores take operands from registers."""
    inputs = op.example_inputs(20, 35, 30, 4, dtype=BF16, adapter_dtype=F32)
    for arch in ("sm_80", "gfx942", "other"):
        _, launched = on(arch, "i", inputs, torch.randn(20, 35).to(BF16))
        assert set(launched.values()) == {1}


@triton.jit
def _joined_kernel(values, out, COLUMNS: tl.constexpr, SLOTS: tl.constexpr):
    rows, columns = tl.arange(0, 4), tl.arange(0, COLUMNS)
    tile = tl.load(blocks.pointers(values, rows, columns, COLUMNS, 1))
    wide = blocks.joined(tile, tl.bfloat16, SLOTS)
    added = blocks.added_slots(wide.to(tl.float32), SLOTS)
    tl.store(blocks.pointers(out, rows, columns, COLUMNS, 1), added)


@pytest.mark.parametrize(("slots", "bits"), [(1, 24), (2, 16), (4, 24)])
def test_the_slots_of_a_column_add_up_to_it(slots, bits):
    values, out = torch.randn(4, 8), torch.empty(4, 8)
    _joined_kernel[(1,)](values, out, COLUMNS=8, SLOTS=slots)
    assert ((out - values).abs() <= 2.0**-bits * values.abs()).all()
    assert torch.equal(out, values) or slots == 2
