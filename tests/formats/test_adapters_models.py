"""Adapters put into real models of transformers compute what `adapters` computes in them."""

import copy

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters.composition import Fuse
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, RobertaConfig, RobertaModel

from peft_kernels.integrations.transformers.adapters import (
    adapters_of,
    fuse_adapters,
    insert_adapter,
    insert_adapters,
    remove_adapters,
)
from peft_kernels.nn import AdapterFusion, BottleneckAdapter

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES)),
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2)),
}
CONFIGS = {"pfeiffer": "seq_bn", "houlsby": "double_seq_bn", "parallel": "par_bn"}
FUSED_CONFIG = adapters.AdapterFusionConfig.load("dynamic", dropout_prob=0.0)


def assert_equal_in_float64(value, expected):
    """To 1e-12 of the largest element: what two orders of the same sums may differ by."""
    assert (value - expected).abs().max() <= 1e-12 * expected.abs().max()


def a_model(family):
    return MODELS[family]().double().eval()


def with_theirs(base, names, preset):
    """A copy of the model with random adapters of the `adapters` library."""
    model = copy.deepcopy(base)
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=CONFIGS[preset])
    model.double()
    randomize(value for key, value in model.state_dict().items() if ".adapters." in key)
    return model.eval()


def randomize(tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.2 * torch.randn_like(tensor))


def copy_theirs(model, theirs, name):
    """Gives our adapters the values of theirs: both lie in the order of the places."""
    places = {}
    for key, value in theirs.state_dict().items():
        place, _, rest = key.partition(f".adapters.{name}.")
        if rest:
            places.setdefault(place, {})[rest] = value
    ours = list(adapters_of(model).values())
    assert len(ours) == len(places)
    for adapter, values in zip(ours, places.values(), strict=True):
        names = {"down": "adapter_down.0", "up": "adapter_up"}
        adapter.load_state_dict(
            {f"{n}.{p}": values[f"{names[n]}.{p}"] for n in names for p in ("weight", "bias")}
        )


def hidden(model, ids, **arguments):
    return model(ids, **arguments).last_hidden_state


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("family", MODELS)
def test_equals_adapters(family, preset):
    base, ids = a_model(family), torch.randint(2, 50, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    theirs = with_theirs(base, ["task"], preset)
    theirs.train_adapter("task")
    theirs.eval()
    ours = copy.deepcopy(base)
    insert_adapters(ours, preset)
    copy_theirs(ours, theirs, "task")
    y, expected = (hidden(m, ids, attention_mask=mask) for m in (ours, theirs))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert (y - hidden(base, ids, attention_mask=mask)).abs().max() > 0.1

    dy = torch.randn_like(y)  # a norm comes last: the sum of its squares has no gradient
    y.backward(dy)
    expected.backward(dy)
    trained = [p.grad for p in ours.parameters() if p.requires_grad]
    theirs_trained = [p.grad for p in theirs.parameters() if p.requires_grad]
    assert sum(g.numel() for g in trained) == sum(g.numel() for g in theirs_trained)
    norms, expected_norms = (
        torch.stack(sorted(g.norm() for g in found)) for found in (trained, theirs_trained)
    )
    assert_equal_in_float64(norms, expected_norms)


@pytest.mark.parametrize("family", MODELS)
def test_a_fusion_of_three_equals_adapters(family):
    names = ["a", "b", "c"]
    base, ids = a_model(family), torch.randint(2, 50, (3, 7))
    theirs = with_theirs(base, names, "pfeiffer")
    theirs.add_adapter_fusion(names, FUSED_CONFIG)
    theirs.double().train_adapter_fusion(Fuse(*names))
    theirs.eval()
    layers = [m for n, m in theirs.named_modules() if n.endswith("adapter_fusion_layer.a,b,c")]
    randomize(p for layer in layers for p in layer.parameters())

    trained = []
    for name in names:
        model = copy.deepcopy(base)
        insert_adapters(model, "pfeiffer")
        copy_theirs(model, theirs, name)
        trained.append(adapters_of(model))
    ours = copy.deepcopy(base)
    insert_adapters(ours, "pfeiffer")
    for path, layer in zip(fuse_adapters(ours, trained), layers, strict=True):
        fusion = ours.get_submodule(path)
        missing, unexpected = fusion.load_state_dict(layer.state_dict(), strict=False)
        assert not unexpected
        assert all(key.startswith("adapters.") for key in missing)
    for plan in ("absorbed", "query", "direct"):
        for path in adapters_of(ours):
            ours.get_submodule(path).plan = lambda rows, plan=plan: plan
        y, expected = hidden(ours, ids), hidden(theirs, ids)
        assert_equal_in_float64(y, expected)
        wanted = [
            p
            for path in adapters_of(ours)
            for n, p in ours.get_submodule(path).named_parameters()
            if n in ("query.weight", "query.bias", "key.weight", "value.weight")
        ]
        theirs_wanted = [
            dict(layer.named_parameters())[n]
            for layer in layers
            for n in ("query.weight", "query.bias", "key.weight", "value.weight")
        ]
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, wanted, dy)
        target = torch.autograd.grad(expected, theirs_wanted, dy)
        for gradient, other in zip(got, target, strict=True):
            assert_equal_in_float64(gradient, other)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("family", MODELS)
def test_only_adapters_train_and_all_can_be_taken_out(family, preset):
    base, ids = a_model(family), torch.randint(2, 50, (2, 5))
    model = copy.deepcopy(base)
    paths = insert_adapters(model, preset, reduction=4)
    assert list(adapters_of(model)) == paths
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".adapter." in n}
    assert set(base.state_dict()) < set(model.state_dict())
    randomize(p for p in model.parameters() if p.requires_grad)
    adapted = hidden(model, ids)
    torch.testing.assert_close(hidden(copy.deepcopy(model), ids), adapted, rtol=0, atol=0)
    remove_adapters(model)
    assert set(base.state_dict()) == set(model.state_dict())
    assert torch.equal(hidden(model, ids), hidden(base, ids))
    assert not torch.equal(adapted, hidden(base, ids))
    insert_adapters(model, preset)


@pytest.mark.parametrize("family", MODELS)
def test_takes_the_models_mode(family):
    for training in (False, True):
        model = a_model(family).train(training)
        insert_adapters(model, "pfeiffer")
        assert {adapter.training for adapter in adapters_of(model).values()} == {training}


@pytest.mark.parametrize("preset", CONFIGS)
def test_gradient_checkpointing(preset):
    model, ids = a_model("llama").train(), torch.randint(2, 50, (2, 5))
    insert_adapters(model, preset)
    randomize(p for p in model.parameters() if p.requires_grad)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        hidden(model, ids).sigmoid().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_any_module_by_its_path():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU())
    x = torch.randn(3, 4)
    adapter = BottleneckAdapter(6, 2)
    expected = torch.relu(adapter(model[0](x), residual=model[0](x)))
    insert_adapter(model, "0", adapter)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="0 has a module named adapter already"):
        insert_adapter(model, "0", adapter)
    with pytest.raises(ValueError, match="path must name a module of the model; got 'nowhere'"):
        insert_adapter(model, "nowhere", adapter)
    with pytest.raises(ValueError, match=r"style must be one of.*'sideways'"):
        insert_adapter(model, "1", adapter, style="sideways")
    with pytest.raises(TypeError, match=r"adapter must be a module.*; got int"):
        insert_adapter(model, "1", 32)
    assert not model[1]._modules


def test_bad_input():
    model = a_model("bert")
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=r"preset must be one of pfeiffer.*'lora'"):
        insert_adapters(model, "lora")
    with pytest.raises(ValueError, match="activation must be one of"):
        insert_adapters(model, "pfeiffer", activation="no_such")
    with pytest.raises(ValueError, match="model has no adapters"):
        fuse_adapters(model, [{"x": BottleneckAdapter(4, 2)}])
    with pytest.raises(ValueError, match=r"model has no block.*Linear"):
        insert_adapters(torch.nn.Linear(2, 2), "pfeiffer")
    assert set(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    insert_adapters(model, "pfeiffer")
    with pytest.raises(ValueError, match=r"model has adapters already, e\.g\. at encoder"):
        insert_adapters(model, "houlsby")
    with pytest.raises(ValueError, match="trained must have at least one"):
        fuse_adapters(model, [])
    with pytest.raises(ValueError, match=r"trained\[0\] must have an adapter at each"):
        fuse_adapters(model, [{"x": BottleneckAdapter(4, 2)}])
    assert not any(isinstance(m, AdapterFusion) for m in model.modules())
