"""The Triton kernels of prefix_attention, in the interpreter: each result against float64."""

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from errors import assert_as_good_as
from triton.runtime import interpreter

import peft_kernels
from peft_kernels.ops import _prefix_reference as reference
from peft_kernels.ops.prefix_attention import prefix_attention
from peft_kernels.triton.common import chips, launch
from peft_kernels.triton.prefix_attention import launch as launchers
from peft_kernels.triton.prefix_attention import tiles

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "f16": (F16, F16)}
DTYPES |= {"bf16/f32": (BF16, F32), "f16/f32": (F16, F32)}
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


def inputs_of(
    b=2, hq=2, hkv=1, s=20, t=25, length=7, d=16, *, prefixes=None, dtypes="f32"
):  # fmt: skip
    """The op's tensors by name; a prefix of another dtype has values that q's dtype holds."""
    dtype, prefix_dtype = DTYPES[dtypes]
    bank = (hkv, length, d) if prefixes is None else (prefixes, hkv, length, d)
    shapes = (b, hq, s, d), (b, hkv, t, d), (b, hkv, t, d), bank, bank
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors[3:] = [tensor.to(prefix_dtype) for tensor in tensors[3:]]
    return dict(zip(NAMES, tensors, strict=True))


def composed(
    q, k, v, prefix_k, prefix_v, *, is_causal=True, lengths=None, padding_side="right",
    prefix_ids=None, attn_mask=None,
):  # fmt: skip
    """The op of PyTorch's own: one attention over the prefix and the text, put side by side."""
    (rows, heads, queries, _), (kv_heads, keys) = q.shape, k.shape[1:3]
    ids = torch.zeros(rows, dtype=torch.long) if prefix_ids is None else prefix_ids
    bank = [p if p.dim() == 4 else p.unsqueeze(0) for p in (prefix_k, prefix_v)]
    key, query = torch.arange(keys), torch.arange(queries)[:, None]
    text = torch.ones(rows, 1, queries, keys, dtype=torch.bool)
    if is_causal:
        text &= key <= query + keys - queries
    if lengths is not None:
        away = key if padding_side == "right" else keys - 1 - key
        text &= (away < lengths[:, None])[:, None, None]
    if attn_mask is not None:
        text &= attn_mask
    own = (ids >= 0)[:, None, None, None].expand(rows, 1, queries, bank[0].shape[2])
    seen = torch.cat([own, text], 3)
    anything = seen.any(3, keepdim=True)
    sides = [
        torch.cat([p.to(q.dtype)[ids.clamp_min(0)], x], 2).repeat_interleave(heads // kv_heads, 1)
        for p, x in zip(bank, (k, v), strict=True)
    ]
    return F.scaled_dot_product_attention(q, *sides, seen | ~anything) * anything


def run(inputs, backend, *, needed=NAMES, **options):
    """out and the gradients of the ``needed`` tensors by name."""
    leaves = {
        name: tensor.detach().requires_grad_(name in needed) for name, tensor in inputs.items()
    }
    if backend == "composed":
        out = composed(**leaves, **options)
    else:
        with peft_kernels.backend(backend):
            out = prefix_attention(**leaves, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(BF16)
    receivers = [leaves[name] for name in needed]
    gradients = torch.autograd.grad(out, receivers, dout.to(out.dtype))
    return {"out": out.detach()} | dict(zip(needed, gradients, strict=True))


def check(inputs, **options):
    """No worse than eager: of 16-bit tensors PyTorch's own attention, which rounds probabilities.

    A prefix's gradients are held to the reference, which rounds nothing but its results.
    """
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    exact = run(wide, "reference", **options)
    eager = run(inputs, "reference", **options)
    if inputs["q"].dtype is not F32:
        own = run(inputs, "composed", **options)
        eager |= {name: own[name] for name in ("out", "q", "k", "v")}
    for name, out in run(inputs, "triton", **options).items():
        assert out.dtype is eager[name].dtype, name
        assert_as_good_as(out, eager[name], exact[name], name)


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def mask_of(kind, *shape):
    if kind == "bool":
        return torch.rand(shape) > 0.3
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -math.inf)


# ---- against float64 -------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_against_float64(dtypes, is_causal):
    check(inputs_of(s=33, t=40, length=20, dtypes=dtypes), is_causal=is_causal)


@pytest.mark.parametrize("dtypes", ["f32", "f16"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_lengths(side, is_causal, dtypes):
    """Rows of padding alone, of none, and of some."""
    lengths = torch.tensor([0, 70, 33])
    inputs = inputs_of(b=3, t=70, dtypes=dtypes)
    check(inputs, lengths=lengths, padding_side=side, is_causal=is_causal)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(2, 4, 20, 25), (2, 1, 1, 25), (20, 25), (4, 1, 1)])
def test_masks(kind, shape):
    check(inputs_of(hq=4, hkv=2), attn_mask=mask_of(kind, *shape), lengths=torch.tensor([13, 25]))


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_a_bank(dtypes):
    """A prefix for some rows, none for another, and prefixes that no row has."""
    inputs = inputs_of(b=5, hq=4, hkv=2, prefixes=4, length=40, dtypes=dtypes)
    check(inputs, prefix_ids=torch.tensor([2, -1, 0, 2, 2]))


@pytest.mark.parametrize(
    "sizes",
    [
        {"s": 1, "t": 1, "length": 1, "d": 1, "hq": 1, "hkv": 1, "b": 1},
        {"hq": 4, "hkv": 2, "s": 37, "t": 71, "length": 41, "d": 23},
        {"s": 9, "t": 12, "d": 130, "hq": 2, "hkv": 2},
        {"s": 30, "t": 12},  # queries before the text, which see the prefix alone
        {"s": 5, "t": 9, "hq": 3, "hkv": 1},
        {"s": 3, "t": 70, "hq": 14, "hkv": 2},  # seven heads share their keys
    ],
    ids=str,
)
def test_odd_sizes(sizes):
    check(inputs_of(**sizes))


@pytest.mark.parametrize("empty", ["b", "s", "t", "length"])
def test_empty(empty):
    out = run(inputs_of(**{empty: 0}), "triton")
    exact = run(inputs_of(**{empty: 0}), "reference")
    assert {name: tensor.shape for name, tensor in out.items()} == {
        name: tensor.shape for name, tensor in exact.items()
    }
    if empty in ("t", "length"):
        check(inputs_of(**{empty: 0}))
    else:
        assert not any(tensor.any() for tensor in out.values())


def test_a_query_that_sees_nothing():
    """0, and no gradient, not a NaN; beside a prefix in the bank that another row has."""
    inputs = inputs_of(b=2, s=30, t=12, prefixes=2)
    options = {"prefix_ids": torch.tensor([1, -1]), "lengths": torch.tensor([5, 0])}
    check(inputs, **options)
    out = run(inputs, "triton", **options)
    for name in ("out", "q", "k", "v"):
        assert not out[name][1].any() and out[name][0].any(), name


@pytest.mark.parametrize("lowest", [torch.finfo(F32).min, torch.finfo(BF16).min])
def test_a_mask_of_the_lowest_number(lowest):
    """A row of it alone, as models make for padding: finite, and its gradients too."""
    inputs = inputs_of(length=0)
    mask = torch.zeros(2, 1, 20, 25)
    mask[0, :, :5] = lowest
    mask[1, :, :, :9] = lowest
    out = run(inputs, "triton", attn_mask=mask, is_causal=False)
    assert all(tensor.isfinite().all() for tensor in out.values())
    q, k, v = (inputs[name].double() for name in "qkv")
    exact = F.scaled_dot_product_attention(q, k, v, mask.double(), enable_gqa=True)
    torch.testing.assert_close(out["out"].double(), exact, rtol=1e-5, atol=1e-5)


def test_scores_far_apart():
    inputs = inputs_of()
    inputs["prefix_k"] *= 300
    inputs["q"][0] *= 100
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    out, exact = run(inputs, "triton"), run(wide, "reference")
    for name in out:
        assert out[name].isfinite().all(), name
        error = (out[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 1e-2, name  # float32 scores of 10^5 are known to a hundredth


@pytest.mark.parametrize("scale", [0.3, 0.0, -1.0])
def test_scale(scale):
    check(inputs_of(), scale=scale)


def test_a_zero_gradient_would_fail():
    inputs = inputs_of()
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    out, exact = run(inputs, "triton"), run(wide, "reference")
    for name in out:
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[name]), out[name], exact[name], name)


# ---- tiles and parts -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*chips.ARCHS, "other"])
def test_shipped_tiles(arch):
    with patch.object(chips, "arch_name", lambda device: arch):
        check(
            inputs_of(b=2, s=70, t=150, length=70, dtypes="bf16"),
            lengths=torch.tensor([150, 80]),
            padding_side="left",
        )


@pytest.mark.parametrize("size", [16, 80, 256])
@pytest.mark.parametrize("arch", [*chips.ARCHS, "other"])
def test_shipped_tiles_with_a_mask(arch, size):
    with patch.object(chips, "arch_name", lambda device: arch):
        check(
            inputs_of(b=1, s=35, t=70, length=9, d=size, dtypes="bf16"),
            attn_mask=mask_of("bool", 1, 1, 35, 70),
        )


@pytest.mark.parametrize("size", [80, 256])
@pytest.mark.parametrize(
    ("arch", "dtypes"), [*((arch, "bf16") for arch in (*chips.ARCHS, "other")), ("sm_80", "f32")]
)
def test_shipped_tiles_of_wide_heads(arch, dtypes, size):
    with patch.object(chips, "arch_name", lambda device: arch):
        check(inputs_of(b=1, s=35, t=70, length=35, d=size, dtypes=dtypes))


@pytest.mark.parametrize("kernel", ["few", "fwd", "query_grad", "text_grad", "prefix_grad"])
def test_every_head_size_has_a_tile(kernel):
    for by_kernel in (*tiles.TILES.values(), tiles.FLOAT32):
        assert min(by_kernel[kernel]) == 64
        assert min(by_kernel.get(f"{kernel}_masked", [64])) == 64


@pytest.mark.parametrize(("queries", "side"), [(1, "left"), (2, "right")])
def test_decoding_in_parts(queries, side):
    """Some parts have no key of a row; a row has no key at all, and no prefix."""
    inputs = inputs_of(b=3, s=queries, t=530, d=8, prefixes=1, dtypes="bf16")
    options = {"lengths": torch.tensor([530, 30, 0]), "padding_side": side}
    options["prefix_ids"] = torch.tensor([0, 0, -1])
    with noting() as launched:
        check(inputs, **options)
    assert "prefix_attention_combine_kernel" in launched


def test_parts_have_many_keys():
    """Storing their out is little beside reading their keys; the last part is not empty."""
    for keys in (1, 255, 300, 511, 512, 4097, 100_000):
        q = torch.empty(1, 8, 1, 64, device="meta", dtype=BF16)
        kv = torch.empty(1, 1, keys, 64, device="meta", dtype=BF16)
        prefix = torch.empty(1, 1, 4, 64, device="meta", dtype=BF16)
        call = launchers._Call(q, kv, kv, prefix, prefix, None, None, None, None, True, 1.0)
        parts, chunk = call.parts_of_keys(call.tile("few"))
        assert (parts - 1) * chunk < keys <= parts * chunk
        assert parts == 1 or chunk >= launchers.PART_KEYS_PER_ROW * launchers.FEW_ROWS
        assert (parts > 1) == (keys >= 512)


@pytest.mark.parametrize("cores", [1, 6, 64])
def test_parts_of_the_prefix_gradient(cores):
    """The batch in one part or several, and a row's queries too."""
    with patch.object(chips, "SAFE", replace(chips.SAFE, cores=cores)):
        check(inputs_of(b=3, s=70, t=10, hkv=1, length=40))


# ---- the same bits ---------------------------------------------------------------------------


def test_strides():
    """A cache with room behind the text, heads and tokens in another order, a prefix's halves."""
    inputs = inputs_of(hq=4, hkv=2)
    expected = run(inputs, "triton")
    views = dict(inputs)
    views["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("k", "v"):
        cache = torch.full((2, 2, 40, 16), math.nan)
        cache[:, :, :25] = inputs[name]
        views[name] = cache[:, :, :25]
    views["prefix_k"], views["prefix_v"] = torch.cat(
        [inputs["prefix_k"], inputs["prefix_v"]], 1
    ).split(7, 1)
    assert_same_bits(run(views, "triton"), expected)
    views["k"] = inputs["k"].mT.contiguous().mT
    assert_same_bits(run(views, "triton"), expected)


@pytest.mark.long
@pytest.mark.parametrize("dtypes", ["f32", "bf16/f32"])
def test_the_order_of_programs_does_not_matter(dtypes):
    """A race, or a sum whose order depends on the schedule, would show; so would chance."""
    inputs = inputs_of(t=40, length=40, prefixes=2, dtypes=dtypes)
    ids = torch.tensor([1, 1])
    expected = run(inputs, "triton", prefix_ids=ids)
    assert_same_bits(run(inputs, "triton", prefix_ids=ids), expected)
    builder = interpreter.InterpreterBuilder
    forwards = builder.set_grid_idx

    def backwards(self, x, y, z):
        sizes = self.grid_dim
        forwards(self, sizes[0] - 1 - x, sizes[1] - 1 - y, sizes[2] - 1 - z)

    with patch.object(builder, "set_grid_idx", backwards):
        assert_same_bits(run(inputs, "triton", prefix_ids=ids), expected)


@pytest.mark.parametrize("needed", [("q",), ("k",), ("v",), ("prefix_k", "prefix_v")])
def test_each_gradient_alone(needed):
    inputs = inputs_of()
    expected = run(inputs, "triton")
    out = run(inputs, "triton", needed=needed)
    assert_same_bits(out, {name: expected[name] for name in ("out", *needed)})


# ---- the schema, and which kernels run -------------------------------------------------------


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_launchers_keep_the_schema(dtypes):
    """Outputs' shapes, dtypes and strides are those that the op declares, for any needs."""
    tensors = list(inputs_of(prefixes=3, dtypes=dtypes).values())
    arguments = (*tensors, torch.tensor([1, 2], dtype=torch.int32), None, None, None, True, 0.2)
    forward = launchers.prefix_attention_fwd(*arguments)
    for out, expected in zip(forward, reference.fwd_fake(*arguments), strict=True):
        assert_alike(out, expected)
    saved = (*arguments[:9], *forward, *arguments[9:])
    for bits in range(8):
        needs = [bool(bits >> i & 1) for i in range(3)]
        outs = launchers.prefix_attention_bwd(tensors[0], *saved, *needs)
        fakes = reference.bwd_fake(tensors[0], *saved, *needs)
        for out, expected in zip(outs, fakes, strict=True):
            assert_alike(out, expected)


def assert_alike(out, expected):
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert out.stride() == expected.stride()


class noting:
    """Context manager: the set of the kernels that were launched."""

    def __enter__(self):
        launched, launch_run = set(), launch.run

        def run_and_note(kernel, *rest):
            launched.add(kernel.fn.__name__)
            launch_run(kernel, *rest)

        self.patch = patch.object(launch, "run", run_and_note)
        self.patch.start()
        return launched

    def __exit__(self, *error):
        self.patch.stop()


def test_the_backend_launches_its_kernels():
    """The reference has the same results: that it isn't what ran shows here alone."""
    with noting() as launched:
        check(inputs_of(s=3, t=4))
    assert {
        "prefix_attention_fwd_kernel",
        "prefix_attention_delta_kernel",
        "prefix_attention_query_grad_kernel",
        "prefix_attention_text_grad_kernel",
        "prefix_attention_prefix_grad_kernel",
    } <= launched


@pytest.mark.parametrize(
    ("arch", "dtypes", "size", "kernels"),
    [
        ("sm_90", "bf16", 256, True),
        ("sm_90", "bf16", 257, False),
        ("sm_90", "bf16", 512, False),
        ("sm_90", "f32", 256, True),
        ("gfx942", "bf16", 256, True),
        ("sm_75", "bf16", 128, True),
        ("sm_75", "bf16", 129, False),
        ("gfx942", "f32", 128, True),
        ("gfx942", "f32", 129, False),
        ("other", "f32", 256, False),
    ],
)
def test_heads_that_a_tile_has_no_room_for_are_the_references(arch, dtypes, size, kernels):
    """In both directions, though Triton is asked for; those just below are its own."""
    inputs = inputs_of(b=1, s=3, t=4, length=2, d=size, dtypes=dtypes)
    with noting() as launched, patch.object(chips, "arch_name", lambda device: arch):
        out = run(inputs, "triton")
    assert bool(launched) == kernels
    if not kernels:
        assert_same_bits(out, run(inputs, "reference"))
