"""Adapters, fusions, prefixes and prompts in quantised models, against those over their values."""

import copy

import pytest
import torch
from torch import nn

import peft_kernels

quantised = pytest.importorskip("quantised")
transformers = pytest.importorskip("transformers")
functional = pytest.importorskip("bitsandbytes").functional

from peft_kernels.codes.layers import codes_of, keep_codes  # noqa: E402
from peft_kernels.integrations.transformers import (  # noqa: E402  after importorskip
    adapters_of,
    add_prefix,
    add_prompt,
    fuse_adapters,
    init_from_text,
    insert_adapter,
    insert_adapters,
    prefix_for,
    prefix_shapes,
    remove_adapters,
    remove_prefix,
    remove_prompt,
)
from peft_kernels.nn import BottleneckAdapter, PromptTuning  # noqa: E402
from peft_kernels.ops import dequantize  # noqa: E402

IDS = torch.arange(12).view(2, 6) % 32
SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def opt():
    sizes = {**SIZES, "ffn_dim": SIZES["intermediate_size"], "word_embed_proj_dim": 64}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, max_position_embeddings=64))


def t5():
    config = transformers.T5Config(
        vocab_size=32, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


def make(kind=llama, quant_type="nf4", **options):
    torch.manual_seed(0)
    return quantised.in_codes(kind().eval(), quant_type, ("lm_head", "decoder"), **options)


def grow(model, method, seed=1):
    """The model with a method's parameters, the same in every model."""
    torch.manual_seed(seed)
    if method == "prefix":
        add_prefix(model, prefix_for(model, 4))
    elif method == "prompt":
        add_prompt(model, PromptTuning(4, 64))
    elif method == "adapter":
        insert_adapter(model.requires_grad_(False), "model.layers.0.mlp", BottleneckAdapter(64, 8))
    else:
        insert_adapters(model, method)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    return model


def step(model):
    model.zero_grad()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    return [out.logits, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_close(found, expected):
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3, atol=1e-5)


METHODS = ["pfeiffer", "houlsby", "adapter", "prompt", "prefix"]


@pytest.mark.parametrize("method", METHODS)
def test_trains_as_over_the_values_before_and_after_an_evaluation(method):
    base = make()
    exact = grow(quantised.dequantised(base, torch.float32), method).double()
    model = grow(base, method)
    expected = step(exact)
    assert_close(step(model), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected[0].float(), rtol=1e-3, atol=1e-5)
    assert_close(step(model), expected)


def test_in_bert():
    base = make(bert)
    exact = grow(quantised.dequantised(base, torch.float32), "houlsby").double()
    assert_close(step(grow(base, "houlsby")), step(exact))


def test_fusions():
    base = make(bert)
    exact = quantised.dequantised(base, torch.float32)
    found = []
    for model in (base, exact):
        trained = [adapters_of(grow(copy.deepcopy(model), "pfeiffer", i)) for i in range(2)]
        insert_adapters(model, "pfeiffer")
        fuse_adapters(model, trained)
        found.append(step(model.double() if model is exact else model))
    assert_close(*found)


@pytest.mark.parametrize("kind", [llama, bert, opt, t5])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_a_prefix_has_the_heads_of_the_model(kind, storage):
    torch.manual_seed(0)
    plain = kind()
    expected = prefix_shapes(plain)
    model = make(kind, storage=storage)
    assert prefix_shapes(model) == expected
    peft_kernels.swap_linear(model, "all-linear", 2, alpha=4)
    assert prefix_shapes(model) == expected


def test_a_prefix_of_a_text_trains_afterwards():
    model = make()
    prefix = prefix_for(model, 3)
    init_from_text(model, prefix, torch.tensor([1, 2, 3]))
    add_prefix(model, prefix)
    assert all(grad.any() for grad in step(model))


def _packed(**options):
    model = make(**options)
    with torch.no_grad():
        model(IDS)
    return model


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="bitsandbytes packs no codes here")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_codes_that_were_packed_are_unpacked_and_said(method, nested):
    """Their values are those of before, but for the scales' rounding."""
    model = _packed(nested=nested)
    with pytest.warns(RuntimeWarning, match=r"^14 layers, such as model\.layers\.0\."):
        grow(model, method)
    layer, before = (one.model.layers[1].mlp.down_proj for one in (model, make(nested=nested)))
    before = dequantize(codes_of(before))
    assert (dequantize(codes_of(layer)) - before).norm() < 0.01 * before.norm()
    found = step(model)
    model = _packed(nested=nested)
    with pytest.warns(RuntimeWarning):
        keep_codes(model)
    exact = grow(quantised.dequantised(model, torch.float32), method).double()
    assert_close(found, step(exact))


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="bitsandbytes packs no codes here")
def test_codes_are_packed_again_once_no_adapter_is_left():
    for method, remove in (
        ("pfeiffer", remove_adapters),
        ("prompt", remove_prompt),
        ("prefix", remove_prefix),
    ):
        model = grow(make(), method)
        layer = model.model.layers[0].mlp.up_proj
        assert not layer.support_avx512bf16_for_cpu
        remove(model)
        assert layer.support_avx512bf16_for_cpu


def test_a_layer_of_the_model_itself_stays_a_linear_one():
    assert type(make().lm_head) is nn.Linear


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
def test_a_merged_model_is_loaded_as_it_was_saved(targets, tmp_path):
    """Its layers that are dense now, and those that are in codes still."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    peft_kernels.swap_linear(model, targets, 4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            parameter.data.normal_(std=0.1)
    embeds = model.get_input_embeddings()(IDS).requires_grad_()  # no packed codes
    expected = model(inputs_embeds=embeds).logits
    peft_kernels.unload(model, merge=True)
    model.save_pretrained(tmp_path / "merged")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, device_map="cpu"
    )
    assert type(other.model.layers[0].self_attn.q_proj) is nn.Linear
    in_codes = getattr(other.config, "quantization_config", None) is not None
    assert in_codes is (targets != "all-linear")
    torch.testing.assert_close(other(inputs_embeds=embeds).logits, expected, rtol=1e-4, atol=1e-4)
