"""multi_lora_linear's decode plan: its CUDA device code, every thread a fiber on the CPU."""

import os
import re
import shutil

import pytest
import torch
from decode_driver import (
    CSRC,
    DTYPE_IDS,
    DTYPES,
    GRID_WAIT,
    RANKS,
    SANITIZE,
    DecodeError,
    add_inputs,
    compile_driver,
    decode,
    inputs_of,
    run_again,
    same_bits,
    sanitizer_environment,
)
from errors import assert_as_good_as

from peft_kernels.ops.multi_lora_linear import PAGE

# m, widths of the banks, k, ids: every kernel, tiles of 8, 16 and 32 columns, odd sizes, x in
# chunks (k 2056 with few bytes of shared memory), rows in chunks, ids that serve several rows
SHAPES = [
    (1, [64], 64, 1),
    (2, [40, 24], 96, 1),
    (3, [33], 65, 3),
    (4, [24, 17, 9], 130, 2),
    (7, [48, 16, 16], 2056, 7),
    (10, [1056, 8], 520, 5),
    (16, [40], 1, 16),
    (2, [8200], 40, 2),
    (19, [33, 7], 71, 19),
    (33, [8, 64, 8], 512, 33),
]
SHAPE_IDS = [f"m{m}-n{sum(widths)}-k{k}" for m, widths, k, _ in SHAPES]


def add_inputs_of(m, widths, *rest, **options):
    inputs = inputs_of(m, widths, *rest, **options)
    return add_inputs(inputs, torch.randn(m, sum(widths)).to(inputs["x"].dtype))


def reference(x, banks, ids, weight=None, bias=None, y=None):
    fields = [list(field) for field in zip(*banks, strict=True)]
    rest = (x, *fields, ids, None, None, [], [], "auto")
    if weight is None:
        y = y.clone()
        return y, torch.ops.peft_kernels.multi_lora_linear_add_ref(y, *rest)
    return torch.ops.peft_kernels.multi_lora_linear_fwd_ref(x, weight, bias, *rest[1:])


def run(inputs, **options):
    """decode() that leaves the given y as it is."""
    copies = {"y": inputs["y"].clone()} if "y" in inputs else {}
    return decode(**(inputs | copies), **options)


def check(inputs, **options):
    """Runs it and asserts that it is as good as the eager path."""
    tensors = {
        name: t.double() for name, t in inputs.items() if name in ["x", "weight", "bias", "y"]
    }
    banks = [bank._replace(a=bank.a.double(), b=bank.b.double()) for bank in inputs["banks"]]
    exact, eager = reference(**(inputs | tensors | {"banks": banks})), reference(**inputs)
    out = run(inputs, **options)
    for i, name in enumerate(("y", "s")):
        assert_as_good_as(out[i], eager[i], exact[i], name)
    return out


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_against_float64(shape, dtypes):
    m, widths, k, count = shape
    check(inputs_of(m, widths, k, *dtypes, count=count), blocks=4, shared_limit=64 << 10)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES[-2:], ids=SHAPE_IDS[-2:])
def test_add(shape, dtypes):
    """Adds to y in place; a row without an adapter is neither read nor written."""
    m, widths, k, count = shape
    inputs = add_inputs_of(m, widths, k, *dtypes, count=count)
    ids = inputs["ids"].repeat_interleave(m // count)
    untouched = (ids <= 0) | (ids >= len(RANKS))
    _, _, traffic = check(inputs)
    touched_bytes = inputs["y"][~untouched].nbytes
    assert traffic["y"].loaded == traffic["y"].stored == touched_bytes
    inputs["y"][untouched] = torch.nan
    after = run(inputs)[0]
    assert same_bits(after[untouched], inputs["y"][untouched])
    assert not after[~untouched].isnan().any()


def test_same_bits_under_every_schedule_and_grid():
    inputs = inputs_of(19, [24, 48], 1096, torch.bfloat16, torch.float32)
    y, s, _ = run(inputs)
    for seed in range(1, 10):
        other, other_s, _ = run(inputs, seed=seed, blocks=seed, shared_limit=seed << 14)
        assert same_bits(y, other)
        assert same_bits(s, other_s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [528, 67])
def test_a_row_has_the_bits_it_has_alone(k, dtype):
    """Whatever its neighbours are, however many there are, and however x lies in memory."""
    inputs = inputs_of(33, [40, 8], k, dtype)
    y, s, _ = run(inputs)
    for rows in ([0], [5, 4, 3, 7, 32], list(range(9, 18)), list(range(32, -1, -1))):
        part = {"x": inputs["x"][rows].clone(), "ids": inputs["ids"][rows]}
        out, out_s, _ = run(inputs | part)
        assert same_bits(out, y[rows])
        assert same_bits(out_s, s[rows])
    padded = torch.full((33, k + 9), torch.nan, dtype=dtype)
    padded[:, 1 : k + 1] = inputs["x"]
    assert same_bits(run(inputs | {"x": padded[:, 1 : k + 1]})[0], y)


def test_rows_read_nothing_of_others():
    """Infinities in one adapter, in free pages and in the ends of pages reach no other row; rows
    without an adapter have the bits of the base layer alone."""
    inputs = inputs_of(33, [40, 8], 96, torch.float16)
    ids = inputs["ids"]
    y = run(inputs)[0]
    for bank in inputs["banks"]:
        bank.a[bank.a.isnan()] = torch.inf
        bank.b[bank.b.isnan()] = torch.inf
        pages = bank.table[6, : -(-RANKS[6] // PAGE)].long()
        bank.a.view(-1, PAGE, 96)[pages] = torch.inf
    poisoned = run(inputs)[0]
    assert poisoned[ids == 6].isnan().any(1).all()
    assert same_bits(poisoned[ids != 6], y[ids != 6])
    base = run(inputs | {"ids": torch.full_like(ids, -1)})[0]
    without = (ids <= 0) | (ids >= len(RANKS))
    assert without.sum() > 3
    assert same_bits(base[without], y[without])


def test_traffic_is_the_floor():
    """W, x, each adapter that has rows at its true rank, and y: their bytes and no more, and W once
    though there are 16 rows."""
    inputs = inputs_of(16, [256, 64], 512, torch.bfloat16)
    ids = inputs["ids"]
    _, s, traffic = run(inputs, blocks=5)
    ranks = {i: RANKS[i] for i in ids.tolist() if 0 <= i < len(RANKS)}
    floor = {"x": inputs["x"].nbytes, "weight": inputs["weight"].nbytes, "bias": 2 * 320}
    for j, width in enumerate((256, 64)):
        floor |= {f"a{j}": 2 * 512 * sum(ranks.values()), f"b{j}": 2 * width * sum(ranks.values())}
    assert {name: traffic[name].distinct_loaded for name in floor} == floor
    assert traffic["weight"].loaded == floor["weight"]
    rows_of_a = sum(ranks.get(i, 0) for i in ids.tolist())
    assert traffic["a0"].loaded == 2 * 512 * rows_of_a
    assert traffic["b0"].loaded == 2 * 256 * rows_of_a
    for name, size in (("y", 2 * 16 * 320), ("s", s.nbytes)):
        assert traffic[name].stored == traffic[name].distinct_stored == size


KERNEL = (CSRC / "cuda" / "multi_lora_linear.cuh").read_text().splitlines()
BARRIERS = [line for line, text in enumerate(KERNEL, 1) if re.search(r"__syncthreads\(\)", text)]


@pytest.mark.parametrize("line", [GRID_WAIT, *BARRIERS])
def test_a_missing_barrier_shows(line):
    """With any one of its barriers left out, some schedule computes something else."""
    shape = (19, [24, 48], 1096, torch.bfloat16)
    for inputs in (inputs_of(*shape), add_inputs_of(*shape)):
        expected = run(inputs)[0]
        for seed in range(18):
            options = {"seed": seed, "left_out": line, "shared_limit": (seed % 2 + 2) << 15}
            try:
                if not same_bits(run(inputs, **options)[0], expected):
                    return
            except DecodeError:
                return
    pytest.fail("no schedule needed this barrier")


@pytest.mark.long
@pytest.mark.skipif("PEFT_KERNELS_SIMT" in os.environ, reason="this is the run with sanitizers")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_under_sanitizers(tmp_path):
    run_again(
        __file__,
        "bfloat16-float32 and (m2- or m7- or m19- or m33-)",
        passed=7,
        PEFT_KERNELS_SIMT=str(compile_driver(tmp_path / "driver.so", *SANITIZE)),
        **sanitizer_environment(),
    )
