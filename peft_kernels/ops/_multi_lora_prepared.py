"""Banks that many calls share: what can be checked and looked up once is.

A step of decoding takes a layer some tens of microseconds on a CPU, of which lists of tensors would
take as many as the products: each tensor is an object of its own, out of the caches by the next
step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels import _library

_library.LIBRARY.define(
    "multi_lora_linear_prepare(Tensor[] a, Tensor[] b, Tensor[] tables, Tensor[] ranks,"
    " Tensor[] scales) -> Tensor"
)
_library.LIBRARY.define(
    "multi_lora_linear_add_prepared(Tensor(a!) y, Tensor x, Tensor prepared, Tensor ids,"
    " float scale) -> ()"
)
_library.LIBRARY.impl("multi_lora_linear_add_prepared", lambda *_: None, "Meta")


class PreparedBanks:
    """The banks of one layer, whose slices of the outputs follow each other.

    What their tensors hold may change between calls, as when an adapter is loaded. The tensors
    themselves may not: they are kept, and must stay in their storage.

    Args:
        a: of each bank, rows of rank by rank ``[pages * 8, k]``; each dtype is float32, float16 or
            bfloat16.
        b: ``[pages * 8, n]``, the transposed B.
        tables: int32 ``[slots, pages of one]``, ranks: int32 ``[slots]``, scales: float32
            ``[slots]``, as of :class:`peft_kernels.ops.LoRABank`.
    """

    def __init__(
        self,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        tables: Sequence[Tensor],
        ranks: Sequence[Tensor],
        scales: Sequence[Tensor],
    ):
        self.lists = tuple(map(list, (a, b, tables, ranks, scales)))
        self.widths = [own.shape[1] for own in b]
        self.width = sum(self.widths)
        self.prepared = None
        if _has_kernel(a[0]):
            self.prepared = torch.ops.peft_kernels.multi_lora_linear_prepare.default(*self.lists)

    def add_to(self, y: Tensor, x: Tensor, ids: Tensor, scale: float = 1.0) -> None:
        """``y[i] += scale * scale_g * B_g A_g x[i]`` for ``g = ids[i]``, summed in float32.

        Args:
            y: ``[m, n]`` of contiguous rows, in any stride from row to row.
            x: ``[m, k]``.
            ids: ``[m]`` int32, -1 for none, whose row isn't touched.
        """
        if self.prepared is None or _library.variant(x.dtype):
            self._add_by_lists(y, x, ids, scale)
        else:
            _add_prepared(y, x, self.prepared, ids, scale)

    def _add_by_lists(self, y: Tensor, x: Tensor, ids: Tensor, scale: float) -> None:
        *rest, scales = self.lists
        op = _library.get_op("multi_lora_linear_add", _library.variant(x.dtype))
        whole = y.contiguous()
        op(whole, x, *rest, [own * scale for own in scales], ids, None, None, [], [], "auto")
        if whole is not y:
            y.copy_(whole)


_add_prepared = torch.ops.peft_kernels.multi_lora_linear_add_prepared.default


def _has_kernel(tensor: Tensor) -> bool:
    name = "peft_kernels::multi_lora_linear_add_prepared"
    return tensor.device.type == "cpu" and torch._C._dispatch_has_kernel_for_dispatch_key(
        name, "CPU"
    )
