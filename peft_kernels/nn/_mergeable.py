"""A low-rank update that is put into the weight, and taken out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.modules.bases import check_memory, is_sharded
from peft_kernels.modules.fully_sharded import is_gathered
from peft_kernels.modules.replaced import check_stored
from peft_kernels.nn._gathered import beside_rows, check_in_shards, overwrite, placed_like
from peft_kernels.nn._lora_values import overwritten
from peft_kernels.nn._sharded import all_finite, placed_as


class Mergeable(nn.Linear):
    """A linear layer with an adapter of low rank, in its weight or beside it."""

    weight: nn.Parameter
    unmerged_weight: nn.Parameter | None
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_magnitude: Any  # a Parameter with use_dora, else None
    fan_in_fan_out: bool
    use_dora = False
    r: int
    scale: float | Tensor

    @property
    def adapter_names(self) -> list[str]:
        """The names of the adapter's Parameters."""
        return ["lora_a", "lora_b", *(["lora_magnitude"] if self.use_dora else [])]

    def _matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as [n, k], however it is stored."""
        return weight.T if self.fan_in_fan_out else weight

    @property
    def merged(self) -> bool:
        """Whether the update is in ``weight`` now."""
        return self.unmerged_weight is not None

    @property
    def base_weight(self) -> nn.Parameter:
        """The weight without any update, merged or not; stored as ``weight`` is."""
        return self.weight if self.unmerged_weight is None else self.unmerged_weight

    def _require(self, *, merged: bool) -> None:
        if self.merged is not merged:
            state, call = ("unmerged", "merge") if merged else ("merged", "unmerge")
            raise RuntimeError(f"the layer is {state}; {call}() it first")

    @torch.inference_mode(False)
    @torch.no_grad()
    def _merged_weight(
        self,
        base: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None,
        scale: float | Tensor,
        safe: bool,
    ) -> Tensor:
        """``base + scale * lora_b @ lora_a``, its rows as long as magnitude says if there is one.

        Stored as ``base``; summed wide and rounded once.
        """
        check_in_shards(self)
        for name, tensor in (("weight", base), ("lora_a", lora_a), ("lora_b", lora_b)):
            check_memory(tensor, name)
        wide = torch.float64 if base.dtype is torch.float64 else torch.float32
        weight = self._matrix(base)
        a, b = placed_as(self.lora_a, lora_a), placed_as(self.lora_b, lora_b)
        wanted = None if magnitude is None else placed_as(self.lora_magnitude, magnitude)
        if is_gathered(self):
            weight, a, b, wanted = beside_rows(weight, a, b, wanted)
        a, b = a.to(base.device, wide), b.to(base.device, wide)
        with torch.autocast(base.device.type, enabled=False):
            merged = torch.addmm(weight.to(wide), b, a, alpha=float(scale))
        if wanted is not None:
            length = torch.linalg.vector_norm(merged, dim=1)
            wanted = wanted.to(base.device, wide)
            merged *= (wanted / length.masked_fill(length == 0, torch.inf))[:, None]
        merged = merged.to(base.dtype)
        if safe and not all_finite(merged):
            raise ValueError(
                "the merged weight has values that are not finite; nothing was changed"
            )
        stored: Any = self._matrix(merged)
        return (placed_like(base, stored) if is_gathered(self) else stored).contiguous()

    @torch.inference_mode(False)
    def merge(self, safe: bool = True, *, requantize: bool = False) -> None:
        """Puts the adapted weight in place of ``weight``; see the class.

        It is ``weight + scale * lora_b @ lora_a``, with its rows scaled to ``lora_magnitude`` where
        there is one.

        The sum is taken in float32 (float64 for a float64 base) and rounded once.

        Args:
            safe: first check that the merged weight is finite.
            requantize: for layers over a weight in codes: :class:`QuantizedLoRALinear`.

        Raises:
            RuntimeError: the layer is merged already, or its weight is pruned, parametrized or the
                like, or gathered by fully_shard now.
            ValueError: ``safe``, and the merged weight isn't finite. Nothing is changed.
        """
        self._require(merged=False)
        check_stored(self, own=["weight"], other=self.adapter_names)
        adapter = self.lora_a, self.lora_b, self.lora_magnitude if self.use_dora else None
        merged = self._merged_weight(self.weight, *adapter, self.scale, safe)
        if is_gathered(self):
            self.unmerged_weight = overwrite(self.weight, merged)
            return
        base, self.weight = self.weight, nn.Parameter(merged, requires_grad=False)
        self.unmerged_weight = base

    def unmerge(self) -> None:
        """Puts the base Parameter back: the very tensor, so every bit of weight and of logits.

        Raises:
            RuntimeError: the layer is not merged, or its weight was pruned or parametrized since,
                or is gathered by fully_shard now. Nothing is changed.
        """
        self._require(merged=True)
        check_stored(self, own=["weight"])
        assert self.unmerged_weight is not None
        if is_gathered(self):
            check_in_shards(self)
            overwrite(self.weight, self.base_weight)
            self.unmerged_weight = None
            return
        base, self.unmerged_weight = self.unmerged_weight, None
        self.weight = base

    @torch.inference_mode(False)
    @torch.no_grad()
    def switch(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        magnitude: Tensor | None = None,
        scale: float | Tensor | None = None,
        safe: bool = True,
    ) -> None:
        """Takes over the values of another task's adapter, merged or not.

        A merged weight becomes ``base + scale * lora_b @ lora_a`` in the same memory. It is
        computed from the base weight, so no error builds up however often tasks are switched. The
        Parameters A and B keep their memory too, unless the rank changes.

        Args:
            lora_a: ``[r, k]``, any rank r >= 1, any floating dtype.
            lora_b: ``[n, r]``.
            magnitude: ``[n]`` with ``use_dora``, else None.
            scale: the new factor, a float or a 0-d tensor; the present one when None.
            safe: when merged, first check that the new merged weight is finite.

        Raises:
            RuntimeError: the weight is merged, and gathered by fully_shard now; the adapter is on
                the meta device, or is sharded and of another rank; A, B or a merged weight is
                pruned, parametrized or the like, so that what is written wouldn't stay.
            ValueError: shapes that don't fit, or a merged weight that isn't finite. Nothing is
                changed.
        """
        scale = self.scale if scale is None else scale
        self._check_adapter(lora_a, lora_b, magnitude, scale)
        if self.merged:
            self._merge_anew(lora_a, lora_b, magnitude, scale, safe)
        self.lora_a = overwritten(self.lora_a, lora_a)
        self.lora_b = overwritten(self.lora_b, lora_b)
        if magnitude is not None:
            self.lora_magnitude = overwritten(self.lora_magnitude, magnitude)
        self.r, self.scale = lora_a.shape[0], scale

    def _merge_anew(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None,
        scale: float | Tensor,
        safe: bool,
    ) -> None:
        """Puts another adapter into the base weight, in the memory of the merged one."""
        adapter = lora_a, lora_b, magnitude
        self.weight.copy_(self._merged_weight(self.base_weight, *adapter, scale, safe))

    def _check_adapter(
        self, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None, scale: float | Tensor
    ) -> None:
        check_stored(self, own=[*self.adapter_names, *(["weight"] if self.merged else [])])
        n, k = self.out_features, self.in_features
        if lora_a.dim() != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] != k:
            raise ValueError(f"lora_a must be [r, {k}] with r >= 1; got {list(lora_a.shape)}")
        if lora_b.shape != (n, lora_a.shape[0]):
            raise ValueError(
                f"lora_b must be [n, r] = [{n}, {lora_a.shape[0]}]; got {list(lora_b.shape)}"
            )
        wanted = (n,) if self.use_dora else None
        if (None if magnitude is None else magnitude.shape) != wanted:
            got = "None" if magnitude is None else f"a tensor of shape {list(magnitude.shape)}"
            must = f"[n] = [{n}]" if self.use_dora else "None, for the layer has no use_dora"
            raise ValueError(f"magnitude must be {must}; got {got}")
        check_memory(self.lora_a, "lora_a")
        if is_sharded(self.lora_a) and lora_a.shape[0] != self.r:
            raise RuntimeError(
                f"lora_a is sharded (a DTensor) and keeps its rank, {self.r}; got {lora_a.shape[0]}"
            )
        if isinstance(scale, Tensor) and scale.dim() != 0:
            raise ValueError(f"scale must be a float or a 0-d tensor; got {list(scale.shape)}")
