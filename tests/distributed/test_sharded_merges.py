"""A model of fully_shard's is merged, unmerged and unloaded as one process does it."""

from __future__ import annotations

import pytest
import torch
from parallel_models import close, dora, in_shards, llama, logits, lora, mesh, whole
from processes import Cases
from tiny_models import make_gpt2
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import peft_kernels
from peft_kernels import (
    AdapterPool,
    merge,
    swap_linear,
    unload,
    unmerge,
)
from peft_kernels.nn import LoRALinear

CASES = Cases(2)
run = CASES.fixture()

pytestmark = pytest.mark.filterwarnings("ignore:the state dict of a model with merged")
WAYS = (
    {},
    {"reshard_after_forward": False},
    {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
)


def values(model: nn.Module) -> dict:
    return {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def merged(make) -> nn.Module:
    model = make()
    merge(model)
    return model


@CASES.add
def merged_and_unmerged():
    for make in (lora, dora):
        expected, adapted = logits(merged(make)), logits(make())
        for options in WAYS:
            model = in_shards(make(), **options)
            before = values(model)
            close(logits(model), adapted)  # the root stays whole after it
            merge(model)
            weight = model.model.layers[0].mlp.up_proj.weight
            assert weight.placements == (Shard(0),) and not weight.requires_grad
            for _ in range(2):
                close(logits(model), expected)
            with peft_kernels.disabled(model):
                close(logits(model), logits(llama()))
            unmerge(model)
            torch.testing.assert_close(values(model), before, rtol=0, atol=0)
            close(logits(model), adapted)


@CASES.add
def the_weights_are_those_of_one_process():
    weights = values(merged(lora))
    model = in_shards(lora())
    merge(model)
    close(values(model), weights)


@CASES.add
def uneven_shards_of_a_bfloat16_base():
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16()
        swap_linear(model, ["0", "2"], 3, alpha=6)
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.lora_b, std=0.3)
        return model

    plain = make()
    merge(plain)
    model = fully_shard(make(), mesh=mesh())
    merge(model)
    for index in (0, 2):
        assert torch.equal(whole(model[index].weight), plain[index].weight)
    x = torch.ones(2, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)


@CASES.add
def a_conv1d_of_which_the_inputs_are_split():
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = swap_linear(make_gpt2().eval(), ["c_fc", "c_attn"], 4, alpha=8)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(parameter, std=0.1)
        return model

    model = fully_shard(make(), mesh=mesh())
    merge(model)
    close(logits(model), logits(merged(make)))


@CASES.add
def what_is_cast_for_the_forward():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = in_shards(lora(), mp_policy=policy)
    merge(model)
    expected = values(merged(lora))
    close(values(model), expected)
    torch.testing.assert_close(logits(model), logits(merged(lora).bfloat16()), rtol=0, atol=5e-2)


@CASES.add
def the_state_dict_of_a_merged_model_is_the_base():
    model = in_shards(lora())
    options = StateDictOptions(full_state_dict=True)
    before = get_model_state_dict(model, options=options)
    merge(model)
    with pytest.warns(UserWarning, match="holds their base weights"):
        torch.testing.assert_close(get_model_state_dict(model, options=options), before)
    shards = model.state_dict()
    model.load_state_dict(
        {name: shard * 2 for name, shard in shards.items() if "extra" not in name}, strict=False
    )
    layer = model.model.layers[0].mlp.up_proj
    assert layer.merged
    up = "model.layers.0.mlp.up_proj"
    a, b = (2 * before[f"{up}.lora_{one}"] for one in "ab")
    close(whole(layer.weight), 2 * before[f"{up}.weight"] + layer.scale * b @ a)
    unmerge(model)
    assert torch.equal(whole(layer.weight), 2 * before[f"{up}.weight"])


@CASES.add
def a_merged_model_takes_over_a_whole_state_dict():
    options = StateDictOptions(full_state_dict=True)
    of_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    trained = lora()
    for parameter in trained.parameters():
        parameter.data.mul_(1.5)
    expected = logits(trained)
    for how in (options, of_first):
        model = in_shards(lora())
        merge(model)
        rank = torch.distributed.get_rank()
        state = trained.state_dict() if how is options or rank == 0 else {}
        set_model_state_dict(model, state, options=how)
        assert model.model.layers[0].mlp.up_proj.merged
        close(logits(model), expected)
        unmerge(model)
        close(logits(model), expected)


WHOLE = (
    StateDictOptions(full_state_dict=True, strict=False),
    StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=True),
)


def take_over(model: nn.Module, state: dict, how: StateDictOptions) -> None:
    has_it = not how.broadcast_from_rank0 or torch.distributed.get_rank() == 0
    set_model_state_dict(model, dict(state) if has_it else {}, options=how)


@CASES.add
def a_plain_models_whole_state_dict_makes_doras_magnitudes_its_own():
    plain, whole_model = llama(), dora()
    for parameter in plain.parameters():
        parameter.data.mul_(1.2)
    state = plain.state_dict()
    whole_model.load_state_dict(state, strict=False)
    for how in WHOLE:
        for model in (in_shards(dora()), dora()):
            take_over(model, state, how)
            close(logits(model), logits(whole_model))
        for model in (in_shards(dora()), dora()):
            merge(model)
            take_over(model, state, how)
            close(logits(model), logits(whole_model))
            unmerge(model)
            close(logits(model), logits(whole_model))


@CASES.add
def a_whole_state_dict_of_the_head_leaves_the_layers_as_they_are():
    head = {"lm_head.weight": torch.ones_like(llama().lm_head.weight)}
    for how in WHOLE:
        for make in (lambda: in_shards(dora()), dora):
            for is_merged in (False, True):
                model = make()
                for name, parameter in model.named_parameters():
                    if name.endswith("lora_magnitude"):
                        parameter.data.mul_(1.5)
                before = values(model) | head
                if is_merged:
                    merge(model)
                take_over(model, head, how)
                model.load_state_dict(model.state_dict(keep_vars=True))
                if is_merged:
                    unmerge(model)
                torch.testing.assert_close(values(model), before, rtol=0, atol=0)


@CASES.add
def another_adapter_comes_while_merged():
    other, model = lora(), in_shards(lora())
    merge(model)
    for name, layer in other.named_modules():
        if isinstance(layer, LoRALinear):
            a, b = 1.5 * layer.lora_a.detach(), 0.5 * layer.lora_b.detach()
            layer.switch(a, b, scale=3.0)
            model.get_submodule(name).switch(a, b, scale=3.0)
    adapted = logits(other)
    merge(other)
    close(logits(model), logits(other))
    unmerge(model)
    close(logits(model), adapted)
    merge(model)
    unload(model, merge=False)
    close(logits(model), logits(llama()))


@CASES.add
def what_is_unloaded_is_a_plain_model():
    for options in WAYS:
        model = unload(in_shards(lora(), **options), merge=True)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        for _ in range(2):
            close(logits(model), logits(merged(lora)))
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
        if torch.distributed.get_rank() == 0:
            plain = llama()
            plain.load_state_dict(state)
            close(logits(plain), logits(merged(lora)))


@CASES.add
def a_pool_is_detached():
    model = llama()
    pool = AdapterPool.attach(model, ["q_proj", "down_proj"], capacity=8)
    model = in_shards(model)
    close(logits(model), logits(llama()))
    pool.detach()
    for _ in range(2):
        close(logits(model), logits(llama()))


# ---- what is refused -----------------------------------------------------------------------------


@CASES.add
def a_merge_that_is_not_finite_changes_nothing():
    model = in_shards(lora())
    layer = model.model.layers[1].mlp.down_proj
    before = values(model)
    if torch.distributed.get_rank() == 1:
        layer.lora_b.to_local().data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: .*not finite"):
        merge(model)
    first = model.model.layers[0].mlp.up_proj
    assert not first.merged
    torch.testing.assert_close(
        whole(first.weight), before["model.layers.0.mlp.up_proj.weight"], rtol=0, atol=0
    )


@CASES.add
def a_layer_that_is_whole_after_a_forward():
    model = fully_shard(lora(), mesh=mesh())
    logits(model)
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(RuntimeError, match=r"as fully_shard has gathered it .*call reshard\(\)"):
        layer.merge()
    model.reshard()
    layer.merge()
    logits(model)
    with pytest.raises(RuntimeError, match=r"as fully_shard has gathered it .*call reshard\(\)"):
        layer.unmerge()
    assert layer.merged


@CASES.add
def weights_that_are_tied_or_were_merged_before():
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    model = fully_shard(swap_linear(model, ["lm_head"], 4, alpha=8), mesh=mesh())
    before = logits(model)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to that of model\.embed_tokens"):
        merge(model)
    close(logits(model), before)
    with pytest.raises(RuntimeError, match=r"the layer is merged; unmerge\(\) it first"):
        in_shards(merged(lora))


@CASES.tests
def test_sharded_merges(run, case):
    run(case)
