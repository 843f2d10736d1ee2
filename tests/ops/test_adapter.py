"""adapter: every backend against float64, gradients, dropout, strides, errors, compilation."""

import functools

import pytest
import torch
import torch.nn.functional as F
from errors import assert_as_good_as
from hypothesis import given
from hypothesis import strategies as st

import peft_kernels
from peft_kernels.ops import adapter
from peft_kernels.ops._activations import ACTIVATIONS
from peft_kernels.ops._dropout import dropout_factor
from peft_kernels.ops.adapter import example_inputs
from peft_kernels.tools.bench.measure import saved_bytes

BACKENDS = ["reference", "auto"]
HALVES = [torch.bfloat16, torch.float16]


def with_scale(inputs, kind):
    """The inputs, and a scale: a number, one that trains, or one by channel that trains."""
    n = inputs["up_weight"].shape[0]
    dtype = inputs["up_weight"].dtype
    scales = {"number": 1.7, "learned": torch.full((1,), 1.3), "channel": torch.rand(n) + 0.5}
    scale = scales[kind]
    return inputs | {"scale": scale.to(dtype) if isinstance(scale, torch.Tensor) else scale}


def run(inputs, grad, backend="auto", *, adds_x=False, **options):
    """y and the gradient of every tensor, by name."""
    leaves = {
        name: value.detach().requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    arguments = dict(leaves)
    residual = arguments.pop("residual", None)
    terms = (arguments["x"],) if adds_x else ()
    terms += () if residual is None else (residual,)
    with peft_kernels.backend(backend):
        y = adapter(**arguments, residual=terms or None, **options)
        y.backward(grad)
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in tensors.items()}


def check(inputs, backend, **options):
    """Runs ``backend`` and asserts that each result is as good as the eager path's."""
    m, n = inputs["x"].shape[0], inputs["up_weight"].shape[0]
    grad = torch.randn(m, n).to(inputs["x"].dtype)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    exact = run(wide, grad.double(), **options)
    eager = run(inputs, grad, "reference", **options)
    out = run(inputs, grad, backend, **options)
    for name in out:
        assert_as_good_as(out[name], eager[name], exact[name], name)
    return out, exact


def test_backends_are_what_they_claim():
    assert peft_kernels.backend_of("adapter", "cpu", torch.float32) == "cpu"
    assert peft_kernels.backend_of("adapter", "cpu", torch.float64) == "reference"


def test_float64_matches_the_equation():
    a = example_inputs(5, 7, 3, dtype=torch.float64, norm=True, pre_norm=True)
    h = F.layer_norm(a["x"], (7,), a["pre_norm_weight"], a["pre_norm_bias"], 1e-3)
    u = F.silu(h @ a["down_weight"].T + a["down_bias"]) @ a["up_weight"].T + a["up_bias"]
    t = a["x"] + a["residual"] + 0.7 * u
    expected = F.layer_norm(t, (7,), a["norm_weight"], a["norm_bias"], 1e-12)
    residual = (a["x"], a.pop("residual"))
    y = adapter(
        **a, residual=residual, activation="swish", scale=0.7, norm_eps=1e-12, pre_norm_eps=1e-3
    )
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


OPTIONS = {
    "update alone": {"residual": False},
    "houlsby": {"norm": True},
    "pfeiffer": {"norm": True, "pre_norm": True, "residual": False},
    "norm before": {"pre_norm": True},
    "without biases": {"bias": False},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
def test_against_float64(backend, dtype, kind):
    inputs = example_inputs(37, 70, 19, dtype=dtype, **OPTIONS[kind])
    check(inputs, backend, adds_x=kind != "update alone", activation="relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    inputs = example_inputs(40, 33, 21)
    inputs["x"] *= 4
    check(inputs, "auto", adds_x=True, activation=activation)


# Where exp overflows and tails vanish, a result must neither be NaN nor lose its sign.
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(activation):
    z = torch.tensor([-1e4, -100.0, -88.5, -20.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 20.0, 88.5, 1e4])
    arguments = (torch.eye(12) * z, None, torch.eye(12), None)
    x = torch.eye(12).requires_grad_()
    y = adapter(x, *arguments, activation=activation)
    (dx,) = torch.autograd.grad(y.diagonal().sum(), x)
    function, derivative = ACTIVATIONS[activation]
    exact = function(z.double())
    torch.testing.assert_close(y.diagonal().double(), exact, rtol=1e-5, atol=1e-7)
    slope = derivative(z.double()) * z
    torch.testing.assert_close(dx.diagonal().double(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_scale_by_channel_trains(dropout_p):
    inputs = with_scale(example_inputs(30, 24, 7, norm=True), "channel")
    check(inputs, "auto", adds_x=True, dropout_p=dropout_p, seed=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_learned_scale_trains(backend, dropout_p):
    """Of a gradient that is the update itself, so that the one sum doesn't cancel."""
    inputs = with_scale(example_inputs(30, 24, 7), "learned")
    alone = {name: value for name, value in inputs.items() if name not in ("residual", "scale")}
    options = {"dropout_p": dropout_p, "seed": 3}
    update = adapter(**{name: value.double() for name, value in alone.items()}, **options)
    out = run(inputs, update.float(), backend, adds_x=True, **options)
    torch.testing.assert_close(
        out["scale"].double(), update.square().sum()[None], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_base_with_float32_adapters(dtype):
    inputs = example_inputs(20, 50, 8, dtype=dtype, adapter_dtype=torch.float32, norm=True)
    out, _ = check(inputs, "auto", adds_x=True, dropout_p=0.2, seed=7)
    assert (out["y"].dtype, out["x"].dtype) == (dtype, dtype)
    assert out["down_weight"].dtype is torch.float32


@pytest.mark.builds
@given(
    m=st.sampled_from([0, 1, 2, 3, 8, 9, 17, 48, 97, 130, 300]),
    k=st.sampled_from([1, 2, 7, 16, 31, 64, 129]),
    r=st.sampled_from([1, 2, 6, 8, 17, 40, 130]),
    n=st.sampled_from([None, 1, 5, 16, 33]),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    wide_adapter=st.booleans(),
    kind=st.sampled_from(list(OPTIONS)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    scale=st.sampled_from(["number", "channel"]),  # one number's sum may cancel to anything
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_native_on_any_shape(m, k, r, n, dtype, wide_adapter, kind, activation, scale, dropout_p):
    adapter_dtype = torch.float32 if wide_adapter else dtype
    options = dict(OPTIONS[kind])
    if "norm" in options or "pre_norm" in options:
        # Where there is nothing but rounding in a gradient, no backend is as good as another: a
        # LayerNorm of one or two columns has the same output whatever its input, and one of an
        # update alone has the same whatever its scale.
        k, n = k + 5, n if n is None else n + 5
        options["residual"] = True
    inputs = example_inputs(m, k, r, n, dtype=dtype, adapter_dtype=adapter_dtype, **options)
    check(
        with_scale(inputs, scale), "auto", adds_x=n is None or n == k, activation=activation,
        dropout_p=dropout_p, seed=2**40 + 3,
    )  # fmt: skip


def test_a_large_bottleneck_of_a_wide_layer():
    check(example_inputs(5, 3000, 700, norm=True), "auto", adds_x=True)


def test_a_zero_gradient_would_fail():
    inputs = with_scale(example_inputs(12, 20, 4, norm=True, pre_norm=True), "channel")
    out, exact = check(inputs, "auto", adds_x=True)
    for name in out:
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[name]), out[name], exact[name], name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs = example_inputs(4, 5, 3, dtype=torch.float64, norm=True, pre_norm=True)
    inputs = with_scale(inputs, "channel")

    def function(*tensors):
        arguments = dict(zip(inputs, tensors, strict=True))
        residual = (arguments["x"], arguments.pop("residual"))
        return adapter(**arguments, residual=residual, activation=activation, dropout_p=0.3, seed=1)

    tensors = tuple(t.requires_grad_() for t in inputs.values())
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("scale_t", [None, torch.tensor(2.0), torch.rand(6)])
@pytest.mark.parametrize("suffix", ["", "_ref", "_triton"])
def test_opcheck(suffix, scale_t):
    a = example_inputs(5, 6, 3, norm=True, pre_norm=True)
    seed = torch.tensor(3)
    inputs = (
        a["x"], a["residual"], a["down_weight"], a["down_bias"], a["up_weight"], a["up_bias"],
        2.0, scale_t, a["pre_norm_weight"], a["pre_norm_bias"], 1e-5, a["norm_weight"],
        a["norm_bias"], 1e-5,
    )  # fmt: skip
    options = ("gelu", True, 0.25, seed)
    fwd = getattr(torch.ops.peft_kernels, "adapter_fwd" + suffix).default
    bwd = getattr(torch.ops.peft_kernels, "adapter_bwd" + suffix).default
    torch.library.opcheck(fwd, (*inputs, *options))
    _, z, statistics = fwd(*inputs, *options)
    dy = torch.randn(5, 6)
    for needs in [(True,) * 6, (False, True) * 3, (True, False) * 3]:
        torch.library.opcheck(bwd, (dy, *inputs, z, statistics, *options, *needs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*example_inputs(1, 2, 1, norm=True, pre_norm=True), "scale"])
def test_each_gradient_alone(backend, name):
    inputs = with_scale(example_inputs(9, 5, 4, norm=True, pre_norm=True), "channel")
    grad = torch.randn(9, 5)
    expected = run(inputs, grad, adds_x=True)[name]
    arguments = {key: value.detach() for key, value in inputs.items()}
    leaf = arguments[name].requires_grad_()
    residual = (arguments["x"], arguments.pop("residual"))
    with peft_kernels.backend(backend):
        adapter(**arguments, residual=residual).backward(grad)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_documented_mask(backend):
    p, seed = 0.4, torch.tensor(99)
    a = example_inputs(10, 21, 3, residual=False)
    factor = dropout_factor(seed, p, 10, 21, torch.float32)
    plain = adapter(**a, scale=2.0)
    with peft_kernels.backend(backend):
        dropped = adapter(**a, scale=2.0, dropout_p=p, seed=seed)
    torch.testing.assert_close(dropped, plain * factor)


def test_the_seed_comes_from_torch_and_is_redrawn():
    inputs = example_inputs(30, 20, 4)
    draws = []
    for manual_seed in (5, 5, 6):
        torch.manual_seed(manual_seed)
        draws.append(adapter(**inputs, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [3, 100])
def test_same_bits_on_every_repetition(backend, rows):
    inputs = example_inputs(rows, 24, 5, norm=True, pre_norm=True)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    originals = {name: t.detach().clone() for name, t in inputs.items()}
    grad = torch.randn(rows, 24)
    kept = grad.clone()
    with peft_kernels.backend(backend):
        y = adapter(**leaves, dropout_p=0.3, seed=1)
        first = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
        second = torch.autograd.grad(y, list(leaves.values()), grad)
        again = adapter(**leaves, dropout_p=0.3, seed=1)
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, kept)
    assert all(torch.equal(inputs[name], originals[name]) for name in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend):
    inputs = example_inputs(24, 16, 4, norm=True, residual=False)
    x = inputs.pop("x")
    plain = adapter(x, **inputs, residual=x)
    views = {
        "1-d": (x[3], plain[3]),
        "4-d": (x.view(2, 3, 4, 16), plain.view(2, 3, 4, 16)),
        "column-major": (x.T.contiguous().T, plain),
        "every other row": (x.repeat_interleave(2, 0)[::2], plain),
        "every other column": (x.repeat_interleave(2, 1)[:, ::2], plain),
        "expanded": (x[:1].expand(5, 16), plain[:1].expand(5, 16)),
    }
    inputs |= {
        "down_weight": inputs["down_weight"].T.contiguous().T,
        "up_weight": inputs["up_weight"].T.contiguous().T,
        "norm_weight": inputs["norm_weight"].repeat_interleave(2)[::2],
        "down_bias": inputs["down_bias"].repeat_interleave(2)[::2],
    }
    with peft_kernels.backend(backend):
        for name, (view, expected) in views.items():
            torch.testing.assert_close(adapter(view, **inputs, residual=view), expected, msg=name)
            other = view.clone()
            torch.testing.assert_close(adapter(view, **inputs, residual=other), expected, msg=name)


def test_several_residuals_are_added_up():
    a = example_inputs(6, 5, 2, residual=False)
    terms = torch.randn(2, 6, 5)
    expected = adapter(**a) + a["x"] + terms.sum(0)
    torch.testing.assert_close(adapter(**a, residual=(terms[0], a["x"], terms[1])), expected)


def test_saved_for_backward_is_bottleneck_sized():
    m, k, r = 64, 128, 4
    a = example_inputs(m, k, r, norm=True, pre_norm=True)
    a = {name: t.requires_grad_() for name, t in a.items()}
    saved = saved_bytes(lambda: adapter(**a, dropout_p=0.5), a.values())
    assert m * r * 4 <= saved <= m * (r + 4) * 4 + 64


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_without_a_break(dropout_p):
    inputs = with_scale(example_inputs(6, 8, 2, norm=True), "channel")
    inputs = {name: t.requires_grad_() for name, t in inputs.items()}
    function = functools.partial(adapter, dropout_p=dropout_p, seed=11)
    expected = torch.autograd.grad(function(**inputs).sigmoid().sum(), list(inputs.values()))
    compiled = torch.compile(lambda: function(**inputs).sigmoid().sum(), fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(), list(inputs.values())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_recomputes_the_same_mask():
    inputs = {name: t.requires_grad_() for name, t in example_inputs(6, 8, 2).items()}
    function = functools.partial(adapter, **inputs, dropout_p=0.5)
    torch.manual_seed(3)
    expected = torch.autograd.grad(function().sigmoid().sum(), list(inputs.values()))
    torch.manual_seed(3)
    recomputed = torch.utils.checkpoint.checkpoint(function, use_reentrant=False)
    got = torch.autograd.grad(recomputed.sigmoid().sum(), list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    a = example_inputs(6, 8, 2, norm=True, residual=False)
    a = {name: t.requires_grad_() for name, t in a.items()}
    with peft_kernels.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter(**a, residual=a["x"])
    assert y.dtype is torch.bfloat16
    y.square().sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in a.values())
    torch.testing.assert_close(y.float(), adapter(**a, residual=a["x"]), rtol=3e-2, atol=3e-2)


BAD = [
    ({"x": torch.ones(())}, ValueError, "x must have at least 1 dimension"),
    ({"x": torch.ones(2, 5)}, ValueError, r"x has shape \(2, 5\).*k = 6"),
    ({"down_weight": torch.ones(4)}, ValueError, r"down_weight must have 2 dimensions.*\(4,\)"),
    ({"down_weight": torch.ones(0, 6)}, ValueError, r"down_weight must have at least 1 row"),
    ({"up_weight": torch.ones(6, 2)}, ValueError, r"up_weight has shape \(6, 2\).*\[n, 3\]"),
    ({"down_bias": torch.ones(5)}, ValueError, r"down_bias has shape \(5,\).*\[3\]"),
    ({"norm_weight": torch.ones(5)}, ValueError, r"norm_weight has shape \(5,\).*\[6\]"),
    ({"norm_bias": torch.ones(6)}, ValueError, "norm_bias needs norm_weight, which is None"),
    ({"residual": torch.ones(2, 5)}, ValueError, r"residual has shape \(2, 5\).*\(2, 6\)"),
    ({"residual": torch.ones(2, 6).half()}, TypeError, "residual must have x's dtype.*float16"),
    ({"x": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "x must be float32.*int64"),
    ({"up_weight": torch.ones(6, 3).half()}, TypeError, "up_weight must be.*float16"),
    ({"up_bias": torch.ones(6, device="meta")}, ValueError, "up_bias must be on x's.*meta"),
    ({"scale": torch.ones(2)}, ValueError, r"scale must be a float or a tensor of 1.*\(2,\)"),
    ({"activation": "reLU6"}, ValueError, "activation must be one of gelu.*'reLU6'"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\); got 1.0"),
    ({"seed": 0.5, "dropout_p": 0.1}, TypeError, "seed must be an int.*0.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        adapter(**example_inputs(2, 6, 3) | change)


def test_x_as_residual_needs_as_many_columns():
    a = example_inputs(2, 6, 3, 5, residual=False)
    with pytest.raises(ValueError, match=r"residual is x, which ends in 6.*n = 5"):
        adapter(**a, residual=a["x"])
