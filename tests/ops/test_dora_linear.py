"""dora_linear: every backend against float64, the norm, gradients, dropout, strides, errors."""

import functools

import pytest
import torch
import torch.nn.functional as F
from errors import assert_as_good_as, relative_error
from hypothesis import given
from hypothesis import strategies as st
from peaks import of_torch

import peft_kernels
from peft_kernels.ops import dora_linear, dora_norm, dora_squares
from peft_kernels.ops._dropout import dropout_factor
from peft_kernels.ops.dora_linear import example_inputs

BACKENDS = ["reference", "auto", "triton"]
HALVES = [torch.bfloat16, torch.float16]
GRADIENTS = ["x", "bias", "lora_a", "lora_b", "magnitude"]


def run(inputs, grad, backend="auto", **options):
    """y and the gradients of x, bias, lora_a, lora_b and magnitude, by name."""
    leaves = {name: t.detach().requires_grad_(name != "weight") for name, t in inputs.items()}
    with peft_kernels.backend(backend):
        y = dora_linear(**leaves, **options)
        y.backward(grad)
    return {"y": y.detach()} | {name: leaves[name].grad for name in GRADIENTS if name in leaves}


def check(inputs, backend, but=(), **options):
    """Runs ``backend`` and asserts that each result is as good as the eager path's."""
    m, n = inputs["x"].shape[0], inputs["weight"].shape[0]
    grad = torch.randn(m, n).to(inputs["x"].dtype)
    exact = run({name: t.double() for name, t in inputs.items()}, grad.double(), **options)
    eager = run(inputs, grad, "reference", **options)
    out = run(inputs, grad, backend, **options)
    for name in out.keys() - but:
        assert_as_good_as(out[name], eager[name], exact[name], name)
    return out, exact


def plain(x, weight, lora_a, lora_b, magnitude, bias, scale=1.0):
    """The paper's equation, with the norm held constant."""
    adapted = weight + scale * lora_b @ lora_a
    norm = adapted.detach().norm(dim=1)
    return F.linear(x, adapted) * (magnitude / norm) + bias


def test_backends_are_what_they_claim():
    assert peft_kernels.backend_of("dora_linear", "cpu", torch.float32) == "cpu"
    assert peft_kernels.backend_of("dora_linear", "cpu", torch.float64) == "reference"
    with peft_kernels.backend("triton"):
        assert peft_kernels.backend_of("dora_linear", "cpu", torch.bfloat16) == "triton"


def test_float64_matches_the_equation_and_its_gradients():
    inputs = {name: t.double().requires_grad_() for name, t in example_inputs(5, 7, 11, 3).items()}
    inputs["weight"].requires_grad_(False)
    leaves = [t for t in inputs.values() if t.requires_grad]
    grad = torch.randn(5, 7, dtype=torch.float64)
    found, expected = (
        (y, *torch.autograd.grad(y, leaves, grad))
        for y in (dora_linear(**inputs, scale=0.7), plain(**inputs, scale=0.7))
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1, 260, 65, 3), (7, 64, 48, 16), (37, 70, 130, 33)], ids=str)
def test_against_float64(backend, dtype, shape):
    check(example_inputs(*shape, dtype=dtype), backend, scale=1.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_base_with_float32_adapters(backend, dtype):
    inputs = example_inputs(20, 50, 40, 8, dtype=dtype, adapter_dtype=torch.float32)
    out, _ = check(inputs, backend, scale=0.5, dropout_p=0.2, seed=7)
    assert out["y"].dtype is out["x"].dtype is dtype
    assert out["magnitude"].dtype is out["lora_a"].dtype is torch.float32


# The forms of the native kernels, as of lora_linear; and rows beyond one of the gain's sums.
NATIVE_SHAPES = st.tuples(
    st.sampled_from([0, 1, 2, 5, 8, 9, 17, 33, 130, 600]),
    st.sampled_from([1, 3, 16, 31, 64, 65, 129, 600]),
    st.sampled_from([1, 5, 24, 63, 64, 257]),
    st.sampled_from([1, 2, 8, 16, 17, 40]),
)


@pytest.mark.builds
@given(
    shape=NATIVE_SHAPES,
    dtype=st.sampled_from([torch.float32, *HALVES]),
    wide_adapter=st.booleans(),
    transposed=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(),
)
def test_native_on_any_shape(shape, dtype, wide_adapter, transposed, dropout_p, bias):
    adapter_dtype = torch.float32 if wide_adapter else dtype
    inputs = example_inputs(*shape, dtype=dtype, adapter_dtype=adapter_dtype, bias=bias)
    if transposed:
        inputs["weight"] = inputs["weight"].T.contiguous().T
    # The magnitude's gradient is made of y, whose few elements here are rounded by chance; and a
    # norm of few has what rounding leaves.
    options = {"scale": 1.3, "dropout_p": dropout_p, "seed": 2**40 + 3}
    check(inputs, "auto", but={"magnitude"}, norm=torch.rand(shape[1]) + 0.5, **options)
    gains, expected = (gradient_of_gain(inputs, suffix) for suffix in ("", "_ref"))
    torch.testing.assert_close(gains, expected, rtol=1e-5, atol=1e-4)


def gradient_of_gain(inputs, suffix):
    """By the kernel itself, from a y that is given, the same for all; one gain is 0."""
    torch.manual_seed(0)
    m, n = inputs["x"].shape[0], inputs["weight"].shape[0]
    y, dy = (torch.randn(m, n).to(inputs["x"].dtype) for _ in range(2))
    gain, s = torch.rand(n) + 0.5, torch.randn(m, inputs["lora_a"].shape[0])
    gain[n // 2] = 0
    bwd = getattr(torch.ops.peft_kernels, "dora_linear_bwd" + suffix)
    adapter = inputs["lora_a"], inputs["lora_b"], gain
    needs = False, False, False, True
    options = 1.3, None, 0.0, None
    bias = inputs.get("bias")
    return bwd(dy, inputs["x"], inputs["weight"], bias, *adapter, y, s, *options, *needs)[3]


@pytest.mark.parametrize("plan", ["i", "ii", "library"])
@pytest.mark.parametrize("bias", [True, False])
def test_each_plan_of_triton(plan, bias):
    from peft_kernels.triton.lora_linear import plans

    with plans.force(plan):
        check(example_inputs(19, 40, 24, 5, bias=bias), "triton", scale=1.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rows", [3, 70])
def test_a_magnitude_of_zero_has_its_gradient(backend, dtype, rows):
    inputs = example_inputs(rows, 40, 48, 5, dtype=dtype)
    inputs["magnitude"][[0, 33]] = 0.0
    out, exact = check(inputs, backend, scale=1.5)
    assert exact["magnitude"][[0, 33]].abs().min() > 0
    assert torch.equal(out["y"][:, 33], inputs["bias"][33].expand(rows))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_zero_gradient_would_fail(backend):
    inputs = example_inputs(12, 20, 24, 4)
    out, exact = check(inputs, backend, scale=2.0)
    for name in GRADIENTS:
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[name]), out[name], exact[name], name)


def test_gradcheck():
    inputs = {name: t.double().requires_grad_() for name, t in example_inputs(4, 5, 6, 2).items()}
    norm = torch.rand(5, dtype=torch.float64) + 0.5

    def function(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return dora_linear(**named, scale=1.5, norm=norm, dropout_p=0.3, seed=1)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("scale", [(2.0, None), (1.0, torch.tensor(2.0))], ids=["float", "tensor"])
@pytest.mark.parametrize("suffix", ["", "_ref", "_triton"])
def test_opcheck(suffix, scale):
    a = example_inputs(5, 6, 7, 3)
    seed, gain = torch.tensor(3), torch.rand(6) + 0.5
    fwd = getattr(torch.ops.peft_kernels, "dora_linear_fwd" + suffix).default
    bwd = getattr(torch.ops.peft_kernels, "dora_linear_bwd" + suffix).default
    inputs = (a["x"], a["weight"], a["bias"], a["lora_a"], a["lora_b"], gain)
    options = (*scale, 0.25, seed)
    torch.library.opcheck(fwd, (*inputs, *options))
    y, s = fwd(*inputs, *options)
    for needs in [(True,) * 4, (False, True, False, True), (True, False, False, False)]:
        torch.library.opcheck(bwd, (torch.randn(5, 6), *inputs, y, s, *options, *needs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    inputs = example_inputs(6, 5, 4, 2)
    inputs["magnitude"].requires_grad_()
    with peft_kernels.backend(backend):
        dora_linear(**inputs).sum().backward()
    assert inputs["magnitude"].grad.abs().sum() > 0
    assert all(t.grad is None for name, t in inputs.items() if name != "magnitude")


def test_gradient_of_the_weight():
    """The norm is a constant of it too."""
    inputs = {name: t.requires_grad_() for name, t in example_inputs(6, 5, 4, 2).items()}
    grad = torch.randn(6, 5)
    found, expected = (
        torch.autograd.grad(y, inputs["weight"], grad)
        for y in (dora_linear(**inputs), plain(**inputs))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_on_the_low_rank_branch(backend):
    p, seed = 0.4, torch.tensor(99)
    inputs = example_inputs(10, 6, 21, 3)
    factor = dropout_factor(seed, p, 10, 21, torch.float64)
    a = {name: t.double() for name, t in inputs.items()}
    norm = (a["weight"] + 2.0 * a["lora_b"] @ a["lora_a"]).norm(dim=1)
    z = a["x"] @ a["weight"].T + 2.0 * (a["x"] * factor) @ a["lora_a"].T @ a["lora_b"].T
    out = run(inputs, torch.ones(10, 6), backend, scale=2.0, dropout_p=p, seed=seed)
    assert relative_error(out["y"], a["magnitude"] / norm * z + a["bias"]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [3, 40])
def test_same_bits_on_every_repetition(backend, rows):
    inputs = example_inputs(rows, 24, 40, 5)
    leaves = {name: t.requires_grad_(name != "weight") for name, t in inputs.items()}
    grad = torch.randn(rows, 24)
    kept = grad.clone()
    wanted = [leaves[name] for name in GRADIENTS]
    with peft_kernels.backend(backend):
        y = dora_linear(**leaves, dropout_p=0.3, seed=1)
        first = torch.autograd.grad(y, wanted, grad, retain_graph=True)
        second = torch.autograd.grad(y, wanted, grad)
        again = dora_linear(**leaves, dropout_p=0.3, seed=1)
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend):
    inputs = example_inputs(24, 10, 16, 4)
    expected = dora_linear(**inputs)
    x = inputs.pop("x")
    inputs |= {
        "lora_a": inputs["lora_a"].T.contiguous().T,
        "lora_b": inputs["lora_b"].T.contiguous().T,
        "bias": inputs["bias"].repeat_interleave(2)[::2],
        "magnitude": inputs["magnitude"].repeat_interleave(2)[::2],
    }
    views = {
        "1-d": (x[3], expected[3]),
        "4-d": (x.view(2, 3, 4, 16), expected.view(2, 3, 4, 10)),
        "column-major": (x.T.contiguous().T, expected),
        "every other column": (x.repeat_interleave(2, 1)[:, ::2], expected),
        "expanded": (x[:1].expand(5, 16), expected[:1].expand(5, 10)),
    }
    with peft_kernels.backend(backend):
        for name, (view, wanted) in views.items():
            torch.testing.assert_close(dora_linear(view, **inputs), wanted, msg=name)


@pytest.mark.parametrize("trains", [True, False])
def test_saved_for_backward(trains):
    """Rank-sized, and y where the magnitude trains."""
    m, n, k, r = 64, 128, 96, 4
    inputs = {name: t.requires_grad_() for name, t in example_inputs(m, n, k, r).items()}
    inputs["magnitude"].requires_grad_(trains)
    own = {t.data_ptr() for t in inputs.values()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dora_linear(**inputs, dropout_p=0.5)
    vectors = 3 * n * 4 + 64
    assert sum(saved.values()) <= m * r * 4 + trains * m * n * 4 + vectors


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_y_that_is_changed_in_place_is_computed_again(checkpointed):
    """The magnitude's gradient is made of it."""
    inputs = {name: t.requires_grad_() for name, t in example_inputs(6, 5, 4, 2).items()}

    def layer(in_place):
        y = dora_linear(**inputs, dropout_p=0.5)
        if in_place:
            y[0] = 3.0
            return torch.relu_(y) * 2
        return torch.relu(torch.cat([torch.full_like(y[:1], 3.0), y[1:]])) * 2

    found = []
    for in_place in (True, False):
        torch.manual_seed(4)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(layer, in_place, use_reentrant=False)
        else:
            y = layer(in_place)
        found.append(torch.autograd.grad(y.square().sum(), list(inputs.values())))
    torch.testing.assert_close(*found)


def test_y_is_not_held_by_what_counts_its_versions():
    inputs = {name: t.requires_grad_() for name, t in example_inputs(6, 5, 4, 2).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda t: t):  # a checkpoint's
        y = dora_linear(**inputs)
    storage, function = y.untyped_storage(), y.grad_fn
    del y
    assert function is not None and torch._C._storage_Use_Count(storage._cdata) == 1


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_without_a_break(dropout_p):
    inputs = {name: t.requires_grad_() for name, t in example_inputs(6, 8, 10, 2).items()}
    function = functools.partial(dora_linear, scale=2.0, dropout_p=dropout_p, seed=11)
    expected = torch.autograd.grad(function(**inputs).square().sum(), list(inputs.values()))
    compiled = torch.compile(lambda: function(**inputs).square().sum(), fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(), list(inputs.values())), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    """The norm is of the weight as it is stored."""
    inputs = {name: t.requires_grad_() for name, t in example_inputs(6, 8, 10, 2).items()}
    with peft_kernels.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        y = dora_linear(**inputs)
        norm = dora_norm(inputs["weight"], inputs["lora_a"], inputs["lora_b"])
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in inputs.values())
    torch.testing.assert_close(y.float(), dora_linear(**inputs), rtol=2e-2, atol=2e-2)
    adapted = inputs["weight"] + inputs["lora_b"] @ inputs["lora_a"]
    torch.testing.assert_close(norm, adapted.norm(dim=1).detach())


# ---- the norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("scale", [1.5, torch.tensor(1.5)], ids=["float", "tensor"])
def test_the_norm_is_that_of_the_adapted_weight(dtype, scale):
    """More rows than one block of a 16-bit weight, in any layout."""
    inputs = example_inputs(1, 1100, 60, 7, dtype=dtype)
    weight, a, b = inputs["weight"], inputs["lora_a"], inputs["lora_b"]
    exact = (weight.double() + 1.5 * b.double() @ a.double()).norm(dim=1)
    for stored in (weight, weight.T.contiguous().T):
        norm = dora_norm(stored, a, b, scale)
        assert norm.dtype is (dtype if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(norm.double(), exact, rtol=2e-6, atol=0)
        squares = dora_squares(stored)
        assert torch.equal(dora_norm(stored, a, b, scale, squares), norm)


def test_the_norm_of_rows_that_the_update_takes_away():
    """Of what is left only rounding, and no square root of a negative number."""
    a, b = torch.randn(4, 32), torch.randn(9, 4)
    norm = dora_norm(b @ a, a, b, -1.0)
    assert norm.isfinite().all() and (norm < 1e-2 * (b @ a).norm(dim=1)).all()


def test_the_norm_has_no_matrix_of_the_weights_size():
    n, k, r = 512, 384, 4
    inputs = example_inputs(1, n, k, r)
    made_of = inputs["weight"], inputs["lora_a"], inputs["lora_b"]
    assert of_torch(lambda: dora_norm(*made_of)) < 4 * n * k / 4


# ---- bad input -----------------------------------------------------------------------------------

BAD = [
    ({"x": torch.ones(2, 5)}, ValueError, r"x has shape \(2, 5\).*k = 6"),
    ({"lora_b": torch.ones(4, 2)}, ValueError, r"lora_b has shape \(4, 2\).*\[4, 3\]"),
    ({"magnitude": torch.ones(5)}, ValueError, r"magnitude has shape \(5,\).*\[4\]"),
    ({"magnitude": torch.ones(1, 4)}, ValueError, r"magnitude has shape \(1, 4\).*\[4\]"),
    ({"magnitude": torch.ones(4).int()}, TypeError, "magnitude must be floating-point.*int32"),
    ({"magnitude": torch.ones(4, device="meta")}, ValueError, "magnitude must be on weight's dev"),
    ({"norm": torch.ones(3)}, ValueError, r"norm has shape \(3,\).*\[4\]"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\); got 1.0"),
    ({"scale": torch.ones((), requires_grad=True)}, ValueError, "scale must not require"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        dora_linear(**example_inputs(2, 4, 6, 3) | change)


def test_the_native_op_checks_what_reaches_it():
    a = example_inputs(2, 4, 6, 3)
    args = [
        a["x"],
        a["weight"],
        None,
        a["lora_a"],
        a["lora_b"],
        torch.ones(4),
        1.0,
        None,
        0.0,
        None,
    ]
    for index, wrong in [(1, torch.ones(4, 5)), (5, torch.ones(3)), (5, torch.ones(4).double())]:
        with pytest.raises(RuntimeError, match="must be"):
            torch.ops.peft_kernels.dora_linear_fwd(*args[:index], wrong, *args[index + 1 :])
