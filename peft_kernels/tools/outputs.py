"""Whether a command's outputs can be written, found out before it begins to measure."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from peft_kernels.tools import UserError


def check_folder(name: str, folder: Path) -> None:
    """Makes ``folder`` if there is none.

    Raises:
        UserError: no file can be written in it; ``name`` says what it was given as.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{name} must be a folder; {folder} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(name, folder, error) from error


def check_file(name: str, path: Path) -> None:
    """Makes the folder of ``path`` if there is none.

    Raises:
        UserError: ``path`` can't be written; ``name`` says what it was given as.
    """
    if path.is_dir():
        raise UserError(f"{name} must be a file; {path} is a folder")
    check_folder(name, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{name}: {path} can't be written: it is read-only")


def unwritable(name: str, path: Path, error: OSError) -> UserError:
    """The error of a ``path`` that couldn't be written."""
    return UserError(f"{name}: {path} can't be written: {error.strerror or error}")
