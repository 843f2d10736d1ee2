"""Invertible adapters on embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.modules.checks import check_choice, check_size
from peft_kernels.modules.replaced import check_all_stored
from peft_kernels.nn._drawn import Drawn
from peft_kernels.nn._read import check_read
from peft_kernels.nn.bottleneck import INITS, init_bottleneck_, reduced
from peft_kernels.ops._activations import activation_name
from peft_kernels.ops.adapter import adapter


class InvertibleAdapter(Drawn):
    """An invertible adapter of the NICE kind (Pfeiffer et al. 2020, "MAD-X").

    The features are split into ``x1`` (hidden_size // 2 of them) and ``x2`` (the rest), and F and G
    are bottlenecks ``act(h @ down.T + d) @ up.T + u``:

        y1 = x1 + F(x2)    y2 = x2 + G(y1)        forward(x)
        x2 = y2 - G(y1)    x1 = y1 - F(x2)        forward(y, inverse=True)

    each half being one call of :func:`peft_kernels.ops.adapter`. The inverse is exact but for
    rounding. MAD-X applies the adapter to the output of the embedding, and its inverse to the input
    of the output embedding, so that one set of weights serves both; language and task adapters
    between them are stacked as :func:`peft_kernels.nn.stack_adapters` says.

    Parameters, by the names of the `adapters` library's NICE block:
        F.0.weight, F.0.bias: ``[r2, n2]``, ``[r2]``, with n2 the size of x2, and r2 that over the
            reduction, at least 1.
        F.2.weight, F.2.bias: ``[n1, r2]``, ``[n1]``.
        G.0.*, G.2.*: the same with 1 and 2 exchanged.

    Args:
        hidden_size: features of x and y, at least 2.
        reduction: a half's size over its bottleneck's.
        activation: a name that :func:`peft_kernels.ops.adapter` knows.
        init: how the matrices are drawn, as in :class:`peft_kernels.nn.BottleneckAdapter`.
        device, dtype: of the parameters. Over float16 or bfloat16 inputs they may be float32.

    Raises:
        ValueError: a value out of range, or an unknown name.
        TypeError: a hidden_size that isn't an int.
    """

    uncalled_linears = ("F.0", "F.2", "G.0", "G.2")

    @torch.inference_mode(False)
    def __init__(
        self,
        hidden_size: int,
        *,
        reduction: float = 2,
        activation: str = "relu",
        init: str = "bert",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size, least=2)
        check_choice("init", init, INITS)
        self.hidden_size, self.reduction = hidden_size, reduction
        self.activation, self.init = activation_name(activation), init
        self.split = hidden_size // 2, hidden_size - hidden_size // 2

        def bottleneck(k: int, n: int) -> nn.ModuleDict:
            r = reduced(k, reduction)
            down = nn.Linear(k, r, device=device, dtype=dtype)
            return nn.ModuleDict({"0": down, "2": nn.Linear(r, n, device=device, dtype=dtype)})

        first, second = self.split
        self.F, self.G = bottleneck(second, first), bottleneck(first, second)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws both bottlenecks anew, so that the adapter computes nearly the identity."""
        check_all_stored(self)
        for part in (self.F, self.G):
            down, up = _linears(part)
            init_bottleneck_(down, up, self.init)

    _draw = reset_parameters

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        """x ``[..., hidden_size]``, any rank, to y of its shape and dtype, or y to x.

        Args:
            x: the embeddings or, with ``inverse``, what was made of them.
            inverse: whether to undo it.

        Raises:
            ValueError: x of another size.
        """
        if x.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"x must end in {self.hidden_size} features; got {list(x.shape)}")
        first, second = x.split(self.split, -1)
        if inverse:
            second = self._coupled(second, -1.0, self.G, first)
            first = self._coupled(first, -1.0, self.F, second)
        else:
            first = self._coupled(first, 1.0, self.F, second)
            second = self._coupled(second, 1.0, self.G, first)
        return torch.cat([first, second], -1)

    def _coupled(self, half: Tensor, sign: float, part: nn.ModuleDict, other: Tensor) -> Tensor:
        """``half + sign * part(other)``."""
        check_read(part, "0", "2")
        down, up = _linears(part)
        return adapter(
            other,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            activation=self.activation,
            scale=sign,
            residual=half,
        )

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, reduction={self.reduction}, "
            f"activation={self.activation}, init={self.init}"
        )


def _linears(part: Any) -> tuple[nn.Linear, nn.Linear]:
    return part["0"], part["2"]
