"""insert_adapters: each preset's place in blocks of every kind, and its arguments."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peft_kernels.integrations.transformers.adapters import (
    adapters_of,
    insert_adapter,
    insert_adapters,
    remove_adapters,
)
from peft_kernels.nn import BottleneckAdapter

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 1, 4, 1, 5]])
# What makes the attention's output as it is added to its input, and the feed-forward's likewise.
NORMS = {
    "Llama": (["self_attn"], ["post_attention_layernorm", "mlp"]),
    "Gemma2": (
        ["self_attn", "post_attention_layernorm"],
        ["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"],
    ),
    "Gemma3Text": (
        ["self_attn", "post_attention_layernorm"],
        ["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"],
    ),
    "Olmo2": (
        ["self_attn", "post_attention_layernorm"],
        ["mlp", "post_feedforward_layernorm"],
    ),
    "Glm4": (
        ["self_attn", "post_self_attn_layernorm"],
        ["post_attention_layernorm", "mlp", "post_mlp_layernorm"],
    ),
}


def make_model(kind: str, **settings) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        **settings,
    )
    name = "Gemma3ForCausalLM" if kind == "Gemma3Text" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def first(output):
    return output[0] if isinstance(output, tuple) else output


def layer_values(model) -> dict[str, torch.Tensor]:
    """What the layer gets and gives, and the attention's output as it is before any adapter."""
    layer, values = model.model.layers[0], {}

    def keep(name):
        def hook(module, args, output):
            values[name] = (args, first(output))

        return hook

    handles = [
        module.register_forward_hook(keep(name), prepend=True)
        for name, module in {"layer": layer, **dict(layer.named_children())}.items()
    ]
    after = layer.register_forward_hook(lambda m, a, y: values.update(adapted=first(y)))
    model(IDS)
    for handle in (*handles, after):
        handle.remove()
    return values


def feed_forward(model, kind: str, x):
    """The feed-forward sublayer's output, of modules without adapters."""
    for name in NORMS[kind][1]:
        x = first(model.model.layers[0].get_submodule(name)(x))
    return x


@pytest.mark.parametrize("preset", ["pfeiffer", "houlsby", "parallel", "adapterplus"])
@pytest.mark.parametrize("kind", NORMS)
def test_each_preset_in_each_kind_of_block(kind, preset):
    model = make_model(kind)
    plain = layer_values(model)
    x, f = plain["layer"][0][0], plain[NORMS[kind][0][-1]][1]
    i = x + f
    out = i + feed_forward(model, kind, i)
    assert_close(plain["adapted"], out)  # the table above is right
    insert_adapters(model, preset, bottleneck_size=4)
    adapters = list(adapters_of(model).values())
    for adapter in adapters:
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
    adapted = layer_values(model)["adapted"]
    remove_adapters(model)
    if preset in ("pfeiffer", "adapterplus"):
        expected = out + adapters[0](out)
    elif preset == "parallel":
        expected = out + adapters[0](i)
    else:
        i = i + adapters[0](f)
        f = feed_forward(model, kind, i)
        expected = i + f + adapters[1](f)
    assert_close(adapted, expected)
    assert_close(layer_values(model)["adapted"], out)
    assert not any(m._forward_hooks for m in model.model.layers[0].modules())


@pytest.mark.parametrize("preset", ["houlsby", "parallel"])
def test_blocks_whose_parts_are_not_known(preset):
    odd = make_model("Llama")
    odd.model.layers[0].extra_norm = nn.LayerNorm(16)
    scaled = make_model("Granite", residual_multiplier=0.5)
    for model, reason in (
        (odd, "LlamaDecoderLayer with the norms extra_norm, input_layernorm, post_attention"),
        (scaled, r"multiplies them by residual_multiplier, 0\.5"),
        (make_model("Cohere"), "no block that adapters can go into.*: insert_adapter puts"),
    ):
        with pytest.raises(ValueError, match=reason):
            insert_adapters(model, preset)
        assert not adapters_of(model)
        assert all(p.requires_grad for p in model.parameters())


def make_bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    return transformers.BertModel(config, add_pooling_layer=False).double().eval()


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ({"bottleneck_size": 5}, [5, 5, 5]),
        ({"reduction": 4}, [4, 4, 4]),
        ({"reduction_factor": 4}, [4, 4, 4]),
        ({"reduction_factor": {"1": 2, "default": 4}}, [4, 8, 4]),
        ({"reduction_factor": {0: 2, 1: 4, 2: 8}}, [8, 4, 2]),
    ],
)
@pytest.mark.parametrize("preset", ["pfeiffer", "parallel", "adapterplus"])
def test_sizes(preset, overrides, sizes):
    model = make_bert()
    insert_adapters(model, preset, **overrides)
    assert [a.bottleneck_size for a in adapters_of(model).values()] == sizes


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"reduction_factor": 2, "reduction": 2}, "along with reduction"),
        ({"reduction_factor": 2, "bottleneck_size": 2}, "along with reduction"),
        ({"reduction": 2, "bottleneck_size": 2}, "along with bottleneck_size"),
        ({"reduction_factor": {"1": 2}}, "a number for layer 0, or a default; it has those for 1"),
        ({"reduction_factor": 0}, "reduction must be above 0"),
    ],
)
def test_sizes_that_are_refused(overrides, reason):
    model = make_bert()
    with pytest.raises(ValueError, match=reason):
        insert_adapters(model, "pfeiffer", **overrides)
    assert not adapters_of(model)


def test_adapterplus_is_theirs():
    adapters = pytest.importorskip("adapters")
    config = adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0)
    theirs, ours = make_bert(), make_bert()
    ours.load_state_dict(theirs.state_dict())
    adapters.init(theirs)
    theirs.add_adapter("a", config)
    theirs.double().set_active_adapters("a")
    insert_adapters(ours, "adapterplus", reduction_factor=4)
    for layer, mine in zip(theirs.encoder.layer, adapters_of(ours).values(), strict=True):
        adapter = layer.output.adapters["a"]
        pairs = [(adapter.adapter_down[0], mine.down), (adapter.adapter_up, mine.up)]
        for their, our in pairs:
            nn.init.normal_(their.weight)
            our.load_state_dict(their.state_dict())
        nn.init.normal_(adapter.scaling)
        mine.scaling.data.copy_(adapter.scaling)
    found = ours(IDS).last_hidden_state
    assert_close(found, theirs(IDS).last_hidden_state)
    remove_adapters(ours)
    assert not torch.allclose(found, ours(IDS).last_hidden_state)


def test_adapterplus_goes_to_their_folders_and_back(tmp_path):
    adapters = pytest.importorskip("adapters")
    from peft_kernels.formats.adapter_hub import load_adapter, save_adapter

    model = make_bert()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    insert_adapters(model, "adapterplus", reduction_factor=4)
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.up.weight)
    save_adapter(model, tmp_path, "a")
    again, theirs = make_bert(), make_bert()
    again.load_state_dict(state)
    theirs.load_state_dict(state)
    load_adapter(again, tmp_path)
    adapters.init(theirs)
    theirs.load_adapter(str(tmp_path), use_safetensors=True, set_active=True)
    expected = model(IDS).last_hidden_state
    assert_close(again(IDS).last_hidden_state, expected)
    assert_close(theirs.double().eval()(IDS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


# ---- blocks beside which no adapter can stand --------------------------------------------------


def test_a_quantised_block_lends_the_dtype_of_its_norms():
    model = make_model("Llama")
    layer = model.model.layers[0]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = layer.self_attn.get_submodule(name)
        linear.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layer.get_submodule(norm).bfloat16()
    layer.mlp.bfloat16()
    insert_adapters(model, "pfeiffer")
    (adapter,) = adapters_of(model).values()
    assert isinstance(adapter, BottleneckAdapter) and adapter.down.weight.dtype is torch.bfloat16
    remove_adapters(model)
    with pytest.raises(TypeError, match=r"self_attn has no floating-point Parameter .*give dtype"):
        insert_adapters(model, "houlsby")
    insert_adapters(model, "houlsby", dtype=torch.bfloat16)


def test_a_block_of_placeholders():
    model = make_model("Llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data, weight.ds_id = torch.empty(0), 1
    with pytest.raises(TypeError, match=r"mlp\.up_proj\.weight is a placeholder of DeepSpeed's"):
        insert_adapters(model, "pfeiffer")


def made_of_ones(adapters):
    for adapter in adapters.values():
        for parameter in adapter.parameters():
            nn.init.ones_(parameter)


@torch.no_grad()
def test_compiled_code_meets_adapters_that_come_and_go():
    """Dynamo guards no hooks, so what was compiled before must not be run on."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.rand(3, 8)
    compiled = torch.compile(model, backend="eager")
    base = compiled(x)
    for _ in range(2):
        insert_adapter(model, "0", BottleneckAdapter(8, 2))
        made_of_ones(adapters_of(model))
        adapted = model(x)
        assert (adapted - base).abs().max() > 1e-3
        assert_close(compiled(x), adapted)
        remove_adapters(model)
        assert_close(compiled(x), base)


@torch.no_grad()
def test_compiled_code_meets_parallel_adapters():
    model, ids = make_model("Llama"), torch.tensor([[3, 1, 4, 1]])
    compiled = torch.compile(model, backend="eager")
    base = compiled(ids)[0]
    for _ in range(2):  # the second time the code of the first would be found
        insert_adapters(model, "parallel")
        made_of_ones(adapters_of(model))
        adapted = model(ids)[0]
        assert (adapted - base).abs().max() > 1e-3
        assert_close(compiled(ids)[0], adapted)
        remove_adapters(model)
        assert_close(compiled(ids)[0], base)
