"""prefix_attention: every backend against float64, masks, banks, gradients, strides, errors."""

import functools

import pytest
import torch
from errors import assert_as_good_as
from hypothesis import given
from hypothesis import strategies as st

import peft_kernels
from peft_kernels.ops import prefix_attention
from peft_kernels.ops.prefix_attention import example_inputs
from peft_kernels.tools.bench.measure import saved_bytes

BACKENDS = ["reference", "auto"]
HALVES = [torch.bfloat16, torch.float16]
TENSORS = ("q", "k", "v", "prefix_k", "prefix_v")
INFINITE = float("inf")


def widened(arguments):
    def wide(value):
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floats else value

    return {name: wide(value) for name, value in arguments.items()}


def run(inputs, grad, backend="auto", **options):
    """The output and the gradient of every tensor, by name."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in TENSORS}
    with peft_kernels.backend(backend):
        out = prefix_attention(**inputs | leaves, **options)
        out.backward(grad)
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def check(inputs, backend="auto", **options):
    """Runs ``backend`` and asserts that each result is as good as the eager path's."""
    grad = torch.randn(inputs["q"].shape).to(inputs["q"].dtype)
    exact = run(widened(inputs), grad.double(), **widened(options))
    eager = run(inputs, grad, "reference", **options)
    out = run(inputs, grad, backend, **options)
    for name in out:
        assert_as_good_as(out[name], eager[name], exact[name], name)
    return out, exact


def equation(
    q, k, v, prefix_k, prefix_v, *, is_causal=True, attn_mask=None, lengths=None,
    padding_side="right", scale=None, prefix_ids=None,
):  # fmt: skip
    """Row by row and head by head, with the prefix in front of the keys."""
    rows, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1:3]
    bank = [t if t.dim() == 4 else t.unsqueeze(0) for t in (prefix_k, prefix_v)]
    out = torch.zeros_like(q)
    for b in range(rows):
        prefix = 0 if prefix_ids is None else int(prefix_ids[b])
        real = keys if lengths is None else int(lengths[b])
        start = keys - real if padding_side == "left" else 0
        for h in range(heads):
            g = h // (heads // kv_heads)
            front = [t[prefix, g] if prefix >= 0 else t[0, g, :0] for t in bank]
            length = front[0].shape[0]
            scores = q[b, h] @ torch.cat([front[0], k[b, g]]).T * (scale or size**-0.5)
            for i in range(queries):
                for j in range(keys):
                    if (is_causal and j > keys - queries + i) or not start <= j < start + real:
                        scores[i, length + j] = -INFINITE
            if attn_mask is not None:
                mask = attn_mask.expand(rows, heads, queries, keys)[b, h]
                bias = mask.log() if mask.dtype is torch.bool else mask
                scores[:, length:] += bias
            weights = scores.softmax(-1).nan_to_num(0.0)
            out[b, h] = weights @ torch.cat([front[1], v[b, g]])
    return out


def mask_of(kind, rows, heads, queries, keys):
    if kind == "bool":
        return torch.rand(rows, 1, queries, keys) < 0.7
    if kind == "float":
        return torch.randn(heads, queries, keys)
    return torch.rand(keys) < 0.7 if kind == "of keys" else None


def test_backends_are_what_they_claim():
    assert peft_kernels.backend_of("prefix_attention", "cpu", torch.float32) == "cpu"
    assert peft_kernels.backend_of("prefix_attention", "cpu", torch.float64) == "reference"


@pytest.mark.parametrize("options", [
    {},
    {"is_causal": False, "scale": 0.3},
    {"attn_mask": "bool"},
    {"attn_mask": "float", "is_causal": False},
    {"attn_mask": "of keys", "lengths": torch.tensor([7, 0, 4]), "padding_side": "left"},
    {"lengths": torch.tensor([7, 2, 0]), "prefix_ids": torch.tensor([1, -1, 0])},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("queries", [1, 4, 7, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_equation(options, queries, backend):
    prefixes = 2 if "prefix_ids" in options else None
    inputs = example_inputs(3, queries, 4, 2, 6, 5, keys=7, prefixes=prefixes) | options
    inputs["attn_mask"] = mask_of(options.get("attn_mask"), 3, 4, queries, 7)
    exact = widened(inputs)
    torch.testing.assert_close(prefix_attention(**exact), equation(**exact), rtol=1e-13, atol=1e-13)
    with peft_kernels.backend(backend):
        got = prefix_attention(**inputs)
    torch.testing.assert_close(got.double(), equation(**exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 6, 2, 40, 19), (4, 1, 8, 2, 64, 30)], ids=str)
def test_against_float64(backend, dtype, shape):
    check(example_inputs(*shape, keys=150, dtype=dtype), backend)


@pytest.mark.builds
@given(
    batch=st.sampled_from([0, 1, 2, 5]),
    queries=st.sampled_from([0, 1, 2, 5, 13, 49, 150]),
    keys=st.sampled_from([None, 0, 3, 40, 131, 300]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]),
    dim=st.sampled_from([4, 8, 20, 33, 64, 80]),
    length=st.sampled_from([0, 3, 16, 20, 37, 130]),
    prefixes=st.sampled_from([None, None, 1, 3]),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    is_causal=st.booleans(),
    mask=st.sampled_from([None, None, "bool", "float", "of keys"]),
    padding=st.sampled_from([None, None, "left", "right"]),
)
def test_native_on_any_shape(
    batch, queries, keys, heads, dim, length, prefixes, dtype, is_causal, mask, padding
):
    keys = queries if keys is None else keys
    if padding or mask or prefixes or length == 0:
        # Where a query sees a single key, the gradients of its scores are nothing but rounding, in
        # which no backend is as good as another.
        keys = max(keys, 40)
        queries = min(queries, 13)
    inputs = example_inputs(
        batch, queries, *heads, dim, length, keys=keys, prefixes=prefixes, dtype=dtype
    )
    options = {"is_causal": is_causal, "attn_mask": mask_of(mask, batch, heads[0], queries, keys)}
    if padding:
        options |= {"lengths": torch.randint(20, keys + 1, (batch,)), "padding_side": padding}
    check(inputs, **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_text_with_a_float32_prefix(dtype):
    inputs = example_inputs(2, 30, 4, 2, 16, 9, dtype=dtype, prefix_dtype=torch.float32)
    out = run(inputs, torch.randn(2, 4, 30, 16).to(dtype))
    rounded = inputs | {name: inputs[name].to(dtype) for name in ("prefix_k", "prefix_v")}
    assert torch.equal(out["out"], prefix_attention(**rounded))
    assert (out["out"].dtype, out["k"].dtype) == (dtype, dtype)
    assert out["prefix_k"].dtype is out["prefix_v"].dtype is torch.float32


@pytest.mark.parametrize("queries", [3, 60])
def test_the_mask_may_be_in_any_dtype_and_of_any_strides(queries):
    inputs = example_inputs(2, queries, 4, 2, 8, 3, keys=70)
    wide = torch.randn(2, 4, 70, queries).bfloat16().double()
    expected = prefix_attention(**inputs, attn_mask=wide.mT.float())
    for mask in (wide.mT, wide.mT.bfloat16(), wide.half().mT, wide.float().mT.contiguous()):
        got = prefix_attention(**inputs, attn_mask=mask)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [2, 30])
def test_a_query_that_sees_nothing_is_0_and_has_no_gradient(backend, queries):
    inputs = example_inputs(3, queries, 2, 1, 8, 4, keys=20, prefixes=1)
    ids, lengths = torch.tensor([-1, 0, -1]), torch.tensor([0, 0, 20])
    mask = torch.zeros(3, 1, queries, 20)
    mask[2, 0, 1] = -INFINITE
    options = {"prefix_ids": ids, "lengths": lengths, "attn_mask": mask, "is_causal": False}
    out = run(inputs | options, torch.ones(3, 2, queries, 8), backend)
    blind = torch.zeros(3, queries, dtype=torch.bool)
    blind[0], blind[2, 1] = True, True
    for name in ("out", "q"):
        rows = out[name].transpose(1, 2)
        assert rows[blind].eq(0).all() and rows[~blind].ne(0).any(-1).all(), name
    for name in ("k", "v"):
        assert out[name][:2].eq(0).all() and out[name][2].ne(0).any(), name
    assert all(value.isfinite().all() for value in out.values())


@pytest.mark.parametrize(("backend", "held"), [("reference", 1e30), ("auto", torch.nan)])
def test_what_is_padding_changes_nothing(backend, held):
    """The native kernel doesn't even read it."""
    inputs = example_inputs(2, 12, 2, 2, 8, 5)
    options = {"lengths": torch.tensor([5, 12]), "padding_side": "left", "is_causal": False}
    grad = torch.randn(2, 2, 12, 8)
    expected = run(inputs, grad, backend, **options)
    spoilt = {name: inputs[name].clone() for name in TENSORS}
    spoilt["k"][0, :, :7] = spoilt["v"][0, :, :7] = held
    got = run(spoilt, grad, backend, **options)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend):
    inputs = example_inputs(2, 30, 2, 2, 16, 6)
    inputs["q"] *= 60
    out = run(inputs, torch.randn(2, 2, 30, 16), backend)
    exact = equation(**widened(inputs))
    torch.testing.assert_close(out["out"].double(), exact, rtol=1e-4, atol=1e-4)
    assert all(value.isfinite().all() for value in out.values())


def test_a_zero_gradient_would_fail():
    out, exact = check(example_inputs(3, 20, 4, 2, 16, 5, prefixes=2))
    for name in out:
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[name]), out[name], exact[name], name)


def test_an_unused_prefix_has_a_gradient_of_0():
    inputs = example_inputs(4, 20, 2, 2, 8, 5, prefixes=3)
    inputs["prefix_ids"] = torch.tensor([2, -1, 0, 2])
    out = run(inputs, torch.randn(4, 2, 20, 8))
    for name in ("prefix_k", "prefix_v"):
        assert out[name][1].eq(0).all() and out[name][0].ne(0).all() and out[name][2].ne(0).all()


@pytest.mark.parametrize("options", [
    {},
    {"prefixes": 2},
    {"is_causal": False, "lengths": torch.tensor([3, 0, 5])},
    {"attn_mask": torch.rand(3, 1, 4, 5) < 0.6, "padding_side": "left"},
], ids=["causal", "bank", "lengths", "mask"])  # fmt: skip
def test_gradcheck(options):
    options = dict(options)
    prefixes = options.pop("prefixes", None)
    inputs = example_inputs(3, 4, 4, 2, 3, 2, keys=5, prefixes=prefixes, dtype=torch.float64)

    def function(*tensors):
        return prefix_attention(**inputs | dict(zip(TENSORS, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in TENSORS])


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str
)
@pytest.mark.parametrize("suffix", ["", "_ref", "_triton"])
def test_opcheck(suffix, dtype):
    a = example_inputs(2, 3, 2, 1, 16, 3, keys=5, prefixes=2, dtype=dtype)
    ids, mask = a["prefix_ids"].int(), torch.zeros(5).expand(2, 2, 3, 5)
    bounds = torch.tensor([0, 1]).int(), torch.tensor([4, 5]).int()
    inputs = (*(a[name] for name in TENSORS), ids, mask, *bounds)
    alone = (*inputs[:3], *(t[:1] for t in inputs[3:5]), None, None, None, None)
    fwd = getattr(torch.ops.peft_kernels, "prefix_attention_fwd" + suffix).default
    bwd = getattr(torch.ops.peft_kernels, "prefix_attention_bwd" + suffix).default
    for arguments in (inputs, alone):
        torch.library.opcheck(fwd, (*arguments, True, 0.25))
        out, lse = fwd(*arguments, True, 0.25)
        assert out.transpose(1, 2).is_contiguous()
        for needs in [(True,) * 3, (False, True, False), (False, False, True)]:
            grads = torch.randn(2, 2, 3, 16).to(dtype), *arguments, out, lse, True, 0.25, *needs
            torch.library.opcheck(bwd, grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [*((name,) for name in TENSORS), ("q", "prefix_v"), ("k", "q")])
def test_each_gradient_alone(backend, names):
    inputs = example_inputs(2, 140, 2, 1, 8, 9)
    grad = torch.randn(2, 2, 140, 8)
    expected = run(inputs, grad)
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    with peft_kernels.backend(backend):
        prefix_attention(**inputs | leaves).backward(grad)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [3, 100])
def test_same_bits_on_every_repetition(backend, queries):
    inputs = example_inputs(7, queries, 4, 2, 16, 5, prefixes=2)
    originals = {name: tensor.clone() for name, tensor in inputs.items()}
    leaves = {name: inputs[name].requires_grad_() for name in TENSORS}
    grad = torch.randn(7, 4, queries, 16)
    kept = grad.clone()
    with peft_kernels.backend(backend):
        out = prefix_attention(**inputs)
        first = torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)
        second = torch.autograd.grad(out, list(leaves.values()), grad)
        again = prefix_attention(**inputs)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, kept)
    assert all(torch.equal(inputs[name], originals[name]) for name in inputs)


@pytest.mark.parametrize("shape", [(7, 100, 2, 1, 16, 20), (1, 200, 1, 1, 8, 3)], ids=str)
def test_same_bits_whatever_the_number_of_threads(shape):
    inputs = example_inputs(*shape)
    grad = torch.randn(inputs["q"].shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(inputs, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [2, 24])
def test_strides(backend, queries):
    inputs = example_inputs(2, queries, 4, 2, 8, 5, keys=24)
    grad = torch.randn(2, 4, queries, 8)
    expected = run(inputs, grad)

    def in_a_cache(tensor):
        """In front of memory that isn't its own."""
        longer = torch.cat([tensor, torch.full_like(tensor, torch.nan)], -2)
        return longer[..., : tensor.shape[-2], :]

    layouts = {
        "contiguous": lambda t: t.contiguous(),
        "head size first": lambda t: t.mT.contiguous().mT,
        "every other token": lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
        "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "in a cache": in_a_cache,
    }
    for name, layout in layouts.items():
        got = run({key: layout(tensor) for key, tensor in inputs.items()}, layout(grad), backend)
        for key in got:
            torch.testing.assert_close(got[key], expected[key], msg=f"{key} {name}")
    one = run(inputs, torch.ones(()).expand(2, 4, queries, 8), backend)
    full = run(inputs, torch.ones(2, 4, queries, 8), backend)
    assert all(torch.equal(one[key], full[key]) for key in one)


def test_saved_for_backward_is_the_output_and_a_number_by_query():
    inputs = example_inputs(2, 64, 4, 2, 16, 8)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    saved = saved_bytes(lambda: prefix_attention(**leaves), leaves.values())
    assert saved == 2 * 64 * 4 * (16 + 1) * 4


@pytest.mark.parametrize("options", [
    {}, {"lengths": torch.tensor([3, 6]), "padding_side": "left", "attn_mask": torch.rand(6) < 0.8},
], ids=["plain", "masked"])  # fmt: skip
def test_compiles_without_a_break(options):
    inputs = example_inputs(2, 6, 4, 2, 8, 3, prefixes=None if not options else 2)
    leaves = [inputs[name].requires_grad_() for name in TENSORS]
    function = functools.partial(prefix_attention, **inputs, **options)
    expected = torch.autograd.grad(function().square().sum(), leaves)
    compiled = torch.compile(lambda: function().square().sum(), fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_recomputes_the_same():
    inputs = example_inputs(2, 6, 4, 2, 8, 3)
    leaves = [inputs[name].requires_grad_() for name in TENSORS]
    function = functools.partial(prefix_attention, **inputs)
    expected = torch.autograd.grad(function().square().sum(), leaves)
    recomputed = torch.utils.checkpoint.checkpoint(function, use_reentrant=False)
    got = torch.autograd.grad(recomputed.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    a = example_inputs(2, 6, 4, 2, 8, 3)
    leaves = {name: t.requires_grad_() for name, t in a.items()}
    with peft_kernels.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        out = prefix_attention(**leaves)
    assert out.dtype is torch.bfloat16
    out.square().sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in leaves.values())
    torch.testing.assert_close(out.float(), prefix_attention(**a), rtol=3e-2, atol=3e-2)


ONE = torch.ones
BAD = [
    ({"q": ONE(2, 3, 8)}, ValueError, r"q must have 4 dimensions.*\(2, 3, 8\)"),
    ({"q": ONE(2, 3, 5, 8)}, ValueError, "k has 2 heads, which must divide.* 3"),
    ({"q": ONE(2, 4, 5, 0)}, ValueError, "q must end in a D of at least 1"),
    ({"k": ONE(2, 2, 5, 7)}, ValueError, r"k has shape \(2, 2, 5, 7\).*\(2, 2, 5, 8\)"),
    ({"v": ONE(2, 2, 6, 8)}, ValueError, r"v has shape \(2, 2, 6, 8\).*\(2, 2, 5, 8\)"),
    ({"prefix_k": ONE(3, 3, 8)}, ValueError, r"prefix_k has shape.*Hkv = 2 and D = 8"),
    ({"prefix_v": ONE(2, 4, 8)}, ValueError, r"prefix_v has shape.*\(1, 2, 3, 8\)"),
    ({"prefix_k": ONE(2, 8), "prefix_v": ONE(2, 8)}, ValueError, r"prefix_k has shape \(2, 8\)"),
    (
        {"prefix_k": ONE(4, 2, 3, 8), "prefix_v": ONE(4, 2, 3, 8)}, ValueError,
        "prefix_ids must be given for a bank of 4",
    ),
    ({"prefix_ids": torch.tensor([0, 1])}, ValueError, r"prefix_ids must be in \[-1, 0\]; got 1"),
    ({"prefix_ids": torch.tensor([0, -2])}, ValueError, r"prefix_ids must be in.*got -2"),
    ({"prefix_ids": torch.tensor([0])}, ValueError, r"prefix_ids has shape \(1,\).*\[2\]"),
    ({"prefix_ids": ONE(2)}, TypeError, "prefix_ids must be int32 or int64; got torch.float32"),
    ({"lengths": torch.tensor([0, 6])}, ValueError, r"lengths must be in \[0, 5\]; got 6"),
    ({"padding_side": "top"}, ValueError, "padding_side must be 'left' or 'right'; got 'top'"),
    ({"attn_mask": ONE(3, 5).bool()}, ValueError, r"attn_mask has shape \(3, 5\).*\(2, 4, 5, 5\)"),
    ({"attn_mask": ONE(5, 5).int()}, TypeError, "attn_mask must be bool or of floats; got.*int32"),
    ({"attn_mask": ONE(5, 5).requires_grad_()}, ValueError, "attn_mask must not require"),
    ({"attn_mask": ONE(5, 5, device="meta")}, ValueError, "attn_mask must be on q's device cpu"),
    ({"q": ONE(2, 4, 5, 8).int()}, TypeError, "q must be float32.*int32"),
    ({"k": ONE(2, 2, 5, 8).half()}, TypeError, "k must have q's dtype torch.float32.*float16"),
    ({"prefix_k": ONE(2, 3, 8).half()}, TypeError, "prefix_k must be torch.float32.*float16"),
    ({"prefix_v": ONE(2, 3, 8, device="meta")}, ValueError, "prefix_v must be on q's.*meta"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        prefix_attention(**example_inputs(2, 5, 4, 2, 8, 3) | change)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_the_lowest_float(backend, queries, dtype):
    """Models mask padding so: without a prefix its queries get what the softmax says, the mean."""
    a = example_inputs(2, queries, 2, 1, 16, 5, keys=50, prefixes=1, dtype=dtype)
    mask = torch.zeros(2, 1, queries, 50)
    mask[:, :, 1] = torch.finfo(torch.float32).min
    a["prefix_ids"] = torch.tensor([-1, 0])
    with peft_kernels.backend(backend):
        out = prefix_attention(**a, attn_mask=mask, is_causal=False)[:, :, 1].float()
    mean = a["v"][0].float().mean(1).expand(2, -1)
    assert_close = torch.testing.assert_close
    assert_close(out[0], mean, rtol=0, atol=2**-9 if dtype is torch.bfloat16 else 1e-6)
    prefix = {name: a[name] for name in ("prefix_k", "prefix_v")}  # the other row's is all it sees
    alone = {name: a[name][1:, :, :0] for name in ("k", "v")}
    expected = prefix_attention(a["q"][1:], **alone, **prefix, is_causal=False)[0, :, 1].float()
    assert_close(out[1], expected, rtol=0, atol=2**-7 if dtype is torch.bfloat16 else 1e-6)
