"""Where adapters stand: in the models of `transformers`, and in the keys of `adapters`' files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_kernels.integrations.transformers.adapters import (
    _HOOKS,
    PRE_NORM,
    AdaptedOutput,
    _put,
    adapters_of,
    check_places,
)
from peft_kernels.integrations.transformers.blocks import ends_a_sublayer, places_in
from peft_kernels.models.freezing import freeze
from peft_kernels.models.input_grads import let_gradients_through
from peft_kernels.modules.names import submodule, unwrapped
from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import BottleneckAdapter
from peft_kernels.nn.invertible import InvertibleAdapter

# Families where `adapters` and insert_adapters compute the same. Its generic hooks for others give
# every layer the last layer's LayerNorm.
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "llama", "mistral")
# Below a layer, where a module with an adapter is: the key of its place, and the config's flag.
_PLACES = {
    "output": ("output", "output_adapter"),
    "attention.output": ("attention.output", "mh_adapter"),
    "": ("output_adapters", "output_adapter"),
    "mlp": ("output_adapters", "output_adapter"),
    "self_attn": ("attention_adapters", "mh_adapter"),
}


class Place(NamedTuple):
    """Where an adapter is, or goes: in the model, in a file and in the config."""

    path: str
    module: nn.Module
    style: str
    key: str
    flag: str
    layer: int


# ---- the model ---------------------------------------------------------------------------------


def host_of(model: nn.Module) -> Any:
    """The unwrapped model, once it is of a family whose folders are known."""
    host: Any = unwrapped(model)
    kind = getattr(getattr(host, "config", None), "model_type", None)
    if kind not in FAMILIES:
        families = ", ".join(FAMILIES)
        raise ValueError(
            f"model must be of transformers, with a model_type of {families}; got "
            f"{type(host).__name__} with {kind!r}"
        )
    return host


def embeddings_of(host: Any) -> nn.Module:
    base = host.base_model
    return unwrapped(base.embeddings if hasattr(base, "embeddings") else base.embed_tokens)


def adapt_embeddings(module: Any, args: tuple, output: Tensor) -> Tensor:
    """Forward hook: the embeddings through the invertible adapter."""
    return module.invertible_adapter(output)


def all_places(host: Any, preset: str) -> list[Place]:
    return [place_of(host, path, module, style) for path, module, style in places_in(host, preset)]


def place_of(host: Any, path: str, module: nn.Module, style: str) -> Place:
    headed = host.base_model_prefix in host._modules
    inner = path.removeprefix(f"{host.base_model_prefix}.") if headed else path
    match = re.fullmatch(r"(.*?\.(\d+))(?:\.(.+))?", inner)
    if match is None or (match[3] or "") not in _PLACES:
        raise ValueError(f"adapters must be after a sublayer; the format has no place for {path}")
    key, flag = _PLACES[match[3] or ""]
    return Place(path, module, style, f"{match[1]}.{key}", flag, int(match[2]))


def adapters_by_place(host: Any, kind: type[nn.Module]) -> list[tuple[Place, Any]]:
    found = adapters_of(host)
    # A fusion's own adapters have other names, so these are what stands at the places.
    if others := [path for path, module in found.items() if not isinstance(module, kind)]:
        raise ValueError(f"{others[0]} must be of {kind.__name__} to be saved so; it isn't")
    if not found:
        raise ValueError(f"model must have a {kind.__name__} in it; it has none")
    paths = {path.rpartition(".")[0]: module for path, module in found.items()}
    return [(place_of(host, p, submodule(host, p), ""), module) for p, module in paths.items()]


def preset_at(place: Place) -> str:
    """The preset whose style a module's adapter is called in."""
    if isinstance(place.module, AdaptedOutput):
        return place.module.style.partition(" ")[0]
    if _HOOKS["parallel"] in place.module._forward_hooks.values():
        return "parallel"
    if ends_a_sublayer(place.module):
        return "adapterplus"
    return "pfeiffer" if set(place.module._modules) >= PRE_NORM else "houlsby"


def insert(
    host: Any,
    places: Sequence[Place],
    adapters: Sequence[nn.Module],
    head: Iterable[nn.Parameter],
) -> None:
    """Freezes the model and puts the adapters into it, or raises before anything is done.

    ``head`` is what the folder has values of.
    """
    taken = [f"{path}.adapter" for path in (p.path for p in places) if _has_adapter(host, path)]
    taken += list(adapters_of(host))
    if "invertible_adapter" in embeddings_of(host)._modules:
        taken.append("embeddings")
    if taken:
        raise ValueError(f"model has adapters already, e.g. at {taken[0]}")
    check_places(places)
    freeze(host, silently=head)
    let_gradients_through(host)
    for place, adapter in zip(places, adapters, strict=True):
        _put(host, place.path, adapter, place.style)


def _has_adapter(host: Any, path: str) -> bool:
    return "adapter" in submodule(host, path)._modules


# ---- tensors by key ----------------------------------------------------------------------------


def adapter_tensors(key: str, adapter: BottleneckAdapter) -> dict[str, Tensor]:
    """The parameters under the file's keys; a norm before has two of each."""
    linear = 0 if adapter.norm_before is None else 1
    parts: dict[str, nn.Module | None] = {
        f"adapter_down.{linear}": adapter.down,
        "adapter_up": adapter.up,
    }
    if adapter.norm_before is not None:
        parts |= {"adapter_norm_before": adapter.norm_before, "adapter_down.0": adapter.norm_before}
    parts |= {"adapter_norm_after": adapter.norm_after, "gate": adapter.gate}
    scaling = {f"{key}.scaling": adapter.scaling} if isinstance(adapter.scaling, Tensor) else {}
    return _parameters(key, parts) | scaling


def fusion_tensors(key: str, fusion: AdapterFusion) -> dict[str, Tensor]:
    parts = {"query": fusion.query, "key": fusion.key, "value": fusion.value}
    return _parameters(key, parts)


def invertible_tensors(name: str, invertible: InvertibleAdapter | None) -> dict[str, Tensor]:
    return _parameters("invertible_adapters", {name: invertible})


def _parameters(key: str, parts: Mapping[str, nn.Module | None]) -> dict[str, Tensor]:
    return {
        f"{key}.{part}.{name}": parameter
        for part, module in parts.items()
        if module is not None
        for name, parameter in module.named_parameters()
    }
