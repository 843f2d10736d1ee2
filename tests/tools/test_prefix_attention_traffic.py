"""The bytes of prefix_attention, counted from the kernels' own loads and stores."""

import pytest
import torch

from peft_kernels.tools.report.traffic import prefix_attention

BATCH, HEADS, KV_HEADS, SIZE, LENGTH = 3, 4, 2, 16, 20
TRAINING = {"queries": 70, "keys": 70}  # 140 rows a KV head: two tiles of the H100's
IDS = (2, -1, 2)  # of three prefixes one is used, by two rows


def counted_with(queries, keys, **options):
    return prefix_attention.count(
        BATCH, queries, keys, LENGTH, heads=HEADS, kv_heads=KV_HEADS, size=SIZE, **options
    )


@pytest.fixture(scope="module")
def calls():
    return {
        "training": counted_with(**TRAINING),
        "bank": counted_with(
            **TRAINING,
            prefixes=3,
            prefix_ids=torch.tensor(IDS, dtype=torch.int32),
            ends=torch.tensor([70, 11, 40], dtype=torch.int32),
        ),
        "decoding": counted_with(1, 100, backward=False),
        "decoding in parts": counted_with(1, 600, backward=False),
    }


DIRECTIONS = [(case, d) for case in ("training", "bank") for d in ("fwd", "bwd")]
DIRECTIONS += [("decoding", "fwd"), ("decoding in parts", "fwd")]


# ---- the prefix --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "tiles"),
    # tiles of rows that read the prefix, of all batch rows: those of 140 rows are 2 a KV head
    [("training", 2 * BATCH), ("bank", 2 * 2), ("decoding", BATCH), ("decoding in parts", BATCH)],
)
def test_the_prefix_is_read_once_by_a_tile_of_rows(calls, case, tiles):
    """By the tile of one KV head, for all of its query heads; and from memory but once."""
    call = calls[case]
    one = KV_HEADS * LENGTH * SIZE
    for name in ("prefix_k", "prefix_v"):
        (access,) = call.reads("fwd", name)
        assert (access.read, access.written) == (one, 0)
        assert access.requests == one * tiles


@pytest.mark.parametrize("case", ["training", "bank"])
def test_the_backward_reads_the_prefix_for_dq_and_for_its_own_gradient(calls, case):
    call = calls[case]
    one = KV_HEADS * LENGTH * SIZE
    for name in ("prefix_k", "prefix_v"):
        for_dq, for_its_own = call.reads("bwd", name)
        assert for_dq.read == one
        # The bank's gradient has zeros for prefixes without rows, whose programs load their keys.
        assert for_its_own.read == call.inputs[name].numel()


@pytest.mark.parametrize("case", ["bank"])
def test_the_bank_is_read_at_the_ids_of_the_rows(calls, case):
    call = calls[case]
    expected = torch.zeros(call.inputs["prefix_k"].shape, dtype=torch.bool)
    expected[2] = True
    for name in ("prefix_k", "prefix_v"):
        (access,) = call.reads("fwd", name)
        read = torch.from_numpy(access.read_at).view(expected.shape)
        assert torch.equal(read, expected)


# ---- keys and values, and what is written ------------------------------------------------------


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_keys_are_read_where_they_are_real(calls, case, direction):
    """Padding isn't read. One launch reads k and v in the forward, those for dq and dk after."""
    call = calls[case]
    for name in ("k", "v"):
        accesses = call.reads(direction, name)
        assert len(accesses) == (1 if direction == "fwd" else 2)
        for access in accesses:
            assert access.read == call.real_keys * KV_HEADS * SIZE


def test_decoding_asks_for_each_key_once(calls):
    """Not once a query head; in parts too."""
    for case in ("decoding", "decoding in parts"):
        for name in ("k", "v"):
            (access,) = calls[case].reads("fwd", name)
            assert access.requests == access.read


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_nothing_is_written_expanded(calls, case, direction):
    """Only out, lse and the gradients; delta; the parts of a decode step and of the prefix's."""
    call = calls[case]
    traffic = call.traffic(direction)
    written = {(a.launch, a.argument): a.written for a in traffic.accesses if a.written}
    rows, queries = call.lse.numel(), call.out.numel()
    if direction == "bwd":
        dq, dk, dv, d_prefix_k, d_prefix_v = (gradient.numel() for gradient in call.gradients)
        parts = parts_of_prefix_gradient(call)
        own = "prefix_attention_prefix_grad_kernel"
        expected = {
            ("prefix_attention_delta_kernel", "delta"): rows,
            ("prefix_attention_query_grad_kernel", "dq"): dq,
            ("prefix_attention_text_grad_kernel", "dk"): dk,
            ("prefix_attention_text_grad_kernel", "dv"): dv,
            (own, "dk"): parts * d_prefix_k,
            (own, "dv"): parts * d_prefix_v,
            ("sum_partials_kernel", "out"): d_prefix_k,
        }
    else:
        splits = 2 if case == "decoding in parts" else 1
        expected = {
            ("prefix_attention_fwd_kernel", "out"): splits * queries,
            ("prefix_attention_fwd_kernel", "lse"): splits * rows,
        }
        if splits > 1:
            expected[("prefix_attention_combine_kernel", "out")] = queries
            expected[("prefix_attention_combine_kernel", "lse")] = rows
    assert written == expected


def parts_of_prefix_gradient(call):
    """One a row of the batch, and of that one a tile of rows: the H100 has room for all."""
    (access,) = (a for a in call.backward.accesses if a.argument == "dk" and a.shape[0] > BATCH)
    assert access.shape[1:] == call.gradients[3].shape
    return access.shape[0]


@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_bytes_beyond_the_floor(calls, case, direction):
    """The floor, and what a second reading kernel and the parts cost: and not a byte else."""
    call = calls[case]
    moved = call.traffic(direction).bytes_moved()
    q, k, prefix = (call.inputs[name] for name in ("q", "k", "prefix_k"))
    small = 4 * BATCH * (2 if direction == "bwd" else 1)  # at most: ids and ends by kernel
    known = call.floor(direction)
    if direction == "bwd":
        keys = 2 * call.real_keys * KV_HEADS * SIZE * k.element_size()
        d_prefix = 2 * call.gradients[3].nbytes
        parts = parts_of_prefix_gradient(call)
        known += keys + 2 * prefix.nbytes  # k and v, the bank: read for dq, and for their own
        known += 2 * q.nbytes + 3 * call.dout.nbytes  # three kernels read q, and four dout
        known += (2 + 4) * call.lse.nbytes  # lse is read thrice; delta: stored, and read thrice
        known += 2 * parts * d_prefix
        if case == "bank":  # a row's end, and id
            # The prefix's kernel passes over the rows without one.
            unused = sum(i < 0 for i in IDS)
            share = unused / BATCH
            known -= int(share * (q.nbytes + call.dout.nbytes + 2 * call.lse.nbytes))
            small *= 2
    elif case == "decoding in parts":
        known += 2 * 2 * (2 * call.out.nbytes + call.lse.nbytes)
    else:
        small *= 2 if case == "bank" else 0
    assert known <= moved <= known + small


def test_no_atomics(calls):
    for case, direction in DIRECTIONS:
        assert calls[case].traffic(direction).atomics == 0


@pytest.mark.long
def test_rows_of_the_report():
    rows = prefix_attention.rows()
    assert [(row.plan, row.direction) for row in rows] == [
        ("training", "fwd"), ("training", "bwd"), ("decoding", "fwd"),
    ]  # fmt: skip
    assert rows[0].bytes_moved == rows[0].bytes_floor
    assert rows[1].bytes_moved > rows[1].bytes_floor
    assert rows[2].bytes_moved < 1.1 * rows[2].bytes_floor
