"""Reads and writes bottleneck adapters and AdapterFusions in the `adapters` library's folders.

An adapter is ``adapter_config.json`` with ``adapter.safetensors`` or ``pytorch_adapter.bin``, a
fusion ``adapter_fusion_config.json`` with ``model_adapter_fusion.safetensors`` or
``pytorch_model_adapter_fusion.bin``. The config file tells the host (model_type, hidden_size), the
name and, under ``config``, the method. Keys begin with the path of a sublayer in the base model:

    BERT's family     encoder.layer.N[.attention].output.adapters.<name>.<part>
    Llama, Mistral    layers.N.{attention,output}_adapters.adapters.<name>.<part>
    a fusion's        <as above>.adapter_fusion_layer.<name,name,...>.{query,key,value}.<weight>
    invertible        invertible_adapters.<name>.{F,G}.{0,2}.<weight or bias>

BERT's family is bert, roberta, xlm-roberta, electra and deberta-v2. The keys have ``bert.`` or the
like before them where a model with a head was saved. That prefix is written
always, since `adapters` loads such a file into every model of the family; without it, a fusion
isn't found by a model with a head.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.formats.adapter_hub.config import (
    DEFAULTS,
    FLAGS,
    check_fusable,
    checked_config,
    factor_for,
    fusion_config_of,
    fusion_options,
    is_number,
    overrides_of,
    preset_of,
    reduction_of,
    require,
    settings_of,
    the_one,
)
from peft_kernels.formats.adapter_hub.heads import (
    HEAD_FILES,
    Head,
    head_header,
    head_tensors,
    head_to_write,
    read_head,
    take_over,
)
from peft_kernels.formats.adapter_hub.places import (
    Place,
    adapt_embeddings,
    adapter_tensors,
    adapters_by_place,
    all_places,
    embeddings_of,
    fusion_tensors,
    host_of,
    insert,
    invertible_tensors,
    preset_at,
)
from peft_kernels.formats.folder import path_of, safetensors_of, tensors_in, whole, write_files
from peft_kernels.integrations.transformers.adapters import remove_adapters
from peft_kernels.integrations.transformers.blocks import adapter_for
from peft_kernels.models.modules_to_save import warn_of_left_out
from peft_kernels.modules.bases import check_memory
from peft_kernels.modules.hooks import forget_compiled
from peft_kernels.modules.names import check_late_parameters, unwrapped
from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import BottleneckAdapter
from peft_kernels.nn.invertible import InvertibleAdapter
from peft_kernels.ops._activations import activation_name

# The version of `adapters` whose format this is.
VERSION = "adapters.1.3.0"
# Config file, then the files of the weights: the first that is there is read.
ADAPTER_FILES = ("adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin")
FUSION_FILES = (
    "adapter_fusion_config.json",
    "model_adapter_fusion.safetensors",
    "pytorch_model_adapter_fusion.bin",
)


class _Loaded(NamedTuple):
    """An adapter read from a folder, not yet in the model."""

    where: Path
    config: dict[str, Any]
    places: list[Place]
    adapters: list[BottleneckAdapter]
    invertible: InvertibleAdapter | None


# ---- save --------------------------------------------------------------------------------------


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


# ---- load --------------------------------------------------------------------------------------


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


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or {".", ",", "/"} & set(name):
        raise ValueError(f"name must be a string without dots, commas and slashes; got {name!r}")


def _check_names(names: Sequence[str], count: int) -> None:
    if isinstance(names, str) or len(names) != count or len(set(names)) != count:
        raise ValueError(f"names must be {count} different names, one an adapter; got {names!r}")
    for name in names:
        _check_name(name)
