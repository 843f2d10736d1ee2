"""A layout kept from one call of adapter_fusion never serves another."""

import torch
from hypothesis import example, given, settings
from turns import check_as_first_calls, each_alone, launches_on, turns

import peft_kernels
from peft_kernels.ops.adapter_fusion import Absorbed, adapter_fusion
from peft_kernels.triton.adapter_fusion import layouts

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CHOICES = {
    "m": [0, 1, 18, 600, 3000],
    "k": [16, 21, 200],
    "n": [16, 300],
    "own_query": [False, True],
    "residual": [False, True],
    "sizes": [(3,), (4, 4), (1, 7, 16, 2), (70, 5)],
    "dtypes": [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)],
    "activation": ["relu", "gelu"],
    "strided": [False, True],
    "trains": [False, True],
    "chip": ["sm_80", "sm_90", "gfx942", "other"],
    "precision": ["ieee", "tf32"],
}


def launched(call):
    m, k, n, sizes = call["m"], call["k"], call["n"], call["sizes"]
    dtype, adapter_dtype = call["dtypes"]
    ranks, adapters = sum(sizes), len(sizes)
    x = torch.zeros(m, k, dtype=dtype)
    x = (x.T.contiguous().T if call["strided"] else x).requires_grad_(call["trains"])
    d = 24 if call["own_query"] else k

    def parameter(*shape):
        return torch.zeros(shape, dtype=adapter_dtype, requires_grad=call["trains"])

    absorbed = Absorbed(
        parameter(ranks + adapters, d),
        parameter(ranks + adapters),
        parameter(n, ranks),
        parameter(adapters, n),
    )
    with launches_on(call["chip"], call["precision"]) as found, peft_kernels.backend("triton"):
        y, _ = adapter_fusion(
            x,
            [parameter(size, k) for size in sizes],
            [parameter(size) for size in sizes],
            absorbed,
            query=torch.zeros(m, d, dtype=dtype) if call["own_query"] else None,
            activation=call["activation"],
            residual=torch.zeros(m, n, dtype=dtype) if call["residual"] else None,
        )
        if call["trains"]:
            y.sum().backward()
    return found


@settings(max_examples=15)
@given(turns(CHOICES))
@example(each_alone(CHOICES, m=18, dtypes=(BF16, BF16), trains=True))
def test_the_launches_are_those_of_a_first_call(calls):
    check_as_first_calls(calls, launched, layouts._layout.cache_clear)
