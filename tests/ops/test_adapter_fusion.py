"""adapter_fusion: every backend against float64, gradients, absorbing, strides, compilation."""

import pytest
import torch
import torch.nn.functional as F
from errors import assert_as_good_as
from hypothesis import given
from hypothesis import strategies as st

import peft_kernels
from peft_kernels.ops._activations import ACTIVATIONS
from peft_kernels.ops.adapter_fusion import Absorbed, absorb, adapter_fusion, example_inputs
from peft_kernels.tools.bench.measure import saved_bytes

BACKENDS = ["reference", "auto"]
HALVES = [torch.bfloat16, torch.float16]
LISTS = ("down_weights", "down_biases", "up_weights", "up_biases")
ABSORBED = ("score_weight", "score_bias", "mix_weight", "mix_bias")


def flat(inputs):
    """The tensors by name; those of lists as name.index."""
    found = {}
    for name, value in inputs.items():
        if name in LISTS:
            found |= {f"{name}.{i}": tensor for i, tensor in enumerate(value)}
        elif value is not None:
            found[name] = value
    return found


def fuse(tensors, *, activation="relu", scales=None, temperature=1.0, absorb_query=True):
    """y and p of tensors as ``flat`` names them: absorbs, and then fuses."""
    lists = {
        name: [tensor for key, tensor in tensors.items() if key.startswith(name + ".")]
        for name in LISTS
    }
    absorbed = absorb(
        lists["up_weights"],
        lists["up_biases"],
        *(tensors.get(f"{name}_{kind}") for name, kind in (("query", "weight"), ("query", "bias"))),
        tensors.get("key_weight"),
        tensors.get("value_weight"),
        scales=scales,
        temperature=temperature,
        absorb_query=absorb_query,
    )
    query = tensors.get("query")
    if not absorb_query:
        query = F.linear(tensors["x"], tensors["query_weight"], tensors["query_bias"])
    return adapter_fusion(
        tensors["x"], lists["down_weights"], lists["down_biases"], absorbed,
        query=query, activation=activation, residual=tensors.get("residual"),
    )  # fmt: skip


def run(inputs, grad, backend="auto", **options):
    """y, p and the gradient of every tensor, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in flat(inputs).items()}
    with peft_kernels.backend(backend):
        y, p = fuse(leaves, **options)
        y.backward(grad)
    return {"y": y.detach(), "p": p} | {name: leaf.grad for name, leaf in leaves.items()}


def joined(results):
    """The results with all adapters' gradients of one kind as one: an adapter's own may be of one
    number, whose error is a matter of luck."""
    kinds = {name.split(".")[0]: [] for name in results}
    for name, tensor in results.items():
        kinds[name.split(".")[0]].append(tensor.flatten())
    return {name: torch.cat(tensors) for name, tensors in kinds.items()}


def check(inputs, backend, **options):
    """Runs ``backend`` and asserts that each result is as good as the eager path's."""
    m, n = inputs["x"].shape[0], inputs["up_weights"][0].shape[0]
    grad = torch.randn(m, n).to(inputs["x"].dtype)
    wide = {name: tensor.double() for name, tensor in flat(inputs).items()}
    exact = run(wide, grad.double(), **options)
    eager = run(inputs, grad, "reference", **options)
    out = run(inputs, grad, backend, **options)
    for name, result in joined(out).items():
        assert_as_good_as(result, joined(eager)[name], joined(exact)[name], name)
    return out, exact


def with_rows(inputs, *, query=False, residual=False):
    """The inputs with a query or a residual of their own."""
    x = inputs["x"]
    extra = {"query": torch.randn_like(x)} if query else {}
    return inputs | extra | ({"residual": torch.randn_like(x)} if residual else {})


def test_backends_are_what_they_claim():
    assert peft_kernels.backend_of("adapter_fusion", "cpu", torch.float32) == "cpu"
    assert peft_kernels.backend_of("adapter_fusion", "cpu", torch.float64) == "reference"


# ---- the equation ----------------------------------------------------------------------------


def direct(a, *, query=None, key_bias=0.0, scales=None, temperature=1.0):
    """y and p as the paper has them: every adapter's output in full, then Q, K and V of them."""
    identity = torch.eye(a["up_weights"][0].shape[0], dtype=torch.float64)
    q_weight, k_weight, v_weight = (
        identity if a.get(f"{name}_weight") is None else a[f"{name}_weight"]
        for name in ("query", "key", "value")
    )
    scales = [1.0] * len(a["down_weights"]) if scales is None else scales
    outputs = [
        s * F.linear(F.silu(F.linear(a["x"], down, down_bias)), up, up_bias)
        for s, down, down_bias, up, up_bias in zip(
            scales, a["down_weights"], a["down_biases"], a["up_weights"], a["up_biases"],
            strict=True,
        )
    ]  # fmt: skip
    stacked = torch.stack(outputs, 1)  # [m, N, n]
    keys, values = stacked @ k_weight.T + key_bias, stacked @ v_weight.T
    q = F.linear(a["x"] if query is None else query, q_weight, a.get("query_bias"))
    p = torch.softmax((keys @ q[:, :, None])[:, :, 0] / temperature, 1)
    return (p[:, None] @ values)[:, 0], p


@pytest.mark.parametrize(
    "missing", [(), ("query_weight", "query_bias"), ("query_bias",), ("key_weight",),
                ("value_weight",), ("query_weight", "query_bias", "key_weight", "value_weight")],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_float64_matches_the_equation(missing, temperature):
    a = example_inputs(5, 7, (3, 1, 4), dtype=torch.float64)
    a = {name: value for name, value in a.items() if name not in missing}
    key_bias = torch.randn(7, dtype=torch.float64)  # cancels in the softmax
    scales = [0.7, torch.tensor(1.3, dtype=torch.float64), -1.0]
    options = {"scales": scales, "temperature": temperature}
    expected, weights = direct(a, key_bias=key_bias, **options)
    y, p = fuse(flat(a), activation="swish", **options)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p, weights, rtol=1e-12, atol=1e-12)


def test_a_query_and_a_residual_of_their_own():
    a = with_rows(example_inputs(5, 7, (3, 4), dtype=torch.float64), query=True, residual=True)
    expected, weights = direct(a, query=a["query"])
    y, p = fuse(flat(a), activation="silu")
    torch.testing.assert_close(y, expected + a["residual"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p, weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_not_absorbed(backend):
    inputs, grad = example_inputs(12, 20, (4, 6)), torch.randn(12, 20)
    expected = run(inputs, grad, backend)
    out = run(inputs, grad, backend, absorb_query=False)
    for name in expected:
        torch.testing.assert_close(out[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


# ---- backends --------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "residual": {"residual": True},
    "query": {"query": True},
    "both": {"query": True, "residual": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("m", [12, 37])
def test_against_float64(backend, dtype, kind, m):
    inputs = with_rows(example_inputs(m, 70, (19, 8, 30), dtype=dtype), **OPTIONS[kind])
    check(inputs, backend, activation="relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    inputs = example_inputs(40, 33, (21, 5))
    inputs["x"] *= 2
    check(inputs, "auto", activation=activation)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_base_with_float32_adapters(dtype):
    inputs = example_inputs(20, 50, (8, 9), dtype=dtype, adapter_dtype=torch.float32)
    out, _ = check(inputs, "auto")
    assert (out["y"].dtype, out["x"].dtype) == (dtype, dtype)
    assert out["down_weights.0"].dtype is out["query_weight"].dtype is torch.float32


def test_learned_scales_and_a_temperature():
    scales = [torch.tensor(0.5), 2.0, torch.tensor(1.5)]
    check(example_inputs(30, 24, (7, 7, 7)), "auto", scales=scales, temperature=3.0)


@pytest.mark.builds
@given(
    m=st.sampled_from([0, 17, 31, 48, 97, 130, 300]),
    n=st.sampled_from([16, 31, 33, 64, 129]),
    sizes=st.lists(st.sampled_from([5, 6, 8, 17, 40]), min_size=1, max_size=9),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    wide_adapter=st.booleans(),
    kind=st.sampled_from(list(OPTIONS)),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_native_on_any_shape(m, n, sizes, dtype, wide_adapter, kind, activation):
    adapter_dtype = torch.float32 if wide_adapter else dtype
    inputs = example_inputs(m, n, sizes, dtype=dtype, adapter_dtype=adapter_dtype)
    check(with_rows(inputs, **OPTIONS[kind]), "auto", activation=activation)


# Of a row or two, the eager path's error is a matter of luck: a number that both must stay within.
@pytest.mark.builds
@given(
    m=st.sampled_from([1, 2, 3, 8, 16]),
    n=st.sampled_from([1, 2, 5, 7, 33]),
    sizes=st.lists(st.sampled_from([1, 2, 6, 17]), min_size=1, max_size=9),
    kind=st.sampled_from(list(OPTIONS)),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_native_on_small_shapes(m, n, sizes, kind, activation):
    inputs = with_rows(example_inputs(m, n, sizes), **OPTIONS[kind])
    grad = torch.randn(m, n)
    wide = {name: tensor.double() for name, tensor in flat(inputs).items()}
    exact = run(wide, grad.double(), activation=activation)
    for name, result in run(inputs, grad, activation=activation).items():
        torch.testing.assert_close(result.double(), exact[name], rtol=1e-4, atol=2e-5, msg=name)


def raw_inputs(m, k, d, n, sizes):
    """The op's own inputs, with widths that all differ; a query where d isn't None."""
    ranks, adapters = sum(sizes), len(sizes)
    width = k if d is None else d
    rows = [torch.randn(m, k), None if d is None else torch.randn(m, d)]
    down = [torch.randn(ranks, k) * k**-0.5, torch.randn(ranks)]
    score = [torch.randn(ranks + adapters, size) for size in (width, 1)]
    score = [score[0] * (width * max(sizes)) ** -0.5, score[1][:, 0] * 0.3]
    mix = torch.randn(n, ranks + adapters) * ranks**-0.5
    return *rows, *down, *score, mix[:, :ranks], mix[:, ranks:].T, list(sizes), "gelu"


def check_raw(inputs, residual, needs):
    """Both native ops against the reference, in float32 and in float64."""
    fwd, bwd = torch.ops.peft_kernels.adapter_fusion_fwd, torch.ops.peft_kernels.adapter_fusion_bwd
    wide = [v.double() if isinstance(v, torch.Tensor) else v for v in (*inputs, residual)]
    eager, exact = reference("fwd", *inputs, residual), reference("fwd", *wide)
    for i, result in enumerate(fwd(*inputs, residual)):
        assert_as_good_as(result, eager[i], exact[i], f"forward {i}")
    dy, saved = torch.randn_like(eager[0]), eager[1:]
    exact = reference(
        "bwd", dy.double(), *wide[:-1], *(tensor.double() for tensor in saved), *needs
    )
    eager = reference("bwd", dy, *inputs, *saved, *needs)
    for i, result in enumerate(bwd(dy, *inputs, *saved, *needs)):
        assert_as_good_as(result, eager[i], exact[i], f"backward {i}")


def reference(which, *inputs):
    return getattr(torch.ops.peft_kernels, f"adapter_fusion_{which}_ref")(*inputs)


@pytest.mark.parametrize("sizes", [(48,) * 3, (1, 70, 8), (3,) * 64, (900, 700)], ids=len)
@pytest.mark.parametrize(("k", "d", "n"), [(40, None, 70), (96, 33, 17), (200, 8, 130)])
@pytest.mark.parametrize("m", [48, 200])
def test_widths_that_differ(m, k, d, n, sizes):
    check_raw(
        raw_inputs(m, k, d, n, sizes), torch.randn(m, n), (True, d is not None, True, True, True)
    )


# More than the rows whose factors are held at once.
@pytest.mark.builds
def test_many_rows():
    check_raw(raw_inputs(2500, 20, None, 24, (8, 5)), None, (True, False, True, True, True))


def test_a_zero_gradient_would_fail():
    out, exact = check(with_rows(example_inputs(12, 20, (4, 5)), query=True, residual=True), "auto")
    for name in out:
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[name]), out[name], exact[name], name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("query", [False, True])
def test_gradcheck(activation, query):
    inputs = example_inputs(4, 5, (3, 2), dtype=torch.float64)
    tensors = flat(with_rows(inputs, query=query, residual=True))

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        return fuse(named, activation=activation, scales=[0.8, 1.2], temperature=1.5)[0]

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("suffix", ["", "_ref"])
@pytest.mark.parametrize("d", [None, 4])
def test_opcheck(suffix, d):
    inputs = raw_inputs(5, 6, d, 7, (3, 2))
    fwd = getattr(torch.ops.peft_kernels, "adapter_fusion_fwd" + suffix).default
    bwd = getattr(torch.ops.peft_kernels, "adapter_fusion_bwd" + suffix).default
    torch.library.opcheck(fwd, (*inputs, torch.randn(5, 7)))
    _, *saved = fwd(*inputs, None)
    for needs in [(True, d is not None, True, True, True), (False, True, False, True, False)]:
        torch.library.opcheck(bwd, (torch.randn(5, 7), *inputs, *saved, *needs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*flat(example_inputs(1, 2, (1,))), "query", "residual"])
def test_each_gradient_alone(backend, name):
    inputs = with_rows(example_inputs(9, 5, (4, 3)), query=True, residual=True)
    grad = torch.randn(9, 5)
    expected = run(inputs, grad)[name]
    tensors = {key: tensor.detach() for key, tensor in flat(inputs).items()}
    leaf = tensors[name].requires_grad_()
    with peft_kernels.backend(backend):
        fuse(tensors)[0].backward(grad)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)


def test_only_what_is_needed_is_made():
    inputs = raw_inputs(9, 6, 4, 7, (3, 2))
    fwd, bwd = torch.ops.peft_kernels.adapter_fusion_fwd, torch.ops.peft_kernels.adapter_fusion_bwd
    _, *saved = fwd(*inputs, None)
    dy = torch.randn(9, 7)
    everything = bwd(dy, *inputs, *saved, *(True,) * 5)
    outputs = {0: (0,), 1: (1,), 2: (2, 3), 3: (4, 5), 4: (6, 7)}
    for flag, kept in outputs.items():
        found = bwd(dy, *inputs, *saved, *(i == flag for i in range(5)))
        for i, gradient in enumerate(found):
            assert torch.equal(gradient, everything[i] if i in kept else torch.empty(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [3, 100])
def test_same_bits_on_every_repetition(backend, rows):
    inputs = with_rows(example_inputs(rows, 24, (5, 6)), residual=True)
    leaves = {name: tensor.requires_grad_() for name, tensor in flat(inputs).items()}
    originals = {name: tensor.detach().clone() for name, tensor in leaves.items()}
    grad = torch.randn(rows, 24)
    kept = grad.clone()
    with peft_kernels.backend(backend):
        y, p = fuse(leaves)
        first = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
        second = torch.autograd.grad(y, list(leaves.values()), grad)
        again = fuse(leaves)
    assert torch.equal(y, again[0]) and torch.equal(p, again[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, kept)
    assert all(torch.equal(leaves[name], originals[name]) for name in leaves)


@pytest.mark.parametrize("m", [20, 100])
def test_same_bits_with_any_number_of_threads(m):
    inputs, needs = raw_inputs(m, 24, 16, 40, (5, 6)), (True,) * 5
    fwd, bwd = torch.ops.peft_kernels.adapter_fusion_fwd, torch.ops.peft_kernels.adapter_fusion_bwd
    dy, threads, found = torch.randn(m, 40), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, *saved = fwd(*inputs, None)
            found.append((y, *saved, *bwd(dy, *inputs, *saved, *needs)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend):
    tensors = flat(example_inputs(24, 16, (4, 3)))
    x = tensors.pop("x")
    plain, weights = fuse(tensors | {"x": x, "residual": x})
    views = {
        "1-d": (x[3], plain[3], weights[3]),
        "4-d": (x.view(2, 3, 4, 16), plain.view(2, 3, 4, 16), weights.view(2, 3, 4, 2)),
        "column-major": (x.T.contiguous().T, plain, weights),
        "every other row": (x.repeat_interleave(2, 0)[::2], plain, weights),
        "every other column": (x.repeat_interleave(2, 1)[:, ::2], plain, weights),
        "expanded": (x[:1].expand(5, 16), plain[:1].expand(5, 16), weights[:1].expand(5, 2)),
    }
    strided = {
        name: t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2]
        for name, t in tensors.items()
    }
    with peft_kernels.backend(backend):
        for name, (view, expected, p) in views.items():
            for query in (None, view.clone()):
                rows = {"x": view, "residual": view} | ({} if query is None else {"query": query})
                found = fuse(strided | rows)
                torch.testing.assert_close(found[0], expected, msg=name)
                torch.testing.assert_close(found[1], p, msg=name)


def absorbed_of(inputs):
    names = ("up_weights", "up_biases", "query_weight", "query_bias", "key_weight", "value_weight")
    return absorb(*(inputs[name] for name in names))


@pytest.mark.parametrize("backend", BACKENDS)
def test_absorbed_matrices_in_any_layout(backend):
    a = example_inputs(20, 16, (4, 3))
    absorbed = absorbed_of(a)
    expected = adapter_fusion(a["x"], a["down_weights"], a["down_biases"], absorbed)
    for change in (torch.Tensor.contiguous, lambda t: t.T.contiguous().T if t.dim() == 2 else t):
        other = Absorbed(*(change(getattr(absorbed, name)) for name in ABSORBED))
        with peft_kernels.backend(backend):
            found = adapter_fusion(a["x"], a["down_weights"], a["down_biases"], other)
        torch.testing.assert_close(found, expected)


def test_x_given_as_the_query_is_no_query():
    a = example_inputs(6, 8, (2, 3))
    x = a["x"].requires_grad_()
    arguments = (x, a["down_weights"], a["down_biases"], absorbed_of(a))
    y, _ = adapter_fusion(*arguments, query=x)
    expected, _ = adapter_fusion(*arguments)
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
    assert torch.equal(*grads)


def test_the_weights_get_no_gradient():
    a = example_inputs(6, 8, (2, 3))
    y, p = adapter_fusion(
        a["x"].requires_grad_(), a["down_weights"], a["down_biases"], absorbed_of(a)
    )
    assert y.requires_grad and not p.requires_grad
    torch.testing.assert_close(p.sum(1), torch.ones(6))


def test_saved_for_backward_is_bottleneck_sized():
    m, sizes = 64, (4, 6, 3)
    a = example_inputs(m, 128, sizes)
    absorbed = absorbed_of(a)
    tensors = [a["x"].requires_grad_(), *(getattr(absorbed, name) for name in ABSORBED)]
    downs = sum(t.numel() for t in (*a["down_weights"], *a["down_biases"])) * 4  # put together

    def forward():
        return adapter_fusion(a["x"], a["down_weights"], a["down_biases"], absorbed)[0]

    saved = saved_bytes(forward, tensors) - downs
    assert saved == m * (2 * sum(sizes) + 2 * len(sizes)) * 4


def test_compiles_without_a_break():
    tensors = flat(with_rows(example_inputs(6, 8, (2, 3)), query=True, residual=True))
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    expected = torch.autograd.grad(fuse(tensors)[0].square().sum(), list(tensors.values()))
    compiled = torch.compile(lambda: fuse(tensors)[0].square().sum(), fullgraph=True)
    found = torch.autograd.grad(compiled(), list(tensors.values()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    a = example_inputs(6, 8, (2, 3))
    absorbed = absorbed_of(a)
    x = a["x"].requires_grad_()
    arguments = (x, a["down_weights"], a["down_biases"], absorbed)
    with peft_kernels.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        y, p = adapter_fusion(*arguments, residual=x)
    assert (y.dtype, p.dtype) == (torch.bfloat16, torch.float32)
    y.square().sum().backward()
    assert x.grad.dtype is torch.float32
    expected = adapter_fusion(*arguments, residual=x)
    torch.testing.assert_close(y.float(), expected[0], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(p, expected[1], rtol=3e-2, atol=3e-2)


# ---- errors ----------------------------------------------------------------------------------

BAD = [
    ({"x": torch.ones(())}, ValueError, "x must have at least 1 dimension"),
    ({"down_weights": []}, ValueError, "at least one adapter to fuse; got none"),
    ({"down_biases": [torch.ones(3)]}, ValueError, "down_biases must be one.*1 for 2"),
    ({"x": torch.ones(2, 5)}, ValueError, r"down_weights\[0\] has shape \(3, 6\).*\[r, 5\]"),
    ({"down_biases": [torch.ones(3)] * 2}, ValueError, r"down_biases\[1\].*\(3,\).*\[2\]"),
    ({"score_weight": torch.ones(7, 5)}, ValueError, r"absorbed.score_weight.*\(7, 5\).*\(7, 6\)"),
    ({"score_bias": torch.ones(5)}, ValueError, r"absorbed.score_bias.*\(5,\).*\(7,\)"),
    ({"mix_weight": torch.ones(6, 4)}, ValueError, r"absorbed.mix_weight.*\(6, 4\).*\(6, 5\)"),
    ({"mix_bias": torch.ones(3, 6)}, ValueError, r"absorbed.mix_bias.*\(3, 6\).*\(2, 6\)"),
    ({"query": torch.ones(3, 6)}, ValueError, r"query has shape \(3, 6\).*\(2, 6\)"),
    ({"residual": torch.ones(2, 5)}, ValueError, r"residual has shape \(2, 5\).*\(2, 6\)"),
    ({"residual": torch.ones(2, 6).half()}, TypeError, "residual must have x's dtype.*float16"),
    ({"x": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "x must be float32.*int64"),
    ({"mix_bias": torch.ones(2, 6).half()}, TypeError, "absorbed.mix_bias must be.*float16"),
    ({"score_bias": torch.ones(7, device="meta")}, ValueError, "score_bias must be on x's.*meta"),
    ({"activation": "reLU6"}, ValueError, "activation must be one of gelu.*'reLU6'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    a = example_inputs(2, 6, (3, 2))
    absorbed = vars(absorbed_of(a)) | {k: v for k, v in change.items() if k in ABSORBED}
    arguments = {name: a[name] for name in ("x", "down_weights", "down_biases")}
    arguments |= {name: value for name, value in change.items() if name not in ABSORBED}
    with pytest.raises(error, match=message):
        adapter_fusion(**arguments, absorbed=Absorbed(**absorbed))
