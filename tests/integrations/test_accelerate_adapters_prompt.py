"""accelerate(): soft prompts of `adapters`, and methods that come together with others."""

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters_models import (
    IDS,
    KERNEL,
    LORA,
    assert_as_theirs,
    bottleneck,
    lora,
    make_bert,
    make_t5,
    run,
    with_adapters,
)
from torch import nn

import peft_kernels

LOOKUP, ATTENTION, ONCE = "prompt_lookup", "prefix_attention", "encoded once"
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0


def prompt(**options):
    return adapters.PromptTuningConfig(**{"prompt_length": 3, **options})


@pytest.mark.parametrize("combine", ["prefix", "prefix_after_bos"])
@pytest.mark.parametrize("padded", [False, True])
def test_prompts_are_served(combine, padded):
    model = with_adapters(make_bert, a=prompt(combine=combine))
    inputs = {"attention_mask": MASK} if padded else {}
    report = assert_as_theirs(model, {LOOKUP}, inputs=inputs)
    (layer,) = report.layers
    assert (layer.kind, layer.backend) == ("prompt_tuning.PromptTuningLayer", "reference")


def test_a_prompt_in_float32_runs_on_a_kernel():
    model = with_adapters(make_bert, torch.float32, a=prompt())
    (layer,) = peft_kernels.accelerate(model).layers
    assert layer.backend == "cpu"
    assert_as_theirs(model, {LOOKUP}, rtol=1e-4, atol=1e-4)


def test_prompts_that_are_theirs():
    model = with_adapters(make_bert, a=prompt())
    embedding = model.prompt_tuning.prompt_tunings["a"].prompt_embedding
    handle = embedding.register_forward_hook(lambda module, args, output: output * 2)
    report = assert_as_theirs(model, {"prompt_embedding: hooks"})
    assert [layer.reason for layer in report.layers] == ["prompt_embedding: hooks"]
    handle.remove()
    embedding.max_norm = 0.5
    assert_as_theirs(model, {"prompt_embedding: another embedding"})
    embedding.max_norm = None
    embedding.float()
    assert_as_theirs(model, {"x in torch.float64 for a prompt in torch.float32"})


UNIONS = {
    "mam": (adapters.MAMConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=7), bottleneck("par_bn"),
    ), {ATTENTION, ONCE, KERNEL}),
    "unipelt": (adapters.UniPELTConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=7),
        bottleneck(), lora(output_lora=False),
    ), {"gating", ONCE, KERNEL}),
    "invertible": (bottleneck("seq_bn_inv"), {KERNEL}),
    "all": (adapters.ConfigUnion(
        adapters.PrefixTuningConfig(prefix_length=3), bottleneck(), lora(output_lora=False)
    ), {ATTENTION, ONCE, KERNEL, LORA}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNIONS)
def test_methods_together(name):
    config, ways = UNIONS[name]
    model = with_adapters(make_bert, a=config)
    assert_as_theirs(model, ways)
    model.adapters_config.skip_layers = [0]  # AdapterDrop
    assert_as_theirs(model, ways | {"no active adapter"})


@pytest.mark.parametrize("make", [make_bert, make_t5])
@pytest.mark.parametrize("name", ["mam", "all"])
def test_training_comes_and_goes(make, name):
    """Adapters that are added, trained and deleted after accelerate()."""
    config, _ = UNIONS[name]
    model, theirs = (with_adapters(make, a=config) for _ in range(2))
    report = peft_kernels.accelerate(model)
    for each in (model, theirs):
        torch.manual_seed(1)
        each.add_adapter("b", config=config)
        for parameter in each.parameters():
            nn.init.normal_(parameter, std=0.3)
        each.double().train_adapter("b")
        each.train()
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
    assert model.adapter_summary() == theirs.adapter_summary()
    torch.testing.assert_close(run(model), run(theirs))
    assert report.missing()
    report = peft_kernels.accelerate(model)
    assert not report.missing()
    torch.testing.assert_close(run(model), run(theirs))
    for name in ("b", "a"):
        for each in (model, theirs):
            each.delete_adapter(name)
            each.set_active_adapters("a" if name == "b" else None)
        torch.testing.assert_close(run(model)[0], run(theirs)[0])
