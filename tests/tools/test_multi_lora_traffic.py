"""The bytes of multi_lora_linear's plans, counted from the kernels' own loads and stores."""

import importlib
from fractions import Fraction

import pytest
import torch

from peft_kernels.tools.report.traffic import multi_lora_linear

op = importlib.import_module("peft_kernels.ops.multi_lora_linear")

K, WIDTHS = 160, (70, 30)
N = sum(WIDTHS)
# By bank and slot. Slots 1 and 4 have a rank in one bank alone; slots 5 and 6 have no rows.
RANKS = ((8, 16, 24, 12, 0, 40, 8), (24, 0, 8, 3, 0, 16, 8))
IDS = (2, 0, -1, 3, 1, 4, 0, -1)  # entries of the rows, as they come
TRAINED = (0, 2, 3, 5)  # not 1, which has rows; 5 has none
PAGE = op.PAGE
CASES = {
    "grouped": ("grouped", {}),
    "grouped, library base": ("grouped", {"library_base": True}),
    "grouped, dropout": ("grouped", {"dropout_p": 0.1}),
    "single": ("single", {}),
    "single, library base": ("single", {"library_base": True}),
    "decode": ("decode", {}),
}
# The backward of "decode" is another plan's.
DIRECTIONS = [
    (case, direction)
    for case in CASES
    for direction in ("fwd", "bwd")
    if (case, direction) != ("decode", "bwd")
]


def inputs_of(plan):
    m = 16 if plan == "decode" else 96
    ids = torch.tensor(IDS, dtype=torch.int32)
    inputs = op.example_inputs(
        m, list(WIDTHS), K, RANKS[0], ids=ids if plan == "single" else ids.repeat(m // len(IDS)),
        dtype=torch.bfloat16, adapter_dtype=torch.float32,
    )  # fmt: skip
    inputs["banks"][1] = op.example_bank(WIDTHS[1], K, RANKS[1], max_rank=max(RANKS[0]))
    return inputs


@pytest.fixture(scope="module")
def counted():
    return {
        case: multi_lora_linear.count(plan, inputs_of(plan), trained=TRAINED, **options)
        for case, (plan, options) in CASES.items()
    }


def rows_with(call, of=None, slots=range(7)):
    """How many rows have one of these adapters at a rank, in one bank or in any."""
    banks = call.banks if of is None else [of]
    ranked = {slot for bank in banks for slot in call.ranks(bank)}
    return sum(slot in ranked and slot in slots for slot in call.slot_of_row.tolist())


# ---- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_adapters_are_read_once_at_their_true_ranks(counted, case, direction):
    """A and B of adapters with rows, in one launch each; not a row beyond a rank, nor a free page.

    Forward: A for S, B for y. Backward: B for dS, A for dx.
    """
    call = counted[case]
    for bank in call.banks:
        expected = torch.zeros(len(bank.a), dtype=torch.bool)
        for slot, rank in call.ranks(bank).items():
            q = torch.arange(rank)
            expected[bank.table[slot, q // PAGE].long() * PAGE + q % PAGE] = True
        assert expected.sum() == sum(call.ranks(bank).values()) > 0
        for matrix in (bank.a, bank.b):
            accesses = reading(call.traffic(direction), matrix)
            assert len(accesses) == 1
            read = torch.from_numpy(accesses[0].read_at).view(matrix.shape)
            assert torch.equal(read, expected[:, None].expand_as(read))


def reading(traffic, tensor):
    return [access for access in traffic.of(tensor) if access.read]


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_tables_are_read_where_adapters_have_pages(counted, case, direction):
    call = counted[case]
    for bank in call.banks:
        expected = torch.zeros(bank.table.shape, dtype=torch.bool)
        for slot, rank in call.ranks(bank).items():
            expected[slot, : -(-rank // PAGE)] = True
        accesses = reading(call.traffic(direction), bank.table)
        assert len(accesses) == 2  # beside A, and beside B
        for access in accesses:
            assert torch.equal(torch.from_numpy(access.read_at).view(expected.shape), expected)


def test_a_rank_beyond_the_true_one_would_be_noticed(counted):
    """With the ranks rounded up to pages, as if the kernels read whole pages."""
    inputs = inputs_of("decode")
    inputs["banks"] = [
        bank._replace(ranks=(bank.ranks + PAGE - 1) // PAGE * PAGE) for bank in inputs["banks"]
    ]
    padded = multi_lora_linear.count("decode", inputs)

    def rows_read(call):
        return sum(access.read for access in call.forward.of(call.banks[0].a)) // K

    assert (rows_read(counted["decode"]), rows_read(padded)) == (8 + 16 + 24 + 12, 8 + 16 + 24 + 16)


# ---- the base, activations, gradients ----------------------------------------------------------


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_the_weight_is_read_once(counted, case, direction):
    call = counted[case]
    for name in ("weight", "bias") if direction == "fwd" else ("weight",):
        accesses = call.traffic(direction).of(call.inputs[name])
        assert [(a.read, a.written) for a in accesses] == [(call.inputs[name].numel(), 0)]


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_extra_passes(counted, case, direction):
    """Beyond the base layer's own two, each pass over the rows that need it:

    fwd: S reads x where a row has an adapter. Decode's and the fused tile's y is stored once;
         beside the library's GEMM y is read and written again, in each bank's columns, where a
         row has a rank in that bank.
    bwd: dS reads dy, in each bank's columns, where a row has a rank in it; dB reads it again where
         the adapter is trained. dA reads x, once for each bank. Beside the library's GEMM dx is
         read and written again where a row has an adapter.
    """
    call = counted[case]
    m = len(call.y)
    any_bank = Fraction(rows_with(call), m)
    ranked = [Fraction(rows_with(call, bank), m) for bank in call.banks]
    trained = [Fraction(rows_with(call, bank, TRAINED), m) for bank in call.banks]

    def over_columns(shares):
        return sum(share * width / N for share, width in zip(shares, WIDTHS, strict=True))

    library = "library" in case
    if direction == "fwd":
        expected = any_bank + (2 * over_columns(ranked) if library else 0)
    else:
        expected = over_columns(ranked) + over_columns(trained) + sum(trained)
        expected += 2 * any_bank if library else 0
    assert call.extra_passes(direction) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("case", [case for case, direction in DIRECTIONS if direction == "bwd"])
def test_gradients_are_stored_at_true_ranks(counted, case):
    """Set to zero, for adapters without rows, and then stored where a trained adapter has some."""
    call = counted[case]
    for i, gradient in enumerate(call.gradients):
        bank = call.banks[i % 2]
        expected = torch.zeros(len(gradient), dtype=torch.bool)
        first = 0
        for slot in TRAINED:
            rank = int(bank.ranks[slot])
            expected[first : first + rank] = slot in call.ranks(bank)
            first += rank
        zeros, stored = call.backward.of(gradient)
        assert (zeros.launch, zeros.read, zeros.written) == ("new_zeros", 0, gradient.numel())
        assert stored.read == 0 and stored.requests == stored.written
        written = torch.from_numpy(stored.written_at).view(gradient.shape)
        assert torch.equal(written, expected[:, None].expand_as(written))


def test_no_atomics(counted):
    for case, direction in DIRECTIONS:
        assert counted[case].traffic(direction).atomics == 0


# ---- all bytes ---------------------------------------------------------------------------------

# ids, tables and the like: some integers a row, an adapter or a page.
ROUTING = {
    "ids", "order", "starts", "tables", "ranks", "scales", "drop_p", "seeds", "grad_rows", "listed",
}  # fmt: skip


def routing_bytes(traffic):
    return sum(a.bytes_moved() for a in traffic.accesses if a.argument.split("[")[0] in ROUTING)


def s_read(call, case, slots=range(7)):
    """Elements of S that go into y: whole pages of 8 columns, in decode no more than the rank."""
    page = 1 if case == "decode" else PAGE
    return sum(
        -(-rank // page) * page * rows_with(call, bank, {slot} & set(slots))
        for bank in call.banks
        for slot, rank in call.ranks(bank).items()
    )


def s_bytes(call, case, direction):
    """S, or dS, of every row at the width of the tables, and its reads.

    Beside "decode" it is summed over k, or n, in chunks of 64 columns: each stores S of its own,
    and a launch adds them up.
    """
    whole = call.s.numel()
    depth = K if direction == "fwd" else max(WIDTHS)
    chunks = 1 if case == "decode" else -(-depth // 64)
    stored = whole if chunks == 1 else whole * (2 * chunks + 1)
    reads = s_read(call, case)
    if direction == "bwd":
        reads += 2 * s_read(call, case, TRAINED)  # dS for dA, S for dB
    return (stored + reads) * 4


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_bytes_beyond_the_floor(counted, case, direction):
    """The floor, the extra passes, S, the gradients' zeros, the routing: and not a byte else."""
    call = counted[case]
    traffic = call.traffic(direction)
    m = len(call.y)
    known = call.floor(direction) + s_bytes(call, case, direction) + routing_bytes(traffic)
    library = "library" in case
    if direction == "fwd":
        known += rows_with(call) * K * 2
        ranked = zip(call.banks, WIDTHS, strict=True)
        known += sum(2 * rows_with(call, bank) * n * 2 for bank, n in ranked) if library else 0
    else:
        for bank, n in zip(call.banks, WIDTHS, strict=True):
            known += (rows_with(call, bank) + rows_with(call, bank, TRAINED)) * n * 2
            known += rows_with(call, bank, TRAINED) * K * 2
        known -= rows_with(call, slots=TRAINED) * K * 2  # the floor has x once
        known += 2 * rows_with(call) * K * 2 if library else 0
        known += sum(  # zeros of adapters that have rows, which are stored again
            sum(call.ranks(bank).get(slot, 0) for slot in TRAINED) * (K + n) * 4
            for bank, n in zip(call.banks, WIDTHS, strict=True)
        )
    assert traffic.bytes_moved() == known
    # Neither S nor the routing grows with k or n: beside real layers both are small.
    assert routing_bytes(traffic) < 20 * (m + 7 * 5) * traffic.launches


@pytest.mark.long
def test_rows_of_the_report():
    rows = multi_lora_linear.rows(16, 256, 128)
    assert [(row.plan, row.direction) for row in rows] == [
        ("grouped", "fwd"), ("grouped", "bwd"),
        ("grouped, library base", "fwd"), ("grouped, library base", "bwd"),
        ("single", "fwd"), ("single", "bwd"),
        ("decode", "fwd"),
    ]  # fmt: skip
    assert all(row.bytes_moved > row.bytes_floor for row in rows)
    assert rows[-1].bytes_moved < 1.1 * rows[-1].bytes_floor
    with pytest.raises(ValueError, match="multiple of 8"):
        multi_lora_linear.rows(20, 48, 32)
