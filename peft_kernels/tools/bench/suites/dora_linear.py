"""What dora_linear is measured on: cases with the ratio they must reach, and its rivals.

Every ratio is to the bare frozen layer, ``F.linear``, in float32 on a CPU and in the case's own
dtype on a GPU; with a backward, to the bare layer's forward and backward to x. A step of training
finds A and B changed, so that with a backward the norm is computed anew; a forward alone finds it
kept.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import _library
from peft_kernels.ops.dora_linear import dora_linear, dora_norm, dora_squares, example_inputs
from peft_kernels.tools.bench.case import BaseCase
from peft_kernels.tools.bench.implementation import Implementation, copy_values, from_module

SHAPE = "m x n x k"
BARE = "bare layer"
FUSED = "peft_kernels"
RIVALS = ("reference", "peft")
SCALE = 2.0
DROPOUT_P = 0.1


@dataclass(frozen=True)
class Case(BaseCase):
    """``x [m, k]`` through a frozen ``weight [n, k]`` and a DoRA adapter of rank r."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    r: int = 16

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def target(self) -> float | None:
        """The highest ratio allowed, or None where none is set."""
        return TARGETS.get(self)


_SHAPES = ((1, 2048, 2048), (32, 1024, 1024), (512, 2048, 2048))
TARGETS: dict[Case, float | None] = {
    **{
        Case(*shape, dtype, backward): None
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
        for shape in _SHAPES
    },
    Case(512, 2048, 2048): 1.06,
    Case(512, 2048, 2048, backward=True): 1.15,
}
CASES = tuple(TARGETS)


def cases(
    shapes: Iterable[tuple[int, int, int]] | None, dtype: torch.dtype, backward: bool
) -> list[Case]:
    """The given shapes, or the suite's own, in one dtype and direction."""
    if shapes is not None:
        return [Case(*shape, dtype=dtype, backward=backward) for shape in shapes]
    return [c for c in CASES if c.dtype is dtype and c.backward is backward]


# ---- implementations -------------------------------------------------------------------------


def implementations(
    case: Case,
    *,
    device: torch.device | str = "cpu",
    dropout_p: float = 0.0,
    compiled: bool = False,
) -> dict[str, Implementation]:
    """The bare layer, ours and its rivals, on the same values. Peers take part where installed."""
    inputs = _inputs(case, device)
    found = {
        BARE: _bare(inputs, case.bare_dtype(device)),
        FUSED: _ours(inputs, case.backward, dropout_p, "auto"),
        "reference": _ours(inputs, case.backward, dropout_p, "reference"),
    }
    if compiled:
        reference = found["reference"]
        found["torch.compile"] = replace(reference, forward=torch.compile(reference.forward))
    if importlib.util.find_spec("peft"):
        found["peft"] = _peft(inputs, dropout_p)
    return found


def exact(case: Case, *, device: torch.device | str = "cpu") -> Implementation:
    """The reference on the same values in float64."""
    inputs = vars(_inputs(case, device))
    wide = SimpleNamespace(**{name: tensor.double() for name, tensor in inputs.items()})
    return _ours(wide, case.backward, 0.0, "reference")


def _inputs(case: Case, device: torch.device | str) -> SimpleNamespace:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": case.dtype, "adapter_dtype": torch.float32}
    return SimpleNamespace(
        **example_inputs(case.m, case.n, case.k, case.r, device=device, **options)
    )


def _bare(inputs, dtype: torch.dtype) -> Implementation:
    """The frozen layer alone."""
    x, weight, bias = (t.to(dtype) for t in (inputs.x, inputs.weight, inputs.bias))
    return Implementation(lambda x: F.linear(x, weight, bias), x, (), (weight, bias))


def _ours(inputs, backward: bool, dropout_p: float, backend: str) -> Implementation:
    a, b, magnitude = (
        tensor.detach().requires_grad_()
        for tensor in (inputs.lora_a, inputs.lora_b, inputs.magnitude)
    )
    weight, bias = inputs.weight, inputs.bias
    squares = dora_squares(weight)
    kept = dora_norm(weight, a, b, SCALE, squares)

    def forward(x: Tensor) -> Tensor:
        norm = dora_norm(weight, a, b, SCALE, squares) if backward else kept
        with _library.backend(backend):
            return dora_linear(
                x, weight, a, b, magnitude, bias=bias, scale=SCALE, norm=norm, dropout_p=dropout_p
            )

    return Implementation(forward, inputs.x, (a, b, magnitude), (weight, bias))


def _peft(inputs, dropout_p: float) -> Implementation:
    from peft import LoraConfig, inject_adapter_in_model

    r = inputs.lora_a.shape[0]
    config = LoraConfig(
        r=r, lora_alpha=SCALE * r, lora_dropout=dropout_p, use_dora=True, target_modules=["layer"]
    )
    model = inject_adapter_in_model(config, nn.ModuleDict({"layer": _linear(inputs)}))
    layer: Any = model.get_submodule("layer").to(inputs.x.device)
    copy_values(layer.lora_A["default"].weight, inputs.lora_a)
    copy_values(layer.lora_B["default"].weight, inputs.lora_b)
    copy_values(layer.lora_magnitude_vector["default"].weight, inputs.magnitude)
    return from_module(layer, inputs.x)


def _linear(inputs) -> nn.Linear:
    n, k = inputs.weight.shape
    layer = nn.Linear(k, n, device="meta")
    layer.weight = nn.Parameter(inputs.weight, requires_grad=False)
    layer.bias = nn.Parameter(inputs.bias, requires_grad=False)
    return layer
