"""save_prompt and load_prompt: what is refused, and that nothing is changed then."""

import copy
import os
import warnings

import pytest
import torch
from peft_prompt_models import (
    D,
    L,
    base,
    edit_config,
    make_bert,
    make_classifier,
    make_gpt2,
    make_llama,
    make_t5,
    ours,
    peft,
    tensors_of,
    transformers,
    write_tensors,
)
from torch import nn

from peft_kernels.formats.peft_prompts.folder import load_prompt, save_prompt
from peft_kernels.nn import PrefixTuning, PromptTuning, Template
from peft_kernels.nn._template import Input, Slots

# ---- saving fails ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "options", "named"),
    [
        (PromptTuning(L, D), {}, "task_type must be given, or model"),
        (PromptTuning(L, D), {"task_type": "CHAT"}, "task_type must be of .*; got 'CHAT'"),
        (PromptTuning(L, D), {"task_type": "SEQ_CLS"}, "model must be given: .* classifier"),
        (PromptTuning(L, D), {"model": nn.Linear(2, 2)}, "task_type must be given for Linear"),
        (PromptTuning(L, D, position="after_bos"), {"task_type": "CAUSAL_LM"}, "after_bos"),
        (PrefixTuning(L, {"cross": [(2, 4)]}), {"task_type": "CAUSAL_LM"}, "self-attention"),
        (PrefixTuning(L, [(2, 4), None]), {"task_type": "CAUSAL_LM"}, "same heads"),
        (PrefixTuning(L, [(2, 4), (4, 4)]), {"task_type": "CAUSAL_LM"}, "same heads"),
        (PrefixTuning(L, [(2, 4)]), {"task_type": "SEQ_2_SEQ_LM"}, "no prefix of an encoder-dec"),
        (
            PromptTuning(L, D),
            {"model": nn.Linear(2, 2), "task_type": "CAUSAL_LM", "modules_to_save": ["head"]},
            "it has no 'head'",
        ),
    ],
)
def test_what_peft_has_not(tmp_path, module, options, named):
    with pytest.raises(ValueError, match=named):
        save_prompt(tmp_path / "folder", module, **options)
    assert not (tmp_path / "folder").exists()


def test_another_module(tmp_path):
    with pytest.raises(TypeError, match=r"module must be .*; got Linear"):
        save_prompt(tmp_path / "folder", nn.Linear(2, 2), task_type="CAUSAL_LM")
    assert not (tmp_path / "folder").exists()


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    save_prompt(tmp_path, ours(make_gpt2, "prompt"), task_type="CAUSAL_LM")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_bytes = type(tmp_path).write_bytes

    def fail_on_config(self, data):
        if self.name == "adapter_config.json":
            raise OSError("no space left")
        return write_bytes(self, data)

    monkeypatch.setattr(type(tmp_path), "write_bytes", fail_on_config)
    with pytest.raises(OSError, match="no space"):
        save_prompt(tmp_path, ours(make_gpt2, "prefix"), task_type="CAUSAL_LM")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_trains_beside_a_prompt_is_said_to_be_left_out(tmp_path):
    model = base(make_llama).requires_grad_(False)
    model.model.norm.requires_grad_(True)
    prompt = ours(make_llama, "prompt")
    with pytest.warns(UserWarning, match=r"isn't in the folder: model\.norm\.weight"):
        save_prompt(tmp_path / "without", prompt, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_prompt(tmp_path / "with", prompt, model=model, modules_to_save=["model.norm"])
        save_prompt(tmp_path / "head", prompt, model=base(make_classifier))


# ---- loading fails ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder of a method, for Llama."""

    def save(method: str):
        folder = tmp_path / method
        save_prompt(folder, ours(make_llama, method), model=base(make_llama))
        return folder

    return save


def assert_refused(error, named, folder, **options) -> None:
    """Loading raises, and changes nothing of the model."""
    model = options.get("model")
    before = {} if model is None else {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=named):
        load_prompt(folder, **options)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_folder_that_is_no_adapter(tmp_path, saved):
    assert_refused(FileNotFoundError, "adapter_config.json", tmp_path)
    folder = saved("prompt")
    os.remove(folder / "adapter_model.safetensors")
    assert_refused(FileNotFoundError, "no adapter_model.safetensors", folder)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object(saved, text):
    folder = saved("prompt")
    (folder / "adapter_config.json").write_bytes(text.encode("latin1"))
    assert_refused(ValueError, "JSON", folder)


def test_a_truncated_file(saved):
    folder = saved("prefix")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert_refused(ValueError, "must be a file of tensors", folder)


def test_another_method(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(base(make_llama), config).save_pretrained(tmp_path)
    assert_refused(ValueError, "got 'LORA'; load_adapter reads LORA", tmp_path)


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("prompt", {"peft_type": None}, "peft_type must be of"),
        ("prompt", {"peft_type": ["PROMPT_TUNING"]}, "peft_type must be of"),
        ("prompt", {"peft_type": "PREFIX_TUNING"}, "prompt_tuning_init isn't supported"),
        ("prompt", {"a_later_invention": 1}, "a_later_invention isn't supported"),
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens must be a whole number"),
        ("prompt", {"num_virtual_tokens": 2.0}, "num_virtual_tokens must be a whole number"),
        ("prompt", {"num_virtual_tokens": 4}, r"prompt_embeddings must be \[4, 16\]"),
        ("prompt", {"token_dim": 8}, r"prompt_embeddings must be \[3, 8\]"),
        ("prompt", {"num_transformer_submodules": 3}, "num_transformer_submodules must be 1 or 2"),
        ("prompt", {"num_transformer_submodules": 2}, r"prompt_embeddings must be \[6, 16\]"),
        ("multitask", {"num_tasks": 3}, r"prefix_task_cols must be \[3, 3, 2\]"),
        ("multitask", {"num_ranks": True}, "num_ranks must be a whole number"),
        ("p_tuning", {"token_dim": -16}, "token_dim must be a whole number"),
        ("prefix", {"num_layers": None}, "num_layers must be a whole number"),
        ("prefix", {"num_layers": 3}, r"prompt_embeddings must be \[3, 48\]"),
        ("prefix", {"num_attention_heads": 3}, "token_dim must be a multiple"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit(saved, method, changes, named):
    folder = saved(method)
    edit_config(folder, **changes)
    assert_refused(ValueError, named, folder)


def test_keys_that_do_not_fit(saved):
    folder = saved("multitask")
    tensors = tensors_of(folder)
    write_tensors(folder, {k: t for k, t in tensors.items() if k != "prefix_task_rows"})
    assert_refused(ValueError, "must have prefix_task_rows for MULTITASK_PROMPT_TUNING", folder)
    write_tensors(folder, tensors | {"transform.0.weight": torch.ones(2)})
    assert_refused(ValueError, "must have no transform.0.weight", folder)
    write_tensors(folder, {k: t.long() for k, t in tensors.items()})
    assert_refused(TypeError, "prompt_embeddings must be floating-point", folder)


def test_arguments_of_other_methods(saved):
    template = Template([Slots(L), Input("x")], model="causal")
    assert_refused(ValueError, "position is of prompt tuning", saved("prefix"), position="front")
    assert_refused(ValueError, "template is of P-tuning", saved("prompt"), template=template)


def test_models_that_do_not_fit(saved):
    prefix = saved("prefix")
    assert_refused(ValueError, "2 key/value heads of size 4", prefix, model=base(make_gpt2))
    config = copy.deepcopy(base(make_llama).config)
    config.num_hidden_layers, config.hidden_size, config.head_dim = 3, 32, 4
    model = transformers.LlamaForCausalLM(config)
    named = "prefix has 2 layers at self, and the model has 3"
    assert_refused(ValueError, named, prefix, model=model)
    for method in ("prompt", "multitask", "p_tuning"):
        named = "embeddings of 16 features, .*; it has 32"
        assert_refused(ValueError, named, saved(method), model=model)


def test_a_classifier_needs_its_model(tmp_path):
    host = base(make_classifier)
    save_prompt(tmp_path, ours(make_classifier, "prompt"), model=host)
    assert_refused(ValueError, "model must be given: the folder has classifier", tmp_path)
    assert_refused(ValueError, "model must have classifier.bias", tmp_path, model=base(make_bert))
    config = host.config
    config.num_labels = 5
    other = transformers.BertForSequenceClassification(config)
    assert_refused(ValueError, r"classifier.bias \[2\], .*; it has \[5\]", tmp_path, model=other)


def test_a_multitask_prompt_of_a_decoder_too(tmp_path):
    config = peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=L)
    peft.get_peft_model(base(make_t5), config).save_pretrained(tmp_path)
    assert_refused(ValueError, "num_transformer_submodules must be 1", tmp_path)
