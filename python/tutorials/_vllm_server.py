"""vLLM's HTTP server in a process of its own, and a client that asks it from several threads."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THREADS = 16  # of the client: so many requests are under way at a time
BASE = "base"


@dataclass(frozen=True)
class Request:
    """A prompt, and the adapter that answers it, or BASE."""

    model: str
    prompt: str


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Server:
    """Where a server listens."""

    url: str

    def ask(self, request: Request, tokens: int, **options: Any) -> Reply:
        body = {"model": request.model, "prompt": request.prompt, "max_tokens": tokens}
        body |= {"temperature": 0, **options}
        start = time.perf_counter()
        posted = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(posted) as answer:
            found = json.load(answer)
        seconds = time.perf_counter() - start
        return Reply(found["choices"][0]["text"], found["usage"]["completion_tokens"], seconds)

    def ask_all(self, requests: Sequence[Request], tokens: int, **options: Any) -> list[Reply]:
        """In order; THREADS of them at a time."""
        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(lambda one: self.ask(one, tokens, **options), requests))


@contextmanager
def started(
    model: Path, adapters: Mapping[str, Path], rank: int, log: Path, settings: Mapping[str, str]
) -> Iterator[Server]:
    """A server of the model and of adapters by name, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", BASE, "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", str(THREADS)),
        *("--enforce-eager", "--no-enable-prefix-caching"),
        *("--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(rank)),
        *("--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | settings
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            yield Server(_listening(process, port, log))
        finally:
            process.terminate()
            process.wait()


def _listening(process: subprocess.Popen[bytes], port: int, log: Path) -> str:
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health")
            return url
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server has ended; {log} says why:\n{log.read_text()[-2000:]}")
