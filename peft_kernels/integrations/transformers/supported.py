"""Which transformers soft prompts run on: the lines that their hooks and masks are tested with."""

from __future__ import annotations

import transformers

LINES = ("4.57.", "5.")  # how their versions start


def refusal() -> str:
    return (
        "a prefix or a prompt in a model needs transformers 4.57 or 5; got "
        f"{transformers.__version__}: install one with pip install 'transformers>=4.57,<6'"
    )


def check_transformers() -> None:
    """Raises a RuntimeError where another transformers is installed."""
    if not transformers.__version__.startswith(LINES):
        raise RuntimeError(refusal())
