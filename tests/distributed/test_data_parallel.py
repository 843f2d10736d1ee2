"""Every method in DistributedDataParallel and fully_shard: ten steps as in one process."""

from __future__ import annotations

import pytest
import torch
from parallel_models import (
    STEPS,
    average_,
    bottleneck,
    check_equal,
    close,
    dora,
    dora_of_peft,
    in_shards,
    llama,
    lora,
    mine,
    of_peft,
    prefix,
    prompt,
    steps,
    text,
    trained,
)
from processes import Cases, Wire
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import peft_kernels
from peft_kernels import AdapterPool

CASES = Cases(2)
run = CASES.fixture()


METHODS = (lora, dora, of_peft, dora_of_peft, bottleneck, prefix, prompt)


def in_bfloat16(make) -> nn.Module:
    """The base; the adapters stay in float32."""
    model = make()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


# ---- steps ---------------------------------------------------------------------------------------


@CASES.add
def every_method_in_ddp_and_in_shards():
    for make in METHODS:
        expected = trained(make())
        check_equal(DistributedDataParallel(make()), expected)
        check_equal(in_shards(make()), expected)


@CASES.add
def float32_adapters_on_a_bfloat16_base():
    for make in (lora, of_peft):
        expected = trained(in_bfloat16(make))
        for wrap in (DistributedDataParallel, in_shards):
            check_equal(wrap(in_bfloat16(make)), expected, within=1e-5)  # rounded to 4e-3 inside


@CASES.add
def shards_that_stay_whole_or_lie_elsewhere():
    expected = trained(lora())
    check_equal(in_shards(lora(), reshard_after_forward=False), expected)
    check_equal(in_shards(lora(), offload_policy=CPUOffloadPolicy(pin_memory=False)), expected)


@CASES.add
def shards_that_are_cast_for_the_forward():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for make in METHODS:
        in_one = trained(make())[0]
        losses, parameters = trained(in_shards(make(), mp_policy=policy), mine())
        average_(losses)
        assert all(p.dtype is torch.float32 for p in parameters.values())
        torch.testing.assert_close(losses, in_one, rtol=1e-2, atol=0)


@CASES.add
def only_the_gradients_of_adapters_are_sent():
    model = in_shards(lora())
    loss = model(input_ids=text(), labels=text()).loss
    with Wire() as wire:
        loss.backward()
    kinds = {name for name, _ in wire.sent}
    assert kinds == {"allgather_base", "reduce_scatter_base"}, kinds
    sent = sum(count for name, count in wire.sent if name == "reduce_scatter_base")
    assert sent == sum(p.numel() for p in model.parameters() if p.requires_grad)


@CASES.add
def layers_of_peft_in_shards_run_on_kernels():
    model = in_shards(of_peft())
    report = peft_kernels.accelerate(model)
    trained(model, mine())
    assert all(layer.backend == "cpu" for layer in report.layers)
    assert report.counts() == {"lora_linear": len(report.layers) * STEPS}


def in_a_pool(wrap, rows=slice(None), averages=False) -> tuple[torch.Tensor, list]:
    model = llama()
    with pytest.warns(RuntimeWarning, match="Average the gradients"):
        pool = AdapterPool.attach(model, ["q_proj", "down_proj"], capacity=8)
        torch.manual_seed(1)
        pool.create("a", r=4, alpha=8)
    parameters = pool.parameters("a")
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)

    def average() -> None:
        if averages:
            average_(*(parameter.grad for parameter in parameters))

    model = wrap(model)
    with pool.route(["a"]):
        losses = steps(model, parameters, rows, average)
    return losses, [parameter.detach() for parameter in parameters]


@CASES.add
def a_pool_whose_gradients_are_averaged_by_hand():
    expected = in_a_pool(lambda model: model)
    for wrap in (lambda model: model, in_shards):
        losses, parameters = in_a_pool(wrap, mine(), averages=True)
        average_(losses)
        close((losses, parameters), expected)


@CASES.tests
def test_data_parallel(run, case):
    run(case)
