"""Checks of arguments that several modules take."""

from __future__ import annotations


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
