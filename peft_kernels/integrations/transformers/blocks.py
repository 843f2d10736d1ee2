"""Where adapters go in the blocks of a model, and what they must be to stand there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from peft_kernels.codes.layers import dtype_of, is_in_codes
from peft_kernels.modules.bases import BASE_DTYPES, fault_of_place
from peft_kernels.modules.fully_sharded import is_gathered
from peft_kernels.modules.names import plain_modules, submodule
from peft_kernels.nn.bottleneck import BottleneckAdapter

POST_NORM = {"dense", "dropout", "LayerNorm"}
PRE_NORM = {"self_attn", "mlp", "post_attention_layernorm"}


class Block(NamedTuple):
    """The parts of a pre-LayerNorm layer, ``x + f(norm(x))`` twice, by what they do.

    Attributes:
        reads: whose input the feed-forward sublayer's is: the norm before ``mlp``, or ``mlp``.
        attention_end, mlp_end: whose output each sublayer's is, as it is added to its input.
    """

    reads: str
    attention_end: str
    mlp_end: str


# By the norms that a layer has; a name means one thing beside some norms and another beside others.
_BLOCKS = {
    # Llama, Mistral, Qwen, Phi-3
    frozenset({"input_layernorm", "post_attention_layernorm"}): Block(
        "post_attention_layernorm", "self_attn", "mlp"
    ),
    # Gemma2, Gemma3
    frozenset(
        {
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        }
    ): Block("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    # OLMo2, OLMo3, EXAONE-4
    frozenset({"post_attention_layernorm", "post_feedforward_layernorm"}): Block(
        "mlp", "post_attention_layernorm", "post_feedforward_layernorm"
    ),
    # GLM-4
    frozenset(
        {
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        }
    ): Block("post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
}


def block_of(layer: nn.Module, path: str) -> Block:
    """The layer's parts, or a ValueError if it isn't known what its norms do."""
    instead = "use the preset 'pfeiffer' or 'adapterplus', or insert_adapter after a module"
    norms = frozenset(n for n, m in layer._modules.items() if m is not None and "norm" in n.lower())
    block = _BLOCKS.get(norms)
    if block is None or not set(layer._modules) >= {"self_attn", "mlp"}:
        raise ValueError(
            f"{path} must be a layer whose parts are known; it is a {type(layer).__name__} with "
            f"the norms {', '.join(sorted(norms)) or 'none'}: {instead}"
        )
    factor = getattr(layer, "residual_multiplier", 1.0)
    if factor != 1.0:
        raise ValueError(
            f"{path} must add its sublayers' outputs as they are; it multiplies them by "
            f"residual_multiplier, {factor}, and would multiply the adapter's update too: {instead}"
        )
    return block


def places_in(model: nn.Module, preset: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and style of each place for an adapter."""
    for path, module in plain_modules(model).items():
        if set(module._modules) >= PRE_NORM:
            for name, style in _places_in_layer(module, path, preset):
                whole = f"{path}.{name}" if name else path
                yield whole, submodule(module, name) if name else module, style
        elif ends_a_sublayer(module) and (
            preset == "houlsby" or not path.endswith("attention.output")
        ):
            styles = {
                "parallel": "parallel of a post-LayerNorm block",
                "adapterplus": "residual",
            }
            yield path, module, styles.get(preset, preset)


def _places_in_layer(layer: nn.Module, path: str, preset: str) -> list[tuple[str, str]]:
    if preset in ("pfeiffer", "adapterplus"):
        return [("", "residual")]
    block = block_of(layer, path)
    if preset == "houlsby":
        return [(block.attention_end, "residual"), (block.mlp_end, "residual")]
    return [(block.mlp_end, "parallel")]


def ends_a_sublayer(module: nn.Module) -> bool:
    """Whether this is the end of a post-LayerNorm sublayer."""
    if not set(module._modules) >= POST_NORM:
        return False
    return list(inspect.signature(module.forward).parameters) == ["hidden_states", "input_tensor"]


# ---- what stands there -------------------------------------------------------------------------


def overrides_at(path: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides for one place: ``reduction_factor`` there, under our name for it."""
    given = dict(overrides)
    if "reduction_factor" not in given:
        return given
    if "reduction" in given or "bottleneck_size" in given:
        raise ValueError("reduction_factor can't be given along with reduction or bottleneck_size")
    factor = given.pop("reduction_factor")
    if isinstance(factor, Mapping):
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
        layer = found[1] if found else "default"
        by_layer = {str(key): value for key, value in factor.items()}
        factor = by_layer.get(layer, by_layer.get("default"))
        if factor is None:
            raise ValueError(
                f"reduction_factor must have a number for layer {layer}, or a default; it has "
                f"those for {', '.join(by_layer) or 'none'}"
            )
    return given | {"reduction": factor}


def adapter_for(
    module: nn.Module, preset: str, overrides: Mapping[str, Any], path: str
) -> BottleneckAdapter:
    """A new adapter for this module, on its device and of its dtype if nothing else is said."""
    for name, parameter in module.named_parameters():
        if reason := fault_of_place(parameter):
            raise TypeError(f"{path}.{name} {reason}")
    for name, part in module.named_modules():
        if is_gathered(part):
            raise TypeError(
                f"{path}.{name} is held by fully_shard, which wouldn't shard adapters that come "
                "later, nor average their gradients: do this before fully_shard()"
            )
    place = {"device": next(module.parameters()).device} | dict(overrides)
    if "dtype" not in place:
        # A weight in codes has another than the block computes in; a norm beside it has that.
        layers = [one for one in module.modules() if is_in_codes(one)]
        packed = {one._parameters.get("weight") for one in layers}
        own = (p for p in module.parameters() if p not in packed)
        dtypes = [p.dtype for p in own if p.dtype in BASE_DTYPES]
        dtypes += [dtype_of(one) for one in layers]
        if not dtypes:
            raise TypeError(
                f"{path} has no floating-point Parameter that tells what dtype an adapter there "
                "must have; give dtype, or use a preset whose adapters stand after whole layers"
            )
        place["dtype"] = dtypes[0]
    return BottleneckAdapter.from_preset(preset, _hidden_size(module), **place)


def _hidden_size(module: nn.Module) -> int:
    norm = module._modules.get("LayerNorm") or module
    weight = norm._parameters.get("weight")
    if weight is not None and weight.dim() == 1:
        return weight.shape[0]
    for name in ("mlp.down_proj", "down_proj", "o_proj"):
        try:
            return submodule(module, name).out_features  # type: ignore[return-value]
        except AttributeError:
            continue
    raise ValueError(
        f"model has a block whose hidden size can't be told: {type(module).__name__}. Put adapters "
        "after its modules with insert_adapter"
    )
