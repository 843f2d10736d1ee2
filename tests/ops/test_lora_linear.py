"""lora_linear: every backend against float64, gradients, dropout, strides, errors, compilation."""

import functools

import pytest
import torch
from errors import assert_as_good_as, relative_error
from hypothesis import given
from hypothesis import strategies as st

import peft_kernels
from peft_kernels.ops import QuantizedWeight, dequantize, lora_linear
from peft_kernels.ops._dropout import dropout_factor
from peft_kernels.ops.lora_linear import example_inputs, lora_linear_plain

BACKENDS = ["reference", "auto", "triton"]
HALVES = [torch.bfloat16, torch.float16]
GRADIENTS = ["x", "bias", "lora_a", "lora_b"]


def run(inputs, grad, backend="auto", **options):
    """y and the gradients of x, bias, lora_a and lora_b, by name."""
    leaves = {name: t.detach().requires_grad_(name != "weight") for name, t in inputs.items()}
    with peft_kernels.backend(backend):
        y = lora_linear(**leaves, **options)
        y.backward(grad)
    return {"y": y.detach()} | {name: leaves[name].grad for name in GRADIENTS if name in leaves}


def check(inputs, backend, **options):
    """Runs ``backend`` and asserts that each result is as good as the eager path's."""
    m, n = inputs["x"].shape[0], inputs["weight"].shape[0]
    grad = torch.randn(m, n).to(inputs["x"].dtype)
    exact = run({name: t.double() for name, t in inputs.items()}, grad.double(), **options)
    eager = run(inputs, grad, "reference", **options)
    out = run(inputs, grad, backend, **options)
    for name in out:
        assert_as_good_as(out[name], eager[name], exact[name], name)
    return out, exact


def test_backends_are_what_they_claim():
    assert peft_kernels.backend_of("lora_linear", "cpu", torch.float32) == "cpu"
    assert peft_kernels.backend_of("lora_linear", "cpu", torch.float64) == "reference"
    for name in ("reference", "triton"):
        with peft_kernels.backend(name):
            assert peft_kernels.backend_of("lora_linear", "cpu", torch.bfloat16) == name
    with pytest.raises(ValueError, match="'cuda'"), peft_kernels.backend("cuda"):
        pass
    with pytest.raises(ValueError, match="'no_such_op'"):
        peft_kernels.backend_of("no_such_op", "cpu", torch.float32)


def test_float64_matches_the_equation():
    a = {name: t.double() for name, t in example_inputs(5, 7, 11, 3).items()}
    expected = a["x"] @ (a["weight"] + 0.7 * a["lora_b"] @ a["lora_a"]).T + a["bias"]
    torch.testing.assert_close(lora_linear(**a, scale=0.7), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 65, 3), (7, 64, 48, 16), (37, 70, 130, 33)], ids=str)
def test_against_float64(backend, dtype, shape):
    check(example_inputs(*shape, dtype=dtype), backend, scale=1.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_base_with_float32_adapters(backend, dtype):
    inputs = example_inputs(20, 50, 40, 8, dtype=dtype, adapter_dtype=torch.float32)
    out, _ = check(inputs, backend, scale=0.5, dropout_p=0.2, seed=7)
    assert (out["y"].dtype, out["x"].dtype, out["lora_a"].dtype) == (dtype, dtype, torch.float32)


# Every form of the native kernels: rows 1-8, 9 and more, more than one block of packed rows; ranks
# that fill no, one and several panels; sizes 0 and 1.
NATIVE_SHAPES = st.tuples(
    st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 130, 300]),
    st.sampled_from([1, 2, 3, 7, 16, 31, 64, 65, 129]),
    st.sampled_from([0, 1, 5, 8, 24, 63, 64, 257]),
    st.sampled_from([1, 2, 6, 8, 16, 17, 40, 130]),
)


@pytest.mark.builds
@pytest.mark.parametrize(("n", "k"), [(8, 64), (37, 29), (130, 136)])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_over_codes_on_any_shape(m, n, k):
    codes = torch.randint(0, 256, (-(-n * k // 2),), dtype=torch.uint8)
    scales, book = torch.rand(-(-n * k // 32)) + 0.5, torch.linspace(-1, 1, 16)
    weight = QuantizedWeight(codes, scales, (n, k), 32, book)
    plain = example_inputs(m, n, k, 3, bias=False)
    given = [plain[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
    x, a, b = given
    dy = torch.randn(m, n)
    y = lora_linear(x, weight, a, b, dropout_p=0.2, seed=1)
    found = [y, *torch.autograd.grad(y, given, dy)]
    wide = x.double(), dequantize(weight).double(), a.double(), b.double()
    y = lora_linear(*wide, dropout_p=0.2, seed=1)
    for one, exact in zip(found, [y, *torch.autograd.grad(y, given, dy.double())], strict=True):
        torch.testing.assert_close(one.double(), exact.double(), rtol=1e-5, atol=2e-5)


@pytest.mark.builds
@given(
    shape=NATIVE_SHAPES,
    dtype=st.sampled_from([torch.float32, *HALVES]),
    wide_adapter=st.booleans(),
    transposed=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_native_on_any_shape(shape, dtype, wide_adapter, transposed, dropout_p):
    adapter_dtype = torch.float32 if wide_adapter else dtype
    inputs = example_inputs(*shape, dtype=dtype, adapter_dtype=adapter_dtype)
    if transposed:
        inputs["weight"] = inputs["weight"].T.contiguous().T
    check(inputs, "auto", scale=1.3, dropout_p=dropout_p, seed=2**40 + 3)


def test_rank_512_and_beyond():
    check(example_inputs(9, 40, 30, 700), "auto")


@pytest.mark.parametrize("rows", [1, 4, 8, 40])
@pytest.mark.parametrize(("n", "k"), [(11008, 64), (64, 11008)])
def test_sums_of_thousands(rows, n, k):
    check(example_inputs(rows, n, k, 16), "auto", scale=2.0)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_zero_gradient_would_fail(backend):
    inputs = example_inputs(12, 20, 24, 4)
    out, exact = check(inputs, backend, scale=2.0)
    for name in GRADIENTS:
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[name]), out[name], exact[name], name)


def test_gradcheck():
    inputs = {name: t.double().requires_grad_() for name, t in example_inputs(4, 5, 6, 2).items()}

    def function(*tensors):
        return lora_linear(
            **dict(zip(inputs, tensors, strict=True)), scale=1.5, dropout_p=0.3, seed=1
        )

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_gradient_of_the_weight():
    inputs = example_inputs(6, 5, 4, 2)
    inputs["weight"].requires_grad_()
    grad = torch.randn(6, 5)
    lora_linear(**inputs).backward(grad)
    torch.testing.assert_close(inputs["weight"].grad, grad.T @ inputs["x"])


@pytest.mark.parametrize("scale", [(2.0, None), (1.0, torch.tensor(2.0))], ids=["float", "tensor"])
@pytest.mark.parametrize("suffix", ["", "_ref", "_triton"])
def test_opcheck(suffix, scale):
    a = example_inputs(5, 6, 7, 3)
    seed = torch.tensor(3)
    fwd = getattr(torch.ops.peft_kernels, "lora_linear_fwd" + suffix).default
    bwd = getattr(torch.ops.peft_kernels, "lora_linear_bwd" + suffix).default
    adapter = (a["lora_a"], a["lora_b"])
    forward_args = (a["x"], a["weight"], a["bias"], *adapter, *scale, 0.25, seed)
    torch.library.opcheck(fwd, forward_args)
    _, s = fwd(*forward_args)
    dy = torch.randn(5, 6)
    for needs in [(True, True, True), (False, True, False), (True, False, False)]:
        torch.library.opcheck(
            bwd, (dy, a["x"], a["weight"], *adapter, s, *scale, 0.25, seed, *needs)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    inputs = example_inputs(6, 5, 4, 2)
    inputs["lora_b"].requires_grad_()
    with peft_kernels.backend(backend):
        lora_linear(**inputs).sum().backward()
    assert inputs["lora_b"].grad.abs().sum() > 0
    assert all(t.grad is None for name, t in inputs.items() if name != "lora_b")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_documented_mask(backend):
    p, seed = 0.4, torch.tensor(99)
    inputs = example_inputs(10, 6, 21, 3)
    factor = dropout_factor(seed, p, 10, 21, torch.float64)
    assert set(factor.unique().tolist()) == {0.0, 1 / (1 - p)}
    leaves = {name: t.double().requires_grad_(name != "weight") for name, t in inputs.items()}
    y = leaves["x"] @ leaves["weight"].T + leaves["bias"]
    y = y + 2.0 * (leaves["x"] * factor) @ leaves["lora_a"].T @ leaves["lora_b"].T
    y.sum().backward()
    out = run(inputs, torch.ones(10, 6), backend, scale=2.0, dropout_p=p, seed=seed)
    assert relative_error(out["y"], y.detach()) < 1e-6
    for name in GRADIENTS:
        assert relative_error(out[name], leaves[name].grad) < 1e-6, name


def test_dropout_rate_and_independence_of_seeds():
    first = dropout_factor(torch.tensor(1), 0.1, 400, 1000, torch.float32) == 0
    second = dropout_factor(torch.tensor(2), 0.1, 400, 1000, torch.float32) == 0
    assert abs(first.double().mean() - 0.1) < 0.002
    assert abs((first & second).double().mean() - 0.01) < 0.001


def test_the_seed_comes_from_torch_and_is_redrawn():
    inputs = example_inputs(30, 20, 40, 4)
    draws = []
    for manual_seed in (5, 5, 6):
        torch.manual_seed(manual_seed)
        draws.append(lora_linear(**inputs, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [3, 40])
def test_same_bits_on_every_repetition(backend, rows):
    inputs = example_inputs(rows, 24, 40, 5)
    leaves = {name: t.requires_grad_(name != "weight") for name, t in inputs.items()}
    originals = {name: t.detach().clone() for name, t in inputs.items()}
    grad = torch.randn(rows, 24)
    kept = grad.clone()
    wanted = [leaves[name] for name in GRADIENTS]
    with peft_kernels.backend(backend):
        y = lora_linear(**leaves, dropout_p=0.3, seed=1)
        first = torch.autograd.grad(y, wanted, grad, retain_graph=True)
        second = torch.autograd.grad(y, wanted, grad)
        again = lora_linear(**leaves, dropout_p=0.3, seed=1)
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, kept)
    assert all(torch.equal(inputs[name], originals[name]) for name in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend):
    inputs = example_inputs(24, 10, 16, 4)
    plain = lora_linear(**inputs)
    x = inputs.pop("x")
    views = {
        "1-d": (x[3], plain[3]),
        "4-d": (x.view(2, 3, 4, 16), plain.view(2, 3, 4, 10)),
        "column-major": (x.T.contiguous().T, plain),
        "every other row": (x.repeat_interleave(2, 0)[::2], plain),
        "every other column": (x.repeat_interleave(2, 1)[:, ::2], plain),
        "expanded": (x[:1].expand(5, 16), plain[:1].expand(5, 10)),
    }
    inputs |= {
        "lora_a": inputs["lora_a"].T.contiguous().T,
        "lora_b": inputs["lora_b"].T.contiguous().T,
        "bias": inputs["bias"].repeat_interleave(2)[::2],
    }
    with peft_kernels.backend(backend):
        for name, (view, expected) in views.items():
            torch.testing.assert_close(lora_linear(view, **inputs), expected, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_is_a_run_time_value(backend):
    inputs = example_inputs(4, 5, 6, 2)
    with peft_kernels.backend(backend):
        for scale in (torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
            torch.testing.assert_close(
                lora_linear(**inputs, scale=scale), lora_linear(**inputs, scale=0.5)
            )
        base = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
        torch.testing.assert_close(lora_linear(**inputs, scale=0.0), base)


def test_saved_for_backward_is_rank_sized():
    m, n, k, r = 64, 128, 96, 4
    inputs = {name: t.requires_grad_() for name, t in example_inputs(m, n, k, r).items()}
    own = {t.data_ptr() for t in inputs.values()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(**inputs, dropout_p=0.5)
    assert m * r * 4 <= sum(saved.values()) <= m * r * 4 + 64


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_without_a_break(dropout_p):
    inputs = {name: t.requires_grad_() for name, t in example_inputs(6, 8, 10, 2).items()}
    function = functools.partial(lora_linear, scale=2.0, dropout_p=dropout_p, seed=11)
    expected = torch.autograd.grad(function(**inputs).square().sum(), list(inputs.values()))
    compiled = torch.compile(lambda: function(**inputs).square().sum(), fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(), list(inputs.values())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_dropout_draws_anew():
    inputs = example_inputs(30, 20, 40, 4)
    compiled = torch.compile(lambda: lora_linear(**inputs, dropout_p=0.5), fullgraph=True)
    assert not torch.equal(compiled(), compiled())


def test_checkpoint_recomputes_the_same_mask():
    inputs = {name: t.requires_grad_() for name, t in example_inputs(6, 8, 10, 2).items()}
    function = functools.partial(lora_linear, **inputs, dropout_p=0.5)
    torch.manual_seed(3)
    expected = torch.autograd.grad(function().square().sum(), list(inputs.values()))
    torch.manual_seed(3)
    recomputed = torch.utils.checkpoint.checkpoint(function, use_reentrant=False)
    got = torch.autograd.grad(recomputed.square().sum(), list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    inputs = {name: t.requires_grad_() for name, t in example_inputs(6, 8, 10, 2).items()}
    with peft_kernels.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(**inputs)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in inputs.values())
    torch.testing.assert_close(y.float(), lora_linear(**inputs), rtol=2e-2, atol=2e-2)


BAD = [
    ({"x": torch.ones(())}, ValueError, "x must have at least 1 dimension"),
    ({"x": torch.ones(2, 5)}, ValueError, r"x has shape \(2, 5\).*k = 6"),
    ({"weight": torch.ones(4)}, ValueError, r"weight must have 2 dimensions.*\(4,\)"),
    ({"lora_a": torch.ones(3, 5)}, ValueError, r"lora_a has shape \(3, 5\).*k = 6"),
    ({"lora_a": torch.ones(0, 6)}, ValueError, r"lora_a must have at least 1 row.*\(0, 6\)"),
    ({"lora_b": torch.ones(4, 2)}, ValueError, r"lora_b has shape \(4, 2\).*\[4, 3\]"),
    ({"bias": torch.ones(5)}, ValueError, r"bias has shape \(5,\).*\[4\]"),
    ({"x": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "x must be float32.*int64"),
    ({"weight": torch.ones(4, 6).half()}, TypeError, "weight must have x's dtype.*float16"),
    ({"lora_a": torch.ones(3, 6).half()}, TypeError, "lora_a must be torch.float32.*float16"),
    ({"lora_b": torch.ones(4, 3).half()}, TypeError, "lora_b must have lora_a's dtype.*float16"),
    ({"weight": torch.ones(4, 6, device="meta")}, ValueError, "weight must be on x's device.*meta"),
    ({"scale": torch.ones(2)}, ValueError, r"scale must be a float or a 0-d tensor.*\(2,\)"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\); got 1.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\); got -0.1"),
    ({"seed": 0.5, "dropout_p": 0.1}, TypeError, "seed must be an int.*0.5"),
    (
        {"seed": torch.ones(2), "dropout_p": 0.1},
        ValueError,
        r"seed must be.*got torch.float32 of shape",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        lora_linear(**example_inputs(2, 4, 6, 3) | change)


def test_the_native_op_checks_what_reaches_it():
    a = example_inputs(2, 4, 6, 3)
    args = [a["x"], a["weight"], None, a["lora_a"], a["lora_b"], 1.0, None, 0.0, None]
    for index, wrong in [(1, torch.ones(4, 5)), (3, torch.ones(3, 5)), (4, torch.ones(4, 2))]:
        with pytest.raises(RuntimeError, match="must be"):
            torch.ops.peft_kernels.lora_linear_fwd(*args[:index], wrong, *args[index + 1 :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_quick_way_is_the_op(dtype, dropout_p, bias):
    case = example_inputs(6, 5, 7, 3, dtype=dtype, bias=bias)
    x, weight, a, b = (case[name].requires_grad_() for name in ("x", "weight", "lora_a", "lora_b"))
    torch.manual_seed(1)
    expected = lora_linear(x, weight, a, b, bias=case.get("bias"), scale=2.0, dropout_p=dropout_p)
    torch.manual_seed(1)
    found = lora_linear_plain(x, weight, case.get("bias"), a, b, 2.0, dropout_p)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(y.sum(), (x, weight, a, b)) for y in (found, expected)]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("change", [
    {"x": (6, 8)}, {"x": ()}, {"weight": (5, 8)}, {"bias": (6,)}, {"lora_a": (3, 6)},
    {"lora_a": (0, 7)}, {"lora_b": (1, 3)}, {"lora_b": (5, 4)},
    {"x": "meta"}, {"bias": "meta"}, {"lora_a": "meta"}, {"lora_b": "meta"}, {"weight": "meta"},
], ids=str)  # fmt: skip
def test_the_quick_way_has_the_errors_of_the_op(change):
    case = example_inputs(6, 5, 7, 3)
    ((name, new),) = change.items()
    case[name] = case[name].to(new) if new == "meta" else torch.randn(new)
    x, weight, bias, a, b = (case[n] for n in ("x", "weight", "bias", "lora_a", "lora_b"))
    with pytest.raises(ValueError, match=f"{name}|device") as expected:
        lora_linear(x, weight, a, b, bias=bias)
    with pytest.raises(ValueError) as found:
        lora_linear_plain(x, weight, bias, a, b, 1.0, 0.0)
    assert str(found.value) == str(expected.value)
