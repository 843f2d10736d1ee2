"""What a call of a model carries belongs to it: inside others, half way, in threads, once again."""

import contextvars
import copy
import threading

import pytest
import torch
from prefix_models import hidden, make, tokens

from peft_kernels.calls import carried
from peft_kernels.integrations.transformers.adapters import adapters_of, insert_adapters
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for, prefix_ids
from peft_kernels.integrations.transformers.soft_prompts import add_prompt, task_ids
from peft_kernels.nn import PromptTuning

IDS = tokens(2, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])  # padded on the left
BATCH = {"input_ids": IDS * MASK, "attention_mask": MASK}
TASKS = 3


def of_prefix(name="llama"):
    model = make(name)
    add_prefix(model, prefix_for(model, 3, tasks=TASKS, std=1.0))
    return model, "prefix_ids"


def of_prompt(name="llama", as_prefix="auto"):
    model = make(name)
    prompt = PromptTuning(4, model.config.hidden_size, tasks=TASKS, init="normal", std=1.0)
    add_prompt(model, prompt.double(), as_prefix=as_prefix)
    return model, "task_ids"


def of_parallel():
    model = make("llama")
    insert_adapters(model, "parallel", bottleneck_size=4)
    for adapter in adapters_of(model).values():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
    return model, None


METHODS = {
    "prefix": of_prefix,
    "prefix of t5": lambda: of_prefix("t5"),
    "prompt as a prefix": of_prompt,
    "prompt in the rows": lambda: of_prompt(as_prefix=False),
    "prompt of t5": lambda: of_prompt("t5"),
    "parallel adapters": of_parallel,
}
each_method = pytest.mark.parametrize("method", METHODS)
with_ids = pytest.mark.parametrize("method", [name for name in METHODS if "adapters" not in name])


def call(model, argument, i):
    """The i-th of calls whose answers differ."""
    batch = dict(BATCH) if argument else {"input_ids": (IDS + i) % 32}
    if argument and i is not None:
        batch[argument] = [i, i - 1]
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = IDS
    return hidden(model(**batch))


def a_layer(model):
    """A module that runs in the middle of the model's forward."""
    ends = ("MLP", "LayerFF")
    return next(m for m in model.modules() if type(m).__name__.endswith(ends))


def is_empty():
    return not any(carried.carried().values())


@each_method
@torch.no_grad()
def test_a_call_inside_another(method):
    model, argument = METHODS[method]()
    expected = [call(model, argument, i) for i in range(3)]
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    found, inside = [], []

    def hook(module, args, output):
        if not inside:
            inside.append(True)
            found.append(call(model, argument, 1))

    a_layer(model).register_forward_hook(hook)
    found.append(call(model, argument, 2))
    assert torch.equal(found[0], expected[1]) and torch.equal(found[1], expected[2])
    assert is_empty()


@with_ids
@torch.no_grad()
def test_a_call_inside_another_has_none_of_its_ids(method):
    model, argument = METHODS[method]()
    errors, inside = [], []

    def hook(module, args, output):
        if not inside:
            inside.append(True)
            with pytest.raises(ValueError, match=f"{argument} must be given"):
                call(model, argument, None)
            errors.append(True)

    expected = call(model, argument, 0)
    a_layer(model).register_forward_hook(hook)
    assert torch.equal(call(model, argument, 0), expected) and errors


@each_method
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["before", "half way", "inside another"])
@torch.no_grad()
def test_a_call_that_ends_half_way_leaves_nothing(method, error, place):
    model, argument = METHODS[method]()
    expected = [call(model, argument, i) for i in range(2)]
    fails = []

    def fail(*args):
        if fails:
            fails.pop()
            raise error

    def nest(*args):
        if not fails and place == "inside another" and not inside:
            inside.append(True)
            fails.append(True)
            with pytest.raises(error):
                call(model, argument, 1)

    inside = [True]
    handles = [(model if place == "before" else a_layer(model)).register_forward_pre_hook(fail)]
    handles.append(a_layer(model).register_forward_pre_hook(nest))
    if place == "inside another":
        inside.clear()
        assert torch.equal(call(model, argument, 0), expected[0])
    else:
        fails.append(True)
        with pytest.raises(error):
            call(model, argument, 0)
    assert is_empty()
    assert torch.equal(call(model, argument, 1), expected[1])
    if argument:
        with pytest.raises(ValueError, match=f"{argument} must be given"):
            call(model, argument, None)
    assert is_empty() and handles


@with_ids
@torch.no_grad()
def test_ids_of_a_block_in_threads_and_copies(method):
    """A thread has those that it's handed: as an argument, or with the context."""
    model, argument = METHODS[method]()
    block = prefix_ids if argument == "prefix_ids" else task_ids
    expected = call(model, argument, 1)

    def in_thread(function, *args):
        found = []

        def run():
            try:
                with torch.no_grad():
                    found.append(function(*args))
            except Exception as error:
                found.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    other = copy.deepcopy(model)
    with block(model, [1, 0]):
        context = contextvars.copy_context()
        assert torch.equal(call(model, argument, None), expected)
        assert torch.equal(in_thread(context.run, call, model, argument, None), expected)
        assert torch.equal(in_thread(call, model, argument, 1), expected)
        assert f"{argument} must be given" in in_thread(call, model, argument, None)
        with pytest.raises(ValueError, match=f"{argument} must be given"):
            call(other, argument, None)
    assert "has ended" in in_thread(context.run, call, model, argument, None)
    assert is_empty()


@with_ids
@torch.no_grad()
def test_generate_wants_an_id_for_each_row(method):
    """Two ids for four rows would be those of two beams."""
    model, argument = METHODS[method]()
    with pytest.raises(ValueError, match=f"{argument} must have one id for each of 4 rows; got 2"):
        model.generate(IDS.repeat(2, 1), max_new_tokens=2, **{argument: [0, 1]})
    with pytest.raises(ValueError, match=f"{argument} must have one id for each of 4 rows"):
        inputs = {"input_ids": IDS.repeat(2, 1)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        model(**inputs, **{argument: [0, 1]})


@each_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again_have_what_their_call_had(method, reentrant):
    """Two forwards, and then two backwards in either order, with checkpointing and without."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, argument = METHODS[method]()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = [call(model, argument, i).square().mean() for i in range(2)]
        for loss in losses:
            loss.backward()
        assert is_empty()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain and plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_a_parallel_adapter_wants_what_holds_its_input():
    model, _ = of_parallel()
    mlp = model.model.layers[0].mlp
    with pytest.raises(RuntimeError, match="which holds the adapter's input"):
        mlp(torch.randn(1, 2, 16, dtype=torch.float64))
