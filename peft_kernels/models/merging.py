"""What is done to all LoRALinear layers of a model at once: merged, taken out, turned off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peft_kernels.calls.off import turned_off
from peft_kernels.models.fast_paths import choose_fast_paths, has_adapters
from peft_kernels.models.in_place import check_in_place, let_go
from peft_kernels.models.input_grads import let_gradients_be
from peft_kernels.models.modules_to_save import forget
from peft_kernels.models.quantisation import tell_dense
from peft_kernels.models.resizing import choose_resizing
from peft_kernels.models.swap import Model, lora_layers_in, named, replace_modules
from peft_kernels.modules.checks import check_module
from peft_kernels.modules.fully_sharded import is_gathered, reshard
from peft_kernels.modules.hooks import PREFIX_HOOK, PROMPT_HOOK
from peft_kernels.modules.names import plain_modules, unwrapped
from peft_kernels.modules.replaced import check_stored, fault_of_replacement
from peft_kernels.nn._gathered import check_can_leave
from peft_kernels.nn.lora import LoRALinear
from peft_kernels.nn.lora_codes import QuantizedLoRALinear
from peft_kernels.nn.multi_lora import MultiLoRALinear

_SOFT_PROMPTS = (PREFIX_HOOK, PROMPT_HOOK)


def merge(model: nn.Module, *, safe: bool = True, requantize: bool = False) -> dict[str, float]:
    """Merges every LoRALinear of the model, so that each costs what its base costs.

    Layers that are merged already stay so. :func:`unmerge` has every bit of the base back. In a
    model of fully_shard's all processes call it, each for its shards. The
    model's state dict remains the base's with the adapters beside it, and whoever takes it is
    warned: :func:`unload` is what makes a plain model with the merged weights.

    Args:
        model: a model with LoRALinear layers; may be wrapped (DistributedDataParallel,
            torch.compile).
        safe: first check that each merged weight is finite.
        requantize: put what is merged over a weight in codes into codes again, which has an error
            (:class:`peft_kernels.nn.QuantizedLoRALinear`); without, it becomes a dense weight.

    Returns:
        By name, the error of each layer that is in codes again. It is the norm of what the new
        codes miss of the merged weight, over that weight's. Other layers have none.

    Raises:
        ValueError: there is no LoRALinear; ``safe``, and a merged weight isn't finite; a weight
            that fully_shard holds is tied to another module's.
        RuntimeError: a weight is pruned, parametrized or the like, or in codes that fully_shard
            holds.
        TypeError: ``requantize``, and the codes are of a kind that can't be written.

    Nothing is changed when one is raised.
    """
    layers = lora_layers(model)
    reshard(model)
    _check_shards_untied(model)
    done: list[LoRALinear] = []
    try:
        for name, layer in layers.items():
            if not layer.merged:
                with named(name):
                    layer.merge(safe, requantize=requantize)
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    found = {
        name: layer.requantization_error
        for name, layer in layers.items()
        if isinstance(layer, QuantizedLoRALinear)
    }
    return {name: error for name, error in found.items() if error is not None}


def unmerge(model: nn.Module) -> None:
    """Puts the base Parameter back in every LoRALinear of the model that is merged.

    Raises:
        ValueError: there is no LoRALinear.
        RuntimeError: a weight was pruned or parametrized since. Nothing is changed then.
    """
    layers = lora_layers(model)
    reshard(model)
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    for name, layer in merged.items():
        with named(name):
            check_stored(layer, own=["weight"])
    for layer in merged.values():
        layer.unmerge()


def unload(model: Model, merge: bool) -> Model:
    """Puts the model's own linear layers back in place of its LoRALinear layers.

    They are the objects that :func:`peft_kernels.swap_linear` replaced while anything still refers
    to those, or new ones like them; with the layers' hooks, buffers and training mode. All
    Parameters stay frozen. What is saved afterwards is a plain model: loaded again, it computes
    what this one does.

    Args:
        model: a model with LoRALinear layers; may be wrapped (DistributedDataParallel,
            torch.compile).
        merge: whether the layers' updates go into their weights, or are dropped, which leaves the
            base model, merged before or not.

    Returns:
        ``model`` itself; of a LoRALinear its plain layer.

    Raises:
        ValueError: there is no LoRALinear. With ``merge``: a merged weight isn't finite, or a
            weight is tied to another module's: once merged the two differ, and a model that ties
            them would lose one.
        TypeError: a layer was given another forward, was compiled by itself, parametrized, pruned
            or the like.
        RuntimeError: a weight is in codes that fully_shard holds; a layer was replaced by something
            else.

    Nothing is changed when one is raised.
    """
    layers = lora_layers(model)
    check_in_place(model)
    for name, layer in layers.items():
        kind = QuantizedLoRALinear if isinstance(layer, QuantizedLoRALinear) else LoRALinear
        if fault := fault_of_replacement(layer, kind):
            raise TypeError(f"{name or 'model'} {fault}")
        check_can_leave(name or "model", layer)
    if merge:
        _check_untied(model, layers)
        _merge(model)
    plain: dict[nn.Module, nn.Module] = {
        layer: layer.plain(merged=merge) for layer in layers.values()
    }
    let_go(model, plain)
    replace_modules(model, plain)
    if any(isinstance(layer, QuantizedLoRALinear) for layer in layers.values()):
        tell_dense(model)
    choose_fast_paths(model)
    choose_resizing(model)
    forget(model)
    if not has_adapters(model):
        let_gradients_be(model)
    return plain.get(model, model)  # type: ignore[return-value]


_merge = merge  # unload's argument has its name


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what it would without its adapters: a reference's logits, say.

    ``with disabled(model), torch.no_grad(): reference = model(**batch).logits``

    That holds for forwards of this thread, or asyncio task, alone: others go on with their
    adapters, and ``contextvars.copy_context()`` takes it along. Merged or not, nothing is written.
    What is turned off: LoRALinear and MultiLoRALinear layers, and the bottleneck adapters of
    :mod:`peft_kernels.integrations.transformers`; prefixes and prompts aren't. A backward that
    computes forwards again (gradient checkpointing) belongs inside too.

    Raises:
        ValueError: the model has none of these, has a prefix or a prompt beside them, or is wrapped
            in DataParallel.
        RuntimeError: in a forward, the block was left in the thread or task that this one was
            started by.
    """
    check_module("model", model)
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError(
            "model must not be wrapped in DataParallel, whose threads know nothing of this; call "
            "the model inside it"
        )
    if any(hook in vars(module) for module in model.modules() for hook in _SOFT_PROMPTS):
        raise ValueError(
            "model must have no prefix or prompt, which would stay on; take it out first, with "
            "remove_prefix or remove_prompt"
        )
    modules = [module for module in unwrapped(model).modules() if _can_be_off(module)]
    if not modules:
        raise ValueError("model must have adapters that can be disabled; it has none")
    with turned_off(modules):
        yield


def _can_be_off(module: nn.Module) -> bool:
    return isinstance(module, (LoRALinear, MultiLoRALinear)) or "adapter" in module._modules


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters train, as PEFT's method of that name does.

    ``trainable params: 294,912 || all params: 109,777,152 || trainable%: 0.2686``. A tied Parameter
    counts once, and a merged layer's weight, which is there twice, too; a weight in codes as many
    times as it has values.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    merged = {id(layer.weight) for layer in layers if layer.merged}
    in_codes = {
        id(layer.base_weight): layer.out_features * layer.in_features
        for layer in layers
        if isinstance(layer, QuantizedLoRALinear)
    }
    counted = [p for p in model.parameters() if id(p) not in merged]
    total = sum(in_codes.get(id(p), p.numel()) for p in counted)
    trainable = sum(p.numel() for p in counted if p.requires_grad)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers by name, the model itself included; or a ValueError."""
    inner = unwrapped(model)
    layers = lora_layers_in(model)
    if not layers:
        raise ValueError(f"model must have LoRALinear layers; it has none{_hint(inner)}")
    return layers


def _hint(model: nn.Module) -> str:
    if any(isinstance(module, MultiLoRALinear) for module in model.modules()):
        return ", but those of an AdapterPool, whose detach() puts the model's own layers back"
    if hasattr(model, "peft_config"):
        return ", but PEFT's, which have methods of their own, such as merge_and_unload()"
    return " (swap_linear and load_adapter put them in)"


def _check_untied(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    for name, other in _tied(model, layers):
        raise ValueError(
            f"{name}.weight is tied to that of {other}; merged, the two differ, and a "
            "model that ties them would lose one. Keep the adapter (merge(), save_adapter()) "
            f"or untie them first: unmerge(model), {name}.weight = "
            f"nn.Parameter({name}.weight.clone(), False), and in transformers "
            "config.tie_word_embeddings = False"
        )


def _check_shards_untied(model: nn.Module) -> None:
    sharded = {n: one for n, one in lora_layers(model).items() if is_gathered(one)}
    for name, other in _tied(model, {n: one for n, one in sharded.items() if not one.merged}):
        raise ValueError(
            f"{name}.weight is tied to that of {other}, and fully_shard holds one for both, so "
            "that both would be merged: untie them before you shard the model (in transformers "
            "config.tie_word_embeddings = False), or merge before"
        )


def _tied(model: nn.Module, layers: dict[str, LoRALinear]) -> Iterator[tuple[str, str]]:
    """The layers whose weight other modules have too, each with the first of those."""
    holders: dict[int, list[str]] = {}
    for name, module in plain_modules(model).items():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        others = [other for other in holders[id(layer.base_weight)] if other != name]
        if others:
            yield name, others[0]
