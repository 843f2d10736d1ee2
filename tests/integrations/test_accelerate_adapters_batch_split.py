"""accelerate(): BatchSplit of bottleneck adapters, whose parts are views of the batch."""

import pytest

pytest.importorskip("adapters")

import torch
from adapters.composition import BatchSplit, Stack
from adapters_models import (
    KERNEL,
    assert_as_theirs,
    bottleneck,
    make_bert,
    make_gpt2,
    make_llama,
    with_adapters,
)
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels


class Calls(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))


CONFIGS = {
    "a": bottleneck(),
    "b": bottleneck(non_linearity="swish", scaling=2.0),
    "gated": bottleneck(use_gating=True),
    "normed": bottleneck(ln_after=True),
    "early": bottleneck(original_ln_after=False),
    "late": bottleneck(residual_before_ln=False),
}
SETUPS = {
    "two": BatchSplit("a", "b", batch_sizes=[1, 3]),
    "twice": BatchSplit("a", "b", "a", batch_sizes=[1, 2, 1]),
    "empty": BatchSplit("a", "b", batch_sizes=[4, 0]),
    "gated": BatchSplit("gated", "a", batch_sizes=[2, 2]),
    "normed": BatchSplit("a", "normed", batch_sizes=[2, 2]),
    "orders": BatchSplit("late", "a", "early", batch_sizes=[1, 1, 2]),
    "behind": Stack("a", BatchSplit("b", "gated", batch_sizes=[1, 3])),
    "nested": BatchSplit("a", Stack("a", "b"), batch_sizes=[1, 3]),
}


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_llama])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_parts_are_as_theirs(make, setup):
    model = with_adapters(make, **CONFIGS)
    model.set_active_adapters(setup)
    assert_as_theirs(model, {KERNEL})


@pytest.mark.parametrize("name", ["two", "gated"])
def test_parts_are_views_and_their_results_one_tensor(name):
    model = with_adapters(make_bert, torch.float32, **CONFIGS)
    model.set_active_adapters(SETUPS[name])
    peft_kernels.accelerate(model)
    layer = model.encoder.layer[0].output
    f, i = (torch.randn(4, 6, 16, requires_grad=True) for _ in range(2))
    with Calls() as forward:
        y = layer.bottleneck_layer_forward(f, i, layer.LayerNorm)
    with Calls() as backward:
        y.sum().backward()
    assert forward.names.count("adapter_fwd") == len(SETUPS[name])
    assert forward.names.count("cat") == 1
    assert not {"slice_backward", "index", "gather"} & {*forward.names, *backward.names}


def test_parts_in_the_wrong_number_are_an_error_of_theirs():
    model = with_adapters(make_bert, **CONFIGS)
    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[1, 2]))
    peft_kernels.accelerate(model)
    with pytest.raises(IndexError, match="batch_sizes"):
        model(torch.zeros(4, 6, dtype=torch.long))
