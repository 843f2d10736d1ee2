"""A frozen linear layer whose weight is in codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.codes.kept import kept_weight
from peft_kernels.modules.bases import check_base, is_conv1d
from peft_kernels.modules.checks import check_kind
from peft_kernels.modules.replaced import hand_on_hooks
from peft_kernels.nn._in_codes import InCodes
from peft_kernels.ops import QuantizedWeight, dequantize, quantize
from peft_kernels.ops.lora_linear import linear_of_codes


class QuantizedLinear(InCodes, nn.Linear):  # type: ignore[override]
    """A frozen linear layer whose weight stays in codes: ``y = x @ weight.T + bias``.

    ``weight[i, j]`` is what the codes say (:class:`peft_kernels.ops.QuantizedWeight`), and is
    widened piece by piece as :func:`peft_kernels.ops.lora_linear` computes, forward and for the
    gradient of x. Neither pass writes or keeps a weight of that size, and it has no gradient. x
    decides in which dtype is computed, with sums in float32.

    The codes are a frozen Parameter of integers, by the name of ``weight``, and what goes with them
    are buffers of integers, which no ``.to(dtype)`` touches. The state dict has them and, as
    ``coded``, what they are; it loads into a layer of the same format alone. The attribute
    ``weight`` can be read, and is dequantised for whoever does; to write it raises.

    PEFT's LoRA goes over it as over an ``nn.Linear``, and :func:`peft_kernels.accelerate` then
    serves both parts by one kernel. Merging there raises: put :meth:`dequantized` in its place
    first.

    Args:
        weight: the codes, over whose memory the layer is built.
        bias: ``[n]`` or None.
        dtype: in which ``weight`` is read; by default that of the bias, or torch's.

    Raises:
        TypeError: ``weight`` is no QuantizedWeight.
        ValueError: a bias of another shape.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_kind("weight", weight, QuantizedWeight)
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}]; got {list(bias.shape)}")
        self._keep(weight, dtype or (torch.get_default_dtype() if bias is None else bias.dtype))
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        kind: str = "nf4",
        *,
        block: int = 64,
        nested: bool = True,
        by: str = "row",
    ) -> QuantizedLinear:
        """Puts the weight of a layer into codes; its bias, hooks and mode become this layer's.

        Args:
            linear: ``nn.Linear`` or ``transformers``' Conv1D, which is left as it is.
            kind, block, nested, by: as of :func:`peft_kernels.ops.quantize`.

        Raises:
            TypeError, ValueError: as of :class:`LoRALinear` and of quantize.
        """
        check_base(linear, takes_values=True)
        own: Any = linear
        plain: Tensor = own.weight.T.contiguous() if is_conv1d(linear) else own.weight
        codes = quantize(plain, kind, block=block, nested=nested, by=by)
        self = cls(codes, own.bias, dtype=plain.dtype)
        hand_on_hooks(linear, self)
        return self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., k]``, any dtype and rank, to ``[..., n]``."""
        bias: Tensor | None = self.bias
        return linear_of_codes(x, kept_weight(self), None if bias is None else bias.to(x.dtype))

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ``nn.Linear`` with the values that the codes stand for, in the layer's dtype or this.

        The bias is this layer's own Parameter where the dtype is.
        """
        dtype = dtype or self._like.dtype
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(dequantize(self.quantized, dtype), requires_grad=False)
        bias: nn.Parameter | None = self.bias
        if bias is not None and bias.dtype is not dtype:
            bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
        plain.register_parameter("bias", bias)
        hand_on_hooks(self, plain)
        return plain.train(self.training)

    def reset_parameters(self) -> None:
        """There are none to draw: codes come from a weight."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._format()}"
        )
