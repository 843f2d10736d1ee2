"""What ``peft-kernels doctor | bench | report | tune`` run: one module each, imported on demand."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the caller's: the command line prints it as one line and exits with code 2."""
