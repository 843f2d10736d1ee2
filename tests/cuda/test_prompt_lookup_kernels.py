"""prompt_lookup's CUDA device code, every thread a fiber on the CPU, and its ops over it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decode_driver import (
    CSRC,
    SANITIZE,
    DecodeError,
    compile_driver,
    compile_ops,
    same_bits,
    sanitizer_environment,
)
from lookup_driver import WRITTEN, backward, forward

from peft_kernels.ops.prompt_lookup import example_inputs

ops = torch.ops.peft_kernels
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [(torch.float32, torch.float32), *((t, p) for t in HALVES for p in (torch.float32, t))]
# batch, seq, d, length, prompts: whole vectors and not, several chunks, rows longer than a block
SHAPES = [
    (3, 5, 16, 2, 3),
    (2, 7, 1032, 3, 1),
    (9, 4, 33, 5, 4),
    (1, 700, 8, 30, 1),
    (5, 1, 7, 1, 2),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
is_outermost = pytest.mark.skipif(
    "PEFT_KERNELS_SIMT_LOOKUP" in os.environ, reason="this is the run with sanitizers"
)


def arguments(batch, seq, d, length, prompts, dtypes=DTYPES[0], contiguous=False):
    """Of the forward: soft tokens anywhere, or all on end."""
    dtype, prompt_dtype = dtypes
    a = example_inputs(batch, seq, d, length, prompts, dtype=dtype, prompt_dtype=prompt_dtype)
    if contiguous:
        positions = torch.randint(0, seq + 1, (batch, 1)) + torch.arange(length)
    else:
        order = torch.rand(batch, length + seq).argsort(1)
        positions = order[:, :length].sort(1).values
    task_ids = a["task_ids"].int() if prompts > 1 else None
    mask, labels = a["attention_mask"], a["labels"]
    return a["embeddings"], a["prompts"], task_ids, positions.int(), mask, labels


def assert_same(run, expected):
    for result, wanted in zip(run.results, expected, strict=True):
        assert same_bits(result, wanted)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_the_reference(shape, dtypes, contiguous):
    a = arguments(*shape, dtypes, contiguous)
    _, _, task_ids, positions, mask, _ = a
    run = forward(*a)
    assert_same(run, ops.prompt_lookup_fwd_ref(*a))
    lean = (*a[:4], None if shape[0] % 2 else mask, None)
    assert_same(forward(*lean), ops.prompt_lookup_fwd_ref(*lean)[:3])
    vectors = 16 // dtypes[0].itemsize
    assert run.vector == (vectors if shape[2] % vectors == 0 else 1)
    d_out = torch.randn(run.results[0].shape).to(dtypes[0])
    run = backward(d_out, task_ids, positions, shape[4])
    assert_same(run, ops.prompt_lookup_bwd_ref(d_out, task_ids, positions, shape[4], True, True))
    assert run.vector == (vectors if shape[2] % vectors == 0 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_only_where_rows_begin_with_them(dtype):
    """A row that begins elsewhere is read element by element: a GPU would fault."""
    embeddings, *rest = arguments(3, 4, 16, 2, 3, (dtype, torch.float32))
    padded = torch.full((3, 4, 24), torch.nan, dtype=dtype)
    for offset, vector in ((8, 16 // dtype.itemsize), (1, 1)):
        padded[..., offset : offset + 16] = embeddings
        run = forward(padded[..., offset : offset + 16], *rest)
        assert_same(run, ops.prompt_lookup_fwd_ref(embeddings, *rest))
        assert run.vector == vector
    d_out = torch.randn(3, 6, 24).to(dtype)
    for offset, vector in ((8, 16 // dtype.itemsize), (1, 1)):
        view = d_out[..., offset : offset + 16]
        run = backward(view, rest[1], rest[2], 3)
        assert_same(run, ops.prompt_lookup_bwd_ref(view, rest[1], rest[2], 3, True, True))
        assert run.vector == vector


def test_each_gradient_alone():
    d_out, task_ids = torch.randn(3, 6, 16), torch.tensor([1, 0, 1]).int()
    positions = torch.tensor([1, 4]).int().expand(3, 2)
    both = backward(d_out, task_ids, positions, 3).results
    for needed in range(2):
        out = backward(d_out, task_ids, positions, 3, needed == 0, needed == 1).results
        assert same_bits(out[needed], both[needed])
        assert out[1 - needed].isnan().all()


def test_every_byte_once():
    """The text is read and the output written once, each row's prompt once."""
    a = arguments(6, 9, 72, 4, 3, (torch.bfloat16, torch.float32))
    run = forward(*a)
    rows_with_prompts = int((a[2] >= 0).sum())
    traffic = run.traffic
    assert traffic["embeddings"].loaded == a[0].nbytes
    assert traffic["prompts"].loaded == rows_with_prompts * a[1][0].nbytes
    for name, result in zip(WRITTEN, run.results, strict=True):
        assert traffic[name].stored == traffic[name].distinct_stored == result.nbytes
        assert traffic[name].loaded == 0
    d_out = run.results[0]
    run = backward(d_out, a[2], a[3], 3)
    assert run.traffic["out"].loaded == d_out.nbytes - (6 - rows_with_prompts) * 4 * 72 * 2
    for name, result in zip(("embeddings", "prompts"), run.results, strict=True):
        stored = run.traffic[name]
        assert stored.stored == stored.distinct_stored == result.nbytes


def test_same_bits_under_every_schedule():
    a = arguments(5, 90, 40, 7, 3, (torch.float16, torch.float32))
    expected = forward(*a)
    gradients = backward(expected.results[0], a[2], a[3], 3)
    for seed in range(1, 10):
        assert_same(forward(*a, seed=seed), expected.results)
        again = backward(expected.results[0], a[2], a[3], 3, seed=seed)
        assert_same(again, gradients.results)


WRONG = [(0, 0, 0), (-5, -4, -3), (2**31 - 3, 2**31 - 2, 2**31 - 1), (-(2**31), 0, 2**31 - 1)]
WRONG += [(7, 3, 1), (-1, 0, 1), (6, 7, 8)]


@pytest.mark.parametrize("places", WRONG, ids=str)
def test_places_and_ids_that_are_not_there(places):
    """Nothing outside of a buffer is touched; a row of a prompt that isn't there has none."""
    embeddings, prompts, _, _, mask, labels = arguments(4, 5, 16, 3, 2)
    task_ids = torch.tensor([2, -1, 2**31 - 1, 1]).int()
    positions = torch.tensor(places).int().expand(4, 3).contiguous()
    positions[1] = torch.tensor([0, 3, 6])
    run = forward(embeddings, prompts, task_ids, positions, mask, labels)
    good = torch.full_like(task_ids, -1), positions[1:2].expand(4, 3)
    expected = ops.prompt_lookup_fwd_ref(embeddings, prompts, *good, mask, labels)
    for result, wanted in zip(run.results, expected, strict=True):
        assert same_bits(result[1], wanted[1])
    assert not run.results[0].isnan().any()
    gradients = backward(torch.randn(4, 8, 16), task_ids, positions, 2).results
    assert not any(t.isnan().any() for t in gradients)
    assert not gradients[1][0].any()


KERNEL = (CSRC / "cuda" / "prompt_lookup.cuh").read_text().splitlines()
BARRIERS = [line for line, text in enumerate(KERNEL, 1) if re.search(r"__syncthreads\(\)", text)]


def test_a_missing_barrier_shows():
    assert len(BARRIERS) == 1
    a = arguments(2, 300, 8, 5, 1)
    expected = forward(*a).results
    for seed in range(10):
        try:
            results = forward(*a, seed=seed, left_out=BARRIERS[0]).results
            if not all(same_bits(x, y) for x, y in zip(results, expected, strict=True)):
                return
        except DecodeError:
            return
    pytest.fail("no schedule needed this barrier")


def run_elsewhere(file, tests, **environment):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file), "-k", tests]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


@pytest.mark.long
@is_outermost
@needs_compiler
def test_under_sanitizers(tmp_path):
    driver = compile_driver(tmp_path / "driver.so", *SANITIZE, op="prompt_lookup")
    environment = {"PEFT_KERNELS_SIMT_LOOKUP": str(driver)} | sanitizer_environment()
    run_elsewhere(__file__, "reference or vectors or not_there", **environment)


OP_TESTS = Path(__file__).parents[1] / "ops" / "test_prompt_lookup.py"
# The launcher refuses no values, and its library holds no other op and no builds to choose from.
OF_THE_CPU = "not by_the_kernel and not every_build and not more_threads and not triton"


@pytest.mark.long
@is_outermost
@needs_compiler
def test_the_ops_pass_the_tests_of_the_op(tmp_path):
    library = compile_ops(tmp_path / "ops.so", "-O1", op="prompt_lookup")
    run_elsewhere(OP_TESTS, OF_THE_CPU, PEFT_KERNELS_NATIVE=str(library))


@pytest.mark.long
@is_outermost
@needs_compiler
def test_the_ops_under_sanitizers(tmp_path):
    library = compile_ops(tmp_path / "ops.so", *SANITIZE, op="prompt_lookup")
    environment = {"PEFT_KERNELS_NATIVE": str(library)} | sanitizer_environment()
    run_elsewhere(OP_TESTS, "native_on_any_shape or strides", **environment)


@is_outermost
@needs_compiler
def test_the_ops_refuse(tmp_path):
    library = compile_ops(tmp_path / "ops.so", op="prompt_lookup")
    run_elsewhere(__file__, "refuses", PEFT_KERNELS_NATIVE=str(library), PEFT_KERNELS_SIMT_OPS="1")


@pytest.mark.skipif("PEFT_KERNELS_SIMT_OPS" not in os.environ, reason="a part of the test above")
def test_refuses():
    embeddings, prompts, task_ids, positions, mask, labels = arguments(3, 4, 5, 2, 4)

    def refuses(message, **change):
        given = {"embeddings": embeddings, "prompts": prompts, "task_ids": task_ids}
        given |= {"positions": positions, "mask": mask, "labels": labels} | change
        with pytest.raises(RuntimeError, match=message):
            ops.prompt_lookup_fwd(*given.values())

    refuses("must be .B, S, d.", embeddings=embeddings[0])
    refuses("prompts has the wrong shape", prompts=prompts[..., 1:])
    refuses("prompts has the wrong dtype", prompts=prompts.half())
    refuses("task_ids has the wrong dtype", task_ids=task_ids.long())
    refuses("task_ids has the wrong shape", task_ids=task_ids[1:])
    refuses("positions has the wrong shape", positions=positions[1:])
    refuses("mask has the wrong shape", mask=mask[:, 1:])
    refuses("labels has the wrong dtype", labels=labels.int())
    with pytest.raises(RuntimeError, match="at least 2 places; got 1"):
        ops.prompt_lookup_bwd(torch.ones(3, 1, 5), task_ids, positions, 4, True, True)
