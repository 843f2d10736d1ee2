"""Prefixes in the encoders that people use, and in decoders with shapes of their own."""

import copy

import pytest
import torch
from prefix_models import L, assert_close, hidden, tokens, transformers

from peft_kernels.integrations.transformers.prefix import (
    add_prefix,
    attention_places,
    init_from_text,
    prefix_for,
    prefix_shapes,
    remove_prefix,
)

peft = pytest.importorskip("peft")
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}


def build(name, kind="Model", **options):
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    model = getattr(transformers, f"{name}{kind}")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("name", ["Bert", "Roberta", "XLMRoberta", "Camembert"])
def test_shifted_positions_are_pefts(name):
    model, ids = build(name), tokens(2, 6)
    ids[1, 4:] = 1
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=L)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.prompt_encoder.double()
    prefix = prefix_for(model, L)
    prefix.fit(prefix.from_table(theirs.prompt_encoder["default"].embedding.weight.detach()))
    expected, real = hidden(theirs(**inputs)), ids != 1
    add_prefix(model, prefix, shift_positions=True)
    assert_close(hidden(model(**inputs))[real], expected[real])
    remove_prefix(model)
    add_prefix(model, prefix)
    assert (hidden(model(**inputs))[real] - expected[real]).abs().max() > 1e-2


def test_shifted_positions_of_rows_without_a_prefix_and_of_the_user():
    model, ids = build("Roberta"), tokens(2, 6)
    bare = hidden(model(ids))
    add_prefix(model, prefix_for(model, L, std=1.0), shift_positions=True)
    assert_close(hidden(model(ids, prefix_ids=[-1, -1])), bare)
    positions = torch.arange(2, 8).expand(2, -1)
    assert_close(hidden(model(ids, position_ids=positions)), hidden(model(ids)))
    embeddings = model.embeddings.word_embeddings(ids)
    assert_close(hidden(model(inputs_embeds=embeddings)), hidden(model(ids)))
    with pytest.raises(ValueError, match="the text's positions reach 40 after the prefix"):
        model(tokens(1, 36))


def prepending(linear, rows):
    """Has a projection give a prefix' rows before the text's, as if they were tokens'."""

    def hook(module, args, out):
        return torch.cat([rows.expand(out.shape[0], -1, -1), out], 1)

    linear.register_forward_hook(hook)


def attends_with(model, pairs):
    """Has a model's attention be the formula with keys and values concatenated; no mask."""
    of_module = dict(zip((p.module for p in attention_places(model)), pairs, strict=True))

    def function(module, q, k, v, mask, scaling=None, **kwargs):
        before = [x.detach().expand(q.shape[0], -1, -1, -1) for x in of_module[module]]
        scores = scaling * q @ torch.cat([before[0], k], 2).mT
        out = torch.softmax(scores, -1) @ torch.cat([before[1], v], 2)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("concatenated", function)
    model.set_attn_implementation("concatenated")


def test_vit():
    sizes = SIZES | {"image_size": 8, "patch_size": 4}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes)).double().eval()
    expected, inputs = copy.deepcopy(model), {"pixel_values": torch.randn(2, 3, 8, 8).double()}
    bare = hidden(expected(**inputs))
    prefix = prefix_for(model, L, std=1.0)
    add_prefix(model, prefix)
    assert prefix_shapes(model) == {"self": [(2, 8)] * 2}
    attends_with(expected, prefix()["self"])
    found = hidden(model(**inputs))
    assert_close(found, hidden(expected(**inputs)), 1e-6)
    assert (found - bare).abs().max() > 1e-3
    found.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in prefix.parameters())


def test_alberts_layers_share_their_prefix():
    model, ids = build("Albert", num_hidden_layers=3), tokens(2, 5)
    expected = copy.deepcopy(model)
    bare = hidden(model(ids))
    prefix = prefix_for(model, L, std=1.0)
    add_prefix(model, prefix)
    assert prefix_shapes(model) == {"self": [(2, 8)]}
    (pair,) = prefix()["self"]
    attention = attention_places(expected)[0].module
    if hasattr(attention, "config"):
        attends_with(expected, [pair])
    else:  # transformers 4's, which has no function to replace, and reshapes to any length
        attention.__class__ = transformers.models.albert.modeling_albert.AlbertAttention
        for name, x in zip(("key", "value"), pair, strict=True):
            prepending(getattr(attention, name), x.transpose(0, 1).flatten(1)[None].detach())
        forward = type(attention).forward
        attention.forward = lambda states, *args, **kwargs: forward(attention, states, None)
    found = hidden(model(ids))
    assert (found - bare).abs().max() > 1e-3
    assert_close(found, hidden(expected(ids)), 1e-6)
    with pytest.raises(ValueError, match="attends more than once in a forward"):
        init_from_text(model, prefix, ids[0])


@pytest.mark.parametrize("name", ["DistilBert", "Albert", "MPNet", "ModernBert"])
def test_gradients_masks_and_rows_without_a_prefix(name):
    model, ids = build(name, reference_compile=False), tokens(2, 5)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    bare = hidden(model(ids, attention_mask=mask))
    prefix = prefix_for(model, L, std=1.0, tasks=2)
    add_prefix(model, prefix)
    real = mask.bool()
    found = hidden(model(ids, attention_mask=mask, prefix_ids=[-1, -1]))
    assert_close(found[real], bare[real], 1e-6)
    found = hidden(model(ids, attention_mask=mask, prefix_ids=[1, -1]))
    assert_close(found[1, :3], bare[1, :3], 1e-6)
    assert (found[0] - bare[0]).abs().amax(-1).min() > 1e-4
    found.square().sum().backward()
    assert all((p.grad[1].abs().max() > 0) & (p.grad[0] == 0).all() for p in prefix.parameters())
    remove_prefix(model)
    assert torch.equal(hidden(model(ids, attention_mask=mask)), bare)


@pytest.mark.parametrize("name", ["Deberta", "DebertaV2"])
def test_disentangled_attention_says_why_not(name):
    model = build(name, relative_attention=True, position_biased_input=False)
    with pytest.raises(ValueError, match="scores each key by its distance too"):
        prefix_for(model, L)


def test_shapes_of_decoders():
    grouped = build("Phi3", "ForCausalLM", num_attention_heads=4, num_key_value_heads=2)
    assert prefix_shapes(grouped) == {"self": [(2, 4)] * 2}
    config = transformers.GPTBigCodeConfig(
        vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16, multi_query=True
    )
    assert prefix_shapes(transformers.GPTBigCodeModel(config)) == {"self": [(1, 4)] * 2}
    doge = build("Doge", "ForCausalLM", num_key_value_heads=1)
    with pytest.raises(ValueError, match="DogeAttention masks keys by their values"):
        prefix_for(doge, L)
