"""Which adapters are turned off for the present call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_kernels.calls.carried import Carried

# The ids of modules: what torch.compile can guard on.
_OFF: Carried[frozenset[int]] = Carried("disabled(model)")


@contextmanager
def turned_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it these modules, and those that were off before, compute what their bases do."""
    held = list(modules)  # so that no other module gets the id of one of them
    with _OFF.within((_OFF.get() or frozenset()).union(map(id, held))):
        yield


class CarriesOff:
    """A checkpointing function under which what runs again has those turned off that it had."""

    def __init__(self, checkpoint: Callable) -> None:
        self.checkpoint = checkpoint

    @property
    def keywords(self) -> dict[str, Any]:
        """Of the function, as functools.partial has them."""
        return getattr(self.checkpoint, "keywords", {})

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            function = partial(self._again, _OFF.frames(), function)
        return self.checkpoint(function, *args, **kwargs)

    @staticmethod
    def _again(frames: tuple, function: Callable, *args: Any, **kwargs: Any) -> Any:
        if frames and frames[-1].closed:
            raise RuntimeError(
                "a forward that ran within disabled(model) is computed again (gradient "
                "checkpointing) outside of it; call backward() inside the with-block"
            )
        with _OFF.restored(frames):
            return function(*args, **kwargs)


def is_off(module: nn.Module) -> bool:
    off = _OFF.get()
    return off is not None and id(module) in off
