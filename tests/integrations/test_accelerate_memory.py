"""accelerate(): the most memory that torch's allocator has out in a call, beside PEFT's."""

import copy

import pytest
import torch
from tiny_models import make_llama
from torch import nn
from torch.profiler import ProfilerActivity, profile

import peft_kernels

peft = pytest.importorskip("peft")

NAMES = ["first", "second"] * 2


def peak_of(call):
    """Above what was there before; the bytes of every allocation, in their order."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > 0
    return most


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
        assert peak_of(lambda: ours(x, **options)) < peak_of(lambda: theirs(x, **options))


@pytest.mark.parametrize("options", [{}, {"adapter_names": NAMES}], ids=["one", "mixed"])
def test_a_model_needs_no_more_for_a_token(options):
    """Where the head has none, its logits may be the most of both."""
    ours, theirs = (model.eval() for model in pair(make_llama(), ["q_proj", "v_proj", "up_proj"]))
    ids = torch.zeros(4, 1, dtype=torch.long)
    with torch.no_grad():
        assert peak_of(lambda: ours(ids, **options)) <= peak_of(lambda: theirs(ids, **options))


def test_a_step_needs_less():
    ours, theirs = (model.train() for model in pair(make_llama(), "all-linear"))
    ids = torch.zeros(4, 16, dtype=torch.long)

    def step(model):
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    assert peak_of(lambda: step(ours)) < peak_of(lambda: step(theirs))
