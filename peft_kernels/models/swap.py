"""Swaps LoRALinear into a model, in place of layers chosen by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from peft_kernels.codes.layers import readable
from peft_kernels.models.fast_paths import choose_fast_paths
from peft_kernels.models.freezing import freeze
from peft_kernels.models.in_place import keep_in_place, let_go, replaced_layers
from peft_kernels.models.input_grads import let_gradients_through
from peft_kernels.models.modules_to_save import batches_seen, remember, settings_of
from peft_kernels.models.resizing import choose_resizing
from peft_kernels.models.targets import pattern_value, required_targets
from peft_kernels.modules.bases import check_bases
from peft_kernels.modules.fully_sharded import reshard
from peft_kernels.modules.names import check_late_parameters, plain_modules, replace_child
from peft_kernels.nn.lora import LoRALinear
from peft_kernels.nn.lora_codes import QuantizedLoRALinear
from peft_kernels.nn.lora_settings import check_settings

Model = TypeVar("Model", bound=nn.Module)


def swap_linear(
    model: Model,
    target_modules: str | Iterable[str],
    r: int,
    *,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "kaiming_uniform",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    task_type: str | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> Model:
    """Replaces the chosen linear layers of ``model`` by LoRALinear, in place, and freezes the rest.

        peft_kernels.swap_linear(model, ["query", "value"], r=16, alpha=32, dropout=0.1)
        ...  # train as usual
        peft_kernels.save_adapter(model, "my-adapter")

    Each new layer keeps the Parameters of the one it replaces
    (:meth:`peft_kernels.nn.LoRALinear.from_linear`), bitsandbytes' layers of 4 and 8 bits too, over
    whose codes it computes (:class:`peft_kernels.nn.QuantizedLoRALinear`). A module that the model
    holds under several names is matched by the first and replaced under all of them. A layer has
    one adapter: for several by name there is :class:`peft_kernels.AdapterPool`, or PEFT itself.
    Afterwards only adapters require gradients, those of earlier swaps included. A RuntimeWarning
    names a new head, or another method's parameters, that trained until now: unfreeze yourself what
    is to go on.

    Reentrant gradient checkpointing gives nothing a gradient behind frozen embeddings. In a model
    of transformers', the embeddings' output is made to require gradients at each forward that is so
    checkpointed (what ``enable_input_require_grads`` does). Where you call
    ``torch.utils.checkpoint`` yourself, use ``use_reentrant=False``.

    Args:
        model: any module; the layers to replace are below it. Names are those that it has without
            wrappers (DistributedDataParallel, torch.compile, activation checkpointing and others).
        target_modules: which layers. A list holds full names, or endings of names that begin at a
            dot. A str is a regular expression that must match the full name, or ``"all-linear"``:
            every nn.Linear and Conv1D except the output embeddings, adapters that were put in
            before, and, with a warning, layers that are never called: nn.MultiheadAttention reads
            the weight of its out_proj, VideoMAE's and WavLM's attention those of their projections.
            A class that does so may say it: ``uncalled_linears = ("up", "down")``.
        r, alpha: rank and alpha where no pattern says otherwise. The update is multiplied by
            ``alpha / r``.
        dropout: the share of x dropped on the low-rank branch in training, in [0, 1).
        use_rslora: multiply by ``alpha / sqrt(r)`` instead.
        use_dora: learn the lengths of the adapted weights' rows too
            (:class:`peft_kernels.nn.LoRALinear`).
        init: how A is drawn, ``"kaiming_uniform"`` or ``"gaussian"``; B is zero.
        adapter_dtype: of A and B, float32 or the layer's dtype; by default float32 over a float16
            or bfloat16 layer, else the layer's.
        rank_pattern, alpha_pattern: rank, alpha by layer. A key is a regular expression that must
            match the full name, or an ending of it that begins at a dot; the first match counts.
        exclude_modules: layers to leave out, in the form of ``target_modules``.
        layers_to_transform: the indices of the blocks to adapt, with a list of targets only. The
            index of a block is the first number in a name that follows two parts of it.
        layers_pattern: the part (or parts) of a name that a block's index must follow instead.
        task_type: PEFT's name of the task, which :func:`peft_kernels.save_adapter` writes.
            ``"SEQ_CLS"`` keeps a ``score`` or ``classifier`` head out of ``"all-linear"``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a pattern of ``target_modules`` that selects nothing, a value out of range.
        TypeError: a target that isn't a linear layer, is a LoRALinear already, or is read and never
            called, so that it would have no effect.

    Nothing is changed when one is raised. A key of ``rank_pattern`` or ``alpha_pattern`` that
    matches no target gets a RuntimeWarning, as in PEFT.
    """
    targets = required_targets(
        model,
        target_modules,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        task_type=task_type,
    )
    swap_targets(
        model,
        targets,
        r,
        alpha=alpha,
        dropout=dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init=init,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        adapter_dtype=adapter_dtype,
    )
    remember(model, task_type=task_type)
    return model


def lora_layers_in(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers by name, the model itself included; there may be none."""
    return {
        name: module
        for name, module in plain_modules(model).items()
        if isinstance(module, LoRALinear)
    }


def swap_targets(
    model: Model,
    targets: Mapping[str, nn.Module],
    r: int,
    *,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "kaiming_uniform",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    adapter_dtype: torch.dtype | None = None,
    silently: Iterable[nn.Parameter] = (),
) -> Model:
    """:func:`swap_linear` for layers that :func:`find_targets` has found.

    Parameters in ``silently`` are frozen with the rest and not spoken of.
    """
    rank_pattern, alpha_pattern = rank_pattern or {}, alpha_pattern or {}
    for argument, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        if not isinstance(patterns, Mapping):
            raise TypeError(f"{argument} must be a dict, of values by pattern; got {patterns!r}")
    in_codes = readable(targets)
    reshard(model)
    check_bases(model, targets, may_be_sharded=True, in_codes=in_codes)
    check_settings(r, alpha, dropout, init)
    check_late_parameters(model, "swap")
    _warn_unused("rank_pattern", rank_pattern, targets)
    _warn_unused("alpha_pattern", alpha_pattern, targets)
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        swapped: dict[nn.Module, nn.Module] = {}
        for name, module in targets.items():
            with named(name):
                kind = QuantizedLoRALinear if module in in_codes else LoRALinear
                swapped[module] = kind.from_linear(
                    module,
                    pattern_value(rank_pattern, name, r),
                    alpha=pattern_value(alpha_pattern, name, alpha),
                    dropout=dropout,
                    use_rslora=use_rslora,
                    use_dora=use_dora,
                    init=init,
                    adapter_dtype=adapter_dtype,
                )
    except Exception:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    remember(model, batches=batches_seen(model) | settings_of(model).get("batches", {}))
    replace_modules(model, swapped)
    keep_in_place(model, swapped.values())
    freeze(model, _adapters(model), silently=silently)
    choose_fast_paths(model)
    choose_resizing(model)
    let_gradients_through(model)
    return model


@contextmanager
def named(name: str) -> Iterator[None]:
    """Has an error say which layer it is about."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{name or 'model'}: {error}") from error


def _warn_unused(argument: str, patterns: Mapping[str, float], names: Iterable[str]) -> None:
    for key, value in patterns.items():
        if not any(pattern_value({key: True}, name, False) for name in names):
            warnings.warn(
                f"{argument} has {key!r}: {value}, which matches no target",
                RuntimeWarning,
                stacklevel=4,
            )


def replace_modules(model: nn.Module, swapped: Mapping[nn.Module, nn.Module]) -> None:
    """Puts the values of ``swapped`` where its keys are, under every name they have."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in swapped:
                replace_child(parent, name, swapped[child])


def give_up_replaced(model: nn.Module) -> None:
    """Has the model go on without those adapters whose layers were replaced by something else.

    Else its forward and :func:`peft_kernels.save_adapter` raise: what replaced them, such as
    ``resize_token_embeddings``, rarely meant to.
    """
    let_go(model, replaced_layers(model))


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    return [getattr(layer, name) for layer in layers for name in layer.adapter_names]
