"""Multi-LoRA linear: a frozen linear layer in which every row has its own adapter.

    y[i] = W x[i] + b + scale_g B_g A_g dropout_g(x[i])        g = the adapter of row i

Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", and Sheng et al. 2023, "S-LoRA", for serving;
the backward is LoRA's (Hu et al. 2021), adapter by adapter. With S and dS [m, r] in float32,

    S[i]  = A_g dropout_g(x[i])                y[i]  = W x[i] + b + scale_g B_g S[i]
    dS[i] = scale_g B_g^T dy[i]                dx[i] = W^T dy[i] + dropout_g'(A_g^T dS[i])
    dA_g  = sum_i dS[i] dropout_g(x[i])^T      dB_g^T = scale_g sum_i S[i] dy[i]^T

where the sums go over the rows of adapter g, in their order in the batch: they don't depend on
which other adapters share it, and neither does anything else about a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._dispatch import define_in_graphs
from peft_kernels.ops._dropout import dropout_factor
from peft_kernels.ops._dtypes import acc_dtype, autocast
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
from peft_kernels.ops._multi_lora_codes import multi_lora_over_codes
from peft_kernels.ops._quantized import QuantizedWeight
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops._sharded import are_sharded
from peft_kernels.ops._sharded_banks import multi_lora_linear_sharded
from peft_kernels.ops._transforms import (
    gradients_of,
    is_batched,
    is_recorded,
    is_special,
    wants_composition,
    wants_gradient_composition,
)

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

_BANKS = "Tensor[] a, Tensor[] b, Tensor[] tables, Tensor[] ranks, Tensor[] scales"
_ROUTING = "Tensor ids, Tensor? order, Tensor? starts"
_DROPOUT = "Tensor[] dropout_p, Tensor[] seeds"
FWD_SCHEMA = (
    f"(Tensor x, Tensor weight, Tensor? bias, {_BANKS}, {_ROUTING}, {_DROPOUT}, str plan)"
    " -> (Tensor, Tensor)"
)
ADD_SCHEMA = f"(Tensor(a!) y, Tensor x, {_BANKS}, {_ROUTING}, {_DROPOUT}, str plan) -> Tensor"
BWD_SCHEMA = (
    f"(Tensor dy, Tensor x, Tensor? weight, {_BANKS}, {_ROUTING}, Tensor s, {_DROPOUT},"
    " Tensor[] grad_rows, int[] grad_sizes, bool needs_x, str plan)"
    " -> (Tensor, Tensor[], Tensor[])"
)


# ---- reference -------------------------------------------------------------------------------


class _Group(NamedTuple):
    """The rows of one adapter, and its matrices in the dtype of sums."""

    slot: int
    rows: Tensor
    a: Tensor  # [r, k]
    b: Tensor  # [r, n]
    scale: Tensor
    columns: slice  # of y
    s_columns: slice  # of S
    dropout: tuple[Tensor, float] | None

    def dropped(self, x: Tensor) -> Tensor:
        return x[self.rows].to(self.a.dtype) * self.factor()

    def factor(self) -> Tensor | float:
        if self.dropout is None:
            return 1.0
        m, k, dtype = len(self.rows), self.a.shape[1], self.a.dtype
        return dropout_factor(*self.dropout, m, k, dtype).to(self.a.device)


def _rank_columns(tables: Sequence[Tensor]) -> int:
    """The width of S: the largest rank that each bank's table has room for."""
    return sum(PAGE * table.shape[1] for table in tables)


def _groups(x, a, b, tables, ranks, scales, ids, dropout_p, seeds) -> Iterator[tuple[int, _Group]]:
    """Every adapter that has rows and a rank, with the index of its bank."""
    m, acc, column, s_column = x.shape[0], acc_dtype(x), 0, 0
    row_ids = ids.flatten().repeat_interleave(m // max(ids.numel(), 1))
    present = row_ids.unique().tolist()
    for i, (table, rank_of) in enumerate(zip(tables, ranks, strict=True)):
        n = b[i].shape[1]
        for slot in present:
            rank = rank_of[slot].item() if 0 <= slot < len(rank_of) else 0
            if rank:
                q = torch.arange(rank, device=x.device)
                pages = table[slot, q // PAGE].long() * PAGE + q % PAGE
                yield (
                    i,
                    _Group(
                        slot=slot,
                        rows=(row_ids == slot).nonzero().flatten(),
                        a=a[i][pages].to(acc),
                        b=b[i][pages].to(acc),
                        scale=scales[i][slot].to(acc),
                        columns=slice(column, column + n),
                        s_columns=slice(s_column, s_column + rank),
                        dropout=(seeds[i][slot], dropout_p[i][slot].item()) if dropout_p else None,
                    ),
                )
        column, s_column = column + n, s_column + PAGE * table.shape[1]


def multi_lora_add_ref(
    y, x, a, b, tables, ranks, scales, ids, order, starts, dropout_p, seeds, plan
):
    s = x.new_zeros(x.shape[0], _rank_columns(tables), dtype=acc_dtype(x))
    for _, g in _groups(x, a, b, tables, ranks, scales, ids, dropout_p, seeds):
        s[g.rows, g.s_columns] = g.dropped(x) @ g.a.T
        total = y[g.rows, g.columns] + g.scale * (s[g.rows, g.s_columns] @ g.b)
        y[g.rows, g.columns] = total.to(y.dtype)
    return s


def multi_lora_linear_fwd_ref(x, weight, bias, *rest):
    y = F.linear(x, weight, bias)
    return y, multi_lora_add_ref(y, x, *rest)


def multi_lora_linear_bwd_ref(
    dy, x, weight, a, b, tables, ranks, scales, ids, order, starts, s, dropout_p, seeds,
    grad_rows, grad_sizes, needs_x, plan,
):  # fmt: skip
    acc = acc_dtype(x)
    dx = x.new_empty(0)
    if needs_x:
        dx = torch.zeros_like(x, dtype=acc) if weight is None else (dy @ weight).to(acc)
    da, db = _empty_gradients(a, b, grad_sizes)
    for i, g in _groups(x, a, b, tables, ranks, scales, ids, dropout_p, seeds):
        g_dy = dy[g.rows, g.columns].to(acc)
        ds = g.scale * (g_dy @ g.b.T)
        if needs_x:
            dx[g.rows] += (ds @ g.a) * g.factor()
        first = grad_rows[i][g.slot].item() if grad_rows else -1
        if first >= 0:
            own = slice(first, first + len(g.a))
            da[i][own] = (ds.T @ g.dropped(x)).to(da[i].dtype)
            db[i][own] = (g.scale * (s[g.rows, g.s_columns].T @ g_dy)).to(db[i].dtype)
    return dx.to(x.dtype), da, db


@_library.outside_autocast
def _composition(x, weight, bias, trained, banks, dropout, rows, receivers, ids) -> Tensor:
    """y, or without a weight what is added to it; trained adapters are read where they receive.

    By way of the dtype of sums, so that each gradient is rounded once.
    """
    dtype, acc = x.dtype, acc_dtype(x)
    x = x.to(acc)
    sizes = _sizes(trained, receivers)
    a, b, tables, ranks, scales = banks
    parts = [x.new_zeros(x.shape[0], matrix.shape[1], dtype=acc) for matrix in b]
    for i, g in _groups(x, a, b, tables, ranks, scales, ids, *dropout):
        own_a, own_b = _received(i, g, rows, sizes, receivers) or (g.a, g.b)
        delta = g.scale * ((g.dropped(x) @ own_a.to(acc).T) @ own_b.to(acc))
        parts[i] = parts[i].index_add(0, g.rows, delta)
    delta = torch.cat(parts, 1)
    if weight is None:
        return delta
    base = F.linear(x, weight.to(acc), None if bias is None else bias.to(acc))
    return (base + delta).to(dtype)


def _received(bank: int, group: _Group, rows, sizes, receivers) -> tuple[Tensor, Tensor] | None:
    """The tensors that receive the gradients of a group's adapter, if it is trained."""
    first = int(rows[bank][group.slot]) if rows else -1
    if first < 0:
        return None
    starts = [0, *accumulate(sizes[bank])]
    index = 2 * sum(len(size) for size in sizes[:bank]) + starts.index(first)
    return receivers[index], receivers[index + len(sizes[bank])]


# ---- shapes ----------------------------------------------------------------------------------


def _empty_gradients(a, b, grad_sizes) -> tuple[list[Tensor], list[Tensor]]:
    """dA and dB of each bank's trained adapters, zero for those without rows."""
    da = [a[i].new_zeros(size, a[i].shape[1]) for i, size in enumerate(grad_sizes)]
    db = [b[i].new_zeros(size, b[i].shape[1]) for i, size in enumerate(grad_sizes)]
    return da, db


def _add_fake(y, x, a, b, tables, *rest):
    return x.new_empty(x.shape[0], _rank_columns(tables), dtype=acc_dtype(x))


def _fwd_fake(x, weight, bias, *rest):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, _add_fake(y, x, *rest)


def _bwd_fake(dy, x, weight, a, b, *rest):
    grad_sizes, needs_x = rest[-3], rest[-2]
    return x.new_empty(x.shape if needs_x else (0,)), *_empty_gradients(a, b, grad_sizes)


for _name, _schema, _reference, _fake in (
    ("fwd", FWD_SCHEMA, multi_lora_linear_fwd_ref, _fwd_fake),
    ("add", ADD_SCHEMA, multi_lora_add_ref, _add_fake),
    ("bwd", BWD_SCHEMA, multi_lora_linear_bwd_ref, _bwd_fake),
):
    _library.define(
        f"multi_lora_linear_{_name}",
        _schema,
        reference=_reference,
        fake=_fake,
        triton=f"peft_kernels.triton.multi_lora_linear.launch:multi_lora_linear_{_name}",
    )


# ---- autograd --------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What isn't a tensor among the arguments of :class:`_MultiLoRALinear`."""

    banks: int
    dropout: bool
    trained: tuple[int, ...]  # how many adapters of each bank; empty where none is trained
    plan: str
    variant: str

    def split(self, tensors: Sequence[Tensor]) -> tuple[list, list, list, list]:
        """The tensors' parts: banks, dropout, rows of the gradients, tensors that receive them."""
        n, given = self.banks, iter(tensors)
        banks = [[next(given) for _ in range(n)] for _ in LoRABank._fields]
        dropout = [[next(given) for _ in range(n if self.dropout else 0)] for _ in range(2)]
        rows = [next(given) for _ in self.trained]
        return banks, dropout, rows, list(given)


def _check_chosen(former: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
    """That a row has the adapter and the dropout mask that it had.

    What is saved may be what a checkpointed forward had that was computed again just now.
    """
    if is_special() or all(a is b for a, b in zip(former, saved, strict=True)):
        return
    if not all(map(torch.equal, former, saved)):
        raise RuntimeError(
            "a forward is computed again (gradient checkpointing) with other ids or dropout seeds "
            "than it had; keep preserve_rng_state=True, and call backward() inside the route that "
            "the forward had, in its with-block"
        )


class _MultiLoRALinear(torch.autograd.Function):
    """``base`` is the weight, or the y that the delta is added into in place."""

    @staticmethod
    def forward(ctx, x, base, bias, adds, ids, order, starts, call, *tensors):
        banks, dropout, _rows, _ = call.split(tensors)
        rest = (*banks, ids, order, starts, *dropout, call.plan)
        if adds:
            y, weight = base, None
            s = _library.get_op("multi_lora_linear_add", call.variant)(y, x, *rest)
            ctx.mark_dirty(y)
        else:
            weight = base
            y, s = _library.get_op("multi_lora_linear_fwd", call.variant)(x, weight, bias, *rest)
        ctx.save_for_backward(x, weight, ids, order, starts, s, *tensors)
        ctx.adds, ctx.call, ctx.chosen = adds, call, (ids, *dropout[1])
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, ids, order, starts, s, *tensors = ctx.saved_tensors
        needs_x, needs_base, needs_bias = ctx.needs_input_grad[:3]
        banks, dropout, rows, receivers = ctx.call.split(tensors)
        _check_chosen(ctx.chosen, (ids, *dropout[1]))
        sizes = _sizes(ctx.call.trained, receivers)
        silent = len(tensors) - len(receivers)
        if wants_gradient_composition(dy):

            def composed(x, weight, *receivers):
                rest = ctx.call.trained, banks, dropout, rows, receivers, ids
                return _composition(x, weight, None, *rest)

            needs = needs_x, needs_base and not ctx.adds, *ctx.needs_input_grad[8 + silent :]
            dx, d_base, *grads = gradients_of(composed, (x, weight, *receivers), needs, dy)
            if ctx.adds:
                d_base = dy if needs_base else None
            d_bias = dy.sum(0) if needs_bias else None
            return dx, d_base, d_bias, *(None,) * (5 + silent), *grads
        dy = dy.contiguous()
        bwd = _library.get_op("multi_lora_linear_bwd", ctx.call.variant)
        dx, da, db = bwd(
            dy, x, weight, *banks, ids, order, starts, s, *dropout,
            rows, [sum(size) for size in sizes], needs_x, ctx.call.plan,
        )  # fmt: skip
        grads: list[Tensor] = []
        for i, size in enumerate(sizes):
            grads += [*da[i].split(size), *db[i].split(size)]
        d_base = (dy if ctx.adds else dy.T @ x) if needs_base else None
        return (
            dx if needs_x else None,
            d_base,
            dy.sum(0) if needs_bias else None,
            *(None,) * (5 + silent),
            *grads,
        )


def _run(variant, *inputs) -> Tensor:
    return _library.get_op("multi_lora_linear_fwd", variant)(*inputs)[0]


def _apply_in_graphs(x, weight, bias, *arguments) -> Tensor:
    *banks, ids, order, starts, dropout_p, seeds, plan, variant = arguments
    call = _Call(len(banks[0]), bool(dropout_p), (), plan, variant)
    flat = [tensor for field in (*banks, dropout_p, seeds) for tensor in field]
    return _MultiLoRALinear.apply(x, weight, bias, False, ids, order, starts, call, *flat)


def _composition_in_graphs(x, weight, bias, *arguments) -> Tensor:
    *banks, ids, _, _, dropout_p, seeds, _ = arguments
    return _composition(x, weight, bias, (), banks, (dropout_p, seeds), [], [], ids)


_in_graphs = define_in_graphs(
    "multi_lora_linear",
    FWD_SCHEMA,
    outputs=(0,),
    fake=_fwd_fake,
    run=_run,
    apply=_apply_in_graphs,
    composition=_composition_in_graphs,
)


def _check_in_graphs(adds: bool, inputs: Sequence[Tensor], receivers: Sequence[Tensor]) -> None:
    """Of what a graph would lose the gradient in silence."""
    instead = (
        "trace under torch.no_grad() for inference, or train in eager mode or with torch.compile"
    )
    if any(tensor.requires_grad for tensor in receivers):
        raise ValueError(
            f"trained gets no gradient in a graph of torch.jit.trace or torch.export; {instead}"
        )
    if adds and any(tensor.requires_grad for tensor in inputs):
        raise ValueError(
            "x and y get no gradient through multi_lora_add_ in a graph of torch.jit.trace or"
            f" torch.export; {instead}"
        )


def _sizes(trained: Sequence[int], receivers: Sequence[Tensor]) -> list[list[int]]:
    """The rank of every trained adapter, bank by bank; receivers are A, ..., B, ... of each."""
    sizes, first = [], 0
    for count in trained:
        sizes.append([tensor.shape[0] for tensor in receivers[first : first + count]])
        first += 2 * count
    return sizes


# ---- public ----------------------------------------------------------------------------------


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
        y = _composition(x, weight, bias, counts, columns, drops, rows, receivers, ids)
        return base.add_(y) if adds else y
    rest = (*columns, ids, routing.order, routing.starts, *drops, plan)
    if special:
        if torch.is_grad_enabled():
            _check_in_graphs(adds, (x, base), receivers)
        if not adds:
            return _in_graphs(x, base, bias, *rest)
    grad = torch.is_grad_enabled() and (
        x.requires_grad
        or base.requires_grad
        or (bias is not None and bias.requires_grad)
        or any(tensor.requires_grad for tensor in receivers)
    )
    if grad:
        call = _Call(len(banks), dropouts is not None, counts, plan, variant)
        flat = [tensor for field in (*columns, *drops) for tensor in field]
        return _MultiLoRALinear.apply(
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


# ---- example inputs, for tests and benchmarks ------------------------------------------------


def example_bank(
    n: int,
    k: int,
    ranks: Sequence[int],
    *,
    max_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoRABank:
    """Random adapters of the given ranks in pages out of order; whatever isn't theirs is NaN."""
    counts = [-(-r // PAGE) for r in ranks]
    most = max([-(-(max_rank or 0) // PAGE), 1, *counts])
    pages = torch.randperm(sum(counts) + 2)
    table = torch.full((len(ranks), most), 2**30, dtype=torch.int32)
    a = torch.full((len(pages) * PAGE, k), torch.nan)
    b = torch.full((len(pages) * PAGE, n), torch.nan)
    first = 0
    for slot, (r, count) in enumerate(zip(ranks, counts, strict=True)):
        own = pages[first : first + count]
        table[slot, :count] = own
        rows = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()[:r]
        a[rows] = torch.randn(r, k) * max(k, 1) ** -0.5
        b[rows] = torch.randn(r, n) * max(r, 1) ** -0.5
        first += count
    scales = torch.rand(len(ranks)) + 0.5
    rank_row = torch.tensor(ranks, dtype=torch.int32)
    bank = LoRABank(a.to(dtype), b.to(dtype), table, rank_row, scales)
    return LoRABank(*(tensor.to(device) for tensor in bank))


def example_ids(
    count: int, slots: int, popularity: str = "uniform", device: torch.device | str = "cpu"
) -> Tensor:
    """Adapters of ``count`` rows, drawn as in the serving papers' benchmarks.

    ``popularity`` is ``"distinct"``, ``"uniform"``, ``"zipf"`` (1.5), ``"identical"``, ``"skewed"``
    (half the rows on one adapter, every tenth without) or ``"none"``.
    """
    if popularity == "distinct":
        ids = torch.arange(count) % slots
    elif popularity == "uniform":
        ids = torch.randint(slots, (count,))
    elif popularity == "zipf":
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** -1.5
        ids = torch.multinomial(weights, count, replacement=True) if count else torch.zeros(0)
    elif popularity == "identical":
        ids = torch.full((count,), slots - 1)
    elif popularity == "skewed":
        ids = torch.randint(slots, (count,))
        ids[torch.rand(count) < 0.5] = 0
        ids[torch.rand(count) < 0.1] = -1
    elif popularity == "none":
        ids = torch.full((count,), -1)
    else:
        raise ValueError(f"popularity is unknown: {popularity!r}")
    return ids.to(device, torch.int32)


def example_inputs(
    m: int,
    n: int | Sequence[int],
    k: int,
    ranks: Sequence[int],
    *,
    ids: Tensor | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, object]:
    """Random arguments of :func:`multi_lora_linear`; several n make a bank each."""
    widths = [n] if isinstance(n, int) else list(n)
    total = sum(widths)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape) * std).to(device, dtype)

    inputs: dict[str, object] = {
        "x": normal(m, k, std=1.0),
        "weight": normal(total, k, std=max(k, 1) ** -0.5),
        "banks": [
            example_bank(
                w, k, ranks, max_rank=max_rank, dtype=adapter_dtype or dtype, device=device
            )
            for w in widths
        ],
        "ids": example_ids(m, len(ranks), "skewed", device) if ids is None else ids.to(device),
    }
    if bias:
        inputs["bias"] = normal(total, std=1.0)
    return inputs


def example_trained(bank: LoRABank, slots: Sequence[int]) -> Trained:
    """Fresh leaves with the values of the named adapters, to receive their gradients."""
    rows = torch.full_like(bank.ranks, -1)
    a, b, first = [], [], 0
    for slot in slots:
        r = int(bank.ranks[slot])
        q = torch.arange(r, device=bank.a.device)
        pages = bank.table[slot, q // PAGE].long() * PAGE + q % PAGE
        a.append(bank.a[pages].requires_grad_())
        b.append(bank.b[pages].requires_grad_())
        rows[slot] = first
        first += r
    return Trained(rows, a, b)
