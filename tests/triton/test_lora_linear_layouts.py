"""What is kept from one call of lora_linear or dora_linear never serves another."""

import torch
from hypothesis import example, given, settings
from turns import check_as_first_calls, each_alone, launches_on, turns

import peft_kernels
from peft_kernels.ops import dora_linear, lora_linear
from peft_kernels.triton.lora_linear import calls, plans

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CHOICES = {
    "m": [0, 1, 18, 600],
    "k": [16, 21, 4096],
    "n": [16, 300],
    "r": [3, 16, 70],
    "bias": [False, True],
    "gain": [False, True],
    "scale": [1.0, 0.5],
    "dropout": [0.0, 0.1, 0.5],
    "dtypes": [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)],
    "strided": [False, True],
    "trains": [False, True],
    "plan": ["i", "ii", "library", "i_terms"],
    "chip": ["sm_80", "sm_90", "gfx942", "other"],
    "precision": ["ieee", "tf32"],
}


def launched(call):
    m, k, n, r = call["m"], call["k"], call["n"], call["r"]
    dtype, adapter_dtype = call["dtypes"]
    x, weight = torch.zeros(m, k, dtype=dtype), torch.zeros(n, k, dtype=dtype)
    x = (x.T.contiguous().T if call["strided"] else x).requires_grad_(call["trains"])
    a, b = (torch.zeros(shape, dtype=adapter_dtype) for shape in ((r, k), (n, r)))
    factors = a.requires_grad_(call["trains"]), b.requires_grad_(call["trains"])
    options = {"scale": call["scale"], "dropout_p": call["dropout"], "seed": 7}
    options["bias"] = torch.zeros(n, dtype=dtype) if call["bias"] else None
    ones = torch.ones(n)
    chip, triton = launches_on(call["chip"], call["precision"]), peft_kernels.backend("triton")
    with chip as found, triton, plans.force(call["plan"]):
        if call["gain"]:
            y = dora_linear(x, weight, *factors, ones, norm=ones, **options)
        else:
            y = lora_linear(x, weight, *factors, **options)
        if call["trains"]:
            y.sum().backward()
    return found


@settings(max_examples=15)
@given(turns(CHOICES))
@example(each_alone(CHOICES, m=18, dtypes=(BF16, F32), trains=True))
@example(each_alone(CHOICES, m=18, dtypes=(BF16, F32), trains=True, dropout=0.1, plan="ii"))
def test_the_launches_are_those_of_a_first_call(calls_in_turn):
    check_as_first_calls(calls_in_turn, launched, calls._call.cache_clear)
