"""LoRA adapters in llama.cpp's format: ``llama-cli --lora`` and the like read them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.formats.gguf.names import ARCHITECTURES, config_of, imported, namer, order_of
from peft_kernels.modules.bases import check_memory, names_of
from peft_kernels.modules.checks import check_module
from peft_kernels.modules.names import gathered, plain_modules, unwrapped
from peft_kernels.nn.lora import LoRALinear

_PEFT = "peft.tuners.lora.layer.LoraLayer"
_HEAD = "output"
_WHOLE = "peft.utils.other.AuxiliaryTrainingWrapper"


class _Part(NamedTuple):
    a: Tensor  # [r, k]
    b: Tensor  # [n, r]
    scale: float


def save_lora_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str = "default",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a model's LoRA adapter as llama.cpp reads it.

    A layer's update there is ``alpha / r * B @ A`` with one alpha for all; where layers differ in
    ``scale * r``, their B is multiplied by what is missing. The rows of B for q and k of a Llama
    are put into llama.cpp's order. The file has ``general.type = "adapter"``, ``adapter.type =
    "lora"``, ``adapter.lora.alpha``, and tensors such as ``blk.0.attn_q.weight.lora_a`` ``[r, k]``
    and ``...lora_b`` ``[n, r]`` (``convert_lora_to_gguf.py`` of llama.cpp).

    Args:
        model: of transformers, of the type llama, mistral, qwen2 or qwen3, with adapters of PEFT's
            or with :class:`peft_kernels.nn.LoRALinear` layers, over floats or codes.
        path: of the file, which is replaced whole or not at all.
        adapter: the name of the adapter, where they are PEFT's.
        dtype: float32 or float16.

    Raises:
        ImportError: the package gguf isn't installed.
        TypeError: ``model`` is none of transformers', or another dtype.
        ValueError: there is no such adapter, or it has what the format has no place for: DoRA, a
            bias of B, embeddings, an output layer tied to them, modules that were trained whole.
    """
    check_module("model", model)
    if dtype not in (torch.float32, torch.float16):
        raise TypeError(f"dtype must be float32 or float16; got {dtype}")
    with gathered(model):
        inner = unwrapped(model)
        if hasattr(inner, "get_base_model"):  # a PeftModel
            inner = inner.get_base_model()
        config = config_of(inner)
        parts = _named(_parts(inner, adapter), config)
        if not parts:
            raise ValueError(
                f"model must have LoRA layers with an adapter {adapter!r}; it has none"
            )
        _write(Path(path), config, *_of_one_alpha(parts), dtype)


def _named(parts: Iterator[tuple[str, _Part]], config: Any) -> dict[str, _Part]:
    """The parts by the names of a file's tensors, rows in its order."""
    name_of, found = namer(config), {}
    for path, (a, b, scale) in parts:
        check_memory(a, path)
        if (own := name_of(path)) == _HEAD and config.tie_word_embeddings:
            raise ValueError(
                f"{path} is tied to the embeddings, and llama.cpp has no layer of its own for it: "
                "leave it out of the adapter"
            )
        if own is None:
            raise ValueError(f"{path} has no name in a GGUF file: leave it out of the adapter")
        name = f"{own}.weight"
        order = order_of(name, len(b), config)
        found[name] = _Part(a, b if order is None else b[order.argsort()], scale)
    return found


def _parts(model: nn.Module, adapter: str) -> Iterator[tuple[str, _Part]]:
    for path, module in plain_modules(model).items():
        names, layer = names_of(type(module)), _any(module)
        if isinstance(module, LoRALinear):
            if module.use_dora:
                raise ValueError(f"{path} has DoRA, for which a GGUF file has no place")
            yield path, _Part(_cpu(module.lora_a), _cpu(module.lora_b), float(module.scale))
        elif _WHOLE in names and adapter in layer._adapters:
            raise ValueError(f"{path} is trained whole, for which a GGUF file has no place")
        elif _PEFT in names:
            if adapter in layer.lora_embedding_A or adapter in layer.lora_variant:
                what = "DoRA or another variant" if adapter in layer.lora_variant else "embeddings"
                raise ValueError(f"{path} has {what}, for which a GGUF file has no place")
            if adapter in layer.lora_A:
                if layer.lora_B[adapter].bias is not None:
                    raise ValueError(f"{path} has a bias of B, for which a GGUF file has no place")
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                yield path, _Part(_cpu(a), _cpu(b), float(layer.scaling[adapter]))


def _any(module: nn.Module) -> Any:
    return module


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


def _of_one_alpha(parts: dict[str, _Part]) -> tuple[float, dict[str, _Part]]:
    """The alpha of the first part, and the parts with what is missing to it in B."""
    alphas = {name: scale * len(a) for name, (a, _, scale) in parts.items()}
    alpha = next(iter(alphas.values()))
    # An alpha of 0 is llama.cpp's sign for none.
    alpha = alpha if alpha else 1.0
    return alpha, {
        name: part if alphas[name] == alpha else part._replace(b=part.b * (alphas[name] / alpha))
        for name, part in parts.items()
    }


def _write(
    path: Path, config: Any, alpha: float, parts: dict[str, _Part], dtype: torch.dtype
) -> None:
    gguf = imported()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as scratch:
        writer = gguf.GGUFWriter(Path(scratch, path.name), ARCHITECTURES[config.model_type])
        writer.add_type("adapter")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, (a, b, _) in parts.items():
            writer.add_tensor(f"{name}.lora_a", a.to(dtype).contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b.to(dtype).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(Path(scratch, path.name), path)
