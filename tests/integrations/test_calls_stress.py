"""What calls carry, under stress: all methods, four threads and asyncio tasks."""

import asyncio
import random
import sys
import threading

import pytest
import torch
from prefix_models import GREEDY, make, tokens
from tiny_models import make_llama

from peft_kernels import AdapterPool
from peft_kernels.integrations.transformers.adapters import adapters_of, insert_adapters
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for, prefix_ids
from peft_kernels.integrations.transformers.soft_prompts import add_prompt, task_ids
from peft_kernels.nn import PromptTuning

THREADS, TASKS = 4, 3
IDS = tokens(2, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])  # padded on the left
BATCH = {"input_ids": IDS * MASK, "attention_mask": MASK}


def generated(model, **options):
    """The logits of each step, which tell prefixes apart where the tokens may not."""
    found = model.generate(
        **BATCH,
        **GREEDY | {"max_new_tokens": 2} | options,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.logits)


def of_prefix():
    """Three prefixes, by the argument of generate and of a forward, and by a block."""
    model = make("llama")
    add_prefix(model, prefix_for(model, 3, tasks=TASKS))
    model.prefix_tuning.load_state_dict(
        {k: torch.randn_like(v) for k, v in model.prefix_tuning.state_dict().items()}
    )

    def block(i):
        with prefix_ids(model, [i, i - 1]):
            return model(**BATCH).logits

    return {
        "prefix, generate": lambda i: generated(model, prefix_ids=[i, -1]),
        "prefix, forward": lambda i: model(**BATCH, prefix_ids=[i, -1]).logits,
        "prefix, block": block,
    }


def of_prompt(as_prefix):
    """Three prompts, as prefixes or in the rows, whose padding is on the left."""
    model = make("llama")
    prompt = PromptTuning(4, model.config.hidden_size, tasks=TASKS, init="normal", std=1.0)
    add_prompt(model, prompt, as_prefix="auto" if as_prefix else False)
    name = "prompt as a prefix" if as_prefix else "prompt in the rows"

    def block(i):
        with task_ids(model, [i, -1]):
            return generated(model)

    return {
        f"{name}, generate": lambda i: generated(model, task_ids=[i, -1], num_beams=2),
        f"{name}, forward": lambda i: model(**BATCH, task_ids=[-1, i]).logits,
        f"{name}, block": block,
    }


def of_parallel():
    """Parallel adapters: plain forwards of different inputs."""
    model = make("llama")
    insert_adapters(model, "parallel", bottleneck_size=4)
    for adapter in adapters_of(model).values():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
    return {"parallel adapters": lambda i: model((IDS + i) % 32).logits}


def of_pool():
    """A pool's routes; None is the base model."""
    model = make_llama().eval()
    pool = AdapterPool.attach(model, ["q_proj", "down_proj"], capacity=16)
    for name in "01":
        pool.create(name, 4, alpha=16)
        for parameter in pool.parameters(name):
            torch.nn.init.normal_(parameter)
            parameter.requires_grad_(False)
    names = ["0", "1", None]

    def route(i):
        with pool.route([names[i], names[i - 1]]):
            return model(**BATCH).logits

    async def in_task(i):
        with pool.route([names[i], names[i - 1]]):
            await asyncio.sleep(0)
            answer = model(**BATCH).logits
            await asyncio.sleep(0)
            return answer

    def generate(i):
        with pool.route([names[i], None]):
            return generated(model, num_beams=2)

    return {"pool, route": route, "pool, generate": generate, "pool, task": in_task}


@pytest.fixture
def often():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@torch.no_grad()
def test_no_answer_of_a_thousand_is_another_call_s(often):
    calls = of_prefix() | of_prompt(True) | of_prompt(False) | of_parallel() | of_pool()

    async def answer(name, i):
        result = calls[name](i)
        return await result if asyncio.iscoroutine(result) else result

    expected = {(name, i): asyncio.run(answer(name, i)) for name in calls for i in range(TASKS)}
    for name in calls:  # else a wrong answer couldn't be told
        assert not torch.equal(expected[name, 0], expected[name, 1]), name
    wrong, errors, answers = [], [], 0

    def serve(seed):
        nonlocal answers
        rng = random.Random(seed)
        asked = [key for key in expected for _ in range(7)]
        rng.shuffle(asked)

        async def one(key):
            nonlocal answers
            await asyncio.sleep(0)
            with torch.no_grad():
                try:
                    found = await answer(*key)
                except Exception as error:
                    errors.append((key, repr(error)))
                    return
            answers += 1
            if not torch.equal(found, expected[key]):
                wrong.append(key)

        async def in_tasks():
            for first in range(0, len(asked), 8):
                await asyncio.gather(*map(one, asked[first : first + 8]))

        asyncio.run(in_tasks())

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not wrong and answers > 1000, (len(errors), len(wrong), errors[:1])
