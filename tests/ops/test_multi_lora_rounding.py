"""multi_lora_add_ in 16 bits: rounded once, to the nearest, ties to even, whatever the batch."""

import pytest
import torch

import peft_kernels
from peft_kernels.ops import multi_lora_add_
from peft_kernels.ops.multi_lora_linear import example_bank

COLUMNS = 50


def of_rank_one(n: int, k: int, dtype: torch.dtype):
    """A bank whose one adapter adds ``x[0] * b``, and b."""
    bank = example_bank(n, k, [1], dtype=dtype)
    row = int(bank.table[0, 0]) * 8
    bank.a[row] = 0
    bank.a[row, 0] = 1
    return bank._replace(scales=torch.ones(1)), bank.b[row]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 30, 60])
@pytest.mark.parametrize("k", [1, 33, 96])
def test_sums_are_rounded_once_to_the_nearest_even(rows, k, dtype):
    step = torch.finfo(dtype).eps
    bank, b = of_rank_one(COLUMNS, k, dtype)
    x = torch.randn(rows, k).to(dtype)
    y = torch.randn(rows, COLUMNS).to(dtype)
    y[:, 0], y[:, 1], y[:, 2], y[:, 3] = torch.inf, -torch.inf, torch.nan, -0.0
    x[:, 0], b[4], y[:, 4] = 1, step / 2, 1  # halfway, to an even one below
    b[5], y[:, 5] = step / 2, 1 + step  # halfway, to an even one above
    whole = torch.addcmul(y.double(), x[:, :1].double(), b.double())
    expected = whole.float().to(dtype)
    assert (expected[0, 4], expected[0, 5]) == (1, 1 + 2 * step)
    with peft_kernels.backend("auto"):
        multi_lora_add_(y, x, bank, torch.zeros(rows, dtype=torch.int32))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
