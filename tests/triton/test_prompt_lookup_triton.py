"""The Triton kernels of prompt_lookup, in the interpreter: the reference's bits, two launches."""

import importlib
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

import peft_kernels
from peft_kernels.ops import prompt_lookup
from peft_kernels.triton.common import launch
from peft_kernels.triton.prompt_lookup import launch as launchers

op = importlib.import_module("peft_kernels.ops.prompt_lookup")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
NEEDS = [(True, True), (True, False), (False, True), (False, False)]


def places_of(batch, length, seq, on_end=False):
    """Strictly increasing places of each row, anywhere or following each other."""
    if on_end:
        return (torch.randint(0, seq + 1, (batch, 1)) + torch.arange(length)).int()
    return torch.rand(batch, length + seq).argsort(1)[:, :length].sort(1).values.int()


def arguments(batch, seq, d, length, prompts, dtypes=DTYPES[0], *, on_end=False, **options):
    """Of the forward."""
    a = op.example_inputs(
        batch, seq, d, length, prompts, dtype=dtypes[0], prompt_dtype=dtypes[1], **options
    )
    ids = a["task_ids"].int() if prompts > 1 else None
    places = places_of(batch, length, seq, on_end)
    return a["embeddings"], a["prompts"], ids, places, a.get("attention_mask"), a.get("labels")


def assert_same(results, expected):
    """The same shapes, dtypes and bits; contiguous, as the op's shape function has them."""
    for result, wanted in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
        assert result.is_contiguous()
        assert torch.equal(result, wanted)


def check(embeddings, prompts, ids, places, mask, labels, d_out=None):
    """Both directions against the reference, whatever is needed of the backward."""
    forward = embeddings, prompts, ids, places, mask, labels
    expected = op.prompt_lookup_fwd_ref(*forward)
    assert_same(launchers.prompt_lookup_fwd(*forward), expected)
    d_out = torch.randn(expected[0].shape).to(embeddings.dtype) if d_out is None else d_out
    for needs in NEEDS:
        backward = d_out, ids, places, prompts.shape[0], *needs
        assert_same(launchers.prompt_lookup_bwd(*backward), op.prompt_lookup_bwd_ref(*backward))


# ---- the reference's bits ----------------------------------------------------------------------


@settings(max_examples=20)
@given(
    batch=st.sampled_from([0, 1, 2, 5]),
    seq=st.sampled_from([0, 1, 3, 31, 70]),
    d=st.sampled_from([0, 1, 7, 16, 70, 300]),
    length=st.sampled_from([0, 1, 2, 9, 17]),
    prompts=st.sampled_from([1, 2, 6]),
    dtypes=st.sampled_from(DTYPES),
    on_end=st.booleans(),
    padding=st.sampled_from(["left", "right", None]),
    labels=st.booleans(),
)
def test_any_shape(batch, seq, d, length, prompts, dtypes, on_end, padding, labels):
    """Of nothing too, and more than one block of tokens, slots and columns."""
    options = {"on_end": on_end, "padding": padding, "labels": labels}
    check(*arguments(batch, seq, d, length, prompts, dtypes, **options))


@pytest.mark.parametrize("on_end", [True, False])
def test_a_row_longer_than_a_block(on_end):
    """The count of real tokens goes on from block to block."""
    with patch.object(launchers, "BLOCK_ROW", 32):
        check(*arguments(2, 90, 3, 20, 3, on_end=on_end))


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=str)
def test_strides(dtypes):
    embeddings, prompts, ids, _, mask, labels = arguments(4, 6, 20, 3, 3, dtypes)
    places = torch.tensor([1, 3, 8]).int().expand(4, 3)
    turned = [t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in (embeddings, prompts)]
    d_out = torch.randn(20, 9, 4).to(dtypes[0]).permute(2, 1, 0)
    check(*turned, ids, places, mask.T.contiguous().T, labels.T.contiguous().T, d_out)

    def apart(tensor):
        return tensor.repeat_interleave(2, -1)[..., ::2]

    check(*(apart(t) for t in (embeddings, prompts, ids, places, mask, labels)), apart(d_out))


def test_one_row_for_all():
    """Strides of 0."""
    embeddings, prompts, _, places, mask, labels = arguments(1, 6, 20, 3, 1)
    rows = [t.expand(5, *t.shape[1:]) for t in (embeddings, places, mask, labels)]
    ids = torch.ones(1).int().expand(5)
    d_out = torch.randn(1, 9, 1).expand(5, 9, 20)
    check(rows[0], prompts.expand(2, 3, 20), ids, *rows[1:], d_out)
    check(rows[0], prompts, None, *rows[1:], d_out)


def test_ids():
    """No row with a prompt, all with the same, prompts that nobody has; without ids, prompt 0."""
    inputs = arguments(6, 4, 8, 3, 5)
    check(*inputs[:2], None, *inputs[3:])
    for ids in ([-1] * 6, [3] * 6, [4, -1, 0, 4, 0, -1]):
        check(*inputs[:2], torch.tensor(ids).int(), *inputs[3:])


def test_the_sum_goes_in_the_batch_order():
    """Behind the large row a small one is lost, and two that were added before wouldn't be."""
    batch, values = 12, [1.0, 2.0**30, *[40.0] * 9, -(2.0**30)]
    places = torch.zeros(batch, 1).int()
    d_out = torch.tensor(values).view(batch, 1, 1)
    expected = torch.zeros(())
    for value in d_out.flatten():
        expected = expected + value
    assert expected == 0 and d_out.double().sum() == 361
    found = launchers.prompt_lookup_bwd(d_out, None, places, 1, False, True)[1]
    assert torch.equal(found.flatten(), expected.view(1))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_values_that_are_not_numbers(dtype):
    """They stay in their row, and in the sums of its prompt."""
    embeddings, prompts, _, places, mask, labels = arguments(3, 4, 5, 2, 3, (dtype, F32))
    embeddings[0, 1, 2], prompts[0, 1, 3] = torch.nan, torch.inf
    ids = torch.tensor([0, 1, -1]).int()
    forward = embeddings, prompts, ids, places, mask, labels
    found, expected = launchers.prompt_lookup_fwd(*forward), op.prompt_lookup_fwd_ref(*forward)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    d_out = torch.full((3, 6, 5), torch.nan, dtype=dtype)
    d_out[1] = 1.0
    sums = launchers.prompt_lookup_bwd(d_out, ids, places, 3, False, True)[1]
    assert sums[0].isnan().all() and (sums[1] == 1).all() and not sums[2].any()


# ---- ids and places that aren't there ----------------------------------------------------------

WRONG = [(0, 0, 0), (-5, -4, -3), (2**31 - 3, 2**31 - 2, 2**31 - 1), (-(2**31), 0, 2**31 - 1)]
WRONG += [(7, 3, 1), (-1, 0, 1), (6, 7, 8)]


@pytest.mark.parametrize("places", WRONG, ids=str)
def test_places_and_ids_that_are_not_there(places):
    """Nothing outside of a tensor is touched; a row of a prompt that isn't there has none."""
    embeddings, prompts, _, _, mask, labels = arguments(4, 5, 16, 3, 2)
    ids = torch.tensor([2, -1, 2**31 - 1, 1]).int()
    positions = torch.tensor(places).int().repeat(4, 1)
    positions[1] = torch.tensor([0, 3, 6])
    d_out = torch.randn(4, 8, 16)

    def around(tensor):
        """A view whose neighbours would be seen if they were read."""
        filler = torch.nan if tensor.is_floating_point() else 77
        padded = torch.full((len(tensor) + 2, *tensor.shape[1:]), filler, dtype=tensor.dtype)
        padded[1:-1] = tensor
        return padded[1:-1]

    tensors = [around(t) for t in (embeddings, prompts, ids, positions, mask, labels)]
    results = launchers.prompt_lookup_fwd(*tensors)
    none = torch.full_like(ids, -1)
    expected = op.prompt_lookup_fwd_ref(
        embeddings, prompts, none, positions[1:2].expand(4, 3), mask, labels
    )
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result[1], wanted[1])
    assert not results[0].isnan().any()
    assert set(results[1].unique().tolist()) <= {0, 1}
    assert torch.equal(results[2], (results[1].cumsum(1) - 1).clamp_min(0))
    assert not (results[3] == 77).any()
    gradients = launchers.prompt_lookup_bwd(around(d_out), ids, positions, 2, True, True)
    assert not any(gradient.isnan().any() for gradient in gradients)
    assert not gradients[1][0].any()


# ---- launches ----------------------------------------------------------------------------------


def launched_by(call):
    """The names of the kernels that a call launches, and what it returns."""
    names, launch_run = [], launch.run

    def run_and_note(kernel, *rest):
        names.append(kernel.fn.__name__)
        launch_run(kernel, *rest)

    with patch.object(launch, "run", run_and_note):
        result = call()
    return names, result


@pytest.mark.parametrize("position", [*op.POSITIONS, torch.tensor([1, 3, 6])], ids=str)
def test_one_launch_forward_and_one_backward(position):
    """Of the op under its backend: the reference has the same results, and so isn't what ran."""
    inputs = op.example_inputs(3, 5, 8, 3, 2)
    leaves = [inputs[name].requires_grad_() for name in ("embeddings", "prompts")]
    with peft_kernels.backend("triton"):
        names, out = launched_by(lambda: prompt_lookup(**inputs, position=position).embeddings)
    assert names == ["prompt_lookup_fwd_kernel"]
    names, _ = launched_by(lambda: torch.autograd.grad(out.square().sum(), leaves))
    assert names == ["prompt_lookup_bwd_kernel"]


def test_nothing_to_do_launches_nothing():
    empty = arguments(0, 5, 8, 3, 2)
    assert launched_by(lambda: launchers.prompt_lookup_fwd(*empty))[0] == []
    places = places_of(3, 2, 4)
    for d_out, needs in ((torch.ones(3, 6, 0), (True, True)), (torch.ones(3, 6, 2), NEEDS[3])):
        backward = d_out, None, places, 1, *needs
        assert launched_by(lambda args=backward: launchers.prompt_lookup_bwd(*args))[0] == []


class OnlyEmptyTensors(TorchDispatchMode):
    """Fails on any operation but what makes an output: each would be a launch, or a wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name in ("new_empty", "empty_like"), name
        return func(*args, **(kwargs or {}))


def test_nothing_else_runs_and_nothing_is_waited_for(monkeypatch):
    original = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        # The mode rests while the interpreter plays the GPU, and reads tensors itself.
        with _disable_current_modes():
            return original(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    for prompts in (1, 3):
        inputs = arguments(4, 6, 8, 3, prompts, (BF16, F32))
        d_out = torch.randn(4, 9, 8).to(BF16)
        with OnlyEmptyTensors():
            launchers.prompt_lookup_fwd(*inputs)
            launchers.prompt_lookup_bwd(d_out, *inputs[2:4], prompts, True, True)


def test_the_order_of_programs_does_not_matter():
    """A race, or a sum whose order depends on the schedule, would show."""
    inputs = arguments(3, 15, 300, 5, 2, (BF16, F32))
    backward = torch.randn(3, 20, 300).to(BF16), *inputs[2:4], 2, True, True
    expected = launchers.prompt_lookup_fwd(*inputs), launchers.prompt_lookup_bwd(*backward)
    builder = interpreter.InterpreterBuilder
    forwards = builder.set_grid_idx

    def backwards(self, x, y, z):
        forwards(self, self.grid_dim[0] - 1 - x, y, z)

    with patch.object(builder, "set_grid_idx", backwards):
        assert_same(launchers.prompt_lookup_fwd(*inputs), expected[0])
        assert_same(launchers.prompt_lookup_bwd(*backward), expected[1])
