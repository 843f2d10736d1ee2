"""accelerate(): AdapterFusion in models of `adapters`."""

import copy

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters.composition import Fuse, Stack
from adapters_models import (
    FUSION,
    IDS,
    KERNEL,
    assert_as_theirs,
    bottleneck,
    make_bert,
    make_gpt2,
    make_llama,
    run,
    with_adapters,
)
from torch import nn

import peft_kernels


def fused(make, dtype=torch.float64, fusion="dynamic", setup=None, **configs):
    """A model whose adapters are fused."""
    configs = configs or {
        "a": bottleneck(),
        "b": bottleneck(scaling=2.0),
        "c": bottleneck("par_bn"),
    }
    model = with_adapters(make, dtype, **configs)
    setup, names = setup or Fuse(*configs), ["b", "c"] if setup else list(configs)
    model.add_adapter_fusion(names, adapters.AdapterFusionConfig.load(fusion, dropout_prob=0.0))
    for name, parameter in model.named_parameters():
        if "adapter_fusion_layer" in name:
            nn.init.normal_(parameter, std=0.3)
    model.set_active_adapters(setup)
    return model.to(dtype).eval()


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_llama])
@pytest.mark.parametrize("fusion", ["static", "dynamic"])
def test_fusion(make, fusion):
    model = fused(make, fusion=fusion)
    assert_as_theirs(model, {FUSION})
    with torch.no_grad():  # by matrices that are kept
        assert_as_theirs(model, {FUSION})


@pytest.mark.parametrize("setup", [
    Stack("a", Fuse("b", "c")),
    Fuse(Stack("a", "b"), "c"),
], ids=str)  # fmt: skip
def test_fusion_in_compositions(setup):
    configs = {"a": bottleneck(), "b": bottleneck(scaling=2.0), "c": bottleneck()}
    model = fused(make_bert, setup=setup, **configs)
    ways = {"Fuse of compositions"} if isinstance(setup, Fuse) else {FUSION}
    assert_as_theirs(model, {KERNEL, *ways})


def test_fused_matrices_follow_the_parameters():
    model = fused(make_bert)
    report = peft_kernels.accelerate(model)
    with torch.no_grad():
        before = run(model)[0]
        assert torch.equal(run(model)[0], before)
        for name, parameter in model.named_parameters():
            if "adapter_up" in name or "adapter_fusion_layer" in name:
                parameter.mul_(-1.5)
        after = run(model)[0]
        assert not torch.allclose(after, before)
        assert set(report.counts()) == {FUSION}
        peft_kernels.restore(model)
        torch.testing.assert_close(run(model)[0], after)


def test_temperature_and_attentions_of_a_fusion():
    model = fused(make_bert, fusion=adapters.AdapterFusionConfig.load("dynamic", temperature=True))
    both = [copy.deepcopy(model), model]
    peft_kernels.accelerate(model)
    for _ in range(3):
        theirs, ours = (m(IDS, output_adapter_fusion_attentions=True) for m in both)
        torch.testing.assert_close(ours[0], theirs[0])
        for name, layers in theirs.adapter_fusion_attentions.items():
            for layer, places in layers.items():
                for place, weights in places.items():
                    own = ours.adapter_fusion_attentions[name][layer][place]
                    torch.testing.assert_close(torch.tensor(own), torch.tensor(weights),
                                               check_dtype=False, rtol=1e-5, atol=1e-6)  # fmt: skip
    temperatures = [[x.T for x in m.modules() if hasattr(x, "reduction")] for m in both]
    assert temperatures[0] == temperatures[1] and temperatures[0][0] == pytest.approx(49.85)


def test_fusion_under_autocast():
    model = fused(make_bert, torch.float32)
    truth = run(copy.deepcopy(model).double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(model)[0]
        report = peft_kernels.accelerate(model)
        ours = run(model)[0]
    assert set(report.counts()) == {FUSION} and ours.dtype is theirs.dtype
    assert (ours - truth).norm() <= 1.2 * (theirs - truth).norm()


@pytest.mark.parametrize("options", [
    {},
    {"ln_after": True},
    {"ln_after": True, "adapter_residual_before_ln": True},
    {"preset": "par_bn", "ln_after": True},
    {"use_gating": True},
], ids=str)  # fmt: skip
def test_dropout_of_scores_is_theirs(options):
    model = fused(make_bert, a=bottleneck(**options), b=bottleneck(**options))
    for module in model.modules():
        if hasattr(module, "reduction"):
            module.dropout.p = 0.5
            module.dropout.train()
    assert_as_theirs(model, {"fusion: dropout of scores", KERNEL})
