"""Folders of `adapters` are read and written: both sides compute the same from them."""

import copy
import json

import pytest

pytest.importorskip("adapters")

import adapters
import safetensors.torch
import torch
from adapters.composition import Fuse
from adapters_folders import (
    BERT,
    CONFIGS,
    LLAMA,
    MODELS,
    SIZES,
    assert_equal,
    assert_refused,
    outputs,
    randomize,
    with_theirs,
)
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    RobertaConfig,
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
