"""accelerate(): PEFT's prompts and prefixes in encoder-decoders, and in generate."""

import contextlib
import copy
import inspect

import pytest
import torch
from peft_prompted import (
    ATTENTION,
    IDS,
    LOOKUP,
    MASK,
    METHODS,
    ONCE,
    L,
    assert_as_peft,
    make_gpt2,
    make_llama,
    methods,
    peft,
    prompted,
    transformers,
)
from torch import nn

import peft_kernels

BART = {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
}


def make_t5() -> nn.Module:
    sizes = {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, decoder_start_token_id=0, **sizes)
    )


def make_bart() -> nn.Module:
    config = transformers.BartConfig(vocab_size=32, d_model=16, **BART)
    return transformers.BartForConditionalGeneration(config)


def make_pegasus() -> nn.Module:
    """One whose positions don't train."""
    config = transformers.PegasusConfig(vocab_size=32, d_model=16, **BART)
    return transformers.PegasusForConditionalGeneration(config)


REASONS = {make_t5: "a prefix' scores with a bias", make_bart: None, make_pegasus: None}


def with_prompt(make, method):
    torch.manual_seed(0)
    base = make()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    kind, options = METHODS[method]
    config = kind(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=L, **options)
    return peft.get_peft_model(base, config).double().eval()


def ways_of(make, method):
    encoder = set() if method == "prompt" else {ONCE}
    if method == "prefix":
        encoder = {"no projection"}
    return {(REASONS[make] or ATTENTION) if method.startswith("prefix") else LOOKUP, *encoder}


@pytest.mark.parametrize("make", REASONS)
@methods
def test_encoder_decoders(make, method):
    model = with_prompt(make, method)
    for inputs in ({"labels": IDS}, {"labels": IDS, "attention_mask": None}):
        report = assert_as_peft(model, ways_of(make, method), use_cache=False, **inputs)
        reasons = {layer.reason for layer in report.layers} - {None, "no projection"}
        assert reasons == ({REASONS[make]} - {None} if method.startswith("prefix") else set())
    own = {"decoder_input_ids": IDS.flip(1), "decoder_attention_mask": MASK}
    assert_as_peft(model, ways_of(make, method), **own)
    embeddings = {"inputs_embeds": model.word_embeddings(IDS).detach(), "labels": IDS}
    ways = ways_of(make, method) - {LOOKUP, ATTENTION}
    if not method.startswith("prefix") or make is not make_t5:
        ways.add("other arguments")
    assert_as_peft(model, ways, use_cache=False, input_ids=None, **embeddings)


@pytest.mark.parametrize("make", [make_bart, make_pegasus])
def test_a_decoders_cache_goes_on(make):
    """It has the prefix, once it is read, and the encoder's keys as they were."""
    model = with_prompt(make, "prefix_mlp")

    def continued():
        with torch.no_grad():
            inputs = {"input_ids": IDS, "attention_mask": MASK}
            cache = model(**inputs, decoder_input_ids=IDS).past_key_values
            assert cache.get_seq_length() == L + IDS.shape[1]
            copied = copy.deepcopy(cache)
            for given in (cache, copied):
                step = {"decoder_input_ids": IDS[:, :1], "past_key_values": given}
                yield model.get_base_model()(**inputs, **step).logits

    expected = list(continued())
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(list(continued()), expected)
    assert set(report.counts()) == {ATTENTION, ONCE}
    assert_as_peft(model, {"other arguments", ONCE}, labels=IDS, output_attentions=True)
    heads = {"decoder_head_mask": torch.rand(2, 2, dtype=torch.float64)}
    if "decoder_head_mask" in inspect.signature(model.get_base_model().forward).parameters:
        assert_as_peft(model, {"other arguments", ONCE}, labels=IDS, **heads)
    model.train()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    assert_as_peft(model, {ATTENTION, ONCE}, labels=IDS)
    model.get_base_model().gradient_checkpointing_enable()
    report = peft_kernels.accelerate(model)
    with contextlib.suppress(RuntimeError, AttributeError):  # PEFT's own trouble with it
        model(IDS, labels=IDS)
    assert "gradient checkpointing" in report.counts()


GENERATED = [make_t5, make_bart, make_pegasus, make_llama, make_gpt2]
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def to_generate(make, method):
    if make in (make_llama, make_gpt2):
        return prompted(make, method)
    return with_prompt(make, method)


def generated(model, **options):
    torch.manual_seed(0)
    inputs = {"input_ids": IDS, "attention_mask": MASK.flip(1)}
    return model.generate(**inputs, **OPTIONS | options)


@pytest.mark.parametrize("make", GENERATED)
@methods
def test_generated_text(make, method):
    model = to_generate(make, method)
    expected = generated(model)
    report = peft_kernels.accelerate(model)
    assert torch.equal(generated(model), expected)
    way = "generate"
    if method.startswith("prefix"):
        hides = "generate, whose positions hide the prefix"
        positions = inspect.signature(model.get_base_model().forward).parameters
        hidden = make in (make_bart, make_pegasus) and "cache_position" in positions
        way = REASONS.get(make) or (hides if hidden else ATTENTION)
    assert report.counts()[way] == 1


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("options", [
    {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"eos_token_id": 3},
    {"return_dict_in_generate": True, "output_logits": True},
], ids=str)  # fmt: skip
def test_generated_with_a_prefix(make, options):
    model = to_generate(make, "prefix_mlp")
    expected = generated(model, **options)
    report = peft_kernels.accelerate(model)
    found = generated(model, **options)
    assert set(report.counts()) == {ATTENTION, ONCE}
    if not options.get("return_dict_in_generate"):
        assert torch.equal(found, expected)
        return
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    caches = [getattr(x.past_key_values, "self_attention_cache", x.past_key_values)
              for x in (found, expected)]  # fmt: skip
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(layers[0].keys, layers[1].keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layers[0].values, layers[1].values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"output_attentions": True, "return_dict_in_generate": True},
    {"logits_processor": transformers.LogitsProcessorList([lambda ids, scores: scores])},
], ids=["attentions", "processors"])  # fmt: skip
def test_generated_by_peft(options):
    model = to_generate(make_llama, "prefix_mlp")
    model.get_base_model().set_attn_implementation("eager")
    expected = generated(model, **options)
    report = peft_kernels.accelerate(model)
    found = generated(model, **options)
    assert torch.equal(*(getattr(x, "sequences", x) for x in (found, expected)))
    assert "generate with other arguments" in report.counts()
    assert ATTENTION not in report.counts()


def test_generated_while_disabled():
    model = to_generate(make_llama, "prefix_mlp")
    with model.disable_adapter():
        expected = generated(model)
    report = peft_kernels.accelerate(model)
    with model.disable_adapter():
        assert torch.equal(generated(model), expected)
    assert set(report.counts()) == {"disabled"}


def test_the_prefix_begins_with_its_cache():
    """Where PEFT asks for none, none is attended to."""
    model = to_generate(make_llama, "prefix_mlp")
    with model.disable_adapter():
        expected = generated(model)
    report = peft_kernels.accelerate(model)
    plain = model.base_model_prepare_inputs_for_generation
    model.prepare_inputs_for_generation = plain
    assert torch.equal(generated(model), expected)
    cache = generated(model, return_dict_in_generate=True).past_key_values
    assert cache.get_seq_length() == IDS.shape[1] + 3
    assert set(report.counts()) == {ONCE}


def test_no_copy_of_the_prefix_is_in_the_cache():
    """Each step adds its own keys, of all rows; the prefix is one for all."""
    model = to_generate(make_llama, "prefix_mlp")
    peft_kernels.accelerate(model)
    seen = []
    model.get_base_model().model.layers[0].self_attn.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(
            kwargs["past_key_values"].layers[0].keys.shape[2]
        ),
        with_kwargs=True,
    )
    generated(model)
    assert seen == [6, 7, 8, 9]


def test_an_attention_of_someone_elses_generates_as_pefts():
    model = to_generate(make_llama, "prefix_mlp")
    attention = model.get_base_model().model.layers[1].self_attn
    plain, own = type(attention).forward, copy.deepcopy(attention.config)

    def forward(*args, **kwargs):
        attention.config = own
        return plain(attention, *args, **kwargs)

    attention.forward = forward
    expected = generated(model)
    report = peft_kernels.accelerate(model)
    assert torch.equal(generated(model), expected)
    assert "an attention that asks for no prefix" in report.counts()
