"""The ``adapter_config.json`` of PEFT's prompt methods: what it says, and how it's written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The version of PEFT whose format is written.
VERSION = "0.21.2"
PROMPT, MULTITASK = "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"
P_TUNING, PREFIX = "P_TUNING", "PREFIX_TUNING"
SEQ_2_SEQ = "SEQ_2_SEQ_LM"

_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "peft_type": None,
    "peft_version": VERSION,
    "revision": None,
    "task_type": None,
    "token_dim": None,
}
_PROMPT: dict[str, Any] = {
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
_MULTITASK: dict[str, Any] = {
    "num_ranks": 1,
    "num_tasks": 1,
    "prompt_tuning_init_state_dict_path": None,
    "prompt_tuning_init_task": 0,
}
_P_TUNING: dict[str, Any] = {
    "encoder_dropout": 0.0,
    "encoder_hidden_size": None,
    "encoder_num_layers": 2,
    "encoder_reparameterization_type": "MLP",
}
_PREFIX: dict[str, Any] = {
    "encoder_hidden_size": None,
    "init_weights": None,
    "prefix_projection": False,
}
# Every key of a method's config, with what a trained one says by default.
FIELDS: dict[str, dict[str, Any]] = {
    PROMPT: _COMMON | _PROMPT,
    MULTITASK: _COMMON | _PROMPT | _MULTITASK,
    P_TUNING: _COMMON | _P_TUNING,
    PREFIX: _COMMON | _PREFIX,
}
_SIZES = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
_NEEDED = {
    PROMPT: ("num_virtual_tokens",),
    MULTITASK: ("num_virtual_tokens", "num_tasks", "num_ranks"),
    P_TUNING: ("num_virtual_tokens",),
    PREFIX: _SIZES,
}


def written_config(kind: str, *fields: Mapping[str, Any]) -> dict[str, Any]:
    """A whole config: each of ``fields`` overrides what is before it."""
    config = dict(FIELDS[kind])
    for given in fields:
        config |= given
    return config | {"peft_type": kind}


def checked_config(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The config with what it lacks by default, once all of it is supported.

    Raises:
        ValueError: another method's, a key that PEFT doesn't know, or a size out of range.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in FIELDS:
        hint = "; load_adapter reads LORA" if kind == "LORA" else ""
        raise ValueError(f"{where}: peft_type must be of {', '.join(FIELDS)}; got {kind!r}{hint}")
    for key, value in config.items():
        if key not in FIELDS[kind] and value:
            raise ValueError(f"{where}: {key} isn't supported and must be off; got {value!r}")
    config = {**FIELDS[kind], "num_transformer_submodules": None, **config}
    for key in {*_SIZES, *_NEEDED[kind]}:
        value = config[key]
        optional = value is None and key not in _NEEDED[kind]
        if not optional and (type(value) is not int or value < 1):
            raise ValueError(f"{where}: {key} must be a whole number above 0; got {value!r}")
    if kind == PREFIX and config["token_dim"] % config["num_attention_heads"]:
        raise ValueError(
            f"{where}: token_dim must be a multiple of num_attention_heads; got "
            f"{config['token_dim']} and {config['num_attention_heads']}"
        )
    return config | {"num_transformer_submodules": _submodules(config, where)}


def _submodules(config: Mapping[str, Any], where: Path) -> int:
    """1, or 2 where the method has rows for an encoder and a decoder, which is PEFT's default."""
    given = config["num_transformer_submodules"]
    if given is None:
        return 2 if config["task_type"] == SEQ_2_SEQ else 1
    if type(given) is not int or given not in (1, 2):
        raise ValueError(f"{where}: num_transformer_submodules must be 1 or 2; got {given!r}")
    return given
