"""What is computed of each op: its own example inputs, in sizes that no tile divides.

Results have hundreds of elements at least: of a few, one error over another is a matter of chance.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from peft_kernels import ops
from peft_kernels.ops import QuantizedWeight, dequantize, quantize
from peft_kernels.tools import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRIDED = "strided"  # the name of the case whose arguments have strides
KINDS = ("nf4", "int8")  # of weights in codes


@dataclass(frozen=True)
class Case:
    """A function of named arguments, on values that lie on the CPU.

    ``trained`` names the arguments that get a gradient. Those that ``strided`` names are laid out
    by columns if they are matrices, and else take every second element of a larger tensor.
    """

    name: str
    call: Callable[..., Tensor]
    inputs: dict[str, Any]
    trained: tuple[str, ...]
    strided: tuple[str, ...] = ()

    def wide(self) -> dict[str, Any]:
        """The same values in float64; a bank's scales are float32 beside any."""
        found = {name: _cast(value, torch.float64) for name, value in self.inputs.items()}
        if "banks" in found:
            pairs = zip(found["banks"], self.inputs["banks"], strict=True)
            found["banks"] = [bank._replace(scales=given.scales) for bank, given in pairs]
        return found

    def plain(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the eager path reads: a weight in codes is dense and in ``dtype``."""
        return {
            name: dequantize(value, dtype) if isinstance(value, QuantizedWeight) else value
            for name, value in self.inputs.items()
        }

    def on(self, device: torch.device) -> dict[str, Any]:
        """The values on a device, in the layout that the case wants."""
        moved = tree_map(lambda t: t.to(device) if _is_tensor(t) else t, self.inputs)
        return moved | {name: tree_map(_strided, moved[name]) for name in self.strided}


def leaves_of(case: Case, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The arguments with fresh leaves for those that are trained, and these leaves."""
    own = {name: tree_map(_leaf, inputs[name]) for name in case.trained}
    return inputs | own, [t for t in tree_leaves(own) if _is_tensor(t) and t.requires_grad]


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, QuantizedWeight):
        return dequantize(value).to(dtype)
    is_float = lambda t: _is_tensor(t) and t.is_floating_point()  # noqa: E731
    return tree_map(lambda t: t.to(dtype) if is_float(t) else t, value)


def _leaf(value: Any) -> Any:
    if not _is_tensor(value) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_()


def _strided(tensor: Any) -> Any:
    if not _is_tensor(tensor):
        return tensor
    if tensor.dim() == 2:
        return tensor.T.contiguous().T
    return torch.stack((tensor, tensor), -1)[..., 0]


# ---- the cases of each op --------------------------------------------------------------------


def cases_of(op: str, dtype: torch.dtype, kind: str = "", seed: int = 0) -> list[Case]:
    """The cases of an op in a dtype; the first one has several tiles.

    ``kind`` is what the weight is in, of `KINDS`; dense by default.

    Raises:
        UserError: no case is written for the op.
    """
    if op not in _CASES:
        raise UserError(f"op must be one of {', '.join(_CASES)}; got {op!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _CASES[op](dtype, kind) if kind else _CASES[op](dtype)


def _module(op: str) -> Any:
    return importlib.import_module(f"peft_kernels.ops.{op}")


def _laid_out(inputs: dict[str, Any], name: str) -> tuple[str, ...]:
    return tuple(inputs) if name == STRIDED else ()


def _linear(op: str, dtype: torch.dtype, kind: str = "", *more: str) -> list[Case]:
    """The ops of one layer and one adapter; the dropout's mask is drawn again from its seed."""
    trained = ("x", "lora_a", "lora_b", "bias", *more, *(() if kind else ("weight",)))

    def case(name: str, m: int, n: int, k: int, r: int, *, p=0.0, wide=False):
        adapter_dtype = torch.float32 if wide else dtype
        inputs = _module(op).example_inputs(m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype)
        if kind:
            inputs["weight"] = quantize(inputs["weight"], kind)

        def call(**arguments: Any) -> Tensor:
            return getattr(ops, op)(**arguments, scale=1.5, dropout_p=p, seed=7 if p else None)

        return Case(name, call, inputs, trained, _laid_out(inputs, name))

    return [
        case("several tiles, dropout", 150, 140, 147, 20, p=0.2),
        case("odd sizes, float32 adapter", 71, 131, 45, 5, wide=True),
        case("one row", 1, 259, 131, 5),
        case("no rows", 0, 131, 45, 5),
        *(() if kind else (case(STRIDED, 71, 131, 45, 5, wide=True),)),
    ]


def _lora(dtype: torch.dtype, kind: str = "") -> list[Case]:
    return _linear("lora_linear", dtype, kind)


def _dora(dtype: torch.dtype) -> list[Case]:
    return _linear("dora_linear", dtype, "", "magnitude")


def _multi(dtype: torch.dtype) -> list[Case]:
    module = _module("multi_lora_linear")

    def case(name: str, m: int, widths: list[int], k: int, ranks: list[int], *slots: int) -> Case:
        inputs = module.example_inputs(m, widths, k, ranks, dtype=dtype)
        inputs["trained"] = [module.example_trained(bank, slots) for bank in inputs["banks"]]
        # Banks have a layout of their own, and must be contiguous.
        laid = ("x", "weight", "bias") if name == STRIDED else ()
        return Case(name, ops.multi_lora_linear, inputs, ("x", "bias", "trained"), laid)

    return [
        case("several tiles", 150, [140, 23], 147, [20, 3, 0, 33], 0, 3),
        case("odd sizes", 71, [131], 45, [3, 8, 0, 11], 0, 1),
        case("few rows", 7, [131], 45, [3, 8, 0, 11], 0, 1),
        case("one row", 1, [259], 131, [3, 8], 0),
        case("no rows", 0, [131], 45, [3, 8], 0),
        case(STRIDED, 71, [131], 45, [3, 8, 0, 11], 0, 3),
    ]


def _adapter(dtype: torch.dtype) -> list[Case]:
    norms = ("norm_weight", "norm_bias", "pre_norm_weight", "pre_norm_bias")
    plain = ("x", "residual", "down_weight", "down_bias", "up_weight", "up_bias")

    def case(name: str, m: int, k: int, r: int, *, p=0.0, norm=True, wide=False):
        inputs = _module("adapter").example_inputs(
            m, k, r, norm=norm, pre_norm=norm, dtype=dtype,
            adapter_dtype=torch.float32 if wide else dtype,
        )  # fmt: skip

        def call(**arguments: Any) -> Tensor:
            options: dict[str, Any] = {"dropout_p": p, "seed": 7 if p else None}
            return ops.adapter(**arguments, activation="gelu", scale=0.5, **options)

        return Case(name, call, inputs, plain + (norms if norm else ()), _laid_out(inputs, name))

    return [
        case("several tiles, dropout", 150, 147, 20, p=0.2),
        case("odd sizes, float32 adapter", 71, 131, 5, norm=False, wide=True),
        case("one row", 1, 259, 5),
        case("no rows", 0, 131, 5),
        case(STRIDED, 71, 131, 5),
    ]


def _fused(
    query_weight: Tensor, query_bias: Tensor, key_weight, value_weight, **inputs: Any
) -> Tensor:
    matrices = inputs.pop("up_weights"), inputs.pop("up_biases")
    absorbed = ops.absorb(*matrices, query_weight, query_bias, key_weight, value_weight)
    return ops.adapter_fusion(**inputs, absorbed=absorbed, activation="gelu")[0]


def _fusion(dtype: torch.dtype) -> list[Case]:
    trained = (
        *("x", "down_weights", "down_biases", "up_weights", "up_biases"),
        *("query_weight", "query_bias", "key_weight", "value_weight"),
    )

    def case(name: str, m: int, n: int, *sizes: int, wide=False) -> Case:
        inputs = _module("adapter_fusion").example_inputs(
            m, n, sizes, dtype=dtype, adapter_dtype=torch.float32 if wide else dtype
        )
        return Case(name, _fused, inputs, trained, _laid_out(inputs, name))

    return [
        case("several tiles", 150, 147, 20, 3, 33),
        case("odd sizes, float32 adapters", 71, 131, 3, 8, wide=True),
        case("one row", 1, 259, 3, 8),
        case("no rows", 0, 131, 3, 8),
        case(STRIDED, 71, 131, 3, 8),
    ]


def _attention(dtype: torch.dtype) -> list[Case]:
    trained = ("q", "k", "v", "prefix_k", "prefix_v")

    def case(name: str, *sizes: int, keys=None, prefixes=None, **options) -> Case:
        inputs = _module("prefix_attention").example_inputs(
            *sizes, keys=keys, prefixes=prefixes, dtype=dtype
        )
        return Case(name, ops.prefix_attention, inputs | options, trained, _laid_out(inputs, name))

    # Enough queries to each key: the error of one probability is that of a whole row of dv.
    mask = torch.rand(3, 1, 67, 67) > 0.3
    added = torch.where(mask[:2], 0.5, -torch.inf)
    return [
        case("a bank, causal", 3, 75, 4, 2, 72, 21, prefixes=2),
        case("a mask of bool, lengths", 3, 67, 4, 2, 40, 5,
             attn_mask=mask, lengths=torch.tensor([0, 67, 29]), is_causal=False),
        case("a mask of floats", 2, 67, 4, 2, 128, 5, attn_mask=added.to(dtype)),
        case("one query of many keys", 2, 1, 4, 2, 64, 5, keys=700),
        case("no rows", 0, 17, 4, 2, 16, 5),
        case(STRIDED, 2, 41, 4, 2, 24, 5),
    ]  # fmt: skip


def _lookup(dtype: torch.dtype) -> list[Case]:
    def case(name: str, *sizes: int, position="front", wide=False) -> Case:
        inputs = _module("prompt_lookup").example_inputs(
            *sizes, dtype=dtype, prompt_dtype=torch.float32 if wide else dtype
        )

        def call(**arguments: Any) -> Tensor:
            return ops.prompt_lookup(**arguments, position=position).embeddings

        return Case(name, call, inputs, ("embeddings", "prompts"), _laid_out(inputs, name))

    return [
        case("several prompts, behind the first token", 5, 71, 147, 21, 3, position="after_bos"),
        case("a float32 prompt before all", 3, 7, 41, 5, wide=True),
        case("one row", 1, 1, 41, 1),
        case("no rows", 0, 7, 41, 5),
        case(STRIDED, 3, 7, 41, 5, 2, position="after_padding"),
    ]


_CASES: dict[str, Callable[..., list[Case]]] = {
    "lora_linear": _lora,
    "dora_linear": _dora,
    "multi_lora_linear": _multi,
    "adapter": _adapter,
    "adapter_fusion": _fusion,
    "prefix_attention": _attention,
    "prompt_lookup": _lookup,
}
