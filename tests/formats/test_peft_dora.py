"""Folders with PEFT's DoRA adapters: read, written and refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_gpt2, make_llama

from peft_kernels import AdapterPool, load_adapter, merge, save_adapter, swap_linear, unload

IDS = torch.arange(14).view(2, 7)
TARGETS = {make_llama: ["q_proj", "down_proj"], make_gpt2: ["c_attn", "c_proj"]}


def fresh(make):
    torch.manual_seed(0)
    return make().eval()


def theirs(make, folder, **options):
    """A trained adapter of PEFT's in the folder, and its logits."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS[make], **options
    )
    model = peft.get_peft_model(fresh(make), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return model.eval()(IDS).logits


@pytest.mark.parametrize("make", TARGETS)
def test_their_folder_is_read(make, tmp_path):
    expected = theirs(make, tmp_path, rank_pattern={TARGETS[make][0]: 3}, use_rslora=True)
    model = load_adapter(fresh(make), tmp_path).eval()
    assert (expected - fresh(make)(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(model(IDS).logits, expected)
    merge(model)
    torch.testing.assert_close(model(IDS).logits, expected)
    torch.testing.assert_close(unload(model, merge=True)(IDS).logits, expected)


@pytest.mark.parametrize("make", TARGETS)
def test_our_folder_is_read_by_them_and_by_us(make, tmp_path):
    model = swap_linear(fresh(make), TARGETS[make], 4, alpha=6, use_dora=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = model(IDS).logits
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh(make), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected)
    other = swap_linear(fresh(make), TARGETS[make], 4, alpha=1, use_dora=True)
    assert torch.equal(load_adapter(other, tmp_path).eval()(IDS).logits, expected)


def test_a_model_of_another_kind_of_layers_refuses_it(tmp_path):
    theirs(make_llama, tmp_path)
    model = swap_linear(fresh(make_llama), TARGETS[make_llama], 4, alpha=6)
    before = model(IDS).logits
    with pytest.raises(ValueError, match="use_dora=False, and the adapter was trained with use_d"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: t.pop(key), "must have a lora_magnitude_vector just where use_dora"),
        (lambda t, key: t.update({key: t[key][:-1].clone()}), "lora_magnitude_vector must be"),
    ],
    ids=["lacks one", "another width"],
)
def test_files_that_do_not_fit_are_refused(change, message, tmp_path):
    theirs(make_llama, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, next(key for key in tensors if "magnitude" in key))
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        load_adapter(fresh(make_llama), tmp_path)


def test_magnitudes_without_use_dora_are_refused(tmp_path):
    theirs(make_llama, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": False}))
    with pytest.raises(ValueError, match="it has one, and use_dora is False"):
        load_adapter(fresh(make_llama), tmp_path)


def test_a_pool_refuses_it(tmp_path):
    theirs(make_llama, tmp_path)
    pool = AdapterPool.attach(fresh(make_llama), TARGETS[make_llama], capacity=64)
    with pytest.raises(ValueError, match="'a' was trained with use_dora"):
        pool.load("a", tmp_path)


def test_a_folder_is_of_one_kind(tmp_path):
    model = swap_linear(fresh(make_llama), ["q_proj"], 4, alpha=6, use_dora=True)
    swap_linear(model, ["down_proj"], 4, alpha=6)
    with pytest.raises(ValueError, match="use_dora must be on in all"):
        save_adapter(model, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
