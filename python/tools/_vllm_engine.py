"""A vLLM engine in a process of its own, which times batches when it is asked to."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANKS = (32, 8, 64, 16)  # of the adapters, one after the other
LARGEST = max(RANKS)
STOCK, OURS, NONE = "vLLM's own", "peft_kernels", "no LoRA"
WRAPPERS = {STOCK: "PunicaWrapperCPU", OURS: "PunicaWrapperPEFTKernels"}

# SmolLM2-135M's shape, and one of wider layers. Their weights are random.
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M's shape": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Llama, 8 layers of 1024": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """What is served: so many requests of as many adapters, to one length."""

    adapters: int
    sequences: int
    prompt: int
    tokens: int

    @property
    def mean_rank(self) -> float:
        """Of its requests' adapters."""
        ranks = [RANKS[name % len(RANKS)] for name in self.names if name is not None]
        return sum(ranks) / self.sequences

    @property
    def names(self) -> list[int | None]:
        """The adapter of each request; neighbours have different ones."""
        if not self.adapters:
            return [None] * self.sequences
        return [i % self.adapters for i in range(self.sequences)]


@dataclass(frozen=True)
class Answer:
    """Seconds to every request's first token, and from there to the last; the process's peak."""

    prefill: float
    decode: float
    peak_bytes: int


# ---- folders -----------------------------------------------------------------------------------


def write_folders(folder: Path, model: str, dtype: str) -> None:
    """The model's configuration, and an adapter of each rank on all linear layers."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
    shape = MODELS[model]
    config |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", **shape}
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(config))
    for rank in RANKS:
        adapter = folder / f"rank-{rank}"
        adapter.mkdir()
        save_file(_adapter(shape, rank, dtype), adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps(_peft_config(shape, rank)))


def widths(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the layers of a block, by name."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    own = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    attention = {"q": hidden, "k": own, "v": own, "o": hidden}
    widths = {f"self_attn.{name}_proj": (hidden, n) for name, n in attention.items()}
    widths |= {f"mlp.{name}_proj": (hidden, inner) for name in ("gate", "up")}
    return widths | {"mlp.down_proj": (inner, hidden)}


def _peft_config(shape: Mapping[str, Any], rank: int) -> dict[str, Any]:
    targets = sorted(name.partition(".")[2] for name in widths(shape))
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}


def _adapter(shape: Mapping[str, Any], rank: int, dtype: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(rank)
    found = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (k, n) in widths(shape).items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            for part, size in (("lora_A", (rank, k)), ("lora_B", (n, rank))):
                values = 0.02 * torch.randn(size)
                found[f"{key}.{part}.weight"] = values.to(getattr(torch, dtype))
    return found


# ---- the engine's process ----------------------------------------------------------------------


class Engine:
    """vLLM on a folder of :func:`write_folders`, within this process."""

    def __init__(self, way: str, folder: Path, dtype: str, largest: Batch, compiled: bool):
        from vllm import LLM

        from peft_kernels.integrations.vllm.plugin import register

        register()  # as vLLM calls it where the package is installed
        lora = {
            "enable_lora": True,
            "max_loras": max(1, largest.adapters),
            "max_cpu_loras": max(1, largest.adapters),
            "max_lora_rank": LARGEST,
        }
        self.with_lora, self.folder, self.numbers = way != NONE, folder, itertools.count()
        self.llm = LLM(
            str(folder / "model"),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=not compiled,
            enable_prefix_caching=False,
            max_model_len=largest.prompt + largest.tokens + 8,
            max_num_seqs=largest.sequences,
            # Every prompt is in one step.
            max_num_batched_tokens=largest.sequences * (largest.prompt + largest.tokens + 8),
            disable_log_stats=True,
            **(lora if self.with_lora else {}),
        )
        if self.with_lora:
            assert self.wrappers() == {WRAPPERS[way]}, self.wrappers()

    def wrappers(self) -> set[str]:
        """The names of the classes that serve LoRA."""
        core: Any = self.llm.llm_engine.engine_core
        runner = core.engine_core.model_executor.driver_worker.worker.model_runner
        own = runner.lora_manager._adapter_manager.punica_wrapper_mapping
        return {type(wrapper).__name__ for wrapper in own.values()}

    def load(self, batch: Batch) -> None:
        """Has the batch's adapters in the engine's memory."""
        for i in range(batch.adapters if self.with_lora else 0):
            self.llm.llm_engine.add_lora(self._request(i))

    def serve(self, batch: Batch) -> Answer:
        """Times it; an engine without LoRA serves its requests without adapters."""
        from vllm import SamplingParams

        from peft_kernels.tools.bench.peak import peak, reset_peak

        engine = self.llm.llm_engine
        greedy = SamplingParams(
            temperature=0, max_tokens=1 + batch.tokens, ignore_eos=True, detokenize=False
        )
        generator = torch.Generator().manual_seed(next(self.numbers))
        prompts = torch.randint(5, 30000, (batch.sequences, batch.prompt), generator=generator)
        for prompt, name in zip(prompts.tolist(), batch.names, strict=True):
            engine.add_request(
                str(next(self.numbers)),
                {"prompt_token_ids": prompt},
                greedy,
                lora_request=self._request(name) if self.with_lora and name is not None else None,
            )
        reset_peak()
        start = time.perf_counter()
        waiting = batch.sequences
        while waiting:
            waiting -= sum(len(out.outputs[0].token_ids) == 1 for out in engine.step())
        first = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
        return Answer(first - start, time.perf_counter() - first, peak())

    def _request(self, i: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(str(i), 1 + i, str(self.folder / f"rank-{RANKS[i % len(RANKS)]}"))


def _run(pipe: Any, *args: Any) -> None:
    """The process: answers batches until it gets None."""
    engine = Engine(*args)
    pipe.send("ready")
    for batch in iter(pipe.recv, None):
        engine.load(batch)
        pipe.send(engine.serve(batch))


# ---- from outside ------------------------------------------------------------------------------


class Process:
    """An :class:`Engine` in a process, waiting while it isn't asked."""

    def __init__(self, way: str, threads: int, *args: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, way, *args), daemon=True)
        with _environment(way, threads):
            self.process.start()
        theirs.close()
        self.way = way
        self._answer()

    def serve(self, batch: Batch) -> Answer:
        self.pipe.send(batch)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"the engine of {self.way!r} has ended; see what it printed") from None

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join()


@contextmanager
def _environment(way: str, threads: int) -> Iterator[None]:
    """What a process started meanwhile sees: as vLLM starts its own, with so many threads."""
    before = dict(os.environ)
    own = {
        "PEFT_KERNELS_VLLM": str(int(way == OURS)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(threads),
        "LD_PRELOAD": ":".join(map(str, _preloaded())),
    }
    os.environ |= own
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def _preloaded() -> list[Path]:
    """The libraries that vLLM loads first in its processes: an allocator, and torch's OpenMP."""
    roots = [Path(spec.origin).parent for name in ("vllm", "torch") if (spec := find_spec(name))
             and spec.origin]  # fmt: skip
    found = [sorted(root.glob(pattern)) for root, pattern in
             zip(roots, ("libs/libtcmalloc*.so*", "lib/libgomp*.so*"), strict=True)]  # fmt: skip
    return [paths[0] for paths in found if paths]
