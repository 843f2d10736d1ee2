"""An AdapterPool in a model that is split by tensor parallelism, before it is attached or after."""

from __future__ import annotations

from contextlib import nullcontext

import peft
import pytest
import torch
from parallel_models import (
    close,
    llama,
    logits,
    mesh,
    parallel,
    placed,
    steps,
    text,
    torch_parallel_llama,
    whole,
)
from processes import Cases, Wire, everywhere
from tiny_models import make_gpt2
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.parallel import parallelize_module

import peft_kernels
from peft_kernels import AdapterPool, load_adapter
from peft_kernels.integrations.parallel import ColwiseParallel, RowwiseParallel

CASES = Cases(2)
run = CASES.fixture()

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ROUTE = ["a", "b", None, "a"]

pytestmark = pytest.mark.filterwarnings("ignore:a pool's parameters are its own")


def attached(model: nn.Module, **options) -> AdapterPool:
    return AdapterPool.attach(model, TARGETS, capacity=32, max_rank=16, **options)


def create(pool: AdapterPool, dropout: float = 0.0, of: str = "down_proj") -> None:
    """Two adapters, by the generators of all processes, of which the first one's counts."""
    torch.manual_seed(1 + (torch.distributed.get_rank() if pool_is_split(pool) else 0))
    pool.create("a", r=4, alpha=8, dropout=dropout)
    pool.create("b", r=11, alpha=8, rank_pattern={of: 3}, dropout=dropout)
    generator = torch.Generator().manual_seed(2)
    for name in ("a", "b"):
        for key, parameter in pool.named_parameters(name):
            if key.endswith("lora_B"):
                values = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.data.copy_(placed(values, parameter))


def pool_is_split(pool: AdapterPool) -> bool:
    return any(isinstance(p, DTensor) for p in pool._model.parameters())


def in_one() -> tuple[nn.Module, AdapterPool]:
    model = llama()
    pool = attached(model)
    create(pool)
    return model, pool


def split_first() -> tuple[nn.Module, AdapterPool]:
    model = parallel(llama(), mesh())
    pool = attached(model)
    create(pool)
    return model, pool


def split_by_torch_s_styles() -> tuple[nn.Module, AdapterPool]:
    model = torch_parallel_llama()
    pool = attached(model)
    create(pool)
    return model, pool


def split_later() -> tuple[nn.Module, AdapterPool]:
    model = llama()
    pool = attached(model)
    parallel(model, mesh())
    create(pool)
    return model, pool


def split_after_create() -> tuple[nn.Module, AdapterPool]:
    model, pool = in_one()
    parallel(model, mesh())
    return model, pool


SPLIT = split_first, split_by_torch_s_styles, split_later, split_after_create


def parameters_of(pool: AdapterPool) -> dict:
    named = (one for name in ("a", "b") for one in pool.named_parameters(name))
    return {f"{p.shape[0]} {key}": whole(p).detach() for key, p in named}


def trained(model: nn.Module, pool: AdapterPool) -> tuple[torch.Tensor, dict]:
    parameters = pool.parameters("a") + pool.parameters("b")
    with pool.route(ROUTE):
        losses = steps(model, parameters)
    return losses, parameters_of(pool)


def routed(model: nn.Module, pool: AdapterPool) -> torch.Tensor:
    with pool.route(ROUTE):
        return logits(model)


@CASES.add
def adapters_train_as_in_one_process():
    expected = trained(*in_one())
    for make in SPLIT:
        model, pool = make()
        layer = model.model.layers[0].mlp.up_proj
        assert layer.pages_a.shape[1] == 16 and layer.pages_b.shape[1] == 12
        close(trained(model, pool), expected)
        assert pool.memory().used < in_one()[1].memory().used


@CASES.add
def files_go_from_any_number_of_processes_to_any():
    model, pool = in_one()
    expected, plain = routed(model, pool), CASES.folder / "plain"
    if torch.distributed.get_rank() == 0:
        for name in ("a", "b"):
            pool.save(name, plain / name)
    torch.distributed.barrier()
    for make in SPLIT:
        model, pool = make()
        torch.testing.assert_close(routed(model, pool), expected)
        saved = CASES.folder / make.__name__
        for name in ("a", "b"):
            pool.save(name, saved / name)
            pool.unload(name)
        torch.testing.assert_close(routed_by(model, pool, plain), expected)
        assert torch.equal(routed_by(model, pool, saved), routed_by(model, pool, plain))
        pool.detach()
        assert all(parameter.requires_grad for parameter in model.parameters())
        torch.testing.assert_close(logits(model), logits(llama()))


def routed_by(model, pool, folder) -> torch.Tensor:
    for name in ("a", "b"):
        pool.load(name, folder / name)
    output = routed(model, pool)
    for name in ("a", "b"):
        pool.unload(name)
    return output


@CASES.add
def parameters_stay_the_same_objects_when_an_adapter_is_replaced():
    model, pool = split_first()
    before = dict(pool.named_parameters("a"))
    pool.save("b", CASES.folder / "b")
    pool.save("a", CASES.folder / "a")
    expected = parameters_of(pool)
    for parameter in before.values():
        parameter.data.zero_()
    torch.distributed.barrier()
    pool.replace("a", CASES.folder / "a")
    assert all(parameter is before[key] for key, parameter in pool.named_parameters("a"))
    torch.testing.assert_close(parameters_of(pool), expected, rtol=0, atol=0)
    pool.unload("a")
    layer = model.model.layers[0].self_attn.q_proj
    layer.pages_a.zero_()
    assert all(parameter.to_local().any() for parameter in before.values())


@CASES.add
def processes_with_the_same_x_drop_the_same():
    found = []
    for split in (False, True):
        model = llama()
        pool = attached(parallel(model, mesh()) if split else model)
        create(pool, dropout=0.5)
        layer = model.train().model.layers[0].self_attn.q_proj
        x = torch.linspace(-1, 1, 4 * 3 * 16).reshape(4, 3, 16)
        torch.manual_seed(5 + split * torch.distributed.get_rank())
        with pool.route(ROUTE):
            y = layer(x).detach()
            assert not torch.allclose(layer(x).detach()[:2], y[:2])
        found.append(torch.cat(everywhere(y), -1) if split else y)
    torch.testing.assert_close(*found)


@CASES.add
def layers_whose_weights_are_stored_transposed():
    plan = {"transformer.h.*.mlp.c_fc": ColwiseParallel()}
    plan["transformer.h.*.mlp.c_proj"] = RowwiseParallel()
    found = []
    for split in (False, True):
        torch.manual_seed(0)
        model = make_gpt2().eval()
        pool = AdapterPool.attach(model, ["mlp.c_fc", "mlp.c_proj"], capacity=32, max_rank=16)
        if split:
            parallelize_module(model, mesh(), plan)
        create(pool, of="c_proj")
        found.append(trained(model, pool))
    close(*found)


@CASES.add
def what_is_computed_again_has_the_same_masks():
    gradients = []
    for again in (False, True):
        model = parallel(llama(), mesh()).train()
        pool = attached(model)
        create(pool, dropout=0.5)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        with pool.route(ROUTE):
            model(input_ids=text(), labels=text()).loss.backward()
        parameters = pool.parameters("a") + pool.parameters("b")
        gradients.append([whole(parameter.grad) for parameter in parameters])
    close(*gradients)


@CASES.add
def what_is_sent():
    """No more than without a pool, forward; backward a sum for each A or B that is whole."""

    def sent_by(model, route) -> list:
        with route:
            with Wire() as forward:
                loss = model(input_ids=text(), labels=text()).loss
            with Wire() as backward:
                loss.backward()
        return [forward.sent, backward.sent]

    bare = parallel(llama(), mesh())
    bare.requires_grad_(False)
    bare.get_input_embeddings().weight.requires_grad_()
    of_bare = sent_by(bare, nullcontext())
    model, pool = split_first()
    forward, backward = sent_by(model, pool.route(ROUTE))
    assert forward == of_bare[0]
    summed = [
        ("all_reduce", parameter.numel())
        for parameter in pool.parameters("a") + pool.parameters("b")
        if parameter.placements[0].is_replicate()
    ]
    own = list(backward)
    for one in summed:
        own.remove(one)
    for one in own:
        of_bare[1].remove(one)


@CASES.add
def what_is_refused():
    model = llama()
    pool = attached(model)
    for name in ("a", "b"):
        pool.load(name, CASES.folder / "plain" / name)
    torch_style = {"model.layers.0.self_attn.q_proj": torch_parallel.ColwiseParallel()}
    parallelize_module(model, mesh(), torch_style)
    with pytest.raises(TypeError, match=r"sharded by the styles of peft_kernels.integrations"):
        routed(model, pool)
    model, pool = split_first()
    with pytest.raises(RuntimeError, match=r"can't be moved or cast once the layer is sharded"):
        model.to(torch.bfloat16)
    model.to(torch.float32)
    for name in ("a", "b"):
        pool.unload(name)
    model.to(torch.bfloat16)


@CASES.tests
def test_parallel_pool(run, case):
    run(case)


def test_one_process_reads_what_two_wrote(run):
    run("files_go_from_any_number_of_processes_to_any")
    model, pool = llama(), None
    pool = attached(model)
    for name in ("a", "b"):
        pool.load(name, CASES.folder / "plain" / name)
    for name in ("a", "b"):
        with pool.route([name]):
            expected = logits(model)
        for make in SPLIT:
            folder = CASES.folder / make.__name__ / name
            torch.testing.assert_close(logits(load_adapter(llama(), folder)), expected)
            of_peft = peft.PeftModel.from_pretrained(llama(), folder)
            torch.testing.assert_close(logits(of_peft), expected)
            assert peft_kernels.accelerate(of_peft).counts() == {}
