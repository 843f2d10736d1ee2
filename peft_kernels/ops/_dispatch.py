"""What serves a call of an op, and the op that stands in graphs of tracing and exporting.

A graph of ``torch.jit.trace`` or ``torch.export`` holds ops and no autograd Functions, so that what
is run from it can train only if the op itself is differentiable: ``peft_kernels::<op>`` is, which
``peft_kernels::<op>_fwd`` is not. Eager calls and torch.compile keep to the Function, which costs
less a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from peft_kernels._library import HAS_TRITON, LIBRARY, get_op, variant
from peft_kernels.ops._transforms import is_special, wants_composition


def define_call(
    op: str,
    fwd_schema: str,
    *,
    outputs: tuple[int, ...],
    fake: Callable,
    apply: Callable,
    composition: Callable,
    run: Callable | None = None,
) -> Callable:
    """What serves a call of an op that :func:`wants_function` doesn't give to its Function.

    The arguments are those of :func:`define_in_graphs`; ``run`` is the kernel itself by default.

    Returns:
        A function of the arguments of ``<op>_fwd``.
    """
    run = run or _kernel_of(op, outputs)
    in_graphs = define_in_graphs(
        op,
        fwd_schema,
        outputs=outputs,
        fake=fake,
        run=run,
        apply=apply,
        composition=composition,
    )

    def call(*inputs):
        if is_special():
            return composition(*inputs) if wants_composition() else in_graphs(*inputs)
        return run(variant(inputs[0].dtype), *inputs)

    return call


def wants_function(*inputs) -> bool:
    """Whether a call of these is for the op's autograd Function.

    It is where one requires a gradient, unless a transform or a tracer is around the call.
    """
    return _wants_gradient(inputs) and not is_special()


def wants_cpu_forward(x: Tensor) -> bool:
    """Whether an op that only CPUs have, and that has no gradient, may serve x now.

    It may where gradients are off, without autocast, transforms or tracers, whose ways it isn't.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        return False
    return not is_special() and variant(x.dtype) != "_triton"


def _wants_gradient(inputs: Iterable) -> bool:
    return torch.is_grad_enabled() and any(map(_requires_grad, inputs))


def _kernel_of(op: str, outputs: tuple[int, ...]) -> Callable:
    """``<op>_fwd`` under the backend whose suffix is the first argument."""
    suffixes = ("", "_ref", "_triton") if HAS_TRITON else ("", "_ref")
    kernels = {suffix: get_op(f"{op}_fwd", suffix) for suffix in suffixes}

    def run(suffix, *inputs):
        return _chosen(kernels[suffix](*inputs), outputs)

    return run


def _chosen(found, outputs: tuple[int, ...]):
    if isinstance(found, Tensor):
        return found
    return found[outputs[0]] if len(outputs) == 1 else tuple(found[i] for i in outputs)


def define_in_graphs(
    op: str,
    fwd_schema: str,
    *,
    outputs: tuple[int, ...],
    fake: Callable,
    run: Callable,
    apply: Callable,
    composition: Callable,
) -> Callable:
    """Defines ``peft_kernels::<op>`` with the arguments of ``<op>_fwd`` and some of its outputs.

    Args:
        outputs: their indices among those of ``<op>_fwd``; ``(0,)`` where it has one.
        fake: the shape function of ``<op>_fwd``.
        run: computes them without a gradient, given the backend's suffix and the arguments.
        apply: computes them through the autograd Function, given the arguments and the suffix.
        composition: computes them in differentiable operations, given the arguments.

    Returns:
        The op.
    """

    def differentiable(keyset, *args):
        if wants_composition():
            return composition(*args)
        if _wants_gradient(args):
            return apply(*args, variant(args[0].dtype))
        with torch._C._AutoDispatchBelowAutograd():
            return defined.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    returned = "Tensor" if len(outputs) == 1 else f"({', '.join(['Tensor'] * len(outputs))})"
    LIBRARY.define(f"{op}{fwd_schema.split('->')[0]} -> {returned}")
    LIBRARY.impl(op, lambda *args: run(variant(args[0].dtype), *args), "CompositeExplicitAutograd")
    LIBRARY.impl(op, differentiable, "Autograd", with_keyset=True)
    LIBRARY.impl(op, lambda *args: _chosen(fake(*args), outputs), "Meta")
    defined = getattr(torch.ops.peft_kernels, op).default
    return defined


def _requires_grad(value) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(map(_requires_grad, value))
