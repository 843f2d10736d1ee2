"""What is done to a model that is sharded: adapters that come later, files, merging."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
import transformers
from parallel_models import (
    PLAN,
    bottleneck,
    close,
    dora,
    dora_of_peft,
    llama,
    logits,
    lora,
    mesh,
    of_peft,
    parallel,
    prefix,
    prompt,
    randomised,
    sharded,
    text,
    torch_parallel_llama,
    trained,
    whole,
)
from processes import Cases, everywhere
from tiny_models import make_gpt2
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import peft_kernels
from peft_kernels import (
    load_adapter,
    merge,
    save_adapter,
    swap_linear,
    unload,
    unmerge,
)
from peft_kernels.integrations.parallel import ColwiseParallel, RowwiseParallel, plan_of
from peft_kernels.integrations.transformers import insert_adapters

CASES = Cases(2)
run = CASES.fixture()

TARGETS = [name.rpartition(".")[2] for name in PLAN]


def adapters_of(model) -> dict:
    return {n: whole(p).detach() for n, p in model.named_parameters() if ".lora_" in n}


# ---- tensor parallelism --------------------------------------------------------------------------


@CASES.add
def adapters_that_come_into_a_parallel_model():
    models = llama(), torch_parallel_llama()
    for model in models:
        torch.manual_seed(5 if torch.distributed.get_rank() == 0 else 6)
        swap_linear(model, TARGETS, 4, alpha=8)
    plain, model = models
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.lora_a.placements == (Replicate(),)
    assert layer.mlp.up_proj.lora_b.placements == (Shard(0),)
    assert layer.mlp.down_proj.lora_a.placements == (Shard(1),)
    assert layer.mlp.down_proj.lora_b.placements == (Replicate(),)
    of_the_first = everywhere(adapters_of(plain))[0]
    torch.testing.assert_close(adapters_of(model), of_the_first, rtol=0, atol=0)
    plain.load_state_dict(of_the_first, strict=False)
    expected = trained(randomised(plain))
    close(trained(randomised(model)), expected)


@CASES.add
def the_plan_of_a_model_of_transformers():
    for make in (lora, of_peft):
        model = make()
        plan = plan_of(model)
        parallelize_module(model, mesh(), plan)
        assert [p.requires_grad for p in model.parameters()] == [
            p.requires_grad for p in make().parameters()
        ]
        assert sum(isinstance(p, DTensor) for p in model.parameters()) >= 14 * 3
        close(trained(model), trained(make()))
    with pytest.raises(ValueError, match="Linear has none: write a plan"):
        plan_of(torch.nn.Linear(2, 2))
    model = llama().requires_grad_(True)
    model._tp_plan = model.tp_plan | {"model.layers.*.mlp": "packed_colwise"}
    with pytest.raises(ValueError, match=r"'packed_colwise' for model\.layers\.\*\.mlp"):
        plan_of(model)
    model._tp_plan = {"model.norm": "replicated_with_grad_allreduce"}
    with pytest.raises(ValueError, match=r"'replicated_with_grad_allreduce' for model\.norm"):
        plan_of(model)
    assert plan_of(lora()).keys() - {"lm_head", "model.embed_tokens"} == PLAN.keys()


@CASES.add
def a_model_that_transformers_has_sharded():
    folder = CASES.folder / "llama"
    if torch.distributed.get_rank() == 0:
        llama().save_pretrained(folder)
    torch.distributed.barrier()
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(torch.distributed.get_rank()))
    with mock.patch.dict(os.environ, ranks | {"WORLD_SIZE": str(CASES.processes)}):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    if int(transformers.__version__.split(".")[0]) > 4:
        with pytest.raises(TypeError, match="this one's was replaced by transformers"):
            swap_linear(model, TARGETS, 4, alpha=8)
        return
    models = llama(), model
    for model in models:
        torch.manual_seed(3)
        swap_linear(model, TARGETS, 4, alpha=8)
    expected, found = (trained(randomised(model)) for model in models)
    close(found, expected)


@CASES.add
def what_is_drawn_anew_is_the_same_everywhere():
    model = parallel(lora(), mesh())
    layer = model.model.layers[0].mlp.up_proj
    torch.manual_seed(torch.distributed.get_rank())
    layer.reset_adapter()
    first, second = everywhere(layer.lora_a.to_local().detach())
    assert torch.equal(first, second) and first.any()
    assert not whole(layer.lora_b).any()


@CASES.add
def dora_in_a_parallel_model():
    for make in (dora, dora_of_peft):
        model, expected = make(), trained(make())
        parallelize_module(model, mesh(), plan_of(model))
        report = peft_kernels.accelerate(model)
        close(trained(model), expected)
        assert report.counts().keys() <= {"dora_linear"}
    first, later = llama(), torch_parallel_llama()
    for model in (first, later):
        torch.manual_seed(3)
        swap_linear(model, TARGETS, 4, alpha=8, use_dora=True)
    close(adapters_of(later), adapters_of(first))
    parallel(first, mesh())
    assert all(
        one.placements == other.placements
        for one, other in zip(first.parameters(), later.parameters(), strict=True)
        if isinstance(one, DTensor)
    )


@CASES.add
def rows_with_their_own_adapters_in_a_parallel_model():
    options = {"adapter_names": ["second", "__base__", "default", "second"]}
    found = []
    for split in (False, True):
        model = of_peft()
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
        report = peft_kernels.accelerate(parallel(model, mesh()) if split else model)
        loss = model.train()(input_ids=text(), labels=text(), **options).loss
        loss.backward()
        grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        assert report.counts().keys() == {"multi_lora_linear"} and len(grads) == 4 * 14
        found.append((loss.detach(), grads))
    close(*found)


@CASES.add
def what_each_process_has_whole_in_a_parallel_model():
    for make in (prefix, prompt, bottleneck):
        model = parallel(make(), mesh())
        close(trained(model), trained(make()))


@CASES.add
def a_parallel_model_is_merged_and_unmerged():
    conv1d = parallel_with_conv1d(mesh())
    for model in (parallel(lora(), mesh()), parallel(dora(), mesh()), conv1d):
        before = [p.clone() for p in model.parameters()]
        expected = logits(model)
        merge(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
        unmerge(model)
        after = list(model.parameters())
        assert all(torch.equal(whole(a), whole(b)) for a, b in zip(after, before, strict=True))
        unload(model, merge=True)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def parallel_with_conv1d(mesh):
    torch.manual_seed(0)
    model = swap_linear(make_gpt2().eval(), ["mlp.c_fc", "mlp.c_proj"], 4, alpha=8)
    plan = {"transformer.h.*.mlp.c_fc": ColwiseParallel()}
    plan["transformer.h.*.mlp.c_proj"] = RowwiseParallel()
    return randomised(parallelize_module(model, mesh, plan))


@CASES.add
def a_merge_that_is_not_finite_changes_nothing():
    model = parallel(lora(), mesh())
    layer = model.model.layers[1].mlp.down_proj
    if torch.distributed.get_rank() == 1:
        layer.lora_a.to_local().data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: .*not finite"):
        merge(model)
    assert not layer.merged and not model.model.layers[0].mlp.up_proj.merged


# ---- files ---------------------------------------------------------------------------------------


@CASES.add
def folders_of_sharded_models():
    plain = lora()
    folder = CASES.folder / "plain"
    save_adapter(plain, folder)
    torch.distributed.barrier()
    for make in (parallel, sharded):
        model = make(lora(), mesh())
        save_adapter(model, CASES.folder / make.__name__)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
        load_adapter(model, CASES.folder / make.__name__)
        torch.testing.assert_close(logits(model), logits(plain))
    model = load_adapter(torch_parallel_llama(), folder)
    torch.testing.assert_close(logits(model), logits(plain))


# ---- what is refused -----------------------------------------------------------------------------


@CASES.add
def what_comes_too_late_for_fully_shard():
    model = sharded(llama(), mesh())
    message = r"sharded \(a DTensor\).*Do this before fully_shard\(\)"
    with pytest.raises(TypeError, match=message):
        insert_adapters(model, "pfeiffer", reduction_factor=4)
    model = fully_shard(llama(), mesh=mesh())
    logits(model)  # which leaves all of it whole
    with pytest.raises(TypeError, match=r"q_proj is held by fully_shard.*before full"):
        insert_adapters(model, "pfeiffer", reduction_factor=4)


@CASES.tests
def test_sharded_models(run, case):
    run(case)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, folder: save_adapter(model, folder / "new"),
        lambda model, folder: load_adapter(model, folder / "old"),
        lambda model, folder: merge(model),
    ],
    ids=["save", "load", "merge"],
)
def test_placeholders_of_zero_3_are_refused(call, tmp_path):
    save_adapter(lora(), tmp_path / "old")
    model = lora()
    matrix = model.model.layers[1].self_attn.q_proj.lora_b
    whole = matrix.data
    matrix.data, matrix.ds_id = torch.empty(0), 3
    with pytest.raises(RuntimeError, match=r"q_proj.*lora_b is a placeholder .*GatheredParameters"):
        call(model, tmp_path)
    assert not (tmp_path / "new").exists()
    matrix.data = whole  # gathered
    call(model, tmp_path)
