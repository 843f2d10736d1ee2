"""Prefixes of several tasks in one bank, each of its own length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.modules.checks import check_kind
from peft_kernels.nn._named import Named, numbers_of
from peft_kernels.nn._prefix_parts import Pair
from peft_kernels.nn.prefix_tuning import PrefixTuning


class PrefixBank(Named, PrefixTuning):
    """Prefixes that were trained apart, of which each row of a batch takes one (Li & Liang 2021).

    With ``p = ids[i]`` row i's prefix, of length L_p, and P_k, P_v its keys and values:

        out_i = softmax(scale q_i [P_k[p, :L_p]; k_i]^T) [P_v[p, :L_p]; v_i]       p >= 0
        out_i = softmax(scale q_i k_i^T) v_i                                       p = -1

    It is a :class:`PrefixTuning` of as many tasks, whose values are copies of theirs, "flat" and
    without dropout, in the dtype and on the device of the first. ``[P, Hkv, L, D]`` are its keys
    and values of a layer, L the largest length, and what is beyond a prefix's own is never read.
    Rows of one length are one call of :func:`peft_kernels.ops.prefix_attention`, over copies of
    their queries, keys and values where the batch has several lengths. On a CPU without gradients
    all rows are one call with the same bits, which copies nothing. It trains as any other.
    A state dict says the names and lengths, and is an error in a bank that has others.

    Attributes:
        names: of the prefixes, in the order of their numbers.
        lengths: L_p of each.

    Args:
        prefixes: by name, at least one, of one model's shapes, each of one task.

    Raises:
        ValueError: no prefix, one of several tasks, or others' sites, layers or heads.
        TypeError: one that isn't a PrefixTuning.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, prefixes: Mapping[str, PrefixTuning]) -> None:
        if not prefixes:
            raise ValueError("prefixes must have at least one prefix; got none")
        for name, prefix in prefixes.items():
            check_kind(f"prefixes[{name!r}]", prefix, PrefixTuning)
        first, *_ = prefixes.values()
        for name, prefix in prefixes.items():
            if prefix.tasks > 1:
                raise ValueError(
                    f"prefixes[{name!r}] must be of one task; got a bank of {prefix.tasks}"
                )
            if prefix.layers != first.layers:
                raise ValueError(
                    f"prefixes[{name!r}] must have the sites and layers of the others, "
                    f"{first.layers}; got {prefix.layers}"
                )
        place = next(first.parameters())
        lengths = [prefix.length for prefix in prefixes.values()]
        super().__init__(
            max(lengths),
            first.layers,
            tasks=len(prefixes),
            init="zero",
            device=place.device,
            dtype=place.dtype,
        )
        self.names, self.lengths = tuple(prefixes), tuple(lengths)
        self.read_from_folder = any(prefix.read_from_folder for prefix in prefixes.values())
        self.fit(self._together(list(prefixes.values())))

    def _together(self, prefixes: Sequence[PrefixTuning]) -> dict[str, list[Pair | None]]:
        """Their keys and values as one bank's."""
        modes = [prefix.training for prefix in prefixes]
        values = [prefix.eval()() for prefix in prefixes]
        for prefix, mode in zip(prefixes, modes, strict=True):
            prefix.train(mode)
        return {
            site: [
                None if shape is None else self._bank([made[site][layer] for made in values])
                for layer, shape in enumerate(shapes)
            ]
            for site, shapes in self.layers.items()
        }

    def _bank(self, pairs: Sequence[Any]) -> Pair:
        like = next(self.parameters())

        def padded(x: Tensor) -> Tensor:
            return F.pad(x.to(like.device, like.dtype), (0, 0, 0, self.length - x.shape[-2]))

        k, v = (torch.stack([padded(pair[i]) for pair in pairs]) for i in (0, 1))
        return (k[0], v[0]) if len(pairs) == 1 else (k, v)

    def ids(self, names: Sequence[str | None]) -> Tensor:
        """The numbers of prefixes, as a model's ``prefix_ids`` are: ``[rows]`` int64, -1 for None.

        Raises:
            ValueError: a name that the bank hasn't.
            TypeError: not a sequence of names.
        """
        return torch.tensor(numbers_of(names, self.names), dtype=torch.int64)

    def _parts(self) -> dict[str, list[Any]]:
        return {**super()._parts(), "lengths": list(self.lengths)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, names={list(self.names)}, lengths={list(self.lengths)}"
