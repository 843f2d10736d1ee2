"""Prompt tuning and P-tuning in transformers' models.

    prompt = PromptTuning(20, model.config.hidden_size, tasks=3, init=...)
    add_prompt(model, prompt)                       # freezes the model
    loss = model(input_ids, attention_mask=mask, labels=labels, task_ids=tasks).loss
    model.generate(input_ids, attention_mask=mask, task_ids=tasks)
    remove_prompt(model)

A template of P-tuning's comes with its batch, whose places count the slots:

    prompt = PTuning(template, model.config.hidden_size, verbalizer=words)
    add_prompt(model, prompt)
    batch = template.encode(texts)
    scores = prompt.scores(model(template=batch).logits, batch)

With ``labels=`` the model's own loss is that of tokens: labels of the batch's ``input_ids``, or of
all places with -100 at the slots. That of classes is ``F.cross_entropy(scores, classes)``.

What the model answers is of the text's tokens, however the prompt is computed; with a template, of
all of its places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from peft_kernels.codes.layers import give_back, keep_codes
from peft_kernels.integrations.transformers.attention.checkpointing import stop_carrying
from peft_kernels.integrations.transformers.attention.pinned import unpin
from peft_kernels.integrations.transformers.attention.prefixed import SOURCE
from peft_kernels.integrations.transformers.host import having, prompt_host
from peft_kernels.integrations.transformers.places import attention_places
from peft_kernels.integrations.transformers.prefix import use_prefix_attention
from peft_kernels.integrations.transformers.runs.in_front import obstacle
from peft_kernels.integrations.transformers.runs.prompt import PromptRun, attach, detach
from peft_kernels.integrations.transformers.supported import check_transformers
from peft_kernels.models.fast_paths import has_adapters
from peft_kernels.models.freezing import freeze
from peft_kernels.modules.checks import check_kind, check_module
from peft_kernels.modules.hooks import PROMPT_HOOK
from peft_kernels.modules.names import unwrapped
from peft_kernels.nn.p_tuning import PTuning
from peft_kernels.nn.prompt_tuning import PromptTuning

CHILD = "soft_prompt"
Prompt = PromptTuning | PTuning


def add_prompt(model: nn.Module, prompt: Prompt, *, as_prefix: str | bool = "auto") -> None:
    """Freezes the model and puts a soft prompt before its text, which trains.

    The model's forward then takes what it took, ``input_ids`` or ``inputs_embeds`` of the text
    alone, and runs with the prompt among them; the attention mask, the position ids, the labels,
    ``token_type_ids`` and a span's ends are moved along. The prompt is the model's child
    ``soft_prompt``.

    Outputs are of the text: ``logits``, ``last_hidden_state`` and ``hidden_states`` have its S
    positions, with and without ``as_prefix``. (PEFT's have L + S, and so have those of a forward
    with ``template=``, whose batch counts the slots.) The loss is that of all L + S: a
    causal model's counts what the last soft token says of the text's first, behind padding too; in
    a row without a prompt that token isn't counted. Attentions and an encoder's hidden states keep
    the prompt, whose places the decoder attends to.

    Rows of several tasks are told apart by ``model(..., task_ids=ids)``,
    ``model.generate(..., task_ids=ids)`` or ``with task_ids(model, ids):``; -1 is a row without a
    prompt. ``generate`` repeats the ids for beams and several sequences a row.

    Positions count the prompt and the real tokens, so padding on the left moves nothing;
    ``position_ids`` of the user's are the text's, and are moved by the prompt in front of them. A
    prompt in an encoder-decoder is the encoder's, whose positions are the places. A classifier
    that reads the first position, as BERT's, reads the prompt unless that stands "after_bos".

    As a prefix: in a causal decoder what the tokens of a prompt before the text compute doesn't
    depend on it. They then run once for each task in the batch, not for each row, and all rows
    attend to their keys and values through :func:`peft_kernels.ops.prefix_attention`; nothing of
    the prompt is in the model's cache. Results and gradients are the same but for rounding. A
    forward with labels returns a cache only where one is asked for.

    A RuntimeWarning names a new head, or another method's parameters, that the freezing stops:
    unfreeze afterwards what is to go on.

    Args:
        model: a causal, bidirectional or encoder-decoder model of transformers' (T5, BART, BERT,
            ...), the one that is called: with its head, if it has one. In a wrapper it's the one
            model of transformers' inside, which must have it before DistributedDataParallel or FSDP
            wrap it; ``with task_ids(wrapper, ids):`` finds it there.
        prompt: with the features of the model's input embeddings. A :class:`PTuning` called
            without ``template=`` is a front prompt, as PEFT's P_TUNING is.
        as_prefix: "auto": where it is exact. False: never. True: always, and a forward that can't
            raises. In training with dropout "auto" runs each row's prompt, for its own draws;
            True lets all rows share the prompt's. It isn't exact beside gated adapters, or in a
            route of an :class:`peft_kernels.AdapterPool` with more than one entry.

    Raises:
        ValueError: a model that has a prompt or a prefix, or whose embeddings have other
            features; with ``as_prefix=True`` a prompt or a model in which it isn't exact. The
            model is unchanged then. And from the model's forward, naming the argument: several
            tasks without ids, ids out of range, a text that ends past the last learned position,
            a mask that isn't ``[B, S]`` where the prompt stands in the rows, a filled cache of
            another forward.
        TypeError: a model whose parameters are placeholders of DeepSpeed's ZeRO-3.
    """
    check_transformers()
    check_module("model", model)
    check_module("prompt", prompt)
    check_kind("prompt", unwrapped(prompt), PromptTuning, PTuning)
    given, model = model, prompt_host(model)
    if as_prefix not in ("auto", True, False):
        raise ValueError(f"as_prefix must be 'auto', True or False; got {as_prefix!r}")
    run = PromptRun(model, prompt, as_prefix)
    if hasattr(model, CHILD):
        raise ValueError(f"model must not have a {CHILD} of its own, the name of the prompt")
    if as_prefix is not False:
        run.obstacle = obstacle(model, run.position)
    if as_prefix is True and run.obstacle:
        raise ValueError(f"as_prefix can't be True for this model and prompt: {run.obstacle}")
    if run.obstacle is None:
        use_prefix_attention(model, attention_places(model))
    attach(model, run)
    freeze(given)
    keep_codes(model)
    model.add_module(CHILD, prompt.train(model.training))


def remove_prompt(model: nn.Module) -> Prompt:
    """Takes the prompt out and returns it; the model computes what it did before.

    Raises:
        ValueError: the model has none.
    """
    model = having(model, PROMPT_HOOK)
    detach(model)
    for module in model.modules():
        module.__dict__.pop(SOURCE, None)
        stop_carrying(module)
    unpin(model)
    prompt = model._modules.pop(CHILD)
    assert isinstance(prompt, PromptTuning | PTuning)
    if not has_adapters(model):
        give_back(model)
    return prompt


@contextmanager
def task_ids(model: nn.Module, ids: Tensor | Sequence[int] | None) -> Iterator[None]:
    """Within it, each row of the model's batch has the prompt of its task.

    The ids belong to the thread or asyncio task that enters the block. A call that another thread
    makes takes them as its argument ``task_ids``, or runs in ``contextvars.copy_context()``.

    Args:
        model: a model with a prompt.
        ids: one id for each row, in [-1, tasks); -1: that row has no prompt.

    Raises:
        ValueError: a model without a prompt, or ids that aren't integers, not one-dimensional or
            out of range; and at the forward, another number of ids than of rows.
    """
    with having(model, PROMPT_HOOK).__dict__[PROMPT_HOOK].row_ids.within(ids):
        yield
