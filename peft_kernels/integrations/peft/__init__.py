"""Hugging Face PEFT beside this package's layers: names as its tools look for them.

PEFT's folders are in :mod:`peft_kernels.formats`.
"""

from peft_kernels.integrations.peft.view import peft_view

__all__ = ["peft_view"]
