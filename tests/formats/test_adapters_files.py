"""Folders of `adapters` are read and written: both sides compute the same from them."""

import copy
import json
import warnings

import pytest

pytest.importorskip("adapters")

import adapters
import safetensors.torch
import torch
from adapters.composition import Fuse
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from peft_kernels.formats.adapter_hub import (
    load_adapter,
    load_fusion,
    remove_adapter,
    save_adapter,
    save_fusion,
)
from peft_kernels.integrations.transformers.adapters import adapters_of, insert_adapters

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
}
BERT, LLAMA = BertConfig(**SIZES), LlamaConfig(**SIZES, num_key_value_heads=2)
MODELS = {"bert": lambda: BertModel(BERT), "llama": lambda: LlamaModel(LLAMA)}
HEADED = {
    "bert": lambda: BertForSequenceClassification(BERT),
    "llama": lambda: LlamaForCausalLM(LLAMA),
}
OTHERS = {
    "electra": lambda: ElectraModel(ElectraConfig(**SIZES, embedding_size=24)),
    "deberta-v2": lambda: DebertaV2Model(DebertaV2Config(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES)),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**SIZES)),
    "mistral": lambda: MistralModel(MistralConfig(**SIZES, num_key_value_heads=2)),
}
CONFIGS = {
    "seq_bn": adapters.SeqBnConfig(),
    "double_seq_bn": adapters.DoubleSeqBnConfig(),
    "par_bn": adapters.ParBnConfig(),
    "seq_bn_inv": adapters.SeqBnInvConfig(),
}
VARIANTS = {
    "wide": adapters.SeqBnConfig(reduction_factor=0.7, non_linearity="gelu"),
    "by layer": adapters.DoubleSeqBnConfig(reduction_factor={"1": 5, "default": 16}),
    "left out": adapters.SeqBnConfig(leave_out=[0]),
    "learned": adapters.SeqBnConfig(scaling="learned", ln_after=True),
    "channel": adapters.ParBnConfig(scaling="channel", ln_after=True, use_gating=True),
    "norms": adapters.DoubleSeqBnConfig(ln_before=True, ln_after=True, dropout=0.3),
    "gated": adapters.SeqBnConfig(use_gating=True, scaling=0.5, non_linearity="leakyrelu"),
    "after the feed-forward only": adapters.DoubleSeqBnConfig(mh_adapter=False),
    "after attention only": adapters.DoubleSeqBnConfig(output_adapter=False),
    "house of residuals": adapters.DoubleSeqBnConfig(residual_before_ln=False),
    "gelu_new": adapters.SeqBnConfig(non_linearity="gelu_new", init_weights="houlsby"),
}
IDS = torch.arange(21).reshape(3, 7) % 48 + 2


def outputs(model):
    result = model(IDS)
    return result[0]


def randomize(model):
    """Random parameters of adapters; `adapters` reads into float32 ones."""
    kinds = (".adapters.", "adapter_fusion_layer", "invertible_adapters", ".adapter.")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(kind in key for kind in kinds):
                parameter.add_(0.2 * torch.randn_like(parameter)).copy_(parameter.float())
    return model.eval()


def with_theirs(base, **configs):
    """A copy of the model with random adapters of the `adapters` library."""
    model = copy.deepcopy(base)
    adapters.init(model)
    for name, config in configs.items():
        model.add_adapter(name, config=config)
    return randomize(model.double())


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def check_both_ways(base, other, config, folder, use_safetensors):
    """A folder of theirs gives the same here; one of ours is read into ``other`` there."""
    theirs = with_theirs(base, task=config)
    theirs.set_active_adapters("task")
    theirs.save_adapter(folder / "theirs", "task", use_safetensors=use_safetensors)
    expected = outputs(theirs)
    ours = copy.deepcopy(base)
    paths = load_adapter(ours, folder / "theirs")
    assert paths == list(adapters_of(ours))
    assert_equal(outputs(ours), expected)
    assert (expected - outputs(base)).abs().max() > 0.01

    randomize(ours)
    save_adapter(ours, folder / "ours", "mine", safetensors=use_safetensors)
    adapters.init(other)
    info = {}
    other.load_adapter(
        str(folder / "ours"),
        use_safetensors=use_safetensors,
        set_active=True,
        with_head=False,
        loading_info=info,
    )
    assert not info.get("missing_keys") and not info.get("unexpected_keys")
    return outputs(ours), other.double().eval()


@pytest.mark.parametrize("use_safetensors", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", MODELS)
def test_both_ways(family, kind, use_safetensors, tmp_path):
    base = MODELS[family]().double().eval()
    mine, other = check_both_ways(
        base, copy.deepcopy(base), CONFIGS[kind], tmp_path, use_safetensors
    )
    assert_equal(mine, outputs(other))


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_variants_both_ways(family, kind, tmp_path):
    base = MODELS[family]().double().eval()
    mine, other = check_both_ways(base, copy.deepcopy(base), VARIANTS[kind], tmp_path, False)
    assert_equal(mine, outputs(other))
    ours, theirs = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text())["config"]
        for folder in ("ours", "theirs")
    )
    renamed = {"swish": "silu"}.get(theirs["non_linearity"], theirs["non_linearity"])
    for key in ours.keys() - {"non_linearity", "reduction_factor", "residual_before_ln"}:
        assert ours[key] == theirs[key], key
    assert ours["non_linearity"] == renamed


@pytest.mark.parametrize("kind", ["seq_bn_inv", "double_seq_bn"])
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family, kind, tmp_path):
    base = OTHERS[family]().double().eval()
    mine, other = check_both_ways(base, copy.deepcopy(base), CONFIGS[kind], tmp_path, True)
    assert_equal(mine, outputs(other))


@pytest.mark.parametrize("from_head", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_models_with_and_without_a_head_share_folders(family, from_head, tmp_path):
    plain, headed = (made[family]().double().eval() for made in (MODELS, HEADED))
    plain.load_state_dict(headed.base_model.state_dict())
    source, target = (headed, plain) if from_head else (plain, headed)
    theirs = with_theirs(source, task="seq_bn")
    theirs.set_active_adapters("task")
    theirs.save_adapter(tmp_path / "theirs", "task")
    here, there = copy.deepcopy(source), copy.deepcopy(target)
    load_adapter(here, tmp_path / "theirs")
    load_adapter(there, tmp_path / "theirs")
    assert_equal(outputs(here), outputs(theirs))
    assert_equal(outputs(here.base_model), outputs(there.base_model))
    save_adapter(here, tmp_path / "ours", "task")
    adapters.init(target)
    target.load_adapter(str(tmp_path / "ours"), use_safetensors=True, set_active=True)
    assert_equal(outputs(target.double()), outputs(there))


@pytest.mark.parametrize("preset", ["dynamic", "static"])
@pytest.mark.parametrize("use_safetensors", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_a_fusion_of_three_both_ways(family, use_safetensors, preset, tmp_path):
    names, base = ["a", "b", "c"], MODELS[family]().double().eval()
    theirs = with_theirs(base, a="seq_bn", b="seq_bn", c=adapters.SeqBnConfig(reduction_factor=4))
    for fused in (names, ["a", "b"]):
        theirs.add_adapter_fusion(fused, preset)
    randomize(theirs.double()).set_active_adapters(Fuse(*names))
    theirs.save_all_adapters(tmp_path / "theirs", use_safetensors=use_safetensors)
    for fused in ("a,b,c", "a,b"):
        folder = tmp_path / "theirs" / fused
        theirs.save_adapter_fusion(folder, fused, use_safetensors=use_safetensors)
    ours, pair = copy.deepcopy(base), copy.deepcopy(base)
    folders = {name: tmp_path / "theirs" / name for name in names}
    paths = load_fusion(ours, tmp_path / "theirs/a,b,c", folders)
    assert paths == list(adapters_of(ours))
    assert_equal(outputs(ours), outputs(theirs))
    trained = {key for key, p in ours.named_parameters() if p.requires_grad}
    parts = ["query.weight", "query.bias", "key.weight"] + ["value.weight"] * (preset == "dynamic")
    assert trained == {f"{path}.{part}" for path in paths for part in parts}
    load_fusion(pair, tmp_path / "theirs/a,b", {name: folders[name] for name in "ab"})
    theirs.set_active_adapters(Fuse("a", "b"))
    assert_equal(outputs(pair), outputs(theirs))

    randomize(ours)
    save_fusion(ours, tmp_path / "ours", ["x", "y", "z"], safetensors=use_safetensors)
    again = copy.deepcopy(base)
    load_fusion(again, tmp_path / "ours")
    assert_equal(outputs(again), outputs(ours))
    headed = HEADED[family]().double().eval()
    headed.base_model.load_state_dict(base.state_dict())
    for there in (copy.deepcopy(base), headed):
        adapters.init(there)
        for name in "xyz":
            there.load_adapter(str(tmp_path / "ours" / name), use_safetensors=use_safetensors)
        there.load_adapter_fusion(
            str(tmp_path / "ours"), use_safetensors=use_safetensors, set_active=True
        )
        assert_equal(outputs(there.double().eval().base_model), outputs(ours))


def test_loading_freezes_and_can_be_undone(tmp_path):
    base = MODELS["bert"]().double().eval()
    theirs = with_theirs(base, task=adapters.SeqBnInvConfig(dropout=0.2))
    theirs.save_adapter(tmp_path, "task")
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".adapter." in k or "invertible_adapter." in k for k in trained)
    assert not any(module.training for module in model.modules())
    assert_equal(outputs(copy.deepcopy(model)), outputs(model))
    with pytest.raises(ValueError, match=r"model has adapters already, e\.g\. at encoder"):
        load_adapter(model, tmp_path)
    remove_adapter(model)
    assert set(model.state_dict()) == set(base.state_dict())
    assert torch.equal(outputs(model), outputs(base))
    load_adapter(model, tmp_path)


def test_writing_the_other_format_leaves_no_stale_weights(tmp_path):
    model = MODELS["bert"]()
    insert_adapters(model, "parallel", reduction=5)
    for use_safetensors in (True, False, True):
        save_adapter(model, tmp_path, "task", safetensors=use_safetensors)
        weights = "adapter.safetensors" if use_safetensors else "pytorch_adapter.bin"
        assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", weights}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of `adapters` with a seq_bn in it, as a config and tensors."""
    folder = tmp_path_factory.mktemp("saved")
    theirs = with_theirs(MODELS["bert"](), task="seq_bn")
    theirs.save_adapter(folder, "task", use_safetensors=True)
    header = json.loads((folder / "adapter_config.json").read_text())
    return header, safetensors.torch.load_file(folder / "adapter.safetensors")


def write(folder, header, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(header))
    safetensors.torch.save_file(tensors, folder / "adapter.safetensors")


def assert_refused(load, model, match, error=ValueError):
    """The error names the cause, and nothing of the model is changed."""
    modules, hooks = dict(model.named_modules()), [m._forward_hooks.copy() for m in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        load()
    assert dict(model.named_modules()) == modules
    assert [m._forward_hooks for m in model.modules()] == hooks
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "lora"},
        {"architecture": "prefix_tuning"},
        {"phm_layer": True},
        {"stochastic_depth": 0.1},
        {"cross_adapter": True},
        {"original_ln_after": False, "residual_before_ln": True},
        {"residual_before_ln": False},
        {"residual_before_ln": "post_add"},
        {"ln_after": True, "adapter_residual_before_ln": True},
        {"mh_adapter": True},
        {"output_adapter": None},
        {"inv_adapter": "glow"},
        {"inv_adapter": "nice", "inv_adapter_reduction_factor": None},
        {"non_linearity": "mish"},
        {"scaling": "other"},
        {"dropout": 1.0},
        {"reduction_factor": {"0": 16}},
        {"reduction_factor": 0},
        {"leave_out": 1},
        {"init_weights": "other"},
        {"something_new": 3},
    ],
    ids=str,
)
def test_what_a_config_asks_for_and_isnt_offered(changes, saved, tmp_path):
    header, tensors = saved
    write(tmp_path, header | {"config": header["config"] | changes}, tensors)
    model, (key, value) = MODELS["bert"](), list(changes.items())[-1]
    match = f"{key}.*{'default|layer 1' if isinstance(value, dict) else value}"
    assert_refused(lambda: load_adapter(model, tmp_path), model, match)


def test_folders_that_dont_fit(saved, tmp_path):
    header, tensors = saved
    model, first = MODELS["bert"](), next(iter(tensors))

    def refused(match, header=header, tensors=tensors, error=ValueError):
        write(tmp_path, header, tensors)
        assert_refused(lambda: load_adapter(model, tmp_path), model, match, error)

    refused("hidden_size must be 32; got 64", header | {"hidden_size": 64})
    refused("model_type must be 'bert'; got 'gpt2'", header | {"model_type": "gpt2"})
    refused("must hold an object with a config", {k: header[k] for k in header if k != "config"})
    refused("must hold an object with a name", [])
    refused(
        "config must have non_linearity",
        header | {"config": {k: v for k, v in header["config"].items() if k != "non_linearity"}},
    )
    refused(f"missing: .*{first}", tensors={k: t for k, t in tensors.items() if k != first})
    refused("unexpected: .*more", tensors=tensors | {"more": torch.ones(1)})
    refused(r"must be \[2\].*got \[3\]", tensors=tensors | {first: torch.ones(3)})
    refused("must be floating-point", tensors=tensors | {first: tensors[first].long()})
    (tmp_path / "adapter.safetensors").write_bytes(b"nonsense")
    assert_refused(lambda: load_adapter(model, tmp_path), model, "must be a file of tensors")
    (tmp_path / "adapter.safetensors").unlink()
    load = lambda: load_adapter(model, tmp_path)  # noqa: E731
    assert_refused(load, model, "has no adapter.safetensors and no", FileNotFoundError)
    (tmp_path / "adapter_config.json").write_text("{")
    assert_refused(load, model, "must be JSON")
    (tmp_path / "adapter_config.json").unlink()
    assert_refused(load, model, "must be an adapter", FileNotFoundError)
    with pytest.raises(ValueError, match=r"model must be of transformers.*Linear"):
        load_adapter(torch.nn.Linear(2, 2), tmp_path)


def test_pickles_are_read_as_weights_only(saved, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved[0]))
    model = MODELS["bert"]()
    for content in (json.JSONEncoder(), 3):
        torch.save({"key": content}, tmp_path / "pytorch_adapter.bin")
        assert_refused(lambda: load_adapter(model, tmp_path), model, "must be a file of tensors")


def test_an_invertible_adapter_needs_a_model_without_an_lm_head(tmp_path):
    theirs = with_theirs(BertModel(BERT), task="seq_bn_inv")
    theirs.save_adapter(tmp_path, "task")
    model = BertForMaskedLM(BERT)
    assert_refused(
        lambda: load_adapter(model, tmp_path), model, "inv_adapter must be None.*LM head"
    )


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        (adapters.ParBnConfig(), {}, "is_parallel must be False in a fusion"),
        (adapters.SeqBnConfig(use_gating=True), {}, "use_gating must be False in a fusion"),
        (adapters.SeqBnConfig(ln_after=True), {}, "ln_after must be False in a fusion"),
        (adapters.SeqBnInvConfig(), {}, "inv_adapter must be None"),
        (adapters.SeqBnConfig(), {"temperature": True}, "temperature must be False; got True"),
        (adapters.SeqBnConfig(), {"residual_before": True}, "residual_before must be False"),
        (adapters.SeqBnConfig(), {"query_before_ln": True}, "query_before_ln must be False"),
        (adapters.SeqBnConfig(), {"key": False}, "key must be True"),
    ],
    ids=str,
)
def test_fusions_that_would_compute_otherwise(config, options, match, tmp_path):
    theirs = with_theirs(BertModel(BERT), a=config, b=config)
    theirs.add_adapter_fusion(
        ["a", "b"], adapters.AdapterFusionConfig.load("dynamic", dropout_prob=0.1, **options)
    )
    theirs.save_all_adapters(tmp_path)
    theirs.save_adapter_fusion(tmp_path, "a,b")
    model = BertModel(BERT)
    assert_refused(lambda: load_fusion(model, tmp_path), model, match)
    assert_refused(
        lambda: load_fusion(model, tmp_path, {"a": tmp_path / "a"}),
        model,
        "adapter_folders must have a, b; got a",
    )


def test_what_cant_be_saved(tmp_path):
    model = BertModel(BERT)
    with pytest.raises(ValueError, match="model must have a BottleneckAdapter in it"):
        save_adapter(model, tmp_path, "task")
    insert_adapters(model, "pfeiffer")
    with pytest.raises(ValueError, match=r"name must be a string without.*'a\.b'"):
        save_adapter(model, tmp_path, "a.b")
    with pytest.raises(ValueError, match="must be of AdapterFusion"):
        save_fusion(model, tmp_path, ["a"])
    next(iter(adapters_of(model).values())).scaling = 3.0
    with pytest.raises(ValueError, match="adapters must all have the same settings"):
        save_adapter(model, tmp_path, "task")
    assert not any(tmp_path.iterdir())


# ---- heads ---------------------------------------------------------------------------------------

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
