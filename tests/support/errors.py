"""How far from float64 a result may be: what every op's tests compare by."""

from torch import Tensor

from peft_kernels.tools.verify.rule import allowed_error, relative_error

__all__ = ["assert_as_good_as", "relative_error"]


def assert_as_good_as(out: Tensor, eager: Tensor, exact: Tensor, name: str) -> None:
    """``out`` is no worse than 1.5 times the eager path's own error, or than rounding."""
    assert out.shape == exact.shape, name
    bound = allowed_error(eager, exact, out.dtype)
    error = relative_error(out, exact)
    assert error <= bound, f"{name}: error {error:.2e} against float64, allowed {bound:.2e}"
