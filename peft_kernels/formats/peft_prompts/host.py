"""The model that a prompt is for: its task, its sizes, and the modules trained with the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from peft_kernels.formats.peft_prompts.config import SEQ_2_SEQ
from peft_kernels.integrations.transformers.places import attention_places
from peft_kernels.integrations.transformers.prefix import check_fits
from peft_kernels.modules.bases import check_memory
from peft_kernels.modules.names import plain_modules, plain_name
from peft_kernels.nn.p_tuning import PTuning
from peft_kernels.nn.prefix_tuning import PrefixTuning
from peft_kernels.nn.prompt_tuning import PromptTuning

Prompt = PromptTuning | PTuning | PrefixTuning
MODULE_PREFIX = "base_model."

# PEFT's task types, and the table of transformers' that has their models' classes.
TASK_TYPES = {
    SEQ_2_SEQ: "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}


def checked_task_type(task_type: str | None, model: nn.Module | None) -> str:
    """The task type that was given, or that the model's class tells.

    Raises:
        ValueError: an unknown one, or none to be found.
    """
    if task_type is not None:
        if task_type not in TASK_TYPES:
            raise ValueError(f"task_type must be of {', '.join(TASK_TYPES)}; got {task_type!r}")
        return task_type
    if model is None:
        raise ValueError(
            "task_type must be given, or model, which tells it: without one PEFT loads the folder "
            "and leaves the prompt out"
        )
    classes = {kind.__name__ for kind in type(model).__mro__}
    for found, table in TASK_TYPES.items():
        for names in getattr(modeling_auto, table).values():
            if classes & {names} if isinstance(names, str) else classes & {*names}:
                return found
    raise ValueError(
        f"task_type must be given for {type(model).__name__}: of {', '.join(TASK_TYPES)}"
    )


def host_fields(model: Any) -> dict[str, Any]:
    """What a prompt's config tells of its model: PEFT fills in what is None."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    return {
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "num_attention_heads": getattr(text, "num_attention_heads", None),
        "num_layers": getattr(text, "num_hidden_layers", None),
    }


def module_tensors(
    model: nn.Module | None, names: Iterable[str], asked: Iterable[str]
) -> dict[str, Tensor]:
    """The tensors of the model's modules whose names end so, by PEFT's keys."""
    names = tuple(names)
    if not names:
        return {}
    if model is None:
        raise ValueError(f"model must be given: the folder is to have its {', '.join(names)}")
    paths = list(plain_modules(model))
    for name in asked:
        if not any(path.endswith(name) for path in paths):
            raise ValueError(f"modules_to_save must be modules of the model; it has no {name!r}")
    owners = tuple(f"{path}." for path in paths if path.endswith(names))
    return {
        MODULE_PREFIX + key: tensor
        for key, tensor in _state(model).items()
        if key.startswith(owners)
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(model, key): tensor for key, tensor in model.state_dict().items()}


def check_model(module: Prompt, model: Any) -> None:
    if isinstance(module, PrefixTuning):
        check_fits(module.layers, attention_places(model))
        return
    width = model.get_input_embeddings().weight.shape[1]
    if width != module.dim:
        raise ValueError(
            f"model must have embeddings of {module.dim} features, as the prompt; it has {width}"
        )


@torch.no_grad()
def load_modules(model: nn.Module | None, tensors: Mapping[str, Tensor]) -> None:
    """Copies the tensors into the model's, when all of them fit."""
    if not tensors:
        return
    if model is None:
        names = sorted({key.removeprefix(MODULE_PREFIX).rpartition(".")[0] for key in tensors})
        raise ValueError(f"model must be given: the folder has {', '.join(names)} of it too")
    state = _state(model)
    for key, tensor in tensors.items():
        found = state.get(key.removeprefix(MODULE_PREFIX))
        if found is None or found.shape != tensor.shape:
            has = "none" if found is None else f"{list(found.shape)}"
            raise ValueError(
                f"model must have {key.removeprefix(MODULE_PREFIX)} {list(tensor.shape)}, as the "
                f"folder; it has {has}"
            )
        check_memory(found, key.removeprefix(MODULE_PREFIX))
    for key, tensor in tensors.items():
        state[key.removeprefix(MODULE_PREFIX)].copy_(tensor)
