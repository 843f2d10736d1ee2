"""Writes the LoRA layers of a model, or of a pool, into a folder of PEFT's."""

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
    path_of,
    safetensors_of,
    write_files,
)
from peft_kernels.formats.peft_lora.contents import KEY_PREFIX, KEYS, Adapter
from peft_kernels.integrations.peft.beside import check_without_peft
from peft_kernels.models.in_place import check_in_place
from peft_kernels.models.modules_to_save import (
    modules_to_save_of,
    settings_of,
    writable_task_type,
)
from peft_kernels.models.swap import lora_layers_in, named
from peft_kernels.models.targets import matches
from peft_kernels.modules.bases import check_memory, is_sharded
from peft_kernels.modules.names import gathered, plain_modules, unwrapped
from peft_kernels.modules.replaced import check_stored
from peft_kernels.nn.lora import LoRALinear
from peft_kernels.nn.lora_settings import alpha_of


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
    layers = lora_layers_in(model)
    if not layers or "" in layers:
        raise ValueError("model must have LoRALinear layers below it; it has none")
    check_without_peft(model, layers)
    for name, layer in layers.items():
        with named(name):
            check_stored(layer, own=layer.adapter_names)
            check_memory(layer.lora_b, "lora_b")
    _warn_of_untrained(layers)
    adapted = {
        name: AdaptedLayer(
            Adapter(*(getattr(layer, own).detach() for own in layer.adapter_names)),
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


def _tensors_of(layers: Mapping[str, AdaptedLayer]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        for key, tensor in zip(KEYS, layer.adapter, strict=True):
            if tensor is not None:
                tensors[f"{KEY_PREFIX}{name}.{key}"] = tensor
    return tensors


def _config_of(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], task_type: str | None
) -> dict[str, Any]:
    use_rslora = all(layer.use_rslora for layer in layers.values())
    magnitudes = {layer.adapter.magnitude is not None for layer in layers.values()}
    if len(magnitudes) > 1:
        raise ValueError("use_dora must be on in all of the model's LoRALinear layers or in none")
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: alpha_of(layer.scale, layer.r, use_rslora) for name, layer in layers.items()}
    r, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    base = getattr(model, "config", None)
    return (
        {
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
        }
        | ({"use_dora": True} if magnitudes == {True} else {})
        | _auto_mapping(model, task_type)
    )


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
