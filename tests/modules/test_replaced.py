"""What a module had before adapters came: it is there while they are, and when they are gone."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from trained_modules import DRAWN, MODULES

from peft_kernels import AdapterPool, swap_linear, unload
from peft_kernels.integrations.transformers.adapters import (
    adapters_of,
    fuse_adapters,
    insert_adapter,
    insert_adapters,
    remove_adapters,
)
from peft_kernels.nn import BottleneckAdapter, PrefixTuning

transformers = pytest.importorskip("transformers")

# Each way to put something into a model: onto which module, how, and how it goes again.


def attach(model):
    pool = AdapterPool.attach(model, ["encoder.layer.0.output.dense"], capacity=8)
    return pool.detach


def swap(model):
    swap_linear(model, ["encoder.layer.0.output.dense"], 2, alpha=4)
    return lambda: unload(model, merge=False)


def insert(preset):
    def into(model):
        insert_adapters(model, preset)
        return lambda: remove_adapters(model)

    return into


def insert_one(model):
    insert_adapter(model, "encoder.layer.0.output.dense", BottleneckAdapter(16, 4))
    return lambda: remove_adapters(model)


DENSE, OUTPUT = "encoder.layer.0.output.dense", "encoder.layer.0.output"
WAYS = {
    "swap_linear": (DENSE, swap),
    "pool": (DENSE, attach),
    "pfeiffer": (OUTPUT, insert("pfeiffer")),
    "parallel": (OUTPUT, insert("parallel")),
    "insert_adapter": (DENSE, insert_one),
}
ways = pytest.mark.parametrize(("path", "put"), WAYS.values(), ids=WAYS)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
    ).eval()


def run(model: nn.Module) -> torch.Tensor:
    """A forward and a backward, which reaches the embeddings whatever is frozen."""
    embeddings = model.get_input_embeddings()(torch.arange(12).reshape(2, 6)).detach()
    output = model(inputs_embeds=embeddings.requires_grad_()).last_hidden_state
    output.square().sum().backward()
    return output.detach()


def calls(module: nn.Module, heard: list[str]) -> list:
    """Registers every kind of hook; each notes its name when it is called."""

    def noting(name):
        return lambda *args, **kwargs: heard.append(name)

    return [
        module.register_forward_hook(noting("forward"), always_call=True),
        module.register_forward_hook(noting("forward with kwargs"), with_kwargs=True),
        module.register_forward_pre_hook(noting("forward before")),
        module.register_full_backward_hook(noting("backward")),
        module.register_full_backward_pre_hook(noting("backward before")),
        module.register_state_dict_pre_hook(noting("state_dict before")),
        module.register_state_dict_post_hook(noting("state_dict")),
        module.register_load_state_dict_pre_hook(noting("load before")),
        module.register_load_state_dict_post_hook(noting("load")),
    ]


def use(model: nn.Module) -> None:
    run(model)
    model.load_state_dict(model.state_dict())


@ways
def test_hooks_stay(path, put):
    model, heard = bert(), []
    handles = calls(model.get_submodule(path), heard)
    use(model)
    before = sorted(heard)
    assert len(set(before)) == len(handles) == 9
    take_out = put(model)
    heard.clear()
    use(model)
    assert sorted(heard) == before
    take_out()
    heard.clear()
    use(model)
    assert sorted(heard) == before


@ways
def test_handles_of_hooks_stay_good(path, put):
    model, heard = bert(), []
    handles = calls(model.get_submodule(path), heard)
    first, *others = handles
    take_out = put(model)
    first.remove()
    use(model)
    assert "forward" not in heard and "forward with kwargs" in heard
    take_out()
    for handle in others:
        handle.remove()
    heard.clear()
    use(model)
    assert not heard


@ways
def test_a_hook_of_load_state_dict_gets_the_module_that_is_there(path, put):
    model, seen = bert(), []
    model.get_submodule(path).register_load_state_dict_pre_hook(
        lambda module, *args: seen.append(module)
    )
    take_out = put(model)
    model.load_state_dict(model.state_dict())
    assert seen == [model.get_submodule(path)]
    take_out()
    model.load_state_dict(model.state_dict())
    assert seen[1:] == [model.get_submodule(path)]


@ways
def test_buffers_attributes_and_children_stay(path, put):
    model = bert()
    module = model.get_submodule(path)
    module.register_buffer("mask", torch.ones(3))
    module.register_buffer("cache", torch.ones(2), persistent=False)
    module.register_parameter("extra", nn.Parameter(torch.ones(1)))
    module.add_module("child", nn.LayerNorm(2))
    module.note = ["mine"]
    keys = set(model.state_dict())
    take_out = put(model)
    here = model.get_submodule(path)
    assert here.note is module.note and here.child is module.child
    assert keys <= set(model.state_dict()) | {f"{path}.cache"}
    model.double()
    here.note = "changed"
    take_out()
    back = model.get_submodule(path)
    assert back is module
    assert back.note == "changed" and set(model.state_dict()) == keys
    assert {t.dtype for t in (*back.parameters(), *back.buffers())} == {torch.float64}


@ways
def test_the_module_is_itself_again(path, put):
    model = bert()
    expected, module = run(model), model.get_submodule(path)
    attributes = set(vars(module))
    kind, children = type(module), set(module._modules)
    take_out = put(model)
    take_out()
    assert model.get_submodule(path) is module and type(module) is kind
    assert set(vars(module)) == attributes and set(module._modules) == children
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    ("path", "put"),
    [way for name, way in WAYS.items() if name != "pool"],  # a pool says so itself
)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_keep_what_they_had_and_are_taken_out_alone(path, put, duplicate):
    model = bert()
    model.get_submodule(path).register_forward_hook(_negated)
    plain = run(model)
    take_out = put(model)
    for name, parameter in model.named_parameters():
        if "lora_b" in name or "up.weight" in name:
            nn.init.normal_(parameter)
    adapted, other = run(model), duplicate(model)
    assert torch.equal(run(other), adapted) and not torch.allclose(adapted, plain)
    if put is swap:
        unload(other, merge=False)
    else:
        remove_adapters(other)
    assert torch.equal(run(other), plain) and torch.equal(run(model), adapted)
    assert type(other.get_submodule(path)) is type(bert().get_submodule(path))
    take_out()


def _negated(module, args, output):
    return -output


def test_a_forward_given_to_a_module_is_refused_where_it_would_be_lost():
    """As accelerate's hooks do it."""
    model = bert()
    module = model.get_submodule(OUTPUT)
    module.forward = partial(module.forward)
    with pytest.raises(TypeError, match=rf"{OUTPUT} must use its class's own forward"):
        insert_adapters(model, "pfeiffer")
    assert not adapters_of(model) and all(p.requires_grad for p in model.parameters())


def test_a_layer_that_was_given_a_forward_is_not_unloaded():
    model = bert()
    swap(model)
    layer = model.get_submodule(DENSE)
    layer.forward = partial(layer.forward)
    with pytest.raises(TypeError, match=rf"{DENSE} must use its class's own forward"):
        unload(model, merge=False)
    assert model.get_submodule(DENSE) is layer


def test_hooks_of_an_adapter_stay_where_a_fusion_comes():
    model, one, two = bert(), bert(), bert()
    for each in (model, one, two):
        paths = insert_adapters(each, "pfeiffer")
    heard = []
    model.get_submodule(paths[0]).register_forward_hook(lambda *_: heard.append("place"))
    one.get_submodule(paths[0]).register_forward_hook(lambda *_: heard.append("part"))
    fuse_adapters(model, [adapters_of(one), adapters_of(two)])
    with torch.no_grad():
        run_plain(model)
    assert sorted(heard) == ["part", "place"]


def run_plain(model):
    return model(torch.arange(12).reshape(2, 6))


# ---- torch's encoders --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["layers.0", "layers.1.linear2", "layers.0.self_attn"])
@pytest.mark.parametrize("padded", [False, True])
def test_adapters_in_torchs_encoders(path, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    switches = [model.use_nested_tensor, *(one.activation_relu_or_gelu for one in model.layers)]
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padded else None
    kept = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
    adapter = BottleneckAdapter(8, 4)
    nn.init.normal_(adapter.up.weight)
    insert_adapter(model, path, adapter)
    training = model(x, src_key_padding_mask=mask)[kept]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[kept], training)
    remove_adapters(model)
    now = [model.use_nested_tensor, *(one.activation_relu_or_gelu for one in model.layers)]
    assert now == switches


def test_what_accelerate_leaves_behind_is_no_forward_of_its_own():
    """The class's own forward, bound to the module: that of the layer must not go by it."""
    model = bert()
    module = model.get_submodule(DENSE)
    module.forward = module.forward
    swap(model)
    layer = model.get_submodule(DENSE)
    before = run(model)
    nn.init.normal_(layer.lora_b)
    assert not torch.allclose(run(model), before)


# ---- tensors that are computed from others -------------------------------------------------------


@pytest.mark.parametrize("compute", ["prune", "parametrize"])
@pytest.mark.parametrize("kind", DRAWN)
def test_what_is_computed_is_not_drawn_anew(kind, compute):
    module = MODULES[kind]()
    path, _, name = DRAWN[kind].rpartition(".")
    owner = module.get_submodule(path)
    if compute == "prune":
        prune.l1_unstructured(owner, name, 0.5)
    else:
        parametrize.register_parametrization(owner, name, nn.Tanh(), unsafe=True)
    values = {key: value.clone() for key, value in module.state_dict().items()}
    calls = [module._draw]
    if isinstance(module, PrefixTuning):
        calls.append(lambda: module.fit([torch.zeros(2, 3, 2, 4)] * 2))
    for call in calls:
        with pytest.raises(RuntimeError, match=f"{name} .*remove"):
            call()
    assert all(torch.equal(value, values[key]) for key, value in module.state_dict().items())
