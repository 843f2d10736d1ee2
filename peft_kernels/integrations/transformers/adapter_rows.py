"""Bottleneck adapters of several tasks in one model, each row of a batch its own.

bank_adapters(model, {"legal": adapters_of(a), "french": adapters_of(b)})
with route_adapters(model, ["french", None, "legal"]):
    model.generate(**batch)
remove_adapters(model)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from peft_kernels.integrations.transformers.adapters import adapters_of
from peft_kernels.integrations.transformers.row_ids import RowIds, carry_rows, rows_in
from peft_kernels.modules.hooks import forget_compiled
from peft_kernels.modules.names import plain_modules, replace_module, submodule, unwrapped
from peft_kernels.modules.replaced import hand_on_hooks
from peft_kernels.nn._named import numbers_of
from peft_kernels.nn.adapter_bank import AdapterBank


def bank_adapters(model: nn.Module, trained: Mapping[str, Mapping[str, nn.Module]]) -> list[str]:
    """Puts a bank at each adapter's place in a model, of adapters that were trained before.

    Each row of a batch then has the adapters of one name, which :func:`route_adapters` says, or
    none: see :class:`peft_kernels.nn.AdapterBank`. Nothing is frozen or unfrozen.
    :func:`remove_adapters` takes the banks out.

    Args:
        model: a model with adapters (:func:`insert_adapters`, or a folder's), which say where the
            banks go and are dropped, unless they are among ``trained``.
        trained: by name, an adapter's modules by path, as of :func:`adapters_of`. They become parts
            of the model, which says their device and dtype no more than before.

    Returns:
        The banks' paths in the model.

    Raises:
        ValueError: nothing to bank, a model without adapters, or places or hidden sizes that differ
            from the model's.
        TypeError: a module that isn't a BottleneckAdapter, as a fusion.

    The model is unchanged when one is raised.
    """
    paths = list(adapters_of(model))
    if not trained:
        raise ValueError("trained must have at least one adapter; got none")
    if not paths:
        raise ValueError("model has no adapters; insert_adapters says where the banks go")
    for name, modules in trained.items():
        if difference := sorted(set(modules) ^ set(paths)):
            raise ValueError(
                f"trained[{name!r}] must have an adapter at each of the model's places and no "
                f"other; it differs at {difference[0]}"
            )
    rows = RowIds("route_adapters' names", len(trained))
    banks = {
        path: AdapterBank({name: modules[path] for name, modules in trained.items()}, rows=rows)
        for path in paths
    }
    for path, bank in banks.items():
        size = getattr(submodule(model, path), "hidden_size", bank.hidden_size)
        if bank.hidden_size != size:
            raise ValueError(
                f"trained must have adapters of hidden size {size} at {path}; "
                f"got {bank.hidden_size}"
            )
    for path, bank in banks.items():
        place = submodule(model, path)
        if not any(place is adapter for adapter in bank.adapters):
            hand_on_hooks(place, bank)
        replace_module(model, path, bank.train(model.training))
    carry_rows(unwrapped(model), rows)
    forget_compiled()
    return paths


@contextmanager
def route_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within it, each row of the model's batch has the banks' adapters of its name.

    The names belong to the thread or asyncio task that enters the block: another thread runs in
    ``contextvars.copy_context()``. ``generate`` repeats them for beams and several sequences a row.
    A backward that computes forwards again (gradient checkpointing) belongs inside too.

    Args:
        model: a model with banks (:func:`bank_adapters`).
        names: one for each row; None: that row is computed without an adapter.

    Raises:
        ValueError: a model without banks, or a name that they don't have; and at the forward,
            another number of names than of rows.
        TypeError: not a sequence of names.
    """
    rows = rows_in(unwrapped(model))
    bank = next((m for m in plain_modules(model).values() if isinstance(m, AdapterBank)), None)
    if rows is None or bank is None:
        raise ValueError("model must have banks of adapters: bank_adapters puts them in")
    numbers = numbers_of(names, bank.names)
    with rows.within(torch.tensor(numbers, dtype=torch.int64)):
        yield
