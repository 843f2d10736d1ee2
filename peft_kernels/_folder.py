"""Folders in Hugging Face PEFT's format, whatever the method: a config and a file of tensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"


def whole(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU of a tensor, or of all the shards of a DTensor."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return (gather() if gather else tensor).to("cpu", copy=True).contiguous()


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
    path, pickled = folder / WEIGHTS_FILE, folder / PICKLED_WEIGHTS_FILE
    try:
        if path.is_file():
            return safetensors.torch.load_file(path)
        path = pickled
        if path.is_file():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} must be a file of tensors; {error}") from error
    raise FileNotFoundError(
        f"folder must be an adapter; {folder} has no {WEIGHTS_FILE} and no {PICKLED_WEIGHTS_FILE}"
    )
