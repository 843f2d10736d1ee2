"""Puts the adapter of a folder of PEFT's into a model: all of it fits, or nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from peft_kernels.codes.layers import codes_of, is_of_others, readable
from peft_kernels.formats.folder import (
    path_of,
)
from peft_kernels.formats.peft_lora.contents import (
    Adapter,
    Contents,
    check_adapter,
    read_adapter,
    scale_of,
    targets_of,
)
from peft_kernels.models.modules_to_save import (
    TASK_TYPES,
    fill,
    remember,
    targets_in,
)
from peft_kernels.models.swap import (
    Model,
    lora_layers_in,
    named,
    swap_targets,
)
from peft_kernels.modules.bases import check_bases, check_memory, is_conv1d
from peft_kernels.modules.fully_sharded import reshard
from peft_kernels.modules.names import check_late_parameters, gathered, unwrapped
from peft_kernels.modules.replaced import check_stored
from peft_kernels.nn.lora import LoRALinear


def load_adapter(model: Model, folder: str | os.PathLike[str]) -> Model:
    """Loads an adapter that :func:`save_adapter` or PEFT has written.

    A model that has LoRALinear layers takes over their values and scales; any other model has them
    swapped in first, as the config says (:func:`peft_kernels.swap_linear`), and the rest frozen.
    The adapters are left trainable. ``adapter_model.safetensors`` is read, or else an
    ``adapter_model.bin``, which is unpickled with ``weights_only=True``.

    Modules that the folder has whole (``modules_to_save``, such as a classification head, or the
    embeddings of ``save_embedding_layers``) are copied into the model's; those that the config
    names are left trainable too.

    A layer's matrices stay the same Parameters where they have the rank of the file's. Of another
    rank they are new ones, which an optimizer that was made before doesn't have, nor
    DistributedDataParallel around the model: a RuntimeWarning says so.

    Args:
        model: a plain model, or one with LoRALinear layers, unmerged; wrapped or not.
        folder: holds ``adapter_config.json`` and the weights.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: ``folder`` isn't an adapter.
        ValueError: a file can't be read, the config asks for what isn't supported, or layers, keys,
            ranks or shapes don't fit the model, or a module that was trained by itself is tied to
            another there.
        TypeError: the config targets a layer that isn't linear, or a tensor has integers.
        RuntimeError: a layer is merged, or on the meta device; its A or B is pruned, parametrized
            or the like, so that what is read wouldn't stay.

    Nothing is changed when one is raised.
    """
    contents = read_adapter(path_of("folder", folder))
    with gathered(model, writes=True):
        _load(model, contents)
    return model


def _load(model: nn.Module, contents: Contents) -> None:
    config, adapters, modules = contents
    plain = unwrapped(model)
    reshard(model)
    layers: dict[str, Any] = lora_layers_in(plain)
    swaps = not layers
    if swaps:
        layers = targets_of(plain, config)
        in_codes = readable(layers)
        check_bases(plain, layers, takes_values=True, may_be_sharded=True, in_codes=in_codes)
    _check_fit(layers, adapters, config)
    names = config.get("modules_to_save", ())
    targets = targets_in(plain, modules, names)
    if swaps or any(layers[name].r != one.lora_a.shape[0] for name, one in adapters.items()):
        check_late_parameters(model, "load the adapter")
    if swaps:
        swap_targets(
            plain,
            layers,
            config["r"],
            alpha=config["lora_alpha"],
            dropout=config["lora_dropout"],
            use_rslora=config["use_rslora"],
            use_dora=config["use_dora"],
            rank_pattern=config["rank_pattern"],
            alpha_pattern=config["alpha_pattern"],
            silently=[t for t in targets.values() if isinstance(t, nn.Parameter)],
        )
        layers = lora_layers_in(plain)
    for name, (lora_a, lora_b, magnitude) in adapters.items():
        scale = scale_of(config, name)
        layers[name].switch(lora_a, lora_b, magnitude=magnitude, scale=scale)
    fill(plain, targets, modules, names)
    task_type = config.get("task_type")
    remember(plain, task_type=task_type if task_type in TASK_TYPES else None, modules=names or None)


def _check_fit(
    layers: Mapping[str, Any], adapters: Mapping[str, Adapter], config: Mapping[str, Any]
) -> None:
    missing, unexpected = sorted(layers.keys() - adapters), sorted(adapters.keys() - layers)
    if missing or unexpected:
        raise ValueError(
            "the adapter's layers must be those of the model; "
            f"not in the file: {missing}; not in the model: {unexpected}"
        )
    for name, adapter in adapters.items():
        _check_layer(name, layers[name], adapter, config)


def _check_layer(name: str, layer: Any, adapter: Adapter, config: Mapping[str, Any]) -> None:
    if isinstance(layer, LoRALinear):
        n, k = layer.out_features, layer.in_features
    else:
        n, k = _size_of(layer)
    check_adapter(name, adapter, config, n, k)
    if isinstance(layer, LoRALinear):
        check_memory(layer.lora_a, f"{name}.lora_a")
        check_memory(layer.lora_b, f"{name}.lora_b")
        with named(name):
            check_stored(layer, own=layer.adapter_names)
        if layer.use_dora is not bool(config["use_dora"]):
            raise ValueError(
                f"{name} has use_dora={layer.use_dora}, and the adapter was trained with "
                f"use_dora={config['use_dora']!r}: load it into a model without LoRALinear layers"
            )
    if isinstance(layer, LoRALinear) and layer.merged:
        raise RuntimeError(f"{name} is merged; unmerge it before loading an adapter")


def _size_of(layer: Any) -> tuple[int, int]:
    """n and k of a layer that may get an adapter."""
    if is_of_others(layer):
        return codes_of(layer).shape
    n, k = layer.weight.shape
    return (k, n) if is_conv1d(layer) else (n, k)
