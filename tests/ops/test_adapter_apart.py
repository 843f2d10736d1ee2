"""adapter_apart: the rows of each adapter are what `adapter` makes of them by themselves."""

import pytest
import torch
import torch.nn.functional as F
from errors import assert_as_good_as

import peft_kernels
from peft_kernels.ops import adapter
from peft_kernels.ops._activations import ACTIVATIONS
from peft_kernels.ops._adapter_apart import AdapterFactors, adapter_apart

K, SIZES, HALF = 37, (3, 16, 20), torch.bfloat16
SCALES = (0.5, torch.linspace(-1, 2, K), torch.tensor([1.5]))
IDS = [2, -1, 0, 1, 0, 2, -1]
NORMS = ("norm_weight", "norm_bias", "pre_norm_weight", "pre_norm_bias")


def problem(dtype=torch.float32, adapter_dtype=None, activations=("relu", "gelu", "tanh"), rows=7):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=generator) * std

    columns = [
        [normal(r, K, std=K**-0.5) for r in SIZES],
        [normal(r) for r in SIZES],
        [normal(K, r, std=r**-0.5) for r in SIZES],
        [normal(K) for _ in SIZES],
    ]
    kind = adapter_dtype or dtype
    columns = [[tensor.to(kind) for tensor in column] for column in columns]
    scales = [s.to(kind) if isinstance(s, torch.Tensor) else s for s in SCALES]
    x, residual = (normal(rows, 3, K).to(dtype) for _ in range(2))
    norms = {name: (1 + normal(K, std=0.3)).to(kind) for name in NORMS}
    return x, residual, AdapterFactors(*columns, scales, activations), norms


def ids_of(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def of_each(x, residual, factors, numbers, norms):
    """Each adapter's rows alone; zero without one."""
    y = torch.zeros_like(x)
    for number in set(numbers) - {-1}:
        rows = [row for row, one in enumerate(numbers) if one == number]
        *matrices, scale, activation = (column[number] for column in factors)
        part = x[rows]
        terms = (residual[rows], part)
        options = {"activation": activation, "scale": scale, "residual": terms}
        y[rows] = adapter(part, *matrices, **options, **norms)
    return y


@pytest.mark.builds
@pytest.mark.parametrize("numbers", [IDS, [0, 0, 1, 1, 2, 2, 2], [1] * 7, [-1] * 7], ids=str)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, None), (HALF, None), (HALF, torch.float32), (torch.float64, None)],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_has_the_bits_of_each_alone(numbers, dtype, adapter_dtype, backend):
    x, residual, factors, norms = problem(dtype, adapter_dtype)
    with peft_kernels.backend(backend):
        y = adapter_apart(x, factors, ids_of(numbers), residual=(residual, x), **norms)
        expected = of_each(x, residual, factors, numbers, norms)
    assert y.dtype is dtype and torch.equal(y, expected)


@pytest.mark.builds
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [7, 28])
def test_the_number_of_threads_changes_no_bit(threads, rows):
    x, residual, factors, norms = problem(rows=rows)
    numbers, before = IDS * (rows // 7), torch.get_num_threads()
    expected = of_each(x, residual, factors, numbers, norms)
    try:
        torch.set_num_threads(threads)
        y = adapter_apart(x, factors, ids_of(numbers), residual=(residual, x), **norms)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_is_as_near_to_float64_as_the_composition(activation, dtype):
    x, residual, factors, norms = problem(dtype, activations=(activation,) * 3)

    def composed(kind):
        rows = []
        for row, number in enumerate(IDS):
            down, down_bias, up, up_bias, scale, _ = (
                column[number].to(kind)
                if isinstance(column[number], torch.Tensor)
                else column[number]
                for column in factors
            )
            h, w = x[row].to(kind), {name: one.to(kind) for name, one in norms.items()}
            normed = F.layer_norm(h, (K,), w["pre_norm_weight"], w["pre_norm_bias"])
            u = F.linear(ACTIVATIONS[activation][0](F.linear(normed, down, down_bias)), up, up_bias)
            t = residual[row].to(kind) + h + scale * u
            rows.append(F.layer_norm(t, (K,), w["norm_weight"], w["norm_bias"]))
        return torch.stack(rows)[[number >= 0 for number in IDS]]

    y = adapter_apart(x, factors, ids_of(IDS), residual=(residual, x), **norms)
    y = y[[number >= 0 for number in IDS]]
    assert_as_good_as(y, composed(dtype), composed(torch.float64), activation)


def test_strided_rows_and_none_at_all():
    x, residual, factors, _ = problem()
    wide = torch.stack([x, x.flip(0)], 2)[:, :, 0]
    assert not wide.is_contiguous()
    for chosen in (x[:0], wide):
        numbers = IDS[: len(chosen)]
        y = adapter_apart(chosen, factors, ids_of(numbers), residual=(residual[: len(chosen)],))
        expected = torch.zeros_like(chosen)
        for row, number in enumerate(numbers):
            if number >= 0:
                *matrices, scale, activation = (column[number] for column in factors)
                options = {"activation": activation, "scale": scale, "residual": residual[[row]]}
                expected[row] = adapter(chosen[[row]], *matrices, **options)[0]
        torch.testing.assert_close(y, expected)


def arguments(ids):
    x, residual, factors, norms = problem(rows=len(ids))
    x, residual = x[:, 0].contiguous(), residual[:, 0].contiguous()
    columns = [list(column) for column in factors]
    scales = [0.5, 1.0, 1.0], [None, SCALES[1], SCALES[2][0]]
    w = [norms[name] for name in NORMS]
    return (
        x, residual, *columns[:4], *scales, columns[5], w[2], w[3], 1e-5, w[0], w[1], 1e-5, True,
        ids_of(ids),
    )  # fmt: skip


def test_op_is_registered_as_torch_expects():
    torch.library.opcheck(torch.ops.peft_kernels.adapter_apart.default, arguments(IDS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({16: [0, 3, 0]}, r"ids must be in \[-1, 3\); got 3"),
        ({16: [0, -2, 0]}, r"ids must be in \[-1, 3\); got -2"),
        ({16: [0, 1]}, "ids must serve the rows of x in equal parts"),
        ({8: ["relu"] * 2}, "an activation of each adapter"),
        ({1: torch.zeros(2, K)}, r"residual must be \[m, n\]"),
    ],
)
def test_what_the_kernel_can_t_serve_is_named(change, message):
    given = list(arguments([0, 1, 2]))
    for index, value in change.items():
        given[index] = ids_of(value) if index == 16 else value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.peft_kernels.adapter_apart(*given)
