"""Writes bottleneck adapters and AdapterFusions into folders of the `adapters` library."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats.adapter_hub.config import (
    ADAPTER_FILES,
    DEFAULTS,
    FLAGS,
    FUSION_FILES,
    check_fusable,
    factor_for,
    fusion_config_of,
    settings_of,
    the_one,
)
from peft_kernels.formats.adapter_hub.heads import (
    HEAD_FILES,
    head_header,
    head_to_write,
)
from peft_kernels.formats.adapter_hub.places import (
    adapter_tensors,
    adapters_by_place,
    all_places,
    embeddings_of,
    fusion_tensors,
    host_of,
    invertible_tensors,
    preset_at,
)
from peft_kernels.formats.folder import path_of, safetensors_of, whole, write_files
from peft_kernels.models.modules_to_save import warn_of_left_out
from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import BottleneckAdapter
from peft_kernels.nn.invertible import InvertibleAdapter
from peft_kernels.ops._activations import activation_name

# The version of `adapters` whose format this is.
VERSION = "adapters.1.3.0"


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str,
    *,
    safetensors: bool | None = None,
    with_head: bool | None = None,
) -> None:
    """Writes the model's adapter, and its head, as `adapters` would.

    There, ``model.load_adapter(folder)`` loads it, with ``use_safetensors=True`` or without. A
    folder that exists keeps its other files, but for weights in a format that isn't written. What
    else trains, such as LayerNorms, has no place in the format: a UserWarning names it.

    Args:
        model: a model of BERT's family (bert, roberta, xlm-roberta, electra, deberta-v2) or Llama's
            (llama, mistral), with adapters of ``insert_adapters`` or :func:`load_adapter`.
        folder: where the config and the weights go.
        name: what the adapter is called there; without dots and commas.
        safetensors: True for ``adapter.safetensors`` alone, which is loaded there with
            ``use_safetensors=True``; False for ``pytorch_adapter.bin`` alone, which is loaded
            without it; None for both.
        with_head: whether the model's head is written too, which `adapters` loads into a model of
            the same class. By default where it trains, or came out of a folder.

    Raises:
        ValueError: an unfit name, a model of another family, no adapters or fused ones, adapters
            that one config can't describe, or no head to write.
    """
    host, path = host_of(model), path_of("folder", folder)
    _check_name(name)
    adapters = adapters_by_place(host, BottleneckAdapter)
    invertible = embeddings_of(host)._modules.get("invertible_adapter")
    head = head_to_write(host, with_head)
    _write_adapter(host, path, name, adapters, invertible, safetensors)
    _write_head(host, path, head, safetensors)
    warn_of_left_out(host, head)


def save_fusion(
    model: nn.Module,
    folder: str | os.PathLike[str],
    names: Sequence[str],
    *,
    safetensors: bool | None = None,
    with_head: bool | None = None,
) -> None:
    """Writes the model's fusion to ``folder``, and each adapter to ``folder/<name>``.

    In `adapters`, each is loaded with ``load_adapter``, then the fusion with
    ``load_adapter_fusion(folder)``.

    Args:
        model: a model with fusions of ``fuse_adapters`` or :func:`load_fusion`.
        folder: where the files go.
        names: what the adapters are called, in the fusion's order.
        safetensors, with_head: as for :func:`save_adapter`; the head goes to ``folder``, where
            ``load_adapter_fusion(folder, with_head=True)`` finds it.

    Raises:
        ValueError: as for :func:`save_adapter`, another number of names than of adapters, or what
            `adapters` computes otherwise: a temperature, or adapters that are parallel, gated,
            with a LayerNorm after them or with an invertible one.
    """
    host, path = host_of(model), path_of("folder", folder)
    fusions = adapters_by_place(host, AdapterFusion)
    _check_names(names, len(fusions[0][1].adapters))
    if "invertible_adapter" in embeddings_of(host)._modules:
        raise ValueError("model must have no invertible adapter beside a fusion; it has one")
    config = the_one({fusion_config_of(fusion) for _, fusion in fusions}, "fusions", "settings")
    tensors: dict[str, Tensor] = {}
    for place, fusion in fusions:
        tensors |= fusion_tensors(f"{place.key}.adapter_fusion_layer.{','.join(names)}", fusion)
    head = head_to_write(host, with_head)
    children = [[(place, f.adapters[n]) for place, f in fusions] for n in range(len(names))]
    for name, adapters in zip(names, children, strict=True):
        check_fusable(f"adapter {name}", _config_of(host, adapters, None))
    for name, adapters in zip(names, children, strict=True):
        _write_adapter(host, path / name, name, adapters, None, safetensors)
    header = _header(host, ",".join(names), dict(config)) | {"adapter_names": list(names)}
    _write_inside(host, path, FUSION_FILES, header, tensors, safetensors)
    _write_head(host, path, head, safetensors)
    warn_of_left_out(host, head)


def _write_adapter(
    host: Any, folder: Path, name: str, adapters: list, invertible: Any, as_safetensors: bool | None
) -> None:
    config = _config_of(host, adapters, invertible)
    tensors = invertible_tensors(name, invertible)
    for place, adapter in adapters:
        tensors |= adapter_tensors(f"{place.key}.adapters.{name}", adapter)
    _write_inside(host, folder, ADAPTER_FILES, _header(host, name, config), tensors, as_safetensors)


def _write_inside(
    host: Any,
    folder: Path,
    files: tuple[str, ...],
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
    as_safetensors: bool | None,
) -> None:
    """Writes tensors of the base model."""
    tensors = {f"{host.base_model_prefix}.{key}": tensor for key, tensor in tensors.items()}
    _write(folder, files, header, tensors, as_safetensors)


def _write_head(
    host: Any, folder: Path, head: Mapping[str, Tensor], as_safetensors: bool | None
) -> None:
    if head:
        _write(folder, HEAD_FILES, head_header(host, _header(host, "", {})), head, as_safetensors)


def _write(
    folder: Path,
    files: tuple[str, ...],
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
    as_safetensors: bool | None,
) -> None:
    contents = {files[0]: json.dumps(header, indent=2, sort_keys=True).encode()}
    if as_safetensors is not False:
        contents[files[1]] = safetensors_of(tensors)
    if not as_safetensors:
        buffer = io.BytesIO()
        torch.save(whole(tensors), buffer)
        contents[files[2]] = buffer.getvalue()
    write_files(folder, contents)
    for stale in files[1:]:
        if stale not in contents:
            (folder / stale).unlink(missing_ok=True)


def _header(host: Any, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": config,
        "hidden_size": host.config.hidden_size,
        "model_class": type(host).__name__,
        "model_name": host.config.name_or_path,
        "model_type": host.config.model_type,
        "name": name,
        "version": VERSION,
    }


def _config_of(host: Any, adapters: list, invertible: InvertibleAdapter | None) -> dict[str, Any]:
    """The config that describes all of these adapters, by place."""
    preset = the_one({preset_at(place) for place, _ in adapters}, "adapters", "place in a block")
    config = dict(the_one({settings_of(a) for _, a in adapters}, "adapters", "settings"))
    layers: dict[int, dict[str, int]] = {}
    for place, adapter in adapters:
        layers.setdefault(place.layer, {})[place.flag] = adapter.bottleneck_size
    flags = the_one({frozenset(sizes) for sizes in layers.values()}, "layers", "adapters")
    factors = {}
    for layer, sizes in layers.items():
        size = the_one(set(sizes.values()), f"adapters of layer {layer}", "bottleneck_size")
        factors[layer] = factor_for(host.config.hidden_size, size)
    default = Counter(factors.values()).most_common(1)[0][0]
    others = {str(layer): factor for layer, factor in factors.items() if factor != default}
    config |= FLAGS[preset] | {
        "leave_out": sorted({p.layer for p in all_places(host, preset)} - layers.keys()),
        "mh_adapter": "mh_adapter" in flags,
        "output_adapter": "output_adapter" in flags,
        "reduction_factor": {**others, "default": default} if others else default,
    }
    if invertible is not None:
        if invertible.activation != activation_name(config["non_linearity"]):
            raise ValueError(
                "the invertible adapter's activation must be that of the others, "
                f"{config['non_linearity']}; got {invertible.activation}"
            )
        config |= {
            "inv_adapter": "nice",
            "inv_adapter_reduction_factor": invertible.reduction,
        }
    return DEFAULTS | config


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or {".", ",", "/"} & set(name):
        raise ValueError(f"name must be a string without dots, commas and slashes; got {name!r}")


def _check_names(names: Sequence[str], count: int) -> None:
    if isinstance(names, str) or len(names) != count or len(set(names)) != count:
        raise ValueError(f"names must be {count} different names, one an adapter; got {names!r}")
    for name in names:
        _check_name(name)
