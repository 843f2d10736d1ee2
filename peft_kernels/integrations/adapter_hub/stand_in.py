"""Classes that stand in for classes of the library's, made when these are first met.

Such a class has ours before theirs among its bases: ``type(name, (ours, theirs), ...)``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class StandIn:
    """The first base of ours."""

    theirs: type  # of a class that is made: the library's, for subclasses of it too

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is of this process: a copy or a pickle names the two that it is made of.
        reduced: Any = super().__reduce_ex__(protocol)
        ours, theirs = type(self).__bases__
        return _new, (ours, theirs), *reduced[2:]


@cache
def served_class(ours: Any, theirs: Any) -> Any:
    """The class that takes the place of theirs."""
    names = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "theirs": theirs}
    return type(theirs.__name__, (ours, theirs), {**names, "__doc__": theirs.__doc__})


def own_class(kind: Any) -> Any:
    """The class of the library's that one of :func:`served_class` stands for."""
    return kind.__bases__[1] if issubclass(kind.__bases__[0], StandIn) else kind


def _new(ours: Any, theirs: Any) -> nn.Module:
    served = served_class(ours, theirs)
    return served.__new__(served)
