"""The Triton plans of multi_lora_linear, in the interpreter: each against float64."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from errors import assert_as_good_as
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels
from peft_kernels.ops import multi_lora_add_, multi_lora_linear
from peft_kernels.ops.multi_lora_linear import (
    BankDropout,
    Routing,
    example_inputs,
    example_trained,
    plan_of,
    sort_by_adapter,
)
from peft_kernels.triton.common import chips, launch
from peft_kernels.triton.multi_lora_linear import calls
from peft_kernels.triton.multi_lora_linear import launch as launchers

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLANS = ["decode", "grouped", "single"]
RANKS = [8, 3, 33, 0, 1, 16]


def double(inputs):
    return {
        name: [b._replace(a=b.a.double(), b=b.b.double()) for b in value]
        if name == "banks"
        else value
        if name == "ids"
        else value.double()
        for name, value in inputs.items()
    }


def run(inputs, plan="auto", *, slots=(), backend="triton", dropout=None, adds=False):
    """y and the gradients of x and of the trained adapters."""
    inputs = dict(inputs)
    x = inputs["x"] = inputs["x"].detach().requires_grad_()
    trained = [example_trained(bank, slots) for bank in inputs["banks"]]
    options = {"dropout": dropout, "trained": trained, "plan": plan}
    with peft_kernels.backend(backend):
        if adds:
            base = (x.detach() @ inputs["weight"].T).contiguous()
            y = multi_lora_add_(base, x, inputs["banks"], inputs["ids"], **options)
        else:
            y = multi_lora_linear(**inputs, **options)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        receivers = [t for one in trained for t in (*one.a, *one.b)]
        return [y.detach(), *torch.autograd.grad(y, [x, *receivers], dy)]


def check(inputs, plan, **options):
    exact = run(double(inputs), backend="reference", **options)
    eager = run(inputs, backend="reference", **options)
    for i, out in enumerate(run(inputs, plan, **options)):
        assert_as_good_as(out, eager[i], exact[i], f"result {i}")


def dropout_of(inputs, p=0.3):
    slots = len(inputs["banks"][0].ranks)
    rates = torch.full((slots,), p, dtype=torch.float64)
    rates[0] = 0
    return [BankDropout(rates, torch.arange(slots) * 977 + i) for i in range(len(inputs["banks"]))]


@pytest.mark.parametrize("adds", [False, True], ids=["linear", "add_"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_against_float64(plan, dtype, adds):
    inputs = example_inputs(19, [24, 9], 21, RANKS, dtype=dtype)
    check(inputs, plan, slots=[1, 2], adds=adds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype):
    inputs = example_inputs(19, [24, 9], 21, RANKS, dtype=dtype, adapter_dtype=torch.float32)
    check(inputs, "auto", slots=[1, 2, 5], dropout=dropout_of(inputs))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("slices", [[70], [20, 11, 5]], ids=str)
def test_ids_of_parts_and_empty_batches(plan, slices):
    inputs = example_inputs(24, slices, 17, [4, 64], ids=torch.tensor([1, -1, 0, 1]))
    check(inputs, plan, slots=[1])
    empty = inputs | {"x": inputs["x"][:0], "ids": inputs["ids"][:0]}
    assert run(empty, plan, slots=[1])[0].shape == (0, sum(slices))


@pytest.mark.parametrize("plan", PLANS)
def test_a_row_is_the_same_in_any_company(plan):
    """To rounding: numpy's products, unlike a GPU's, round by the row's place in the tile."""
    inputs = example_inputs(20, [24], 33, RANKS)
    everything = run(inputs, plan)
    for rows in ([7], [3, 19], list(range(20))[::-1]):
        part = inputs | {"x": inputs["x"][rows], "ids": inputs["ids"][rows]}
        own = run(part, plan)[0]
        torch.testing.assert_close(everything[0][rows], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_rows_without_adapter_and_broken_adapters(plan):
    inputs = example_inputs(20, [24], 33, [8, 0, 16])
    y = run(inputs, plan)[0]
    base = run(inputs | {"ids": torch.tensor([-1])}, plan)[0]
    plain = (inputs["ids"] < 0) | (inputs["ids"] == 1)
    assert plain.any() and torch.equal(y[plain], base[plain])
    bank = inputs["banks"][0]
    bank.a[bank.table[2, 0] * 8], bank.b[bank.table[2, 1] * 8] = torch.nan, torch.inf
    others = inputs["ids"] != 2
    broken = run(inputs, plan)[0]
    assert broken[~others].isnan().any() and torch.equal(broken[others], y[others])


@pytest.mark.parametrize("plan", PLANS)
def test_same_bits_on_every_repetition(plan):
    inputs = example_inputs(19, [24], 21, RANKS)
    for a, b in zip(run(inputs, plan, slots=[0, 2]), run(inputs, plan, slots=[0, 2]), strict=True):
        assert torch.equal(a, b)


def launched(inputs, ids, plan):
    """y of the launcher itself, which no host looks at the ids for."""
    bank = [[field] for field in inputs["banks"][0]]
    order, starts = sort_by_adapter(ids, len(RANKS))
    return launchers.multi_lora_linear_fwd(
        inputs["x"], inputs["weight"], None, *bank, ids, order, starts, [], [], plan
    )[0]


@pytest.mark.parametrize("plan", PLANS)
def test_an_id_out_of_range_is_no_adapter(plan):
    inputs = example_inputs(12, [24], 21, RANKS)
    ids = inputs["ids"]
    wild = ids.clone()
    wild[:4] = torch.tensor([6, 2**30, -7, -(2**31)])
    tame = torch.where((wild < 0) | (wild >= len(RANKS)), -1, wild).int()
    assert torch.equal(launched(inputs, wild, plan), launched(inputs, tame, plan))


class _NoCopyToTheHost(TorchDispatchMode):
    """Fails where a value of a tensor would have to be waited for."""

    SYNCHRONISING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "bincount",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.SYNCHRONISING), name
        assert name != "_to_copy" or (kwargs or {}).get("device") is None, "a copy between devices"
        return func(*args, **(kwargs or {}))


@contextmanager
def kernels_run_freely(monkeypatch):
    """The mode rests while the interpreter plays the GPU, and reads tensors itself."""
    from triton.runtime import interpreter

    original = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            return original(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    yield


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_is_copied_to_the_host(plan, monkeypatch):
    inputs = example_inputs(12, [24], 21, RANKS)
    bank = [[field] for field in inputs["banks"][0]]
    trained = example_trained(inputs["banks"][0], [1])
    dropout = [list(field) for field in zip(*dropout_of(inputs), strict=True)]
    x, w, ids = inputs["x"], inputs["weight"], inputs["ids"]
    dy = torch.randn(12, 24)
    with kernels_run_freely(monkeypatch), _NoCopyToTheHost():
        order, starts = sort_by_adapter(ids, len(RANKS))
        y, s = launchers.multi_lora_linear_fwd(
            x, w, None, *bank, ids, order, starts, *dropout, plan
        )
        launchers.multi_lora_linear_fwd(x, w, None, *bank, ids, None, None, [], [], plan)
        launchers.multi_lora_linear_add(y, x, *bank, ids, order, starts, [], [], plan)
        launchers.multi_lora_linear_bwd(
            dy, x, w, *bank, ids, order, starts, s, *dropout, [trained.rows], [3], True, plan
        )


def test_the_mode_that_forbids_copies_would_notice_one():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoCopyToTheHost():
        torch.ones(2).sum().item()


def test_a_routing_made_once_serves_every_call():
    inputs = example_inputs(19, [24], 21, RANKS)
    expected = run(inputs, "grouped")[0]
    ids = inputs["ids"]
    inputs["ids"] = Routing(ids, *sort_by_adapter(ids, len(RANKS)))
    assert torch.equal(run(inputs, "grouped")[0], expected)


@pytest.mark.parametrize("adds", [False, True], ids=["linear", "add_"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_backend_launches_its_kernels(plan, adds):
    """The reference has the same results: that it isn't what ran shows here alone."""
    launched = []

    def run_and_note(kernel, *rest):
        launched.append(kernel.fn.__name__)
        launch_run(kernel, *rest)

    launch_run = launch.run
    with patch.object(launch, "run", run_and_note):
        run(example_inputs(19, [24, 9], 21, RANKS), plan, slots=[1, 2], adds=adds)
    grouped = ["multi_shrink_kernel", "multi_delta_kernel"]
    decode = ["decode_shrink_kernel", "decode_tile_kernel"]
    assert launched[:2] == (decode if plan == "decode" else grouped)
    # No backward decodes; dA and dB of two banks.
    assert launched[2:] == [*grouped, *["multi_grad_kernel"] * 4]


# ---- few rows, and slots without a gradient ------------------------------------------------------


@contextmanager
def noted_launches():
    """(kernel, grid, options) of each launch."""
    noted, launch_run = [], launch.run

    def run_and_note(kernel, grid, args, options):
        noted.append((kernel.fn.__name__, grid, options))
        launch_run(kernel, grid, args, options)

    with patch.object(launch, "run", run_and_note):
        yield noted


@pytest.mark.parametrize("m, has_base", [(16, True), (17, False)])
def test_more_rows_than_few_leave_the_base_to_the_library(m, has_base):
    inputs = example_inputs(m, [32], 16, RANKS, dtype=torch.bfloat16)
    with patch.object(chips, "arch_name", lambda device: "sm_90"), noted_launches() as noted:
        run(inputs, "decode")
    (options,) = [options for name, _, options in noted if name == "decode_tile_kernel"]
    assert options["HAS_BASE"] is has_base
    check(inputs, "decode")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_without_tensor_cores(plan, dtype):
    """In the tiles of a T4, x widened to float32."""
    inputs = example_inputs(70, [24, 70], 85, RANKS, dtype=dtype)
    with patch.object(chips, "arch_name", lambda device: chips.NO_TENSOR_CORES):
        check(inputs, plan, slots=[1, 2])


@pytest.mark.parametrize("slots", [[], [4], [1, 4, 38], [1, 2, 6, 10]])
def test_a_gradient_has_programs_for_the_slots_that_want_one(slots):
    ranks = [3, 1, 0, 2] * 10
    inputs = example_inputs(60, [24], 21, ranks, ids=torch.arange(60) % 40)
    check(inputs, "grouped", slots=slots)
    with noted_launches() as noted:
        run(inputs, "grouped", slots=slots)
    grids = [grid[0] for name, grid, _ in noted if name == "multi_grad_kernel"]
    assert set(grids) <= {sum(ranks[slot] for slot in slots)}


def test_the_parts_of_a_gradient_are_summed_for_listed_slots():
    inputs = example_inputs(70, [24], 21, [3, 1, 0, 2] * 10)
    inputs["ids"] = torch.full((70,), 7, dtype=torch.int32)
    with patch.object(calls, "GRAD_ROWS", 32), noted_launches() as noted:
        check(inputs, "grouped", slots=[7])
    assert "sum_parts_kernel" in {name for name, *_ in noted}


@pytest.mark.parametrize(
    "m, transposed, expected", [(8, False, True), (9, False, False), (8, True, False)]
)
def test_the_native_kernel_has_few_rows_and_a_weight_that_it_needn_t_copy(m, transposed, expected):
    inputs = example_inputs(m, [24], 24, RANKS)
    fields = [list(field) for field in zip(*inputs["banks"], strict=True)]
    call = calls.Call(inputs["x"], *fields, inputs["ids"], None, None, [], [], "auto")
    weight = inputs["weight"].T.contiguous().T if transposed else inputs["weight"]
    with patch.object(call, "has_native_decode", lambda device: True):
        assert call.is_one_launch(weight) is expected


@pytest.mark.parametrize(
    "ids, plan",
    [
        ([0, 1, 2, 3], "decode"),
        ([0, 0, 0, 0, 1, 1, 1, 1], "decode"),
        ([0] * 5, "auto"),
        ([-1] * 4, "auto"),
        ([], "auto"),
        (list(range(256)), "decode"),
        (list(range(257)), "auto"),
    ],
)
def test_the_plan_of_rows_goes_by_how_many_adapters_they_have(ids, plan):
    assert plan_of(ids) == plan
