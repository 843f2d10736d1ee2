"""What a layer whose weight is in codes has as its ``weight``."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from peft_kernels.ops import QuantizedWeight, dequantize

_FROZEN = (
    "weight is in codes, {layout}, and can't be written: nothing would come of it. To merge an "
    "adapter or to write the weight, put a layer of floats in place of this one: dequantized() of "
    "a QuantizedLinear"
)


class CodedWeight(Tensor):
    """A weight in codes as a tensor: whoever reads it gets values, and whoever writes an error.

    It has the shape, the device and a dtype; an operation on it is one on the weight dequantised,
    which is made each time. The layer's own forward never does that.
    """

    _weight: QuantizedWeight
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, weight: QuantizedWeight, dtype: torch.dtype) -> CodedWeight:
        self = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=dtype, device=weight.codes.device
        )
        self._weight = weight
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, CodedWeight) and _is_written(argument):
                value._refuse()
        args, kwargs = tree_map_only(CodedWeight, CodedWeight.values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def values(self) -> Tensor:  # type: ignore[override]
        """The weight dequantised."""
        return dequantize(self._weight, self.dtype)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        self._refuse()

    def check_same(self, value: object) -> None:
        """Raises a TypeError unless this is the same weight, over the same memory."""
        own = self._weight.codes.data_ptr()
        if not (isinstance(value, CodedWeight) and value._weight.codes.data_ptr() == own):
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(_FROZEN.format(layout=self._weight.layout))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CodedWeight({list(self.shape)}, {self.dtype}, layout={self._weight.layout})"


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
