"""swap_linear over quantised models, against the same over their values in float64."""

import copy

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels.codes.layers import codes_of
from peft_kernels.nn import LoRALinear, QuantizedLoRALinear
from peft_kernels.ops import dequantize, quantize

quantised = pytest.importorskip("quantised")
bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = torch.arange(12).view(2, 6) % 32


def make(kind="nf4"):
    return quantised.in_codes(quantised.make_plain_llama(), kind)


def swapped(kind="nf4", target_modules="all-linear", **options):
    """A quantised model with adapters, and its values in float64 with the same."""
    model = make(kind)
    exact = quantised.dequantised(model)
    for one in (model, exact):
        torch.manual_seed(1)
        peft_kernels.swap_linear(one, target_modules, 4, alpha=8, **options)
    torch.manual_seed(2)
    for name, layer in exact.named_modules():
        if isinstance(layer, LoRALinear):
            layer.lora_b.data.normal_()
            own = model.get_submodule(name)
            for key in layer.adapter_names:
                getattr(own, key).data.copy_(getattr(layer, key))
    return model, exact


def gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_trains_as_the_values_do(kind):
    model, exact = swapped(kind)
    layers = [one for one in model.modules() if isinstance(one, QuantizedLoRALinear)]
    assert len(layers) == 14  # and the head stays as it is
    torch.testing.assert_close(model(IDS).logits.double(), exact(IDS).logits, rtol=1e-4, atol=1e-4)
    found, expected = gradients(model), gradients(exact)
    assert found.keys() == expected.keys() and len(found) == 28
    for name, grad in found.items():
        torch.testing.assert_close(grad.double(), expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj"]], ids=str)
def test_goes_on_training_after_an_evaluation(target_modules):
    """Which packs the codes in place in bitsandbytes' own layers, and loses the gradient of x."""
    model, exact = swapped(target_modules=target_modules)
    expected = gradients(exact)
    with torch.no_grad():
        model.eval()(IDS)
        with peft_kernels.disabled(model):
            model(IDS)
    for name, grad in gradients(model.train()).items():
        torch.testing.assert_close(grad.double(), expected[name], rtol=1e-3, atol=1e-5)


def test_saves_and_loads_as_any(tmp_path):
    model, exact = swapped(target_modules=["q_proj", "v_proj"])
    peft_kernels.save_adapter(model, tmp_path / "codes")
    peft_kernels.save_adapter(exact.float(), tmp_path / "plain")
    name = "adapter_config.json"
    assert (tmp_path / "codes" / name).read_text() == (tmp_path / "plain" / name).read_text()
    other = peft_kernels.load_adapter(make(), tmp_path / "codes")
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    again = peft_kernels.load_adapter(other, tmp_path / "plain")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_peft_reads_it_over_its_own_layers(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = swapped(target_modules=["q_proj", "v_proj"])
    peft_kernels.save_adapter(model, tmp_path)
    base = make()
    base.is_loaded_in_4bit = True
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert type(theirs.base_model.model.model.layers[0].mlp.up_proj) is bitsandbytes.nn.Linear4bit
    embeds = theirs.get_input_embeddings()(IDS).requires_grad_()  # no packed codes
    found = theirs(inputs_embeds=embeds).logits
    torch.testing.assert_close(found, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_merges_and_says_what_codes_lose(kind):
    model, exact = swapped(kind)
    before = model(IDS).logits
    assert peft_kernels.merge(exact) == {} and peft_kernels.merge(model) == {}
    merged = exact(IDS).logits
    torch.testing.assert_close(model(IDS).logits.double(), merged, rtol=1e-4, atol=1e-4)
    peft_kernels.unmerge(model)
    assert torch.equal(model(IDS).logits, before)
    errors = peft_kernels.merge(model, requantize=True)
    assert len(errors) == 14 and all(0 < error < 0.2 for error in errors.values())
    assert "model.layers.0.self_attn.q_proj" in errors
    assert not torch.equal(model(IDS).logits, before)
    peft_kernels.unmerge(model)
    assert torch.equal(model(IDS).logits, before)


def test_unloads_to_dense_layers_or_to_the_librarys():
    model, _ = swapped()
    expected, merged = model(IDS).logits, copy.deepcopy(model)
    peft_kernels.unload(merged, merge=True)
    layer = merged.model.layers[0].self_attn.q_proj
    assert type(layer) is nn.Linear and layer.weight.shape == (64, 64)
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    plain = peft_kernels.unload(model, merge=False)
    assert type(plain.model.layers[0].self_attn.q_proj) is bitsandbytes.nn.Linear4bit
    assert plain.state_dict().keys() == make().state_dict().keys()


def test_over_torchaos_weights():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    weights = [codes_of(layer) for layer in model]
    peft_kernels.swap_linear(model, ["0", "1"], 4, alpha=8)
    x = torch.randn(3, 64)
    expected = x.double()
    for layer, weight in zip(model, weights, strict=True):
        layer.lora_b.data.normal_()
        values = (dequantize(weight) + 2 * layer.lora_b @ layer.lora_a).double()
        expected = expected @ values.T + layer.bias.double()
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert not any(model.load_state_dict(model.state_dict()))
    peft_kernels.merge(model)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    peft_kernels.unmerge(model)


def test_counts_values_and_not_bytes(capsys):
    model, exact = swapped()
    peft_kernels.print_trainable_parameters(model)
    peft_kernels.print_trainable_parameters(exact)
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda layer: setattr(layer.weight.quant_state, "packing_format_for_cpu", True), "packed"),
        (lambda layer: setattr(layer, "forward", lambda x: x), "forward"),
        (lambda layer: setattr(layer, "_hf_hook", object()), "accelerate"),
    ],
)
def test_names_the_layer_that_can_not_be(spoil, match):
    model = make()
    before = dict(model.named_modules())
    spoil(model.model.layers[1].mlp.up_proj)
    with pytest.raises(TypeError, match=rf"^model\.layers\.1\.mlp\.up_proj .*{match}"):
        peft_kernels.swap_linear(model, "all-linear", 4, alpha=8)
    assert dict(model.named_modules()) == before


def _on_meta(layer):
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.to("meta")


def _of_another_shape(layer):
    layer.weight.quant_state.shape = torch.Size((128, 65))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_on_meta, r"weight\.scales must be on weight\.codes's device cpu; got meta"),
        (_of_another_shape, r"weight\.codes must be 4160 .*\[128, 65\]"),
    ],
)
def test_names_the_layer_whose_tensors_do_not_go_together(spoil, match):
    model = make()
    before = dict(model.named_modules())
    spoil(model.model.layers[1].mlp.up_proj)
    name = r"^model\.layers\.1\.mlp\.up_proj can't be read: "
    with pytest.raises(ValueError, match=name + match):
        peft_kernels.swap_linear(model, "all-linear", 4, alpha=8)
    with pytest.raises(ValueError, match=name + match):
        peft_kernels.AdapterPool.attach(model, "all-linear", capacity=8)
    assert dict(model.named_modules()) == before


def test_over_transformers_floats_of_8_bits():
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(0)
    layers = []
    for _ in range(2):
        found = quantize(torch.randn(128, 128), "fp8", by="block")
        layer = fp8.FP8Linear(128, 128, block_size=(128, 128))
        layer.weight.data = found.codes
        layer.weight_scale_inv.data = found.scales.view(layer.weight_scale_inv.shape)
        layers.append(layer)
    model = nn.Sequential(*layers)
    modules = dict(model.named_modules())
    values = [dequantize(codes_of(layer)).double() for layer in model]
    peft_kernels.swap_linear(model, ["0", "1"], 4, alpha=8)
    x = torch.randn(3, 128)
    expected = x.double()
    for layer, weight in zip(model, values, strict=True):
        layer.lora_b.data.normal_()
        expected = expected @ (weight + 2 * (layer.lora_b @ layer.lora_a).double()).T
    scale = expected.norm()
    assert (model(x).double() - expected).norm() < 1e-5 * scale
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert not any(model.load_state_dict(model.state_dict()))
    peft_kernels.merge(model)
    assert (model(x).double() - expected).norm() < 1e-5 * scale
    with pytest.raises(RuntimeError, match="merged"):
        model[0].merge()
    peft_kernels.unload(model, merge=False)
    assert dict(model.named_modules()) == modules
