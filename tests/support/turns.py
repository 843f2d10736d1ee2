"""Calls in turn, to see that what is kept from one serves no other, and what they launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from hypothesis import strategies as st

from peft_kernels.triton.common import chips, launch


@st.composite
def turns(draw, choices: dict[str, list]):
    """Calls by their settings, each but the first another in one thing."""
    calls = [{name: draw(st.sampled_from(of)) for name, of in choices.items()}]
    for name in draw(st.permutations(list(choices))):
        calls.append(calls[-1] | {name: draw(st.sampled_from(choices[name]))})
    return calls


def each_alone(choices: dict[str, list], **base) -> list[dict]:
    """A call of the first of all choices but for ``base``, and those that differ in one thing."""
    first = {name: of[0] for name, of in choices.items()} | base
    return [first, *(first | {name: value} for name, of in choices.items() for value in of)]


def check_as_first_calls(calls: list[dict], launched, forget) -> None:
    """Each of calls in turn launches what it does as the first, and something if it has rows."""
    later = [launched(call) for call in calls]
    for call, found in zip(calls, later, strict=True):
        forget()
        assert found == launched(call)
        assert found or not call["m"]


@contextmanager
def launches_on(chip: str, precision: str = "ieee") -> Iterator[list]:
    """Of each launch the kernel, the grid, the numbers given and the options; none runs."""
    noted: list = []

    def note(kernel, grid, args, options):
        numbers = [a for a in args if not isinstance(a, torch.Tensor) and not _holds_tensors(a)]
        noted.append((kernel.fn.__name__, grid, numbers, options))

    float32 = patch.object(chips, "float32_precision", lambda device: precision)
    with patch.object(launch, "run", note), on(chip), float32:
        yield noted


def on(chip: str):
    """The plans and tiles of a chip, whatever the device."""
    return patch.object(chips, "arch_name", lambda device: chip)


def _holds_tensors(value) -> bool:
    return isinstance(value, tuple) and any(isinstance(one, torch.Tensor) for one in value)
