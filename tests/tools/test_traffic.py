"""The activation passes of every plan, counted from the kernels' own loads and stores."""

import importlib

import pytest
import torch

from peft_kernels.tools.report.traffic import counted, lora_linear
from peft_kernels.triton.lora_linear import kernels as kernels
from peft_kernels.triton.lora_linear import launch as launchers
from peft_kernels.triton.lora_linear import plans

M, N, K, R = 140, 270, 150, 20  # two tiles of the H100's a side


@pytest.fixture(scope="module")
def rows():
    return {
        (plan, row.direction): row
        for plan in plans.PLANS
        for row in lora_linear.count(plan, M, N, K, R)
    }


def test_extra_passes(rows):
    """PEFT needs 7 and 9 passes beyond the base GEMMs, LoRAFusion 3.5 and 2.5."""
    assert rows["i", "fwd"].extra_passes == 1
    assert rows["i", "bwd"].extra_passes == 2
    assert rows["ii", "fwd"].extra_passes == 0
    assert rows["library", "fwd"].extra_passes == 3
    assert rows["library", "bwd"].extra_passes == 4


def test_extra_passes_of_a_rank_beyond_one_block():
    """The rank blocks read x and dy again, through the cache: still one pass a launch."""
    forward, backward = lora_linear.count("i", M, N, K, 70)
    assert (forward.extra_passes, backward.extra_passes) == (1, 2)


def test_parts_are_written_and_read_once():
    """Beside what plan "ii" moves: y and S in float32, four times over, out and back in."""
    (whole, _), (parts, _) = (lora_linear.count("ii", M, N, K, R, splits=s) for s in (1, 4))
    assert parts.bytes_moved - whole.bytes_moved == 2 * 4 * 4 * (M * N + M * R)
    (_, whole), (_, parts) = (lora_linear.count("i", M, N, K, R, splits=s) for s in (1, 4))
    assert parts.bytes_moved - whole.bytes_moved == 2 * 4 * 4 * M * K
    assert parts.launches == whole.launches + 1 and parts.atomics == 0
    assert parts.extra_passes == whole.extra_passes + 2 * 4


def test_in_loop_moves_the_floor(rows):
    """y, S and every input exactly once; the 0-d scale is a kernel argument."""
    assert rows["ii", "fwd"].bytes_moved == rows["ii", "fwd"].bytes_floor


def test_in_loop_stores_s_once():
    """Every program of a row of tiles has S; one stores it."""
    op = importlib.import_module("peft_kernels.ops.lora_linear")
    inputs = op.example_inputs(40, 150, 30, 5)
    with plans.force("ii"), counted.Traffic() as traffic:
        launchers.lora_linear_fwd(**inputs, scale=1.0, scale_t=None, dropout_p=0.0, seed=None)
    (s,) = (access for access in traffic.accesses if access.argument == "s")
    assert s.requests == s.written == 40 * 5


def test_no_atomics(rows):
    assert all(row.atomics == 0 for row in rows.values())


# ---- the instrument itself -------------------------------------------------------------------


A = torch.zeros(4, 96)


def shrink(x, rows):
    """Launches a kernel that reads the first ``rows`` rows of x."""
    k = x.shape[1]
    out = torch.empty(1, rows, 4)
    kernels.shrink_kernel[(1, 1)](
        x, A, out, 0, 0, 1.0, rows, k, 4, k, *x.stride(), 0, *A.stride(),
        DROPOUT=False, SEED_ON_DEVICE=False, TERMS=3, SLOTS=1, PRECISION="ieee",
        BLOCK_M=64, BLOCK_K=64, BLOCK_R=16,
    )  # fmt: skip


def test_counts_what_a_kernel_touches():
    x = torch.randn(64, 96)
    with counted.Traffic() as traffic:
        shrink(x, 16)
    assert traffic.passes((64, 96)) == 0.25
    assert traffic.launches == 1
    with counted.Traffic() as traffic:
        shrink(x, 64)
        shrink(x, 64)
    assert traffic.passes((64, 96)) == 2


@pytest.mark.parametrize(
    ("operation", "passes"),
    [
        (lambda x: x.T, 0),
        (lambda x: x.new_empty(x.shape), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x.new_zeros(x.shape), 1),
        (lambda x: x.clone(), 2),
        (lambda x: x.T.contiguous(), 2),
        (lambda x: x.double(), 2),
        (lambda x: x.mul_(2), 2),
        (lambda x: x.sum(), 1),
    ],
)
def test_counts_torch_operations(operation, passes):
    with counted.Traffic() as traffic:
        operation(torch.randn(64, 96))
    # randn writes x itself
    assert traffic.passes((64, 96)) - 1 == passes


def test_sizes_must_differ():
    with pytest.raises(ValueError, match="four different numbers"):
        lora_linear.count("i", 32, 32, 16, 4)
