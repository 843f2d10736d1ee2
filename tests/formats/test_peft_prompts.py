"""save_prompt and load_prompt against Hugging Face PEFT itself: files both ways."""

import copy
import json
import os
import warnings

import pytest
import torch
from peft_prompt_models import (
    IDS,
    MASK,
    D,
    L,
    assert_close,
    bare,
    base,
    cases,
    config_of,
    make_classifier,
    make_gpt2,
    make_llama,
    our_logits,
    ours,
    out_of,
    peft,
    tensors_of,
    their_logits,
    theirs,
)
from tiny_models import transformers
from torch import nn

from peft_kernels.formats.peft_prompts.folder import load_prompt, save_prompt
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for, remove_prefix
from peft_kernels.nn import PrefixTuning, PromptTuning, Template
from peft_kernels.nn._template import Input, Slots


@pytest.fixture(autouse=True)
def strict():
    """PEFT warns of unknown config keys, and of keys that are missing from the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="for MLP, the argument")
        warnings.filterwarnings("ignore", message=".*past_key_values.*tuple")
        yield


# ---- both ways -------------------------------------------------------------------------------


@cases
def test_theirs_loads_in_ours(tmp_path, make, method):
    dtype = torch.float64 if method == "lstm" else torch.float32  # its rounding depends on its rows
    model = theirs(make, method).to(dtype)
    expected = their_logits(model, make, method)
    model.save_pretrained(tmp_path)
    host = base(make).to(dtype)
    module = load_prompt(tmp_path, model=host)
    assert all(p.requires_grad for p in module.parameters())
    assert_close(our_logits(host, module, make, method), expected, bare(make, method))


@cases
def test_ours_loads_in_theirs(tmp_path, make, method):
    host, module = base(make), ours(make, method)
    if make is make_classifier:
        nn.init.normal_(host.classifier.weight)
    expected = our_logits(host, module, make, method)
    save_prompt(tmp_path, module, model=host)
    loaded = peft.PeftModel.from_pretrained(base(make), tmp_path).eval()
    assert_close(their_logits(loaded, make, method), expected, bare(make, method))


@torch.no_grad()
@pytest.mark.parametrize("make", [make_classifier, make_llama])
def test_a_prefix_that_leaves_positions_alone_is_said_to_be_another_in_peft(tmp_path, make):
    host, module = base(make), ours(make, "prefix")
    add_prefix(host, module, shift_positions=False)
    expected = out_of(host(IDS, attention_mask=MASK))
    with pytest.warns(UserWarning, match="PEFT will compute something else.*shift_positions=True"):
        save_prompt(tmp_path, module, model=host)
    loaded = peft.PeftModel.from_pretrained(base(make), tmp_path).eval()
    assert (their_logits(loaded, make, "prefix") - expected).abs().max() > 1e-3
    add_prefix(host, remove_prefix(host), shift_positions=True)
    expected = out_of(host(IDS, attention_mask=MASK))
    save_prompt(tmp_path, module, model=host)  # a warning is an error here
    loaded = peft.PeftModel.from_pretrained(base(make), tmp_path).eval()
    assert_close(their_logits(loaded, make, "prefix"), expected, bare(make, "prefix"))


def make_windowed():
    config = transformers.MistralConfig(**make_llama().config.to_diff_dict(), sliding_window=4)
    return transformers.MistralForCausalLM(config)


def test_a_window_is_said_to_cut_the_prefix_in_peft(tmp_path):
    torch.manual_seed(0)
    host = make_windowed().eval()
    prefix = prefix_for(host, 5, std=1.0)
    add_prefix(host, prefix)  # a warning is an error here
    with pytest.warns(UserWarning, match="window of 4.*PEFT will compute something else"):
        save_prompt(tmp_path, prefix, model=host)
    expected = host(IDS).logits
    remove_prefix(host)
    loaded = load_prompt(tmp_path, model=host)
    with pytest.warns(UserWarning, match="window of 4.*If PEFT trained"):
        add_prefix(host, loaded)
    torch.testing.assert_close(host(IDS).logits, expected)
    remove_prefix(host)
    theirs = peft.PeftModel.from_pretrained(host, tmp_path).eval()
    assert (theirs(IDS).logits - expected).abs().max() > 1e-3
    whole = make_llama()
    save_prompt(tmp_path, prefix_for(whole, 5), model=whole)
    add_prefix(whole, load_prompt(tmp_path, model=whole))


@cases
def test_config_is_as_theirs(tmp_path, make, method):
    theirs(make, method).save_pretrained(tmp_path / "theirs")
    save_prompt(tmp_path / "ours", ours(make, method), model=base(make))
    expected = config_of(tmp_path / "theirs")
    if expected["modules_to_save"]:  # they have each name twice
        expected["modules_to_save"] = ["classifier", "score"]
    if method in ("prompt", "lstm"):  # the rows that nothing reads aren't written
        expected["num_transformer_submodules"] = 1
    if method.startswith("prefix"):  # of an encoder that is folded in
        expected |= {"prefix_projection": False, "encoder_hidden_size": expected["token_dim"]}
    text = (tmp_path / "ours" / "adapter_config.json").read_text()
    assert text == json.dumps(expected, indent=2, sort_keys=True)
    assert sorted(os.listdir(tmp_path / "ours")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@cases
def test_there_and_back_is_the_same_file(tmp_path, make, method):
    host = base(make)
    save_prompt(tmp_path / "ours", ours(make, method), model=host)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(host), tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    save_prompt(tmp_path / "again", load_prompt(tmp_path / "theirs", model=host), model=host)
    first, again = (tensors_of(tmp_path / folder) for folder in ("ours", "again"))
    assert first.keys() == again.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, again[key]), key


@pytest.mark.parametrize("method", ["prompt", "multitask", "p_tuning", "prefix"])
def test_without_a_model(tmp_path, method):
    module = ours(make_llama, method)
    save_prompt(tmp_path, module, task_type="CAUSAL_LM", base_model_name_or_path="a/b")
    assert config_of(tmp_path)["base_model_name_or_path"] == "a/b"
    host, loaded = base(make_llama), load_prompt(tmp_path)
    expected = our_logits(host, module, make_llama, method)
    assert torch.equal(our_logits(host, loaded, make_llama, method), expected)
    their = peft.PeftModel.from_pretrained(base(make_llama), tmp_path).eval()
    assert_close(their_logits(their, make_llama, method), expected, bare(make_llama, method))


# ---- what of it is written -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"tasks": 3}, {"ensemble": 3}, {"tasks": 3, "rank": 2}])
def test_one_of_several_prompts(tmp_path, options):
    module = PromptTuning(L, D, init="normal", **options)
    if "rank" not in options:
        with pytest.raises(ValueError, match="task must say which of 3"):
            save_prompt(tmp_path / "none", module, task_type="CAUSAL_LM")
        assert not (tmp_path / "none").exists()
    save_prompt(tmp_path, module, task=2, task_type="CAUSAL_LM")
    assert config_of(tmp_path)["peft_type"] == "PROMPT_TUNING"
    assert torch.equal(load_prompt(tmp_path).prompts()[0], module.prompts()[2])


def test_one_prefix_of_a_bank(tmp_path):
    module = PrefixTuning(L, [(2, 4)] * 2, tasks=3)
    with pytest.raises(ValueError, match="task must say which of 3"):
        save_prompt(tmp_path, module, task_type="CAUSAL_LM")
    save_prompt(tmp_path, module, task=1, task_type="CAUSAL_LM")
    loaded = load_prompt(tmp_path)
    assert loaded.layers == module.layers
    for pair, bank in zip(loaded()["self"], module()["self"], strict=True):
        assert all(torch.equal(x, y[1]) for x, y in zip(pair, bank, strict=True))
    for task in (-1, 3):
        with pytest.raises(ValueError, match=rf"task must be in \[0, 3\); got {task}"):
            save_prompt(tmp_path, module, task=task, task_type="CAUSAL_LM")


def test_dropout_is_not_written(tmp_path):
    module = PrefixTuning(L, [(2, 4)] * 2, dropout=0.5).train()
    save_prompt(tmp_path, module, task_type="CAUSAL_LM")
    assert torch.equal(tensors_of(tmp_path)["prompt_embeddings"], module.table()[0])


def test_modules_to_save(tmp_path):
    host, module = base(make_llama), ours(make_llama, "prompt")
    nn.init.normal_(host.lm_head.weight)
    save_prompt(tmp_path, module, model=host, modules_to_save=["lm_head"])
    assert config_of(tmp_path)["modules_to_save"] == ["lm_head"]
    loaded = peft.PeftModel.from_pretrained(base(make_llama), tmp_path).eval()
    expected = our_logits(host, module, make_llama, "prompt")
    assert_close(their_logits(loaded, make_llama, "prompt"), expected, bare(make_llama, "prompt"))
    again = base(make_llama)
    load_prompt(tmp_path, model=again)
    assert torch.equal(again.lm_head.weight, host.lm_head.weight)


def test_dtype_and_template(tmp_path):
    save_prompt(tmp_path, ours(make_gpt2, "p_tuning").bfloat16(), task_type="CAUSAL_LM")
    assert load_prompt(tmp_path).slots.dtype is torch.bfloat16
    template = Template([Slots(1), Input("x"), Slots(2)], model="causal")
    module = load_prompt(tmp_path, template=template, dtype=torch.float64)
    assert module.slots.dtype is torch.float64 and module.encoder is None
    with pytest.raises(ValueError, match="template must have 3 slots"):
        load_prompt(tmp_path, template=Template([Slots(2), Input("x")], model="causal"))


def test_position(tmp_path):
    save_prompt(tmp_path, ours(make_gpt2, "prompt"), task_type="CAUSAL_LM")
    assert load_prompt(tmp_path).position == "front"
    assert load_prompt(tmp_path, position="after_bos").position == "after_bos"


def test_pickled_weights(tmp_path):
    module = ours(make_gpt2, "prompt")
    save_prompt(tmp_path, module, task_type="CAUSAL_LM")
    torch.save(tensors_of(tmp_path), tmp_path / "adapter_model.bin")
    os.remove(tmp_path / "adapter_model.safetensors")
    assert torch.equal(load_prompt(tmp_path).prompt, module.prompt)
