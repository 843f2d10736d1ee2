"""Reads and writes LoRA adapters in Hugging Face PEFT's folder format.

``adapter_config.json`` is PEFT's LoraConfig as JSON; ``adapter_model.safetensors`` holds, for each
layer, ``base_model.model.<name>.lora_A.weight`` [r, k] and ``….lora_B.weight`` [n, r]. A
module that was trained beside them is there whole, ``base_model.model.<name>.weight``, and named in
the config's ``modules_to_save``.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_kernels.formats.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    checked_tensors,
    path_of,
    read_config,
    read_tensors,
    safetensors_of,
    write_files,
)
from peft_kernels.integrations.peft.beside import check_without_peft
from peft_kernels.models.in_place import check_in_place
from peft_kernels.models.modules_to_save import (
    TASK_TYPES,
    fill,
    modules_to_save_of,
    plain_keys,
    remember,
    settings_of,
    targets_in,
    writable_task_type,
)
from peft_kernels.models.swap import (
    Model,
    find_targets,
    matches,
    named,
    pattern_value,
    swap_targets,
)
from peft_kernels.modules.bases import check_bases, check_memory, is_sharded
from peft_kernels.modules.names import check_late_parameters, gathered, plain_modules, unwrapped
from peft_kernels.modules.replaced import check_stored
from peft_kernels.nn.lora import LoRALinear, alpha_of, check_settings, scaling

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


class Adapter(NamedTuple):
    """The trained matrices of one layer: A [r, k], B [n, r]."""

    lora_a: Tensor
    lora_b: Tensor


class Contents(NamedTuple):
    """What is in a folder."""

    config: dict[str, Any]  # with PEFT's defaults for what it lacks
    adapters: dict[str, Adapter]  # by layer
    modules: dict[str, Tensor]  # of modules that were saved whole, by name


class AdaptedLayer(NamedTuple):
    """What a folder says of one layer."""

    adapter: Adapter
    scale: float
    use_rslora: bool
    dropout: float
    fan_in_fan_out: bool

    @property
    def r(self) -> int:
        return self.adapter.lora_a.shape[0]


# ---- save ------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    task_type: str | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Writes every LoRALinear's adapter, and what trains beside them, in PEFT's format.

    Modules outside of LoRA layers that train now, such as a new classification head, are written
    whole, and so are normalisation layers whose running statistics changed since the swap, those
    that :func:`load_adapter` found in a folder, and those that are asked for. For tasks with a head
    PEFT wants that in any case: ``classifier`` and ``score`` of "SEQ_CLS" and "TOKEN_CLS",
    ``qa_outputs`` of "QUESTION_ANS".

    ``peft.PeftModel.from_pretrained(base_model, folder)`` loads the folder, and so does
    :func:`load_adapter`. The rank, alpha and names that most layers share become the config's, the
    others its patterns. A layer's alpha is taken from its present ``scale``. When adapters are
    sharded (DTensor), every process must call this. A folder that exists keeps its other files;
    each file is replaced whole or, when anything fails, not at all.

    Args:
        model: a model with LoRALinear layers below it, merged or not. It and its modules may be
            wrapped, in any order: by DistributedDataParallel, DataParallel, FSDP, torch.compile,
            activation checkpointing, AveragedModel, whose average is written. The names are those
            of the model without wrappers. Of FSDP's every process must call this.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        task_type: PEFT's name of the task, by which its Auto classes load the folder: "CAUSAL_LM",
            "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS" or "FEATURE_EXTRACTION". By
            default what ``swap_linear`` or a loaded folder said.
        modules_to_save: modules to write whole even if they are frozen, by the ends of their names.

    Raises:
        ValueError: there is no LoRALinear below ``model``, an unknown task type or module, or
            something trains that the format has no place for, such as the base of a LoRA layer, or
            PEFT has adapters in the model too.
        RuntimeError: something else replaced one that was there, as ``resize_token_embeddings``
            does; an adapter is pruned, parametrized or the like, for which the format has no place.
        NotADirectoryError: ``folder`` is a file.

    A layer whose B is zero still, where others were trained, gets a RuntimeWarning: nothing called
    it, or its adapter would have had gradients.
    """
    with gathered(model):
        _save(unwrapped(model), path_of("folder", folder), task_type, modules_to_save)


def _save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    task_type: str | None,
    modules_to_save: Sequence[str],
) -> None:
    check_in_place(model)
    settings = settings_of(model)
    layers = _lora_layers(model)
    if not layers or "" in layers:
        raise ValueError("model must have LoRALinear layers below it; it has none")
    check_without_peft(model, layers)
    for name, layer in layers.items():
        with named(name):
            check_stored(layer, own=["lora_a", "lora_b"])
            check_memory(layer.lora_b, "lora_b")
    _warn_of_untrained(layers)
    adapted = {
        name: AdaptedLayer(
            Adapter(layer.lora_a.detach(), layer.lora_b.detach()),
            float(layer.scale),
            layer.use_rslora,
            layer.dropout,
            layer.fan_in_fan_out,
        )
        for name, layer in layers.items()
    }
    task_type = writable_task_type(model, task_type or settings.get("task_type"))
    names, modules = modules_to_save_of(model, modules_to_save, task_type)
    write_adapter(model, adapted, folder, task_type=task_type, names=names, modules=modules)


def _warn_of_untrained(layers: Mapping[str, LoRALinear]) -> None:
    known = {name: layer.lora_b for name, layer in layers.items() if not is_sharded(layer.lora_b)}
    untrained = [name for name, lora_b in known.items() if not lora_b.detach().any()]
    if untrained and len(untrained) < len(known):
        warnings.warn(
            f"lora_b is zero as at first in {len(untrained)} of {len(known)} layers, e.g. "
            f"{untrained[0]}, and others were trained: was it ever called in training? A model "
            "that reads a layer's weight and doesn't call the layer leaves its adapter out",
            RuntimeWarning,
            stacklevel=4,
        )


def write_adapter(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    folder: str | os.PathLike[str],
    *,
    task_type: str | None = None,
    names: Sequence[str] = (),
    modules: Mapping[str, Tensor] | None = None,
) -> None:
    """:func:`save_adapter` for these layers of an unwrapped model, by name.

    Args:
        names: the config's ``modules_to_save``.
        modules: tensors beside the layers', by their names in the model.
    """
    config = _config_of(model, layers, task_type)
    if names:
        config["modules_to_save"] = list(names)
    tensors = _tensors_of(layers) | {KEY_PREFIX + key: t for key, t in (modules or {}).items()}
    contents = {
        WEIGHTS_FILE: safetensors_of(tensors),
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    write_files(Path(folder), contents)


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {
        name: module
        for name, module in plain_modules(model).items()
        if isinstance(module, LoRALinear)
    }


def _tensors_of(layers: Mapping[str, AdaptedLayer]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        for key, tensor in zip(("lora_A", "lora_B"), layer.adapter, strict=True):
            tensors[f"{KEY_PREFIX}{name}.{key}.weight"] = tensor
    return tensors


def _config_of(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], task_type: str | None
) -> dict[str, Any]:
    use_rslora = all(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: alpha_of(layer.scale, layer.r, use_rslora) for name, layer in layers.items()}
    r, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    base = getattr(model, "config", None)
    return {
        "alpha_pattern": {_exact(n): value for n, value in alphas.items() if value != alpha},
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": _most_common(layer.dropout for layer in layers.values()),
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {_exact(n): value for n, value in ranks.items() if value != r},
        "target_modules": _target_modules(model, layers),
        "task_type": task_type,
        "use_rslora": use_rslora,
    } | _auto_mapping(model, task_type)


def _auto_mapping(model: nn.Module, task_type: str | None) -> dict[str, Any]:
    """Where PEFT's AutoPeftModel finds the class of a model of transformers' without a task."""
    if task_type is not None or not hasattr(getattr(model, "config", None), "model_type"):
        return {}
    kind = type(model)
    return {"auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__}}


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _exact(name: str) -> str:
    """A pattern key for this module alone: the anchor keeps PEFT from matching it as an ending."""
    return "^" + re.escape(name)


def _target_modules(model: nn.Module, layers: Iterable[str]) -> str | list[str]:
    """What selects just ``layers``: last parts of names, or full names, or a regular expression."""
    chosen = set(layers)
    names = [name for name in plain_modules(model) if name]
    for endings in ({name.rpartition(".")[2] for name in chosen}, chosen):
        if {name for name in names if matches(name, endings)} == chosen:
            return sorted(endings)
    return "|".join(re.escape(name) for name in sorted(chosen))


# ---- load ------------------------------------------------------------------------------------


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
    layers: dict[str, Any] = _lora_layers(plain)
    swaps = not layers
    if swaps:
        layers = targets_of(plain, config)
        check_bases(plain, layers, takes_values=True)
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
            rank_pattern=config["rank_pattern"],
            alpha_pattern=config["alpha_pattern"],
            silently=[t for t in targets.values() if isinstance(t, nn.Parameter)],
        )
        layers = _lora_layers(plain)
    for name, (lora_a, lora_b) in adapters.items():
        layers[name].switch(lora_a, lora_b, scale=scale_of(config, name))
    fill(plain, targets, modules, names)
    task_type = config.get("task_type")
    remember(plain, task_type=task_type if task_type in TASK_TYPES else None, modules=names or None)


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
    return Contents(config, _adapters_in(lora), plain_keys(modules))


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
        match = re.fullmatch(re.escape(KEY_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(
                f"keys must be {KEY_PREFIX}<name>.lora_A.weight or .lora_B.weight; got {key}"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in found.items():
        if len(pair) != 2:
            raise ValueError(
                f"{name} must have lora_A and lora_B; it has lora_{''.join(pair)} only"
            )
    return {name: Adapter(pair["A"], pair["B"]) for name, pair in found.items()}


def targets_of(model: nn.Module, config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules that the config selects, by name."""
    options = ("exclude_modules", "layers_to_transform", "layers_pattern", "task_type")
    given = {option: config[option] for option in options if option in config}
    return find_targets(model, config["target_modules"], **given)


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
        n, k = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
    check_adapter(name, adapter, config, n, k)
    if isinstance(layer, LoRALinear):
        check_memory(layer.lora_a, f"{name}.lora_a")
        with named(name):
            check_stored(layer, own=["lora_a", "lora_b"])
    if isinstance(layer, LoRALinear) and layer.merged:
        raise RuntimeError(f"{name} is merged; unmerge it before loading an adapter")


def check_adapter(name: str, adapter: Adapter, config: Mapping[str, Any], n: int, k: int) -> int:
    """The rank of layer ``name`` by the config, if settings and shapes [r, k], [n, r] are right."""
    r = pattern_value(config["rank_pattern"], name, config["r"])
    alpha = pattern_value(config["alpha_pattern"], name, config["lora_alpha"])
    check_settings(r, alpha, config["lora_dropout"], "gaussian")
    for key, tensor, shape in (("A", adapter.lora_a, (r, k)), ("B", adapter.lora_b, (n, r))):
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
