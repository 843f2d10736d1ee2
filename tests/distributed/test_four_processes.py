"""Four processes: shards of shards, folders that one process reads, checkpoints in shards."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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
    logits,
    lora,
    of_peft,
    parallel,
    prefix,
    prompt,
    sharded,
    steps,
    trained,
    whole,
)
from processes import Cases
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

import peft_kernels
from peft_kernels import (
    AdapterPool,
    load_adapter,
    merge,
    save_adapter,
    swap_linear,
    unload,
    unmerge,
)

CASES = Cases(4)
run = CASES.fixture()

pytestmark = pytest.mark.filterwarnings("ignore:a pool's parameters are its own")


def mesh():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def in_both(model: nn.Module) -> nn.Module:
    """Tensor parallelism over pairs, and fully_shard over two of them."""
    both = mesh()
    return sharded(parallel(model, both["tensor"]), both["data"])


def in_copies(model: nn.Module) -> nn.Module:
    """Two copies, each in two shards."""
    return sharded(model, mesh())


@CASES.add
def shards_of_shards_train_as_one_process():
    for make in (lora, dora, bottleneck, prefix, prompt):
        check_equal(in_both(make()), trained(make()), mesh()["data"].get_group())
    for make, kernel in ((of_peft, "lora_linear"), (dora_of_peft, "dora_linear")):
        model = in_both(make())
        report = peft_kernels.accelerate(model)
        check_equal(model, trained(make()), mesh()["data"].get_group())
        assert report.counts() == {kernel: len(report.layers) * STEPS}


@CASES.add
def a_pool_in_shards_of_shards_trains_as_in_one_process():
    def in_a_pool(wrap, rows=slice(None), average=None) -> tuple[torch.Tensor, list]:
        model = llama()
        pool = AdapterPool.attach(model, ["q_proj", "down_proj"], capacity=8)
        model = wrap(model)
        torch.manual_seed(1)
        pool.create("a", r=4, alpha=8)
        parameters = pool.parameters("a")

        def after_backward() -> None:
            if average is not None:
                average(*(parameter.grad.to_local() for parameter in parameters))

        with pool.route(["a"]):
            losses = steps(model, parameters, rows, after_backward)
        return losses, [whole(parameter).detach() for parameter in parameters]

    group = mesh()["data"].get_group()
    expected = in_a_pool(lambda model: model)
    rows = slice(dist.get_rank(group), None, 2)
    losses, parameters = in_a_pool(in_both, rows, partial(average_, group=group))
    average_(losses, group=group)
    close((losses, parameters), expected)


@CASES.add
def four_shards_train_as_one_process():
    check_equal(in_shards(lora()), trained(lora()), None)


@CASES.add
def four_shards_are_merged_and_unloaded():
    for make in (lora, dora):
        plain = make()
        adapted = logits(plain)
        merge(plain)
        expected = logits(plain)
        for wrap in (in_both, in_shards, in_copies):
            model = wrap(make())
            before = [whole(p).clone() for p in model.parameters()]
            merge(model)
            close(logits(model), expected)
            unmerge(model)
            after = list(model.parameters())
            assert all(torch.equal(whole(a), b) for a, b in zip(after, before, strict=True))
            close(logits(model), adapted)
            unload(model, merge=True)
            close(logits(model), expected)


@CASES.add
def adapters_that_come_into_four_shards():
    def swapped(model: nn.Module) -> nn.Module:
        torch.manual_seed(5)
        return swap_linear(model, "all-linear", 3, alpha=6, use_dora=True)

    expected = trained(swapped(llama()))
    for wrap, group in ((in_both, mesh()["data"].get_group()), (in_copies, None)):
        model = swapped(wrap(llama()))
        check_equal(model, expected, group)
        adapted = logits(model)
        merge(model)
        torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-6)
        unmerge(model)
        save_adapter(model, CASES.folder / f"{wrap.__name__}.late")
        again = load_adapter(wrap(llama()), CASES.folder / f"{wrap.__name__}.late")
        close(logits(again), adapted)


@CASES.add
def four_shards_are_written():
    for wrap in (in_both, in_shards):
        save_adapter(wrap(dora()), CASES.folder / f"{wrap.__name__}.dora")
        model = wrap(lora())
        save_adapter(model, CASES.folder / wrap.__name__)
        dcp.save(get_model_state_dict(model), checkpoint_id=CASES.folder / f"{wrap.__name__}.dcp")


@CASES.add
def four_shards_of_peft_are_written():
    for wrap in (in_both, in_shards):
        model = wrap(of_peft())
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=whole)
        if dist.get_rank() == 0:
            model.save_pretrained(CASES.folder / f"{wrap.__name__}.peft", state_dict=state)


@CASES.add
def a_checkpoint_is_read_in_other_shards():
    expected = logits(lora())
    for written, wrap in (("in_both", in_shards), ("in_shards", in_both)):
        model = wrap(zeroed(lora()))
        assert not torch.allclose(logits(model), expected)
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=CASES.folder / f"{written}.dcp")
        set_model_state_dict(model, state)
        torch.testing.assert_close(logits(model), expected)


def zeroed(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    for module in model.modules():
        if hasattr(module, "scale"):
            module.scale = 7.0
    return model


@CASES.tests
def test_four_processes(run, case):
    run(case)


@pytest.mark.parametrize("wrap", ["in_both", "in_shards"])
def test_one_process_reads_what_four_wrote(run, wrap):
    run("four_shards_are_written")
    for make, name in ((dora, f"{wrap}.dora"), (lora, wrap)):
        folder, expected = CASES.folder / name, logits(make())
        torch.testing.assert_close(logits(load_adapter(llama(), folder)), expected)
        of_peft = peft.PeftModel.from_pretrained(llama(), folder)
        torch.testing.assert_close(logits(of_peft), expected)
    model = zeroed(lora())
    state = model.state_dict()
    dcp.load(state, checkpoint_id=CASES.folder / f"{wrap}.dcp", no_dist=True)
    model.load_state_dict(state)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("wrap", ["in_both", "in_shards"])
def test_one_process_reads_what_four_wrote_of_peft(run, wrap):
    run("four_shards_of_peft_are_written")
    expected, folder = logits(of_peft()), CASES.folder / f"{wrap}.peft"
    torch.testing.assert_close(logits(load_adapter(llama(), folder)), expected)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(llama(), folder)), expected)
