"""How far an implementation's results are from those in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_kernels.tools.bench.implementation import Implementation


@dataclass(frozen=True)
class Error:
    """The differences' rms, and the largest of them, each over the rms of the exact values.

    Of several results, the worst.
    """

    rms: float
    largest: float


def errors_of(
    found: Mapping[str, Implementation], exact: Implementation, backward: bool
) -> dict[str, Error]:
    """Each implementation's error against ``exact``, which has the same values in float64.

    The results are the output and, with a backward, the gradient to x: what all implementations
    have, however they lay out their parameters.
    """
    dtype, dy = next(iter(found.values())).x.dtype, None
    if backward:
        torch.manual_seed(1)
        dy = torch.randn_like(exact.results(None)[0]).to(dtype)
    wanted = exact.results(dy)
    return {name: _error(one.results(dy), wanted) for name, one in found.items()}


def _error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> Error:
    rms, largest = 0.0, 0.0
    for result, wanted in zip(results, exact, strict=True):
        difference = result.double() - wanted
        size = wanted.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        rms = max(rms, (difference.square().mean().sqrt() / size).item())
        largest = max(largest, (difference.abs().max() / size).item())
    return Error(rms, largest)
