"""A small base, adapters for it in PEFT's format, and what a row must get from them."""

import copy
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels import AdapterPool

TARGETS = ["up", "down"]
LAYERS = {"0.up": (12, 8), "0.down": (8, 12), "1.up": (12, 8), "1.down": (8, 12)}  # (n, k)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


def make_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.LayerNorm(8))


class Made(NamedTuple):
    """An adapter: its tensors by PEFT's keys, its config, and the scale in each layer."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    scales: dict[str, float]

    def matrices(self, layer: str) -> tuple[Tensor, Tensor]:
        key = f"base_model.model.{layer}.lora_"
        return self.tensors[f"{key}A.weight"], self.tensors[f"{key}B.weight"]


def make_adapter(
    ranks: Mapping[str, int] | int,
    seed: int = 1,
    *,
    alpha: float = 6.0,
    use_rslora: bool = False,
    dropout: float = 0.0,
    shapes: Mapping[str, tuple[int, int]] = LAYERS,
) -> Made:
    """Random matrices of these ranks, by layer."""
    if isinstance(ranks, int):
        ranks = dict.fromkeys(shapes, ranks)
    generator = torch.Generator().manual_seed(seed)
    tensors, scales = {}, {}
    for layer, r in ranks.items():
        n, k = shapes[layer]
        key = f"base_model.model.{layer}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(r, k, generator=generator) * k**-0.5
        tensors[f"{key}B.weight"] = torch.randn(n, r, generator=generator) * r**-0.5
        scales[layer] = alpha / (r**0.5 if use_rslora else r)
    config = {
        "r": 8,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "rank_pattern": {"^" + re.escape(layer): r for layer, r in ranks.items()},
    }
    return Made(tensors, config, scales)


def merged(base: nn.Module, made: Made | None) -> nn.Module:
    """A float64 copy of a plain model with the adapter added to its weights."""
    model = copy.deepcopy(base).double()
    for layer, scale in made.scales.items() if made else ():
        a, b = made.matrices(layer)
        with torch.no_grad():
            model.get_submodule(layer).weight += scale * b.double() @ a.double()
    return model


def rows_of(base: nn.Module, x: Tensor, adapters: list[Made | None]) -> Tensor:
    """What each x[i] gets from a model with adapter i alone."""
    with torch.no_grad():
        rows = [merged(base, one)(row.double()) for row, one in zip(x, adapters, strict=True)]
    return torch.stack(rows)


OLD, NEW = make_adapter(8, 1), make_adapter(8, 2)
MIXED = {
    "a": make_adapter(4, 1),
    "b": make_adapter({"0.up": 1, "0.down": 17, "1.up": 8, "1.down": 9}, 2, use_rslora=True),
    "c": make_adapter({"1.up": 3}, 3, alpha=1.5),
}


# ---- pools ----------------------------------------------------------------------------------


def make_pool(capacity=64, **options) -> tuple[nn.Module, AdapterPool]:
    model = make_base()
    return model, AdapterPool.attach(model, TARGETS, capacity=capacity, **options)


def load(pool: AdapterPool, name: str, made: Made, **options) -> None:
    pool.load(name, made.tensors, config=made.config, **options)


def routed(pool: AdapterPool, model: nn.Module, ids, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), pool.route(ids):
        return model(x)


def poison(pool: AdapterPool) -> None:
    """NaN in every free page, and in what adapters leave of their last ones."""
    store = pool._store
    pool.memory()  # settles what has been released
    for name, layer in store.layers.items():
        used = torch.zeros(layer.pages_a.shape[0], dtype=torch.bool)
        for version in store.adapters.values():
            if name in version.layers:
                used[layer._rows(version.placement.pages[name], version.layers[name][0])] = True
        layer.pages_a.data[~used] = layer.pages_b.data[~used] = torch.nan


def state_of(pool: AdapterPool):
    """Everything that a refused call must leave as it was."""
    store = pool._store
    versions = {
        name: (id(version), version.placement, version.holds, version.pinned)
        for name, version in store.adapters.items()
    }
    buffers = [t.clone() for layer in store.layers.values() for t in layer.bank]
    free = {name: sorted(pages) for name, pages in store.book.free.items()}
    return versions, free, sorted(store.book.free_slots), buffers


def assert_unchanged(pool: AdapterPool, before) -> None:
    *now, buffers = state_of(pool)
    assert now == list(before[:-1])
    for old, new in zip(before[-1], buffers, strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


def assert_all_free(pool: AdapterPool) -> None:
    memory = pool.memory()
    assert memory.used == 0 and not memory.adapters
    assert set(memory.free_pages.values()) == {pool._store.book.page_count}
    assert len(pool._store.book.free_slots) == pool._store.book.slot_count


def replace(pool: AdapterPool, name: str, made: Made) -> None:
    pool.replace(name, made.tensors, config=made.config)
