"""disabled: a model without its adapters for a while."""

import asyncio
import contextvars
import threading

import pytest
import torch
from lora_models import IDS, base, logits, models, swapped
from torch import nn

import peft_kernels
from peft_kernels import disabled, merge, unload
from peft_kernels.integrations.transformers.adapters import adapters_of, insert_adapters
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for

transformers = pytest.importorskip("transformers")


@models
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_model(kind, merged):
    model, expected = swapped(kind), logits(base(kind))
    if merged:
        merge(model)
    adapted = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), expected)
        with disabled(model):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_is_computed_again_with_what_was_off(reentrant):
    model = swapped("llama").double().train()
    model.get_input_embeddings().weight.requires_grad_()
    loss = model(IDS).logits.sum()
    loss.backward()
    adapted = gradients(model)
    with disabled(model):
        model(IDS).logits.sum().backward()
        off = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS).logits.sum().backward()
        torch.testing.assert_close(gradients(model), off)
        loss = model(IDS).logits.sum()
    with pytest.raises(RuntimeError, match=r"call backward\(\) inside the with-block"):
        loss.backward()
    model.zero_grad()
    loss = model(IDS).logits.sum()
    with disabled(model):
        loss.backward()
    torch.testing.assert_close(gradients(model), adapted)
    unload(model, merge=False)
    assert not any(
        hasattr(module.__dict__.get("_gradient_checkpointing_func"), "checkpoint")
        for module in model.modules()
    )


def test_disabled_turns_off_one_model():
    model, other = swapped("llama"), swapped("llama")
    adapted = logits(other)
    with disabled(model), disabled(base_of_gpt2 := swapped("gpt2")):
        assert torch.equal(logits(other), adapted)
        assert torch.equal(logits(model), logits(base("llama")))
        assert torch.equal(logits(base_of_gpt2), logits(base("gpt2")))


def test_disabled_is_of_its_thread():
    model, expected = swapped("llama"), {}
    adapted, plain = logits(model), logits(base("llama"))
    inside, done = threading.Barrier(2), threading.Barrier(2)

    def other():
        inside.wait()
        expected["other"] = logits(model)
        done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with disabled(model):
        inside.wait()
        expected["here"] = logits(model)
        done.wait()
    thread.join()
    assert torch.equal(expected["here"], plain) and torch.equal(expected["other"], adapted)


def test_disabled_is_of_its_task():
    model = swapped("llama")
    adapted, plain = logits(model), logits(base("llama"))

    async def one(off: bool, first: float, second: float) -> torch.Tensor:
        await asyncio.sleep(first)
        if not off:
            return logits(model)
        with disabled(model):
            await asyncio.sleep(second)
            return logits(model)

    async def all_of_them():
        return await asyncio.gather(one(True, 0, 0.03), one(False, 0.01, 0), one(True, 0.02, 0.03))

    for result, expected in zip(asyncio.run(all_of_them()), (plain, adapted, plain), strict=True):
        assert torch.equal(result, expected)


def test_disabled_pool():
    model = base("llama")
    expected = logits(model)
    pool = peft_kernels.AdapterPool.attach(model, ["q_proj"], capacity=8)
    pool.create("a", 2, alpha=4)
    for name, parameter in pool.named_parameters("a"):
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    with pool.route(["a", "a"]):
        adapted = logits(model)
        with disabled(model):
            torch.testing.assert_close(logits(model), expected)
        assert torch.equal(logits(model), adapted) and not torch.allclose(adapted, expected)


def test_disabled_without_anything_to_disable():
    with pytest.raises(ValueError, match="adapters that can be disabled; it has none"):  # noqa: SIM117  the raise is on entering
        with disabled(base("llama")):
            pass


def test_disabled_beside_a_prefix_is_refused():
    model = swapped("llama")
    add_prefix(model, prefix_for(model, 3))
    with pytest.raises(ValueError, match="prefix or prompt"), disabled(model):
        pass


def test_what_inherits_a_block_that_has_ended_is_refused():
    model = swapped("llama")
    with disabled(model):
        context = contextvars.copy_context()
        assert torch.equal(context.run(logits, model), logits(base("llama")))
    with pytest.raises(RuntimeError, match="has ended"):
        context.run(logits, model)


def test_disabled_data_parallel_is_refused():
    with (
        pytest.raises(ValueError, match="DataParallel"),
        disabled(nn.DataParallel(swapped("gpt2"))),
    ):
        pass


@pytest.mark.parametrize("preset", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_disabled_bottleneck_adapters(kind, preset):
    if kind == "llama":
        model = base("llama").model
    else:
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.BertModel(config).eval()
    with torch.no_grad():
        expected = model(IDS).last_hidden_state
        insert_adapters(model, preset)
        for adapter in adapters_of(model).values():
            nn.init.normal_(adapter.up.weight)
        adapted = model(IDS).last_hidden_state
        with disabled(model):
            assert torch.equal(model(IDS).last_hidden_state, expected)
        assert torch.equal(model(IDS).last_hidden_state, adapted)
    assert not torch.allclose(adapted, expected, atol=1e-3)
