"""prefix_attention_lengths: each row is what prefix_attention makes of it with its prefix alone."""

import pytest
import torch
from errors import assert_as_good_as

import peft_kernels
from peft_kernels.ops._prefix_lengths import prefix_attention_lengths
from peft_kernels.ops.prefix_attention import example_inputs, prefix_attention

LENGTHS = (3, 9, 1, 0)
IDS = [2, -1, 0, 1, 3, 0, 1, -1]
SHAPES = [(8, 1, 4, 2, 16), (8, 5, 4, 1, 24), (8, 70, 2, 2, 9)]


def problem(rows, queries, heads, kv_heads, dim, dtype=torch.float32):
    torch.manual_seed(0)
    inputs = example_inputs(
        rows, queries, heads, kv_heads, dim, max(LENGTHS), keys=queries + 6, prefixes=4, dtype=dtype
    )
    for number, length in enumerate(LENGTHS):
        for name in ("prefix_k", "prefix_v"):
            inputs[name][number, :, length:] = torch.nan  # never read
    inputs["prefix_ids"] = torch.tensor(IDS, dtype=torch.int32)
    return inputs | {"scale": dim**-0.5}


def of_each(inputs, mask=None, **options):
    """Row by row, with the prefix alone."""
    parts = []
    for row, number in enumerate(IDS):
        length = LENGTHS[number] if number >= 0 else 0
        own = {name: inputs[name][[row]] for name in "qkv"}
        for name in ("prefix_k", "prefix_v"):
            own[name] = inputs[name][max(number, 0), :, :length]
        seen = None if mask is None else mask[[row]]
        parts.append(prefix_attention(**own, attn_mask=seen, scale=inputs["scale"], **options))
    return torch.cat(parts)


def masks_of(inputs):
    shape = (*inputs["q"].shape[:3], inputs["k"].shape[2])
    seen = torch.rand(shape) < 0.7
    seen[1] = False  # a row without a prefix that sees nothing
    return {"none": None, "bool": seen, "floats": torch.randn(shape[0], 1, 1, shape[3])}


@pytest.mark.builds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "floats"])
def test_has_the_bits_of_each_row_alone(shape, dtype, is_causal, kind):
    inputs = problem(*shape, dtype)
    mask = masks_of(inputs)[kind]
    found = prefix_attention_lengths(
        **inputs, prefix_lengths=LENGTHS, attn_mask=mask, is_causal=is_causal
    )
    expected = of_each(inputs, mask, is_causal=is_causal)
    assert found.dtype is dtype and found.transpose(1, 2).is_contiguous()
    if dtype is torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_near_to_float64_as_the_reference(shape, dtype):
    inputs = problem(*shape, dtype)
    found = prefix_attention_lengths(**inputs, prefix_lengths=LENGTHS)
    with peft_kernels.backend("reference"):
        eager = prefix_attention_lengths(**inputs, prefix_lengths=LENGTHS)
    wide = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    assert_as_good_as(found, eager, of_each(wide), "out")


@pytest.mark.builds
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads):
    inputs, before = problem(*SHAPES[2]), torch.get_num_threads()
    expected = of_each(inputs)
    try:
        torch.set_num_threads(threads)
        found = prefix_attention_lengths(**inputs, prefix_lengths=LENGTHS)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)


def test_op_is_registered_as_torch_expects():
    inputs = problem(*SHAPES[1])
    inputs["prefix_k"].nan_to_num_()
    inputs["prefix_v"].nan_to_num_()
    tensors = [inputs[name] for name in ("q", "k", "v", "prefix_k", "prefix_v", "prefix_ids")]
    op = torch.ops.peft_kernels.prefix_attention_lengths.default
    torch.library.opcheck(op, (*tensors, list(LENGTHS), None, True, 0.25))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (LENGTHS[:3], "one entry for each of 4 prefixes"),
        ((3, 10, 1, 0), r"prefix_lengths must be in \[0, 9\]; got 10"),
        ((3, 9, -1, 0), r"prefix_lengths must be in \[0, 9\]; got -1"),
    ],
)
def test_lengths_that_the_kernel_can_t_serve_are_named(lengths, message):
    with pytest.raises(RuntimeError, match=message):
        prefix_attention_lengths(**problem(*SHAPES[0]), prefix_lengths=lengths)
