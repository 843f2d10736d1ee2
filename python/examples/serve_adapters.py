"""Serves a model with many LoRA adapters over HTTP: a tenant each, whoever comes together a batch.

    pip install fastapi uvicorn
    python python/examples/serve_adapters.py path/to/model legal=adapters/legal french=adapters/fr

    curl localhost:8000/generate -H 'content-type: application/json' \
         -d '{"tenant": "legal", "prompt": "The undersigned", "max_new_tokens": 16}'
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

import peft_kernels

WAIT, MOST = 0.005, 16  # seconds that the first of a batch waits for others, and how many it takes


class Request(BaseModel):
    prompt: str
    tenant: str | None = None  # None is the model without an adapter
    max_new_tokens: int = Field(32, gt=0, le=1024)


def serve(model, tokenizer, pool: peft_kernels.AdapterPool) -> FastAPI:
    """The application; the pool's adapters may be loaded, replaced and unloaded meanwhile."""
    waiting: asyncio.Queue[tuple[Request, asyncio.Future[str]]] = asyncio.Queue()
    tokenizer.padding_side = "left"  # new tokens follow the last of each prompt
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def answer(batch: list[Request]) -> list[str]:
        inputs = tokenizer([one.prompt for one in batch], return_tensors="pt", padding=True)
        most = max(one.max_new_tokens for one in batch)
        with pool.route([one.tenant for one in batch]):
            rows = model.generate(**inputs.to(model.device), max_new_tokens=most, do_sample=False)
        rows = rows[:, inputs["input_ids"].shape[1] :]
        kept = [row[: one.max_new_tokens] for one, row in zip(batch, rows, strict=True)]
        return tokenizer.batch_decode(kept, skip_special_tokens=True)

    async def answers(batch: list[Request]) -> list[str | Exception]:
        try:
            return list(await asyncio.to_thread(answer, batch))
        except Exception as error:  # of one, as its tenant left meanwhile: the others are answered
            return [error] if len(batch) == 1 else [(await answers([one]))[0] for one in batch]

    async def work() -> None:
        while True:
            taken = [await waiting.get()]
            await asyncio.sleep(WAIT)
            while len(taken) < MOST and not waiting.empty():
                taken.append(waiting.get_nowait())
            requests, futures = zip(*taken, strict=True)
            results = await answers(list(requests))
            for future, result in zip(futures, results, strict=True):
                if not future.done():  # its client may be gone
                    failed = isinstance(result, Exception)
                    (future.set_exception if failed else future.set_result)(result)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    async def generate(request: Request) -> dict[str, str]:
        if request.tenant is not None and request.tenant not in pool.names():
            raise HTTPException(404, f"tenant must be one of {pool.names()}; got {request.tenant}")
        future = asyncio.get_running_loop().create_future()
        await waiting.put((request, future))
        return {"text": await future}

    return app


if __name__ == "__main__":
    import uvicorn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, *adapters = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    pool = peft_kernels.AdapterPool.attach(model.eval(), "all-linear", capacity=1024)
    for name, folder in (one.split("=", 1) for one in adapters):
        pool.load(name, folder)
    uvicorn.run(serve(model, tokenizer, pool), port=8000)
