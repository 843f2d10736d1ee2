"""Bottleneck adapters: what Houlsby, Pfeiffer, parallel and AdapterPlus models insert."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.modules.checks import check_choice, check_share, check_size
from peft_kernels.modules.replaced import check_all_stored
from peft_kernels.nn._drawn import Drawn
from peft_kernels.nn._factor import KeptFactor
from peft_kernels.nn._read import check_read
from peft_kernels.ops._activations import activation_name
from peft_kernels.ops.adapter import adapter

INITS = ("bert", "mam", "houlsby")
SCALES = ("learned", "channel")
STYLES = ("paper", "adapters")
# The values of the `adapters` library's seq_bn, double_seq_bn, par_bn and AdapterPlusConfig.
PRESETS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"reduction": 16, "activation": "relu"},
    "houlsby": {"reduction": 16, "activation": "silu"},
    "parallel": {"reduction": 2, "activation": "relu", "scale": 4.0, "init": "mam"},
    "adapterplus": {"reduction": 96, "activation": "gelu", "scale": "channel", "init": "houlsby"},
}
Norm = Callable[[Tensor], Tensor]


def reduced(size: int, reduction: float) -> int:
    """The bottleneck of ``size`` features at this reduction factor, at least 1."""
    if not reduction > 0:
        raise ValueError(f"reduction must be above 0; got {reduction}")
    return max(1, int(size // reduction))


def init_bottleneck_(down: nn.Linear, up: nn.Linear, init: str) -> None:
    """Draws both matrices anew, in place; biases are zero. See :class:`BottleneckAdapter`."""
    for linear in (down, up):
        nn.init.zeros_(linear.bias)
        if init == "houlsby":
            nn.init.trunc_normal_(linear.weight, std=1e-2, a=-2e-2, b=2e-2)
        elif init == "bert":
            nn.init.normal_(linear.weight, std=0.02)
    if init == "mam":
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)


def _fuses(norm: Norm | None, size: int) -> bool:
    """Whether the op can do this norm's work: a plain LayerNorm that nothing else listens to."""
    if type(norm) is not nn.LayerNorm or norm.weight is None:
        return False
    hooks = norm._forward_hooks or norm._forward_pre_hooks
    hooks = hooks or norm._backward_hooks or norm._backward_pre_hooks
    return norm.normalized_shape == (size,) and not hooks and "forward" not in vars(norm)


def _call(norm: Norm, x: Tensor) -> Tensor:
    """``norm(x)`` in the dtype of x; the weight may be wider, as in the op."""
    return norm(_widened(x, getattr(norm, "weight", None))).to(x.dtype)


def _widened(x: Tensor, weight: Tensor | None) -> Tensor:
    """x, in the dtype of ``weight`` where that is wider."""
    return x if weight is None else x.to(torch.promote_types(x.dtype, weight.dtype))


def _arguments(prefix: str, norm: Any) -> dict[str, Any]:
    """The op's arguments for a norm that fuses, or for none."""
    if norm is None:
        return {}
    parts = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
    return {f"{prefix}_{name}": value for name, value in parts.items()}


class BottleneckAdapter(KeptFactor, Drawn):
    """A bottleneck adapter (Houlsby et al. 2019), with the residuals and LayerNorms around it.

    ``y = norm(residual + scaling * dropout(act(pre_norm(x) @ down.T) @ up.T))``, biases left out,
    is one call of :func:`peft_kernels.ops.adapter`. The norms and residuals are the host's, and are
    given with each call. In a post-LayerNorm block with i the input of a sublayer, f its output, LN
    its LayerNorm (one object, used twice for Pfeiffer's) and ``x = f + i``:

        Houlsby et al. 2019       adapter(f, residual=(f, i), norm=LN)
        Pfeiffer et al. 2021      adapter(x, residual=x, pre_norm=LN, norm=LN)
        parallel, He et al. 2022  adapter(i, residual=(f, i), norm=LN)

    and in a pre-LayerNorm block, whose output is x:

        AdapterPlus, Steitz and Roth 2024    adapter(x, residual=x)

    These are what the `adapters` library computes for double_seq_bn, seq_bn, par_bn and
    AdapterPlusConfig, but for the latter's stochastic depth, which isn't offered. With
    ``residual_before_ln="post_add"`` it computes ``adapter(x, residual=x, pre_norm=LN)``, or, with
    original_ln_after, ``adapter(x, residual=(x, i), pre_norm=LN, norm=LN)``. Two defects of that
    library are not copied: its generic hooks give every layer the last layer's LayerNorm, and its
    Fuse leaves out the gate.

    The adapter's own norms and gate, where wanted, cost further passes in PyTorch:

        h   = norm_before(pre_norm(x))                      u = act(h @ down.T) @ up.T
        upd = mean over tokens of sigmoid(gate(pre_norm(x))) * scaling * dropout(u)
        y   = norm(residual + norm_after(upd))              or norm(norm_after(residual + upd))

    where the second is with ``residual_in_norm``. A host's residual that must stay out of
    ``norm_after`` is then added by the caller: ``LN(i + adapter(f, residual=f))``.

    Parameters:
        down.weight, down.bias: ``[bottleneck_size, hidden_size]``, ``[bottleneck_size]``.
        up.weight, up.bias: ``[hidden_size, bottleneck_size]``, ``[hidden_size]``.
        scaling: ``[1]`` for "learned", ``[hidden_size]`` for "channel", drawn as ones; else a float
            attribute that may be set at any time, and is ``_extra_state`` in the state dict.
        norm_before, norm_after: LayerNorms, or None.
        gate.weight, gate.bias: ``[1, hidden_size]``, ``[1]``; gate is None without gating.

    ``down`` and ``up`` are read and never called, so hooks on them don't run.

    Args:
        hidden_size: features of x and y.
        bottleneck_size: features in between, at least 1.
        activation: a name that :func:`peft_kernels.ops.adapter` knows.
        scale: the factor of the update: a number, "learned", or "channel" for one by feature.
        dropout: the share of the update's elements dropped in training, in [0, 1).
        init: how the matrices are drawn; biases are zero. "houlsby": normal of deviation 0.01, cut
            at two deviations; "bert": normal of deviation 0.02; "mam": down Kaiming-uniform with
            a = sqrt(5) and up zero. A gate is drawn as "bert" says.
        norm_before: whether the adapter has a LayerNorm of its own before ``down``.
        norm_after: whether it has one after the update.
        residual_in_norm: whether ``norm_after`` comes after the residual rather than before.
        gating: whether the update is multiplied with a learned gate, one number by sequence.
        device, dtype: of the parameters. Over float16 or bfloat16 inputs they may be float32.

    Raises:
        ValueError: a value out of range, or an unknown name.
        TypeError: a size that isn't an int.
    """

    uncalled_linears = ("down", "up", "gate")
    _factor = "scaling"
    scaling: float | Tensor
    norm_before: nn.LayerNorm | None
    norm_after: nn.LayerNorm | None
    gate: nn.Linear | None

    @torch.inference_mode(False)
    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        *,
        activation: str = "relu",
        scale: float | str = 1.0,
        dropout: float = 0.0,
        init: str = "bert",
        norm_before: bool = False,
        norm_after: bool = False,
        residual_in_norm: bool = False,
        gating: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("bottleneck_size", bottleneck_size)
        check_choice("init", init, INITS)
        number = isinstance(scale, (int, float)) and math.isfinite(scale)
        if not number and scale not in SCALES:
            raise ValueError(f"scale must be a finite number, learned or channel; got {scale!r}")
        check_share("dropout", dropout)
        if residual_in_norm and not norm_after:
            raise ValueError("residual_in_norm needs norm_after, which is False")
        self.hidden_size, self.bottleneck_size = hidden_size, bottleneck_size
        self.activation = activation_name(activation)
        self.dropout, self.init, self.residual_in_norm = float(dropout), init, residual_in_norm
        factory: Any = {"device": device, "dtype": dtype}
        self.down = nn.Linear(hidden_size, bottleneck_size, **factory)
        self.up = nn.Linear(bottleneck_size, hidden_size, **factory)
        if isinstance(scale, str):
            size = 1 if scale == "learned" else hidden_size
            self.scaling = nn.Parameter(torch.ones(size, **factory))
        else:
            self.scaling = float(scale)
        self.norm_before = nn.LayerNorm(hidden_size, **factory) if norm_before else None
        self.norm_after = nn.LayerNorm(hidden_size, **factory) if norm_after else None
        self.gate = nn.Linear(hidden_size, 1, **factory) if gating else None
        self.reset_parameters()

    @classmethod
    def from_preset(
        cls, preset: str, hidden_size: int, *, reduction: float | None = None, **overrides: Any
    ) -> BottleneckAdapter:
        """Builds the adapter with the settings that the `adapters` library has for a method.

        Args:
            preset: "pfeiffer" (a 16th of the hidden size, relu), "houlsby" (a 16th, silu),
                "parallel" (half, relu, scale 4, init "mam") or "adapterplus" (a 96th, gelu, scale
                "channel", init "houlsby"). How to call each is up to the host: see the class.
            hidden_size: features of x and y.
            reduction: hidden_size over bottleneck_size, rounded down to 1 at the least.
            overrides: arguments of the constructor.

        Raises:
            ValueError: an unknown preset, both a reduction and a bottleneck_size, or a value that
                the constructor refuses.
        """
        check_choice("preset", preset, tuple(PRESETS))
        check_size("hidden_size", hidden_size)
        settings = PRESETS[preset] | overrides
        factor = settings.pop("reduction")
        if "bottleneck_size" not in settings:
            settings["bottleneck_size"] = reduced(
                hidden_size, factor if reduction is None else reduction
            )
        elif reduction is not None:
            raise ValueError("reduction can't be given along with bottleneck_size")
        return cls(hidden_size, **settings)

    def reset_parameters(self) -> None:
        """Draws everything anew: an adapter whose update is nearly, or with "mam" exactly, zero."""
        check_all_stored(self)
        init_bottleneck_(self.down, self.up, self.init)
        if isinstance(self.scaling, Tensor):
            nn.init.ones_(self.scaling)
        for norm in (self.norm_before, self.norm_after):
            if norm is not None:
                norm.reset_parameters()
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)

    _draw = reset_parameters

    def forward(
        self,
        x: Tensor,
        residual: Tensor | tuple[Tensor, ...] | None = None,
        *,
        pre_norm: Norm | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """The adapter's output with the host's residuals and norms; see the class.

        Args:
            x: ``[..., hidden_size]``; with gating at least 2 dimensions, tokens the last but one.
            residual: of x's shape and dtype, or several, which are added up. Giving x itself costs
                no second read. None leaves the update alone.
            pre_norm: the host's norm of x on its way down; a residual x stays as it was.
            norm: the host's norm of the result. As for ``pre_norm``, an ``nn.LayerNorm`` with a
                weight and no hooks is part of the op; anything else is called.

        Returns:
            A tensor of x's shape, in the dtype of x, or in autocast's dtype under autocast.
        """
        check_read(self, "down", "up", "gate")
        terms = () if residual is None else residual if isinstance(residual, tuple) else (residual,)
        h, before = x, pre_norm
        if pre_norm is not None and (self.norm_before is not None or self.gate is not None):
            h, before = _call(pre_norm, x), None
        factor = None if self.gate is None else self._gate_of(h)
        before = before if self.norm_before is None else self.norm_before
        if before is not None and not _fuses(before, self.hidden_size):
            h, before = _call(before, h), None
        # What follows the update at once: these terms, then this norm. The gate comes before both.
        inside = terms if self.norm_after is None or self.residual_in_norm else ()
        after = norm if self.norm_after is None else self.norm_after
        fuses_after = factor is None and _fuses(after, self.hidden_size)
        y = adapter(
            h,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
            activation=self.activation,
            scale=self.scaling,
            residual=inside if factor is None else (),
            dropout_p=self.dropout if self.training else 0.0,
            **_arguments("pre_norm", before),
            **_arguments("norm", after if fuses_after else None),
        )
        if factor is not None:
            y = _added(factor.to(y.dtype) * y, inside)
        if after is not None and not fuses_after:
            y = _call(after, y)
        if self.norm_after is None:
            return y
        y = y if self.residual_in_norm else _added(y, terms)
        return y if norm is None else _call(norm, y)

    def _gate_of(self, h: Tensor) -> Tensor:
        """``[..., 1, 1]``: what each sequence's update is multiplied with."""
        assert self.gate is not None
        if h.dim() < 2:
            raise ValueError(f"x must have at least 2 dimensions with gating; got {list(h.shape)}")
        weight, bias = self.gate.weight, self.gate.bias
        return torch.sigmoid(F.linear(_widened(h, weight), weight, bias)).mean(-2, keepdim=True)

    def extra_repr(self) -> str:
        scale: Any = self.scaling
        if isinstance(scale, Tensor):
            scale = "learned" if scale.numel() == 1 else "channel"
        text = (
            f"hidden_size={self.hidden_size}, bottleneck_size={self.bottleneck_size}, "
            f"activation={self.activation}, scale={scale}, dropout={self.dropout}, "
            f"init={self.init}"
        )
        return f"{text}, residual_in_norm=True" if self.residual_in_norm else text


def _added(y: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
    for term in terms:
        y = y + term.to(y.dtype)
    return y


def stack_adapters(
    language: BottleneckAdapter,
    task: BottleneckAdapter,
    f: Tensor,
    i: Tensor,
    *,
    norm: nn.LayerNorm,
    style: str = "paper",
) -> Tensor:
    """A task adapter over a language adapter (Pfeiffer et al. 2020, "MAD-X"), in two ways.

    In a post-LayerNorm block, with ``x = f + i`` and u the update of an adapter:

        "paper"       l = f + u_language(norm(x))     y = norm(x + u_task(l))
        "adapters"    l = x + u_language(norm(x))     y = norm(l + u_task(norm(l)))

    In the paper the task adapter reads the language adapter's output as it is, and the residual of
    both is the sublayer's output f; i is added before the last LayerNorm, as it is in the block
    without adapters. The `adapters` library's Stack adds i again and applies the LayerNorm before
    the task adapter too, and keeps the language adapter's update in the sum.

    Args:
        language, task: the adapters, of the block's hidden size.
        f: ``[..., hidden_size]``, the sublayer's output.
        i: as f, the sublayer's input.
        norm: the block's LayerNorm.
        style: "paper", or "adapters" to go on with weights that were trained there.

    Raises:
        ValueError: an unknown style.
    """
    check_choice("style", style, STYLES)
    x = f + i
    if style == "paper":
        return task(language(x, residual=f, pre_norm=norm), residual=x, norm=norm)
    stream = language(x, residual=x, pre_norm=norm)
    return task(stream, residual=stream, pre_norm=norm, norm=norm)
