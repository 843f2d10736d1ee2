"""accelerate(): this package's kernels under the layers that a model already has."""

from __future__ import annotations

import importlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from peft_kernels.codes.layers import give_back, keep_codes
from peft_kernels.models.fast_paths import has_adapters
from peft_kernels.modules.bases import names_of
from peft_kernels.modules.checks import check_module

_LOG = logging.getLogger("peft_kernels")
# What knows layers, and the module of their library with which it is imported.
_HOSTS = {
    "peft_kernels.integrations.peft.lora_layers": "peft",
    "peft_kernels.integrations.peft.prompts": "peft",
    "peft_kernels.integrations.adapter_hub.layers": "adapters.methods.adapter_layer_base",
}
_PIPELINE = "diffusers.pipelines.pipeline_utils.DiffusionPipeline"


@dataclass(frozen=True)
class Layer:
    """A layer of a library for adapters, in a model that :func:`accelerate` went through."""

    name: str
    kind: str  # as its library prints it: "lora.Linear"
    # What serves its calls: "cpu", "cuda", "triton" or "reference"; "torch" is no kernel.
    backend: str | None
    reason: str | None  # or else why the library's own code does
    library: str = "PEFT"  # or "adapters"


class Report:
    """What :func:`accelerate` found in a model, and what its calls went through since.

    Printed, it is a table of the layers. It keeps the model that it is about.

    Attributes:
        layers: a :class:`Layer` for each layer of PEFT's or `adapters`', in the model's order, as
            it was then.
    """

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        self.layers = tuple(layers)
        self._model = model
        self._before = self._calls()

    def counts(self) -> dict[str, int]:
        """The layers' calls since this report was made, by what served them.

        The name of an op, such as ``"lora_linear"`` or ``"adapter"``, stands for kernels, and
        ``"embedding"`` and ``"encoded once"`` for PyTorch's own operations, fewer than the
        library's. Anything else is why the library's own code served a call. What runs as
        torch.compile compiled it isn't counted.
        """
        return dict(self._calls() - self._before)

    def missing(self) -> list[str]:
        """The layers that came into the model since, or that have kernels no longer.

        Another :func:`accelerate` takes them in.
        """
        return [name for _, name, _ in self._missing()]

    def summary(self) -> str:
        """One line: how many layers run on kernels, and why the others don't."""
        libraries = dict.fromkeys(layer.library for layer in self.layers)
        if not libraries:
            return "the model has no layers of PEFT's or adapters', and is as it was"
        line = "; ".join(self._summary_of(library) for library in libraries)
        missing = Counter(why for _, _, why in self._missing())
        since = ", ".join(f"{count} {why}" for why, count in missing.items())
        return f"{line}; {since}: accelerate() again" if missing else line

    def _summary_of(self, library: str) -> str:
        layers = [layer for layer in self.layers if layer.library == library]
        served = Counter(layer.backend for layer in layers if layer.backend is not None)
        kept = Counter(layer.reason for layer in layers if layer.reason is not None)
        on_torch = served.pop("torch", 0)
        backends, owner = ", ".join(sorted(served)), _owner(library)
        line = f"{served.total()} of {len(layers)} layers of {owner} run on peft_kernels"
        line += f" ({backends})" if served else ""
        line += f"; {on_torch} on PyTorch's operations, and no kernel" if on_torch else ""
        reasons = ", ".join(f"{reason} ({count})" for reason, count in kept.most_common())
        return f"{line}; {kept.total()} keep {owner}: {reasons}" if kept else line

    def __str__(self) -> str:
        missing = self._missing()
        names = {name for _, name, _ in missing}
        rows = [
            (
                layer.name or "(model)",
                layer.kind,
                layer.backend or f"{layer.library}: {layer.reason}",
            )
            for layer in self.layers
            if layer.name not in names
        ]
        rows += [
            (name or "(model)", "", f"{library}: {why}, accelerate() again")
            for library, name, why in missing
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([self.summary(), *table])

    def _missing(self) -> list[tuple[str, str, str]]:
        """The library and the name of each, and why it is."""
        known = {layer.name for layer in self.layers}
        return [
            (host.LIBRARY, name, "no longer" if name in known else "came later")
            for host, name, module in _layers(self._model)
            if host.is_new(module)
        ]

    def _calls(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for host, _, module in _layers(self._model):
            total.update(host.calls(module))
        return total


def accelerate(model: nn.Module, *, strict: bool = True) -> Report:
    """Puts this package's kernels under the layers of a model of PEFT's or `adapters`'.

    Under PEFT: each ``lora.Linear`` computes ``y = x W^T + b + sum_j scale_j dropout_j(x) A_j^T
    B_j^T`` by :func:`peft_kernels.ops.lora_linear`, forward and backward, in one pass over its
    active adapters; with ``adapter_names``, in training too, by
    :func:`peft_kernels.ops.multi_lora_linear`; with DoRA by :func:`peft_kernels.ops.dora_linear`. A
    ``lora.Embedding`` has one product of PyTorch's for all its active adapters.

    A soft prompt of PEFT's goes before the text by :func:`peft_kernels.ops.prompt_lookup`, and an
    encoder of prompts or prefixes runs once for a batch, or not at all while nothing trains.

    Under `adapters`: a bottleneck layer with one active adapter is
    :func:`peft_kernels.ops.adapter` with the sublayer's LayerNorm and residuals, and in a
    composition each of its adapters is; a LoRA layer is as PEFT's, with a row's own adapter in a
    BatchSplit or a Parallel; attention over a prefix is
    :func:`peft_kernels.ops.prefix_attention`, and a soft prompt goes before the text by
    :func:`peft_kernels.ops.prompt_lookup`.

    A layer stays its library's own in all else: its class is a subclass of theirs, so that its
    parameters, its state dict, merging, adding and deleting adapters, hotswapping and saving are
    untouched. Every call looks at the layer anew. What kernels can't serve (other variants of
    LoRA, hooks below the layer, quantised and sharded weights, ...) runs in the library's code, and
    is counted.

    Args:
        model: any model that has such layers, wrapped or not: a PeftModel, one that
            ``add_adapter`` of transformers or diffusers, or ``inject_adapter_in_model``, has
            changed, or one of ``adapters.init`` or ``AutoAdapterModel``.
        strict: whether the model computes what its library computes, as it does by default. If
            False, a causal model of PEFT's with a soft prompt has the prompt directly before the
            text of each row that is padded on the left, where PEFT has it before the padding, and
            counts positions over real tokens, behind a prefix too; its prefix is there under
            gradient checkpointing; and a prefix of `adapters`' is attended to under sdpa as it is
            in eager attention.

    Returns:
        A :class:`Report`. The logger "peft_kernels" has its :meth:`~Report.summary` at INFO.

    Raises:
        TypeError: model is no ``nn.Module``, such as a pipeline of diffusers', which has some.
    """
    _check_model(model)
    for host in _hosts():
        for module in model.modules():
            host.serve(module, strict)
    if any(True for _ in _layers(model)):
        keep_codes(model)
    found = []
    for host, name, module in _layers(model):
        kind, reason = host.kind_of(module), host.why_not(module)
        backend = None if reason else host.backend(module)
        found.append(Layer(name, kind, backend, reason, host.LIBRARY))
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
    _check_model(model)
    for host in _hosts():
        for module in model.modules():
            host.restore(module)
    if not has_adapters(model):
        give_back(model)


def _check_model(model: Any) -> None:
    """Raises a TypeError unless ``model`` is a module, which names those of a pipeline."""
    if _PIPELINE in names_of(type(model)):
        parts = [f".{name}" for name, p in model.components.items() if isinstance(p, nn.Module)]
        raise TypeError(
            f"model must be a Module, such as {' or '.join(parts)} of this {type(model).__name__}"
        )
    check_module("model", model)


def _owner(library: str) -> str:
    return f"{library}'" if library.endswith("s") else f"{library}'s"


def _hosts() -> list[ModuleType]:
    """What knows the layers of each library that is imported."""
    return [importlib.import_module(path) for path, name in _HOSTS.items() if name in sys.modules]


def _layers(model: nn.Module) -> Iterator[tuple[ModuleType, str, nn.Module]]:
    """The layers of these libraries, each with what knows it."""
    hosts = _hosts()
    for name, module in model.named_modules():
        for host in hosts:
            if host.is_layer(module):
                yield host, name, module
