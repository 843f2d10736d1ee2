"""Bottleneck adapters by row: each row of a batch its own, or none."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from peft_kernels.modules.checks import check_kind
from peft_kernels.nn._adapters_apart import factors_of
from peft_kernels.nn._named import Named
from peft_kernels.nn._row_groups import RowGroups
from peft_kernels.nn.bottleneck import BottleneckAdapter, Norm, _added, _arguments, _call
from peft_kernels.ops._adapter_apart import adapter_apart


class Rows(Protocol):
    """What says which adapter each row of the running call has."""

    def groups_of(self, batch: int) -> RowGroups | None:
        """The adapters' numbers by row, -1 for none; None where nothing is said."""


class AdapterBank(Named):
    """Bottleneck adapters of which each row takes one (Houlsby et al. 2019), where one would be.

    With ``a = ids[i]`` row i's adapter, its matrices D_a and U_a, its activation, norms and scale:

        y_i = norm(residual_i + scale_a act_a(pre_norm(x_i) D_a^T + b_a) U_a^T + c_a)    a >= 0
        y_i = norm(residual_i)                                                           a = -1

    Rows of one adapter are one call of :func:`peft_kernels.ops.adapter`: as many calls as the batch
    has adapters, over copies of their rows where there are several. On a CPU without gradients they
    are one call together, with the same bits, which reads each adapter where it lies; not where one
    of them has hooks, norms of its own, a gate or dropout in training. Adapters may differ in
    everything but their hidden size. All that is given is differentiable, and an adapter that no
    row asks for gets no gradient. A state dict says the names, and is an error in a bank that has
    others.

    Parameters:
        adapters.N: those of the N-th adapter.

    Args:
        adapters: by name, at least one, of one hidden size; kept as they are.
        rows: says which adapter the rows of a call have, where the call itself doesn't.

    Raises:
        ValueError: no adapters, or several hidden sizes.
        TypeError: one that isn't a BottleneckAdapter.
    """

    def __init__(self, adapters: Mapping[str, nn.Module], *, rows: Rows | None = None) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("adapters must have at least one adapter; got none")
        for name, adapter in adapters.items():
            check_kind(f"adapters[{name!r}]", adapter, BottleneckAdapter)
        sizes = {name: one.hidden_size for name, one in adapters.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"adapters must have one hidden size; got {sizes}")
        self.names, self.hidden_size = tuple(adapters), next(iter(sizes.values()))
        self.adapters = nn.ModuleList(adapters.values())
        self.rows = rows

    def forward(
        self,
        x: Tensor,
        residual: Tensor | tuple[Tensor, ...] | None = None,
        *,
        pre_norm: Norm | None = None,
        norm: Norm | None = None,
        ids: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Each row through its adapter.

        Args:
            x: ``[B, ..., hidden_size]``, rows first.
            residual, pre_norm, norm: as of :class:`BottleneckAdapter`.
            ids: ``[B]`` integers in [-1, N), -1 for none; by default what ``rows`` says.

        Returns:
            A tensor of x's shape, in the dtype that :class:`BottleneckAdapter` gives.

        Raises:
            ValueError: no ids, another number of them than of rows, or one out of range; an x of
                another hidden size, or a residual of another shape.
            TypeError: ids that aren't integers.
        """
        terms = () if residual is None else residual if isinstance(residual, tuple) else (residual,)
        groups = self._checked(x, terms, ids)

        def run(number: int, x: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
            return self._one(number, x, terms, pre_norm, norm)

        adapters = list(self.adapters)
        chosen = [adapters[number] for number in groups.present]
        factors = factors_of(chosen, x, terms, pre_norm, norm)
        if factors is None:
            return groups.apply(run, x, terms)
        norms = {**_arguments("pre_norm", pre_norm), **_arguments("norm", norm)}
        y = adapter_apart(x, factors, groups.indices(x.device).places, residual=terms, **norms)
        groups.write_below_0(y, run, x, terms)
        return y

    def _checked(
        self, x: Tensor, terms: tuple[Tensor, ...], ids: Tensor | Sequence[int] | None
    ) -> RowGroups:
        if x.dim() < 2 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must be [B, ..., {self.hidden_size}]; got {list(x.shape)}")
        for term in terms:
            if term.shape != x.shape:
                raise ValueError(
                    f"residual must have the shape of x, {list(x.shape)}; got {list(term.shape)}"
                )
        groups = None if ids is None else RowGroups(_integers(ids))
        if groups is None and self.rows is not None:
            groups = self.rows.groups_of(x.shape[0])
        if groups is None:
            raise ValueError(
                f"ids must say which of {', '.join(self.names)} each row has; none are given"
            )
        if len(groups.numbers) != x.shape[0]:
            raise ValueError(
                f"ids must have one entry for each row of x {list(x.shape)}; "
                f"got {len(groups.numbers)}"
            )
        count = len(self.adapters)
        if wrong := [number for number in groups.rows if not -1 <= number < count]:
            raise ValueError(f"ids must be in [-1, {count}); got {wrong[0]}")
        return groups

    def _one(
        self,
        number: int,
        x: Tensor,
        terms: tuple[Tensor, ...],
        pre_norm: Norm | None,
        norm: Norm | None,
    ) -> Tensor:
        """Rows that all have one adapter, or none."""
        if number >= 0:
            return self.adapters[number](x, terms, pre_norm=pre_norm, norm=norm)
        y = _added(terms[0], terms[1:]) if terms else torch.zeros_like(x)
        return y if norm is None else _call(norm, y)

    def extra_repr(self) -> str:
        return f"names={list(self.names)}, hidden_size={self.hidden_size}"


def _integers(ids: Tensor | Sequence[int]) -> list[int]:
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers [B]; got {list(ids.shape)} of {ids.dtype}")
        return ids.tolist()
    try:
        numbers = [operator.index(number) for number in ids if not isinstance(number, bool)]
    except TypeError as error:
        raise TypeError(f"ids must be integers [B]; got {ids!r}") from error
    if len(numbers) != len(ids):
        raise TypeError(f"ids must be integers [B]; got {ids!r}")
    return numbers
