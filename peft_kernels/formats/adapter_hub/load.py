"""Puts what folders of the `adapters` library hold into models, and takes it out again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.formats.adapter_hub.config import (
    ADAPTER_FILES,
    FUSION_FILES,
    check_fusable,
    checked_config,
    fusion_options,
    is_number,
    overrides_of,
    preset_of,
    reduction_of,
    require,
)
from peft_kernels.formats.adapter_hub.heads import (
    Head,
    head_tensors,
    read_head,
    take_over,
)
from peft_kernels.formats.adapter_hub.places import (
    Place,
    adapt_embeddings,
    adapter_tensors,
    all_places,
    embeddings_of,
    fusion_tensors,
    host_of,
    insert,
    invertible_tensors,
)
from peft_kernels.formats.folder import path_of, tensors_in
from peft_kernels.integrations.transformers.adapters import remove_adapters
from peft_kernels.integrations.transformers.blocks import adapter_for
from peft_kernels.modules.bases import check_memory
from peft_kernels.modules.hooks import forget_compiled
from peft_kernels.modules.names import check_late_parameters, unwrapped
from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import BottleneckAdapter
from peft_kernels.nn.invertible import InvertibleAdapter
from peft_kernels.ops._activations import activation_name


class _Loaded(NamedTuple):
    """An adapter read from a folder, not yet in the model."""

    where: Path
    config: dict[str, Any]
    places: list[Place]
    adapters: list[BottleneckAdapter]
    invertible: InvertibleAdapter | None


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Puts the adapter in a folder of `adapters` into the model, and freezes the rest.

    seq_bn, double_seq_bn and par_bn, their variants and NICE's invertible adapters can be had;
    the latter are called on the embeddings, as the child ``invertible_adapter`` of the module.
    ``adapter.safetensors`` is read, or else ``pytorch_adapter.bin``, with ``weights_only=True``.

    A head in the folder is copied into the model's, with its labels, and frozen with the rest.
    Where it is of another class of models, or of one that `adapters` builds, it is left out, and a
    UserWarning says so. A head that isn't read and trained until now is frozen with a
    RuntimeWarning, and so are another method's parameters.

    Args:
        model: a model of BERT's family (bert, roberta, xlm-roberta, electra, deberta-v2) or Llama's
            (llama, mistral), without adapters.
        folder: holds ``adapter_config.json`` and the weights.

    Returns:
        The paths of the bottleneck adapters in the model.

    Raises:
        FileNotFoundError: ``folder`` isn't an adapter.
        ValueError: a model of another family or with adapters; a file that can't be read; another
            model's adapter; what the config asks for isn't offered; keys or shapes that don't fit.

    Nothing is changed when one is raised.
    """
    check_late_parameters(model, "load the adapter")
    host, path = host_of(model), path_of("folder", folder)
    loaded, head = _read_adapter(host, path), _checked_head(host, path)
    insert(host, loaded.places, loaded.adapters, _read_with(host, head))
    _put_head(host, head)
    if loaded.invertible is not None:
        embeddings = embeddings_of(host)
        embeddings.add_module("invertible_adapter", loaded.invertible.train(host.training))
        embeddings.register_forward_hook(adapt_embeddings)
        forget_compiled()
    return [f"{place.path}.adapter" for place in loaded.places]


def load_fusion(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_folders: Mapping[str, str | os.PathLike[str]] | None = None,
) -> list[str]:
    """Puts an AdapterFusion and the adapters under it into the model; all but the fusion is frozen.

    A head in ``folder`` is read as by :func:`load_adapter`; those beside the adapters aren't.

    A ``dropout_prob`` that isn't given is the model's ``attention_probs_dropout_prob``.

    Args:
        model: a model of BERT's family (bert, roberta, xlm-roberta, electra, deberta-v2) or Llama's
            (llama, mistral), without adapters.
        folder: holds ``adapter_fusion_config.json`` and the weights.
        adapter_folders: the folder of each adapter, by the name that the fusion has for it;
            ``folder/<name>`` where nothing is said.

    Returns:
        The fusions' paths in the model.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load_adapter`, names that aren't the fusion's,
            adapters at different places, or what `adapters` computes otherwise in a fusion:
            parallel ones have their input added twice, gates and LayerNorms after are left out.

    Nothing is changed when one is raised.
    """
    check_late_parameters(model, "load the fusion")
    host, folder = host_of(model), path_of("folder", folder)
    where, header = _read_header(host, folder, FUSION_FILES)
    names = header.get("adapter_names") or header["name"]
    names = names.split(",") if isinstance(names, str) else names
    folders = {n: folder / n for n in names} if adapter_folders is None else adapter_folders
    if set(folders) != set(names):
        raise ValueError(f"adapter_folders must have {', '.join(names)}; got {', '.join(folders)}")
    loaded = [_read_adapter(host, path_of("adapter_folders", folders[name])) for name in names]
    for one in loaded:
        check_fusable(one.where, one.config)
        if [p[::2] for p in one.places] != [p[::2] for p in loaded[0].places]:
            raise ValueError(f"{one.where} must have the places of {loaded[0].where}, its fellow")
    options = fusion_options(host, where, header["config"], loaded[0].config)
    columns = zip(*(one.adapters for one in loaded), strict=True)
    fusions = [AdapterFusion(column, **options) for column in columns]
    targets: dict[str, Tensor] = {}
    for place, fusion in zip(loaded[0].places, fusions, strict=True):
        fusion.adapters.requires_grad_(False)
        targets |= fusion_tensors(f"{place.key}.adapter_fusion_layer.{header['name']}", fusion)
    tensors = read_tensors(host, folder, FUSION_FILES)
    # `adapters` writes the fusions along whose names begin with this one's.
    mine = f".adapter_fusion_layer.{header['name']}."
    _fill(targets, {key: t for key, t in tensors.items() if mine in key}, folder)
    head = _checked_head(host, folder)
    insert(host, loaded[0].places, fusions, _read_with(host, head))
    _put_head(host, head)
    return [f"{place.path}.adapter" for place in loaded[0].places]


def remove_adapter(model: nn.Module) -> None:
    """Takes out all that was loaded; the model computes what it did before."""
    host = unwrapped(model)
    remove_adapters(host)
    for module in list(host.modules()):
        for key, hook in list(module._forward_hooks.items()):
            if hook is adapt_embeddings:
                del module._forward_hooks[key], module._modules["invertible_adapter"]


def _read_adapter(host: Any, folder: Path) -> _Loaded:
    where, header = _read_header(host, folder, ADAPTER_FILES)
    config = checked_config(where, header)
    preset, overrides = preset_of(where, config), overrides_of(where, config)
    places = [
        place
        for place in all_places(host, preset)
        if config[place.flag] and place.layer not in config["leave_out"]
    ]
    if not places:
        raise ValueError(f"{where} must leave a place for adapters; it asks for none")
    adapters = []
    for place in places:
        reduction = reduction_of(where, config["reduction_factor"], place.layer)
        settings = overrides | {"reduction": reduction}
        adapter = adapter_for(place.module, preset, settings, place.path)
        adapters.append(adapter)
    invertible = _invertible(host, where, config)
    targets = invertible_tensors(header["name"], invertible)
    for place, adapter in zip(places, adapters, strict=True):
        targets |= adapter_tensors(f"{place.key}.adapters.{header['name']}", adapter)
    _fill(targets, read_tensors(host, folder, ADAPTER_FILES), folder)
    return _Loaded(where, config, places, adapters, invertible)


def _read_header(host: Any, folder: Path, files: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """The config file and what it holds, once it is for this model."""
    path = folder / files[0]
    if not path.is_file():
        raise FileNotFoundError(f"folder must be an adapter; {folder} has no {files[0]}")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; {error}") from error
    kinds = {"name": str, "config": dict}
    for key, kind in kinds.items():
        if not isinstance(header, dict) or not isinstance(header.get(key), kind):
            raise ValueError(f"{path} must hold an object with a {key}, a {kind.__name__}")
    for key in ("model_type", "hidden_size"):
        require(path, header, key, (getattr(host.config, key),))
    return path, header


def _invertible(host: Any, where: Path, config: Mapping[str, Any]) -> InvertibleAdapter | None:
    require(where, config, "inv_adapter", (None, "nice"))
    if config["inv_adapter"] is None:
        return None
    factor = config["inv_adapter_reduction_factor"]
    if not is_number(factor) or not factor > 0:
        raise ValueError(f"{where}: inv_adapter_reduction_factor must be above 0; got {factor!r}")
    if host.get_output_embeddings() is not None:
        raise ValueError(
            f"{where}: inv_adapter must be None for a model with an LM head, whose input would "
            f"have to be inverted; got {config['inv_adapter']!r} for {type(host).__name__}"
        )
    weight = next(embeddings_of(host).parameters())
    return InvertibleAdapter(
        getattr(host.config, "embedding_size", host.config.hidden_size),
        reduction=factor,
        activation=activation_name(str(config["non_linearity"]).lower()),
        device=weight.device,
        dtype=weight.dtype,
    )


def read_tensors(host: Any, folder: Path, files: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights by key, without the base model's prefix."""
    present = [folder / name for name in files[1:] if (folder / name).is_file()]
    if not present:
        raise FileNotFoundError(
            f"folder must be an adapter; {folder} has no {files[1]} and no {files[2]}"
        )
    prefix = f"{host.base_model_prefix}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors_in(present[0]).items()}


def _checked_head(host: Any, folder: Path) -> Head | None:
    head = read_head(host, folder)
    if head is not None:
        _check_fit(head_tensors(host), head.tensors, folder)
    return head


def _read_with(host: Any, head: Head | None) -> list[nn.Parameter]:
    held = head_tensors(host).values() if head is not None else ()
    return [tensor for tensor in held if isinstance(tensor, nn.Parameter)]


def _put_head(host: Any, head: Head | None) -> None:
    if head is not None:
        _copy(head_tensors(host), head.tensors)
        take_over(host, head)


def _fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copies a file's tensors into parameters, once all of them fit."""
    _check_fit(targets, tensors, folder)
    _copy(targets, tensors)


def _check_fit(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    missing, unexpected = sorted(targets.keys() - tensors), sorted(tensors.keys() - targets)
    if missing or unexpected:
        raise ValueError(
            f"the keys in {folder} must be those that its config asks for in this model; "
            f"missing: {missing}; unexpected: {unexpected}"
        )
    for key, target in targets.items():
        tensor = tensors[key]
        if tensor.shape != target.shape:
            raise ValueError(f"{key} must be {list(target.shape)}; got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{key} must be floating-point; got {tensor.dtype}")
    for key, target in targets.items():
        check_memory(target, key)


@torch.no_grad()
def _copy(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for key, target in targets.items():
        target.copy_(tensors[key])
