"""accelerate(): the most memory that torch's allocator has out in a call, beside PEFT's."""

import copy

import pytest
import torch
from peaks import of_torch
from tiny_models import make_llama
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")

NAMES = ["first", "second"] * 2


def pair(model, targets):
    """PEFT's own, and accelerated."""
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(model, settings, adapter_name="first")
    theirs.add_adapter("second", settings)
    ours = copy.deepcopy(theirs)
    peft_kernels.accelerate(ours)
    return ours, theirs


@pytest.mark.parametrize("options", [{}, {"adapter_names": NAMES}], ids=["one", "mixed"])
def test_a_layer_needs_less_for_a_token(options):
    ours, theirs = (
        model.eval()
        for model in pair(nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 512)), ["0", "1"])
    )
    x = torch.randn(4, 512)
    with torch.no_grad():
        assert of_torch(lambda: ours(x, **options)) < of_torch(lambda: theirs(x, **options))


@pytest.mark.parametrize("options", [{}, {"adapter_names": NAMES}], ids=["one", "mixed"])
def test_a_model_needs_no_more_for_a_token(options):
    """Where the head has none, its logits may be the most of both."""
    ours, theirs = (model.eval() for model in pair(make_llama(), ["q_proj", "v_proj", "up_proj"]))
    ids = torch.zeros(4, 1, dtype=torch.long)
    with torch.no_grad():
        assert of_torch(lambda: ours(ids, **options)) <= of_torch(lambda: theirs(ids, **options))


def test_a_step_needs_less():
    ours, theirs = (model.train() for model in pair(make_llama(), "all-linear"))
    ids = torch.zeros(4, 16, dtype=torch.long)

    def step(model):
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    assert of_torch(lambda: step(ours)) < of_torch(lambda: step(theirs))
