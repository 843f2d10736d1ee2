"""What a method freezes and somebody may want to train is named, once for each call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from peft_kernels import AdapterPool, load_adapter, save_adapter, swap_linear
from peft_kernels.formats import adapter_hub
from peft_kernels.integrations.transformers.adapters import (
    adapters_of,
    fuse_adapters,
    insert_adapter,
    insert_adapters,
)
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for
from peft_kernels.integrations.transformers.soft_prompts import add_prompt
from peft_kernels.nn import BottleneckAdapter, PromptTuning

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def make(kind: str = "LlamaForSequenceClassification") -> nn.Module:
    return getattr(transformers, kind)(transformers.LlamaConfig(**LLAMA))


def swap(model: nn.Module) -> None:
    swap_linear(model, ["q_proj", "v_proj"], 2, alpha=4)


def add_short_prefix(model: nn.Module) -> None:
    add_prefix(model, prefix_for(model, 3))


def add_short_prompt(model: nn.Module) -> None:
    add_prompt(model, PromptTuning(3, 16))


def insert(model: nn.Module) -> None:
    insert_adapters(model, "pfeiffer", bottleneck_size=4)


def attach_pool(model: nn.Module) -> None:
    AdapterPool.attach(model, ["q_proj"], capacity=16)


METHODS: dict[str, Callable[[nn.Module], None]] = {
    "swap_linear": swap,
    "add_prefix": add_short_prefix,
    "add_prompt": add_short_prompt,
    "insert_adapters": insert,
    "AdapterPool.attach": attach_pool,
}


def said_by(call: Callable[..., object], *args: object) -> list[str]:
    """What a call says of freezing, each time from the line that made it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args)
    found = [one for one in caught if "frozen with the rest" in str(one.message)]
    assert all(one.category is RuntimeWarning and one.filename == __file__ for one in found)
    return [str(one.message) for one in found]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"AdapterPool.attach"}))
def test_a_new_head_is_named(method):
    model = make()
    (said,) = said_by(METHODS[method], model)
    assert said.startswith("the head score is frozen") and "requires_grad_(True)" in said
    assert not model.score.weight.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_said_of_a_head_that_was_frozen_nor_of_a_language_model(method):
    model = make()
    model.score.requires_grad_(False)
    assert said_by(METHODS[method], model) == []
    assert said_by(METHODS[method], make("LlamaForCausalLM")) == []


def test_a_pool_says_nothing_of_a_head_that_it_may_only_serve():
    model = make()
    assert said_by(attach_pool, model) == []
    assert not model.score.weight.requires_grad


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ("swap_linear", "add_prefix", "model.layers.0.self_attn.q_proj"),
        ("swap_linear", "add_prompt", "model.layers.0.self_attn.q_proj"),
        ("swap_linear", "insert_adapters", "model.layers.0.self_attn.q_proj"),
        ("insert_adapters", "swap_linear", "model.layers.0.adapter"),
        ("add_prefix", "swap_linear", "prefix_tuning"),
        ("add_prompt", "insert_adapters", "soft_prompt"),
        ("add_prefix", "AdapterPool.attach", "prefix_tuning"),
    ],
)
def test_another_method_s_parameters_are_named(first, second, where):
    model = make("LlamaForCausalLM")
    METHODS[first](model)
    of_the_first = [p for p in model.parameters() if p.requires_grad]
    (said,) = said_by(METHODS[second], model)
    names, _, verb = said.partition(" frozen")[0].rpartition(" ")
    assert verb == ("are" if "," in names else "is")
    assert said.startswith(where) and "head score" not in said
    assert of_the_first and not any(p.requires_grad for p in of_the_first)


def test_an_adapter_put_into_a_model_that_trains_as_a_whole_is_named():
    model = make("LlamaForCausalLM")
    insert_adapter(model, "model.layers.1.mlp", BottleneckAdapter(16, 4))
    (said,) = said_by(swap, model)
    assert said.startswith("model.layers.1.mlp.adapter is frozen")


def test_swapping_other_layers_later_leaves_the_first_training():
    model = make("LlamaForCausalLM")
    swap(model)
    first = [p for p in model.parameters() if p.requires_grad]
    assert said_by(lambda: swap_linear(model, ["k_proj"], 2, alpha=4)) == []
    assert all(p.requires_grad for p in first)


def test_heads_outside_of_the_base_are_named_whatever_they_are_called():
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 32}
    config = transformers.DistilBertConfig(**sizes)
    model = transformers.DistilBertForSequenceClassification(config)
    (said,) = said_by(lambda: swap_linear(model, ["q_lin"], 2, alpha=4))
    assert said.startswith("pre_classifier, classifier are frozen")


def test_fusing_names_a_head_and_not_the_adapters_that_it_fuses():
    model = make()
    insert_adapters(model, "pfeiffer", bottleneck_size=4, train_head=True)
    (said,) = said_by(fuse_adapters, model, [adapters_of(model)])
    assert said.startswith("the head score is frozen")


def test_a_head_that_is_read_is_not_spoken_of(tmp_path):
    trained = make()
    swap(trained)
    trained.score.requires_grad_(True)
    save_adapter(trained, tmp_path / "with")
    trained.score.requires_grad_(False)
    save_adapter(trained, tmp_path / "without")
    model = make()
    assert said_by(load_adapter, model, tmp_path / "with") == []
    assert torch.equal(model.score.weight, trained.score.weight)
    (said,) = said_by(load_adapter, make(), tmp_path / "without")
    assert said.startswith("the head score is frozen")


def test_a_head_in_an_adapter_hub_folder_is_not_spoken_of(tmp_path):
    trained = make()
    insert_adapters(trained, "pfeiffer", bottleneck_size=4, train_head=True)
    for name, with_head in (("with", True), ("without", False)):
        adapter_hub.save_adapter(trained, tmp_path / name, "task", with_head=with_head)
    assert said_by(adapter_hub.load_adapter, make(), tmp_path / "with") == []
    (said,) = said_by(adapter_hub.load_adapter, make(), tmp_path / "without")
    assert said.startswith("the head score is frozen")
