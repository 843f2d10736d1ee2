"""fully_shard over QuantizedLinear: the codes are sharded too, and nothing of them is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from parallel_models import close, in_shards, mesh, step, whole
from processes import Cases
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peft_kernels
from peft_kernels.nn import QuantizedLinear

peft = pytest.importorskip("peft")
from gguf_files import make_model, write_gguf  # noqa: E402  peft may be missing

CASES = Cases(2)
run = CASES.fixture()
IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def of_a_file():
    rank = torch.distributed.get_rank()
    path = write_gguf(CASES.folder / f"model-{rank}.gguf", make_model(), "Q4_0")
    return peft_kernels.load_gguf(make_model(), path, mmap=False)


def of_nf4():
    return peft_kernels.quantize_linear(make_model())


def with_peft(model):
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(model, settings)
    peft_kernels.accelerate(tuned)
    return tuned


def with_ours(model):
    torch.manual_seed(1)
    peft_kernels.swap_linear(model, "all-linear", r=4, alpha=8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model


def check(model, tune):
    plain = tune(model)
    ours = in_shards(copy.deepcopy(plain))
    for found, expected in zip(step(ours, IDS), step(plain, IDS), strict=True):
        assert torch.equal(found, expected)
    found, expected = ours.state_dict(), plain.state_dict()
    codes = [name for name, value in expected.items() if value.dtype is torch.uint8]
    assert found.keys() == expected.keys() and codes
    for name, value in expected.items():
        assert torch.equal(whole(found[name]), value), name


@CASES.add
def a_file_under_peft():
    check(of_a_file(), with_peft)


@CASES.add
def a_file_under_swap_linear():
    check(of_a_file(), with_ours)


@CASES.add
def nested_scales_under_peft():
    check(of_nf4(), with_peft)


@CASES.add
def a_frozen_layer_between_others():
    torch.manual_seed(0)
    net = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(64, 32)), nn.Linear(32, 4))
    other = copy.deepcopy(net)
    fully_shard(other, mesh=mesh())
    x = torch.randn(5, 64)
    assert torch.equal(other(x), net(x))


@CASES.add
def distributed_data_parallel():
    plain = with_peft(of_nf4())
    ours = DistributedDataParallel(copy.deepcopy(plain))
    for found, expected in zip(step(ours, IDS), step(plain, IDS), strict=True):
        close(found, expected)


@CASES.tests
def test_sharded_layers_of_ours(run, case):
    run(case)
