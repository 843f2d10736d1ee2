"""AdapterFusion: trained adapters combined by attention at each token (Pfeiffer et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.modules.checks import check_choice, check_share
from peft_kernels.modules.replaced import check_all_stored, has_hooks
from peft_kernels.nn._drawn import Drawn
from peft_kernels.nn._kept import KeepingModule, can_keep
from peft_kernels.nn._read import check_read
from peft_kernels.nn.bottleneck import BottleneckAdapter, Norm
from peft_kernels.ops.adapter_fusion import Absorbed, absorb, adapter_fusion

OFF_DIAGONAL = 1e-6  # of a value projection that starts as the identity
# Which projections a preset has: the `adapters` library's AdapterFusion configurations.
PRESETS = {"dynamic": ("query", "key", "value"), "static": ("query", "key")}


class AdapterFusion(Drawn, KeepingModule):
    """Attention over the outputs of N adapters, called where one adapter would be.

    ``y = norm(residual + sum over n of p_n V o_n)`` with ``h = pre_norm(x)``, ``o_n`` the n-th
    adapter's update of h, and ``p = softmax((Q h + b_q) . (K o_n + b_k) / T)``. The weights of the
    last forward are kept in ``attention``, ``[..., N]``.

    Three plans give the same result: "absorbed", with Q, K and V multiplied into the adapters'
    matrices, so that no product of a row is of size hidden x hidden; "query", which multiplies Q
    with the rows instead; and "direct", which makes every key and value. The one with the fewest
    operations for the rows at hand is taken. On a CPU the absorbed matrices are kept until a
    parameter changes, in whatever way, as long as nothing trains. Adapters that differ in their
    activation, or have norms or a gate of their own, and scores under dropout take "direct".

    Stage 2 of the paper trains this alone: ``fusion.adapters.requires_grad_(False)``, and
    :meth:`regularization` is added to the loss.

    Parameters:
        query.weight, query.bias, key.weight, key.bias: ``[hidden, hidden]``, ``[hidden]``, drawn
            with deviation 0.02. key.bias adds the same to every score and so cancels in the
            softmax: it is there for the peers' files, and is frozen.
        value.weight: ``[hidden, hidden]``, the identity with 1e-6 off the diagonal; None if static.

    Args:
        adapters: N trained adapters of one hidden size, N >= 1; kept as they are.
        preset: "dynamic", or "static", which has no value projection.
        temperature: the scores are divided by it; an attribute that may be set at any time.
        dropout: the share of scores dropped in training, in [0, 1).

    Raises:
        ValueError: no adapters, several hidden sizes, an unknown preset, a value out of range.
    """

    uncalled_linears = ("query", "key", "value")  # but in the plan "direct"

    attention: Tensor | None
    value: nn.Linear | None

    @torch.inference_mode(False)
    def __init__(
        self,
        adapters: Sequence[BottleneckAdapter],
        *,
        preset: str = "dynamic",
        temperature: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("preset", preset, tuple(PRESETS))
        if not adapters:
            raise ValueError("adapters must have at least one adapter to fuse; got none")
        sizes = sorted({adapter.hidden_size for adapter in adapters})
        if len(sizes) > 1:
            raise ValueError(f"adapters must have one hidden size; got {sizes}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; got {temperature}")
        check_share("dropout", dropout)
        self.hidden_size, self.preset = sizes[0], preset
        self.temperature, self.dropout = float(temperature), float(dropout)
        self.adapters = nn.ModuleList(adapters)
        up = adapters[0].up.weight
        factory: Any = {"device": up.device, "dtype": up.dtype}
        size = self.hidden_size
        self.query = nn.Linear(size, size, **factory)
        self.key = nn.Linear(size, size, **factory)
        self.key.bias.requires_grad_(False)
        has_value = "value" in PRESETS[preset]
        self.value = nn.Linear(size, size, bias=False, **factory) if has_value else None
        self.attention = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws Q and K anew; V is the identity again. The adapters stay as they are."""
        for part in (self.query, self.key, self.value):
            if part is not None:
                check_all_stored(part)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.value is not None:
            with torch.no_grad():
                self.value.weight.fill_(OFF_DIAGONAL).fill_diagonal_(1.0)

    _draw = reset_parameters

    def regularization(self, weight: float = 0.01) -> Tensor:
        """``weight * ||V - I||_F^2``, which keeps the value projection near the identity."""
        if self.value is None:
            return self.query.weight.new_zeros(())
        v = self.value.weight
        return (
            weight * (v - torch.eye(self.hidden_size, device=v.device, dtype=v.dtype)).pow(2).sum()
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | tuple[Tensor, ...] | None = None,
        *,
        pre_norm: Norm | None = None,
        norm: Norm | None = None,
        query: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`peft_kernels.nn.BottleneckAdapter.forward`.

        Args:
            x: ``[..., hidden_size]``, the adapters' input.
            residual: of x's shape and dtype, or several, which are added up.
            pre_norm, norm: the host's norms of x and of the result.
            query: ``[..., hidden_size]``, what attends to the adapters, where it isn't x.

        Returns:
            A tensor of x's shape, in the dtype of x, or in autocast's dtype under autocast.
        """
        h = x if pre_norm is None else pre_norm(x)
        terms = residual if isinstance(residual, tuple) else () if residual is None else (residual,)
        added = sum(terms[1:], terms[0]) if terms else None
        asked = h if query is None else query
        check_read(self, "query", "key", "value")
        plan = self.plan(h.numel() // self.hidden_size)
        if plan == "direct":
            y, self.attention = self._direct(h, asked)
            y = y if added is None else y + added
        else:
            y, self.attention = self._absorbed(h, asked, added, plan)
        return y if norm is None else norm(y)

    # -- plans

    def plan(self, rows: int) -> str:
        """The plan for this many rows: "absorbed", "query" or "direct"."""
        if not self._can_absorb() or (self.training and self.dropout > 0):
            return "direct"
        if not self.trains() and can_keep(self.query.weight):
            return "absorbed"
        size, adapters = self.hidden_size, len(self.adapters)
        ranks = sum(adapter.bottleneck_size for adapter in self._bottlenecks()) + adapters
        # In units of size^2 multiplications: of rows with Q, K and V, and of Q, K and V with the
        # adapters' matrices. The adapters' own products are the same in every plan.
        projections = 2 if self.value is not None else 1
        scores = rows * ranks / size
        costs = {
            "absorbed": (1 + projections) * ranks + scores,
            "query": projections * ranks + rows + scores,
            "direct": rows * (1 + projections * adapters),
        }
        return min(costs, key=lambda name: costs[name])

    def _bottlenecks(self) -> list[BottleneckAdapter]:
        return list(self.adapters)  # type: ignore[arg-type]

    def _can_absorb(self) -> bool:
        """Whether the adapters are alike and nothing but a bottleneck each, and nobody listens."""
        activations = {adapter.activation for adapter in self._bottlenecks()}
        plain = all(
            adapter.gate is None and adapter.norm_before is None and adapter.norm_after is None
            for adapter in self._bottlenecks()
        )
        dropping = any(a.training and a.dropout > 0 for a in self._bottlenecks())
        heard = any(has_hooks(adapter) for adapter in self._bottlenecks())
        return plain and len(activations) == 1 and not dropping and not heard

    def _absorbed(
        self, h: Tensor, asked: Tensor, residual: Tensor | None, plan: str
    ) -> tuple[Tensor, Tensor]:
        for adapter in self._bottlenecks():
            check_read(adapter, "down", "up")
        matrices = self._matrices(absorb_query=plan == "absorbed")
        if plan == "query":
            asked = F.linear(asked, self.query.weight, self.query.bias)
        bottlenecks = self._bottlenecks()
        return adapter_fusion(
            h,
            [adapter.down.weight for adapter in bottlenecks],
            [adapter.down.bias for adapter in bottlenecks],
            matrices,
            query=asked,
            activation=bottlenecks[0].activation,
            residual=residual,
        )

    def _matrices(self, absorb_query: bool) -> Absorbed:
        if self.trains():
            return self._absorb(absorb_query)
        # A scaling that trains is one of the parameters.
        scalings = [a.scaling for a in self._bottlenecks()]
        numbers = tuple(None if isinstance(s, Tensor) else s for s in scalings)
        return self._kept.get(
            lambda: self._absorb(absorb_query),
            list(self.parameters()),
            (numbers, self.temperature, absorb_query),
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"attention": None}

    def _absorb(self, absorb_query: bool) -> Absorbed:
        bottlenecks = self._bottlenecks()
        return absorb(
            [adapter.up.weight for adapter in bottlenecks],
            [adapter.up.bias for adapter in bottlenecks],
            self.query.weight,
            self.query.bias,
            self.key.weight,
            None if self.value is None else self.value.weight,
            scales=[adapter.scaling for adapter in bottlenecks],
            temperature=self.temperature,
            absorb_query=absorb_query,
        )

    def _direct(self, h: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.stack([adapter(h) for adapter in self.adapters], -2)
        scores = (self.key(outputs) @ self.query(asked).unsqueeze(-1)).squeeze(-1)
        scores = F.dropout(scores, self.dropout, self.training)
        p = torch.softmax(scores / self.temperature, -1)
        values = outputs if self.value is None else self.value(outputs)
        return (p.unsqueeze(-2) @ values).squeeze(-2), p.detach()

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, preset={self.preset}, "
            f"temperature={self.temperature}, dropout={self.dropout}"
        )
