"""generate with transformers' streamers: texts come while other threads run, each of its route."""

import asyncio
import threading

import pytest
import torch
from test_pool_rows import ATTENTION, in_pool, make_llama
from tiny_models import transformers

PROMPT = torch.tensor([[3, 4, 5]])
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Numbers:
    """A tokenizer whose words are the ids."""

    def decode(self, ids, **options):
        return "".join(f"{int(i)} " for i in ids)


def text_of(model, pool, name):
    with pool.route([name]):
        rows = model.generate(PROMPT, **OPTIONS)
    return Numbers().decode(rows[0, PROMPT.shape[1] :])


@pytest.fixture
def served():
    model, pool = in_pool(make_llama, ATTENTION)
    return model, pool, {name: text_of(model, pool, name) for name in ("a", "b", None)}


def streamed(generate):
    """A thread that generates, and the streamer that it writes into."""
    streamer = transformers.TextIteratorStreamer(Numbers(), skip_prompt=True, timeout=60)
    options = {"inputs": PROMPT, "streamer": streamer, **OPTIONS}
    thread = threading.Thread(target=generate, kwargs=options)
    thread.start()
    return thread, streamer


def test_streams_that_run_at_once_have_their_own_adapters(served):
    model, pool, expected = served
    assert len(set(expected.values())) == 3
    names = ["a", "b", None, "b"]
    running = [streamed(pool.bind(model.generate, [name])) for name in names]
    found = [""] * len(names)
    with pool.route(["a"]):  # what reads them has a route of its own, which they don't see
        for pieces in zip(*(streamer for _, streamer in running), strict=True):
            found = [text + piece for text, piece in zip(found, pieces, strict=True)]
            with torch.no_grad():
                model(PROMPT)
    for thread, _ in running:
        thread.join()
    assert found == [expected[name] for name in names]


def test_a_stream_goes_on_with_the_version_that_it_began_with(served):
    model, pool, expected = served
    thread, streamer = streamed(pool.bind(model.generate, ["a"]))
    first = next(streamer)
    pool.unload("a")
    assert first + "".join(streamer) == expected["a"]
    thread.join()


def test_a_thread_that_has_no_route_streams_the_base_model(served):
    model, pool, expected = served
    with pool.route(["a"]):
        thread, streamer = streamed(model.generate)
        assert "".join(streamer) == expected[None]
    thread.join()


def test_asyncio_s_streams_have_the_route_of_their_task(served):
    model, pool, expected = served
    make = transformers.AsyncTextIteratorStreamer

    async def stream(name):
        streamer = make(Numbers(), skip_prompt=True, timeout=60)
        with pool.route([name]):
            running = asyncio.create_task(
                asyncio.to_thread(model.generate, PROMPT, streamer=streamer, **OPTIONS)
            )
            text = "".join([piece async for piece in streamer])
            await running
        return text

    async def together():
        return await asyncio.gather(*map(stream, ("a", "b", None)))

    assert asyncio.run(together()) == [expected[name] for name in ("a", "b", None)]
