"""Under gradient checkpointing, reentrant too, adapters get the gradients they get without."""

import pytest
import torch
from torch import nn

from peft_kernels import AdapterPool, swap_linear
from peft_kernels.integrations.transformers.adapters import (
    adapters_of,
    fuse_adapters,
    insert_adapters,
)
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for
from peft_kernels.integrations.transformers.soft_prompts import add_prompt
from peft_kernels.models.input_grads import _Ask
from peft_kernels.nn import PromptTuning

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    if kind == "Bert":
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).train()


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def lora(model):
    swap_linear(model, r".*\d.*(query|q_proj|down_proj)", 2, alpha=4)
    trained = [m for n, m in model.named_parameters() if "lora_" in n]
    for parameter in trained:
        nn.init.normal_(parameter)
    return trained, None


def pool(model):
    made = AdapterPool.attach(model, r".*\d.*(query|q_proj|down_proj)", capacity=8)
    made.create("a", 2, alpha=4)
    for parameter in made.parameters("a"):
        nn.init.normal_(parameter)
    return made.parameters("a"), made


def bottleneck(model):
    insert_adapters(model, "houlsby")
    return [p for m in adapters_of(model).values() for p in m.parameters()], None


def fusion(model):
    insert_adapters(model, "pfeiffer")
    fuse_adapters(model, [adapters_of(model)])
    return [p for p in model.parameters() if p.requires_grad], None


def gradients(kind, method, order, reentrant, embeds):
    model = make_model(kind)
    if order == "before":
        checkpoint(model, reentrant)
    trained, made = method(model)
    if order == "after":
        checkpoint(model, reentrant)
    head = model.classifier if kind == "Bert" else model.score
    head.requires_grad_(True)
    inputs = {"input_ids": IDS}
    if embeds:
        inputs = {"inputs_embeds": model.get_input_embeddings()(IDS).detach()}
        inputs["attention_mask"] = torch.ones_like(IDS)

    def step():
        model(**inputs).logits.square().sum().backward()

    if made is None:
        step()
    else:
        with made.route(["a"] * 2):
            step()
    assert head.weight.grad is not None
    return [parameter.grad for parameter in trained]


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("method", [lora, pool, bottleneck, fusion])
@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_gradients_with_a_head_that_trains(kind, method, order, embeds):
    expected = gradients(kind, method, None, None, embeds)
    assert all(grad is not None for grad in expected)
    for reentrant in (True, False):
        found = gradients(kind, method, order, reentrant, embeds)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("soft", ["prefix", "prompt"])
def test_a_soft_prompt_beside_a_pool(soft, reentrant):
    found = []
    for is_checkpointed in (False, True):
        model = make_model("Llama")
        if soft == "prefix":
            trained = prefix_for(model, 3)
            add_prefix(model, trained)
        else:
            trained = PromptTuning(3, 16)
            add_prompt(model, trained)
        for parameter in trained.parameters():
            nn.init.normal_(parameter)
        _, made = pool(model)
        trained.requires_grad_(True)
        if is_checkpointed:
            checkpoint(model, reentrant)
        with made.route(["a", "a"]):
            model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
        found.append([parameter.grad for parameter in trained.parameters()])
    torch.testing.assert_close(*found)


def inputs_that_are_differentiated(model: nn.Module) -> list[bool]:
    """Plainly, checkpointed without and with re-entrance, without gradients, and in eval mode."""
    outputs = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, y: outputs.append(y))
    model(IDS)
    checkpoint(model, False)
    model(IDS)
    checkpoint(model, True)
    model(IDS)
    with torch.no_grad():
        model(IDS)
    model.eval()(IDS)
    return [y.requires_grad for y in outputs]


def test_nothing_more_is_differentiated_without_need():
    frozen = make_model("Llama").requires_grad_(False)
    expected = inputs_that_are_differentiated(frozen)  # transformers 5 has hooks of its own
    expected[2] = True
    model = make_model("Llama")
    lora(model)
    assert inputs_that_are_differentiated(model) == expected


def test_other_models_have_no_hooks_for_it():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    swap_linear(model, ["1"], 2, alpha=4)
    tables = [(*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in model.modules()]
    assert not any(isinstance(hook, _Ask) for hooks in tables for hook in hooks)
