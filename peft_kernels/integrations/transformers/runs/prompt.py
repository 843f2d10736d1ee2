"""A model's forward with a soft prompt: hooks that replace its inputs, and what rows have which.

A forward of a decoder or an encoder runs in one of two ways, which :class:`PromptRun` chooses:

    in the rows   the prompt's embeddings stand among the text's; see _prompt_rows.py
    as a prefix   the prompt runs by itself, and the rows attend to it; see _prompt_prefix.py

In an encoder-decoder the encoder has the prompt in its rows, and the decoder's mask of the
encoder's places is lengthened, so that ``generate`` may call the encoder by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.calls.carried import Carried, keep_apart, stop_keeping_apart, unwrap, wrap
from peft_kernels.integrations.transformers.attention import guard
from peft_kernels.integrations.transformers.attention.prefixed import (
    SOURCE,
    Prefixes,
    begins_recorded,
    set_state,
)
from peft_kernels.integrations.transformers.forwards import parameters, past_length
from peft_kernels.integrations.transformers.host import check_takes_embeddings
from peft_kernels.integrations.transformers.places import attention_places
from peft_kernels.integrations.transformers.row_ids import RowIds, rows_of
from peft_kernels.integrations.transformers.runs.in_front import (
    carry_state,
    decoder_of,
    inputs_for_prefix,
    why_not_now,
    why_rows_matter,
)
from peft_kernels.integrations.transformers.runs.in_rows import (
    Trim,
    cached_inputs,
    encoder_mask,
    holds_prompt,
    inputs_in_rows,
    mark_cache,
)
from peft_kernels.modules.hooks import PROMPT_HOOK, remove_hooks

_STACK = "_prompt_stack_of"


@dataclass
class Frame:
    """What a running forward has to do to its outputs."""

    trim: Trim | None = None
    marks: bool = False  # whether its cache holds the prompt
    as_tuple: bool = False


class PromptRun:
    """A prompt in a model.

    Args:
        model: the model that is called.
        prompt: a :class:`PromptTuning` or :class:`PTuning`.
        as_prefix: as of :func:`add_prompt`.
    """

    def __init__(self, model: Any, prompt: Any, as_prefix: str | bool) -> None:
        self.prompt, self.as_prefix = prompt, as_prefix
        self.position: str = getattr(prompt, "position", "front")
        self.length: int = prompt.length
        self.row_ids = RowIds("task_ids", getattr(prompt, "tasks", 1))
        self.model = model
        self.embedding()  # raises unless it has the prompt's features
        self.decoder: nn.Module | None = None  # that runs the prompt where it is a prefix
        self.first_position, self.room = _learned_positions(model)
        self.in_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
        check_takes_embeddings(model)
        # A causal head's labels are shifted, so a soft token answers for the text's first.
        self.is_shifted = not self.in_encoder and bool(model.can_generate())
        self.obstacle: str | None = "as_prefix is False"
        # Within generate, the prompt's keys and values.
        self.kept: Carried[dict[Any, Any]] = Carried("the generation with a prompt")
        self.frames: Carried[Frame] = Carried("the forward with a prompt")

    def embedding(self) -> nn.Module:
        """The model's, which may be set to another one at any time."""
        embedding = self.model.get_input_embeddings()
        width = getattr(embedding, "embedding_dim", self.prompt.dim)
        if width != self.prompt.dim:
            raise ValueError(
                f"prompt has {self.prompt.dim} features, and the model's embeddings {width}"
            )
        return embedding

    def prompts(self) -> Tensor:
        """``[P, L, d]``"""
        return self.prompt.prompts()

    def embedded(self, inputs: dict[str, Any]) -> Tensor:
        """The text's embeddings ``[B, S, d]``, which no longer are among the inputs."""
        ids, given = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        return self.embedding()(ids) if given is None else given

    def ids_of(self, text: Tensor) -> Tensor | None:
        """Each row's prompt among :meth:`prompts`, for a batch of the text's rows."""
        ids = self.row_ids.of_batch(text.shape[0], text.device)
        self.row_ids.check_given(ids)
        if getattr(self.prompt, "ensemble", 1) > 1:
            return self.prompt.members(text, ids)
        return ids

    # -- how

    def runs_as_prefix(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether this forward takes the prompt as a prefix."""
        reason = self.obstacle or why_not_now(model, inputs, self.as_prefix is True)
        reason = reason or self._why_rows_matter(model)
        if reason and self.as_prefix is True:
            raise ValueError(f"as_prefix can't be True for this forward: {reason}")
        return reason is None

    def _why_rows_matter(self, model: nn.Module) -> str | None:
        """All of the model is looked through, which takes as long as a layer: once a generation."""
        kept = self.kept.get()
        if kept is None:
            return why_rows_matter(model)
        if "rows" not in kept:
            kept["rows"] = why_rows_matter(model)
        return kept["rows"]


# ---- hooks: functions of the module, so that a copied model has its own --------------------------


def attach(model: Any, run: PromptRun) -> None:
    """Puts the hooks into the model."""
    stacks: list[tuple[Any, Any]] = []
    if run.in_encoder:
        stacks = [(model.get_encoder(), _before_encoder), (model.get_decoder(), _before_decoder)]
    elif run.obstacle is None:
        run.decoder = decoder_of(model)
    model.__dict__[PROMPT_HOOK] = run
    before = _before_both if run.in_encoder else _before
    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(_after)
    keep_apart(model)
    if callable(getattr(model, "generate", None)):
        wrap(model, "generate", _generate)
    for stack, hook in stacks:
        stack.__dict__[_STACK] = run
        stack.register_forward_pre_hook(hook, with_kwargs=True)
    if run.decoder is not None:
        for place in attention_places(model):
            place.module.__dict__[SOURCE] = _no_forward
            guard.watch(place.module, place.path)
    elif not run.in_encoder:
        for layer in _first_layers(_text_part(model, run.embedding())):
            layer.__dict__[_STACK] = run
            layer.register_forward_pre_hook(_within_forward)


def detach(model: nn.Module) -> None:
    """Takes out what :func:`attach` put in."""
    for module in model.modules():
        remove_hooks(module, (*_HOOKS, *guard.HOOKS))
        guard.unwatch(module)
        for name in (PROMPT_HOOK, _STACK):
            module.__dict__.pop(name, None)
    stop_keeping_apart(model)
    unwrap(model, "generate", _generate)


def _no_forward() -> None:
    raise RuntimeError(
        "an attention layer ran outside of its model's forward, where the prompt isn't known: call "
        "the model that has the prompt, and checkpoint by its gradient_checkpointing_enable; or "
        "add the prompt with as_prefix=False"
    )


def _text_part(model: nn.Module, embedding: nn.Module) -> nn.Module:
    """The smallest part of the model that has the embedding and layers: not its vision tower."""
    path = next(name for name, module in model.named_modules() if module is embedding)
    while path:
        path = path.rpartition(".")[0]
        part = model.get_submodule(path)
        if any(isinstance(module, nn.ModuleList) for module in part.modules()):
            return part
    return model


def _first_layers(part: nn.Module) -> list[nn.Module]:
    """The first of each outermost list of layers: what runs whenever the part computes."""
    found: list[nn.Module] = []
    for child in part.children():
        if isinstance(child, nn.ModuleList):
            found += list(child.children())[:1]
        else:
            found += _first_layers(child)
    return found


def _within_forward(module: Any, args: tuple) -> None:
    run: PromptRun = module.__dict__[_STACK]
    # A backward that computes a checkpointed layer again has its inputs with the prompt in them.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return
    if run.frames.top() is None:
        raise RuntimeError(
            "a layer ran outside of a call of the model that has the prompt, which would be left "
            "out: call that model itself, model(...), and neither its forward() nor a part of it"
        )


def _generate(
    model: Any, proceed: Callable, *args: Any, task_ids: Any = None, **kwargs: Any
) -> Any:
    """Around the model's generate: a row's copies (beams, several sequences) have its prompt."""
    run: PromptRun = model.__dict__[PROMPT_HOOK]
    cache = kwargs.get("past_key_values")
    if past_length(cache) and holds_prompt(cache):
        raise ValueError(
            "past_key_values must be empty in generate where the prompt stands in the rows, which "
            f"would take its {run.length} places for the text's; as a prefix it has none"
        )
    with run.kept.within({}), run.row_ids.generating(task_ids, rows_of(args, kwargs)):
        return proceed(*args, **kwargs)


def _before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    run: PromptRun = module.__dict__[PROMPT_HOOK]
    frame = _begin(run, module)
    if begins_recorded(module):
        return None
    inputs = _named(module, args, kwargs)
    run.row_ids.begin_call(inputs.pop("task_ids", None))
    if run.obstacle is None:
        set_state(Prefixes({}))
        if torch.is_grad_enabled() and module.training:
            carry_state(module)
    frame.as_tuple = not _returns_dict(module, inputs)
    inputs["return_dict"] = True
    template = inputs.pop("template", None)
    past = past_length(inputs.get("past_key_values"))
    if past and holds_prompt(inputs["past_key_values"]):
        return (), cached_inputs(run, module, inputs)
    if template is None and run.runs_as_prefix(module, inputs):
        return (), inputs_for_prefix(run, module, inputs, frame)
    if past:
        raise ValueError(
            "past_key_values must be empty, or be filled by a forward of this model with the prompt"
        )
    frame.marks = True
    if (cache := inputs.get("past_key_values")) is not None:
        if run.kept.get() is not None and getattr(cache, "is_compileable", False):
            raise ValueError(
                "cache_implementation must be that of a cache that grows ('dynamic') where the "
                "prompt stands in the rows: one of fixed size has no places for it"
            )
        mark_cache(cache)
    return (), inputs_in_rows(run, module, inputs, frame, template)


def _before_both(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Of an encoder-decoder: its stacks do the rest, and need a mask to lengthen."""
    run: PromptRun = module.__dict__[PROMPT_HOOK]
    _begin(run, module)
    inputs = _named(module, args, kwargs)
    run.row_ids.begin_call(inputs.pop("task_ids", None))
    given = [inputs.get(name) for name in ("input_ids", "inputs_embeds")]
    text = next((x for x in given if x is not None), None)
    if text is not None and inputs.get("attention_mask") is None:
        inputs["attention_mask"] = text.new_ones(text.shape[:2], dtype=torch.long)
    return (), inputs


def _before_encoder(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    run: PromptRun = module.__dict__[_STACK]
    return (), inputs_in_rows(run, module, _named(module, args, kwargs))


def _before_decoder(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    run: PromptRun = module.__dict__[_STACK]
    return (), encoder_mask(run, _named(module, args, kwargs))


def _after(module: Any, args: tuple, output: Any) -> Any:
    run: PromptRun = module.__dict__[PROMPT_HOOK]
    frame = run.frames.get()
    assert frame is not None
    if frame.marks and "past_key_values" in output:
        mark_cache(output.past_key_values)
    if frame.trim is not None:
        output = frame.trim.outputs(output)
    return output.to_tuple() if frame.as_tuple else output


_HOOKS = (_before, _before_both, _before_encoder, _before_decoder, _after, _within_forward)


def _begin(run: PromptRun, module: nn.Module) -> Frame:
    if run.model is not module:
        raise RuntimeError(
            "the model was copied for this forward, as nn.DataParallel does, and the prompt is "
            "another model's: use DistributedDataParallel, or add the prompt to the copy"
        )
    frame = Frame()
    run.frames.push(frame)
    return frame


def _named(module: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(parameters(module.__class__), args, strict=False)), **kwargs}


def _returns_dict(module: Any, inputs: dict[str, Any]) -> bool:
    asked = inputs.get("return_dict")
    if asked is not None:
        return bool(asked)
    return module.config.return_dict and not getattr(module.config, "torchscript", False)


def _learned_positions(model: Any) -> tuple[int, int | None]:
    """The id of the first position, and how many a learned table has; None without a table."""
    base = model.base_model
    embeddings = getattr(base, "embeddings", None)
    padding, counted = (getattr(embeddings, x, None) for x in ("padding_idx", "position_ids"))
    first = 0 if padding is None else padding + 1
    if padding is None and isinstance(counted, Tensor) and counted.numel():
        first = int(counted.flatten()[0])  # 2 in Nystromformer
    tables = ("wpe", "position_embeddings", "embed_positions")
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in tables and isinstance(module, nn.Embedding):
            return first, module.num_embeddings - getattr(module, "offset", 0)
    return first, None
