"""Adapters that come into a model of fully_shard's: trained and served as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from parallel_models import (
    average_,
    check_equal,
    close,
    in_shards,
    llama,
    logits,
    lora,
    mesh,
    mine,
    parallel,
    randomised,
    sharded,
    steps,
    text,
    trained,
    whole,
)
from processes import Cases, Wire, everywhere
from tiny_models import make_gpt2
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from peft_kernels import (
    AdapterPool,
    load_adapter,
    merge,
    save_adapter,
    swap_linear,
    unload,
    unmerge,
)
from peft_kernels.nn import LoRALinear

CASES = Cases(2)
run = CASES.fixture()

OPTIONS = (
    {},
    {"reshard_after_forward": False},
    {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
)


def swapped(model: nn.Module, **options) -> nn.Module:
    torch.manual_seed(5)
    return randomised(swap_linear(model, "all-linear", 4, alpha=8, **options))


# ---- trained -------------------------------------------------------------------------------------


@CASES.add
def layers_are_swapped_before_a_forward_and_after():
    expected = trained(swapped(llama()))
    for options in OPTIONS:
        model = in_shards(llama(), **options)
        for _ in range(2):
            check_equal(swapped(model), expected)
            close(logits(unload(model, merge=False)), logits(llama()))
        assert not any("lora" in name for name, _ in model.named_parameters())


@CASES.add
def dora_is_swapped_in():
    check_equal(
        swapped(in_shards(llama()), use_dora=True), trained(swapped(llama(), use_dora=True))
    )


@CASES.add
def adapters_lie_as_those_that_were_sharded():
    late, early = swapped(in_shards(llama())), in_shards(swapped(llama()))
    for one, other in zip(late.parameters(), early.parameters(), strict=True):
        assert one.placements == other.placements == (Shard(0),)
        assert torch.equal(one.to_local(), other.to_local())
        assert one.requires_grad == other.requires_grad


@CASES.add
def processes_that_draw_otherwise_have_the_adapter_of_the_first():
    model = in_shards(llama())
    torch.manual_seed(dist.get_rank())
    swap_linear(model, ["q_proj"], 3, alpha=6)
    layer = model.model.layers[0].self_attn.q_proj
    first, second = everywhere(whole(layer.lora_a).detach())
    assert torch.equal(first, second) and first.any()


@CASES.add
def gradients_are_those_of_one_process():
    def gradients(model: nn.Module, parts: list[slice]) -> dict:
        for rows in parts:
            model(input_ids=text(rows), labels=text(rows)).loss.backward()
        return {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}

    expected = gradients(swapped(llama()), [slice(0, 2), slice(2, 4)])
    model = swapped(in_shards(llama()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    half = slice(dist.get_rank(), None, 2)
    found = gradients(model, [slice(i + half.start, i + half.start + 1) for i in (0, 2)])
    close(found, expected)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    close(whole(norm), torch.stack([g.norm() for g in expected.values()]).norm())


@CASES.add
def what_is_sent_is_the_adapters():
    model = swapped(in_shards(llama()))
    ours = [p.numel() for p in model.parameters() if p.requires_grad]
    with Wire() as forward:
        loss = model(input_ids=text(), labels=text()).loss
    with Wire() as backward:
        loss.backward()
    gathered = [count for name, count in forward.sent if name == "all_gather_into_tensor"]
    assert sorted(gathered) == sorted(count // CASES.processes for count in ours)
    assert len(gathered) == 2 * 14
    summed = [count for name, count in backward.sent if name.startswith("reduce_scatter")]
    assert sorted(summed) == sorted(ours)
    assert not any(name == "all_gather_into_tensor" for name, _ in backward.sent)


@CASES.add
def float32_adapters_where_the_base_is_cast():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    losses, parameters = trained(swapped(in_shards(llama(), mp_policy=policy)), mine())
    average_(losses)
    assert all(p.dtype is torch.float32 for p in parameters.values())
    torch.testing.assert_close(losses, trained(swapped(llama()))[0], rtol=1e-2, atol=0)


@CASES.add
def uneven_shards_of_other_layers():
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))

    def step(model: nn.Module, x) -> list:
        model(x).square().mean().backward()
        return [whole(p.grad) for p in model.parameters() if p.requires_grad]

    x = torch.arange(24.0).view(4, 6) / 10
    found = []
    for wrap, rows in ((lambda m: m, slice(None)), (lambda m: fully_shard(m, mesh=mesh()), mine())):
        torch.manual_seed(5)
        model = randomised(swap_linear(wrap(make()), ["0", "2"], 3, alpha=6))
        found.append(step(model, x[rows]))
    close(*found)
    one, other = make_gpt2().eval(), make_gpt2().eval()
    other.load_state_dict(one.state_dict())
    other = fully_shard(other, mesh=mesh())
    for model in (one, other):
        torch.manual_seed(5)
        randomised(swap_linear(model, ["c_fc", "c_attn"], 4, alpha=8))
    close(logits(other), logits(one))


@CASES.add
def a_head_that_is_tied_to_the_embeddings():
    def make() -> nn.Module:
        model = llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    found = []
    for wrap in (lambda m: m, lambda m: fully_shard(m, mesh=mesh())):
        torch.manual_seed(5)
        found.append(randomised(swap_linear(wrap(make()), ["lm_head"], 4, alpha=8)))
    one, other = found
    check_equal(other, trained(one))
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to that of model\.embed_tokens"):
        merge(other)


# ---- merged and kept -----------------------------------------------------------------------------


@CASES.add
def late_adapters_are_merged_and_unloaded():
    for options in OPTIONS:
        model = swapped(in_shards(llama(), **options))
        expected = logits(model)
        merge(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
        unmerge(model)
        close(logits(model), expected)
        unload(model, merge=True)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert dist.get_rank() != 0 or state.keys() == llama().state_dict().keys()


@CASES.add
def folders_are_loaded_and_written():
    plain = lora()
    if dist.get_rank() == 0:
        save_adapter(plain, CASES.folder / "plain")
    dist.barrier()
    model = load_adapter(in_shards(llama()), CASES.folder / "plain")
    assert isinstance(model.model.layers[0].mlp.up_proj, LoRALinear)
    close(logits(model), logits(plain))
    save_adapter(model, CASES.folder / "late")
    load_adapter(model, CASES.folder / "late")
    close(logits(load_adapter(llama(), CASES.folder / "late")), logits(plain))


@CASES.add
def a_model_that_starts_on_the_meta_device():
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))

    torch.manual_seed(1)
    whole_model = plain()
    options = StateDictOptions(full_state_dict=True, strict=False)
    for swaps_first in (True, False):
        with torch.device("meta"):
            model = plain()
        fully_shard(model, mesh=mesh())
        if swaps_first:
            swap_linear(model, ["0", "2"], 3, alpha=6)
        model.to_empty(device="cpu")
        set_model_state_dict(model, whole_model.state_dict(), options=options)
        if swaps_first:
            for layer in (model[0], model[2]):
                layer.reset_adapter()
        else:
            swap_linear(model, ["0", "2"], 3, alpha=6)
        x = torch.ones(2, 6)
        close(model(x), whole_model(x))
        model(x).sum().backward()
        assert whole(model[0].lora_b.grad).any() and model[0].scale == 2.0


@CASES.add
def a_trained_head_comes_with_the_folder():
    def classifier() -> nn.Module:
        torch.manual_seed(4)
        config = llama().config
        config.pad_token_id, config.num_labels = 0, 3
        return transformers.LlamaForSequenceClassification(config).eval()

    plain = classifier()
    plain.score.requires_grad_(False)
    swap_linear(plain, ["q_proj"], 4, alpha=8, task_type="SEQ_CLS")
    plain.score.requires_grad_(True)
    nn.init.ones_(plain.score.weight)
    if dist.get_rank() == 0:
        save_adapter(plain, CASES.folder / "head")
    dist.barrier()
    for warm in (False, True):
        model = in_shards(classifier().requires_grad_(False))
        if warm:
            logits(model)
        load_adapter(model, CASES.folder / "head")
        close(logits(model), logits(plain))
        found = []
        for one, rows in ((plain, slice(None)), (model, mine())):
            one(text(rows)).logits.square().mean().backward()
            found.append(whole(one.score.weight.grad))
        plain.zero_grad()
        close(*found)
        save_adapter(model, CASES.folder / "head.again")
        again = load_adapter(classifier().requires_grad_(False), CASES.folder / "head.again")
        close(logits(again), logits(plain))


@CASES.add
def checkpoints_are_read_by_any_number_of_processes():
    model = swapped(in_shards(llama()))
    dcp.save(get_model_state_dict(model), checkpoint_id=CASES.folder / "dcp")
    other = swapped(llama())
    for parameter in other.parameters():
        parameter.data.zero_()
    state = other.state_dict()
    dcp.load(state, checkpoint_id=CASES.folder / "dcp")
    close(logits(other), logits(model))
    again = in_shards(swapped(llama()))
    state = model.state_dict()
    again.load_state_dict({name: 2 * shard for name, shard in state.items()})
    model.load_state_dict(again.state_dict())
    close(logits(model), logits(again))


# ---- pools ---------------------------------------------------------------------------------------


@CASES.add
def a_pool_is_attached_trained_and_detached():
    def in_a_pool(model, rows=slice(None), averages=False):
        logits(model)
        pool = AdapterPool.attach(model, ["q_proj", "down_proj"], capacity=8)
        torch.manual_seed(1)
        pool.create("a", r=4, alpha=8)
        parameters = pool.parameters("a")
        for parameter in parameters:
            nn.init.normal_(parameter, std=0.1)

        def average() -> None:
            if averages:
                average_(*(parameter.grad for parameter in parameters))

        with pool.route(["a"]):
            losses = steps(model, parameters, rows, average)
            served = logits(model)
        close(logits(model), logits(llama()))
        values = [parameter.detach().clone() for parameter in parameters]
        pool.detach()
        for _ in range(2):
            close(logits(model), logits(llama()))
        return losses, values, served

    expected = in_a_pool(llama())
    for options in OPTIONS:
        losses, *found = in_a_pool(in_shards(llama(), **options), mine(), averages=True)
        average_(losses)
        close((losses, *found), expected)


# ---- what is refused -----------------------------------------------------------------------------


@CASES.add
def what_fully_shard_itself_calls_or_has_gathered():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    fully_shard(model[0], mesh=mesh())
    fully_shard(model, mesh=mesh())
    with pytest.raises(TypeError, match=r"^0 is what fully_shard was called on.*what is around it"):
        swap_linear(model, ["0", "2"], 2, alpha=4)
    model(torch.ones(1, 4))
    with pytest.raises(TypeError, match=r"as fully_shard has gathered it .*call reshard\(\)"):
        LoRALinear.from_linear(model[2], 2, alpha=4)
    model.reshard()
    assert not LoRALinear.from_linear(model[2], 2, alpha=4).merged


@CASES.add
def a_pool_over_shards_of_tensor_parallelism():
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = sharded(parallel(llama(), both["tensor"]), both["data"])
    expected = logits(model)
    with pytest.raises(
        TypeError, match=r"q_proj: .*over tensor parallelism: attach the pool before"
    ):
        AdapterPool.attach(model, ["q_proj"], capacity=8)
    close(logits(model), expected)
    swapped(model)
    close(whole(logits(model)), logits(swapped(llama())))


@CASES.tests
def test_late_adapters(run, case):
    run(case)
