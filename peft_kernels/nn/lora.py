"""LoRA on a linear layer, as a drop-in for ``torch.nn.Linear``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.calls.off import is_off
from peft_kernels.modules.bases import check_base, is_conv1d
from peft_kernels.modules.fully_sharded import is_gathered
from peft_kernels.modules.replaced import Origin, check_stored, take_over
from peft_kernels.nn._drawn import Drawn
from peft_kernels.nn._factor import KeptFactor
from peft_kernels.nn._filled_in import FilledIn
from peft_kernels.nn._gathered import HandsOn, beside_rows, in_call, share_parameters
from peft_kernels.nn._lora_values import warn_of_base_weights
from peft_kernels.nn._mergeable import Mergeable
from peft_kernels.nn._sharded import draw_whole, lay_beside
from peft_kernels.nn.lora_settings import (
    adapter_dtype_for,
    alpha_of,
    check_settings,
    init_adapter_,
    scaling,
)
from peft_kernels.nn.norms import Norms
from peft_kernels.ops.dora_linear import dora_linear, dora_norm
from peft_kernels.ops.lora_linear import lora_linear


def check_weight(value: Any, n: int, k: int, stored: Callable[[Tensor], Tensor]) -> None:
    """Raises a ValueError if a new weight isn't of the size [n, k] that its adapter has."""
    # Sharded Parameters, of fewer dimensions, are for those who shard them.
    if isinstance(value, nn.Parameter) and value.dim() == 2 and stored(value).shape != (n, k):
        raise ValueError(
            f"weight must stay [{n}, {k}], for its adapter is of that size; got "
            f"{list(stored(value).shape)}. Resize the model before it gets adapters, or after "
            "unload() or, of a pool, detach()"
        )


class LoRALinear(Mergeable, KeptFactor, FilledIn, Drawn, HandsOn, nn.Linear):
    """A frozen linear layer with a trainable low-rank update.

    ``y = x @ weight.T + bias + scale * dropout(x) @ lora_a.T @ lora_b.T`` (Hu et al. 2021, "LoRA:
    Low-Rank Adaptation of Large Language Models", equation 3), computed by
    :func:`peft_kernels.ops.lora_linear`. ``scale`` is ``alpha / r``, or ``alpha / sqrt(r)`` with
    ``use_rslora``; it is a plain attribute, and may be set to another float or to a 0-d tensor at
    any time. Dropout acts on the low-rank branch, in training mode only.

    Parameters:
        weight: ``[n, k]``, frozen (``[k, n]`` when ``fan_in_fan_out``: taken from a Conv1D).
        bias: ``[n]`` or None, frozen.
        lora_a: ``[r, k]``, Kaiming-uniform with a = sqrt(5), or Gaussian with mean 0 and standard
            deviation 1 / r.
        lora_b: ``[n, r]``, zero.
        lora_magnitude: ``[n]`` with ``use_dora``, the lengths of weight's rows; else None.
        unmerged_weight: the base weight while the layer is merged, else None.

    While merged, ``weight`` is another Parameter holding ``weight + scale * lora_b @ lora_a``, and
    forward is ``F.linear`` alone, without dropout. The base Parameter is kept, untouched: unmerging
    restores every bit, other modules tied to it never change, and a merged layer costs one more
    weight in memory. ``state_dict`` always holds the base weight, and warns of it while merged:
    :func:`peft_kernels.unload` makes a plain layer with the merged one.

    A shard of ``fully_shard``'s must stay the Parameter that it is, so it is written into, and
    ``unmerged_weight`` has what it held. Modules tied to it would change too, which
    :func:`peft_kernels.merge` refuses.

    Whoever reads ``weight`` rather than calling the layer gets the base weight, or while merged the
    merged one: another library's fused loss or MLP goes without the adapter. Merge first, or call
    the layer.

    With ``use_dora`` the rows of the adapted weight have learned lengths (Liu et al. 2024, "DoRA:
    Weight-Decomposed Low-Rank Adaptation", equation 5):
    ``y = g * (x @ weight.T + scale * dropout(x) @ lora_a.T @ lora_b.T) + bias`` with
    ``g = lora_magnitude / norm``, by :func:`peft_kernels.ops.dora_linear`. The norm, of each row of
    ``weight + scale * lora_b @ lora_a``, is a constant of the backward, and is kept while nothing
    that it is made of changes. Dropout leaves the base product as it is; PEFT's drops from all that
    DoRA adds.

    The state dict has ``scale`` beside the Parameters, as ``_extra_state``; one without it, as of a
    plain ``nn.Linear``, leaves the layer's as it is. A plain layer's makes the magnitudes those of
    the weight that it brings.

    Args:
        in_features: k.
        out_features: n.
        r: the rank, at least 1.
        alpha: the numerator of ``scale``.
        bias: whether there is a bias.
        dropout: the share of x dropped on the low-rank branch, in [0, 1).
        use_rslora: divide alpha by sqrt(r) rather than r.
        use_dora: learn the lengths of the adapted weight's rows too.
        init: ``"kaiming_uniform"`` or ``"gaussian"``, how A is drawn.
        device, dtype: of weight and bias.
        adapter_dtype: of the adapter: float32 or ``dtype``. By default float32 over a float16 or
            bfloat16 base, else ``dtype``.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of the wrong type, or a dtype that can't be mixed.
    """

    _factor = "scale"
    _norms: Norms
    _gathers = False  # whether its A and B are unknown to fully_shard, which holds its weight
    _origin: Origin

    @torch.inference_mode(False)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        alpha: float,
        bias: bool = True,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: str = "kaiming_uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(base, r, alpha, dropout, use_rslora, use_dora, init, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        *,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: str = "kaiming_uniform",
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """Builds the layer around ``linear``'s very Parameters, which it freezes.

        Weights that are tied stay tied. The result is in the training mode of ``linear``, and has
        its hooks, whose handles remain good, and what else was put on it: buffers, attributes,
        children.

        Args:
            linear: ``nn.Linear`` or ``transformers``' Conv1D.
            r, alpha, dropout, use_rslora, use_dora, init, adapter_dtype: as of the class.

        Raises:
            ValueError: a value out of range.
            TypeError: ``linear`` is something else; has another forward, parametrizations or an
                attribute whose name is taken here; or a weight that isn't a whole floating-point
                Parameter: quantised, sharded, offloaded. The message says why, and what to do.
        """
        self = cls.__new__(cls)
        self._adopt(linear, r, alpha, dropout, use_rslora, use_dora, init, adapter_dtype)
        return self

    @torch.inference_mode(False)
    def _adopt(
        self,
        linear: Any,
        r: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        use_dora: bool,
        init: str,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        (n, k), dtype = self._read_base(linear)
        check_settings(r, alpha, dropout, init)
        weight, bias = linear._parameters["weight"], linear.bias
        adapter_dtype = adapter_dtype_for(dtype, adapter_dtype)
        nn.Module.__init__(self)
        self.fan_in_fan_out = is_conv1d(linear)
        self.out_features, self.in_features = n, k
        self.r, self.use_rslora = r, use_rslora
        self.dropout, self.init = float(dropout), init
        self.scale = scaling(alpha, r, use_rslora)
        self.weight, self.bias = weight, bias
        factory = {"device": weight.device, "dtype": adapter_dtype}
        self.lora_a = nn.Parameter(torch.empty(r, self.in_features, **factory))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, r, **factory))
        self.register_parameter("lora_magnitude", None)
        if use_dora:
            self.use_dora, self._norms = True, Norms()
            self.lora_magnitude = nn.Parameter(torch.empty(self.out_features, **factory))
        self.register_parameter("unmerged_weight", None)
        self._gathers = is_gathered(linear)
        for which, name in enumerate(self.adapter_names):
            beside = self._matrix(weight), getattr(self, name), min(which, 1)
            setattr(self, name, lay_beside(*beside, self._gathers))
        self.reset_adapter()
        self.train(linear.training)
        self._origin = take_over(linear, self)
        share_parameters(linear, self)
        weight.requires_grad_(False)
        if bias is not None:
            bias.requires_grad_(False)

    def _read_base(self, linear: Any) -> tuple[tuple[int, int], torch.dtype]:
        """The size [n, k] and the dtype of a layer, once this one can take its place."""
        check_base(linear, may_be_sharded=True)
        n, k = linear.weight.shape
        return (k, n) if is_conv1d(linear) else (n, k), linear.weight.dtype

    def reset_adapter(self) -> None:
        """Draws A anew and sets B to zero, so that the layer computes what its base computes.

        Raises:
            RuntimeError: A or B is pruned, parametrized or the like: it wouldn't stay.
        """
        check_stored(self, own=self.adapter_names)
        draw_whole(partial(init_adapter_, init=self.init), self.lora_a, self.lora_b)
        self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        """Makes the magnitudes the lengths of the adapted weight's rows."""
        if self.use_dora:
            made_of = self._matrix(self.base_weight), self.lora_a, self.lora_b
            if self._gathers:
                made_of = beside_rows(*made_of)
            self.lora_magnitude.copy_(dora_norm(*made_of, self.scale))

    _draw = reset_adapter

    def reset_parameters(self) -> None:
        """Draws the base anew as ``nn.Linear`` does, and the adapter as :meth:`reset_adapter`."""
        self._require(merged=False)
        nn.init.kaiming_uniform_(self._matrix(self.weight), a=math.sqrt(5))
        if self.bias is not None:
            bound = 1.0 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()

    @property
    def alpha(self) -> float:
        """The alpha that ``scale`` stands for at this rank."""
        return alpha_of(float(self.scale), self.r, self.use_rslora)

    def plain(self, *, merged: bool) -> nn.Module:
        """The layer whose place this took, with the Parameters, hooks and mode of this one.

        Its weight is the base weight, or what :meth:`merge` makes of it.
        """
        if merged and not self.merged:
            self.merge()
        if self.merged and not merged and is_gathered(self):
            self.unmerge()
        weight = self.weight if merged else self.base_weight
        return self._hand_on_to(self._origin.restore(self, weight, self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., k]`` in the dtype of the base, any rank, to ``[..., n]``."""
        if is_off(self):
            weight: Tensor = self.base_weight
            if self.merged and is_gathered(self):
                weight = in_call(weight, self.weight)
            return F.linear(x, self._matrix(weight), self.bias)
        base = self.unmerged_weight
        if base is not None:
            if base.shape != self.weight.shape:
                self._check_weight(base)
            return F.linear(x, self._matrix(self.weight), self.bias)
        try:
            return self._adapted(x)
        except ValueError:
            self._check_weight(self.weight)  # a resize in place, of what it is tied to
            raise

    def _adapted(self, x: Tensor) -> Tensor:
        weight = self._matrix(self.weight)
        options: dict[str, Any] = {
            "bias": self.bias,
            "scale": self.scale,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        lora_a: Tensor = self.lora_a
        lora_b: Tensor = self.lora_b
        if self._gathers:
            lora_a, lora_b = in_call(lora_a, weight), in_call(lora_b, weight)
        if not self.use_dora:
            return lora_linear(x, weight, lora_a, lora_b, **options)
        magnitude = self.lora_magnitude
        if self._gathers:
            magnitude = in_call(magnitude, weight)
        norm = self._norms.of(weight, lora_a, lora_b, self.scale)
        return dora_linear(x, weight, lora_a, lora_b, magnitude, norm=norm, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "_origin" in self.__dict__:
            if self.merged and value is self.unmerged_weight:
                return  # what was tied is tied again: the base stays the base
            # fully_shard puts the whole one here, and the shard again.
            if self.merged and not is_gathered(self):
                self._require(merged=False)
            self._check_weight(value)
        super().__setattr__(name, value)

    def _check_weight(self, value: Any) -> None:
        # FullyShardedDataParallel puts whole Parameters in place of flat shards one by one.
        if self.lora_a.dim() == self.lora_b.dim() == 2:
            check_weight(value, self.lora_b.shape[0], self.lora_a.shape[1], self._matrix)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = destination.pop(prefix + "unmerged_weight")
            warn_of_base_weights(destination)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        """Loads the base weight and the adapter; a merged layer is merged anew from them."""
        merged, is_plain = self.merged, self._is_plain(state_dict, prefix)
        if merged:
            state_dict = self._of_unmerged(state_dict, prefix)
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if is_plain:
            self._reset_magnitude()
        if merged:
            self.merge(safe=False)

    def _is_plain(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether a state dict brings a weight and no adapter."""
        return self._brings(state_dict, prefix, "weight") and not self._brings(
            state_dict, prefix, "lora_a"
        )

    def _of_unmerged(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """What a merged layer loads, where its own Parameters are among it.

        Values for a shard are in the merged weight itself then, which unmerging writes into.
        """
        found = {n: v for n, v in state_dict.items() if n != f"{prefix}unmerged_weight"}
        if found.get(f"{prefix}weight") is self.weight:
            brought = self._brings(state_dict, prefix, "weight")
            base = self.weight.detach().clone() if brought else self.unmerged_weight
            found[f"{prefix}weight"] = base
        return found

    def extra_repr(self) -> str:
        state = ", merged" if self.merged else ""
        return (
            f"{super().extra_repr()}, r={self.r}, scale={self.scale}, dropout={self.dropout}"
            f"{', use_dora' if self.use_dora else ''}{state}"
        )
