"""Each option of PEFT's LoraConfig, in a folder that PEFT saved: read right, or refused by name."""

import pytest
import torch
from tiny_models import make_llama

from peft_kernels import AdapterPool, load_adapter

peft = pytest.importorskip("peft")

IDS = torch.arange(12).reshape(2, 6)
GATE = "model.layers.0.mlp.gate_proj.weight"
READ = {
    "use_rslora": {"use_rslora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "layers_to_transform": {"layers_to_transform": [1]},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "exclude_modules": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "lora_dropout": {"lora_dropout": 0.3},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.q_proj"},
}
REFUSED = {
    "bias must be 'none'; got 'all'": {"bias": "all"},
    "bias must be 'none'; got 'lora_only'": {"bias": "lora_only"},
    "lora_bias isn't supported": {"lora_bias": True, "target_modules": ["q_proj"]},
    "layer_replication isn't supported": {"layer_replication": [(0, 2), (1, 2)]},
    "alora_invocation_tokens isn't supported": {
        "alora_invocation_tokens": [3, 4],
        "task_type": "CAUSAL_LM",
    },
    "trainable_token_indices isn't supported": {"trainable_token_indices": [1, 2]},
    "target_parameters isn't supported": {"target_parameters": [GATE]},
    "use_qalora isn't supported": {"use_qalora": True},
    "init_lora_weights must be one that leaves": {"init_lora_weights": "pissa"},
}


def make():
    torch.manual_seed(0)
    return make_llama().eval()


def saved(folder, **options):
    """The folder, and what PEFT computes with it."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
    model = peft.get_peft_model(make(), peft.LoraConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(make(), str(folder)).eval()(IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", READ.values(), ids=list(READ))
def test_an_option_that_is_read(options, tmp_path):
    expected = saved(tmp_path, **options)
    assert (expected - make()(IDS).logits).abs().max() > 1e-3
    model = load_adapter(make(), tmp_path).eval()
    torch.testing.assert_close(model(IDS).logits, expected)
    served = make()
    targets = options.get("target_modules", ["q_proj", "v_proj"])
    pool = AdapterPool.attach(served, targets, capacity=64)
    pool.load("a", tmp_path)
    with pool.route(["a", "a"]):
        torch.testing.assert_close(served(IDS).logits, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("message", "options"), REFUSED.items(), ids=list(REFUSED))
def test_an_option_that_is_refused(message, options, tmp_path):
    """By its name, with what to do, and before anything is changed."""
    saved(tmp_path, **options)
    model, served = make(), make()
    pool = AdapterPool.attach(served, ["q_proj", "v_proj"], capacity=64)
    for load in (lambda: load_adapter(model, tmp_path), lambda: pool.load("a", tmp_path)):
        with pytest.raises(ValueError, match=f"{message}.*load it with PEFT"):
            load()
    assert torch.equal(model(IDS).logits, make()(IDS).logits)
