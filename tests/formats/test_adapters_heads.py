"""Heads in folders of `adapters`, beside adapters and fusions."""

import copy
import warnings

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters_folders import (
    BERT,
    CONFIGS,
    MODELS,
    SIZES,
    assert_equal,
    assert_refused,
    outputs,
    randomize,
    with_theirs,
)
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_kernels.formats.adapter_hub import load_adapter, load_fusion, save_adapter, save_fusion
from peft_kernels.integrations.transformers.adapters import insert_adapters

LLAMA_PADDED = LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)
CLASSIFIERS = {
    "bert": lambda: BertForSequenceClassification(BERT),
    "llama": lambda: LlamaForSequenceClassification(LLAMA_PADDED),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
}
classifiers = pytest.mark.parametrize("family", CLASSIFIERS)


def with_random_head(model):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith(("classifier", "score")):
                parameter.copy_(torch.randn_like(parameter).float())
    return model


@classifiers
@pytest.mark.parametrize("use_safetensors", [True, False])
def test_a_head_of_theirs_is_read(family, use_safetensors, tmp_path):
    base = CLASSIFIERS[family]().double().eval()
    theirs = with_random_head(with_theirs(base, task=CONFIGS["seq_bn"]))
    theirs.config.id2label, theirs.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    theirs.set_active_adapters("task")
    theirs.save_adapter(tmp_path / "theirs", "task", use_safetensors=use_safetensors)
    ours = copy.deepcopy(base)
    ours.config = copy.deepcopy(base.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(ours, tmp_path / "theirs")
    assert_equal(outputs(ours), outputs(theirs))
    assert ours.config.id2label == {0: "no", 1: "yes"}
    save_adapter(ours, tmp_path / "again", "task")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "again")
    assert_equal(outputs(again), outputs(theirs))


@classifiers
@pytest.mark.parametrize("use_safetensors", [True, False])
def test_ours_loads_there_by_its_folder_alone(family, use_safetensors, tmp_path):
    base = CLASSIFIERS[family]().double().eval()
    ours = copy.deepcopy(base)
    insert_adapters(ours, "pfeiffer", train_head=True)
    with_random_head(randomize(ours))
    save_adapter(ours, tmp_path / "ours", "task")
    other = copy.deepcopy(base)
    adapters.init(other)
    options = {"use_safetensors": True} if use_safetensors else {}
    other.load_adapter(str(tmp_path / "ours"), set_active=True, **options)
    assert_equal(outputs(other.double().eval()), outputs(ours))
    assert (outputs(ours) - outputs(base)).abs().max() > 0.01


def test_one_format_alone(tmp_path):
    model = CLASSIFIERS["bert"]()
    insert_adapters(model, "pfeiffer", train_head=True)
    save_adapter(model, tmp_path, "task")
    heads = {"head_config.json", "pytorch_model_head.bin", "model_head.safetensors"}
    files = {"adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files | heads
    save_adapter(model, tmp_path, "task", safetensors=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == (files | heads) - {"pytorch_adapter.bin", "pytorch_model_head.bin"}
    save_adapter(model, tmp_path, "task", safetensors=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == (files | heads) - {"adapter.safetensors", "model_head.safetensors"}


def test_a_frozen_head_is_written_where_it_is_asked_for(tmp_path):
    model = CLASSIFIERS["bert"]()
    insert_adapters(model, "pfeiffer", train_head=False)
    save_adapter(model, tmp_path / "without", "task")
    assert not (tmp_path / "without" / "head_config.json").exists()
    save_adapter(model, tmp_path / "with", "task", with_head=True)
    assert (tmp_path / "with" / "head_config.json").exists()
    plain = MODELS["bert"]()
    insert_adapters(plain, "pfeiffer")
    with pytest.raises(ValueError, match="BertModel has no head"):
        save_adapter(plain, tmp_path / "none", "task", with_head=True)
    assert not (tmp_path / "none").exists()


def test_heads_of_others_are_said_to_be_left_out(tmp_path):
    theirs = adapters.BertAdapterModel(BERT)
    theirs.add_adapter("task", config="seq_bn")
    theirs.add_classification_head("task", num_labels=3)
    theirs.save_adapter(tmp_path / "built", "task")
    with pytest.warns(UserWarning, match="left out: it is one of BertAdapterModel's"):
        load_adapter(MODELS["bert"](), tmp_path / "built")
    ours = CLASSIFIERS["bert"]()
    insert_adapters(ours, "pfeiffer", train_head=True)
    save_adapter(ours, tmp_path / "classifier", "task")
    with pytest.warns(
        UserWarning, match="it is BertForSequenceClassification's, and BertModel has"
    ):
        load_adapter(MODELS["bert"](), tmp_path / "classifier")
    other = BertForMaskedLM(BERT)
    with pytest.warns(UserWarning, match="and the model is BertForMaskedLM"):
        load_adapter(other, tmp_path / "classifier")


def test_a_head_of_other_labels_changes_nothing(tmp_path):
    ours = CLASSIFIERS["bert"]()
    insert_adapters(ours, "pfeiffer", train_head=True)
    save_adapter(ours, tmp_path, "task")
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=5))
    assert_refused(lambda: load_adapter(model, tmp_path), model, r"classifier\.\w+ must be \[5")


def test_a_fusion_has_a_head(tmp_path):
    base = CLASSIFIERS["bert"]().double().eval()
    there = with_random_head(with_theirs(base, a=CONFIGS["seq_bn"], b=CONFIGS["seq_bn"]))
    there.add_adapter_fusion(["a", "b"], set_active=True)
    randomize(there.double())
    there.save_adapter_fusion(tmp_path / "theirs", "a,b")
    there.save_head(tmp_path / "theirs")
    for name in "ab":
        there.save_adapter(tmp_path / "theirs" / name, name)
    ours = copy.deepcopy(base)
    load_fusion(ours, tmp_path / "theirs")
    assert_equal(outputs(ours), outputs(there))
    save_fusion(ours, tmp_path / "ours", ["a", "b"])
    other = copy.deepcopy(base)
    adapters.init(other)
    for name in "ab":
        other.load_adapter(str(tmp_path / "ours" / name))
    other.load_adapter_fusion(str(tmp_path / "ours"), set_active=True, with_head=True)
    assert_equal(outputs(other.double().eval()), outputs(ours))


def test_a_new_head_is_said_to_be_frozen():
    for options, trains in (({}, False), ({"train_head": True}, True)):
        model = CLASSIFIERS["bert"]()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            insert_adapters(model, "pfeiffer", **options)
        assert model.classifier.weight.requires_grad is trains
        heads = [one for one in said if "the head classifier is frozen" in str(one.message)]
        assert len(heads) == (not trains)
        assert not any(
            p.requires_grad for n, p in model.bert.named_parameters() if "LayerNorm" in n
        )


def test_what_trains_beside_the_adapters_is_said_to_be_left_out(tmp_path):
    model = MODELS["bert"]()
    insert_adapters(model, "houlsby")
    for key, parameter in model.named_parameters():
        if "LayerNorm" in key:
            parameter.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"isn't in the folder: embeddings\.LayerNorm\.weight"):
        save_adapter(model, tmp_path, "task")
