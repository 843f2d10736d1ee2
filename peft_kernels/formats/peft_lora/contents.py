"""What is in a folder of PEFT's with a LoRA adapter, once all of it is supported."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_kernels.formats.folder import (
    CONFIG_FILE,
    checked_tensors,
    path_of,
    read_config,
    read_tensors,
)
from peft_kernels.models.modules_to_save import (
    plain_keys,
)
from peft_kernels.models.targets import find_targets, pattern_value
from peft_kernels.nn.lora_settings import check_settings, scaling

KEY_PREFIX = "base_model.model."

INTERPRETED_KEYS = {
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# Keys without a bearing on what the trained adapter computes; the layer tells fan_in_fan_out.
IRRELEVANT_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# Initialisations that leave the base weight as it is.
INNOCENT_INITS = (True, False, "gaussian", "orthogonal")


# PEFT's keys of what an Adapter holds, in its order.
KEYS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


class Adapter(NamedTuple):
    """What was trained of one layer: A [r, k], B [n, r], and with DoRA the magnitude [n]."""

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None = None


class Contents(NamedTuple):
    """What is in a folder."""

    config: dict[str, Any]  # with PEFT's defaults for what it lacks
    adapters: dict[str, Adapter]  # by layer
    modules: dict[str, Tensor]  # of modules that were saved whole, by name


def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
) -> Contents:
    """What is in a folder in PEFT's format, once all of it is supported.

    Args:
        source: a folder in PEFT's format, or the tensors of one by their keys.
        config: fields of PEFT's LoraConfig, with tensors; a folder has its own.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_adapter`.
        TypeError: tensors without a config.
    """
    if isinstance(source, Mapping):
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a dict, beside a state dict; got {config!r}")
        config = _checked_config({"peft_type": "LORA", **config}, "config")
        return _contents(config, checked_tensors("source must be a dict of tensors", source))
    if config is not None:
        raise ValueError(f"config must be None for a folder, which holds its own; got {config!r}")
    folder = path_of("source", source, ", or tensors by their keys")
    config = _read_config(folder)
    if not config.get("target_modules"):
        raise ValueError(f"{folder / CONFIG_FILE}: target_modules must name layers; got nothing")
    return _contents(config, read_tensors(folder))


def _contents(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Contents:
    lora = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    beside = {key: tensor for key, tensor in tensors.items() if key not in lora}
    for key in beside:
        if not key.startswith(KEY_PREFIX):
            raise ValueError(f"keys must begin with {KEY_PREFIX}; got {key}")
    modules = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in beside.items()}
    adapters = _adapters_in(lora)
    for name, adapter in adapters.items():
        if (adapter.magnitude is not None) is not bool(config["use_dora"]):
            raise ValueError(
                f"{name} must have a lora_magnitude_vector just where use_dora is true; it has "
                f"{'none' if adapter.magnitude is None else 'one'}, and use_dora is "
                f"{config['use_dora']!r}"
            )
    return Contents(config, adapters, plain_keys(modules))


def _read_config(folder: Path) -> dict[str, Any]:
    return _checked_config(read_config(folder), folder / CONFIG_FILE)


def _checked_config(config: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """The config with PEFT's defaults for what it lacks, once all of it is supported."""
    _check_supported(where, config)
    defaults = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return defaults | {key: value for key, value in config.items() if value is not None}


_WITH_PEFT = (
    "load it with PEFT (peft.PeftModel.from_pretrained(model, folder)), or merge it there "
    "(merge_and_unload()) and go on with the merged model"
)


def _check_supported(where: Path | str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type must be 'LORA'; got {config.get('peft_type')!r}")
    if config.get("bias") not in (None, "none"):
        raise ValueError(f"{where}: bias must be 'none'; got {config['bias']!r}: {_WITH_PEFT}")
    init = config.get("init_lora_weights", True)
    if init not in INNOCENT_INITS:
        raise ValueError(
            f"{where}: init_lora_weights must be one that leaves the base weight as it is "
            f"({', '.join(map(repr, INNOCENT_INITS))}); got {init!r}: save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes a plain adapter of it, "
            f"or {_WITH_PEFT}"
        )
    known = INTERPRETED_KEYS | IRRELEVANT_KEYS | {"peft_type", "bias", "init_lora_weights"}
    for key, value in config.items():
        if key not in known and value:
            raise ValueError(
                f"{where}: {key} isn't supported and must be off; got {value!r}: {_WITH_PEFT}"
            )
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: modules_to_save must be a list of names; got {names!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{where}: {key} must be an object; got {config[key]!r}")


def _adapters_in(tensors: Mapping[str, Tensor]) -> dict[str, Adapter]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if ".lora_embedding_" in key:
            raise ValueError(f"adapters of embeddings aren't supported; the file has {key}")
        match = re.fullmatch(
            re.escape(KEY_PREFIX) + rf"(.+)\.({'|'.join(map(re.escape, KEYS))})", key
        )
        if match is None:
            raise ValueError(
                f"keys must be {KEY_PREFIX}<name>.lora_A.weight, .lora_B.weight or "
                f".lora_magnitude_vector; got {key}"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    for name, own in found.items():
        if not set(KEYS[:2]) <= set(own):
            raise ValueError(
                f"{name} must have lora_A and lora_B; it has {' and '.join(sorted(own))} only"
            )
    a, b, magnitude = KEYS
    return {name: Adapter(own[a], own[b], own.get(magnitude)) for name, own in found.items()}


def targets_of(model: nn.Module, config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules that the config selects, by name."""
    options = ("exclude_modules", "layers_to_transform", "layers_pattern", "task_type")
    given = {option: config[option] for option in options if option in config}
    return find_targets(model, config["target_modules"], **given)


def check_adapter(name: str, adapter: Adapter, config: Mapping[str, Any], n: int, k: int) -> int:
    """The rank of layer ``name`` by the config, if settings and shapes [r, k], [n, r] are right."""
    r = pattern_value(config["rank_pattern"], name, config["r"])
    alpha = pattern_value(config["alpha_pattern"], name, config["lora_alpha"])
    check_settings(r, alpha, config["lora_dropout"], "gaussian")
    shapes = (("A", adapter.lora_a, (r, k)), ("B", adapter.lora_b, (n, r)))
    for key, tensor, shape in (*shapes, ("magnitude_vector", adapter.magnitude, (n,))):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}.lora_{key} must be {list(shape)}; got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}.lora_{key} must be floating-point; got {tensor.dtype}")
    return r


def scale_of(config: Mapping[str, Any], name: str) -> float:
    """The scale of layer ``name`` by the config."""
    r = pattern_value(config["rank_pattern"], name, config["r"])
    alpha = pattern_value(config["alpha_pattern"], name, config["lora_alpha"])
    return scaling(alpha, r, config["use_rslora"])
