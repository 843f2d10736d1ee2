"""What ``peft-kernels doctor | verify | bench | report | tune`` run, imported on demand."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the caller's: the command line prints it as one line and exits with code 2."""
