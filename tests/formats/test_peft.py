"""Against Hugging Face PEFT itself: files both ways, matching, gradients."""

import json
import warnings

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama
from torch import nn

from peft_kernels import load_adapter, save_adapter, swap_linear
from peft_kernels.models.targets import find_targets
from peft_kernels.nn import LoRALinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).reshape(2, 6)


def make_experts() -> nn.Module:
    def block() -> nn.Module:
        experts = [nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3)]
        return nn.ModuleDict({"experts": nn.ModuleList(experts)})

    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})})


def make_classifier() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(make_bert().config)


TARGETS = {
    make_bert: ["query", "value", "intermediate.dense"],
    make_gpt2: ["c_attn", "mlp.c_proj"],
    make_llama: ["q_proj", "v_proj", "down_proj"],
}
# By the names that PEFT's LoraConfig gives them. No two keys of a pattern match one layer: PEFT
# sorts the keys when it saves, so which of them counts would change.
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 6},
    "patterns": {
        "rank_pattern": {"query|q_proj|c_attn": 5, r".*\.1\..*(value|v_proj|c_proj)": 2},
        "alpha_pattern": {"^.*0.*(query|q_proj|c_attn)": 16, "value|v_proj|c_proj": 3.5},
    },
}
cases = pytest.mark.parametrize("variant", VARIANTS)
models = pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)


@pytest.fixture(autouse=True)
def strict():
    """PEFT warns of unknown config keys, and of keys that are missing from the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        yield


def base(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def ours(make, variant: str) -> nn.Module:
    options = {"r": 4, "dropout": 0.0} | VARIANTS[variant]
    return randomised(swap_linear(base(make), TARGETS[make], alpha=8, **options))


def theirs(make, variant: str) -> nn.Module:
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[make]} | VARIANTS[variant]
    return randomised(peft.get_peft_model(base(make), peft.LoraConfig(**options)).eval())


def randomised(model: nn.Module) -> nn.Module:
    """B as if trained."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_b" in name.lower():
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def assert_same_logits(model: nn.Module, other: nn.Module, make) -> None:
    assert (logits(model) - logits(base(make))).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)


def layers_of(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


# ---- files -----------------------------------------------------------------------------------


@cases
@models
def test_ours_loads_in_peft(tmp_path, make, variant):
    model = ours(make, variant)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(make), tmp_path)
    their_layers = layers_of(loaded.base_model.model, peft.tuners.lora.LoraLayer)
    our_layers = layers_of(model, LoRALinear)
    assert their_layers.keys() == our_layers.keys()
    for name, layer in our_layers.items():
        assert their_layers[name].r["default"] == layer.r
        assert their_layers[name].scaling["default"] == pytest.approx(layer.scale, rel=1e-15)
    assert_same_logits(loaded, model, make)


@cases
@models
def test_theirs_loads_in_ours(tmp_path, make, variant):
    model = theirs(make, variant)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base(make), tmp_path)
    assert_same_logits(loaded, model, make)


@models
def test_there_and_back_is_the_same_file(tmp_path, make):
    save_adapter(ours(make, "patterns"), tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(base(make), tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(base(make), tmp_path / "theirs"), tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, again = (tmp_path / folder / name for folder in ("ours", "again"))
        assert first.read_bytes() == again.read_bytes()


def test_pattern_keys_match_one_module_alone(tmp_path):
    """A layer whose name ends with another's keeps its own rank and alpha in PEFT."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        names = ("up", "x", "y")
        model = nn.ModuleDict({name: nn.ModuleDict({"up": nn.Linear(4, 4)}) for name in names})
        model["up"] = nn.Linear(4, 4)
        return model

    ranks = {"^up": 3, "^x.up": 5}
    model = swap_linear(make(), ["up"], 2, alpha=4, rank_pattern=ranks, alpha_pattern=ranks)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path).base_model.model
    found = {
        name: (layer.r["default"], layer.lora_alpha["default"])
        for name, layer in layers_of(loaded, peft.tuners.lora.LoraLayer).items()
    }
    assert found == {"up": (3, 3), "x.up": (5, 5), "y.up": (2, 4)}


def test_every_key_of_their_config_is_known(tmp_path):
    """A config of defaults is supported; one that the tensors aren't of is refused."""
    theirs(make_bert, "plain").save_pretrained(tmp_path)
    load_adapter(base(make_bert), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        load_adapter(base(make_bert), tmp_path)


# ---- matching --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_bert, {"target_modules": ["query", "output.dense"]}),
        (make_bert, {"target_modules": ["encoder.layer.1.attention.self.key"]}),
        (make_bert, {"target_modules": r".*layer\.[01]\.attention.*(query|dense)"}),
        (make_bert, {"target_modules": "all-linear"}),
        (make_bert, {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}),
        (make_bert, {"target_modules": ["dense"], "exclude_modules": r".*attention.*"}),
        (make_llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        (make_llama, {"target_modules": ["q_proj"], "layers_to_transform": 0}),
        (make_llama, {"target_modules": ["q_proj"], "layers_to_transform": 1,
                      "layers_pattern": "layers"}),
        (make_experts, {"target_modules": ["0.up", "2.up"], "layers_to_transform": [1]}),
        (make_experts, {"target_modules": ["2.up"], "layers_to_transform": 0,
                        "layers_pattern": ["h", "layers"]}),
        (make_llama, {"target_modules": "all-linear"}),
        (make_gpt2, {"target_modules": "all-linear"}),
        (make_gpt2, {"target_modules": ["c_proj"]}),
        (make_classifier, {"target_modules": "all-linear"}),
        (make_classifier, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ],
)  # fmt: skip
def test_matching(make, options):
    wrapped = peft.get_peft_model(base(make), peft.LoraConfig(r=2, **options))
    expected = set(layers_of(wrapped.base_model.model, peft.tuners.lora.LoraLayer))
    assert expected
    assert set(find_targets(base(make), **options)) == expected
    model = swap_linear(base(make), r=2, alpha=4, **options)
    assert set(layers_of(model, LoRALinear)) == expected


@models
def test_ranks_and_scales_by_pattern(make):
    patterns = {
        "rank_pattern": {"1.*": 7, "q_proj": 3, "query": 5},
        "alpha_pattern": {"query|c_attn": 6, r"0\..*": 10},
    }
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[make], **patterns)
    wrapped = peft.get_peft_model(base(make), config).base_model.model
    model = swap_linear(base(make), TARGETS[make], 2, alpha=4, **patterns)
    for name, layer in layers_of(wrapped, peft.tuners.lora.LoraLayer).items():
        swapped = model.get_submodule(name)
        assert (swapped.r, swapped.scale) == (layer.r["default"], layer.scaling["default"])


# ---- training --------------------------------------------------------------------------------


@cases
@models
def test_gradients(tmp_path, make, variant):
    model = theirs(make, variant)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base(make), tmp_path)
    for trained in (model, loaded):
        trained(IDS)[0].square().mean().backward()
    for name, layer in layers_of(loaded, LoRALinear).items():
        their_layer = model.base_model.model.get_submodule(name)
        pairs = ((layer.lora_a, their_layer.lora_A), (layer.lora_b, their_layer.lora_B))
        for parameter, matrix in pairs:
            gradient = matrix["default"].weight.grad
            assert gradient.abs().max() > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    names = {name for name, p in loaded.named_parameters() if p.grad is not None}
    assert all(".lora_" in name for name in names)


def test_a_half_precision_base_keeps_float32_adapters_in_both(tmp_path):
    model = randomised(swap_linear(base(make_llama).bfloat16(), ["q_proj"], 4, alpha=8))
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(make_llama).bfloat16(), tmp_path)
    layer = next(iter(layers_of(loaded, peft.tuners.lora.LoraLayer).values()))
    assert layer.lora_A["default"].weight.dtype is torch.float32
    torch.testing.assert_close(logits(model), logits(loaded), rtol=2e-2, atol=2e-2)
