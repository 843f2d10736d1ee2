"""Banks that are checked once: the same bits as lists of them, and refusals by name."""

import pytest
import torch

import peft_kernels
from peft_kernels import _library
from peft_kernels.ops._multi_lora_prepared import PreparedBanks
from peft_kernels.ops.multi_lora_linear import example_bank

K, WIDTHS, RANKS = 40, (48, 7), (3, 0, 17)


def banks_of(dtype=torch.float32):
    return [example_bank(n, K, RANKS, dtype=dtype) for n in WIDTHS]


def prepared(banks) -> PreparedBanks:
    found = PreparedBanks(*([bank[i] for bank in banks] for i in range(5)))
    assert found.prepared is not None  # without the kernel, lists would be compared with lists
    return found


def rows(m: int, dtype=torch.float32):
    torch.manual_seed(m)
    ids = torch.randint(-1, len(RANKS), (m,), dtype=torch.int32)
    return torch.randn(m, sum(WIDTHS)).to(dtype), torch.randn(m, K).to(dtype), ids


def by_lists(y, x, banks, ids):
    lists = [[bank[i] for bank in banks] for i in range(5)]
    op = _library.get_op("multi_lora_linear_add", _library.variant(x.dtype))
    op(y, x, *lists, ids, None, None, [], [], "auto")
    return y


@pytest.mark.builds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [0, 1, 2, 16, 70])
def test_has_the_bits_of_lists(m, dtype):
    banks = banks_of(dtype)
    y, x, ids = rows(m, dtype)
    expected = by_lists(y.clone(), x, banks, ids)
    assert m == 0 or not torch.equal(expected, y)
    prepared(banks).add_to(y, x, ids)
    assert torch.equal(y, expected)


@pytest.mark.builds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1024, 1061, 2050])
def test_stretches_of_columns_runs_of_ranks_and_many_rows(n, dtype):
    """Against float64; and a row alone has the bits that it has among others."""
    bank = example_bank(n, K, (70, 133), dtype=dtype)
    ids = torch.tensor([0] * 61 + [1] * 27 + [-1] + [1, 0], dtype=torch.int32)
    torch.manual_seed(n)
    y, x = torch.randn(len(ids), n).to(dtype), torch.randn(len(ids), K).to(dtype)
    before = y.clone()
    of_bank = prepared([bank])
    of_bank.add_to(y, x, ids)
    for i in (0, 60, 61, 87, 88, 90):
        alone = before[i : i + 1].clone()
        of_bank.add_to(alone, x[i : i + 1], ids[i : i + 1])
        assert torch.equal(alone[0], y[i])
    with peft_kernels.backend("reference"):
        doubles = bank._replace(a=bank.a.double(), b=bank.b.double())
        exact = by_lists(before.double(), x.double(), [doubles], ids)
    torch.testing.assert_close(y, exact.to(dtype))
    assert torch.equal(y[88], before[88]) and not torch.equal(y[87], before[87])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_columns_of_a_wider_y(backend):
    banks = banks_of()
    y, x, ids = rows(9)
    wide = torch.full((9, 100), torch.nan)
    part = wide[:, 20 : 20 + sum(WIDTHS)]
    part.copy_(y)
    with peft_kernels.backend(backend):
        prepared(banks).add_to(part, x, ids, 0.5)
        double = by_lists(2 * y, x, banks, ids)
    torch.testing.assert_close(2 * part, double)
    assert wide[:, :20].isnan().all() and wide[:, 20 + sum(WIDTHS) :].isnan().all()


def test_what_the_tensors_hold_may_change():
    banks = banks_of()
    of_banks = prepared(banks)
    y, x, ids = rows(16)
    before = y.clone()
    of_banks.add_to(before, x, ids)
    for bank in banks:
        bank.b.mul_(2)
        bank.ranks.copy_(torch.tensor([17, 3, 0]))
        bank.table.copy_(bank.table.roll(1, 0))
    expected = by_lists(y.clone(), x, banks, ids)
    of_banks.add_to(y, x, ids)
    assert torch.equal(y, expected) and not torch.equal(y, before)


@pytest.mark.builds
def test_the_number_of_threads_changes_no_bit_and_no_row_of_the_base():
    banks = banks_of(torch.bfloat16)
    y, x, ids = rows(70, torch.bfloat16)
    y[ids < 0] = torch.nan
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(y.clone())
            prepared(banks).add_to(found[-1], x, ids)
    finally:
        torch.set_num_threads(threads)
    words = [own.view(torch.int16) for own in found]
    assert torch.equal(words[0], words[1]) and torch.equal(words[0], words[2])
    assert torch.equal(words[0][ids < 0], y.view(torch.int16)[ids < 0])


def test_what_does_not_fit_is_refused_and_y_is_whole():
    of_banks = prepared(banks_of())
    y, x, ids = rows(6)
    before = y.clone()
    with pytest.raises(RuntimeError, match="x must have 40 columns; it has 39"):
        of_banks.add_to(y, x[:, :39], ids)
    with pytest.raises(RuntimeError, match="n that the banks' widths add up to"):
        of_banks.add_to(y[:, :50], x, ids)
    with pytest.raises(RuntimeError, match=r"ids must be in \[-1, 3\); got 3"):
        of_banks.add_to(y, x, torch.full_like(ids, 3))
    op = torch.ops.peft_kernels.multi_lora_linear_add_prepared.default
    for other in (torch.zeros(400, dtype=torch.uint8), of_banks.prepared[:-8]):
        with pytest.raises(RuntimeError, match="what multi_lora_linear_prepare has made"):
            op(y, x, other, ids, 1.0)
    assert torch.equal(y, before)


def test_it_can_be_traced():
    of_banks = prepared(banks_of())
    y, x, ids = rows(16)
    expected = y.clone()
    of_banks.add_to(expected, x, ids)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(y, x, ids):
        of_banks.add_to(y, x, ids)
        return y + 1

    assert torch.equal(run(y.clone(), x, ids), expected + 1)
