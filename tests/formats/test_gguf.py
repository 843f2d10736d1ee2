"""load_gguf: a file's bytes under linear layers, and the logits that transformers has of them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from gguf_files import gguf, make_model, smollm2, transformers, write_gguf
from torch import nn

from peft_kernels import load_gguf, quantize_linear
from peft_kernels.nn import QuantizedEmbedding, QuantizedLinear

IDS = torch.tensor([[3, 14, 15, 92, 6, 5, 35], [8, 9, 7, 9, 3, 2, 3]])
PROJECTIONS = 7
OUTER = ("lm_head", "model.embed_tokens")


def theirs_of(path):
    """The model as transformers reads it, every weight dequantised."""
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def quantised_in(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize(
    ("kind", "linear", "hidden"),
    [
        ("llama", "Q8_0", 64),
        ("llama", "Q4_0", 64),
        ("llama", "Q4_1", 64),
        ("llama", "Q4_K", 256),
        ("llama", "Q6_K", 256),
        ("mistral", "Q8_0", 64),
        ("qwen2", "Q8_0", 64),
        ("qwen3", "Q4_1", 64),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_weights_dequantised(tmp_path, kind, linear, hidden, tied):
    # Of a qwen3's file transformers doesn't read how wide heads are.
    model = make_model(kind, hidden, tied, **({"head_dim": 128} if kind == "qwen3" else {}))
    path = write_gguf(tmp_path / "model.gguf", model, linear)
    load_gguf(model, path)
    assert len(quantised_in(model)) == 2 * PROJECTIONS + (not tied)
    plain = theirs_of(path)
    with torch.no_grad():
        found, eager = model(IDS).logits, plain(IDS).logits
        exact = plain.double()(IDS).logits
    error, limit = (found - exact).norm(), (eager - exact).norm()
    assert exact.std() > 0.1 and error <= 1.5 * limit + 1e-6 * exact.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_in_codes(tmp_path, tied):
    path = write_gguf(tmp_path / "model.gguf", make_model(tied=tied), "Q4_0", "Q8_0")
    model = load_gguf(make_model(tied=tied), path, embeddings="codes")
    floats = load_gguf(make_model(tied=tied), path)
    assert type(model.model.embed_tokens) is QuantizedEmbedding
    assert type(model.lm_head) is QuantizedLinear
    floats_left = [n for n, p in model.named_parameters() if p.is_floating_point()]
    assert floats_left and all("norm" in name for name in floats_left)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        with torch.no_grad():
            torch.testing.assert_close(one(IDS).logits, floats(IDS).logits)
        codes = [one.get_submodule(name).quantized.codes.data_ptr() for name in OUTER]
        assert (codes[0] == codes[1]) is tied
    with pytest.raises(TypeError, match="can't be written"):
        model.lm_head.weight = nn.Parameter(torch.zeros(96, 64))
    with torch.no_grad():
        said = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(
            said, floats.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        )


def test_biases_of_a_llama_are_in_order_too(tmp_path):
    saved = make_model("llama", attention_bias=True)
    path = write_gguf(tmp_path / "model.gguf", saved, "F32", "F32")
    loaded = load_gguf(make_model("llama", attention_bias=True).apply(_forget), path)
    for (name, found), expected in zip(loaded.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(found, expected), name


def _forget(module):
    for parameter in module._parameters.values():
        if parameter is not None:
            nn.init.zeros_(parameter)


def test_codes_are_the_bytes_of_the_file(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(), "Q4_0")
    before = path.read_bytes()
    model = load_gguf(make_model(), path)
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    layer = model.model.layers[1].mlp.down_proj
    assert np.array_equal(layer.quantized.codes.numpy(), tensors["blk.1.ffn_down.weight"])
    layer.quantized.codes.zero_()  # its own, as soon as it is written
    assert path.read_bytes() == before


def test_a_model_without_memory(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(tied=True))
    with torch.device("meta"):
        bare = make_model(tied=True)
    with pytest.raises(ValueError, match="inv_freq on the meta device"):
        load_gguf(bare, path)
    for name, buffer in make_model(tied=True).named_buffers():
        owner, own = name.rsplit(".", 1)
        bare.get_submodule(owner)._buffers[own] = buffer
    for module in bare.modules():  # as within init_empty_weights()
        for own, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[own] = nn.Parameter(parameter.detach().clone())
    load_gguf(bare.bfloat16(), path)
    assert bare.lm_head.weight is bare.model.embed_tokens.weight
    assert {p.dtype for p in bare.parameters()} == {torch.bfloat16, torch.uint8}
    whole = load_gguf(make_model(tied=True), path)
    with torch.no_grad():
        found, expected = bare.float()(IDS).logits, whole(IDS).logits
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_in_inference_mode(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model())
    model = make_model()
    with torch.inference_mode():
        load_gguf(model, path)
    x = model.model.embed_tokens(IDS).detach().requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad.norm() > 0


def test_a_model_without_a_head(tmp_path):
    whole = make_model()
    path = write_gguf(tmp_path / "model.gguf", whole)
    load_gguf(whole, path)
    base = load_gguf(make_model().model, path)
    with torch.no_grad():
        found = base(IDS).last_hidden_state
        torch.testing.assert_close(whole.lm_head(found), whole(IDS).logits)


@pytest.mark.parametrize("mmap", [True, False])
def test_copies_pickles_and_state_dicts(tmp_path, mmap):
    path = write_gguf(tmp_path / "model.gguf", make_model(), "Q4_1")
    model = load_gguf(make_model(), path, mmap=mmap)
    with torch.no_grad():
        expected = model(IDS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(IDS).logits, expected)
        for layer in quantised_in(other).values():
            layer.quantized.codes.zero_()
        assert not torch.equal(other(IDS).logits, expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(IDS).logits, expected)


@pytest.mark.parametrize("embeddings", ["floats", "codes"])
@pytest.mark.parametrize("quantise", [False, True], ids=["file", "int8"])
def test_transformers_does_not_take_codes_for_values(tmp_path, embeddings, quantise):
    """Of int8 there are as many as of values."""
    path = write_gguf(tmp_path / "model.gguf", make_model(tied=True))
    model = make_model(tied=True)
    if quantise:
        quantize_linear(model, kind="int8")
    else:
        load_gguf(model, path, embeddings=embeddings)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_formats_that_do_not_stay_in_codes(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(), "Q5_0", "F16")
    model = make_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"output.weight|blk.0.attn_q.weight.* in Q5_0"):
        load_gguf(model, path)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    load_gguf(model, path, others="dequantize")
    assert not quantised_in(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs_of(path)(IDS).logits)


@pytest.mark.parametrize(
    ("fields", "more", "message"),
    [
        ({"head_count": 2}, {}, "head_count is 2, and the config's num_attention_heads is 4"),
        ({"rope_freq_base": 500.0}, {}, "rope_theta"),
        ({"type": "adapter"}, {}, "it is an adapter of the architecture llama"),
        ({"uint16": ("split.count", 3)}, {}, "one of 3 parts: llama-gguf-split --merge first"),
        ({}, {"rope_freqs.weight": np.ones(8, np.float32)}, "give it the rope_scaling"),
        ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "for which the model has no place"),
    ],
    ids=str,
)
def test_files_of_other_models(tmp_path, fields, more, message):
    path = write_gguf(tmp_path / "model.gguf", make_model(), fields=fields, more=more)
    with pytest.raises(ValueError, match=message):
        load_gguf(make_model(), path)


def test_other_models(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model())
    with pytest.raises(ValueError, match="must be a model of the architecture qwen2"):
        load_gguf(make_model("qwen2"), path)
    with pytest.raises(ValueError, match=r"lacks \['model.layers.0.self_attn.q_proj.bias'"):
        load_gguf(make_model(attention_bias=True), path)
    with pytest.raises(ValueError, match=r"\[128, 64\], and .*gate_proj.weight is \[96, 64\]"):
        load_gguf(make_model(intermediate_size=96), path)
    with pytest.raises(TypeError, match="one of transformers'; got Linear"):
        load_gguf(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="of the type llama, mistral, qwen2, qwen3; got gpt2"):
        config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)
        load_gguf(transformers.GPT2LMHeadModel(config), path)
    tied = write_gguf(tmp_path / "tied.gguf", make_model(tied=True))
    with pytest.raises(ValueError, match="set tie_word_embeddings"):
        load_gguf(make_model(), tied)
    with pytest.raises(ValueError, match="others must be one of"):
        load_gguf(make_model(), path, others="skip")


@pytest.mark.long
def test_smollm2_says_what_it_says_in_transformers():
    """Its linear layers are in Q4_1, its embeddings in Q8_0."""
    path = smollm2()
    plain = theirs_of(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(plain.config).eval()
    load_gguf(model, path)
    assert len(quantised_in(model)) == 30 * PROJECTIONS
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits, expected = model(ids).logits, plain(ids).logits
        assert (logits - expected).norm() < 1e-5 * expected.norm()
        said = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=2)
    assert tokenizer.decode(said[0]).endswith("Paris.")
