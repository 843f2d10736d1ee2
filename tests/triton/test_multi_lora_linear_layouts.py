"""A layout kept from one call never serves another: launches, and values in the interpreter."""

import pytest
import torch
from errors import assert_as_good_as
from hypothesis import example, given, settings
from turns import check_as_first_calls, each_alone, launches_on, on, turns

import peft_kernels
from peft_kernels.ops import multi_lora_linear
from peft_kernels.ops.multi_lora_linear import BankDropout, example_inputs, example_trained
from peft_kernels.triton.multi_lora_linear import layouts

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Each by itself changes what a launch is, in some call.
CHOICES = {
    "m": [0, 1, 6, 18, 72],
    "widths": [(16,), (24,), (16, 16), (7, 9), (4, 4, 8, 4, 4)],
    "k": [16, 21, 1000],
    "ranks": [(8, 3), (0, 33), (1, 2, 40)],
    "dtypes": [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)],
    "id_of_all": [False, True],
    "strided": [False, True],
    "trains": [False, True],
    "dropout": [False, True],
    "plan": ["auto", "decode", "grouped", "single"],
    "chip": ["sm_80", "sm_90", "gfx942", "other"],
    "precision": ["ieee", "tf32"],
}


def arguments(call):
    torch.manual_seed(0)
    m, widths, ranks = call["m"], call["widths"], call["ranks"]
    dtype, adapter_dtype = call["dtypes"]
    ids = torch.tensor([1], dtype=torch.int32) if call["id_of_all"] else None
    inputs = example_inputs(
        m, widths, call["k"], ranks, ids=ids, dtype=dtype, adapter_dtype=adapter_dtype
    )
    if call["strided"]:
        inputs["x"] = inputs["x"].T.contiguous().T
        inputs["weight"] = inputs["weight"].T.contiguous().T
    if call["dropout"]:
        p, seeds = torch.full((len(ranks),), 0.25).double(), torch.arange(len(ranks))
        inputs["dropout"] = [BankDropout(p, seeds) for _ in widths]
    return inputs | {"plan": call["plan"]}


def run(inputs, trains, backend):
    """y and, where it trains, the gradients of x and of adapter 1."""
    inputs = dict(inputs)
    x = inputs["x"] = inputs["x"].detach().requires_grad_(trains)
    trained = [example_trained(bank, [1]) for bank in inputs["banks"]] if trains else None
    with peft_kernels.backend(backend):
        y = multi_lora_linear(**inputs, trained=trained)
        if not trains:
            return [y]
        receivers = [tensor for one in trained for tensor in (*one.a, *one.b)]
        return [y.detach(), *torch.autograd.grad(y, [x, *receivers], torch.ones_like(y))]


def launched(call):
    with launches_on(call["chip"], call["precision"]) as found:
        run(arguments(call), call["trains"], "triton")
    return found


@settings(max_examples=15)
@given(turns(CHOICES))
@example(each_alone(CHOICES, m=18, dtypes=(BF16, BF16), trains=True))
def test_the_launches_are_those_of_a_first_call(calls):
    check_as_first_calls(calls, launched, layouts._layout.cache_clear)


@pytest.mark.parametrize("chip", ["sm_90", "other"])
def test_the_values_of_calls_in_turn(chip):
    """Each differs from the one before in one thing."""
    call = {
        "m": 6, "widths": (16, 8), "k": 16, "ranks": (8, 3), "dtypes": (F32, F32),
        "id_of_all": False, "strided": False, "trains": True, "dropout": False, "plan": "grouped",
    }  # fmt: skip
    changes = [
        {"m": 9}, {"k": 21}, {"widths": (8, 16)}, {"widths": (24,)}, {"ranks": (8, 33)},
        {"dtypes": (F16, F32)}, {"dtypes": (F16, F16)}, {"strided": True}, {"plan": "single"},
        {"dropout": True}, {"dropout": False, "plan": "decode"}, {"id_of_all": True}, {"m": 6},
    ]  # fmt: skip
    for change in changes:
        call |= change
        inputs = arguments(call)
        exact = run(_double(inputs), True, "reference")
        eager = run(inputs, True, "reference")
        with on(chip):
            found = run(inputs, True, "triton")
        for i, out in enumerate(found):
            assert_as_good_as(out, eager[i], exact[i], f"result {i} after {change}")


def _double(inputs):
    found = dict(inputs)
    found["banks"] = [b._replace(a=b.a.double(), b=b.b.double()) for b in inputs["banks"]]
    return found | {name: inputs[name].double() for name in ("x", "weight", "bias")}
