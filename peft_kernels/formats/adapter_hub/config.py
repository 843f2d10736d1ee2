"""The ``config`` of a folder of the `adapters` library's, and what it means here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import BottleneckAdapter
from peft_kernels.ops._activations import activation_name

# Config file, then the files of the weights: the first that is there is read.
ADAPTER_FILES = ("adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin")
FUSION_FILES = (
    "adapter_fusion_config.json",
    "model_adapter_fusion.safetensors",
    "pytorch_model_adapter_fusion.bin",
)
FLAGS = {
    "pfeiffer": {"original_ln_before": True, "is_parallel": False},
    "houlsby": {"original_ln_before": False, "is_parallel": False},
    "parallel": {"original_ln_before": False, "is_parallel": True},
    "adapterplus": {
        "original_ln_before": True,
        "original_ln_after": False,
        "residual_before_ln": False,
        "is_parallel": False,
    },
}
# What a key that is left out means; _REQUIRED has no defaults.
DEFAULTS: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights": "bert",
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "original_ln_before": False,
    "phm_layer": False,
    "residual_before_ln": True,
    "scaling": 1.0,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
_REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
# Without a bearing on a trained adapter, and so are all of the keys with phm once that is off.
_IRRELEVANT = {"architecture", "init_weights_seed", "hypercomplex_nonlinearity"}
_INITS = {"bert": "bert", "mam_adapter": "mam", "houlsby": "houlsby"}
_THEIR_ACTIVATIONS = {"gelu_tanh": "gelu_new", "identity": "linear", "leaky_relu": "leakyrelu"}
# What files without a version called the activations.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


# ---- read --------------------------------------------------------------------------------------


def checked_config(where: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the defaults for what it lacks, once all of it is offered."""
    given = header["config"]
    require(where, given, "architecture", (None,))
    if missing := [key for key in _REQUIRED if key not in given]:
        raise ValueError(f"{where}: config must have {', '.join(missing)}; it is missing")
    known = {*DEFAULTS, *_REQUIRED, *_IRRELEVANT}
    for key, value in given.items():
        if key not in known and "phm" not in key and value:
            raise ValueError(f"{where}: {key} isn't offered and must be off; got {value!r}")
    config = DEFAULTS | given
    for key in ("cross_adapter", "phm_layer", "stochastic_depth"):
        require(where, config, key, (False, None))
    for key in ("mh_adapter", "output_adapter", "ln_before", "ln_after", "use_gating"):
        require(where, config, key, (True, False))
    require(where, config, "init_weights", tuple(_INITS))
    config["leave_out"] = config["leave_out"] or []
    if not isinstance(config["leave_out"], list):
        raise ValueError(f"{where}: leave_out must be a list; got {config['leave_out']!r}")
    if "version" not in header:
        old = config["non_linearity"]
        config["non_linearity"] = _OLD_ACTIVATIONS.get(old, old)
    return config


def preset_of(where: Path, config: Mapping[str, Any]) -> str:
    """The preset of ``insert_adapters`` whose places and residuals the config asks for."""
    for key in ("is_parallel", "original_ln_before", "original_ln_after"):
        require(where, config, key, (True, False))
    if not config["original_ln_after"]:
        for key, value in (FLAGS["adapterplus"] | {"mh_adapter": False}).items():
            require(where, config, key, (value,))
        return "adapterplus"
    if config["is_parallel"]:
        preset = "parallel"
    else:
        preset = "pfeiffer" if config["original_ln_before"] else "houlsby"
        # Without original_ln_before, the residual is the sublayer's output in both cases.
        residuals = (True,) if preset == "pfeiffer" else (True, False)
        require(where, config, "residual_before_ln", residuals)
        if config["ln_after"]:
            require(where, config, "adapter_residual_before_ln", (False,))
    if preset != "houlsby":
        require(where, config, "mh_adapter", (False,))
    return preset


def overrides_of(where: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of BottleneckAdapter."""
    scale, dropout = config["scaling"], config["dropout"]
    if scale not in ("learned", "channel") and not is_number(scale):
        raise ValueError(f"{where}: scaling must be a number, learned or channel; got {scale!r}")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"{where}: dropout must be in [0, 1); got {dropout!r}")
    try:
        activation = activation_name(str(config["non_linearity"]).lower())
    except ValueError as error:
        raise ValueError(f"{where}: non_linearity isn't offered; {error}") from error
    return {
        "activation": activation,
        "dropout": dropout,
        "gating": config["use_gating"],
        "init": _INITS[config["init_weights"]],
        "norm_after": config["ln_after"],
        "norm_before": config["ln_before"],
        "scale": scale,
    }


def reduction_of(where: Path, factor: Any, layer: int) -> float:
    """The reduction factor of a layer; a mapping tells it by the layer's number or default."""
    if isinstance(factor, Mapping):
        factor = factor.get(str(layer), factor.get("default"))
    if not is_number(factor) or not factor > 0:
        raise ValueError(
            f"{where}: reduction_factor must be above 0 for layer {layer}; got {factor!r}"
        )
    return factor


def fusion_options(
    host: Any, where: Path, config: Mapping[str, Any], adapter: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of AdapterFusion."""
    for key in ("query", "key"):
        require(where, config, key, (True,))
    for key in ("residual_before", "temperature"):
        require(where, config, key, (False,))
    require(where, config, "value", (True, False))
    # With no LayerNorm before the adapters, both queries are the same.
    before = (False,) if adapter["original_ln_before"] else (True, False)
    require(where, config, "query_before_ln", before)
    dropout: Any = config.get("dropout_prob")
    if dropout is None:
        dropout = getattr(host.config, "attention_probs_dropout_prob", 0.0)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"{where}: dropout_prob must be in [0, 1); got {dropout!r}")
    return {"preset": "dynamic" if config["value"] else "static", "dropout": dropout}


def check_fusable(where: Path | str, config: Mapping[str, Any]) -> None:
    for key in ("is_parallel", "ln_after", "use_gating"):
        if config[key]:
            raise ValueError(f"{where}: {key} must be False in a fusion; got {config[key]!r}")
    require(where, config, "inv_adapter", (None,))
    require(where, config, "original_ln_after", (True,))


def require(where: Path | str, config: Mapping[str, Any], key: str, allowed: tuple) -> None:
    if config.get(key) not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise ValueError(f"{where}: {key} must be {choices}; got {config.get(key)!r}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---- write -------------------------------------------------------------------------------------


def settings_of(adapter: BottleneckAdapter) -> tuple:
    """What of the config one adapter tells."""
    if adapter.residual_in_norm:
        raise ValueError("adapters with residual_in_norm differ in the format; it must be False")
    scale: Any = adapter.scaling
    if isinstance(scale, Tensor):
        scale = "learned" if scale.numel() == 1 else "channel"
    settings = {
        "dropout": adapter.dropout,
        "init_weights": {ours: theirs for theirs, ours in _INITS.items()}[adapter.init],
        "ln_after": adapter.norm_after is not None,
        "ln_before": adapter.norm_before is not None,
        "non_linearity": _THEIR_ACTIVATIONS.get(adapter.activation, adapter.activation),
        "scaling": scale if isinstance(scale, str) else float(scale),
        "use_gating": adapter.gate is not None,
    }
    return tuple(settings.items())


def factor_for(hidden_size: int, bottleneck_size: int) -> float:
    """A reduction factor that gives this bottleneck again, once it is rounded down."""
    factor = hidden_size / bottleneck_size
    exact = int(hidden_size // factor) == bottleneck_size
    return factor if exact else hidden_size / (bottleneck_size + 0.5)


def fusion_config_of(fusion: AdapterFusion) -> tuple:
    if fusion.temperature != 1:
        raise ValueError(
            f"a fusion's temperature must be 1 in the format; got {fusion.temperature}"
        )
    value = fusion.value is not None
    config = {
        "dropout_prob": fusion.dropout,
        "key": True,
        "query": True,
        "query_before_ln": False,
        "regularization": value,
        "residual_before": False,
        "temperature": False,
        "value": value,
        "value_before_softmax": True,
        "value_initialized": value,
    }
    return tuple(config.items())


def the_one(values: set, what: str, of: str) -> Any:
    if len(values) > 1:
        raise ValueError(f"{what} must all have the same {of}; got {sorted(map(str, values))}")
    return values.pop()
