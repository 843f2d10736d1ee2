"""What lora_linear is measured on: cases with the ratio they must reach, and its rivals.

Every ratio is to the bare frozen layer, ``F.linear``, in float32 on a CPU and in the case's own
dtype on a GPU; with a backward, to the bare layer's forward and backward to x.
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
from peft_kernels.ops.lora_linear import example_inputs, lora_linear
from peft_kernels.tools.bench.case import BaseCase
from peft_kernels.tools.bench.implementation import Implementation, copy_values, from_module

SHAPE = "m x n x k"
BARE = "bare layer"
FUSED = "peft_kernels"
RIVALS = ("reference", "mm + addmm_", "peft", "loralib")
SCALE = 2.0
DROPOUT_P = 0.1


@dataclass(frozen=True)
class Case(BaseCase):
    """``x [m, k]`` through a frozen ``weight [n, k]`` and a rank-r adapter."""

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
        return TARGETS.get(replace(self, r=16))


_FP32_FORWARD = {
    (1, 2048, 2048): 0.62,
    (4, 1024, 1024): 0.62,
    (8, 2048, 2048): 0.66,
    (16, 1024, 1024): 0.80,
    (32, 2048, 2048): 0.76,
    (64, 1024, 1024): 0.84,
    (128, 2048, 2048): 0.72,
    (256, 1024, 1024): 0.86,
    (512, 2048, 2048): 1.00,
    (512, 1024, 1024): 1.02,
    (1024, 768, 768): 1.05,
}
_FEW_ROWS = tuple(shape for shape in _FP32_FORWARD if shape[0] <= 8)
_HALF = (torch.bfloat16, torch.float16)

TARGETS: dict[Case, float | None] = {
    **{Case(*shape): limit for shape, limit in _FP32_FORWARD.items()},
    **{Case(*s, backward=True): 1.00 if s[0] <= 256 else 1.05 for s in _FP32_FORWARD},
    **{Case(*shape, dtype): 0.62 for dtype in _HALF for shape in _FEW_ROWS},
    **{Case(512, 2048, 2048, dtype): 1.15 for dtype in _HALF},
    **{Case(*shape, dtype, backward=True): None for dtype in _HALF for shape in _FEW_ROWS},
    **{Case(512, 2048, 2048, dtype, backward=True): 1.2 for dtype in _HALF},
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
        FUSED: _ours(inputs, dropout_p, "auto"),
        "reference": _ours(inputs, dropout_p, "reference"),
        "mm + addmm_": _composition(inputs, dropout_p),
    }
    if compiled:
        composition = found["mm + addmm_"]
        found["torch.compile"] = replace(composition, forward=torch.compile(composition.forward))
    for package, build in {"peft": _peft, "loralib": _loralib}.items():
        if importlib.util.find_spec(package):
            found[package] = build(inputs, dropout_p)
    return found


def exact(case: Case, *, device: torch.device | str = "cpu") -> Implementation:
    """The reference on the same values in float64."""
    inputs = vars(_inputs(case, device))
    wide = SimpleNamespace(**{name: tensor.double() for name, tensor in inputs.items()})
    return _ours(wide, 0.0, "reference")


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


def _ours(inputs, dropout_p: float, backend: str) -> Implementation:
    a, b = _adapter(inputs)

    def forward(x: Tensor) -> Tensor:
        with _library.backend(backend):
            return lora_linear(
                x, inputs.weight, a, b, bias=inputs.bias, scale=SCALE, dropout_p=dropout_p
            )

    return Implementation(forward, inputs.x, (a, b), (inputs.weight, inputs.bias))


def _composition(inputs, dropout_p: float) -> Implementation:
    """The best that library calls do: the low-rank part is added into y by the second product."""
    a, b = _adapter(inputs)

    def forward(x: Tensor) -> Tensor:
        s = F.dropout(x, dropout_p) @ a.to(x.dtype).T
        y = F.linear(x, inputs.weight, inputs.bias)
        return y.addmm_(s, b.to(x.dtype).T, alpha=SCALE)

    return Implementation(forward, inputs.x, (a, b), (inputs.weight, inputs.bias))


def _peft(inputs, dropout_p: float) -> Implementation:
    from peft import LoraConfig, inject_adapter_in_model

    r = inputs.lora_a.shape[0]
    config = LoraConfig(r=r, lora_alpha=SCALE * r, lora_dropout=dropout_p, target_modules=["layer"])
    model = inject_adapter_in_model(config, nn.ModuleDict({"layer": _linear(inputs)}))
    layer: Any = model.get_submodule("layer").to(inputs.x.device)
    copy_values(layer.lora_A["default"].weight, inputs.lora_a)
    copy_values(layer.lora_B["default"].weight, inputs.lora_b)
    return from_module(layer, inputs.x)


def _loralib(inputs, dropout_p: float) -> Implementation:
    import loralib

    n, k = inputs.weight.shape
    r = inputs.lora_a.shape[0]
    layer = loralib.Linear(
        k, n, r=r, lora_alpha=SCALE * r, lora_dropout=dropout_p, merge_weights=False
    )
    # loralib multiplies A and B with x as they are, so all must have one dtype.
    layer = layer.to(inputs.x.device, inputs.x.dtype)
    layer.weight, layer.bias = _linear(inputs).parameters()
    copy_values(layer.lora_A, inputs.lora_a)
    copy_values(layer.lora_B, inputs.lora_b)
    return from_module(layer, inputs.x)


def _adapter(inputs) -> tuple[Tensor, Tensor]:
    a, b = inputs.lora_a.detach(), inputs.lora_b.detach()
    return a.requires_grad_(), b.requires_grad_()


def _linear(inputs) -> nn.Linear:
    n, k = inputs.weight.shape
    layer = nn.Linear(k, n, device="meta")
    layer.weight = nn.Parameter(inputs.weight, requires_grad=False)
    layer.bias = nn.Parameter(inputs.bias, requires_grad=False)
    return layer
