"""Puts bottleneck adapters into a model: any module by its path, or BERT's and Llama's families.

The model's own sublayers do their work as before; nothing of its code is repeated here. A block is
known by its parts:

    post-LayerNorm    a sublayer's end with ``dense``, ``dropout`` and ``LayerNorm`` (BERT, RoBERTa,
                      ELECTRA, XLM-R), called with the sublayer's hidden states and its input
    pre-LayerNorm     a layer with ``self_attn``, ``mlp`` and ``post_attention_layernorm`` (Llama,
                      Mistral), also with norms at its sublayers' ends (Gemma2, Gemma3, OLMo2, GLM4)

Paths are those of the model without wrappers (DistributedDataParallel, torch.compile, activation
checkpointing and others), however it is wrapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from peft_kernels.calls.off import is_off
from peft_kernels.codes.layers import keep_codes
from peft_kernels.integrations.transformers.blocks import (
    POST_NORM,
    PRE_NORM,
    adapter_for,
    block_of,
    overrides_at,
    places_in,
)
from peft_kernels.integrations.transformers.row_ids import drop_rows
from peft_kernels.models.fast_paths import choose_fast_paths, has_adapters
from peft_kernels.models.freezing import freeze
from peft_kernels.models.input_grads import let_gradients_be, let_gradients_through
from peft_kernels.models.resizing import choose_resizing
from peft_kernels.modules.checks import check_choice
from peft_kernels.modules.hooks import forget_compiled
from peft_kernels.modules.names import (
    check_late_parameters,
    plain_modules,
    plain_name,
    replace_module,
    submodule,
    unwrapped,
)
from peft_kernels.modules.replaced import hand_on_hooks, has_given_forward
from peft_kernels.modules.uncalled import uncalled_layers
from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import PRESETS, BottleneckAdapter


def insert_adapters(
    model: nn.Module, preset: str, *, train_head: bool | None = None, **overrides: Any
) -> list[str]:
    """Freezes the model and puts a new adapter at each place where a method wants one.

    With f a sublayer's output, i its input, LN a post-LayerNorm block's norm and u the update:

    | preset      | after                      | post-LayerNorm             | pre-LayerNorm      |
    | ----------- | -------------------------- | -------------------------- | ------------------ |
    | pfeiffer    | feed-forward               | `LN(f + i + u(LN(f + i)))` | `f + i + u(f + i)` |
    | houlsby     | attention and feed-forward | `LN(f + i + u(f))`         | `f + i + u(f)`     |
    | parallel    | feed-forward               | `LN(f + i + u(i))`         | `f + i + u(i)`     |
    | adapterplus | feed-forward               | `LN(f + i) + u(LN(f + i))` | `f + i + u(f + i)` |

    These are the `adapters` library's seq_bn, double_seq_bn, par_bn and AdapterPlusConfig, the last
    but for its stochastic depth. LayerNorms stay frozen; Houlsby et al. train them, which
    ``requires_grad_`` on them does. f is what is added to i: where a sublayer ends in a norm of its
    own, that norm's output.

    Args:
        model: one whose blocks have the parts of BERT's, or of Llama's: which classes do stands in
            the docs' page "Which method works in which model". Any module of any model takes one
            by :func:`insert_adapter`.
        preset: "pfeiffer", "houlsby", "parallel" or "adapterplus".
        train_head: whether a head for classification or answers (``classifier``, ``score``,
            ``qa_outputs``) stays trainable where it is. By default it is frozen too, with a
            RuntimeWarning, as another method's parameters are.
        overrides: arguments of :meth:`peft_kernels.nn.BottleneckAdapter.from_preset`, e.g.
            ``bottleneck_size`` or ``reduction``; or ``reduction_factor``, the `adapters` library's
            name for the latter: a number, or numbers by layer, ``{"1": 8, "default": 16}``. Device
            and dtype are those of the block where nothing else is said.

    Returns:
        The adapters' paths in the model.

    Raises:
        ValueError: an unknown preset, a model with no block that is known, or one that has adapters
            already; a block whose norms aren't known, for "houlsby" and "parallel", which need to
            know what they do; a model in FullyShardedDataParallel. One in DistributedDataParallel
            gets a RuntimeWarning.
        TypeError: a block that is sharded, or offloaded.

    The model is unchanged when one is raised.
    """
    check_choice("preset", preset, tuple(PRESETS))
    places = list(places_in(model, preset))
    if not places:
        raise ValueError(
            f"model has no block that adapters can go into; got {type(model).__name__}, and blocks "
            f"need the parts {', '.join(sorted(POST_NORM))} or {', '.join(sorted(PRE_NORM))}: "
            "insert_adapter puts an adapter after any module"
        )
    if taken := [path for path, module, _ in places if "adapter" in module._modules]:
        raise ValueError(f"model has adapters already, e.g. at {taken[0]}")
    check_places(places)
    check_late_parameters(model, "insert the adapters")
    made = [
        adapter_for(module, preset, overrides_at(path, overrides), path)
        for path, module, _ in places
    ]
    freeze(model, train_head=train_head)
    let_gradients_through(model)
    for (path, _, style), adapter in zip(places, made, strict=True):
        _put(model, path, adapter, style)
    return [f"{path}.adapter" for path, _, _ in places]


def insert_adapter(
    model: nn.Module, path: str, adapter: nn.Module, *, style: str = "residual"
) -> None:
    """Puts an adapter after any module: its output y becomes ``adapter(y, residual=y)``.

    The adapter becomes the module's child ``adapter``. Where the module returns a tuple, its first
    element is adapted. Nothing is frozen.

    Args:
        model: the model.
        path: the module's path in it.
        adapter: a :class:`peft_kernels.nn.BottleneckAdapter`, or what is called like one.
        style: "residual", or "parallel", where the adapter reads the input of the feed-forward
            sublayer whose ``mlp`` or last norm this is, and adds its update to y.

    Raises:
        ValueError: no such path, an unknown style, a module that has a child ``adapter``, or a
            "parallel" one in a layer whose norms aren't known; a model in FullyShardedDataParallel.
            One in DistributedDataParallel gets a RuntimeWarning.
        TypeError: a module that is never called, so that an adapter after it would do nothing; an
            adapter that isn't a module.
    """
    check_late_parameters(model, "insert the adapter")
    _insert(model, path, adapter, style)


def _insert(model: nn.Module, path: str, adapter: nn.Module, style: str) -> None:
    check_choice("style", style, tuple(_HOOKS))
    if not isinstance(adapter, nn.Module):
        raise TypeError(
            f"adapter must be a module, such as nn.BottleneckAdapter; got {type(adapter).__name__}"
        )
    try:
        module = submodule(model, path)
    except AttributeError as error:
        raise ValueError(f"path must name a module of the model; got {path!r}") from error
    if type(module).forward is nn.Module.forward and not has_given_forward(module):
        raise TypeError(f"{path} must be a module that is called; {type(module).__name__} isn't")
    if uncalled := uncalled_layers(unwrapped(model)).get(module):
        raise TypeError(f"{path} {uncalled.fault}")
    if "adapter" in module._modules:
        raise ValueError(f"{path} has a module named adapter already")
    keepers = _keepers(model, plain_name(model, path)) if style == "parallel" else []
    module.add_module("adapter", adapter.train(module.training))
    module.register_forward_hook(_HOOKS[style])
    keep_codes(model)
    choose_fast_paths(unwrapped(model))
    choose_resizing(model)
    for keeper, hook in keepers:
        keeper.register_forward_hook(hook)
    forget_compiled()


def _keepers(model: nn.Module, path: str) -> list[tuple[nn.Module, Any]]:
    """What brings the feed-forward sublayer's input to the module there: modules and their hooks.

    Raises a ValueError if the module isn't that sublayer's ``mlp``, nor its end.
    """
    parent, _, name = path.rpartition(".")
    layer = submodule(model, parent)
    block = block_of(layer, parent)
    if name not in ("mlp", block.mlp_end):
        raise ValueError(
            f"path must end in mlp or {block.mlp_end} for a parallel adapter; got {path!r}"
        )
    keepers: list[tuple[nn.Module, Any]] = [(submodule(layer, block.reads), _keep_input)]
    if name != "mlp" and block.reads != "mlp":
        keepers.append((submodule(layer, "mlp"), _pass_on_input))
    return keepers


def fuse_adapters(
    model: nn.Module, trained: Sequence[Mapping[str, nn.Module]], **options: Any
) -> list[str]:
    """Puts an AdapterFusion at each adapter's place, over adapters that were trained before it.

    All but the fusions' own parameters is frozen: the paper's second stage. A RuntimeWarning names
    a head, or another method's parameters, that trained until now.

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
    fused = [m for modules in (adapters_of(model), *trained) for m in modules.values()]
    freeze(model, silently=[parameter for m in fused for parameter in m.parameters()])
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
            elif hook in (_keep_input, _pass_on_input):
                del module._forward_hooks[key]
    forget_compiled()
    drop_rows(unwrapped(model))
    choose_fast_paths(unwrapped(model))
    choose_resizing(model)
    if not has_adapters(model):
        let_gradients_be(model)


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
    y = _first(output)
    adapted = module.adapter(y, residual=y)
    return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


_INPUT = "_peft_kernels_input"  # an attribute of what a norm or an mlp returns


def _adapt_in_parallel(module: Any, args: tuple, output: Any) -> Any:
    """Forward hook: adds the update of what the module's argument brings along."""
    if is_off(module):
        return output
    kept = getattr(args[0], _INPUT, None) if args else None
    if kept is None:
        raise RuntimeError(
            f"{type(module).__name__} has a parallel adapter, and must be called with what the "
            "module before it returned, which holds the adapter's input; call the layer, or use "
            "the preset 'pfeiffer'"
        )
    adapted = module.adapter(kept, residual=_first(output))
    return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


def _keep_input(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a norm or mlp: its output holds its input, for an adapter further on.

    So the input belongs to the call and goes with the output, whatever other calls run meanwhile.
    """
    setattr(_first(output), _INPUT, args[0])


def _pass_on_input(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of an mlp: its output holds what its input does."""
    setattr(_first(output), _INPUT, getattr(args[0], _INPUT, None))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


_HOOKS = {"residual": _adapt, "parallel": _adapt_in_parallel}


def _put(model: nn.Module, path: str, adapter: nn.Module, style: str) -> None:
    if style in _POST_STYLES:
        AdaptedOutput.put(submodule(model, path), adapter, style)
    else:
        _insert(model, path, adapter, style)
