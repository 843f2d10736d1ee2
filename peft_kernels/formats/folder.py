"""Folders in Hugging Face PEFT's format, whatever the method: a config and a file of tensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_kernels.modules.bases import check_memory

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"


def path_of(argument: str, folder: Any, instead: str = "") -> Path:
    """The path of a folder; a TypeError names the argument if it is none."""
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"{argument} must be the path of a folder{instead}; got {folder!r}")
    return Path(folder)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU of tensors, or of all the shards of DTensors, to be written.

    Raises:
        RuntimeError: one is on the meta device. It names it.
    """
    for key, tensor in tensors.items():
        check_memory(tensor, key)
    return {key: _whole(tensor.detach()) for key, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return (gather() if gather else tensor).to("cpu", copy=True).contiguous()


def safetensors_of(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file that holds ``tensors`` as :func:`whole` leaves them."""
    from safetensors.torch import save  # here: importing the package doesn't need it

    return save(whole(tensors), metadata={"format": "pt"})


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes every file beside its place first, and puts them there when all are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        for name, data in contents.items():
            Path(scratch, name).write_bytes(data)
        for name in contents:
            os.replace(Path(scratch, name), folder / name)


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of the folder's config, whatever its method."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"folder must be an adapter; {folder} has no {CONFIG_FILE}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(config).__name__}")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder's file of weights, by key: on the CPU, nothing else beside them."""
    for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE):
        if (folder / name).is_file():
            return tensors_in(folder / name)
    raise FileNotFoundError(
        f"folder must be an adapter; {folder} has no {WEIGHTS_FILE} and no {PICKLED_WEIGHTS_FILE}"
    )


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickled one that holds a dict of them."""
    from safetensors.torch import load_file  # here: importing the package doesn't need it

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} must be a file of tensors; {error}") from error
    return checked_tensors(f"{path} must be a file of tensors", held)


def checked_tensors(must: str, held: Any) -> dict[str, Tensor]:
    """``held``, once it is a dict of tensors by name; a ValueError begins with ``must``."""
    if not isinstance(held, Mapping):
        raise ValueError(f"{must} by name; it holds a {type(held).__name__}")
    for key, tensor in held.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{must} by name; under {key!r} it holds a {type(tensor).__name__}")
    return dict(held)
