"""The plan whose programs stay on their cores and read by descriptors, in the interpreter."""

import importlib
from unittest.mock import patch

import pytest
import torch

from peft_kernels.tools.report.traffic import lora_linear as traffic
from peft_kernels.triton.common import chips, launch
from peft_kernels.triton.dora_linear import launch as dora_launchers
from peft_kernels.triton.lora_linear import calls, persistent, tuning
from peft_kernels.triton.lora_linear import launch as launchers
from peft_kernels.triton.lora_linear import plans as lora_plans

op = importlib.import_module("peft_kernels.ops.lora_linear")
dora = importlib.import_module("peft_kernels.ops.dora_linear")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SEED = torch.tensor(-1234567890123)
CHIPS = pytest.mark.parametrize("chip", persistent.WIDE)
PERSISTENT = "persistent_kernel"


def inputs_of(m, n, k, r, dtype=BF16, adapter_dtype=F32):
    torch.manual_seed(m + n + k + r)
    inputs = op.example_inputs(m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype)
    return inputs | {"dy": torch.randn(m, n).to(dtype)}


def run(fwd, bwd, inputs, dropout_p):
    x, weight, bias, dy = (inputs[name] for name in ("x", "weight", "bias", "dy"))
    a, b = inputs["lora_a"], inputs["lora_b"]
    options = 0.7, None, dropout_p, SEED if dropout_p else None
    y, s = fwd(x, weight, bias, a, b, *options)
    return y, s, *bwd(dy, x, weight, a, b, s, *options, True, True, True)


def by_triton(inputs, dropout_p=0.0, chip="sm_90", plan="persistent"):
    """The results, and the names of the kernels that made them."""
    names, original = [], launch.run

    def record(kernel, *args):
        names.append(kernel.__name__)
        original(kernel, *args)

    arch = patch.object(chips, "arch_name", lambda device: chip)
    with arch, patch.object(launch, "run", record), lora_plans.force(plan):
        found = run(launchers.lora_linear_fwd, launchers.lora_linear_bwd, inputs, dropout_p)
    return found, names


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def check(inputs, dropout_p=0.0, chip="sm_90"):
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    exact = run(op.lora_linear_fwd_ref, op.lora_linear_bwd_ref, wide, dropout_p)
    eager = run(op.lora_linear_fwd_ref, op.lora_linear_bwd_ref, inputs, dropout_p)
    found, names = by_triton(inputs, dropout_p, chip)
    assert names.count(PERSISTENT) == 2  # y and dx
    for out, right, plain in zip(found, exact, eager, strict=True):
        limit = max(1.5 * error(plain, right), 1e-6)
        assert out.dtype is plain.dtype and out.shape == plain.shape
        assert error(out, right) <= limit
        assert error(torch.zeros_like(out), right) > limit, "no control"


@CHIPS
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(BF16, F32), (BF16, BF16), (F16, F32)])
def test_against_float64(chip, dtype, adapter_dtype, dropout_p):
    check(inputs_of(140, 264, 72, 5, dtype, adapter_dtype), dropout_p, chip)


@pytest.mark.parametrize("sizes", [(1, 8, 8, 1), (130, 520, 136, 33), (5, 16, 200, 70)])
def test_sizes(sizes):
    check(inputs_of(*sizes), 0.3)


def test_fewer_programs_than_tiles_take_one_after_the_other():
    inputs, results = inputs_of(300, 520, 72, 5), []
    x, w, b = inputs["x"], inputs["weight"].T, inputs["lora_b"]
    with patch.object(chips, "arch_name", lambda device: "sm_90"):
        call = calls.call_of("fwd", x, 520, inputs["lora_a"], 0.0, None)
        s = launchers.shrink(call, x, inputs["lora_a"])
        for call.cores in (1, 2, 132):
            y = torch.full((300, 520), torch.nan, dtype=BF16)
            persistent.tile(call, x, w, inputs["bias"], None, s, b.T, y, 0.7, masked=False)
            results.append(y)
    exact = op.lora_linear_fwd_ref(
        x, w.T, inputs["bias"], inputs["lora_a"], b, 0.7, None, 0.0, None
    )
    assert error(results[0], exact[0].double()) < 4e-3
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_gain():
    inputs = dora.example_inputs(40, 72, 136, 4, dtype=BF16)
    norm = dora.dora_norm(inputs["weight"], inputs["lora_a"], inputs["lora_b"])
    gain = inputs.pop("magnitude").float() / norm
    given = [inputs[name] for name in ("x", "weight", "bias", "lora_a", "lora_b")]
    exact, _ = dora.dora_linear_fwd_ref(
        *(t.double() for t in given), gain.double(), 0.7, None, 0.0, None
    )
    arch = patch.object(chips, "arch_name", lambda device: "sm_90")
    with arch, lora_plans.force("persistent"):
        y, _ = dora_launchers.dora_linear_fwd(*given, gain, 0.7, None, 0.0, None)
    assert error(y, exact) < 4e-3


def test_what_descriptors_cannot_say_is_the_other_tiles():
    """Strides that aren't of 16 bytes, and a weight that is the transpose of another."""
    odd = inputs_of(20, 27, 35, 3)
    found, names = by_triton(odd)
    assert PERSISTENT not in names
    for one, other in zip(found, by_triton(odd, plan="i")[0], strict=True):
        assert torch.equal(one, other)
    inputs = inputs_of(20, 24, 40, 3)
    transposed = inputs | {"weight": inputs["weight"].T.contiguous().T}
    found, names = by_triton(transposed)
    assert names.count(PERSISTENT) == 2  # W^T lies as W does for dx
    for one, other in zip(found, by_triton(inputs)[0], strict=True):
        torch.testing.assert_close(one, other)
    shifted = torch.empty(20 * 40 + 1).to(BF16)[1:].view(20, 40).copy_(inputs["x"])
    assert by_triton(inputs | {"x": shifted})[1].count(PERSISTENT) == 1  # dx


def test_who_takes_it():
    case = lora_plans.Problem("fwd", BF16, BF16, 64, 64, 64, 8, False)
    assert [chip for chip in chips.ARCHS if "persistent" in case.able(chip)] == ["sm_90", "sm_100"]
    wide = lora_plans.Problem("fwd", F32, F32, 64, 64, 64, 8, False)
    assert "persistent" not in wide.able("sm_90")
    coded = lora_plans.Problem("fwd", BF16, BF16, 64, 64, 64, 8, False, "int8")
    assert "persistent" not in coded.able("sm_90")
    for m in (1, 64, 4096):
        many = lora_plans.Problem("fwd", BF16, BF16, m, 4096, 4096, 8, False)
        assert lora_plans.default_plan("sm_90", many) != "persistent"


def test_it_is_measured_among_the_others():
    inputs, asked = inputs_of(8, 8, 8, 2), []

    def find(device, bucket, able, run):
        asked.append(able)
        return tuning.Found("i", 0.0)

    given = [inputs[name] for name in ("x", "weight", "bias", "lora_a", "lora_b")]
    arch = patch.object(chips, "arch_name", lambda device: "sm_100")
    with arch, patch.object(tuning, "find", find):
        launchers.lora_linear_fwd(*given, 1.0, None, 0.0, None)
    assert "persistent" in asked[0]


def test_its_traffic_is_that_of_the_other_tiles():
    sizes = 140, 272, 152, 20
    for row, other in zip(
        traffic.count("persistent", *sizes), traffic.count("i", *sizes), strict=True
    ):
        assert row.extra_passes == other.extra_passes and row.launches == other.launches
        assert row.bytes_moved == other.bytes_moved
