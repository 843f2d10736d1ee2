"""Prediction heads in the `adapters` library's folders: what of a model is outside of its base.

``head_config.json`` tells the class of the model, and its labels; ``model_head.safetensors`` or
``pytorch_model_head.bin`` has the head's tensors under their names in the model. A head of an
``...AdapterModel``, which that library builds itself, has a config and other names.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from peft_kernels.formats.folder import tensors_in
from peft_kernels.models.modules_to_save import remember, settings_of, tensors_of

HEAD_FILES = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")


class Head(NamedTuple):
    """A head that was read, not yet in the model."""

    tensors: dict[str, Tensor]
    labels: dict[str, int] | None


def head_tensors(host: Any) -> dict[str, Tensor]:
    """The tensors outside of the base model, by name; none for a model that is its own base."""
    prefix = host.base_model_prefix
    if prefix not in host._modules:
        return {}
    return {key: t for key, t in tensors_of(host) if not key.startswith(prefix)}


# ---- save --------------------------------------------------------------------------------------


def head_to_write(host: Any, with_head: bool | None) -> dict[str, Tensor]:
    """The tensors of the head, where it is to be written: one that trains or was loaded, if None.

    Raises:
        ValueError: a head is asked for, and the model has none.
    """
    head = head_tensors(host)
    if with_head and not head:
        raise ValueError(f"with_head must be False: {type(host).__name__} has no head")
    if with_head is None:
        trains = any(t.requires_grad for t in head.values())
        with_head = bool(head) and (trains or settings_of(host).get("head", False))
    return head if with_head else {}


def head_header(host: Any, header: dict[str, Any]) -> dict[str, Any]:
    """The head's config file, from the adapter's."""
    own = {
        "config": None,
        "label2id": getattr(host.config, "label2id", None),
        "name": None,
        "num_labels": getattr(host.config, "num_labels", None),
    }
    return header | own


# ---- load --------------------------------------------------------------------------------------


def read_head(host: Any, folder: Path) -> Head | None:
    """The head in a folder, for this model; None, with a warning, where it is another's.

    Raises:
        ValueError: a file that can't be read.
    """
    present = [folder / name for name in HEAD_FILES[1:] if (folder / name).is_file()]
    if not present:
        return None
    header = _header(folder / HEAD_FILES[0])
    if reason := _misfit(host, header):
        warnings.warn(f"the head in {folder} is left out: {reason}", UserWarning, stacklevel=4)
        return None
    return Head(tensors_in(present[0]), header.get("label2id"))


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be JSON, beside a head; {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(header).__name__}")
    return header


def _misfit(host: Any, header: dict[str, Any]) -> str | None:
    kind, own = header.get("model_class"), type(host).__name__
    if header.get("config") is not None:
        return f"it is one of {kind}'s, which `adapters` builds; load it there"
    if not head_tensors(host):
        return f"it is {kind}'s, and {own} has none"
    return None if kind == own else f"it is {kind}'s, and the model is {own}"


def take_over(host: Any, head: Head) -> None:
    """What a model remembers of a head that was put into it, and its labels."""
    remember(host, head=True)
    if head.labels:
        host.config.id2label = {int(number): label for label, number in head.labels.items()}
        host.config.label2id = {label: int(number) for label, number in head.labels.items()}
