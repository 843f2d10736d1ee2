"""save_lora_gguf: read back by the gguf package, and applied as llama.cpp applies it."""

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels import save_lora_gguf, swap_linear
from peft_kernels.nn import QuantizedLinear

peft = pytest.importorskip("peft")
from gguf_files import gguf, make_model, transformers, write_gguf  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
IDS = torch.tensor([[3, 14, 15, 92, 6, 5, 35]])


def with_lora(model, **options):
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **options})).eval()


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.from_numpy(t.data.copy()).float() for t in reader.tensors}


def merged_in_the_file(model_path, lora_path, out):
    """The model's file with the adapter in its weights, by what llama.cpp's own loader does."""
    fields, adapter = read(lora_path)
    reader = gguf.GGUFReader(model_path, "c")
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0])
    used = set()
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if f"{tensor.name}.lora_a" in adapter:
            a, b = (adapter[f"{tensor.name}.lora_{one}"] for one in "ab")
            # Rows as ne[1] has them, and the rank as ne[0] of B: llama-adapter.cpp.
            assert a.shape[1] == weight.shape[1] and b.shape[0] == weight.shape[0]
            weight = weight + fields["adapter.lora.alpha"] / b.shape[1] * (b @ a)
            used |= {f"{tensor.name}.lora_a", f"{tensor.name}.lora_b"}
        writer.add_tensor(tensor.name, weight.numpy())
    assert used == set(adapter)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def logits_of(path):
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}}],
    ids=str,
)
def test_llama_cpp_adds_what_peft_adds(tmp_path, options):
    path = write_gguf(tmp_path / "model.gguf", make_model(), "Q8_0")
    tuned = with_lora(peft_kernels.load_gguf(make_model(), path), **options)
    peft_kernels.accelerate(tuned)
    save_lora_gguf(tuned, tmp_path / "lora.gguf")
    fields, tensors = read(tmp_path / "lora.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and len(tensors) == 2 * (2 * 7 + 1)
    whole = merged_in_the_file(path, tmp_path / "lora.gguf", tmp_path / "merged.gguf")
    with torch.no_grad():
        expected, plain = tuned(IDS).logits, tuned.unload()(IDS).logits
    torch.testing.assert_close(logits_of(whole), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).norm() > 0.1 * expected.norm()


def test_our_own_layers_and_the_values_of_the_file(tmp_path):
    model = swap_linear(make_model(), ["q_proj", "up_proj"], 4, alpha=8)
    layer = model.model.layers[1].mlp.up_proj
    nn.init.normal_(layer.lora_b)
    save_lora_gguf(model, tmp_path / "deep" / "lora.gguf", dtype=torch.float16)
    fields, tensors = read(tmp_path / "deep" / "lora.gguf")
    assert fields["adapter.lora.alpha"] == 8.0 and len(tensors) == 2 * 4
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_a"], layer.lora_a.half().float())
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_b"], layer.lora_b.half().float())
    assert not list((tmp_path / "deep").glob(".saving*"))


def test_an_adapter_by_its_name(tmp_path):
    tuned = with_lora(make_model())
    tuned.add_adapter("other", peft.LoraConfig(r=3, target_modules=["up_proj"]))
    save_lora_gguf(tuned, tmp_path / "lora.gguf", adapter="other")
    tensors = read(tmp_path / "lora.gguf")[1]
    assert {t.shape[0] for n, t in tensors.items() if n.endswith("_a")} == {3}
    with pytest.raises(ValueError, match="LoRA layers with an adapter 'third'; it has none"):
        save_lora_gguf(tuned, tmp_path / "lora.gguf", adapter="third")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "has DoRA or another variant"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "q_proj has a bias of B"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens has embeddings"),
        ({"modules_to_save": ["norm"], "target_modules": ["q_proj"]}, "norm is trained whole"),
    ],
    ids=str,
)
def test_what_the_format_has_no_place_for(tmp_path, options, message):
    tuned = with_lora(make_model(), **options)
    with pytest.raises(ValueError, match=message):
        save_lora_gguf(tuned, tmp_path / "lora.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tied_head(tmp_path):
    """Of which llama.cpp knows the embeddings alone."""
    tuned = with_lora(make_model(tied=True), target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head is tied to the embeddings"):
        save_lora_gguf(tuned, tmp_path / "lora.gguf")


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match=r"float32 or float16; got torch\.bfloat16"):
        save_lora_gguf(with_lora(make_model()), tmp_path / "x", dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="one of transformers'; got QuantizedLinear"):
        save_lora_gguf(QuantizedLinear.from_linear(nn.Linear(32, 2)), tmp_path / "x")
    own = swap_linear(make_model(), ["q_proj"], 4, alpha=4, use_dora=True)
    with pytest.raises(ValueError, match="q_proj has DoRA"):
        save_lora_gguf(own, tmp_path / "x")
