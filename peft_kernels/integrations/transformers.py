"""Puts bottleneck adapters into a model: any module by its path, or BERT's and Llama's families.

The model's own sublayers do their work as before; nothing of its code is repeated here. A block is
known by its parts:

    post-LayerNorm    a sublayer's end with ``dense``, ``dropout`` and ``LayerNorm`` (BERT, RoBERTa,
                      ELECTRA, XLM-R), called with the sublayer's hidden states and its input
    pre-LayerNorm     a layer with ``self_attn``, ``mlp`` and ``post_attention_layernorm`` (Llama,
                      Mistral)

Paths are those of the model without wrappers (DistributedDataParallel, torch.compile, activation
checkpointing and others), however it is wrapped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from peft_kernels._fast_paths import choose_fast_paths
from peft_kernels._input_grads import let_gradients_through
from peft_kernels._names import plain_modules, plain_name, replace_module, submodule, unwrapped
from peft_kernels.nn._checks import check_choice
from peft_kernels.nn._off import is_off
from peft_kernels.nn._replaced import hand_on_hooks, has_given_forward
from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import PRESETS, BottleneckAdapter

_POST_NORM = {"dense", "dropout", "LayerNorm"}
_PRE_NORM = {"self_attn", "mlp", "post_attention_layernorm"}


def insert_adapters(model: nn.Module, preset: str, **overrides: Any) -> list[str]:
    """Freezes the model and puts a new adapter at each place where a method wants one.

    With f a sublayer's output, i its input, LN a post-LayerNorm block's norm and u the update:

    ==========  ===================  ========================================  ===================
    preset      after                post-LayerNorm                            pre-LayerNorm
    ==========  ===================  ========================================  ===================
    pfeiffer    feed-forward         ``LN(f + i + u(LN(f + i)))``              ``f + i + u(f + i)``
    houlsby     attention and        ``LN(f + i + u(f))``                      ``f + i + u(f)``
                feed-forward
    parallel    feed-forward         ``LN(f + i + u(i))``                      ``f + i + u(i)``
    ==========  ===================  ========================================  ===================

    These are the `adapters` library's seq_bn, double_seq_bn and par_bn. LayerNorms stay frozen;
    Houlsby et al. train them, which ``requires_grad_`` on them does.

    Args:
        model: a model of a family that the module's docstring names.
        preset: "pfeiffer", "houlsby" or "parallel".
        overrides: arguments of :meth:`peft_kernels.nn.BottleneckAdapter.from_preset`. Device and
            dtype are those of the block where nothing else is said.

    Returns:
        The adapters' paths in the model.

    Raises:
        ValueError: an unknown preset, a model with no block that is known, or one that has adapters
            already. The model is unchanged then.
    """
    check_choice("preset", preset, tuple(name for name in PRESETS if name != "adapterplus"))
    places = list(_places(model, preset))
    if not places:
        raise ValueError(
            f"model has no block that adapters can go into; got {type(model).__name__}, and blocks "
            f"need the parts {', '.join(sorted(_POST_NORM))} or {', '.join(sorted(_PRE_NORM))}"
        )
    if taken := [path for path, module, _ in places if "adapter" in module._modules]:
        raise ValueError(f"model has adapters already, e.g. at {taken[0]}")
    check_places(places)
    made = [_adapter_for(module, preset, overrides) for _, module, _ in places]
    model.requires_grad_(False)
    let_gradients_through(model)
    for (path, _, style), adapter in zip(places, made, strict=True):
        _put(model, path, adapter, style)
    return [f"{path}.adapter" for path, _, _ in places]


def insert_adapter(
    model: nn.Module, path: str, adapter: nn.Module, *, style: str = "residual"
) -> None:
    """Puts an adapter after any module: its output y becomes ``adapter(y, residual=y)``.

    The adapter becomes the module's child ``adapter``. Where the module returns a tuple, its first
    element is adapted.

    Args:
        model: the model.
        path: the module's path in it.
        adapter: a :class:`peft_kernels.nn.BottleneckAdapter`, or what is called like one.
        style: "residual", or "parallel", where the adapter reads the input of the layer whose
            ``mlp`` this is and adds its update to y.

    Raises:
        ValueError: no such path, an unknown style, or a module that has a child ``adapter``.
    """
    check_choice("style", style, tuple(_HOOKS))
    try:
        module = submodule(model, path)
    except AttributeError as error:
        raise ValueError(f"path must name a module of the model; got {path!r}") from error
    if "adapter" in module._modules:
        raise ValueError(f"{path} has a module named adapter already")
    module.add_module("adapter", adapter.train(module.training))
    module.register_forward_hook(_HOOKS[style])
    choose_fast_paths(unwrapped(model))
    if style == "parallel":
        layer = submodule(model, plain_name(model, path).rpartition(".")[0])
        norm = submodule(layer, "post_attention_layernorm")
        norm.register_forward_hook(_keep_input)


def fuse_adapters(
    model: nn.Module, trained: Sequence[Mapping[str, nn.Module]], **options: Any
) -> list[str]:
    """Puts an AdapterFusion at each adapter's place, over adapters that were trained before it.

    All but the fusions' own parameters is frozen: the paper's second stage.

    Args:
        model: a model with adapters (:func:`insert_adapters`), which say where the fusions go.
        trained: for each adapter to fuse, its modules by path, as of :func:`adapters_of`. They
            become parts of the model.
        options: arguments of :class:`peft_kernels.nn.AdapterFusion`.

    Returns:
        The fusions' paths in the model.

    Raises:
        ValueError: nothing to fuse, a model without adapters, or places that differ from the
            model's.
    """
    paths = list(adapters_of(model))
    if not trained:
        raise ValueError("trained must have at least one adapter to fuse; got none")
    if not paths:
        raise ValueError("model has no adapters; insert_adapters says where the fusions go")
    for index, modules in enumerate(trained):
        if set(modules) != set(paths):
            difference = sorted(set(modules) ^ set(paths))
            raise ValueError(
                f"trained[{index}] must have an adapter at each of the model's places and no "
                f"other; it differs at {difference[0]}"
            )
    model.requires_grad_(False)
    for path in paths:
        adapters: list[Any] = [modules[path] for modules in trained]
        fusion = AdapterFusion(adapters, **options)
        fusion.adapters.requires_grad_(False)
        place = submodule(model, path)
        if not any(place is adapter for adapter in adapters):
            hand_on_hooks(place, fusion)
        replace_module(model, path, fusion.train(model.training))
    return paths


def adapters_of(model: nn.Module) -> dict[str, nn.Module]:
    """The adapters and fusions that were inserted, by path."""
    kinds = (BottleneckAdapter, AdapterFusion)
    found: dict[str, nn.Module] = {}
    for path, module in plain_modules(model).items():
        if path.rpartition(".")[2] == "adapter" and isinstance(module, kinds):
            found[path] = module
    return found


def remove_adapters(model: nn.Module) -> None:
    """Takes out all that was inserted; the model computes what it did before."""
    for module in plain_modules(model).values():
        if isinstance(module, AdaptedOutput):
            module.take_out()
        for key, hook in list(module._forward_hooks.items()):
            if hook in _HOOKS.values():
                del module._forward_hooks[key], module._modules["adapter"]
            elif hook is _keep_input:
                del module._forward_hooks[key]
    choose_fast_paths(unwrapped(model))


# ---- post-LayerNorm ----------------------------------------------------------------------------


class AdaptedOutput(nn.Module):
    """The end of a post-LayerNorm sublayer, with an adapter before its last LayerNorm.

    The sublayer's end stays the object that it is, hooks, buffers and all, and of its own class
    too: :meth:`put` gives it the child ``adapter`` and a class that is made of both.
    """

    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.Module
    adapter: nn.Module
    style: str
    _kind: type[nn.Module]  # the sublayer's own class

    @staticmethod
    def put(output: nn.Module, adapter: nn.Module, style: str) -> None:
        """Puts an adapter into the sublayer's end."""
        kind: Any = type(output)
        output.__class__ = _adapted_kind(kind)
        output.add_module("adapter", adapter.train(output.training))
        output.style = style  # type: ignore[assignment]

    def take_out(self) -> None:
        """Makes the sublayer's end what it was."""
        del self._modules["adapter"], self.__dict__["style"]
        self.__class__ = self._kind  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new_adapted, (self._kind,), self.__getstate__()  # no module has the class

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if is_off(self):
            return self._kind.forward(self, hidden_states, input_tensor)
        f = self.dropout(self.dense(hidden_states))
        if self.style == "pfeiffer":
            x = f + input_tensor
            return self.adapter(x, residual=x, pre_norm=self.LayerNorm, norm=self.LayerNorm)
        read = f if self.style == "houlsby" else input_tensor
        return self.adapter(read, residual=(f, input_tensor), norm=self.LayerNorm)

    def extra_repr(self) -> str:
        return f"style={self.style}"


@cache
def _adapted_kind(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{kind.__name__}", (AdaptedOutput, kind), {"_kind": kind})


def _new_adapted(kind: Any) -> nn.Module:
    adapted = _adapted_kind(kind)
    return adapted.__new__(adapted)


def check_places(places: Iterable[tuple]) -> None:
    """Raises a TypeError if a module among (path, module, style, ...) would not heed its class."""
    for path, module, style, *_ in places:
        if style in _POST_STYLES and has_given_forward(module):
            raise TypeError(
                f"{path} must use its class's own forward, for an adapter there takes part in it; "
                "it was given another one: undo that first "
                "(accelerate.hooks.remove_hook_from_module, if accelerate did it)"
            )


_POST_STYLES = ("pfeiffer", "houlsby", "parallel of a post-LayerNorm block")


# ---- pre-LayerNorm -----------------------------------------------------------------------------


def _adapt(module: Any, args: tuple, output: Any) -> Any:
    """Forward hook: the output through the module's adapter, with itself as the residual."""
    if is_off(module):
        return output
    y = output[0] if isinstance(output, tuple) else output
    adapted = module.adapter(y, residual=y)
    return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


_INPUT = "_peft_kernels_input"  # an attribute of a norm's output


def _adapt_in_parallel(module: Any, args: tuple, output: Tensor) -> Tensor:
    """Forward hook: adds the update of the input that the layer's norm was given."""
    if is_off(module):
        return output
    kept = getattr(args[0], _INPUT, None) if args else None
    if kept is None:
        raise RuntimeError(
            f"{type(module).__name__} has a parallel adapter, and must be called with what its "
            "layer's norm returned, which holds the adapter's input; call the layer, or use the "
            "preset 'pfeiffer'"
        )
    return module.adapter(kept, residual=output)


def _keep_input(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook of a norm: its output holds its input, for the adapter beside the next module.

    So the input belongs to the call and goes with the output, whatever other calls run meanwhile.
    """
    setattr(output, _INPUT, args[0])


_HOOKS = {"residual": _adapt, "parallel": _adapt_in_parallel}


# ---- places ------------------------------------------------------------------------------------


def _places(model: nn.Module, preset: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and style of each place for an adapter."""
    for path, module in plain_modules(model).items():
        names = set(module._modules)
        if names >= _PRE_NORM:
            if preset == "pfeiffer":
                yield path, module, "residual"
            if preset == "houlsby":
                yield f"{path}.self_attn", submodule(module, "self_attn"), "residual"
            if preset != "pfeiffer":
                style = "residual" if preset == "houlsby" else "parallel"
                yield f"{path}.mlp", submodule(module, "mlp"), style
        elif _ends_a_sublayer(module) and (
            preset == "houlsby" or not path.endswith("attention.output")
        ):
            yield path, module, _POST_STYLES[2] if preset == "parallel" else preset


def _ends_a_sublayer(module: nn.Module) -> bool:
    if not set(module._modules) >= _POST_NORM:
        return False
    return list(inspect.signature(module.forward).parameters) == ["hidden_states", "input_tensor"]


def _adapter_for(module: nn.Module, preset: str, overrides: dict[str, Any]) -> BottleneckAdapter:
    weight = next(module.parameters())
    hidden_size = _hidden_size(module)
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    return BottleneckAdapter.from_preset(preset, hidden_size, **(place | overrides))


def _hidden_size(module: nn.Module) -> int:
    if "LayerNorm" in module._modules:
        return next(submodule(module, "LayerNorm").parameters()).shape[0]
    for name in ("mlp.down_proj", "down_proj", "o_proj"):
        try:
            return submodule(module, name).out_features  # type: ignore[return-value]
        except AttributeError:
            continue
    raise ValueError(f"model has a block whose hidden size can't be told: {type(module).__name__}")


def _put(model: nn.Module, path: str, adapter: nn.Module, style: str) -> None:
    if style in _POST_STYLES:
        AdaptedOutput.put(submodule(model, path), adapter, style)
    else:
        insert_adapter(model, path, adapter, style=style)
