"""Checks of arguments that several modules take."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_size(name: str, size: int, least: int = 1) -> None:
    """Raises a TypeError or ValueError unless ``size`` is an int of at least ``least``."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be an int; got {size!r}")
    if size < least:
        raise ValueError(f"{name} must be at least {least}; got {size}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Raises a TypeError or ValueError unless ``value`` is a number in [0, 1)."""
    try:
        fits = bool(0.0 <= value < 1.0)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number in [0, 1); got {value!r}") from error
    if not fits:
        raise ValueError(f"{name} must be in [0, 1); got {value}")


def check_kind(name: str, value: Any, *kinds: type[Any]) -> None:
    """Raises a TypeError unless ``value`` is of one of these classes."""
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        got = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
        raise TypeError(f"{name} must be a {wanted}; got {got}")


def check_module(name: str, value: Any) -> None:
    """Raises a TypeError unless ``value`` is a module."""
    check_kind(name, value, nn.Module)
