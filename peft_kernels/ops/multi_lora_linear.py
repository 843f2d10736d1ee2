"""Multi-LoRA linear: a frozen linear layer in which every row has its own adapter.

    y[i] = W x[i] + b + scale_g B_g A_g dropout_g(x[i])        g = the adapter of row i

Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", and Sheng et al. 2023, "S-LoRA", for serving;
the backward is LoRA's (Hu et al. 2021), adapter by adapter. With S and dS [m, r] in float32,

    S[i]  = A_g dropout_g(x[i])                y[i]  = W x[i] + b + scale_g B_g S[i]
    dS[i] = scale_g B_g^T dy[i]                dx[i] = W^T dy[i] + dropout_g'(A_g^T dS[i])
    dA_g  = sum_i dS[i] dropout_g(x[i])^T      dB_g^T = scale_g sum_i S[i] dy[i]^T

where the sums go over the rows of adapter g, in their order in the batch: they don't depend on
which other adapters share it, and neither does anything else about a row. The reference is in
``_multi_lora_reference.py``, the schemas and the gradients are in ``_multi_lora_autograd.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._dtypes import autocast
from peft_kernels.ops._lora_banks import (
    PAGE,
    BankDropout,
    LoRABank,
    Routing,
    Trained,
    check_banks,
    check_companions,
    check_ids,
    plan_of,
    route,
    sort_by_adapter,
)
from peft_kernels.ops._lora_factors import LoRAFactors, linear_of_factors
from peft_kernels.ops._multi_lora_autograd import (
    Call,
    MultiLoRALinearFunction,
    check_in_graphs,
    in_graphs,
)
from peft_kernels.ops._multi_lora_codes import multi_lora_over_codes
from peft_kernels.ops._multi_lora_examples import (
    example_bank,
    example_ids,
    example_inputs,
    example_trained,
)
from peft_kernels.ops._multi_lora_reference import composition
from peft_kernels.ops._quantized import QuantizedWeight
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops._sharded import are_sharded
from peft_kernels.ops._sharded_banks import multi_lora_linear_sharded
from peft_kernels.ops._transforms import is_batched, is_recorded, is_special, wants_composition

__all__ = [
    "PAGE",
    "BankDropout",
    "LoRABank",
    "LoRAFactors",
    "Routing",
    "Trained",
    "example_bank",
    "example_ids",
    "example_inputs",
    "example_trained",
    "multi_lora_add_",
    "multi_lora_linear",
    "plan_of",
    "route",
    "sort_by_adapter",
]


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    banks: LoRABank | Sequence[LoRABank] | LoRAFactors,
    ids: Tensor | Routing,
    *,
    bias: Tensor | None = None,
    dropout: BankDropout | Sequence[BankDropout] | None = None,
    trained: Trained | Sequence[Trained] | None = None,
    plan: str = "auto",
) -> Tensor:
    """Frozen linear layer plus, for each row, the low-rank update of its own adapter.

    Semantics: ``y[i] = weight @ x[i] + bias``, and for ``g = ids[i]`` in [0, slots)
    ``y[i] += scale_g * B_g @ A_g @ dropout_g(x[i])``, at the true rank of g. Rows come in any
    order. A row without an adapter (id -1, or rank 0) has the bits it would have if no row had one.
    Sums are in float32 and rounded once, in an order that doesn't depend on the row's neighbours.

    x, weight and bias may be DTensors, as of :func:`peft_kernels.ops.lora_linear`. ``banks`` and
    ``trained`` are then what goes beside the part of the weight that this process has.

    Args:
        x: ``[..., k]``, float32, float16, bfloat16 or float64, any strides.
        weight: ``[n, k]`` in the dtype of x; frozen as a rule. Or one in codes, which is widened
            piece by piece and receives no gradient.
        banks: the adapters. Several banks serve slices of the outputs one after the other, such as
            query, key and value of one fused layer; their widths add up to n. Or the adapters in
            tensors of their own: where those require gradients they receive them, and else a CPU's
            kernel reads them where they lie, for which nothing may be given but the bias.
        ids: the adapter of each row, int32 or int64, -1 for none; or what :func:`route` made of
            them. Fewer ids than rows serve equal parts each: ``[batch]`` for x ``[batch, seq, k]``.
        bias: ``[n]`` in the dtype of x.
        dropout: per bank, dropout of x on the low-rank branch.
        trained: per bank, the adapters that receive gradients; no others do.
        plan: for GPUs, how it is computed: ``"decode"`` for few rows, ``"grouped"`` sorts rows by
            adapter, ``"single"`` takes them as they come, best where neighbours share an adapter.
            Each is right for any ids; bits may differ between plans, and between ``"auto"``'s
            choices, which go by the number of rows. CPU kernels have one plan. Where the ids are
            known on the host, as in a pool's routes, ``plan_of`` looks at their variety as well.

    Returns:
        ``[..., n]`` in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: shapes or devices that don't fit, an unknown plan, and on the CPU an id outside
            [-1, slots). On a GPU, where nothing waits for the ids, such a row gets no delta.
        TypeError: dtypes that can't be mixed.
    """
    if isinstance(weight, QuantizedWeight):
        return multi_lora_over_codes(
            multi_lora_add_, x, weight, banks, ids,
            bias=bias, dropout=dropout, trained=trained, plan=plan,
        )  # fmt: skip
    if are_sharded(x, weight):
        return multi_lora_linear_sharded(
            multi_lora_linear,
            x,
            weight,
            banks,
            ids,
            bias=bias,
            dropout=dropout,
            trained=trained,
            plan=plan,
        )
    x, base, bias = autocast(x, weight, bias)
    if base.dim() != 2 or x.dim() < 1 or x.shape[-1] != base.shape[1]:
        raise ValueError(
            f"x must be [..., k] for weight [n, k]; got {tuple(x.shape)} and {tuple(base.shape)}"
        )
    n = base.shape[0]
    if base.dtype is not x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}; got {base.dtype}")
    if bias is not None and (bias.shape != (n,) or bias.dtype is not x.dtype):
        raise ValueError(
            f"bias must be [{n}] in x's dtype {x.dtype}; got {tuple(bias.shape)}, {bias.dtype}"
        )
    if isinstance(banks, LoRAFactors):
        return linear_of_factors(
            multi_lora_linear, x, base, banks, ids, bias, dropout, trained, plan
        )  # fmt: skip
    banks = _as_sequence(banks)
    y = _apply(rows_of(x), base, bias, False, banks, n, ids, dropout, trained, plan)
    return in_shape_of(x, y)


def multi_lora_add_(
    y: Tensor,
    x: Tensor,
    banks: LoRABank | Sequence[LoRABank],
    ids: Tensor | Routing,
    *,
    dropout: BankDropout | Sequence[BankDropout] | None = None,
    trained: Trained | Sequence[Trained] | None = None,
    plan: str = "auto",
) -> Tensor:
    """Adds each row's low-rank update into a y that something else computed, in place.

    Semantics: ``y[i] += scale_g * B_g @ A_g @ dropout_g(x[i])`` for ``g = ids[i]``, as in
    :func:`multi_lora_linear`; a row without an adapter isn't touched. For quantised bases and
    vendors' products. Differentiable: the gradient of y passes through.

    Args:
        y: contiguous ``[..., n]`` in the dtype of x, and not a leaf that requires a gradient.
        x: ``[..., k]``.
        banks, ids, dropout, trained, plan: as of :func:`multi_lora_linear`.

    Returns:
        y.

    Raises:
        ValueError, TypeError: as :func:`multi_lora_linear`; y is not touched then.
    """
    banks = _as_sequence(banks)
    if y.dim() < 1 or y.shape[:-1] != x.shape[:-1] or not y.is_contiguous():
        raise ValueError(
            f"y must be contiguous and [..., n] for x [..., k]; got shape {tuple(y.shape)} "
            f"with strides {y.stride()} for x {tuple(x.shape)}"
        )
    if y.dtype is not x.dtype:
        raise TypeError(f"y must have x's dtype {x.dtype}; got {y.dtype}")
    n = y.shape[-1]
    flat = y if y.dim() == 2 else y.view(-1, n)
    _apply(rows_of(x), flat, None, True, banks, n, ids, dropout, trained, plan)
    return y


def _apply(x, base, bias, adds, banks, n, ids, dropout, trained, plan) -> Tensor:
    """Checks the rest of the arguments and runs the op, through autograd where it is wanted."""
    routing = ids if isinstance(ids, Routing) else Routing(ids)
    dropouts = None if dropout is None else _as_sequence(dropout)
    special = is_special()
    composed = special and wants_composition()
    wants_trained = trained is not None and (composed or torch.is_grad_enabled())
    trained = _as_sequence(trained) if wants_trained else ()
    check_banks(x, base, banks, n)
    check_ids(x, banks[0].ranks.shape[0], routing)
    check_companions(banks, dropouts, trained, plan)
    ids = routing.ids.to(torch.int32)
    columns = [list(field) for field in zip(*banks, strict=True)]
    drops = [list(field) for field in zip(*dropouts, strict=True)] if dropouts else [[], []]
    variant = _library.variant(x.dtype)
    counts = tuple(len(t.a) for t in trained)
    receivers = [tensor for t in trained for tensor in (*t.a, *t.b)]
    rows = [t.rows for t in trained]
    if composed:
        if is_recorded():
            raise ValueError(
                "a torch.func transform of a routed bank can't be recorded in a graph, for what is "
                "computed goes by the values of ids; record torch.autograd.grad instead"
            )
        if adds and is_batched(x) and not is_batched(base):
            raise ValueError("y must be mapped over by vmap as x is, to be written in place")
        weight = None if adds else base
        y = composition(x, weight, bias, counts, columns, drops, rows, receivers, ids)
        return base.add_(y) if adds else y
    rest = (*columns, ids, routing.order, routing.starts, *drops, plan)
    if special:
        if torch.is_grad_enabled():
            check_in_graphs(adds, (x, base), receivers)
        if not adds:
            return in_graphs(x, base, bias, *rest)
    grad = torch.is_grad_enabled() and (
        x.requires_grad
        or base.requires_grad
        or (bias is not None and bias.requires_grad)
        or any(tensor.requires_grad for tensor in receivers)
    )
    if grad:
        call = Call(len(banks), dropouts is not None, counts, plan, variant)
        flat = [tensor for field in (*columns, *drops) for tensor in field]
        return MultiLoRALinearFunction.apply(
            x, base, bias, adds, ids, routing.order, routing.starts, call,
            *flat, *rows, *receivers,
        )  # fmt: skip
    if adds:
        _library.get_op("multi_lora_linear_add", variant)(base, x, *rest)
        return base
    return _library.get_op("multi_lora_linear_fwd", variant)(x, base, bias, *rest)[0]


def _as_sequence(value):
    """One or several NamedTuples, as several."""
    return (value,) if hasattr(value, "_fields") else tuple(value)
