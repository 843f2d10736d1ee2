"""The bytes of prompt_lookup, counted from the kernels' own loads and stores: each of them once."""

import pytest
import torch

from peft_kernels.tools.report.traffic import prompt_lookup

SIZES = (3, 20, 300, 5, 3)  # batch, text, width, slots, prompts: several tiles of each
OUTPUTS = ("out", "out_mask", "position_ids", "out_labels")
GRADIENTS = ("d_embeddings", "d_prompts")


@pytest.fixture(scope="module", params=[True, False], ids=["on end", "among the text"])
def call(request):
    torch.manual_seed(0)
    return prompt_lookup.count(*SIZES, on_end=request.param)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_one_launch_moves_the_floor(call, direction):
    """Backward, of places that follow each other in a row without a prompt, the ends are enough."""
    traffic, slots = call.traffic(direction), 4 * SIZES[3]
    assert (traffic.launches, traffic.atomics) == (1, 0)
    unread = call.floor(direction) - traffic.bytes_moved()
    assert 0 <= unread <= (slots if direction == "bwd" else 0)


def test_the_floor_knows_which_prompts_are_read(call):
    """Of three rows the first has none, and the third prompt is nobody's."""
    text, prompts, ids, positions, *integers = call.inputs
    read = text.nbytes + 2 * prompts[0].nbytes + ids.nbytes + positions.nbytes
    read += sum(tensor.nbytes for tensor in integers)
    assert call.floor("fwd") == read + sum(tensor.nbytes for tensor in call.outputs)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_large_tensors_are_asked_for_once(call, direction):
    """By one program each: neither caches nor luck are needed."""
    accesses = {access.argument: access for access in call.traffic(direction).accesses}
    names = ("embeddings", *OUTPUTS) if direction == "fwd" else ("d_out", *GRADIENTS)
    for name in names:
        access = accesses[name]
        assert access.requests == access.read + access.written, name
    for name in OUTPUTS if direction == "fwd" else GRADIENTS:
        assert accesses[name].read == 0, name


def test_a_prompt_is_asked_for_once_a_row(call):
    _, prompts, ids, *_ = call.inputs
    (access,) = (a for a in call.forward.accesses if a.argument == "prompts")
    assert access.requests == int((ids >= 0).sum()) * prompts[0].numel()


def test_rows_of_the_report():
    rows = prompt_lookup.rows()
    assert [(row.plan, row.direction) for row in rows] == [
        ("on end", "fwd"), ("on end", "bwd"), ("among the text", "fwd"), ("among the text", "bwd"),
    ]  # fmt: skip
    for row in rows:
        assert row.launches == 1 and 0.999 < row.bytes_moved / row.bytes_floor <= 1
