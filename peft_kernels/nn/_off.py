"""Which adapters are turned off for the present call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from peft_kernels._calls import Carried

# The ids of modules: what torch.compile can guard on.
_OFF: Carried[frozenset[int]] = Carried("disabled(model)")


@contextmanager
def turned_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it these modules, and those that were off before, compute what their bases do."""
    held = list(modules)  # so that no other module gets the id of one of them
    with _OFF.within((_OFF.get() or frozenset()).union(map(id, held))):
        yield


def is_off(module: nn.Module) -> bool:
    off = _OFF.get()
    return off is not None and id(module) in off
