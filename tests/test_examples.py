"""The server of python/examples, asked over HTTP by threads and tasks at once."""

import asyncio
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import make_llama
from torch import nn

import peft_kernels

for name in ("fastapi", "uvicorn", "tokenizers"):
    pytest.importorskip(name)
httpx, transformers = pytest.importorskip("httpx"), pytest.importorskip("transformers")
import uvicorn  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "python" / "examples"))

import serve_adapters  # noqa: E402

WORDS = ["</s>", *(f"w{i}" for i in range(31))]
TENANTS = [None, *(f"tenant-{i}" for i in range(8))]
NEW, CLEAR = 4, 1e-2  # tokens; how far a prompt's first choice must be ahead of its second


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", model_input_names=names
    )


@pytest.fixture(scope="module")
def served():
    """A model, and a pool of tenants whose adapters change what it says."""
    torch.manual_seed(0)
    model = make_llama().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    pool = peft_kernels.AdapterPool.attach(model, "all-linear", capacity=256)
    for name in TENANTS[1:]:
        draw(pool, name)
    return model, pool


def draw(pool, name):
    pool.create(name, r=4, alpha=8)
    with torch.no_grad():
        for parameter in pool.parameters(name):
            nn.init.normal_(parameter, std=0.3)
    for parameter in pool.parameters(name):
        parameter.requires_grad_(False)


def alone(model, pool, tokenizer, tenant, prompt):
    """What a batch of one says, and the least of its choices' leads."""
    inputs = tokenizer([prompt], return_tensors="pt")
    with pool.route([tenant]):
        found = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, output_scores=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    tops = [score.topk(2).values[0] for score in found.scores]
    new = found.sequences[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return text, min(float(first - second) for first, second in tops)


@pytest.fixture(scope="module")
def expected(served):
    """Prompts of three lengths and what each tenant is to be told, where rounding can't decide."""
    model, pool = served
    draws, tokenizer, found = random.Random(0), make_tokenizer(), {}
    for i in range(200):
        tenant = TENANTS[i % len(TENANTS)]
        prompt = " ".join(draws.choices(WORDS[1:], k=3 + i % 3))
        text, lead = alone(model, pool, tokenizer, tenant, prompt)
        if lead > CLEAR:
            found[tenant, prompt] = text
    assert {tenant for tenant, _ in found} == set(TENANTS) and len(set(found.values())) > 50
    return found


@contextmanager
def running(app):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(served):
    with running(serve_adapters.serve(served[0], make_tokenizer(), served[1])) as url:
        yield url


def body(tenant, prompt):
    return {"tenant": tenant, "prompt": prompt, "max_new_tokens": NEW}


def wrong_of_threads(url, asked, expected):
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda one: client.post("/generate", json=body(*one)), asked)
        return [one for one, a in zip(asked, answers, strict=True) if a.json() != expected[one]]


async def wrong_of_tasks(url, asked, expected):
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        few = asyncio.Semaphore(8)

        async def ask(one):
            async with few:
                return await client.post("/generate", json=body(*one))

        answers = await asyncio.gather(*map(ask, asked))
    return [one for one, a in zip(asked, answers, strict=True) if a.json() != expected[one]]


@pytest.mark.long
def test_a_thousand_answers_of_eight_tenants_and_the_base(served, url, expected):
    """While adapters of other tenants come and go."""
    expected = {one: {"text": text} for one, text in expected.items()}
    asked = random.Random(1).choices(list(expected), k=1000)
    pool, over = served[1], threading.Event()

    def come_and_go():
        while not over.wait(0.01):
            draw(pool, "visitor")
            pool.unload("visitor")

    others = threading.Thread(target=come_and_go)
    others.start()
    with ThreadPoolExecutor(1) as beside:
        threads = beside.submit(wrong_of_threads, url, asked[:500], expected)
        wrong = asyncio.run(wrong_of_tasks(url, asked[500:], expected))
        wrong += threads.result()
    over.set()
    others.join()
    assert wrong == []


def test_a_few_answers(url, expected):
    some = list(expected)[:20]
    wrong = wrong_of_threads(url, some, {one: {"text": expected[one]} for one in some})
    assert wrong == []


def test_unknown_tenants_and_bad_requests_are_refused(url):
    refused = httpx.post(f"{url}/generate", json=body("nobody", "w1"))
    assert refused.status_code == 404 and "tenant must be one of ['tenant-0'" in refused.text
    assert httpx.post(f"{url}/generate", json={"tenant": "tenant-0"}).status_code == 422
    bad = body(None, "w1") | {"max_new_tokens": 0}
    assert httpx.post(f"{url}/generate", json=bad).status_code == 422


def test_neighbours_of_a_tenant_that_left_are_answered(served, expected, monkeypatch):
    """It was there when its request came, and not when the batch was made."""
    model, pool = served
    app = serve_adapters.serve(model, make_tokenizer(), pool)
    names = [*pool.names(), "gone"]
    monkeypatch.setattr(pool, "names", lambda: names)
    monkeypatch.setattr(serve_adapters, "WAIT", 0.5)
    one = next(iter(expected))
    with running(app) as url, ThreadPoolExecutor(2) as threads:
        answers = threads.map(
            lambda asked: httpx.post(f"{url}/generate", json=body(*asked), timeout=60),
            [one, ("gone", "w1")],
        )
        fine, gone = answers
    assert fine.json() == {"text": expected[one]} and gone.status_code == 500
