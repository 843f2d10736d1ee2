"""Which linear layers can be a base, and why another can't: the one place that says so.

Other libraries' layers and tensors are known by the full names of their classes, so that none of
those libraries is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.modules.fully_sharded import fault_of_gathering, is_gathered
from peft_kernels.modules.replaced import fault_of_instance, fault_of_replacement
from peft_kernels.modules.uncalled import uncalled_layers

HALF_DTYPES = (torch.float16, torch.bfloat16)
BASE_DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)

CONV1D = "transformers.pytorch_utils.Conv1D"
FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"  # x @ weight.T + bias
FAKE_TENSOR = "torch._subclasses.fake_tensor.FakeTensor"
FSDP_MODULE = "torch.distributed.fsdp.FSDPModule"
DTENSOR = "torch.distributed.tensor.DTensor"

_OURS = {
    "peft_kernels.nn.lora.LoRALinear": (
        "must be a plain linear layer; it is a LoRALinear already, which has one adapter (for "
        "several by name: AdapterPool, or PEFT; for other values: switch())"
    ),
    "peft_kernels.nn.multi_lora.MultiLoRALinear": (
        "must be a plain linear layer; it serves an AdapterPool already: detach() that first"
    ),
    "peft_kernels.nn.quantized_linear.QuantizedLinear": (
        "has its weight in codes already: adapters go over it as it is"
    ),
}
_PEFT = (
    "train and serve it with PEFT, or take PEFT's layers out first (unload() or "
    "merge_and_unload() of the PeftModel) and give what that returns; load_adapter reads the "
    "adapters that PEFT saved"
)
_QUANTISED = (
    "the kernels read weights of float32, float64, float16 or bfloat16, and codes of bitsandbytes' "
    "layers: load the model without this quantization config, or train over it with PEFT"
)
_NO_MEMORY = (
    "on the meta device, where there are no values and new ones would be lost: give the model "
    "memory and load its weights first (to_empty() and load_state_dict(), or from_pretrained()); "
    "if accelerate offloaded them, accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)
# The packages of layers that quantise their weight.
_QUANTISERS = (
    "aqlm",
    "auto_gptq",
    "awq",
    "bitsandbytes",
    "eetq",
    "gptqmodel",
    "hqq",
    "optimum.quanto",
    "torch.ao.nn",
    "torchao",
    "transformers.integrations",
)


# ---- classes by name ---------------------------------------------------------------------------


def names_of(kind: type) -> tuple[str, ...]:
    """The full names of a class and of those that it is made of."""
    return tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in kind.__mro__)


def full_name(value: object) -> str:
    """The full name of a value's class."""
    return names_of(type(value))[0]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is ``transformers``' Conv1D: a linear layer whose weight is stored [k, n]."""
    return CONV1D in names_of(type(module))


def is_of_package(module: nn.Module, packages: Iterable[str]) -> bool:
    """Whether the class, or one that it is made of, comes from one of these packages."""
    prefixes = tuple(f"{package}." for package in packages)
    return any(name.startswith(prefixes) for name in names_of(type(module)))


# ---- a layer -----------------------------------------------------------------------------------


def check_base(
    linear: nn.Module,
    name: str = "linear",
    *,
    takes_values: bool = False,
    may_be_sharded: bool = False,
    in_codes: bool = False,
) -> None:
    """Raises a TypeError unless one of our layers can take over this layer's work.

    Args:
        linear: the layer.
        name: what the message calls it.
        takes_values: whether trained values are put into the new layer at once, which must then
            have memory: a layer on the meta device can't.
        may_be_sharded: whether its weight may be a DTensor, as tensor parallelism and fully_shard
            leave it.
        in_codes: whether it is another library's, over a weight in codes that can be read.
    """
    if in_codes:
        reason = _fault_in_codes(linear)
    else:
        reason = _fault_of_kind(linear) or _fault_of_state(linear, takes_values, may_be_sharded)
    if reason:
        raise TypeError(f"{name} {reason}")


def check_bases(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    *,
    takes_values: bool = False,
    may_be_sharded: bool = False,
    in_codes: Collection[nn.Module] = (),
) -> None:
    """:func:`check_base` for layers of a model by name, and for what they are parts of.

    ``in_codes`` are those of them whose weight is in codes that can be read.
    """
    owners, uncalled = dict(_parts_of_peft(model)), uncalled_layers(model)
    for name, module in targets.items():
        if owner := owners.get(module):
            raise TypeError(f"{name} is a part of {owner}, a layer of PEFT's: {_PEFT}")
        if module in uncalled:
            raise TypeError(f"{name} {uncalled[module].fault}")
        check_base(
            module,
            name,
            takes_values=takes_values,
            may_be_sharded=may_be_sharded,
            in_codes=module in in_codes,
        )


def _parts_of_peft(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What is inside PEFT's layers: they read it, or replace it, as they think fit."""
    wholes = (
        "peft.tuners.tuners_utils.BaseTunerLayer",
        "peft.utils.other.AuxiliaryTrainingWrapper",
    )
    for name, module in model.named_modules():
        if any(whole in names_of(type(module)) for whole in wholes):
            for part in module.modules():
                if part is not module:
                    yield part, name


def _fault_of_kind(linear: nn.Module) -> str | None:
    """What its class says."""
    kind = full_name(linear)
    for ours, reason in _OURS.items():
        if ours in names_of(type(linear)):
            return reason
    if is_of_package(linear, ("peft",)):
        return f"is a layer of PEFT's, {kind}: {_PEFT}"
    if is_of_package(linear, _QUANTISERS):
        return f"is a quantised layer, {kind}: {_QUANTISED}"
    if not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
        return f"must be torch.nn.Linear or transformers' Conv1D, or a subclass; got {kind}"
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            "must be a layer that is called; nn.MultiheadAttention reads the weight of its "
            "out_proj and never calls it, so leave it out of the targets"
        )
    return None


def _fault_of_state(linear: Any, takes_values: bool, may_be_sharded: bool) -> str | None:
    """What was done to it, and what its tensors are."""
    if "_hf_hook" in vars(linear):
        return _fault_of_hook(linear)
    if reason := _fault_of_forward(linear):
        return reason
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if weight is None or nn.parameter.is_lazy(weight):
        return _fault_of_no_weight(linear)
    of_tensor = _fault_of_shard if may_be_sharded and is_sharded(weight) else _fault_of_tensor
    if may_be_sharded and is_gathered(linear) and (reason := _fault_of_gathering(linear)):
        return reason
    if reason := of_tensor(weight) or _fault_of_dtype(weight) or _fault_of_shape(weight, linear):
        return f"has a weight that {reason}"
    if bias is not None and (reason := of_tensor(bias)):
        return f"has a bias that {reason}"
    if takes_values and has_no_memory(weight):
        return f"has a weight {_NO_MEMORY}"
    return fault_of_replacement(linear, _plain_kind(linear))


def _fault_in_codes(linear: Any) -> str | None:
    """What was done to a layer whose weight is in codes, and where its tensors are."""
    if "_hf_hook" in vars(linear):
        return _fault_of_hook(linear)
    for name, tensor in linear._parameters.items():
        if tensor is not None and (reason := fault_of_place(tensor)):
            return f"has a {name} that {reason}"
        if tensor is not None and has_no_memory(tensor):
            return f"has a {name} {_NO_MEMORY}"
    return fault_of_instance(linear)


def _fault_of_hook(linear: Any) -> str:
    offloads = getattr(linear._hf_hook, "offload", False) or linear._parameters["weight"].is_meta
    what = "its weight is offloaded by accelerate" if offloads else "accelerate moves its inputs"
    return (
        f"has a hook of accelerate's ({full_name(linear._hf_hook)}): {what}, and a layer in its "
        "place wouldn't be looked after. Load the model onto one device that holds it (without a "
        "device_map), or give this part a device of its own and call "
        "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
    )


def _fault_of_forward(linear: Any) -> str | None:
    own = vars(linear).get("forward")
    # Hooks that were taken off again leave the class's own forward behind, bound.
    if own is not None and own != type(linear).forward.__get__(linear):
        where = f"{getattr(own, '__module__', '?')}.{getattr(own, '__qualname__', full_name(own))}"
        return f"must use its class's own forward; this one's was replaced by {where}: undo that"
    kind = _plain_kind(linear)
    if type(linear).forward is kind.forward:  # type: ignore[attr-defined]
        return None
    return (
        f"must use {kind.__name__}'s own forward; {full_name(linear)} has another, which would be "
        "left out: leave it out of the targets"
    )


def _plain_kind(linear: nn.Module) -> type[nn.Module]:
    """The class that it has its forward from, of those whose forward is known."""
    return next(
        c for c in type(linear).__mro__ if c is nn.Linear or names_of(c)[0] in (CONV1D, FALCON)
    )


def _fault_of_no_weight(linear: nn.Module) -> str:
    must = "must have an initialised Parameter of its own as weight; "
    if isinstance(linear._parameters.get("weight"), Tensor):
        return must + "it is lazy: run the model once first"
    if "parametrizations" in linear._modules:
        return must + "it is computed: torch.nn.utils.parametrize.remove_parametrizations() first"
    known = ", ".join(name for name, value in linear._parameters.items() if value is not None)
    return must + (
        f"its Parameters are: {known or 'none'}. Take off what computes or flattens the weight "
        "(weight_norm, pruning, FullyShardedDataParallel) first"
    )


# ---- a tensor ----------------------------------------------------------------------------------


def has_no_memory(tensor: Tensor) -> bool:
    """Whether this tensor holds no values, and loses those that are written into it."""
    return tensor.is_meta or FAKE_TENSOR in names_of(type(tensor))


def check_memory(tensor: Tensor, name: str) -> None:
    """Raises a RuntimeError unless this tensor has values, and those written into it stay there."""
    if has_no_memory(tensor):
        raise RuntimeError(f"{name} is {_NO_MEMORY}")
    if is_placeholder(tensor):
        raise RuntimeError(
            f"{name} is a placeholder of DeepSpeed's ZeRO-3, whose values are spread over the "
            "processes: gather them around the call, in all processes, with "
            "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, as fully_shard (FSDP2) and tensor parallelism leave behind."""
    return DTENSOR in names_of(type(tensor)) or hasattr(tensor, "full_tensor")


def is_placeholder(tensor: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has taken its values away."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0


def fault_of_place(tensor: Any) -> str | None:
    """Why no new Parameter may come to stand beside this tensor of a model, or None."""
    if is_sharded(tensor):
        return (
            "is sharded (a DTensor): adapters that come later wouldn't be sharded along, nor "
            "their gradients summed over processes. Do this before fully_shard() or "
            "parallelize_module()"
        )
    if is_placeholder(tensor):
        return (
            "is a placeholder of DeepSpeed's ZeRO-3: build the model outside of "
            "deepspeed.zero.Init, and do this before deepspeed.initialize()"
        )
    if getattr(tensor, "_fsdp_flattened", False):
        return (
            "is held by FullyShardedDataParallel, which wouldn't shard adapters that come later: "
            "do this before wrapping the model"
        )
    return None


def _fault_of_tensor(tensor: Tensor) -> str | None:
    if reason := fault_of_place(tensor):
        return reason
    if _computes_in_its_own_way(tensor):
        return f"is a {full_name(tensor)}, quantised or wrapped: {_QUANTISED}"
    return None


def _fault_of_gathering(linear: nn.Module) -> str | None:
    """Why a layer whose weight fully_shard holds can't be replaced by one that it doesn't know."""
    if FSDP_MODULE in names_of(type(linear)):
        return (
            "is what fully_shard was called on, and gathers at its own calls: call fully_shard on "
            "what is around it, or do this before"
        )
    reason = fault_of_gathering(linear)
    return f"has a weight that {reason}" if reason else None


def _fault_of_shard(tensor: Any) -> str | None:
    """Of one of a layer's tensors, where the weight is a DTensor."""
    if not is_sharded(tensor):
        return "isn't a DTensor, as the weight is: shard both"
    return _fault_of_tensor(tensor.to_local())


def _fault_of_shape(weight: Tensor, linear: Any) -> str | None:
    size = getattr(linear, "in_features", 1) * getattr(linear, "out_features", 1)
    if weight.dim() == 2 and (weight.numel() or not size):
        return None
    return (
        f"has the shape {list(weight.shape)}, that of a shard or a placeholder: do this before "
        "the model is sharded or its weights are taken away"
    )


def _fault_of_dtype(weight: Tensor) -> str | None:
    if weight.dtype in BASE_DTYPES:
        return None
    return (
        f"must be float32, float64, float16 or bfloat16; got {weight.dtype}: cast the model, or "
        "where it is quantised, load it without a quantization config"
    )


def _computes_in_its_own_way(tensor: Tensor) -> bool:
    """Whether operators see a class of its own here, which kernels don't know."""
    kind = type(tensor)
    if FAKE_TENSOR in names_of(kind):
        return False
    plain = (Tensor, nn.Parameter)
    return not (
        any(kind.__torch_dispatch__ is one.__torch_dispatch__ for one in plain)
        and any(
            _function(kind.__torch_function__) is _function(one.__torch_function__) for one in plain
        )
    )


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
