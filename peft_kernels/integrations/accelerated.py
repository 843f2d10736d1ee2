"""accelerate(): this package's kernels under the layers that a model already has."""

from __future__ import annotations

import importlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from peft_kernels.modules.checks import check_module

_LOG = logging.getLogger("peft_kernels")
# By library, what knows its layers: imported only where the library is.
_HOSTS = {"peft": "peft_kernels.integrations.peft.lora_layers"}


@dataclass(frozen=True)
class Layer:
    """A layer of a library for adapters, in a model that :func:`accelerate` went through."""

    name: str
    kind: str  # as its library prints it: "lora.Linear"
    backend: str | None  # what serves its calls: "cpu", "cuda", "triton" or "reference"
    reason: str | None  # or else why the library's own code does


class Report:
    """What :func:`accelerate` found in a model, and what its calls went through since.

    Printed, it is a table of the layers. It keeps the model that it is about.

    Attributes:
        layers: a :class:`Layer` for each layer of PEFT's, in the model's order, as it was then.
    """

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        self.layers = tuple(layers)
        self._model = model
        self._before = self._calls()

    def counts(self) -> dict[str, int]:
        """The layers' calls since this report was made, by what served them.

        ``"lora_linear"`` and ``"multi_lora_linear"`` are kernels. Anything else is why the
        library's own code served a call. What runs as torch.compile compiled it isn't counted.
        """
        return dict(self._calls() - self._before)

    def missing(self) -> list[str]:
        """The layers that came into the model since; another :func:`accelerate` takes them in."""
        return [name for host, name, module in _layers(self._model) if type(module) in host.SERVED]

    def summary(self) -> str:
        """One line: how many layers run on kernels, and why the others don't."""
        if not self.layers:
            return "the model has no layers of PEFT's, and is as it was"
        served = Counter(layer.backend for layer in self.layers if layer.backend is not None)
        kept = Counter(layer.reason for layer in self.layers if layer.reason is not None)
        backends = ", ".join(sorted(served))
        line = f"{served.total()} of {len(self.layers)} layers of PEFT's run on peft_kernels"
        line += f" ({backends})" if served else ""
        if kept:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in kept.most_common())
            line += f"; {kept.total()} keep PEFT's: {reasons}"
        missing = len(self.missing())
        return f"{line}; {missing} came later: accelerate() again" if missing else line

    def __str__(self) -> str:
        rows = [
            (layer.name, layer.kind, layer.backend or f"PEFT: {layer.reason}")
            for layer in self.layers
        ]
        rows += [(name, "", "PEFT: came later, accelerate() again") for name in self.missing()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([self.summary(), *table])

    def _calls(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for host, _, module in _layers(self._model):
            total.update(host.calls(module))
        return total


def accelerate(model: nn.Module) -> Report:
    """Puts this package's kernels under the LoRA layers of a PEFT model, where they are.

    Each ``lora.Linear`` computes ``y = x W^T + b + sum_j scale_j dropout_j(x) A_j^T B_j^T`` by
    :func:`peft_kernels.ops.lora_linear`, forward and backward, in one pass over its active
    adapters; with ``adapter_names``, in training too, by
    :func:`peft_kernels.ops.multi_lora_linear`. The layer stays PEFT's own in all else: its class is
    a subclass of PEFT's, so that its parameters, its state dict, merging, adding and deleting
    adapters, hotswapping and saving are untouched. Every call looks at the layer anew. What kernels
    can't serve (DoRA and other variants, hooks below the layer, quantised and sharded weights, ...)
    runs in PEFT's code, and is counted.

    Args:
        model: any model that has PEFT's layers, wrapped or not: a PeftModel, or one that
            ``add_adapter`` of transformers or diffusers, or ``inject_adapter_in_model``, has
            changed.

    Returns:
        A :class:`Report`. The logger "peft_kernels" has its :meth:`~Report.summary` at INFO.

    Raises:
        TypeError: model is no ``nn.Module``.
    """
    check_module("model", model)
    for host in _hosts():
        for module in model.modules():
            host.serve(module)
    found = []
    for host, name, module in _layers(model):
        kind, reason = host.kind_of(module), host.why_not(module)
        found.append(Layer(name, kind, None if reason else host.backend(module), reason))
    report = Report(model, found)
    _LOG.info(report.summary())
    return report


def restore(model: nn.Module) -> None:
    """Gives the layers of a model back to their library, as before :func:`accelerate`.

    Args:
        model: the model, or one that has it inside.

    Raises:
        TypeError: model is no ``nn.Module``.
    """
    check_module("model", model)
    for host in _hosts():
        for module in model.modules():
            host.restore(module)


def _hosts() -> list[ModuleType]:
    """What knows the layers of each library that is imported."""
    return [importlib.import_module(path) for name, path in _HOSTS.items() if name in sys.modules]


def _layers(model: nn.Module) -> Iterator[tuple[ModuleType, str, nn.Module]]:
    """The layers of these libraries, each with what knows it."""
    hosts = _hosts()
    for name, module in model.named_modules():
        for host in hosts:
            if host.is_layer(module):
                yield host, name, module
