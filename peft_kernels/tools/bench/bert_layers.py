"""BERT layers with and without adapters, for the suites of the adapter ops.

Random weights: time doesn't depend on them. The host is `transformers`' BertModel, called with
embeddings, so that its layers' attention and feed-forward parts are those that users run.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import _library
from peft_kernels.integrations.transformers.adapters import (
    adapters_of,
    fuse_adapters,
    insert_adapters,
)
from peft_kernels.tools.bench.implementation import Implementation, from_module

# The `adapters` library's names of the presets.
THEIR_PRESETS = {"pfeiffer": "seq_bn", "houlsby": "double_seq_bn", "parallel": "par_bn"}


def bert(hidden: int, layers: int, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """A frozen BertModel of BERT-base's proportions, without dropout."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
        vocab_size=8,
        max_position_embeddings=4096,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model.to(device, dtype).requires_grad_(False)


def implementation(model: nn.Module, x: Tensor, backend: str = "auto") -> Implementation:
    """A model as it is timed: embeddings in, hidden states out."""

    def forward(x: Tensor) -> Tensor:
        with _library.backend(backend):
            return model(inputs_embeds=x).last_hidden_state

    return from_module(model, x, forward)


def with_adapters(base: nn.Module, preset: str, size: int, dropout_p: float) -> nn.Module:
    model = copy.deepcopy(base)
    insert_adapters(model, preset, bottleneck_size=size, dropout=dropout_p)
    randomize(p for p in model.parameters() if p.requires_grad)
    return model


def with_fusion(base: nn.Module, trained: Sequence[nn.Module]) -> nn.Module:
    """A fusion of the adapters of several models; only its own parameters train."""
    model = copy.deepcopy(base)
    insert_adapters(model, "pfeiffer")
    fuse_adapters(model, copy.deepcopy([adapters_of(one) for one in trained]))
    randomize(p for p in model.parameters() if p.requires_grad)
    return model


def computed_directly(fused: nn.Module) -> nn.Module:
    """The same model, whose fusions make every key and value."""
    model = copy.deepcopy(fused)
    for fusion in adapters_of(model).values():
        fusion.plan = lambda rows: "direct"  # type: ignore[assignment,method-assign]
    return model


def randomize(parameters: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


# ---- the same in the `adapters` library --------------------------------------------------------


def has_adapters() -> bool:
    # Once it is imported, the library has no spec that find_spec could give.
    return "adapters" in sys.modules or importlib.util.find_spec("adapters") is not None


def theirs(base: nn.Module, preset: str, ours: Sequence[nn.Module], dropout_p: float) -> nn.Module:
    """Our models' adapters, one or several that are fused, in a model of `adapters`."""
    import adapters
    from adapters.composition import Fuse

    model: Any = copy.deepcopy(base)
    adapters.init(model)
    names = [f"task{i}" for i in range(len(ours))]
    for name, one in zip(names, ours, strict=True):
        first: Any = next(iter(adapters_of(one).values()))
        config = adapters.AdapterConfig.load(
            THEIR_PRESETS[preset],
            reduction_factor=first.hidden_size / first.bottleneck_size,
            dropout=dropout_p,
        )
        model.add_adapter(name, config=config)
        _copy_adapters(one, model, name)
    if len(ours) == 1:
        model.train_adapter(names[0])
    else:
        model.add_adapter_fusion(names, adapters.AdapterFusionConfig.load("dynamic"))
        model.train_adapter_fusion(Fuse(*names))
    parameter = next(base.parameters())
    model.to(parameter.device, parameter.dtype)
    for name, p in model.named_parameters():
        if name.endswith("key.bias"):  # its gradient is nothing, and ours has none
            p.requires_grad_(False)
    return model


def copy_fusions(ours: nn.Module, model: nn.Module) -> None:
    """Gives a model of `adapters` the values of our fusions."""
    layers = [m for n, m in model.named_modules() if ".adapter_fusion_layer." in f"{n}."]
    layers = [m for m in layers if hasattr(m, "query")]
    for fusion, layer in zip(adapters_of(ours).values(), layers, strict=True):
        own = fusion.state_dict()
        layer.load_state_dict({name: own[name] for name in layer.state_dict()})


def _copy_adapters(ours: nn.Module, model: nn.Module, name: str) -> None:
    places: dict[str, dict[str, Tensor]] = {}
    for key, value in model.state_dict().items():
        place, _, rest = key.partition(f".adapters.{name}.")
        if rest:
            places.setdefault(place, {})[rest] = value
    with torch.no_grad():
        for adapter, values in zip(adapters_of(ours).values(), places.values(), strict=True):
            own = adapter.state_dict()
            for theirs, name in (("adapter_down.0", "down"), ("adapter_up", "up")):
                for kind in ("weight", "bias"):
                    values[f"{theirs}.{kind}"].copy_(own[f"{name}.{kind}"])
