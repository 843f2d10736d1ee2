"""How far from float64 a result may be: what every op's tests compare by."""

import torch
from torch import Tensor

# Below these, an error is the rounding of the result itself: the eager path may hit zero by luck.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def relative_error(out: Tensor, exact: Tensor) -> float:
    """norm(out - exact) / norm(exact) in float64; a NaN counts as infinite."""
    if exact.numel() == 0:
        assert out.shape == exact.shape
        return 0.0
    error = (out.double() - exact).norm() / exact.norm().clamp_min(1e-300)
    return float("inf") if error.isnan() else error.item()


def assert_as_good_as(out: Tensor, eager: Tensor, exact: Tensor, name: str) -> None:
    """``out`` is no worse than 1.5 times the eager path's own error, or than rounding."""
    assert out.shape == exact.shape, name
    bound = max(1.5 * relative_error(eager, exact), FLOOR[out.dtype])
    error = relative_error(out, exact)
    assert error <= bound, f"{name}: error {error:.2e} against float64, allowed {bound:.2e}"
