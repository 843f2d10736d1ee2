"""How far from float64 a result may be: one rule, for ``verify`` and for the tests of every op."""

from __future__ import annotations

import torch
from torch import Tensor

TIMES_EAGER = 1.5
# Below these, an error is the rounding of the result itself: the eager path may hit zero by luck.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def relative_error(out: Tensor, exact: Tensor) -> float:
    """norm(out - exact) / norm(exact) in float64; a NaN counts as infinite."""
    if exact.numel() == 0:
        assert out.shape == exact.shape
        return 0.0
    error = (out.double() - exact).norm() / exact.norm().clamp_min(1e-300)
    return float("inf") if error.isnan() else error.item()


def allowed_error(eager: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Of a result in ``dtype``: 1.5 times the eager path's own error, or rounding."""
    return max(TIMES_EAGER * relative_error(eager, exact), FLOOR[dtype])
