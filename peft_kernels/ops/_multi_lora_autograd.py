"""The ops behind ``multi_lora_linear``: their schemas, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._dispatch import define_in_graphs
from peft_kernels.ops._lora_banks import LoRABank
from peft_kernels.ops._multi_lora_reference import (
    add_fake,
    bwd_fake,
    composition,
    fwd_fake,
    multi_lora_add_ref,
    multi_lora_linear_bwd_ref,
    multi_lora_linear_fwd_ref,
    sizes_of,
)
from peft_kernels.ops._transforms import gradients_of, is_special, wants_gradient_composition

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


for _name, _schema, _reference, _fake in (
    ("fwd", FWD_SCHEMA, multi_lora_linear_fwd_ref, fwd_fake),
    ("add", ADD_SCHEMA, multi_lora_add_ref, add_fake),
    ("bwd", BWD_SCHEMA, multi_lora_linear_bwd_ref, bwd_fake),
):
    _library.define(
        f"multi_lora_linear_{_name}",
        _schema,
        reference=_reference,
        fake=_fake,
        triton=f"peft_kernels.triton.multi_lora_linear.launch:multi_lora_linear_{_name}",
    )


class Call(NamedTuple):
    """What isn't a tensor among the arguments of :class:`MultiLoRALinearFunction`."""

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


class MultiLoRALinearFunction(torch.autograd.Function):
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
        sizes = sizes_of(ctx.call.trained, receivers)
        silent = len(tensors) - len(receivers)
        if wants_gradient_composition(dy):

            def composed(x, weight, *receivers):
                rest = ctx.call.trained, banks, dropout, rows, receivers, ids
                return composition(x, weight, None, *rest)

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
    call = Call(len(banks[0]), bool(dropout_p), (), plan, variant)
    flat = [tensor for field in (*banks, dropout_p, seeds) for tensor in field]
    return MultiLoRALinearFunction.apply(x, weight, bias, False, ids, order, starts, call, *flat)


def _composition_in_graphs(x, weight, bias, *arguments) -> Tensor:
    *banks, ids, _, _, dropout_p, seeds, _ = arguments
    return composition(x, weight, bias, (), banks, (dropout_p, seeds), [], [], ids)


in_graphs = define_in_graphs(
    "multi_lora_linear",
    FWD_SCHEMA,
    outputs=(0,),
    fake=fwd_fake,
    run=_run,
    apply=_apply_in_graphs,
    composition=_composition_in_graphs,
)


def check_in_graphs(adds: bool, inputs: Sequence[Tensor], receivers: Sequence[Tensor]) -> None:
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
