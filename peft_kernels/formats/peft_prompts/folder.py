"""Reads and writes prompts and prefixes in Hugging Face PEFT's folder format.

    save_prompt(folder, remove_prefix(model), model=model)
    add_prefix(model, load_prompt(folder))

``adapter_config.json`` is the method's config as JSON. ``adapter_model.safetensors`` holds

    PROMPT_TUNING             prompt_embeddings [L, d]
    MULTITASK_PROMPT_TUNING   prompt_embeddings [L, d], prefix_task_cols [T, L, rank],
                              prefix_task_rows [T, rank, d]
    P_TUNING                  prompt_embeddings [L, d], the encoder's output
    PREFIX_TUNING             prompt_embeddings [L, layers * 2 * Hkv * D]: of each layer the keys,
                              then the values, head by head

and ``base_model.<name>`` for the parameters of a classifier or of other modules that were trained
with it. PEFT writes 2 L rows for an encoder-decoder; of a prompt it reads the first L, the
encoder's, and they alone are kept here.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    path_of,
    read_config,
    read_tensors,
    safetensors_of,
    write_files,
)
from peft_kernels.formats.peft_prompts.config import (
    MULTITASK,
    P_TUNING,
    PREFIX,
    PROMPT,
    SEQ_2_SEQ,
    checked_config,
    written_config,
)
from peft_kernels.formats.peft_prompts.host import (
    MODULE_PREFIX,
    Prompt,
    check_model,
    checked_task_type,
    host_fields,
    load_modules,
    module_tensors,
)
from peft_kernels.integrations.transformers.prefix import leaves_positions, window_of
from peft_kernels.models.modules_to_save import HEADS, warn_of_left_out
from peft_kernels.modules.names import unwrapped
from peft_kernels.nn._template import Input, Slots, Template
from peft_kernels.nn.p_tuning import PTuning
from peft_kernels.nn.prefix_bank import PrefixBank
from peft_kernels.nn.prefix_tuning import PrefixTuning
from peft_kernels.nn.prompt_tuning import PromptTuning

_EMBEDDINGS, _COLS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
Contents = tuple[str, dict[str, Tensor], dict[str, Any]]  # method, tensors, fields of the config


# ---- save ------------------------------------------------------------------------------------


def save_prompt(
    folder: str | os.PathLike[str],
    module: Prompt,
    *,
    model: nn.Module | None = None,
    task: int | None = None,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Writes a prompt or a prefix as PEFT would.

    ``peft.PeftModel.from_pretrained(base_model, folder)`` loads it, and so does
    :func:`load_prompt`. A folder that exists keeps its other files; each file is replaced whole or,
    when anything fails, not at all. When parameters are sharded, every process must call this.

    The folder has what the model sees, and no more: an encoder's output and not the encoder, a
    prefix' keys and values and not the MLP that made them; nor dropout, ensembles, templates,
    verbalizers and the place where a prompt stands, which in PEFT is the front, before padding.
    It can't be trained on from: for that keep the module's own ``state_dict()`` (and
    ``PrefixTuning.config()``), beside the optimizer's. Nor does it say whether a prefix shifts the
    text's positions, as PEFT's does: a prefix in ``model`` that leaves them alone, as encoders' do
    by default, gets a UserWarning, since PEFT computes something else with its folder. So does a
    prefix for a ``model`` with layers of a sliding window, which in PEFT cuts the prefix too.

    Args:
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        module: the prompt. P-tuning's slots must all stand at the front of its template, or PEFT
            computes something else.
        model: the model that it is for, which tells the task type and the sizes.
        task: which one to write where there are several: prompt e of task t of an ensemble of E is
            ``t * E + e``. A multitask prompt is written whole if None.
        task_type: PEFT's name of the task, if the model doesn't tell: "CAUSAL_LM", "SEQ_2_SEQ_LM",
            "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS" or "FEATURE_EXTRACTION".
        base_model_name_or_path: of the model; by default what the model's config says.
        modules_to_save: modules of the model, by the ends of their names, whose parameters are
            written too. A classifier's always are, as PEFT wants them. What else trains in a frozen
            model is left out, and a UserWarning names it.

    Raises:
        ValueError: several prompts and no ``task``, no or an unknown task type, no model for the
            modules to save or none that are named so, or what PEFT hasn't: a prompt after the first
            token; a prefix of an encoder-decoder, with layers left out or of several shapes.
        TypeError: another module.
        NotADirectoryError: ``folder`` is a file.
    """
    path = path_of("folder", folder)
    module, model = unwrapped(module), None if model is None else unwrapped(model)
    task_type = checked_task_type(task_type, model)
    with torch.no_grad():
        kind, tensors, fields = _contents(module, task, task_type)
    names = (*modules_to_save, *HEADS.get(task_type, ()))
    beside = module_tensors(model, names, modules_to_save)
    if model is not None:
        warn_of_left_out(model, [key.removeprefix(MODULE_PREFIX) for key in beside])
        _warn_of_positions(model, module)
        _warn_of_window(model, module)
    tensors |= beside
    given = {"task_type": task_type, "modules_to_save": list(dict.fromkeys(names)) or None}
    if base_model_name_or_path is not None:
        given["base_model_name_or_path"] = base_model_name_or_path
    config = written_config(kind, host_fields(model), fields, given)
    contents = {
        WEIGHTS_FILE: safetensors_of(tensors),
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    write_files(path, contents)


def _warn_of_positions(model: nn.Module, module: nn.Module) -> None:
    if leaves_positions(model, module):
        warnings.warn(
            "module leaves the text's positions where they are, and PEFT's prefix moves them "
            "behind itself: PEFT will compute something else with this folder. Add and train a "
            "prefix for PEFT with add_prefix(model, prefix, shift_positions=True)",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_window(model: nn.Module, module: nn.Module) -> None:
    if isinstance(module, PrefixTuning) and (size := window_of(model)) is not None:
        warnings.warn(
            f"model has layers that attend within a window of {size}: here all queries see the "
            "whole prefix, and PEFT's window cuts it, so that PEFT will compute something else "
            "with this folder wherever prefix and text are longer than the window. Run it here",
            UserWarning,
            stacklevel=3,
        )


def _contents(module: Any, task: int | None, task_type: str) -> Contents:
    if isinstance(module, PrefixTuning):
        return _prefix_contents(module, task, task_type)
    if isinstance(module, PTuning):
        sizes = {"num_virtual_tokens": module.length, "token_dim": module.dim}
        return P_TUNING, {_EMBEDDINGS: _one_of(module.prompts(), task)}, sizes | _encoder(module)
    if not isinstance(module, PromptTuning):
        raise TypeError(
            f"module must be a PromptTuning, PTuning or PrefixTuning; got {type(module).__name__}"
        )
    if module.position == "after_bos":
        raise ValueError(
            "module must have its prompt at the front, as PEFT has, or after padding; its position "
            "is 'after_bos'"
        )
    fields = {"num_virtual_tokens": module.length, "token_dim": module.dim}
    if module.task_cols is None or module.task_rows is None or task is not None:
        return PROMPT, {_EMBEDDINGS: _one_of(module.prompts(), task)}, fields
    tensors = {_EMBEDDINGS: module.prompt[0], _COLS: module.task_cols, _ROWS: module.task_rows}
    tasks, _, rank = module.task_cols.shape
    return MULTITASK, tensors, fields | {"num_tasks": tasks, "num_ranks": rank}


def _one_of(bank: Tensor, task: int | None) -> Tensor:
    """The tensor ``[P, ...]`` of this task, or of the only one."""
    count = bank.shape[0]
    if task is None and count > 1:
        raise ValueError(
            f"task must say which of {count} is to be written: a folder of PEFT's has one"
        )
    if task is not None and not 0 <= task < count:
        raise ValueError(f"task must be in [0, {count}); got {task}")
    return bank[task or 0]


def _encoder(module: PTuning) -> dict[str, Any]:
    """What made the prompt, of which PEFT reads nothing when it only runs the prompt."""
    if module.lstm is not None:
        return {
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": module.lstm.hidden_size,
            "encoder_num_layers": module.lstm.num_layers,
            "encoder_dropout": module.lstm.dropout,
        }
    first: Any = None if module.mlp is None else module.mlp[0]
    return {"encoder_hidden_size": module.dim if first is None else first.out_features}


def _prefix_contents(module: PrefixTuning, task: int | None, task_type: str) -> Contents:
    if task_type == SEQ_2_SEQ:
        raise ValueError(
            "module must be no prefix of an encoder-decoder: PEFT's has the same keys and values "
            "in two layers each"
        )
    if list(module.layers) != ["self"]:
        raise ValueError(
            "module must be a prefix of self-attention alone, as PEFT's; it has "
            f"{', '.join(module.layers)}"
        )
    layers, shapes = module.layers["self"], set(module.layers["self"])
    shape = shapes.pop()
    if shapes or shape is None:
        raise ValueError(f"module must have the same heads in all layers, as PEFT's; got {layers}")
    table, length = _one_of(module.table("self"), task), module.length
    if isinstance(module, PrefixBank):
        length = module.lengths[task or 0]
    width = shape[0] * shape[1]
    fields = {
        "num_virtual_tokens": length,
        "num_layers": len(layers),
        "num_attention_heads": shape[0],
        "token_dim": width,
        "encoder_hidden_size": width,
    }
    return PREFIX, {_EMBEDDINGS: table[:length]}, fields


# ---- load ------------------------------------------------------------------------------------


def load_prompt(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    position: str | None = None,
    template: Template | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Prompt:
    """The prompt or prefix of a folder that :func:`save_prompt` or PEFT has written.

    PEFT's folders have no encoder or MLP: P-tuning comes back as a PTuning without an encoder, a
    prefix as a flat one. Trained further they are what they then are, and not the module that was
    saved; see :func:`save_prompt`.

    In BERT's family, in T5 and in BART, too, PEFT's prefix moves the text's positions:
    ``add_prefix(model, load_prompt(folder), shift_positions=True)`` computes the same. Of an
    encoder-decoder's it's the decoder's self-attention that has it, with what PEFT reads: layer i
    the keys and values 4 i and 4 i + 1 of the 2 for each layer, counted round; the others are never
    read, nor trained.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``, or
            ``adapter_model.bin``, which is unpickled with ``weights_only=True``.
        model: the model that it is for. Heads, layers and width must fit; and the classifier and
            other modules that the folder has are loaded into it.
        position: where a prompt stands, as of :class:`peft_kernels.nn.PromptTuning`; "front" is
            PEFT's.
        template: of P-tuning, with as many slots; by default they stand before the input, in a
            causal model, as in PEFT.
        device: of the parameters; by default the model's, or the CPU beside a meta model.
        dtype: of the parameters; by default the file's.

    Returns:
        A PromptTuning (also for multitask prompt tuning), PTuning or PrefixTuning. Trainable.

    Raises:
        FileNotFoundError: ``folder`` isn't an adapter.
        ValueError: a file can't be read; it is of another method, or its tensors aren't of the
            sizes that the config says; the model is of others; it has modules of the model, and
            there is no model, or without them; a multitask prompt with a part for the decoder; a
            template with other slots, or an argument of another method.
        TypeError: a tensor has integers.

    The model is unchanged when one is raised.
    """
    path = path_of("folder", folder)
    config = checked_config(read_config(path), path / CONFIG_FILE)
    tensors = read_tensors(path)
    model = None if model is None else unwrapped(model)
    modules = {key: t for key, t in tensors.items() if key.startswith(MODULE_PREFIX)}
    own = {key: t for key, t in tensors.items() if key not in modules}
    _check_tensors(config, own, path / WEIGHTS_FILE)
    if device is None and model is not None and not next(model.parameters()).is_meta:
        device = next(model.parameters()).device
    if torch.device(device or "cpu").type == "meta":
        raise ValueError("device must have memory, for the folder's values; got meta")
    factory = {"device": device or "cpu", "dtype": dtype or own[_EMBEDDINGS].dtype}
    module = _module_of(config, own, position, template, factory)
    if model is not None:
        check_model(module, model)
    load_modules(model, modules)
    return module


def _check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    for key, shape in _shapes(config, tensors).items():
        if key not in tensors:
            raise ValueError(f"{path} must have {key} for {config['peft_type']}; it hasn't")
        if tuple(tensors[key].shape) != shape:
            raise ValueError(
                f"{path}: {key} must be {list(shape)}, as the config says; "
                f"got {list(tensors[key].shape)}"
            )
        if not tensors[key].is_floating_point():
            raise TypeError(f"{path}: {key} must be floating-point; got {tensors[key].dtype}")
    if unknown := sorted(tensors.keys() - _shapes(config, tensors)):
        raise ValueError(f"{path} must have no {unknown[0]} for {config['peft_type']}; it has")


def _shapes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """What each tensor of the config's method must be; the width is the tensor's if not said."""
    length, width = config["num_virtual_tokens"], config["token_dim"]
    if config["peft_type"] == PREFIX:
        return {_EMBEDDINGS: (length, config["num_layers"] * 2 * width)}
    rows = length * config["num_transformer_submodules"]
    if width is None:
        width = tensors[_EMBEDDINGS].shape[-1] if _EMBEDDINGS in tensors else 0
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDINGS: (rows, width)}
    if config["peft_type"] == MULTITASK:
        tasks, rank = config["num_tasks"], config["num_ranks"]
        shapes |= {_COLS: (tasks, rows, rank), _ROWS: (tasks, rank, width)}
    return shapes


def _module_of(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    position: str | None,
    template: Template | None,
    factory: dict[str, Any],
) -> Prompt:
    kind, length = config["peft_type"], config["num_virtual_tokens"]
    if position is not None and kind not in (PROMPT, MULTITASK):
        raise ValueError(f"position is of prompt tuning, and the folder is {kind}; got {position}")
    if template is not None and kind != P_TUNING:
        raise ValueError(f"template is of P-tuning, and the folder is {kind}")
    if kind == PREFIX:
        return _prefix_of(config, tensors[_EMBEDDINGS], factory)
    table = tensors[_EMBEDDINGS][:length]
    if kind == P_TUNING:
        template = template or Template([Slots(length), Input("x")], model="causal")
        if template.length != length:
            raise ValueError(
                f"template must have {length} slots, as the folder; got {template.length}"
            )
        return PTuning(template, table.shape[1], encoder=None, init=table, **factory)
    place = {"position": position or "front", **factory}
    if kind == PROMPT:
        return PromptTuning(length, table.shape[1], init=table, **place)
    return _multitask_of(config, tensors, place)


def _multitask_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], place: dict[str, Any]
) -> PromptTuning:
    if config["num_transformer_submodules"] == 2:
        raise ValueError(
            "num_transformer_submodules must be 1 for a multitask prompt, which PromptTuning has "
            "for the encoder alone; the folder's, 2, has one for the decoder"
        )
    tasks, length, rank = tensors[_COLS].shape
    init = tensors[_EMBEDDINGS]
    module = PromptTuning(length, init.shape[1], tasks=tasks, rank=rank, init=init, **place)
    assert module.task_cols is not None and module.task_rows is not None
    with torch.no_grad():
        module.task_cols.copy_(tensors[_COLS])
        module.task_rows.copy_(tensors[_ROWS])
    return module


def _prefix_of(config: Mapping[str, Any], table: Tensor, factory: dict[str, Any]) -> PrefixTuning:
    layers, heads = config["num_layers"], config["num_attention_heads"]
    if config["num_transformer_submodules"] == 2:
        table = _of_decoder(table, layers)
    shape = (heads, config["token_dim"] // heads)
    module = PrefixTuning(config["num_virtual_tokens"], [shape] * layers, **factory)
    module.fit(module.from_table(table))
    module.read_from_folder = True
    return module


def _of_decoder(table: Tensor, layers: int) -> Tensor:
    """The table ``[L, layers * 2 * Hkv * D]`` as PEFT deals it out to a decoder's self-attention.

    It puts the table behind itself and gives each layer four, two of them for the cross-attention,
    which never reads its own.
    """
    slots = table.unflatten(1, (2 * layers, -1))
    first = 4 * torch.arange(layers, device=table.device)
    read = torch.stack((first, first + 1), 1).flatten() % (2 * layers)
    return slots[:, read].flatten(1)
