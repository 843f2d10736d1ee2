"""prompt_lookup: every backend against the equation, gradients, places, errors, compilation.

Memory moves leave nothing to tolerances: but for sums over rows, results must have the same bits.
"""

import pytest
import torch
from errors import assert_as_good_as
from hypothesis import given
from hypothesis import strategies as st

import peft_kernels
from peft_kernels import _library
from peft_kernels.ops import prompt_lookup
from peft_kernels.ops.prompt_lookup import POSITIONS, example_inputs
from peft_kernels.tools.bench.measure import saved_bytes

BACKENDS = ["reference", "auto", "triton"]
HALVES = [torch.bfloat16, torch.float16]
PLACES = [*POSITIONS, "tensor", "tensor by row"]


def random_places(length, total, *batch):
    """Strictly increasing places in [0, total), for each row of the batch."""
    order = torch.rand(*batch, total).argsort(-1)
    return order[..., :length].sort(-1).values


def with_position(inputs, position):
    batch, seq, _ = inputs["embeddings"].shape
    length = inputs["prompts"].shape[-2]
    by_name = {
        "tensor": lambda: random_places(length, length + seq),
        "tensor by row": lambda: random_places(length, length + seq, batch).to(torch.int32),
    }
    return inputs | {"position": by_name.get(position, lambda: position)()}


def by_hand(embeddings, prompts, task_ids=None, position="front", attention_mask=None, labels=None):
    """The four results as the docstring has them, a token at a time, in lists."""
    batch, length = len(embeddings), prompts.shape[-2]
    rows = ([], [], [], [])
    for b in range(batch):
        text = list(embeddings[b])
        mask = [1] * len(text) if attention_mask is None else attention_mask[b].int().tolist()
        tags = [0] * len(text) if labels is None else labels[b].tolist()
        task = 0 if task_ids is None else int(task_ids[b])
        first = mask.index(1) if 1 in mask else 0
        starts = {"front": 0, "after_bos": min(first + 1, len(text)), "after_padding": first}
        if isinstance(position, torch.Tensor):
            places = position.expand(batch, length)[b].tolist()
        else:
            places = range(starts[position], starts[position] + length)
        for slot, place in enumerate(places):
            soft = prompts.view(-1, length, embeddings.shape[-1])[task, slot].to(embeddings.dtype)
            text.insert(place, soft if task >= 0 else torch.zeros_like(soft))
            mask.insert(place, int(task >= 0))
            tags.insert(place, -100)
        counts = [max(sum(mask[: j + 1]) - 1, 0) for j in range(len(mask))]
        for row, values in zip(rows, (text, mask, counts, tags), strict=True):
            row.append(values)
    out = torch.stack([torch.stack(row) for row in rows[0]])
    return out, *(torch.tensor(row) for row in rows[1:])


def run(inputs, grad, backend="auto"):
    """The results and the gradients, by name."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("embeddings", "prompts")}
    with peft_kernels.backend(backend):
        out = prompt_lookup(**(inputs | leaves))
        out.embeddings.backward(grad)
    results = {name: t.detach() for name, t in out._asdict().items() if t is not None}
    return results | {"d_" + name: leaf.grad for name, leaf in leaves.items()}


def check(inputs, backend, exactly=None):
    """Asserts that all but the sums over rows has the bits of the reference, and that those sums
    are as good as the eager path's; returns what the backend gave."""
    batch, seq, d = inputs["embeddings"].shape
    shape = (batch, inputs["prompts"].shape[-2] + seq, d)
    grad = torch.randn(shape).to(inputs["embeddings"].dtype)
    wide = {n: t.double() for n, t in inputs.items() if n in ("embeddings", "prompts")}
    exact, eager = run(inputs | wide, grad.double()), run(inputs, grad, "reference")
    out = run(inputs, grad, backend)
    assert out.keys() == eager.keys()
    for name in out:
        assert out[name].dtype is eager[name].dtype
        if name == "d_prompts":
            assert_as_good_as(out[name], eager[name], exact[name], name)
        else:
            assert torch.equal(out[name], eager[name]), name
    return out, exact


def test_backends_are_what_they_claim():
    assert peft_kernels.backend_of("prompt_lookup", "cpu", torch.float32) == "cpu"
    assert peft_kernels.backend_of("prompt_lookup", "cpu", torch.float64) == "reference"
    for name in ("reference", "triton"):
        with peft_kernels.backend(name):
            assert peft_kernels.backend_of("prompt_lookup", "cpu", torch.float32) == name
            assert peft_kernels.backend_of("prompt_lookup", "cpu", torch.float64) == "reference"


def test_without_triton_kernels_that_backend_dispatches_by_device(monkeypatch):
    none_of = {"prompt_lookup_fwd", "prompt_lookup_bwd"}
    monkeypatch.setattr(_library, "_WITHOUT_TRITON", none_of)
    with peft_kernels.backend("triton"):
        assert peft_kernels.backend_of("prompt_lookup", "cpu", torch.float32) == "cpu"
        assert peft_kernels.backend_of("prompt_lookup", "cpu", torch.float64) == "reference"
        assert peft_kernels.backend_of("adapter", "cpu", torch.float32) == "triton"
        check(example_inputs(3, 4, 5, 2, 3), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", PLACES)
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_the_equation(backend, position, padding):
    for prompts, dtype in ((1, torch.float32), (4, torch.bfloat16)):
        inputs = example_inputs(
            7, 9, 5, 3, prompts, dtype=dtype, prompt_dtype=torch.float32, padding=padding
        )
        inputs = with_position(inputs, position)
        with peft_kernels.backend(backend):
            out = prompt_lookup(**inputs)
        for result, expected in zip(out, by_hand(**inputs), strict=True):
            assert torch.equal(result, expected)
            assert result.is_contiguous()
        assert {t.dtype for t in out[1:]} == {torch.int64}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("position", PLACES)
def test_against_float64(backend, dtype, position):
    """Prompts in another dtype keep it in their gradient."""
    for prompt_dtype in {torch.float32, dtype, torch.float16}:
        inputs = example_inputs(19, 6, 33, 4, 5, dtype=dtype, prompt_dtype=prompt_dtype)
        out, _ = check(with_position(inputs, position), backend)
        assert out["embeddings"].dtype is out["d_embeddings"].dtype is dtype
        assert out["d_prompts"].dtype is prompt_dtype


@pytest.mark.builds
@given(
    batch=st.sampled_from([0, 1, 2, 5, 17]),
    seq=st.sampled_from([0, 1, 3, 31, 70]),
    d=st.sampled_from([0, 1, 7, 16, 70, 1032]),
    length=st.sampled_from([0, 1, 2, 9, 40]),
    prompts=st.sampled_from([1, 2, 6]),
    dtypes=st.sampled_from(
        [(torch.float32,) * 2, *((t, p) for t in HALVES for p in (t, torch.float32))]
    ),
    position=st.sampled_from(PLACES),
    padding=st.sampled_from(["left", "right", None]),
    labels=st.booleans(),
)
def test_native_on_any_shape(batch, seq, d, length, prompts, dtypes, position, padding, labels):
    inputs = example_inputs(
        batch, seq, d, length, prompts, dtype=dtypes[0], prompt_dtype=dtypes[1],
        padding=padding, labels=labels,
    )  # fmt: skip
    check(with_position(inputs, position), "auto")


def test_the_sum_over_rows_goes_in_the_batch_order():
    """In float32, whatever is added: so every kernel has the same bits."""
    inputs = example_inputs(50, 2, 40, 3, 3, dtype=torch.bfloat16, prompt_dtype=torch.float32)
    grad = torch.randn(50, 5, 40).bfloat16()
    sums = torch.zeros(3, 3, 40)
    for b, task in enumerate(inputs["task_ids"].tolist()):
        if task >= 0:
            sums[task] += grad[b, :3].float()
    for backend in BACKENDS:
        assert torch.equal(run(inputs, grad, backend)["d_prompts"], sums)


def test_a_zero_gradient_would_fail():
    inputs = with_position(example_inputs(12, 5, 20, 4, 3), "after_bos")
    out, exact = check(inputs, "auto")
    for name in ("embeddings", "d_embeddings", "d_prompts"):
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[name]), out[name], exact[name], name)


@pytest.mark.parametrize("position", PLACES)
def test_gradcheck(position):
    inputs = with_position(example_inputs(4, 3, 2, 3, 3, dtype=torch.float64), position)

    def function(embeddings, prompts):
        return prompt_lookup(**(inputs | {"embeddings": embeddings, "prompts": prompts}))[0]

    leaves = tuple(inputs[name].requires_grad_() for name in ("embeddings", "prompts"))
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("suffix", ["", "_ref", "_triton"])
def test_opcheck(suffix):
    inputs = example_inputs(4, 3, 6, 2, 3, dtype=torch.float32)
    fwd = getattr(torch.ops.peft_kernels, "prompt_lookup_fwd" + suffix).default
    bwd = getattr(torch.ops.peft_kernels, "prompt_lookup_bwd" + suffix).default
    positions = random_places(2, 5, 4).int()
    tasks = inputs["task_ids"].int()
    tensors, mask, labels = (inputs[n] for n in ("embeddings", "attention_mask", "labels"))
    torch.library.opcheck(fwd, (tensors, inputs["prompts"], tasks, positions, mask, labels))
    torch.library.opcheck(fwd, (tensors, inputs["prompts"][:1], None, positions, None, None))
    for needs in [(True, True), (True, False), (False, True), (False, False)]:
        torch.library.opcheck(bwd, (torch.randn(4, 5, 6), tasks, positions, 3, *needs))
        torch.library.opcheck(bwd, (torch.randn(4, 5, 6), None, positions, 1, *needs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["embeddings", "prompts"])
def test_each_gradient_alone(backend, name):
    inputs = example_inputs(5, 4, 6, 2, 3)
    grad = torch.randn(5, 6, 6)
    leaf = inputs[name].requires_grad_()
    with peft_kernels.backend(backend):
        prompt_lookup(**inputs).embeddings.backward(grad)
    assert torch.equal(leaf.grad, run(inputs, grad, backend)["d_" + name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_every_repetition(backend):
    inputs = example_inputs(40, 3, 24, 5, 3)
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if t.is_floating_point()}
    originals = {name: t.detach().clone() for name, t in inputs.items()}
    grad = torch.randn(40, 8, 24)
    kept = grad.clone()
    with peft_kernels.backend(backend):
        out = prompt_lookup(**inputs).embeddings
        first = torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)
        second = torch.autograd.grad(out, list(leaves.values()), grad)
        assert torch.equal(prompt_lookup(**inputs).embeddings, out)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, kept)
    assert all(torch.equal(inputs[name], originals[name]) for name in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend):
    inputs = with_position(example_inputs(6, 5, 16, 3, 4), "tensor by row")
    with peft_kernels.backend(backend):
        expected = prompt_lookup(**inputs)
        every_other = {
            name: t.repeat_interleave(2, -1)[..., ::2] if isinstance(t, torch.Tensor) else t
            for name, t in inputs.items()
        }
        turned = {
            name: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t
            for name, t in inputs.items()
        }
        inside = {
            name: torch.full((8, *t.shape[1:-1], t.shape[-1] + 3), 7, dtype=t.dtype)[
                : len(t), ..., 1:-2
            ].copy_(t)
            if t.dim() > 1
            else t
            for name, t in inputs.items()
        }
        for views in (every_other, turned, inside):
            for a, b in zip(prompt_lookup(**views), expected, strict=True):
                assert torch.equal(a, b)
        del inputs["task_ids"]
        one = inputs | {"prompts": inputs["prompts"][0]}
        expanded = one | {"embeddings": one["embeddings"][:1].expand(6, 5, 16)}
        same = one | {"embeddings": expanded["embeddings"].contiguous()}
        assert torch.equal(prompt_lookup(**expanded)[0], prompt_lookup(**same)[0])
        turned_grad = torch.randn(16, 8, 6).permute(2, 1, 0)
        turned_out = run(one, turned_grad, backend)
        for name, result in run(one, turned_grad.contiguous(), backend).items():
            assert torch.equal(result, turned_out[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_other_dtypes(backend):
    inputs = example_inputs(6, 5, 16, 3)
    expected = prompt_lookup(**inputs)
    with peft_kernels.backend(backend):
        for dtype in (torch.bool, torch.uint8, torch.int32):
            changed = {"attention_mask": inputs["attention_mask"].to(dtype)}
            out = prompt_lookup(**(inputs | changed | {"labels": inputs["labels"].int()}))
            assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_saved_for_backward_is_indices():
    batch, seq, d, length = 8, 30, 64, 10
    inputs = example_inputs(batch, seq, d, length, 3)
    leaves = [inputs[name].requires_grad_() for name in ("embeddings", "prompts")]
    saved = saved_bytes(lambda: prompt_lookup(**inputs, position="after_bos").embeddings, leaves)
    assert 0 < saved <= batch * (length + 1) * 4 + 64


@pytest.mark.parametrize("position", POSITIONS)
def test_compiles_without_a_break(position):
    inputs = example_inputs(5, 4, 6, 2, 3)
    leaves = [inputs[name].requires_grad_() for name in ("embeddings", "prompts")]
    expected = prompt_lookup(**inputs, position=position)
    grads = torch.autograd.grad(expected.embeddings.square().sum(), leaves)
    compiled = torch.compile(lambda: prompt_lookup(**inputs, position=position), fullgraph=True)
    out = compiled()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    for a, b in zip(torch.autograd.grad(out.embeddings.square().sum(), leaves), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_recomputes():
    inputs = example_inputs(6, 4, 8, 2)
    leaf = inputs["prompts"].requires_grad_()
    expected = torch.autograd.grad(prompt_lookup(**inputs).embeddings.square().sum(), leaf)[0]
    recomputed = torch.utils.checkpoint.checkpoint(
        lambda: prompt_lookup(**inputs).embeddings, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(recomputed.square().sum(), leaf)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    """As of torch's own lookups: what comes after is converted where it needs to be."""
    inputs = example_inputs(6, 4, 8, 2)
    leaf = inputs["prompts"].requires_grad_()
    with peft_kernels.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        out = prompt_lookup(**inputs).embeddings
    assert out.dtype is torch.float32
    out.sum().backward()
    assert leaf.grad.dtype is torch.float32


def integers(*values):
    return torch.tensor(values)


BAD = [
    ({"embeddings": torch.ones(3, 5)}, ValueError, r"embeddings must be \[B, S, d\].*\(3, 5\)"),
    ({"embeddings": torch.ones(3, 4, 5).int()}, TypeError, "embeddings must be float32.*int32"),
    ({"prompts": torch.ones(2, 4)}, ValueError, r"prompts must be \[P, L, 5\].*\(1, 2, 4\)"),
    ({"prompts": torch.ones(0, 2, 5)}, ValueError, r"prompts must be.*P >= 1.*\(0, 2, 5\)"),
    ({"prompts": torch.ones(2, 5).long()}, TypeError, "prompts must be float32.*int64"),
    ({"prompts": torch.ones(2, 5, device="meta")}, ValueError, "prompts must be on.*meta"),
    ({"task_ids": None}, ValueError, "task_ids must be given to choose among 4 prompts"),
    ({"task_ids": integers(0, 1)}, ValueError, r"task_ids must have shape \(3,\).*\(2,\)"),
    ({"task_ids": torch.ones(3)}, TypeError, "task_ids must be int32 or int64; got.*float32"),
    ({"task_ids": integers(0, 4, 1)}, ValueError, r"task_ids must be in \[-1, 4\); got 4"),
    ({"task_ids": integers(0, -2, 1)}, ValueError, r"task_ids must be in \[-1, 4\); got -2"),
    ({"attention_mask": torch.ones(3, 6).int()}, ValueError, r"attention_mask.*\(3, 4\).*\(3, 6\)"),
    ({"attention_mask": torch.ones(3, 4)}, TypeError, "attention_mask must be bool or.*float32"),
    ({"labels": torch.ones(3, 6).int()}, ValueError, r"labels must have shape \(3, 4\).*\(3, 6\)"),
    ({"labels": torch.ones(3, 4)}, TypeError, "labels must be int32 or int64; got.*float32"),
    ({"position": "end"}, ValueError, "position must be one of front.*'end'"),
    ({"position": integers(1)}, ValueError, r"position must be \[2\] or \[3, 2\].*\(1,\)"),
    ({"position": torch.ones(2)}, TypeError, "position must be int32 or int64; got.*float32"),
    ({"position": integers(1, 6)}, ValueError, r"position must be in \[0, 6\); got 6"),
    ({"position": integers(-1, 2)}, ValueError, r"position must be in \[0, 6\); got -1"),
    ({"position": integers(2, 2)}, ValueError, r"position must be strictly increasing.*\[2, 2\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    inputs = example_inputs(3, 4, 5, 2, 4)
    with pytest.raises(error, match=message):
        prompt_lookup(**(inputs | change))


def test_a_compiled_call_is_checked_by_the_kernel():
    inputs = example_inputs(3, 4, 5, 2, 4)
    fwd = torch.ops.peft_kernels.prompt_lookup_fwd
    front, tasks = integers(0, 1).int().expand(3, 2), integers(0, 1, 2).int()
    for positions, ids, message in (
        (integers(0, 6).int().expand(3, 2), tasks, r"strictly increasing in \[0, 6\); got 6 after"),
        (integers(3, 3).int().expand(3, 2), tasks, "got 3 after 3"),
        (front, integers(0, 4, 1).int(), r"task_ids must be in \[-1, 4\); got 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fwd(inputs["embeddings"], inputs["prompts"], ids, positions, None, None)
