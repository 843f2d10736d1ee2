"""LoRA on a linear layer whose weight is in codes: QLoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.calls.off import is_off
from peft_kernels.codes.layers import codes_of, dtype_of, requantised
from peft_kernels.modules.fully_sharded import is_gathered
from peft_kernels.modules.replaced import check_stored, hand_on_hooks
from peft_kernels.nn._over_codes import OverCodes
from peft_kernels.nn.lora import LoRALinear
from peft_kernels.ops import QuantizedWeight, dequantize
from peft_kernels.ops.dora_linear import dora_linear, dora_norm
from peft_kernels.ops.lora_linear import linear_of_codes, lora_linear


class QuantizedLoRALinear(OverCodes, LoRALinear):
    """A frozen linear layer in codes of another library, with a trainable low-rank update.

    ``y = x @ W.T + bias + scale * dropout(x) @ lora_a.T @ lora_b.T`` with W the values of the codes
    (Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", equation 5), computed by
    :func:`peft_kernels.ops.lora_linear` over the codes where they lie: nothing of W's size is
    written or kept, in the backward neither. x may be float32, float16 or bfloat16, whatever the
    library would compute in; the result has its dtype.

    It is what :func:`peft_kernels.swap_linear` makes of bitsandbytes' ``Linear4bit`` and
    ``Linear8bitLt`` (with a threshold of 0), of an ``nn.Linear`` over torchao's weights, of
    transformers' ``FP8Linear`` and of :class:`QuantizedLinear`, and :class:`LoRALinear` in all but
    this:

    - ``weight`` is the library's Parameter, of its shape. The state dict has what the library's
      layer has, and takes over what it has beside the codes (``weight.absmax``, ``SCB``).
    - While merged, ``weight`` is dense, ``[n, k]`` in the dtype that it had before it was put into
      codes, or with ``requantize`` in codes again. ``requantization_error`` is then
      ``||W' - M|| / ||M||``, with W' the new codes' values and M what was merged: the codes' own
      error, which the adapter of a small step may be lost in. Switching makes it anew, dense or in
      codes as it was. Unmerging puts the codes back, bit by bit.
    - :func:`peft_kernels.unload` puts an ``nn.Linear`` in place of a layer that is merged dense.
    """

    requantization_error: float | None
    _before: dict[str, Any]  # of the library's attributes, those of the codes before a merge

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("QuantizedLoRALinear is built around a quantised layer: use from_linear")

    def _adopt(self, *settings: Any) -> None:
        vars(self).update(requantization_error=None, _before={})
        super()._adopt(*settings)
        self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        if self.use_dora and "_origin" in vars(self):  # before, codes can't be read
            norm = dora_norm(self._base_codes(), self.lora_a, self.lora_b, self.scale)
            self.lora_magnitude.copy_(norm)

    def reset_parameters(self) -> None:
        """Raises a RuntimeError: codes aren't drawn. :meth:`reset_adapter` draws the adapter."""
        raise RuntimeError("a weight in codes isn't drawn anew; reset_adapter() draws the adapter")

    # ---- what is in codes ----------------------------------------------------------------------

    def _base_codes(self) -> QuantizedWeight:
        return codes_of(self._base_layer()) if self.merged else self._codes()

    def _base_layer(self) -> nn.Module:
        layer = self._origin.stand_in(self, self.base_weight, self.bias)
        _set(layer, self._before)
        return layer

    def dequantized(self) -> Tensor:
        """The base weight's values, ``[n, k]`` float32."""
        return dequantize(self._base_codes())

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., k]``, any rank, to ``[..., n]`` in the dtype of x."""
        bias = self._bias_for(x)
        if is_off(self):
            return linear_of_codes(x, self._base_codes(), bias)
        if self.merged and self.requantization_error is None:
            return F.linear(x, self.weight.to(x.dtype), bias)
        if self.merged:
            return linear_of_codes(x, self._codes(), bias)
        codes, adapter = self._codes(), (self.lora_a, self.lora_b)
        options: dict[str, Any] = {
            "bias": bias,
            "scale": self.scale,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        if not self.use_dora:
            return lora_linear(x, codes, *adapter, **options)
        norm = self._norms.of(codes, *adapter, self.scale)
        return dora_linear(x, codes, *adapter, self.lora_magnitude, norm=norm, **options)

    # ---- merging -------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def merge(self, safe: bool = True, *, requantize: bool = False) -> None:
        """Puts ``W + scale * lora_b @ lora_a`` in place of ``weight``, dense; see the class.

        Args:
            safe: first check that the merged weight is finite, as it is stored.
            requantize: put it into codes of the kind that the weight is in, by the library, and
                set ``requantization_error``.

        Raises:
            RuntimeError: the layer is merged already, or A or B is pruned or the like.
            TypeError: ``requantize``, and the library doesn't write such codes.
            ValueError: ``safe``, and the merged weight isn't finite, or isn't in the dtype or codes
                that it is put into. Nothing is changed.
        """
        self._require(merged=False)
        check_stored(self, own=["weight"], other=self.adapter_names)
        adapter = self.lora_a, self.lora_b, self.lora_magnitude if self.use_dora else None
        self._put_merged(*self._merge_of(*adapter, self.scale, safe, requantize=requantize))

    @torch.no_grad()
    def _merge_of(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None,
        scale: float | Tensor,
        safe: bool,
        *,
        requantize: bool,
    ) -> tuple[nn.Parameter, dict[str, Any], float | None]:
        """The merged weight, the library's attributes that go with it, and its codes' error."""
        if is_gathered(self):
            raise RuntimeError(
                "weight is in codes, which fully_shard holds in shards: merge before sharding"
            )
        values = self._merged_weight(self.dequantized(), lora_a, lora_b, magnitude, scale, safe)
        layer = self._base_layer()
        if not requantize:
            dense = values.to(dtype_of(layer))
            _check_finite(dense, safe, f"in {dense.dtype}")
            return nn.Parameter(dense, requires_grad=False), {}, None
        weight, attributes = requantised(layer, self._origin.kind, values)
        layer._parameters["weight"] = weight
        _set(layer, attributes)
        found = dequantize(codes_of(layer))
        _check_finite(found, safe, "in codes again")
        error = torch.linalg.norm(found - values)
        return weight, attributes, float(error / torch.linalg.norm(values).clamp(min=_SMALLEST))

    def _put_merged(
        self, weight: nn.Parameter, attributes: dict[str, Any], error: float | None
    ) -> None:
        self.unmerged_weight = self.weight
        self._put(weight, {name: getattr(self, name) for name in attributes}, error)
        _set(self, attributes)

    def _put(self, weight: nn.Parameter, before: dict[str, Any], error: float | None) -> None:
        nn.Module.__setattr__(self, "weight", weight)
        self._before, self.requantization_error = before, error

    def unmerge(self) -> None:
        """Puts the base Parameter back, the very codes.

        Raises:
            RuntimeError: the layer is not merged, or its weight was pruned or parametrized since.
        """
        self._require(merged=True)
        check_stored(self, own=["weight"])
        assert self.unmerged_weight is not None
        base, self.unmerged_weight = self.unmerged_weight, None
        _set(self, self._before)
        self._put(base, {}, None)

    def _merge_anew(self, *adapter_and_safe: Any) -> None:
        again = self.requantization_error is not None
        merged = self._merge_of(*adapter_and_safe, requantize=again)
        self.unmerge()
        self._put_merged(*merged)

    def plain(self, *, merged: bool) -> nn.Module:
        """The layer whose place this took; with a dense merged weight an ``nn.Linear``."""
        if merged and not self.merged:
            self.merge()
        if not merged and self.merged:
            self.unmerge()
        if not merged or self.requantization_error is not None:
            return self._origin.restore(self, self.weight, self.bias)
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        hand_on_hooks(self, layer)
        return layer.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLoRALinear:
        """Takes what goes with the codes before a merge along, as to another device."""
        super()._apply(fn, recurse)
        kept = nn.Module()
        _set(kept, self._before)
        kept._apply(fn)
        self._before = {name: getattr(kept, name) for name in self._before}
        return self

    # ---- state dicts ---------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        """Loads the codes and the adapter; a merged layer is merged anew from them."""
        again, merged = self.requantization_error is not None, self.merged
        is_plain = self._is_plain(state_dict, prefix)
        if merged:
            state_dict = self._of_unmerged(state_dict, prefix)
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if is_plain:
            self._reset_magnitude()  # of the scales that came after the codes
        if merged:
            self.merge(safe=False, requantize=again)

    def extra_repr(self) -> str:
        error = self.requantization_error
        return super().extra_repr() + ("" if error is None else f", in codes again: {error:.1e}")


def _check_finite(values: Tensor, safe: bool, how: str) -> None:
    if safe and not values.isfinite().all():
        raise ValueError(
            f"the merged weight has values that are not finite {how}; nothing was changed"
        )


def _set(layer: nn.Module, attributes: Mapping[str, Any]) -> None:
    """As they are: Parameters too, whatever the layer's class would check of them."""
    for name, value in attributes.items():
        nn.Module.__setattr__(layer, name, value)


_SMALLEST = 1e-38
