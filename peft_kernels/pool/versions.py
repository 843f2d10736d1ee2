"""One version of an adapter: what it is, made of files, of tensors or of nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peft_kernels.formats import peft_lora
from peft_kernels.models.targets import checked_names, matches, pattern_value, require_matches
from peft_kernels.nn.lora_settings import check_settings, scaling
from peft_kernels.nn.multi_lora import MultiLoRALinear
from peft_kernels.pool.pages import Placement

Source = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(eq=False)
class Version:
    """One version of an adapter; replacing it makes another."""

    name: str
    layers: Mapping[str, tuple[int, float]]  # rank and scale by layer
    dropout: float
    use_rslora: bool
    seed: int
    pinned: bool = False
    trainable: bool = False
    placement: Placement = field(default_factory=lambda: Placement(-1, {}))
    last_routed: int = 0
    holds: int = 0  # routes and graphs that may read its pages
    retired: bool = False  # no longer to be had by its name

    @property
    def slot(self) -> int:
        return self.placement.slot


def read_version(
    name: str,
    source: Source,
    config: Mapping[str, Any] | None,
    *,
    model: nn.Module,
    layers: Mapping[str, MultiLoRALinear],
    max_rank: int,
) -> tuple[Version, dict[str, peft_lora.Adapter]]:
    """The adapter in a folder or state dict, and its matrices by layer, checked to fit the pool."""
    config, adapters, modules = peft_lora.read_adapter(source, config)
    if modules:
        raise ValueError(
            f"{name!r} has modules that trained whole, {', '.join(modules)}, and the layers of "
            "a pool alone are routed: load it with load_adapter(), or without them"
        )
    if config["use_dora"]:
        raise ValueError(
            f"{name!r} was trained with use_dora, and a pool has no magnitudes: load it with "
            "load_adapter(), for all rows of a batch"
        )
    unknown = sorted(adapters.keys() - layers)
    if unknown or not adapters:
        raise ValueError(
            f"an adapter's layers must be layers of the pool; {name!r} has {unknown or 'none'}"
        )
    if config.get("target_modules"):
        targets = peft_lora.targets_of(model, config).keys()
        missing = sorted(layers.keys() & targets - adapters.keys())
        if missing:
            raise ValueError(f"{name!r} lacks layers that its target_modules select: {missing}")
    settings = {}
    for layer, adapter in adapters.items():
        n, k = layers[layer].out_features, layers[layer].in_features
        r = peft_lora.check_adapter(layer, adapter, config, n, k)
        _check_rank(layer, r, max_rank)
        settings[layer] = r, peft_lora.scale_of(config, layer)
    return _version(name, settings, config["lora_dropout"], config["use_rslora"]), adapters


def new_version(
    name: str,
    r: int,
    alpha: float,
    dropout: float,
    use_rslora: bool,
    init: str,
    *,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    target_modules: str | Iterable[str] | None,
    layers: Iterable[str],
    max_rank: int,
) -> Version:
    """An adapter of those ``layers`` that are targets, checked to fit the pool."""
    if target_modules is not None:
        target_modules = checked_names("target_modules", target_modules)
        layers = [layer for layer in layers if matches(layer, target_modules)]
        require_matches(target_modules, layers)
    settings = {}
    for layer in layers:
        rank = pattern_value(rank_pattern or {}, layer, r)
        its_alpha = pattern_value(alpha_pattern or {}, layer, alpha)
        check_settings(rank, its_alpha, dropout, init)
        _check_rank(layer, rank, max_rank)
        settings[layer] = rank, scaling(its_alpha, rank, use_rslora)
    return _version(name, settings, dropout, use_rslora)


def _version(
    name: str, layers: Mapping[str, tuple[int, float]], dropout: float, use_rslora: bool
) -> Version:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str; got {name!r}")
    # The same in every process, so that a training run can be repeated.
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
    return Version(name, layers, float(dropout), use_rslora, seed)


def _check_rank(layer: str, r: int, max_rank: int) -> None:
    if r > max_rank:
        raise ValueError(f"rank must be at most the pool's max_rank {max_rank}; got {r} in {layer}")
