"""Linear layers of a model put into codes, by this package's own quantiser."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peft_kernels.models.swap import Model, named, replace_modules
from peft_kernels.models.targets import required_targets
from peft_kernels.modules.bases import check_bases
from peft_kernels.nn.quantized_linear import QuantizedLinear


def quantize_linear(
    model: Model,
    target_modules: str | Iterable[str] = "all-linear",
    kind: str = "nf4",
    *,
    block: int = 64,
    nested: bool = True,
    by: str = "row",
    exclude_modules: str | Iterable[str] | None = None,
) -> Model:
    """Replaces the chosen linear layers of ``model`` by a QuantizedLinear of each, in place.

        peft_kernels.quantize_linear(model, "all-linear", "nf4")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        peft_kernels.accelerate(model)

    Their weights are in codes from then on (:func:`peft_kernels.ops.quantize`), those of
    bitsandbytes where the kind is its; biases, hooks and training modes are theirs.

    Args:
        model: any module; the layers to replace are below it.
        target_modules, exclude_modules: which layers, as of :func:`peft_kernels.swap_linear`:
            ``"all-linear"`` is every linear layer but the output embeddings.
        kind: ``"nf4"``, ``"fp4"``, ``"int8"`` or ``"fp8"``.
        block, nested, by: as of :func:`peft_kernels.ops.quantize`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a pattern of ``target_modules`` that selects nothing, a value out of range, a
            layer whose weight is another module's too.
        TypeError: a target that isn't a linear layer of floats.

    Nothing is changed when one is raised.
    """
    targets = required_targets(model, target_modules, exclude_modules=exclude_modules)
    check_bases(model, targets, takes_values=True)
    _check_alone(model, targets)
    swapped: dict[nn.Module, nn.Module] = {}
    for name, module in targets.items():
        with named(name):
            swapped[module] = QuantizedLinear.from_linear(
                module, kind, block=block, nested=nested, by=by
            )
    replace_modules(model, swapped)
    return model


def _check_alone(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Raises a ValueError for a weight that would be in codes here and in floats elsewhere."""
    for name, target in targets.items():
        for other, module in model.named_modules():
            tied = any(own is target._parameters["weight"] for own in module._parameters.values())
            if tied and module is not target:
                raise ValueError(f"{name} has a weight that is {other}'s too: leave it out")
