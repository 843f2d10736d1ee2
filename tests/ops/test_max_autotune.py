"""Every op in a graph of torch.compile(mode="max-autotune"), on the CPU: its values and gradients.

The products around an op are Inductor's own then, measured among templates and the library's.
"""

import pytest
import torch
import torch.nn.functional as F

from peft_kernels._library import OPS
from peft_kernels.tools.verify.cases import cases_of, leaves_of

# Most graphs take long to make.
CASES = [op if op == "lora_linear" else pytest.param(op, marks=pytest.mark.long) for op in OPS]


@pytest.mark.parametrize("op", CASES)
def test_a_step_is_as_in_eager_mode(op):
    torch.manual_seed(0)
    case = cases_of(op, torch.float32)[0]
    inputs, leaves = leaves_of(case, case.inputs)
    head = torch.randn(16, case.call(**inputs).shape[-1])

    def loss():
        return F.linear(case.call(**inputs), head).square().mean()

    compiled = torch.compile(loss, mode="max-autotune", fullgraph=True)
    expected = torch.autograd.grad(loss(), leaves, allow_unused=True)
    torch.testing.assert_close(compiled(), loss())
    found = torch.autograd.grad(compiled(), leaves, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
