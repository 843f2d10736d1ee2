"""Arguments of the wrong kind: an error names each, says what it was and what it must be."""

import pytest
import torch
import torch.distributed.fsdp  # models are looked at once it is there
from tiny_models import make_bert, make_llama
from torch import nn

import peft_kernels
from peft_kernels import AdapterPool, disabled, load_adapter, save_adapter, swap_linear
from peft_kernels.formats import adapter_hub as hub
from peft_kernels.formats.peft_prompts.folder import load_prompt, save_prompt
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for, prefix_ids
from peft_kernels.integrations.transformers.soft_prompts import add_prompt, task_ids
from peft_kernels.nn import AdapterFusion, BottleneckAdapter, PrefixTuning, PromptTuning, PTuning

DROPOUTS = {
    "swap_linear": lambda p: swap_linear(make_llama(), ["q_proj"], 2, alpha=4, dropout=p),
    "BottleneckAdapter": lambda p: BottleneckAdapter(8, 2, dropout=p),
    "AdapterFusion": lambda p: AdapterFusion([BottleneckAdapter(8, 2)], dropout=p),
    "PrefixTuning": lambda p: PrefixTuning(3, [(2, 4)], dropout=p),
}


@pytest.mark.parametrize("dropout", [None, "x", (0.1,), torch.zeros(2)])
@pytest.mark.parametrize("kind", DROPOUTS)
def test_a_dropout_that_is_no_number_is_named(kind, dropout):
    with pytest.raises(TypeError, match=r"dropout must be a number in \[0, 1\); got"):
        DROPOUTS[kind](dropout)


def with_pool() -> AdapterPool:
    return AdapterPool.attach(make_llama(), ["q_proj"], capacity=8)


def with_adapter() -> nn.Module:
    return swap_linear(make_llama(), ["q_proj"], 2, alpha=4)


# What is called with None.
NONE = {
    "add_prefix": (lambda: add_prefix(make_llama(), None), "prefix must be a PrefixTuning"),
    "add_prompt": (lambda: add_prompt(make_llama(), None), "prompt must be a Module"),
    "prefix's model": (lambda: add_prefix(None, PrefixTuning(3, [(2, 4)])), "model must be a Mod"),
    "prompt's model": (lambda: add_prompt(None, PromptTuning(3, 16)), "model must be a Module"),
    "PTuning": (lambda: PTuning(None, 16), "template must be a Template"),
    "merge": (lambda: peft_kernels.merge(None), "model must be a Module"),
    "unmerge": (lambda: peft_kernels.unmerge(None), "model must be a Module"),
    "unload": (lambda: peft_kernels.unload(None, merge=True), "model must be a Module"),
    "disabled": (lambda: disabled(None).__enter__(), "model must be a Module"),
    "swap_linear": (lambda: swap_linear(None, ["x"], 2, alpha=4), "model must be a Module"),
    "save_adapter": (lambda: save_adapter(None, "nowhere"), "model must be a Module"),
    "save_adapter's": (lambda: save_adapter(with_adapter(), None), "folder must be the path"),
    "load_adapter's": (lambda: load_adapter(make_llama(), None), "folder must be the path"),
    "pool.load": (lambda: with_pool().load("x", None), "source must be the path .*or tensors"),
    "pool.save": (lambda: with_pool().save("x", None), "folder must be the path"),
    "save_prompt": (lambda: save_prompt(None, PromptTuning(3, 16)), "folder must be the path"),
    "load_prompt": (lambda: load_prompt(None), "folder must be the path"),
    "save the adapter": (lambda: hub.save_adapter(make_bert(), None, "x"), "folder must be"),
    "load the adapter": (lambda: hub.load_adapter(make_bert(), None), "folder must be the"),
    "save the fusion": (lambda: hub.save_fusion(make_bert(), None, ["x"]), "folder must be"),
    "load the fusion": (lambda: hub.load_fusion(make_bert(), None), "folder must be the path"),
}


@pytest.mark.parametrize("call", NONE)
def test_what_must_not_be_none_is_named(call):
    run, named = NONE[call]
    with pytest.raises(TypeError, match=f"{named}.*; got None"):
        run()


def test_a_module_of_another_kind_is_named():
    with pytest.raises(TypeError, match="prompt must be a PromptTuning or PTuning; got Linear"):
        add_prompt(make_llama(), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="template must be a Template; got 3"):
        PTuning(3, 32)


@pytest.mark.parametrize("ids", ["01", [None, 1], [[0], [1, 2]], object()])
def test_ids_that_are_no_integers_are_named(ids):
    model, other = make_llama(), make_llama()
    add_prefix(model, prefix_for(model, 3, tasks=2))
    add_prompt(other, PromptTuning(3, 16, tasks=2))
    tokens = torch.arange(12).reshape(2, 6)
    with pytest.raises(TypeError, match=r"prefix_ids must be integers \[rows\]; got"):
        model(tokens, prefix_ids=ids)
    with pytest.raises(TypeError, match=r"task_ids must be integers \[rows\]; got"):
        other(tokens, task_ids=ids)
    with pytest.raises(TypeError, match="prefix_ids must"), prefix_ids(model, ids):
        pass
    with pytest.raises(TypeError, match="task_ids must"), task_ids(other, ids):
        pass
