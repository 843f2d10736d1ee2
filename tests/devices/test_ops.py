"""Every op on the device of ``--device``, value and gradients, beside float64."""

import importlib

import pytest
import torch
from devices import Case, check
from torch import Tensor

import peft_kernels
from peft_kernels import _library, ops
from peft_kernels.ops._lora_banks import PLANS

lora, dora, multi, bottleneck, fusion, attention, lookup = (
    importlib.import_module(f"peft_kernels.ops.{name}")
    for name in (
        "lora_linear",
        "dora_linear",
        "multi_lora_linear",
        "adapter",
        "adapter_fusion",
        "prefix_attention",
        "prompt_lookup",
    )
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused(query_weight: Tensor, query_bias: Tensor, key_weight, value_weight, **inputs) -> Tensor:
    matrices = inputs.pop("up_weights"), inputs.pop("up_biases")
    absorbed = ops.absorb(*matrices, query_weight, query_bias, key_weight, value_weight)
    return ops.adapter_fusion(**inputs, absorbed=absorbed, activation="gelu")[0]


CASES = {
    "lora_linear": Case(
        lambda **a: ops.lora_linear(**a, scale=1.5, dropout_p=0.2, seed=7),
        lambda dtype: lora.example_inputs(33, 48, 40, 5, dtype=dtype),
        ("x", "weight", "lora_a", "lora_b", "bias"),
    ),
    "dora_linear": Case(
        lambda **a: ops.dora_linear(**a, scale=1.5, dropout_p=0.2, seed=7),
        lambda dtype: dora.example_inputs(33, 48, 40, 5, dtype=dtype),
        ("x", "weight", "lora_a", "lora_b", "magnitude", "bias"),
    ),
    "multi_lora_linear": Case(
        ops.multi_lora_linear,
        lambda dtype: multi.example_inputs(18, [24, 16], 40, [3, 8, 0, 11], dtype=dtype),
        ("x", "weight", "bias"),
    ),
    "adapter": Case(
        lambda **a: ops.adapter(**a, activation="gelu", scale=0.5, dropout_p=0.2, seed=7),
        lambda dtype: bottleneck.example_inputs(19, 40, 6, norm=True, pre_norm=True, dtype=dtype),
        ("x", "residual", "down_weight", "down_bias", "up_weight", "norm_weight"),
    ),
    "adapter_fusion": Case(
        fused,
        lambda dtype: fusion.example_inputs(19, 32, (3, 8), dtype=dtype),
        ("x", "down_weights", "up_weights", "query_weight"),
    ),
    "prefix_attention": Case(
        lambda **a: ops.prefix_attention(**a, is_causal=True),
        lambda dtype: attention.example_inputs(3, 17, 4, 2, 16, 5, prefixes=2, dtype=dtype),
        ("q", "k", "v", "prefix_k", "prefix_v"),
    ),
    "prompt_lookup": Case(
        lambda **a: ops.prompt_lookup(**a, position="after_bos").embeddings,
        lambda dtype: lookup.example_inputs(4, 7, 16, 3, 2, dtype=dtype),
        ("embeddings", "prompts"),
    ),
}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", _library.OPS)
def test_an_op(name, dtype, backend, device):
    with peft_kernels.backend(backend):
        assert peft_kernels.backend_of(name, device, dtype) != "reference"
    check(CASES[name], dtype, backend, device)


@pytest.mark.parametrize("plan", ["i", "ii", "library"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_of_lora_linear(plan, dtype, device):
    from peft_kernels.triton.lora_linear import plans

    with plans.force(plan):
        check(CASES["lora_linear"], dtype, "triton", device)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_of_multi_lora_linear(plan, dtype, device):
    case = CASES["multi_lora_linear"]
    planned = case._replace(call=lambda **a: ops.multi_lora_linear(**a, plan=plan))
    check(planned, dtype, "triton", device)
