"""accelerate(): prefixes in models of `adapters`."""

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters.composition import BatchSplit, Parallel, Stack
from adapters_models import (
    IDS,
    assert_as_theirs,
    make_bert,
    make_gpt2,
    make_llama,
    make_t5,
    run,
    with_adapters,
)
from torch import nn

import peft_kernels


def prefix(**options):
    return adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=7, **options)


LEFT_OUT = "sdpa, whose mask leaves out the prefix or text"
ATTENTION = {
    make_bert: "prefix_attention",
    make_gpt2: LEFT_OUT,
    make_llama: LEFT_OUT,
    make_t5: "attention: T5AttentionWithAdapters",
}


@pytest.mark.parametrize("make", ATTENTION)
def test_prefixes_are_encoded_once(make):
    model = with_adapters(make, a=prefix())
    ways = {"encoded once", ATTENTION[make]}
    report = assert_as_theirs(model, ways)
    reason = None if make is make_bert else ATTENTION[make]
    assert {layer.reason for layer in report.layers} == {None, reason}
    assert "on PyTorch's operations, and no kernel" in report.summary()
    with torch.no_grad():
        assert_as_theirs(model, ways)
        report = peft_kernels.accelerate(model)
        first = run(model)[0]
        assert torch.equal(run(model)[0], first)
        for name, parameter in model.named_parameters():
            if "control_trans" in name:
                parameter.mul_(-1)
        changed = run(model)[0]
        assert not torch.allclose(changed, first)
        peft_kernels.restore(model)
        torch.testing.assert_close(run(model)[0], changed)


@pytest.mark.parametrize("setup", [
    BatchSplit("a", "b", batch_sizes=[1, 3]), Parallel("a", "b"),
], ids=str)  # fmt: skip
def test_prefixes_in_compositions(setup):
    model = with_adapters(make_bert, a=prefix(), b=prefix(non_linearity="relu"))
    model.set_active_adapters(setup)
    way = "Parallel" if isinstance(setup, Parallel) else "prefix_attention"
    assert_as_theirs(model, {"encoded once", way})


@pytest.mark.parametrize("make", [make_gpt2, make_llama, make_bert])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("setup", [Stack("a"), BatchSplit("a", "b", batch_sizes=[1, 3])], ids=str)
def test_prefixes_under_sdpa(make, padded, setup):
    """adapters leaves the prefix out there, or hides text behind it; in eager it is right."""
    model = with_adapters(make, torch.float32, a=prefix(), b=prefix())
    model.set_active_adapters(setup)
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 1 - padded
    inputs = {"attention_mask": mask} if padded else {}

    def results(implementation):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return model(IDS, **inputs)[0][mask.bool()]

    right, theirs = results("eager"), results("sdpa")
    report = peft_kernels.accelerate(model, strict=False)
    torch.testing.assert_close(results("sdpa"), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results("eager"), right, rtol=1e-4, atol=1e-4)
    assert {layer.reason for layer in report.layers} == {None}
    assert set(report.counts()) == {"encoded once", "prefix_attention"}
    peft_kernels.accelerate(model)
    torch.testing.assert_close(results("sdpa"), theirs, rtol=1e-5, atol=1e-5)
    peft_kernels.accelerate(model, strict=False)
    way = "prefix_attention" if make is make_bert else LEFT_OUT
    assert_as_theirs(model, {"encoded once", way}, rtol=1e-4, atol=1e-4)
    if make is not make_bert:  # whose masks are additive
        assert not torch.allclose(theirs, right, atol=1e-2)


def test_a_prefix_with_dropout_is_theirs_in_training():
    model = with_adapters(make_bert, a=prefix(dropout=0.3))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train(module.p == 0.3)
    assert_as_theirs(model, {"dropout by row", "a prefix for each row"})
