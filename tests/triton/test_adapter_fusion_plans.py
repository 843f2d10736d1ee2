"""The Triton kernels of adapter_fusion, in the interpreter: each result against float64."""

import importlib
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from errors import assert_as_good_as
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import peft_kernels
from peft_kernels.ops._activations import ACTIVATIONS
from peft_kernels.ops.adapter_fusion import Absorbed, adapter_fusion
from peft_kernels.triton.adapter_fusion import launch as launchers
from peft_kernels.triton.common import chips, launch

op = importlib.import_module("peft_kernels.ops.adapter_fusion")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "f16": (F16, F16)}
DTYPES |= {"bf16/f32": (BF16, F32), "f16/f32": (F16, F32)}
SIZES = [(3,), (4, 4), (1, 7, 16, 2)]
PARAMETERS = (
    "down_weight", "down_bias", "score_weight", "score_bias", "mix_weight", "mix_bias",
)  # fmt: skip


def inputs_of(m, k, sizes, *, d=None, n=None, residual=False, dtypes="f32"):
    """The tensors of the op by name, but that the adapters' down-projections are one."""
    dtype, adapter_dtype = DTYPES[dtypes]
    n, width, ranks, adapters = n or k, d or k, sum(sizes), len(sizes)
    mix = (torch.randn(n, ranks + adapters) * max(sizes) ** -0.5).to(adapter_dtype)
    found = {
        "x": torch.randn(m, k).to(dtype),
        "down_weight": (torch.randn(ranks, k) * k**-0.5).to(adapter_dtype),
        "down_bias": torch.randn(ranks).to(adapter_dtype),
        "score_weight": (torch.randn(ranks + adapters, width) * (width * max(sizes)) ** -0.5).to(
            adapter_dtype
        ),
        "score_bias": (torch.randn(ranks + adapters) * 0.3).to(adapter_dtype),
        "mix_weight": mix[:, :ranks],
        "mix_bias": mix[:, ranks:].T,
    }
    found |= {} if d is None else {"query": torch.randn(m, d).to(dtype)}
    return found | ({"residual": torch.randn(m, n).to(dtype)} if residual else {})


def run(inputs, sizes, backend, *, needed=None, activation="gelu"):
    """y, p and the gradient of every tensor, or of the ``needed`` one, by name."""
    leaves = {
        name: tensor.detach().requires_grad_(needed in (None, name))
        for name, tensor in inputs.items()
    }
    with peft_kernels.backend(backend):
        y, p = adapter_fusion(
            leaves["x"],
            leaves["down_weight"].split(list(sizes)),
            leaves["down_bias"].split(list(sizes)),
            Absorbed(*(leaves[name] for name in PARAMETERS[2:])),
            query=leaves.get("query"),
            residual=leaves.get("residual"),
            activation=activation,
        )
    receivers = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    gradients = torch.autograd.grad(y, list(receivers.values()), dy)
    return {"y": y.detach(), "p": p} | dict(zip(receivers, gradients, strict=True))


def check(inputs, sizes, **options):
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    exact = run(wide, sizes, "reference", **options)
    eager = run(inputs, sizes, "reference", **options)
    for name, out in run(inputs, sizes, "triton", **options).items():
        assert out.dtype is eager[name].dtype, name
        if name == "p" or len(sizes) > 1 or not name.startswith("score"):
            assert_as_good_as(out, eager[name], exact[name], name)
        else:  # of one adapter the softmax is 1, and nothing reaches its score but rounding
            torch.testing.assert_close(out, eager[name], rtol=0, atol=1e-4)


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- against float64 -------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("d", "residual"), [(None, False), (23, True)])
@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_against_float64(sizes, d, residual, dtypes):
    check(inputs_of(20, 45, sizes, d=d, residual=residual, dtypes=dtypes), sizes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(inputs_of(20, 33, (5, 8)), (5, 8), activation=activation)


@pytest.mark.parametrize(
    ("sizes", "dtypes"), [((70, 3, 90), "f32"), ((70, 3, 90), "bf16"), ((1,) * 17, "f16/f32")]
)
def test_many_columns_and_adapters(sizes, dtypes):
    """More than one block of each."""
    check(inputs_of(17, 35, sizes, n=70, dtypes=dtypes), sizes)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 1, 33), (70, 131, 1), (3, 67, 130)])
def test_odd_sizes(m, k, n):
    check(inputs_of(m, k, (2, 3), n=n, d=7, residual=True), (2, 3))


def test_scores_far_apart():
    """exp of a difference of scores neither overflows nor makes a NaN."""
    inputs = inputs_of(9, 20, (4, 4, 2))
    inputs["score_bias"][-3:] = torch.tensor([300.0, -300.0, 299.0])
    check(inputs, (4, 4, 2))


@pytest.mark.parametrize("arch", [*chips.ARCHS, "other"])
@pytest.mark.parametrize("dtypes", ["bf16", "bf16/f32"])
def test_shipped_tiles(arch, dtypes):
    with patch.object(chips, "arch_name", lambda device: arch):
        check(inputs_of(70, 75, (20, 9), residual=True, dtypes=dtypes), (20, 9))


@pytest.mark.long
def test_a_small_gpu():
    """Few programs, each with several blocks of rows; nothing is split."""
    with patch.object(chips, "SAFE", replace(chips.SAFE, cores=1)):
        check(inputs_of(100, 70, (9, 8)), (9, 8))


def test_many_rows():
    """M is copied to aligned rows."""
    with patch.object(launchers, "MANY_ROWS", 20):
        check(inputs_of(20, 20, (5, 6), dtypes="bf16"), (5, 6))


def test_a_zero_gradient_would_fail():
    inputs = inputs_of(12, 20, (4, 5), d=8, residual=True)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    out, exact = run(inputs, (4, 5), "triton"), run(wide, (4, 5), "reference")
    for name in out:
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[name]), out[name], exact[name], name)


@pytest.mark.parametrize("d", [None, 5])
def test_no_rows(d):
    out = run(inputs_of(0, 7, (3, 2), d=d, residual=True), (3, 2), "triton")
    assert out["y"].shape == (0, 7) and out["p"].shape == (0, 2)
    for name, gradient in out.items():
        assert not gradient.any(), name


# ---- the same bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", ["f32", pytest.param("bf16", marks=pytest.mark.long)])
def test_strides(dtypes):
    inputs = inputs_of(21, 34, (70, 5), d=30, residual=True, dtypes=dtypes)
    expected = run(inputs, (70, 5), "triton")
    views = {
        name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor.repeat_interleave(2)[::2]
        for name, tensor in inputs.items()
    }
    assert_same_bits(run(views, (70, 5), "triton"), expected)
    views = {name: tensor.contiguous() for name, tensor in inputs.items()}
    for name in ("x", "query", "residual"):
        views[name] = inputs[name].repeat_interleave(2, 1)[:, ::2]
    assert_same_bits(run(views, (70, 5), "triton"), expected)


@pytest.mark.long
@pytest.mark.parametrize("dtypes", ["f32", "bf16/f32"])
def test_the_order_of_programs_does_not_matter(dtypes):
    """A race, or a sum whose order depends on the schedule, would show; so would chance."""
    inputs = inputs_of(40, 40, (70, 5), dtypes=dtypes)
    expected = run(inputs, (70, 5), "triton")
    assert_same_bits(run(inputs, (70, 5), "triton"), expected)
    builder = interpreter.InterpreterBuilder
    forwards = builder.set_grid_idx

    def backwards(self, x, y, z):
        sizes = self.grid_dim
        forwards(self, sizes[0] - 1 - x, sizes[1] - 1 - y, sizes[2] - 1 - z)

    with patch.object(builder, "set_grid_idx", backwards):
        assert_same_bits(run(inputs, (70, 5), "triton"), expected)


@pytest.mark.parametrize("d", [None, 9])
def test_each_gradient_alone(d):
    inputs = inputs_of(20, 17, (4, 3), d=d, residual=True)
    expected = run(inputs, (4, 3), "triton")
    for name in inputs:
        out = run(inputs, (4, 3), "triton", needed=name)
        assert set(out) == {"y", "p", name}
        assert_same_bits(out, {key: expected[key] for key in out})


# ---- no wait for the device, and the schema --------------------------------------------------


def arguments_of(inputs, sizes):
    tensors = [inputs.get(name) for name in ("x", "query", *PARAMETERS)]
    return *tensors, list(sizes), "gelu"


class _NoCopyToTheHost(TorchDispatchMode):
    """Fails where a value of a tensor would have to be waited for, or brought to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh")
        assert not name.startswith(waits), name
        assert name != "_to_copy" or (kwargs or {}).get("device") is None, "a copy between devices"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(monkeypatch):
    original = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        # The mode rests while the interpreter plays the GPU, and reads tensors itself.
        with torch.utils._python_dispatch._disable_current_modes():
            return original(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    arguments = arguments_of(inputs_of(12, 16, (4, 2), d=5), (4, 2))
    dy = torch.randn(12, 16)
    launchers.adapter_fusion_fwd(*arguments, dy)  # brings the adapters' columns
    with _NoCopyToTheHost():
        _, *saved = launchers.adapter_fusion_fwd(*arguments, dy)
        launchers.adapter_fusion_bwd(dy, *arguments, *saved, *(True,) * 5)


@pytest.mark.parametrize("d", [None, 4])
def test_launchers_keep_the_schema(d):
    """Outputs' shapes, dtypes and strides are those that the op declares, for any needs."""
    arguments = arguments_of(inputs_of(5, 6, (3, 2), d=d, n=7, dtypes="bf16/f32"), (3, 2))
    forward = launchers.adapter_fusion_fwd(*arguments, None)
    for out, expected in zip(forward, op._fwd_fake(*arguments, None), strict=True):
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    dy = torch.randn(5, 7).to(BF16)
    everything = launchers.adapter_fusion_bwd(
        dy, *arguments, *forward[1:], True, d is not None, *(True,) * 3
    )
    for bits in range(32):
        needs = [bool(bits >> i & 1) for i in range(5)]
        if needs[1] and d is None:
            continue
        outs = launchers.adapter_fusion_bwd(dy, *arguments, *forward[1:], *needs)
        fakes = op._bwd_fake(dy, *arguments, *forward[1:], *needs)
        for index, (out, expected) in enumerate(zip(outs, fakes, strict=True)):
            assert (out.shape, out.dtype) == (expected.shape, expected.dtype), (needs, index)
            assert out.stride() == expected.stride(), (needs, index)
            assert out.numel() == 0 or torch.equal(out, everything[index]), (needs, index)


def test_the_backend_launches_its_kernels():
    """The reference has the same results: that it isn't what ran shows here alone."""
    launched = []

    def run_and_note(kernel, *rest):
        launched.append(kernel.fn.__name__)
        launch_run(kernel, *rest)

    launch_run = launch.run
    with patch.object(launch, "run", run_and_note):
        check(inputs_of(9, 12, [3, 4]), [3, 4])
    assert {
        "adapter_fusion_products_kernel",
        "adapter_fusion_mix_kernel",
        "adapter_fusion_grad_kernel",
    } <= set(launched)
