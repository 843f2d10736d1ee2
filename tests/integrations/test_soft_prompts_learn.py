"""Soft prompts find a known task in a frozen model: what its true name gives is what they can give.

A small GPT-2 is trained on four functions of a sequence, of which a name of NAME tokens in front
says which one is meant. Frozen, and without the name, it can't know; a prompt of NAME soft tokens
can take the name's place, as the name's own embeddings, or its keys and values, would.
"""

import copy
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from tiny_models import transformers
from torch import Tensor

from peft_kernels.integrations.transformers.prefix import add_prefix, init_from_text, prefix_for
from peft_kernels.integrations.transformers.soft_prompts import add_prompt
from peft_kernels.nn import PromptTuning, PTuning, Template
from peft_kernels.nn._template import Input, Slots

pytestmark = pytest.mark.long

LETTERS, LENGTH, NAME, WIDTH = 10, 5, 4, 64
SEPARATOR = LETTERS
PEAK, STEPS, ROWS = 3e-3, 700, 16  # of the pretraining
SEEN, UNSEEN = 10**6, 2 * 10**6  # seeds
FUNCTIONS = {
    "copy": lambda x: x,
    "reverse": lambda x: x.flip(1),
    "rotate": lambda x: x.roll(1, 1),
    "successor": lambda x: (x + 1) % LETTERS,
}


def examples(count, seed) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(LETTERS, (count, LENGTH), generator=generator)


def with_answers(x, name) -> Tensor:
    """[x, separator, f(x)]"""
    return torch.cat([x, torch.full_like(x[:, :1], SEPARATOR), FUNCTIONS[name](x)], 1)


def name_of(function) -> Tensor:
    """A function's name is one token, said NAME times."""
    return torch.full((NAME,), SEPARATOR + 1 + list(FUNCTIONS).index(function))


def named(rows, function) -> Tensor:
    return torch.cat([name_of(function).expand(len(rows), -1), rows], 1)


def answers(logits) -> Tensor:
    """The logits that say f(x), the separator's and those of f(x)'s own letters but the last."""
    return logits[:, -LENGTH - 1 : -1]


def accuracy(logits, rows) -> float:
    return (answers(logits).argmax(-1) == rows[:, -LENGTH:]).double().mean().item()


@cache
def pretrained():
    """The same model, whichever test asks first, and the tests' random numbers stay theirs."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        return pretrain()


def pretrain():
    config = transformers.GPT2Config(
        vocab_size=SEPARATOR + 1 + len(FUNCTIONS),
        n_positions=32,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, STEPS)
    for step in range(STEPS):
        parts = [
            named(with_answers(examples(ROWS, 4 * step + i), name), name)
            for i, name in enumerate(FUNCTIONS)
        ]
        train(optimizer, model(torch.cat(parts)).logits, torch.cat(parts))
        schedule.step()
    return model.eval()


def train(optimizer, logits, rows) -> float:
    loss = F.cross_entropy(answers(logits).flatten(0, 1), rows[:, -LENGTH:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def unseen(function) -> Tensor:
    return with_answers(examples(200, UNSEEN), function)


def make_model():
    """A copy of the model, for a test to put a prompt into."""
    return copy.deepcopy(pretrained())


def without_name(model, rows):
    """The text stands where it stood behind a name, and there is none."""
    places = torch.arange(NAME, NAME + rows.shape[1])
    return model(rows, position_ids=places.expand_as(rows)).logits


LEARNT = ("reverse", "successor")
GUESS = 0.65  # one letter is right for one of them, and in one of ten cases for both
TRAINED = 100  # steps
# Some starts of a prompt end where one letter is wrong, as the loss of the training tells.
STARTS, LEARNT_LOSS = 4, 0.3


# -- what the model does with a name, and without


def named_accuracy(function) -> float:
    """What a prompt can give."""
    rows = unseen(function)
    with torch.no_grad():
        return accuracy(pretrained()(named(rows, function)).logits[:, NAME:], rows)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_name_tells_the_function(function):
    assert named_accuracy(function) > 0.98


def test_without_a_name_nothing_tells_the_function():
    """Whatever the model then does is right for one of two functions that never agree."""
    model, right = pretrained(), []
    for function in LEARNT:
        rows = unseen(function)
        with torch.no_grad():
            right.append(accuracy(without_name(model, rows), rows))
    assert sum(right) / 2 < GUESS


# -- a prompt that holds the name is the name


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_prompt_of_the_name_is_the_name(function):
    rows, model = unseen(function), make_model()
    with torch.no_grad():
        wanted = model(named(rows, function)).logits[:, NAME:]
        name = model.get_input_embeddings()(name_of(function))
        add_prompt(model, PromptTuning(NAME, WIDTH, init=name))
        torch.testing.assert_close(model(rows).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["flat", "mlp"])
def test_a_prefix_of_the_name_is_the_name(kind):
    for function in FUNCTIONS:
        rows, model = unseen(function), make_model()
        prefix = prefix_for(model, NAME, reparametrization=kind)
        assert init_from_text(model, prefix, name_of(function)) < 1e-4
        with torch.no_grad():
            wanted = model(named(rows, function)).logits[:, NAME:]
            add_prefix(model, prefix)
            torch.testing.assert_close(model(rows).logits, wanted, rtol=1e-3, atol=1e-3)


# -- each method finds a function from examples


def add_soft_tokens(model, tasks=1):
    prompt = PromptTuning(NAME, WIDTH, tasks=tasks, init="normal", std=1.0)
    add_prompt(model, prompt)
    return prompt


def add_template(model, encoder):
    prompt = PTuning(Template([Slots(NAME), Input("x")], model="causal"), WIDTH, encoder=encoder)
    add_prompt(model, prompt)
    return prompt


def add_keys_and_values(model, kind, tasks=1):
    prefix = prefix_for(model, NAME, reparametrization=kind, mid=WIDTH, tasks=tasks)
    add_prefix(model, prefix)
    return prefix


METHODS = {
    "prompt tuning": (add_soft_tokens, 1e-1),
    "P-tuning, lstm": (partial(add_template, encoder="lstm"), 2e-3),
    "P-tuning, mlp": (partial(add_template, encoder="mlp"), 3e-3),
    "prefix tuning, flat": (partial(add_keys_and_values, kind="flat"), 1e-1),
    "prefix tuning, mlp": (partial(add_keys_and_values, kind="mlp"), 1e-2),
}


def learn(model, prompt, draw, rate, **options) -> float:
    """From rows that ``draw(step)`` makes anew for each step; the last one's loss."""
    optimizer = torch.optim.Adam(prompt.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, TRAINED)
    model.train()
    for step in range(TRAINED):
        rows = draw(step)
        loss = train(optimizer, model(rows, **options).logits, rows)
        schedule.step()
    model.eval()
    return loss


@pytest.mark.parametrize("method", METHODS)
def test_learns_a_function_from_examples(method):
    add, rate = METHODS[method]
    before, after = [], []
    for function in LEARNT:
        rows = unseen(function)
        for _ in range(STARTS):
            model = make_model()
            prompt = add(model)
            with torch.no_grad():
                untrained = accuracy(model(rows).logits, rows)
            if learn(model, prompt, partial(drawn, function), rate) < LEARNT_LOSS:
                break
        before.append(untrained)
        with torch.no_grad():
            after.append(accuracy(model(rows).logits, rows))
        assert_frozen(model)
    assert sum(before) / 2 < GUESS
    for function, found in zip(LEARNT, after, strict=True):
        assert found > named_accuracy(function) - 0.05


def assert_frozen(model):
    state = model.state_dict()
    for key, value in pretrained().state_dict().items():
        assert torch.equal(state[key], value), key


def drawn(function, step, count=64) -> Tensor:
    return with_answers(examples(count, SEEN + step), function)


# -- a prompt for each function, learnt in one batch


def test_prompts_of_all_functions_learn_in_one_batch():
    model = make_model()
    learn_all(model, add_soft_tokens(model, tasks=4), 1e-1, "task_ids")


def test_prefixes_of_all_functions_learn_in_one_batch():
    model = make_model()
    prefix = add_keys_and_values(model, "mlp", tasks=4)
    learn_all(model, prefix, 1e-2, "prefix_ids")


def learn_all(model, prompt, rate, argument):
    """Rows of all functions, told apart by the ids of their prompts alone."""
    ids = torch.arange(len(FUNCTIONS)).repeat(ROWS)
    order = ids.argsort(stable=True).argsort()  # from function by function to ids' order

    def draw(step):
        return torch.cat([drawn(function, step, ROWS) for function in FUNCTIONS])[order]

    learn(model, prompt, draw, rate, **{argument: ids})
    x = examples(200, UNSEEN)
    for index, function in enumerate(FUNCTIONS):
        asked = torch.full((len(x),), index)
        rows = with_answers(x, function)
        with torch.no_grad():
            found = accuracy(model(rows, **{argument: asked}).logits, rows)
        assert found > named_accuracy(function) - 0.05, function
