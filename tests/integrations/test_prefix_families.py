"""Prefixes in further families, and beside other things that are done to a model."""

import pytest
import torch
from prefix_models import L, assert_close, hidden, inputs_of, make, tokens, transformers

from peft_kernels.integrations.transformers.prefix import (
    add_prefix,
    attention_places,
    init_from_text,
    prefix_for,
    prefix_shapes,
    remove_prefix,
    text_values,
)
from peft_kernels.nn import PrefixTuning

BERT_LIKE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}


def build(name, **options):
    config = getattr(transformers, f"{name}Config")(**(BERT_LIKE | options))
    return getattr(transformers, f"{name}Model")(config).double().eval()


@pytest.mark.parametrize(
    "name,attention",
    [
        ("Bert", "sdpa"),
        ("Bert", "eager"),
        ("Roberta", "sdpa"),
        ("XLMRoberta", "sdpa"),
        ("Electra", "eager"),
    ],
)
def test_berts_family(name, attention):
    model = build(name, attn_implementation=attention)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    inputs = {"input_ids": tokens(2, 5), "attention_mask": mask}
    bare = hidden(model(**inputs))
    add_prefix(model, prefix_for(model, L, std=1.0))
    assert_close(hidden(model(**inputs, prefix_ids=[-1, -1]))[mask.bool()], bare[mask.bool()])
    assert (hidden(model(**inputs)) - bare).abs().amax(-1).min() > 1e-4


def test_relative_positions_are_not_taken():
    model = build("Bert", position_embedding_type="relative_key")
    if not hasattr(model.encoder.layer[0].attention.self, "position_embedding_type"):
        pytest.skip("this transformers' BERT has absolute positions alone")
    with pytest.raises(ValueError, match="no attention module that can take a prefix; got BertM"):
        attention_places(model)


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_decoders_with_cross_attention(name):
    sizes = {"is_decoder": True} if name == "Bert" else {"n_embd": 16, "n_layer": 2, "n_head": 2}
    model = build(name, add_cross_attention=True, **sizes)
    assert prefix_shapes(model) == {"self": [(2, 8)] * 2, "cross": [(2, 8)] * 2}
    inputs = {
        "input_ids": tokens(2, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16, dtype=torch.float64),
        "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]),
    }
    bare = hidden(model(**inputs))
    prefix = prefix_for(model, L, std=1.0)
    add_prefix(model, prefix)
    assert_close(hidden(model(**inputs, prefix_ids=[-1, -1])), bare)
    hidden(model(**inputs)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in prefix.parameters())


def test_a_t5_encoder_by_itself():
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=4
    )
    model = transformers.T5EncoderModel(config).eval()
    assert prefix_shapes(model) == {"self": [(4, 8)] * 2}
    add_prefix(model, prefix_for(model, L))
    assert hidden(model(tokens(2, 4))).shape == (2, 4, 16)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0, 1], [1]])
def test_a_t5_prefix_of_real_text_before_the_text(layers):
    """With the relative positions counting it, a text's keys and values are the text itself."""
    model = transformers.T5EncoderModel(make("t5").config).double().eval()
    ids, rest = tokens(1, L), tokens(2, 4)
    shape = prefix_shapes(model)["self"]
    prefix = PrefixTuning(L, [s if i in layers else None for i, s in enumerate(shape)]).double()
    init_from_text(model, prefix, ids)
    kept = text_values(model, input_ids=ids)["self"]
    add_prefix(model, prefix, shift_positions=True)
    found = hidden(model(rest))
    assert_close(hidden(model(torch.cat([rest, rest]), prefix_ids=[0, 0, -1, -1]))[:2], found)
    remove_prefix(model)
    # By hand, with the keys and values that were kept before those of the text.
    attention = [block.layer[0].SelfAttention for block in model.encoder.block]
    bias = attention[0].compute_bias(L + 4, L + 4)[:, :, L:]
    x = model.shared(rest)
    for index, block in enumerate(model.encoder.block):
        module, h = attention[index], block.layer[0].layer_norm(x)
        q, k, v = (
            linear(h).unflatten(-1, (4, 8)).transpose(1, 2)
            for linear in (module.q, module.k, module.v)
        )
        own = bias if index in layers else bias[..., L:]
        if index in layers:
            k, v = (
                torch.cat([p.expand(2, -1, -1, -1), t], 2)
                for p, t in zip(kept[index], (k, v), strict=True)
            )
        out = torch.softmax(q @ k.mT + own, -1) @ v
        x = block.layer[1](x + module.o(out.transpose(1, 2).flatten(2)))
    assert_close(found, model.encoder.final_layer_norm(x))


def test_a_trained_relative_position_bias_keeps_its_gradient():
    model, inputs = make("t5"), inputs_of("t5")
    add_prefix(model, prefix_for(model, L))
    plain = hidden(model(**inputs))
    biases = [p for n, p in model.named_parameters() if "relative_attention_bias" in n]
    for weight in biases:
        weight.requires_grad_()
    out = hidden(model(**inputs))
    assert_close(out, plain, 1e-6)
    out.square().sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in biases)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled(name):
    model, ids = make(name), tokens(2, 6)
    add_prefix(model, prefix_for(model, L, std=1.0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    made = []
    for m in (model, torch.compile(model, backend="aot_eager")):
        out = m(ids, attention_mask=mask).logits
        made.append(
            (out, *torch.autograd.grad(out.square().mean(), model.prefix_tuning.parameters()))
        )
    for a, b in zip(*made, strict=True):
        assert_close(a, b)


def test_in_a_peft_model_beside_lora():
    peft = pytest.importorskip("peft")
    base, inputs = make("llama"), inputs_of("llama")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    bare = hidden(model(**inputs))
    add_prefix(model, prefix_for(model, L, std=1.0))
    assert (hidden(model(**inputs)) - bare).abs().max() > 1e-3
    assert_close(hidden(model(**inputs, prefix_ids=[-1, -1])), bare)
    assert model.generate(**inputs, max_new_tokens=2, pad_token_id=0).shape[0] == 2
    remove_prefix(model)
    assert torch.equal(hidden(model(**inputs)), bare)
    assert base.config._attn_implementation == "sdpa"


def test_given_to_the_inner_model():
    model, inputs = make("llama"), inputs_of("llama")
    bare = hidden(model(**inputs))
    add_prefix(model.model, prefix_for(model.model, L, std=1.0))
    assert (hidden(model(**inputs)) - bare).abs().max() > 1e-3
    remove_prefix(model.model)
    assert torch.equal(hidden(model(**inputs)), bare)


def test_autocast():
    model, inputs = make("llama", torch.float32), inputs_of("llama")
    prefix = prefix_for(model, L)
    add_prefix(model, prefix)
    exact = hidden(model(**inputs))
    with torch.autocast("cpu", torch.bfloat16):
        out = hidden(model(**inputs))
    assert 0 < (out - exact).norm() < 0.03 * exact.norm()
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in prefix.parameters())
