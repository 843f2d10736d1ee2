"""A GGUF file into a model of transformers': its linear layers go on in the file's own blocks."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from peft_kernels.formats.gguf.names import ARCHITECTURES, config_of, imported, namer, order_of
from peft_kernels.models.swap import replace_modules
from peft_kernels.modules.checks import check_choice, check_module
from peft_kernels.modules.names import unwrapped
from peft_kernels.modules.replaced import hand_on_hooks
from peft_kernels.nn.quantized_embedding import QuantizedEmbedding
from peft_kernels.nn.quantized_linear import QuantizedLinear
from peft_kernels.ops import QuantizedWeight
from peft_kernels.ops._gguf_blocks import BLOCKS

Model = TypeVar("Model", bound=nn.Module)

_LAYOUTS = {layout.upper(): layout for layout in BLOCKS}
_FLOATS = ("F32", "F16", "BF16", "F64")
# What a file and a config both say, by the names that they have for it.
_AGREEING = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_ROPE = "rope_freqs.weight"
_HEAD = "output.weight"


class _Place(NamedTuple):
    """A parameter of the model, and what of the file goes into it."""

    parameter: nn.Parameter
    owners: list[tuple[str, nn.Module, str]]  # the module's name, the module, the name in it
    tensor: Any
    layout: str | None  # of a weight that stays in codes

    @property
    def name(self) -> str:
        path, _, own = self.owners[0]
        return f"{path}.{own}"


@torch.inference_mode(False)
def load_gguf(
    model: Model,
    path: str | os.PathLike[str],
    *,
    embeddings: str = "floats",
    others: str = "error",
    mmap: bool = True,
) -> Model:
    """Loads a GGUF file into a model of transformers', whose linear layers stay in its codes.

    Weights of linear layers in Q8_0, Q4_0, Q4_1, Q4_K and Q6_K become a
    :class:`peft_kernels.nn.QuantizedLinear` over the file's bytes, which are never dequantised;
    only the rows of q and k of a Llama are put into transformers' order. Embeddings, norms, biases
    and whatever else is no linear layer's weight are floats in the dtypes that the model has, and
    so is an output layer that is tied to the embeddings; but see ``embeddings``.

    Parameters on the meta device get memory, the others are overwritten, so that a large model is
    best built with ``accelerate.init_empty_weights()`` around ``from_config``. transformers makes
    the config and the tokenizer of the same file: ``AutoConfig.from_pretrained(folder,
    gguf_file=name)``.

    Args:
        model: of the type llama, mistral, qwen2 or qwen3, with a head or without.
        path: the file.
        embeddings: ``"floats"``, or ``"codes"``: embeddings stay in the file's bytes too, as a
            :class:`peft_kernels.nn.QuantizedEmbedding`, and with them an output layer that is tied
            to them, as a QuantizedLinear over the same bytes.
        others: what happens to such a layer in another format, such as Q5_K: ``"error"``, or
            ``"dequantize"``, and it stays an ``nn.Linear``.
        mmap: whether codes stay in the file, and come into memory as they are used; it must then
            stay as it is. Otherwise they are read now.

    Returns:
        The model.

    Raises:
        ImportError: the package gguf isn't installed.
        TypeError: ``model`` is none of transformers'.
        ValueError: the file is another model's, by its architecture, its sizes or its tensors; a
            format that isn't read, with the tensor's name; a buffer on the meta device, for which a
            file has no values. Nothing is changed.
    """
    check_module("model", model)
    check_choice("embeddings", embeddings, ("floats", "codes"))
    check_choice("others", others, ("error", "dequantize"))
    inner = unwrapped(model)
    config, gguf = config_of(inner), imported()
    reader = gguf.GGUFReader(os.fspath(path), "c")  # so that nobody who writes writes the file
    _check_file(reader, config)
    _check_buffers(inner)
    if any(parameter.is_meta for parameter in inner.parameters()):
        inner.tie_weights()  # each has become a parameter of its own in init_empty_weights()
    kinds: set[type] = {nn.Linear} if embeddings == "floats" else {nn.Linear, nn.Embedding}
    places = _places(inner, reader, config, kinds, others)
    swapped: dict[nn.Module, nn.Module] = {}
    codes = [place for place in places if place.layout is not None]
    for place in places:
        if place.layout is None:
            _fill(place, _values(gguf, place.tensor, config))
    for place in codes:  # now that their biases are there
        weight = _in_codes(place, config, mmap)
        made = [_over(weight, layer, place.parameter) for _, layer, _ in place.owners]
        for (_, layer, _), new in zip(place.owners, made, strict=True):
            new._parameters["weight"] = made[0]._parameters["weight"]  # tied, as they were
            swapped[layer] = new
    replace_modules(inner, swapped)
    return model


# ---- what goes where ---------------------------------------------------------------------------


def _places(
    model: nn.Module, reader: Any, config: Any, kinds: set[type], others: str
) -> list[_Place]:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    name_of, owners = namer(config), _owners(model)
    places, used, missing = [], {_ROPE}, []
    for parameter, at in owners.items():
        names = [f"{name_of(path)}.{own}" for path, _, own in at]
        name = next((name for name in names if name in tensors), None)
        if name is None:
            missing.append(f"{at[0][0]}.{at[0][2]}")
            continue
        used.add(name)
        layout = _layout_of(at, tensors[name], kinds, others)
        places.append(_Place(parameter, at, tensors[name], layout))
        _check_shape(places[-1])
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left = [name for name in tensors if name not in used and not (name == _HEAD and head is None)]
    if missing or left:
        of_the_head = missing == ["lm_head.weight"]
        hint = ": it ties them, set tie_word_embeddings in the config" if of_the_head else ""
        raise ValueError(
            f"path must be a file of this model; it lacks {missing[:4]} of {len(missing)}{hint}, "
            f"and has {left[:4]} of {len(left)}, for which the model has no place"
        )
    return places


def _owners(model: nn.Module) -> Mapping[nn.Parameter, list[tuple[str, nn.Module, str]]]:
    found = defaultdict(list)
    for path, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                found[parameter].append((path, module, own))
    return found


def _layout_of(
    owners: list[tuple[str, nn.Module, str]], tensor: Any, kinds: set[type], others: str
) -> str | None:
    """The layout of a weight that stays in codes, None for what becomes floats."""
    kind = tensor.tensor_type.name
    in_codes = all(type(layer) in kinds and own == "weight" for _, layer, own in owners)
    if not in_codes or kind in _FLOATS:
        return None
    if kind not in _LAYOUTS and others == "error":
        raise ValueError(
            f"path has {tensor.name}, of {owners[0][0]}, in {kind}; what stays in codes is "
            f"{', '.join(_LAYOUTS)}. others='dequantize' makes such layers floats"
        )
    return _LAYOUTS.get(kind)


# ---- checks ------------------------------------------------------------------------------------


def _check_file(reader: Any, config: Any) -> None:
    if (parts := _field(reader, "split.count") or 1) > 1:
        raise ValueError(
            f"path must be a whole file; it is one of {parts} parts: llama-gguf-split --merge first"
        )
    if reader.endianess.name != "LITTLE":
        raise ValueError("path must be a file of little-endian numbers; it is a big-endian one")
    wanted, found = ARCHITECTURES[config.model_type], _field(reader, "general.architecture")
    kind = _field(reader, "general.type") or "model"
    if found != wanted or kind != "model":
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(
            f"path must be a model of the architecture {wanted}; it is {article} {kind} of the "
            f"architecture {found}"
        )
    for name, own in _AGREEING.items():
        there, here = _field(reader, f"{wanted}.{name}"), _of_config(config, own)
        if there is not None and here is not None and abs(there - here) > 1e-6 * abs(here):
            raise ValueError(
                f"path must be a file of this model: {wanted}.{name} is {there}, and the config's "
                f"{own} is {here}"
            )
    if any(tensor.name == _ROPE for tensor in reader.tensors) and not _scales_rope(config):
        raise ValueError(
            f"path has {_ROPE}, scaled frequencies, and the model's config doesn't scale any: give "
            "it the rope_scaling of the original model's config"
        )


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _of_config(config: Any, name: str) -> Any:
    found = getattr(config, name, None)
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get(name) if found is None else found


def _scales_rope(config: Any) -> bool:
    own = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    return own.get("rope_type", own.get("type", "default")) != "default"


def _check_buffers(model: nn.Module) -> None:
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise ValueError(
            f"model has {lost[0]} on the meta device, a buffer for which a file has no values: "
            "build it in accelerate.init_empty_weights(), which leaves buffers out"
        )


def _check_shape(place: _Place) -> None:
    found = tuple(int(size) for size in reversed(place.tensor.shape))
    if found != place.parameter.shape:
        raise ValueError(
            f"path has {place.tensor.name} of the shape {list(found)}, and {place.name} is "
            f"{list(place.parameter.shape)}"
        )


# ---- values ------------------------------------------------------------------------------------


def _in_order(rows: Tensor, tensor: Any, config: Any) -> Tensor:
    order = order_of(tensor.name, len(rows), config)
    return rows if order is None else rows[order]


def _values(gguf: Any, tensor: Any, config: Any) -> Tensor:
    found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    return _in_order(found, tensor, config)


@torch.no_grad()
def _fill(place: _Place, values: Tensor) -> None:
    old = place.parameter
    if not old.is_meta:
        old.copy_(values)
        return
    new = nn.Parameter(values.to(old.dtype, copy=True), requires_grad=old.requires_grad)
    for _, module, own in place.owners:
        module._parameters[own] = new


def _in_codes(place: _Place, config: Any, mmap: bool) -> QuantizedWeight:
    codes = torch.from_numpy(place.tensor.data)
    rows = _in_order(codes, place.tensor, config)
    if not mmap and rows is codes:
        rows = codes.clone()
    device = place.parameter.device
    if device.type not in ("cpu", "meta"):
        rows = rows.to(device)
    assert place.layout is not None
    n, k = place.parameter.shape
    scales = torch.empty(0, device=rows.device)
    return QuantizedWeight(rows, scales, (n, k), BLOCKS[place.layout][0], layout=place.layout)


def _over(weight: QuantizedWeight, layer: nn.Module, old: nn.Parameter) -> nn.Module:
    new: nn.Module
    if isinstance(layer, nn.Embedding):
        new = QuantizedEmbedding(weight, layer.padding_idx, dtype=old.dtype)
    else:
        new = QuantizedLinear(weight, layer._parameters["bias"], dtype=old.dtype)
    hand_on_hooks(layer, new)
    return new.train(layer.training)
