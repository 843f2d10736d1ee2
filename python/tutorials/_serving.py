"""One batch whose rows want different adapters, served by a pool and by what else could serve it.

Every way gives the vectors of the same rows. The models that each have one adapter merged into
their weights are called one after another, each on its own rows; PEFT's model is told each row's
adapter by ``adapter_names``.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _classifier import DEVICE, TARGETS, load_encoder
from torch import Tensor, nn

import peft_kernels
from peft_kernels import AdapterPool
from peft_kernels.nn import LoRALinear
from peft_kernels.tools.bench.measure import Budget, Timing, interleaved

Tokens = Mapping[str, Tensor]

WAYS = {
    "base": "base model, no adapter",
    "pool": "AdapterPool, one mixed batch",
    "merged": "merged models in turn",
    "peft": "PEFT, adapter_names",
}


@dataclass(frozen=True)
class Server:
    """A pretrained encoder of its own, in a pool."""

    encoder: nn.Module
    pool: AdapterPool

    @classmethod
    def load(cls, folders: Mapping[str, Path], rank: int) -> Server:
        """With an adapter of that rank from each folder, by name."""
        encoder = load_encoder().eval()
        pool = AdapterPool.attach(encoder, TARGETS, capacity=len(folders) * rank)
        for name, folder in folders.items():
            pool.load(name, folder)
        return cls(encoder, pool)


def load_merged(folder: Path) -> nn.Module:
    """A pretrained encoder of its own, with the adapter merged into its weights."""
    encoder = peft_kernels.load_adapter(load_encoder(), folder)
    for layer in encoder.modules():
        if isinstance(layer, LoRALinear):
            layer.merge()
    return encoder.eval()


def load_peft(folders: Mapping[str, Path]) -> nn.Module | None:
    """PEFT's model with all of the adapters; None if PEFT isn't installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import PeftModel

    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(load_encoder(), folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    return model.to(DEVICE).eval()


@torch.no_grad()
def time_ways(
    tokens: Tokens,
    counts: Sequence[int],
    folders: Mapping[str, Path],
    merged: Sequence[nn.Module],
    rank: int,
    rounds: int,
) -> dict[str, dict[int, Timing]]:
    """Times ``tokens`` with each number of different adapters in it, neighbours never the same.

    All ways are interleaved in one process; ratios are to the bare base model. More adapters than
    there are ``folders`` are the same ones under further names, and more merged models than there
    are the same ones again: as many calls on as many rows, and weights larger than any cache.
    """
    numbered = zip(range(max(counts)), itertools.cycle(folders.items()))
    loaded = {f"{name}-{i}": folder for i, (name, folder) in numbered}
    base, server, theirs = load_encoder().eval(), Server.load(loaded, rank), load_peft(loaded)
    rows = len(tokens["input_ids"])

    def by_pool(names: list[str]) -> Callable[[], object]:
        def call() -> None:
            with server.pool.route(names):
                server.encoder(**tokens)

        return call

    def by_merged(count: int) -> Callable[[], object]:
        parts = [{key: t[i::count].contiguous() for key, t in tokens.items()} for i in range(count)]

        def call() -> None:
            for i, part in enumerate(parts):
                merged[i % len(merged)](**part)

        return call

    calls: dict[tuple[str, int], Callable[[], object]] = {("base", 0): lambda: base(**tokens)}
    for count in counts:
        names = [list(loaded)[i % count] for i in range(rows)]
        calls["pool", count] = by_pool(names)
        calls["merged", count] = by_merged(count)
        if theirs is not None:
            calls["peft", count] = lambda names=names: theirs(**tokens, adapter_names=names)
    timings = interleaved(calls, base=("base", 0), budget=Budget(rounds=rounds, seconds=0))
    found: dict[str, dict[int, Timing]] = {}
    for (way, count), timing in timings.items():
        found.setdefault(way, {})[count] = timing
    return found
