"""accelerate(): PEFT's prefix tuning, against the same models as PEFT runs them."""

import copy
import pickle

import pytest
import torch
from peft_prompted import (
    ATTENTION,
    IDS,
    MASK,
    PREFIXES,
    L,
    assert_as_peft,
    make_gpt2,
    make_llama,
    peft,
    prompted,
    run,
    transformers,
    ways_of,
)
from torch import nn

import peft_kernels


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@PREFIXES
def test_prefixes_of_other_calls(make, method):
    model = prompted(make, method)
    ways = ways_of(make, method)
    for inputs in (
        {"attention_mask": MASK.flip(1)},
        {"position_ids": torch.arange(6).expand(4, 6) + 2},
        {"output_hidden_states": True},
    ):
        assert_as_peft(model, ways, **inputs)
    expected = run(model, use_cache=False)[0][0]
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(run(model, use_cache=False)[0][0], expected, rtol=1e-5, atol=1e-5)
    assert set(report.counts()) == ways
    peft_kernels.accelerate(model)
    peft_kernels.accelerate(model)  # twice is once
    assert_as_peft(model, ways)
    with model.disable_adapter(), torch.no_grad():
        plain = run(model)[0][0]
        peft_kernels.restore(model)
        torch.testing.assert_close(run(model)[0][0], plain)


@PREFIXES
def test_the_base_attends_as_it_is_told_to(method):
    """The kernel is for the forward that has a prefix, and copies and pickles know."""
    model = prompted(make_llama, method)
    base = model.get_base_model()
    seen = []
    base.model.layers[0].self_attn.register_forward_hook(
        lambda module, *_: seen.append(module.config._attn_implementation)
    )
    peft_kernels.accelerate(model)
    with torch.no_grad():
        model(IDS), base(IDS)
        base.set_attn_implementation("eager")
        base(IDS), model(IDS)
    assert seen == ["peft_kernels_prefix", "sdpa", "eager", "peft_kernels_prefix"]
    config = base.model.layers[0].self_attn.config
    for other in (copy.deepcopy(base.model.layers[0].self_attn).config, pickle.loads(
        pickle.dumps(config)
    )):  # fmt: skip
        assert other._attn_implementation == "eager" and type(other) is type(config)
    peft_kernels.restore(model)
    assert type(base.model.layers[0].self_attn.config) is transformers.LlamaConfig


@PREFIXES
def test_a_returned_cache_goes_on(method):
    """It has the prefix, once it is read."""
    model = prompted(make_llama, method)

    def continued(model):
        with torch.no_grad():
            cache = model(IDS, MASK).past_key_values
            assert cache.get_seq_length() == L + IDS.shape[1]
            copies = copy.deepcopy(cache)
            mask = torch.ones(4, L + IDS.shape[1] + 1)
            for given in (cache, copies):
                yield model.get_base_model()(IDS[:, :1], mask, past_key_values=given).logits

    expected = list(continued(model))
    peft_kernels.accelerate(model)
    found = list(continued(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@PREFIXES
def test_calls_that_no_prefix_kernel_serves(method):
    model = prompted(make_llama, method)
    encoder = ways_of(make_llama, method) - {ATTENTION}
    embeddings = model.word_embeddings(IDS).detach()
    for inputs in (
        {"input_ids": None, "inputs_embeds": embeddings},
        {"return_dict": False},
        {"output_attentions": True},
    ):
        model.get_base_model().set_attn_implementation("eager")
        if "return_dict" in inputs:
            report = peft_kernels.accelerate(model)
            model(IDS, **inputs)
            assert set(report.counts()) == {"other arguments", *encoder}
        else:
            assert_as_peft(model, {"other arguments", *encoder}, **inputs)


def test_an_attention_of_someone_elses_is_pefts():
    """What asks for no prefix would leave it out."""
    model = prompted(make_llama, "prefix")
    attention = model.get_base_model().model.layers[1].self_attn
    plain = type(attention).forward

    def forward(*args, **kwargs):
        kwargs["attention_mask"] = None
        attention.config = plain_config
        return plain(attention, *args, **kwargs)

    plain_config = copy.deepcopy(attention.config)
    attention.forward = forward
    expected = run(model)[0][0]
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(run(model)[0][0], expected)
    assert set(report.counts()) == {"an attention that asks for no prefix", "no projection"}


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2"])
def test_prefixes_in_windows_are_pefts(kind):
    sizes = make_llama().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads")  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        **{name: sizes[name] for name in names}, head_dim=4, sliding_window=4
    )
    base = getattr(transformers, f"{kind}ForCausalLM")(config).double()
    options = {"num_attention_heads": 2, "token_dim": 8}
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=L, **options)
    model = peft.get_peft_model(base, settings).double().eval()
    reason = "attention in a window" if kind == "Mistral" else "no attention that is known"
    assert_as_peft(model, {reason, "no projection"}, attention_mask=None)


def test_hooks_of_an_encoder_run_in_pefts_code():
    model = prompted(make_llama, "prefix_mlp")
    seen = []
    encoder = model.prompt_encoder["default"]
    encoder.transform[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert_as_peft(model, {ATTENTION, "hooks"})
    assert {output.shape[0] for output in seen} == {4, 1}


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@PREFIXES
@pytest.mark.parametrize("reentrant", [True, False])
def test_prefixes_under_checkpointing(make, method, reentrant):
    """transformers 4.57 takes PEFT's cache away, and with it the prefix; 5 raises."""
    model = prompted(make, method).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    report = peft_kernels.accelerate(model, strict=False)
    outputs, gradients = run(model, labels=IDS, use_cache=False)
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = run(model, labels=IDS, use_cache=False)
    torch.testing.assert_close(found, (outputs, gradients), rtol=1e-5, atol=1e-5)
    assert set(report.counts()) == ways_of(make, method)
    peft_kernels.restore(model)
    assert not any("peft_kernels" in str(type(value)) for module in base.modules()
                   for value in vars(module).values())  # fmt: skip
    report = peft_kernels.accelerate(model)
    try:
        theirs = run(model, labels=IDS)[1]
    except RuntimeError:
        theirs = {}
    assert theirs == {} and "gradient checkpointing" in report.counts()
