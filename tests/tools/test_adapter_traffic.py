"""The bytes of adapter and adapter_fusion, counted from the kernels' own loads and stores."""

import math

import pytest
import torch

from peft_kernels.tools.report.traffic import adapter, adapter_fusion
from peft_kernels.tools.report.traffic.adapter import LAYOUTS

pytestmark = pytest.mark.long

M, K, R = 80, 140, 20  # two tiles of the H100's a side or more
BLOCK_M = 64  # of every kernel that sums over rows; the GPU has room for a program for each
BOTH = LAYOUTS["LayerNorm before and after"]
ADAPTERS = {
    **{name: (layout, M, K, R, {}) for name, layout in LAYOUTS.items()},
    "another width": (LAYOUTS["update"], M, K, R, {"n": 200}),
    "two blocks of ranks": (BOTH, M, K, 70, {}),
    "scale by channel": (BOTH, M, K, R, {"channels": True, "dropout_p": 0.1}),
    "bfloat16 parameters": (BOTH, M, K, R, {"adapter_dtype": torch.bfloat16}),
    "float32": (BOTH, 16, 50, 9, {"dtype": torch.float32}),
}
SIZES = (20, 3, 9)
FUSIONS = {
    "query x": (M, K, SIZES, {}),
    "query and residual": (M, K, SIZES, {"query": True, "residual": True}),
    "two blocks of ranks": (70, 90, (75,), {}),
    "bfloat16 parameters": (M, K, SIZES, {"adapter_dtype": torch.bfloat16}),
    "many rows": (512, 40, (5, 6), {}),  # M is copied to aligned rows
}


@pytest.fixture(scope="module")
def adapters():
    return {
        case: adapter.count(layout, *sizes, **options)
        for case, (layout, *sizes, options) in ADAPTERS.items()
    }


@pytest.fixture(scope="module")
def fusions():
    return {
        case: adapter_fusion.count(*sizes, **options) for case, (*sizes, options) in FUSIONS.items()
    }


# ---- adapter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_forward(adapters, case):
    """The floor in one launch; the LayerNorm on the way down is folded into D by another one."""
    call = adapters[case]
    m, _, k, r = call.sizes()
    size, pre = call.inputs["down_weight"].itemsize, call.layout.pre_norm
    waste = {
        "D and w again, to fold them": pre * (r * k + k) * size,
        "the fold, from launch to launch": pre * 2 * (2 * r * 4),
        "z, of blocks of ranks": (r > 64) * m * r * 4,
    }
    assert call.forward.bytes_moved() == call.floor("fwd") + sum(waste.values())
    assert call.forward.launches == 1 + pre
    assert call.extra_passes("fwd") == 0


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_backward(adapters, case):
    """Beyond the floor: what is read again, and what goes from launch to launch."""
    call = adapters[case]
    pre, norm, adds_x = call.layout.pre_norm, call.layout.norm, call.layout.adds_x
    m, n, k, r = call.sizes()
    x_size, size = call.inputs["x"].itemsize, call.inputs["down_weight"].itemsize
    parts = math.ceil(m / BLOCK_M)
    waste = {
        "dy again, for G": (not norm) * m * n * x_size,
        # of float32 x it is the residual's gradient, so that its store is in the floor
        "dt, stored and read for dz and for G": norm * (2 + (x_size < 4)) * m * n * 4,
        "x again, for t and for dx": ((norm and adds_x) + pre) * m * k * x_size,
        "z again, for G and for t": (1 + norm) * m * r * 4,
        "dz, stored and read for dD and, of blocks of ranks, for dx": (2 + (r > 64)) * m * r * 4,
        "U again, for t": norm * n * r * size,
        "the scale by channel again, for t": norm * (call.inputs["scale_t"].dim() * n) * size,
        "D and w twice again, and b, to fold them and for dD": pre * (2 * (r * k + k) + k) * size,
        "b_d, to fold it": pre * r * size,
        "the fold, from launch to launch": pre * 2 * (2 * r * 4),
        "parts of G, g0 and dD": 2 * parts * (n * r + n + r * k) * 4,
        "parts of norm's gradients": norm * 2 * parts * 2 * n * 4,
        # without pre_norm the second of two sums is read and added up without being stored
        "parts of dz's sums": (1 + pre + 2) * parts * r * 4,
        "dz's second sum, and both again, for dD": (1 + pre * 2) * r * 4,
    }
    assert call.backward.bytes_moved() == call.floor("bwd") + sum(waste.values())
    assert call.backward.launches == 7 + pre + 2 * norm
    of_gradient = 2 + (x_size < 4) if norm else 1
    assert call.extra_passes("bwd") == of_gradient + (norm and adds_x) + pre


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_passes_of_a_program(adapters, case):
    """How often a program loads its rows: t is computed twice on either side of a LayerNorm."""
    call = adapters[case]
    norm, adds_x, pre = call.layout.norm, call.layout.adds_x, call.layout.pre_norm
    blocks = math.ceil(call.sizes()[-1] / 64)
    x, residual = call.inputs["x"], call.inputs.get("residual")
    assert call.repeats("adapter_fwd_kernel", x) == blocks + adds_x * (1 + norm)
    if residual is not None:
        assert call.repeats("adapter_fwd_kernel", residual) == 2
        assert call.repeats("adapter_norm_bwd_kernel", residual) == 2
    if norm:
        assert call.repeats("adapter_norm_bwd_kernel", call.dy) == 2
        assert call.repeats("adapter_norm_bwd_kernel", x) == 2
    else:
        assert call.repeats("adapter_bwd_kernel", call.dy) == blocks + adds_x
        assert call.repeats("adapter_up_kernel", call.dy) == blocks
    if pre:
        assert call.repeats("adapter_bwd_kernel", x) == 1
    assert call.repeats("grad_a_kernel", x) == blocks


# ---- adapter_fusion ----------------------------------------------------------------------------


def copied(call):
    """M, where there are enough rows, is copied: it is read, and stored."""
    return 2 * call.inputs["mix_weight"].nbytes * (len(call.y) >= 512)


@pytest.mark.parametrize("case", FUSIONS)
def test_fusion_forward(fusions, case):
    """Beyond the floor: rows of the bottlenecks' size, from launch to launch."""
    call = fusions[case]
    m, ranks, adapters = len(call.y), sum(call.sizes), len(call.sizes)
    waste = {
        "z and w again, for p": m * (2 * ranks + adapters) * 4,
        "p o a, stored and read": 2 * m * ranks * 4,
        "p again, for y": m * adapters * 4,
        "where adapters start": (adapters + 1) * 4,
        "M copied": copied(call),
    }
    assert call.forward.bytes_moved() == call.floor("fwd") + sum(waste.values())
    assert call.forward.launches == 3 + (m >= 512)
    assert call.extra_passes("fwd") == 0


@pytest.mark.parametrize("case", FUSIONS)
def test_fusion_backward(fusions, case):
    """Beyond the floor: activations again for each gradient, rows of the bottlenecks' size."""
    call = fusions[case]
    (m, n), ranks, adapters = call.y.shape, sum(call.sizes), len(call.sizes)
    columns, own_query = ranks + adapters, "query" in call.inputs
    gradients = (ranks + columns) * (n + 1) + (ranks + adapters) * n  # with bias: dD and dS
    waste = {
        "dy again, for dM and for dv": 2 * call.dy.nbytes,
        "x again, for dS": (not own_query) * call.inputs["x"].nbytes,
        "t and dy . v, stored and read": 2 * m * columns * 4,
        "dpre, stored and read for dx and dD": 3 * m * ranks * 4,
        "dw, stored and read for dx or dq and dS": 3 * m * columns * 4,
        "p o a, stored and read for dM": 2 * m * ranks * 4,
        "p again, for dv": m * adapters * 4,
        "where adapters start": (adapters + 1) * 4,
        "parts of the gradients": 2 * math.ceil(m / BLOCK_M) * gradients * 4,
        "M copied": copied(call),
    }
    assert call.backward.bytes_moved() == call.floor("bwd") + sum(waste.values())
    assert call.backward.launches == 13 + own_query + (m >= 512)
    assert call.extra_passes("bwd") == 2 + (not own_query)


# ---- both --------------------------------------------------------------------------------------


def test_no_atomics(adapters, fusions):
    for call in [*adapters.values(), *fusions.values()]:
        assert call.forward.atomics == call.backward.atomics == 0


def test_outputs_are_stored_once(adapters, fusions):
    """In one launch, and by one program: none but their readers touch them again."""
    for call in [*adapters.values(), *fusions.values()]:
        for direction, tensor in [("fwd", call.y), *(("bwd", dx) for dx in call.gradients[:2])]:
            if tensor.numel():
                stores = [a for a in call.traffic(direction).of(tensor) if a.written]
                assert [a.written for a in stores] == [tensor.numel()]
                assert stores[0].requests == tensor.numel()


def test_rows_of_the_report():
    rows = adapter.rows(16, 40, 8) + adapter_fusion.rows(16, 40)
    assert [(row.op, row.plan, row.direction) for row in rows] == [
        *(("adapter", name, way) for name in LAYOUTS for way in ("fwd", "bwd")),
        *(
            ("adapter_fusion", name, way)
            for name in ("query x", "query and residual")
            for way in ("fwd", "bwd")
        ),
    ]
    assert all(row.bytes_moved >= row.bytes_floor > 0 for row in rows)
    assert rows[0].bytes_moved == rows[0].bytes_floor


def test_sizes_must_differ():
    with pytest.raises(ValueError, match="must be different"):
        adapter.count(LAYOUTS["update"], 40, 40, 8)
    with pytest.raises(ValueError, match="must differ"):
        adapter_fusion.count(16, 11, (4, 5))
