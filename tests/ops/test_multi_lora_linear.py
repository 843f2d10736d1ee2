"""multi_lora_linear: against float64, gradients, neighbours, routing, errors, compilation.

The grids that the serving systems test are in test_multi_lora_grid.py, Triton's plans in
triton/test_multi_lora_linear.py, the CUDA kernel in cuda/.
"""

import pytest
import torch
import torch.nn.functional as F
from errors import assert_as_good_as
from hypothesis import given
from hypothesis import strategies as st

import peft_kernels
from peft_kernels.ops import LoRAFactors, multi_lora_add_, multi_lora_linear
from peft_kernels.ops.multi_lora_linear import (
    BankDropout,
    LoRABank,
    Trained,
    example_ids,
    example_inputs,
    example_trained,
    route,
)

BACKENDS = ["reference", "auto"]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def cast(inputs, dtype):
    """The same arguments in another dtype."""
    return {
        name: [b._replace(a=b.a.to(dtype), b=b.b.to(dtype)) for b in value]
        if name == "banks"
        else value
        if name == "ids"
        else value.to(dtype)
        for name, value in inputs.items()
    }


def dropout_of(inputs, p, seed=11):
    """Dropout p for every adapter but the first, which has none."""
    slots = len(inputs["banks"][0].ranks)
    rates = torch.full((slots,), p, dtype=torch.float64)
    rates[:1] = 0
    seeds = torch.arange(slots) * 977 + seed
    return [BankDropout(rates, seeds + i) for i in range(len(inputs["banks"]))]


def run(inputs, slots=(), backend="auto", dropout=None, adds=False, dy=None):
    """y and the gradients of x (or of y's addend) and of the trained adapters."""
    inputs = dict(inputs)
    x = inputs["x"] = inputs["x"].detach().requires_grad_()
    trained = [example_trained(bank, slots) for bank in inputs["banks"]]
    with peft_kernels.backend(backend):
        if adds:
            base = F.linear(x.detach(), inputs["weight"], inputs.get("bias"))
            y = multi_lora_add_(
                base, x, inputs["banks"], inputs["ids"], dropout=dropout, trained=trained
            )
        else:
            y = multi_lora_linear(**inputs, dropout=dropout, trained=trained)
        if dy is None:
            generator = torch.Generator().manual_seed(5)
            dy = torch.randn(y.shape, generator=generator).to(y.dtype)
        receivers = [t for one in trained for t in (*one.a, *one.b)]
        grads = torch.autograd.grad(y, [x, *receivers], dy.to(y.dtype))
    return [y.detach(), *grads]


def check(inputs, backend="auto", **options):
    """Asserts that each result of ``backend`` is as good as the eager path's."""
    exact = run(cast(inputs, torch.float64), **options)
    eager = run(inputs, backend="reference", **options)
    out = run(inputs, backend=backend, **options)
    for i, results in enumerate(zip(out, eager, exact, strict=True)):
        assert_as_good_as(*results, f"result {i}")
    return out, exact


def test_backends_are_what_they_claim():
    assert peft_kernels.backend_of("multi_lora_linear", "cpu", torch.float32) == "cpu"
    assert peft_kernels.backend_of("multi_lora_linear", "cpu", torch.float64) == "reference"


def test_float64_matches_the_equation():
    inputs = cast(example_inputs(9, [5, 4], 7, [3, 0, 11]), torch.float64)
    expected = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    for row, slot in enumerate(inputs["ids"].tolist()):
        column = 0
        for bank in inputs["banks"]:
            n, rank = bank.b.shape[1], int(bank.ranks[slot]) if slot >= 0 else 0
            for q in range(rank):
                page_row = int(bank.table[slot, q // 8]) * 8 + q % 8
                s = bank.scales[slot] * (bank.a[page_row] @ inputs["x"][row])
                expected[row, column : column + n] += s * bank.b[page_row]
            column += n
    torch.testing.assert_close(multi_lora_linear(**inputs), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("adds", [False, True], ids=["linear", "add_"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, adds):
    inputs = example_inputs(37, [24, 40, 9], 50, [8, 3, 33, 0, 16], dtype=dtype)
    check(inputs, slots=[1, 2], adds=adds)
    check(inputs, slots=[1, 2, 4], dropout=dropout_of(inputs, 0.3), adds=adds)


# One row, few, several blocks of packed rows; ranks that fill no page, one, several; odd sizes.
@pytest.mark.builds
@given(
    m=st.sampled_from([0, 1, 2, 3, 7, 12, 13, 16, 17, 64, 133, 300]),
    n=st.sampled_from([[1], [7], [64], [65, 3], [129], [32, 8, 8]]),
    k=st.sampled_from([0, 1, 5, 8, 63, 64, 257]),
    ranks=st.lists(st.sampled_from([0, 1, 3, 8, 9, 16, 40, 130]), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    wide_adapter=st.booleans(),
    transposed=st.booleans(),
    drops=st.booleans(),
    popularity=st.sampled_from(["distinct", "uniform", "skewed", "identical", "none"]),
)
def test_native_on_any_shape(m, n, k, ranks, dtype, wide_adapter, transposed, drops, popularity):
    ids = example_ids(m, len(ranks), popularity)
    adapter_dtype = torch.float32 if wide_adapter else dtype
    inputs = example_inputs(m, n, k, ranks, ids=ids, dtype=dtype, adapter_dtype=adapter_dtype)
    if transposed:
        inputs["weight"] = inputs["weight"].T.contiguous().T
    dropout = dropout_of(inputs, 0.3, 2**40 + 3) if drops else None
    check(inputs, slots=[i for i, r in enumerate(ranks) if r][:2], dropout=dropout)


@pytest.mark.builds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 1), (4, 64, 72), (9, 37, 29), (70, 523, 40)])
def test_factors_on_any_shape(m, n, k, dtype):
    ranks, scales = (3, 8, 20), (2.0, 0.5, -1.5)
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).div(k**0.5).to(dtype)
    a = [torch.randn(r, k).div(k**0.5).to(dtype) for r in ranks]
    b = [torch.randn(n, r).div(r**0.5).to(dtype) for r in ranks]
    ids = torch.arange(m) % 4 - 1
    y = multi_lora_linear(x, weight, LoRAFactors(a, b, scales), ids)
    exact = x.double() @ weight.double().T
    for i, slot in enumerate(ids.tolist()):
        if slot >= 0:
            low = x[i].double() @ a[slot].double().T
            exact[i] += scales[slot] * (low @ b[slot].double().T)
    rtol = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=rtol)


def test_a_zero_gradient_would_fail():
    out, exact = check(example_inputs(20, 24, 30, [4, 9]), slots=[0, 1])
    for i in range(len(out)):
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.zeros_like(out[i]), out[i], exact[i], f"result {i}")


def test_gradcheck():
    inputs = cast(example_inputs(6, [4, 3], 5, [2, 9]), torch.float64)
    dropout = dropout_of(inputs, 0.3)
    trained = [example_trained(bank, [0, 1]) for bank in inputs["banks"]]
    leaves = [t for one in trained for t in (*one.a, *one.b)]

    def function(x, *tensors):
        given = iter(tensors)
        banks, receivers = [], []
        for bank, one in zip(inputs["banks"], trained, strict=True):
            a, b = [next(given) for _ in one.a], [next(given) for _ in one.b]
            banks.append(with_values(bank, [0, 1], a, b))
            receivers.append(Trained(one.rows, a, b))
        rest = {**inputs, "x": x, "banks": banks}
        return multi_lora_linear(**rest, dropout=dropout, trained=receivers)

    assert torch.autograd.gradcheck(function, (inputs["x"].requires_grad_(), *leaves))


def with_values(bank, slots, a, b):
    """The bank with new values for some adapters."""
    pages_a, pages_b = bank.a.clone(), bank.b.clone()
    for slot, own_a, own_b in zip(slots, a, b, strict=True):
        q = torch.arange(len(own_a))
        rows = bank.table[slot, q // 8].long() * 8 + q % 8
        pages_a[rows], pages_b[rows] = own_a.detach(), own_b.detach()
    return bank._replace(a=pages_a, b=pages_b)


@pytest.mark.parametrize("suffix", ["", "_ref"])
def test_opcheck(suffix):
    inputs = example_inputs(6, [4, 3], 5, [2, 9])
    columns = [list(field) for field in zip(*inputs["banks"], strict=True)]
    dropout = [list(field) for field in zip(*dropout_of(inputs, 0.2), strict=True)]
    trained = [example_trained(bank, [1]) for bank in inputs["banks"]]
    x, ids = inputs["x"], inputs["ids"]
    rest = (*columns, ids, None, None)

    def op(name):
        return getattr(torch.ops.peft_kernels, f"multi_lora_linear_{name}{suffix}").default

    fwd_args = (x, inputs["weight"], inputs["bias"], *rest, *dropout, "auto")
    torch.library.opcheck(op("fwd"), fwd_args)
    torch.library.opcheck(op("add"), (torch.randn(6, 7), x, *rest, *dropout, "auto"))
    _, s = op("fwd")(*fwd_args)
    rows = [one.rows for one in trained]
    for weight, grad_rows, sizes, needs_x in (
        (inputs["weight"], rows, [9, 9], True),
        (None, [], [], True),
        (inputs["weight"], rows, [9, 9], False),
    ):
        args = (torch.randn(6, 7), x, weight, *rest, s, *dropout, grad_rows, sizes, needs_x, "auto")
        torch.library.opcheck(op("bwd"), args)


# ---- a row and its neighbours ------------------------------------------------------------------


@pytest.mark.builds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_depend_on_nothing_but_the_row(dtype):
    """Alone, in any company, anywhere in a batch of any size: outputs and gradients of x."""
    inputs = example_inputs(150, [33, 40], 77, [8, 3, 40, 0], dtype=dtype)
    dy = torch.randn(150, 73)
    everything = run(inputs, dy=dy)[:2]
    for rows in (
        [17],
        [3, 140],
        list(range(20, 33)),
        list(range(150))[::-1],
        list(range(0, 150, 2)),
    ):
        part = {**inputs, "x": inputs["x"][rows], "ids": inputs["ids"][rows]}
        for whole, some in zip(everything, run(part, dy=dy[rows])[:2], strict=True):
            assert torch.equal(whole[rows], some), rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_adapter_has_the_bits_of_the_base_layer(backend, dtype):
    inputs = example_inputs(40, [30], 50, [8, 0, 16], dtype=dtype)
    with peft_kernels.backend(backend):
        y = multi_lora_linear(**inputs)
        base = multi_lora_linear(**{**inputs, "ids": torch.tensor([-1])})
        added = multi_lora_add_(base.clone(), inputs["x"], inputs["banks"], inputs["ids"])
    plain = (inputs["ids"] < 0) | (inputs["ids"] == 1)
    assert plain.any() and not plain.all()
    assert torch.equal(y[plain], base[plain])
    assert torch.equal(added[plain], base[plain])
    assert not torch.equal(y, base)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_adapter_harms_its_own_rows_alone(backend):
    inputs = example_inputs(40, [30], 50, [8, 4, 16])
    expected = run(inputs, slots=[0], backend=backend)
    bank = inputs["banks"][0]
    bank.a[bank.table[2, 0] * 8] = torch.nan
    bank.b[bank.table[2, 1] * 8] = torch.inf
    out = run(inputs, slots=[0], backend=backend)
    others = inputs["ids"] != 2
    assert out[0][~others].isnan().any()
    for i in (0, 1):
        assert torch.equal(out[i][others], expected[i][others])
    for i in (2, 3):
        assert torch.equal(out[i], expected[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_step_over_many_adapters_is_as_many_steps_over_one(backend, p):
    inputs = example_inputs(60, [20], 30, [8, 3, 0, 17])
    dy = torch.randn(60, 20)
    dropout = dropout_of(inputs, p) if p else None
    _, dx, *grads = run(inputs, [0, 1, 3], backend, dropout, dy=dy)
    for i, slot in enumerate([0, 1, 3]):
        rows = inputs["ids"] == slot
        own = {**inputs, "x": inputs["x"][rows], "ids": inputs["ids"][rows]}
        _, own_dx, own_a, own_b = run(own, [slot], backend, dropout, dy=dy[rows])
        together, alone = (dx[rows], grads[i], grads[3 + i]), (own_dx, own_a, own_b)
        for a, b in zip(together, alone, strict=True):
            if backend == "auto":
                assert torch.equal(a, b)
            torch.testing.assert_close(a, b)


def test_only_adapters_that_are_trained_get_gradients():
    inputs = example_inputs(30, [20], 30, [8, 3, 16])
    bank = inputs["banks"][0]
    trained = example_trained(bank, [1])
    before = [tensor.clone() for tensor in bank]
    multi_lora_linear(**inputs, trained=trained).sum().backward()
    assert trained.a[0].grad.abs().sum() > 0 and trained.b[0].grad.abs().sum() > 0
    assert inputs["x"].grad is None and inputs["weight"].grad is None and bank.a.grad is None
    for old, new in zip(before, bank, strict=True):
        assert torch.equal(old, new) or torch.equal(old.isnan(), new.isnan())


def test_a_trained_adapter_without_rows_gets_zeros():
    inputs = example_inputs(10, [20], 30, [8, 3], ids=torch.zeros(10, dtype=torch.int32))
    trained = example_trained(inputs["banks"][0], [1])
    multi_lora_linear(**inputs, trained=trained).sum().backward()
    assert torch.equal(trained.a[0].grad, torch.zeros(3, 30))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_every_repetition(backend):
    inputs = example_inputs(50, [24, 8], 40, [5, 12])
    dropout = dropout_of(inputs, 0.3)
    first = run(inputs, [0, 1], backend, dropout)
    assert all(
        torch.equal(a, b) for a, b in zip(first, run(inputs, [0, 1], backend, dropout), strict=True)
    )


def test_gradients_of_the_base_and_of_y():
    inputs = example_inputs(6, [5], 4, [2])
    inputs["weight"].requires_grad_(), inputs["bias"].requires_grad_()
    dy = torch.randn(6, 5)
    multi_lora_linear(**inputs).backward(dy)
    torch.testing.assert_close(inputs["weight"].grad, dy.T @ inputs["x"])
    torch.testing.assert_close(inputs["bias"].grad, dy.sum(0))
    y = torch.randn(2, 3, 5, requires_grad=True)
    added = multi_lora_add_(y * 2, inputs["x"].view(2, 3, 4), inputs["banks"], inputs["ids"])
    added.backward(dy.view(2, 3, 5))
    torch.testing.assert_close(y.grad, 2 * dy.view(2, 3, 5))


# ---- routing, shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_ids_serve_equal_parts(backend):
    inputs = example_inputs(24, [10], 16, [4, 8], ids=torch.tensor([1, -1, 0, 1]))
    x, ids = inputs["x"].view(4, 6, 16), inputs.pop("ids")
    expected = multi_lora_linear(**inputs, ids=ids.repeat_interleave(6))
    inputs["x"] = x
    with peft_kernels.backend(backend):
        for given in (ids, ids.int(), ids.repeat_interleave(6).view(4, 6), route(ids, 2)):
            torch.testing.assert_close(
                multi_lora_linear(**inputs, ids=given), expected.view(4, 6, 10)
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend):
    inputs = example_inputs(24, [10], 16, [4], ids=torch.tensor([0]))
    plain = multi_lora_linear(**inputs)
    x = inputs.pop("x")
    views = {
        "1-d": (x[3], plain[3]),
        "4-d": (x.view(2, 3, 4, 16), plain.view(2, 3, 4, 10)),
        "column-major": (x.T.contiguous().T, plain),
        "every other row": (x.repeat_interleave(2, 0)[::2], plain),
        "every other column": (x.repeat_interleave(2, 1)[:, ::2], plain),
        "expanded": (x[:1].expand(5, 16), plain[:1].expand(5, 10)),
        "empty": (x[:0], plain[:0]),
    }
    with peft_kernels.backend(backend):
        for name, (view, expected) in views.items():
            torch.testing.assert_close(multi_lora_linear(view, **inputs), expected, msg=name)


def test_sorting_by_adapter():
    from peft_kernels.ops.multi_lora_linear import sort_by_adapter

    order, starts = sort_by_adapter(torch.tensor([2, -1, 0, 2, 9, 0], dtype=torch.int32), 3)
    assert order.tolist() == [2, 5, 0, 3, 1, 4]
    assert starts.tolist() == [0, 2, 2, 4, 6]
    assert order.dtype is starts.dtype is torch.int32


# ---- under PyTorch's own machinery -------------------------------------------------------------


def test_compiles_without_a_break():
    inputs = example_inputs(6, [8], 10, [2, 3])
    inputs["x"].requires_grad_()
    trained = example_trained(inputs["banks"][0], [1])
    wanted = [inputs["x"], *trained.a, *trained.b]

    def loss(inputs):
        return multi_lora_linear(**inputs, trained=trained).square().sum()

    expected = torch.autograd.grad(loss(inputs), wanted)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(inputs), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_recomputes_the_same_bits():
    inputs = example_inputs(6, [8], 10, [2, 3])
    x = inputs.pop("x").requires_grad_()
    dropout = dropout_of(inputs, 0.5)

    def function(x):
        return multi_lora_linear(x, **inputs, dropout=dropout)

    expected = torch.autograd.grad(function(x).square().sum(), x)
    recomputed = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(recomputed.square().sum(), x)[0], expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    inputs = example_inputs(6, [8], 10, [2, 3])
    inputs["x"].requires_grad_()
    with peft_kernels.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        y = multi_lora_linear(**inputs)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    torch.testing.assert_close(y.float(), multi_lora_linear(**inputs), rtol=3e-2, atol=3e-2)


def test_saved_for_backward_is_rank_sized():
    inputs = example_inputs(64, [128], 96, [4, 8])
    inputs["x"].requires_grad_()
    known = {t.data_ptr() for t in (inputs["x"], inputs["weight"], *inputs["banks"][0])}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        multi_lora_linear(**inputs, dropout=dropout_of(inputs, 0.5))
    assert 64 * 8 * 4 <= sum(saved.values()) <= 64 * 8 * 4 + 64 * 4 + 64


# ---- bad input ---------------------------------------------------------------------------------


def bank(slots=2, **change):
    one = LoRABank(
        a=torch.ones(16, 6),
        b=torch.ones(16, 4),
        table=torch.zeros(slots, 1, dtype=torch.int32),
        ranks=torch.ones(slots, dtype=torch.int32),
        scales=torch.ones(slots),
    )
    return one._replace(**change)


IDS = torch.zeros(2, dtype=torch.int32)
NO_ROWS = torch.full((2,), -1, dtype=torch.int32)
BAD = [
    ({"x": torch.ones(2, 5)}, ValueError, r"x must be \[..., k\].*\(2, 5\)"),
    ({"x": torch.ones(2, 6).long()}, TypeError, "weight must have x's dtype"),
    ({"weight": torch.ones(4, 6).half()}, TypeError, "weight must have x's dtype.*float16"),
    ({"bias": torch.ones(5)}, ValueError, r"bias must be \[4\].*\(5,\)"),
    ({"banks": []}, ValueError, "banks must hold at least one"),
    ({"banks": bank(a=torch.ones(12, 6))}, ValueError, r"pages \* 8, k.*\(12, 6\)"),
    ({"banks": bank(a=torch.ones(16, 5))}, ValueError, "k = 6 columns; got 5"),
    ({"banks": bank(b=torch.ones(16, 3))}, ValueError, "add up to the 4 outputs; they are 3"),
    ({"banks": bank(b=torch.ones(16, 4).half())}, TypeError, "a and b must both be"),
    ({"banks": bank(a=torch.ones(6, 16).T)}, ValueError, "must be contiguous"),
    ({"banks": bank(table=torch.zeros(3, 1).int())}, ValueError, r"table must be.*\(3, 1\)"),
    ({"banks": bank(ranks=torch.ones(2))}, TypeError, "must be int32.*float32"),
    ({"banks": bank(scales=torch.ones(3))}, ValueError, r"must be \[2\].*\(3,\)"),
    ({"banks": bank(scales=torch.ones(2).double())}, TypeError, "scales must be float32"),
    ({"banks": bank(a=torch.ones(16, 6, requires_grad=True))}, ValueError, "`trained`"),
    ({"banks": bank(scales=torch.ones(2, requires_grad=True))}, ValueError, "scales receive no"),
    ({"banks": bank(ranks=torch.tensor([9, 9]).int())}, RuntimeError, "room for 8"),
    ({"banks": bank(table=torch.full((2, 1), 2).int())}, RuntimeError, "page 2.*there are 2"),
    ({"ids": torch.tensor([0, 2])}, ValueError, r"ids must be in \[-1, 2\); got 2"),
    ({"ids": torch.tensor([-2, 0])}, ValueError, r"ids must be in \[-1, 2\); got -2"),
    ({"ids": torch.tensor([0, 1, 0])}, ValueError, "x's 2 rows in equal parts; got 3 ids"),
    ({"ids": torch.tensor([])}, TypeError, "ids must be int32 or int64; got torch.float32"),
    ({"ids": IDS.to("meta")}, ValueError, "ids must be on x's device cpu; got meta"),
    ({"plan": "fast"}, ValueError, "plan must be one of.*'fast'"),
    ({"trained": [Trained(NO_ROWS, [], [])] * 2}, ValueError, "each of 1 banks; got 2"),
    ({"trained": Trained(NO_ROWS[:1], [], [])}, ValueError, r"trained.rows must be.*\[1\]"),
    (
        {"trained": Trained(NO_ROWS, [torch.ones(1, 5)], [torch.ones(1, 4)])},
        ValueError,
        "bank's 6 and 4 columns; got 5 and 4",
    ),
    ({"dropout": BankDropout(torch.zeros(2), IDS.long())}, TypeError, "p must be float64"),
    ({"dropout": BankDropout(torch.zeros(3).double(), IDS)}, ValueError, r"must be \[2\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    inputs = {"x": torch.ones(2, 6), "weight": torch.ones(4, 6), "banks": bank(), "ids": IDS}
    with pytest.raises(error, match=message):
        multi_lora_linear(**inputs | change)


def test_add_refuses_before_it_writes():
    x, y = torch.ones(2, 6), torch.ones(2, 4)
    for bad_y, ids, error in (
        (torch.ones(3, 4), IDS, ValueError),
        (torch.ones(4, 2).T, IDS, ValueError),
        (torch.ones(2, 4).half(), IDS, TypeError),
        (y, torch.tensor([0, 7]), ValueError),
    ):
        with pytest.raises(error):
            multi_lora_add_(bad_y, x, bank(), ids)
    assert torch.equal(y, torch.ones(2, 4))


def test_the_native_op_checks_ids_that_compiled_code_hands_it():
    inputs = example_inputs(3, [4], 5, [2])
    ids = torch.tensor([0, 5, 0], dtype=torch.int32)
    compiled = torch.compile(lambda ids: multi_lora_linear(**{**inputs, "ids": ids}))
    with pytest.raises(RuntimeError, match=r"ids must be in \[-1, 1\); got 5"):
        compiled(ids)
