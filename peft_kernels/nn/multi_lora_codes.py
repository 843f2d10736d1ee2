"""Many LoRA adapters on one linear layer whose weight is in codes."""

from __future__ import annotations

from peft_kernels.nn._over_codes import OverCodes
from peft_kernels.nn.multi_lora import MultiLoRALinear
from peft_kernels.ops import QuantizedWeight


class QuantizedMultiLoRALinear(OverCodes, MultiLoRALinear):
    """:class:`MultiLoRALinear` in the place of another library's quantised layer.

    ``weight`` is the library's Parameter, of its shape, and the state dict is that of the library's
    layer. Neither pass keeps anything of the weight's size. x may be float32, or a half where the
    pages are float32 or of its dtype; the result has its dtype.
    """

    def _base(self) -> QuantizedWeight:
        return self._codes()
