"""PEFT's create_loraplus_optimizer over our layers: A and B in the groups that PEFT's own have."""

import pytest
import torch
from tiny_models import make_bert, make_gpt2
from torch import nn

from peft_kernels import swap_linear
from peft_kernels.integrations.peft.view import peft_view

peft = pytest.importorskip("peft")
loraplus = pytest.importorskip("peft.optimizers")
LORAPLUS = {"lr": 1e-2, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1}
TARGETS = {make_bert: ["query", "value"], make_gpt2: ["c_attn"]}


def groups_of(optimizer, names) -> list:
    """Of each group its rate, its decay and the plain names of its parameters."""
    return [
        (group["lr"], group["weight_decay"], sorted(names[id(p)] for p in group["params"]))
        for group in optimizer.param_groups
    ]


def unfreeze(model: nn.Module, ending: str) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(ending):
            parameter.requires_grad_(True)


@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile], ids=["plain", "compiled"])
def test_loraplus_has_the_groups_of_pefts_own_layers(make, wrap):
    ours = swap_linear(make(), TARGETS[make], 2, alpha=4)
    config = peft.LoraConfig(r=2, target_modules=TARGETS[make], fan_in_fan_out=make is make_gpt2)
    theirs = peft.get_peft_model(make(), config)
    for model in (ours, theirs):
        for ending in ("LayerNorm.weight", "ln_1.weight", "LayerNorm.bias", "ln_1.bias"):
            unfreeze(model, ending)
    create = loraplus.create_loraplus_optimizer
    optimizer = create(peft_view(wrap(ours)), torch.optim.AdamW, **LORAPLUS)
    names = {id(p): n.replace("lora_a", "lora_A").replace("lora_b", "lora_B")
             for n, p in ours.named_parameters()}  # fmt: skip
    their_names = {
        id(p): n.removeprefix("base_model.model.").replace(".default.weight", "")
        for n, p in theirs.named_parameters()
    }
    expected = groups_of(create(theirs, torch.optim.AdamW, **LORAPLUS), their_names)
    assert groups_of(optimizer, names) == expected
    assert len(expected[0][2]) > 0 and any("lora_B" in name for name in expected[2][2])


def test_its_steps_move_the_model():
    model = swap_linear(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0"], 2, alpha=4)
    optimizer = loraplus.create_loraplus_optimizer(
        peft_view(model), torch.optim.SGD, lr=1.0, loraplus_lr_ratio=16.0
    )
    model[0].lora_b.grad = torch.ones_like(model[0].lora_b)
    optimizer.step()
    assert torch.equal(model[0].lora_b, torch.full_like(model[0].lora_b, -16.0))


def test_without_the_view_every_b_has_the_rate_of_a():
    """What the page says of it; where PEFT comes to know our names, the view isn't needed."""
    model = swap_linear(nn.Sequential(nn.Linear(4, 4)), ["0"], 2, alpha=4)
    given, seen = (
        loraplus.create_loraplus_optimizer(one, torch.optim.AdamW, **LORAPLUS)
        for one in (model, peft_view(model))
    )
    rates = [
        next(g["lr"] for g in o.param_groups if any(p is model[0].lora_b for p in g["params"]))
        for o in (given, seen)
    ]
    assert rates == [LORAPLUS["lr"], LORAPLUS["lr"] * LORAPLUS["loraplus_lr_ratio"]]


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match="must have LoRALinear layers"):
        peft_view(nn.Linear(4, 4))
