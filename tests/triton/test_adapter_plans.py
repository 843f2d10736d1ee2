"""The Triton kernels of adapter, in the interpreter: each result against float64."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from errors import assert_as_good_as
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import peft_kernels
from peft_kernels.ops import _activations, adapter
from peft_kernels.ops import _adapter_reference as reference
from peft_kernels.ops._activations import ACTIVATIONS
from peft_kernels.ops.adapter import example_inputs
from peft_kernels.triton.adapter import launch as launchers
from peft_kernels.triton.common import activations, chips, launch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "f16": (F16, F16)}
DTYPES |= {"bf16/f32": (BF16, F32), "f16/f32": (F16, F32)}
KINDS = {
    "update": {"residual": False},
    "houlsby": {"norm": True},
    "before and after": {"norm": True, "pre_norm": True, "residual": False},
    "before": {"pre_norm": True},
    "without biases": {"bias": False},
}
SEED = torch.tensor(-1234567890123)  # negative: all 64 bits count


def inputs_of(m, k, r, n=None, *, kind="houlsby", dtypes="f32", scale="number"):
    dtype, adapter_dtype = DTYPES[dtypes]
    torch.manual_seed(m + k + r)
    inputs = example_inputs(
        m, k, r, n, dtype=dtype, adapter_dtype=adapter_dtype, **KINDS[kind]
    )  # fmt: skip
    n = k if n is None else n
    scales = {"number": 1.7, "learned": torch.full((1,), 1.3), "channel": torch.rand(n) + 0.5}
    factor = scales[scale]
    inputs["scale"] = factor.to(adapter_dtype) if isinstance(factor, torch.Tensor) else factor
    return inputs


def run(inputs, backend, *, adds_x=False, needed=None, **options):
    """y and the gradient of every tensor, or of the ``needed`` one, by name."""
    leaves = {
        name: value.detach().requires_grad_(needed in (None, name))
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
    arguments = {**inputs, **leaves}
    residual = arguments.pop("residual", None)
    terms = ((arguments["x"],) if adds_x else ()) + (() if residual is None else (residual,))
    with peft_kernels.backend(backend):
        y = adapter(**arguments, residual=terms or None, **options)
    receivers = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    gradients = torch.autograd.grad(y, list(receivers.values()), dy)
    return {"y": y.detach()} | dict(zip(receivers, gradients, strict=True))


def check(inputs, **options):
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    exact = run(wide, "reference", **options)
    eager = run(inputs, "reference", **options)
    for name, out in run(inputs, "triton", **options).items():
        assert out.dtype is eager[name].dtype, name
        assert_as_good_as(out, eager[name], exact[name], name)


def assert_same_bits(left, right):
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- against float64 -------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind, dtypes):
    inputs = inputs_of(37, 45, 19, kind=kind, dtypes=dtypes)
    check(inputs, adds_x=kind != "update", activation="relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    inputs = inputs_of(20, 33, 21, kind="before")
    inputs["x"] *= 4
    check(inputs, activation=activation)


# Where exp overflows and tails vanish, a result must neither be NaN nor lose its sign.
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(activation):
    z = [-1e4, -100.0, -88.5, -20.0, -6.0, -0.29, -1e-3, 0.0, 1e-3, 0.31, 6.0, 20.0, 88.5, 1e4]
    x = torch.eye(len(z)).requires_grad_()
    function, derivative = ACTIVATIONS[activation]
    z = torch.tensor(z)
    with peft_kernels.backend("triton"):
        y = adapter(x, torch.diag(z), None, torch.eye(len(z)), None, activation=activation)
        (dx,) = torch.autograd.grad(y.diagonal().sum(), x)
    exact = function(z.double())
    torch.testing.assert_close(y.diagonal().double(), exact, rtol=1e-5, atol=1e-7)
    slope = derivative(z.double()) * z
    torch.testing.assert_close(dx.diagonal().double(), slope, rtol=1e-5, atol=1e-6)


def test_the_slope_is_the_reference_s():
    assert activations.LEAKY_SLOPE.value == _activations.LEAKY_SLOPE


@pytest.mark.parametrize("r", [1, 3, 40, 150])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16/f32"])
def test_every_rank(r, dtypes):
    inputs = inputs_of(37, 45, r, 35, kind="before and after", dtypes=dtypes)
    check(inputs, activation="gelu")


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 1, 33), (70, 131, 1), (3, 67, 130)])
@pytest.mark.parametrize("kind", ["update", "before and after"])
def test_odd_sizes(m, k, n, kind):
    # The deviation of one column is nothing, which LayerNorm then divides by.
    check(inputs_of(m, k, 2, n, kind=kind), norm_eps=0.1, pre_norm_eps=0.1)


@pytest.mark.parametrize("dtypes", ["f32", "bf16/f32"])
@pytest.mark.parametrize("scale", ["number", "learned", "channel"])
@pytest.mark.parametrize("kind", ["houlsby", "before"])
def test_scales_and_dropout(scale, kind, dtypes):
    inputs = inputs_of(21, 34, 7, kind=kind, dtypes=dtypes, scale=scale)
    check(inputs, adds_x=True, dropout_p=0.3, seed=SEED)


def test_rows_off_zero():
    """A mean of 3 deviations; at 100 the folded pre_norm has 4 times the error of eager."""
    inputs = inputs_of(9, 200, 6, kind="before and after")
    inputs["x"] += 3
    check(inputs, adds_x=True)


@pytest.mark.parametrize("arch", [*chips.ARCHS, "other"])
@pytest.mark.parametrize("dtypes", ["bf16", "bf16/f32"])
def test_shipped_tiles(arch, dtypes):
    with patch.object(chips, "arch_name", lambda device: arch):
        check(inputs_of(70, 75, 20, kind="houlsby", dtypes=dtypes), adds_x=True)


@pytest.mark.long
def test_a_small_gpu():
    """Few programs, each with several blocks of rows; nothing is split."""
    with patch.object(chips, "SAFE", replace(chips.SAFE, cores=1)):
        check(inputs_of(150, 70, 9, kind="before and after"))


def test_a_zero_gradient_would_fail():
    inputs = inputs_of(12, 20, 4, kind="before and after", scale="channel")
    wide = {name: value.double() for name, value in inputs.items()}
    out, exact = run(inputs, "triton"), run(wide, "reference")
    for name in out:
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[name]), out[name], exact[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    out = run(inputs_of(0, 7, 3, kind=kind, scale="channel"), "triton")
    assert out["y"].shape == (0, 7) and out["x"].shape == (0, 7)
    for name, gradient in out.items():
        assert not gradient.any(), name


# ---- the same bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", ["f32", pytest.param("bf16", marks=pytest.mark.long)])
def test_strides(dtypes):
    inputs = inputs_of(21, 34, 70, kind="before and after", dtypes=dtypes, scale="channel")
    inputs["residual"] = torch.randn(21, 34).to(inputs["x"].dtype)
    expected = run(inputs, "triton", adds_x=True)
    views = {
        name: value.T.contiguous().T if value.dim() == 2 else value.repeat_interleave(2)[::2]
        for name, value in inputs.items()
    }
    views["residual"] = inputs["residual"].repeat_interleave(2, 0)[::2]
    assert_same_bits(run(views, "triton", adds_x=True), expected)
    views["x"] = inputs["x"].repeat_interleave(2, 1)[:, ::2]
    assert_same_bits(run(views, "triton", adds_x=True), expected)


@pytest.mark.long
@pytest.mark.parametrize("dtypes", ["f32", "bf16/f32"])
def test_the_order_of_programs_does_not_matter(dtypes):
    """A race, or a sum whose order depends on the schedule, would show; so would chance."""
    inputs = inputs_of(70, 40, 70, kind="before and after", dtypes=dtypes)
    expected = run(inputs, "triton", dropout_p=0.3, seed=SEED)
    assert_same_bits(run(inputs, "triton", dropout_p=0.3, seed=SEED), expected)
    builder = interpreter.InterpreterBuilder
    forwards = builder.set_grid_idx

    def backwards(self, x, y, z):
        sizes = self.grid_dim
        forwards(self, sizes[0] - 1 - x, sizes[1] - 1 - y, sizes[2] - 1 - z)

    with patch.object(builder, "set_grid_idx", backwards):
        assert_same_bits(run(inputs, "triton", dropout_p=0.3, seed=SEED), expected)


@pytest.mark.parametrize("scale", ["number", "learned"])
def test_scale_and_seed_on_the_device(scale):
    """The kernels load them themselves; here "the device" is the interpreter's memory."""
    inputs = inputs_of(20, 35, 4, scale=scale)
    expected = run(inputs, "triton", dropout_p=0.3, seed=SEED)
    with patch.object(launch, "on_device", lambda tensor: True):
        assert_same_bits(run(inputs, "triton", dropout_p=0.3, seed=SEED), expected)


@pytest.mark.parametrize("kind", ["before and after", "update"])
def test_each_gradient_alone(kind):
    inputs = inputs_of(20, 17, 4, kind=kind, scale="channel")
    inputs["residual"] = torch.randn(20, 17)
    expected = run(inputs, "triton")
    for name in inputs:
        out = run(inputs, "triton", needed=name)
        assert set(out) == {"y", name}
        assert_same_bits(out, {key: expected[key] for key in out})


# ---- no wait for the device ------------------------------------------------------------------


class _NoCopyToTheHost(TorchDispatchMode):
    """Fails where a value of a tensor would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(("_local_scalar_dense", "nonzero", "equal")), name
        assert name != "_to_copy" or (kwargs or {}).get("device") is None, "a copy between devices"
        return func(*args, **(kwargs or {}))


def test_nothing_is_copied_to_the_host(monkeypatch):
    original = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        # The mode rests while the interpreter plays the GPU, and reads tensors itself.
        with torch.utils._python_dispatch._disable_current_modes():
            return original(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    monkeypatch.setattr(launch, "on_device", lambda tensor: True)
    a = inputs_of(12, 16, 4, kind="before and after")
    dy = torch.randn(12, 16)
    for scale in (torch.tensor(0.7), torch.rand(16)):
        inputs = (
            a["x"], dy, a["down_weight"], a["down_bias"], a["up_weight"], a["up_bias"], 1.0, scale,
            a["pre_norm_weight"], a["pre_norm_bias"], 1e-5, a["norm_weight"], a["norm_bias"], 1e-5,
        )  # fmt: skip
        options = ("gelu", True, 0.3, SEED)
        with _NoCopyToTheHost():
            _, z, statistics = launchers.adapter_fwd(*inputs, *options)
            launchers.adapter_bwd(dy, *inputs, z, statistics, *options, *(True,) * 6)


def test_launchers_keep_the_schema():
    """Outputs' shapes and dtypes are those that the op declares, for any needs."""
    a = inputs_of(5, 6, 3, kind="before and after", dtypes="bf16/f32")
    inputs = (
        a["x"], None, a["down_weight"], a["down_bias"], a["up_weight"], a["up_bias"],
        2.0, None, a["pre_norm_weight"], a["pre_norm_bias"], 1e-5, a["norm_weight"],
        a["norm_bias"], 1e-5,
    )  # fmt: skip
    options = ("gelu", True, 0.25, SEED)
    forward = launchers.adapter_fwd(*inputs, *options)
    for out, expected in zip(forward, reference.fwd_fake(*inputs, *options), strict=True):
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    dy = torch.randn(5, 6).to(BF16)
    for needs in [(True,) * 6, (False, True) * 3, (True, False) * 3, (False,) * 6]:
        arguments = (dy, *inputs, *forward[1:], *options, *needs)
        outs, fakes = launchers.adapter_bwd(*arguments), reference.bwd_fake(*arguments)
        for index, (out, expected) in enumerate(zip(outs, fakes, strict=True)):
            assert (out.shape, out.dtype) == (expected.shape, expected.dtype), (needs, index)


def test_the_backend_launches_its_kernels():
    """The reference has the same results: that it isn't what ran shows here alone."""
    launched = []

    def run_and_note(kernel, *rest):
        launched.append(kernel.fn.__name__)
        launch_run(kernel, *rest)

    launch_run = launch.run
    with patch.object(launch, "run", run_and_note):
        check(inputs_of(9, 12, 5, kind="houlsby"), adds_x=True)
    assert {
        "adapter_fwd_kernel",
        "adapter_norm_bwd_kernel",
        "adapter_bwd_kernel",
        "adapter_up_kernel",
    } <= set(launched)
