"""Prefix tuning in transformers' models: decoders, BERT's family, T5 and BART.

    prefix = prefix_for(model, length=20, reparametrization="mlp")
    init_from_text(model, prefix, input_ids)            # if it is to start as a real text
    add_prefix(model, prefix)                           # freezes the model
    ...                                                 # train model.prefix_tuning's parameters
    prefix.eject()
    model.generate(input_ids, attention_mask=mask)
    remove_prefix(model)

The prefix isn't put into the model's cache: each attention layer attends to it beside the text's
keys. So it is there under gradient checkpointing, with a cache of the user's own, and for a step
over any cache, and is no part of what the cache's length says.

Where the model drops attention probabilities in training (GPT-2's ``attn_pdrop``), takes a head
mask or returns its attentions, keys and values are concatenated and the model's own formula is
computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.codes.layers import give_back, keep_codes
from peft_kernels.integrations.transformers.attention import own_attention, own_encoders
from peft_kernels.integrations.transformers.attention.pinned import IS_CAUSAL, pin, unpin
from peft_kernels.integrations.transformers.attention.prefixed import SOURCE, Pair, recording
from peft_kernels.integrations.transformers.host import check_no_placeholders, having, host_of
from peft_kernels.integrations.transformers.places import (
    Place,
    attention_places,
    calls_the_interface,
    check_all_sites,
)
from peft_kernels.integrations.transformers.runs.prefix import (
    Attached,
    attach,
    detach,
    padded_position_owner,
    position_owner,
    position_table,
    shifts_by_row,
    take_over,
)
from peft_kernels.integrations.transformers.supported import check_transformers
from peft_kernels.models.fast_paths import has_adapters
from peft_kernels.models.freezing import freeze
from peft_kernels.modules.checks import check_kind, check_module
from peft_kernels.modules.hooks import PREFIX_HOOK
from peft_kernels.nn.prefix_bank import PrefixBank
from peft_kernels.nn.prefix_tuning import PrefixTuning

CHILD = "prefix_tuning"


def prefix_shapes(
    model: nn.Module, sites: Sequence[str] | None = None
) -> dict[str, list[tuple[int, int] | None]]:
    """``(Hkv, D)`` of each attention layer by site: the ``layers`` of :class:`PrefixTuning`.

    Args:
        model: a model of transformers'.
        sites: those wanted of "self", "encoder" and "cross"; all that the model has by default.

    Raises:
        ValueError: a model without attention modules that are known, or without such a site.
        TypeError: a model whose parameters are placeholders of DeepSpeed's ZeRO-3.
    """
    check_no_placeholders(model)
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for place in attention_places(model):
        found.setdefault(place.site, {})[place.layer] = (place.kv_heads, place.head_dim)
    for site in sites or ():
        if site not in found:
            raise ValueError(f"sites must be of {', '.join(found)} in this model; got {site!r}")
    return {
        site: [layers.get(index) for index in range(max(layers) + 1)]
        for site, layers in found.items()
        if sites is None or site in sites
    }


def prefix_for(
    model: nn.Module, length: int, *, sites: Sequence[str] | None = None, **options: Any
) -> PrefixTuning:
    """A new prefix of the model's shapes; device and dtype are the model's unless given.

    Args:
        model, sites: as of :func:`prefix_shapes`.
        length: L.
        options: arguments of :class:`peft_kernels.nn.PrefixTuning`.

    Raises:
        ValueError: as :func:`prefix_shapes`; and without ``sites`` where an encoder-decoder can
            have a prefix at some of its sites alone.
    """
    if sites is None:
        check_all_sites(model)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    return PrefixTuning(length, prefix_shapes(model, sites), **(place | options))


def add_prefix(
    model: nn.Module, prefix: PrefixTuning, *, shift_positions: bool | None = None
) -> None:
    """Freezes the model and gives its attention layers a prefix, which trains.

    The prefix becomes the model's child ``prefix_tuning``. With several tasks each row's is said by
    ``model(..., prefix_ids=ids)``, ``model.generate(..., prefix_ids=ids)`` or
    ``with prefix_ids(model, ids):``; -1 is a row without a prefix. ``generate`` repeats the ids for
    beams and several sequences a row.

    All queries see the whole prefix, those of a sliding window too, whose prefix PEFT cuts: a
    UserWarning says so of one that :func:`peft_kernels.formats.peft_prompts.load_prompt` read.

    A RuntimeWarning names a new head, or another method's parameters, that the freezing stops:
    unfreeze afterwards what is to go on.

    Args:
        model: a model of transformers' (:func:`attention_places` says which), or what holds one.
            It goes into the model that ``torch.compile`` or ``nn.DataParallel`` wraps, and before
            DistributedDataParallel or FSDP do.
        prefix: of the model's shapes, for any of its sites.
        shift_positions: whether the text's position ids start at L, as if the prefix' tokens stood
            before the text: what Li & Liang's and PEFT's prefix in the cache does. By default where
            a single decoder takes position ids (GPT-2, OPT, Llama, ...). Ids that aren't given are
            then counted over the attention mask's tokens, so that padding doesn't move the text.
            False leaves the model's positions alone, as the default does in encoders: PEFT's prefix
            moves those of BERT's family by L, and so does True here. (RoBERTa's count from behind
            padding's, which stays where it is.) True for PEFT's prefixes of T5 and BART too, whose
            decoders' positions they shift: T5's relative ones then count the prefix, whose scores
            otherwise have no bias, and its keys are concatenated with the text's for that.

    Raises:
        ValueError: a prefix whose sites, layers or heads aren't the model's, a model that has one
            or a prompt already, whose positions can't be shifted, that DistributedDataParallel or
            FSDP wraps, or with several stacks of layers. The model is unchanged then.
        TypeError: a model whose parameters are placeholders of DeepSpeed's ZeRO-3.
    """
    check_transformers()
    check_module("model", model)
    check_kind("prefix", prefix, PrefixTuning)
    given, model = model, host_of(model, PREFIX_HOOK)
    places = attention_places(model)
    check_fits(prefix.layers, places)
    shift = shifts_positions(model, places, shift_positions)
    lengths = _lengths_of(prefix)
    if lengths is not None and shift and not shifts_by_row(model, places):
        raise ValueError(
            "prefix must have prefixes of one length where the positions of "
            f"{type(model).__name__} are shifted, which are the same in all rows"
        )
    attached = Attached(prefix, places, prefix.tasks, prefix.length, lengths)
    if hasattr(model, CHILD):
        raise ValueError(f"model must not have a {CHILD} of its own, the name of the prefix")
    use_prefix_attention(model, places)
    attach(model, attached, places, shift)
    freeze(given)
    keep_codes(model)
    model.add_module(CHILD, prefix.train(model.training))
    _warn_of_window(model, prefix)


def remove_prefix(model: nn.Module) -> PrefixTuning:
    """Takes the prefix out and returns it; the model computes what it did before.

    Raises:
        ValueError: the model has none.
    """
    model = having(model, PREFIX_HOOK)
    detach(model)
    unpin(model)
    prefix = model._modules.pop(CHILD)
    assert isinstance(prefix, PrefixTuning)
    if not has_adapters(model):
        give_back(model)
    return prefix


@contextmanager
def prefix_ids(model: nn.Module, ids: Tensor | Sequence[int] | None) -> Iterator[None]:
    """Within it, each row of the model's batch has the prefix with its id.

    The ids belong to the thread or asyncio task that enters the block. A call that another thread
    makes takes them as its argument ``prefix_ids``, or runs in ``contextvars.copy_context()``.

    Args:
        model: a model with a prefix.
        ids: one id for each row, in [-1, tasks); -1: that row has no prefix.

    Raises:
        ValueError: a model without a prefix, or ids that aren't integers, not one-dimensional or
            out of range; and at the forward, another number of ids than of rows.
    """
    with having(model, PREFIX_HOOK).__dict__[PREFIX_HOOK].row_ids.within(ids):
        yield


@torch.no_grad()
def text_values(model: Any, **inputs: Tensor) -> dict[str, list[Pair | None]]:
    """The model's own keys and values for a text: ``[B, Hkv, T, D]`` by site and layer.

    The model runs once, in eval mode and without its prefix if it has one. Cross-attention's are
    those of the encoder's text.

    Args:
        model: a model of transformers'.
        inputs: the model's arguments; no padding. An encoder-decoder needs ``decoder_input_ids``.
    """
    check_transformers()
    places = attention_places(model)
    keep_codes(model)
    trained, prepared = model.training, SOURCE in places[0].module.__dict__
    with nullcontext() if prepared else _prepared(model, places), recording(model) as kept:
        try:
            model.eval()(**inputs)
        finally:
            model.train(trained)
    values: dict[str, list[Pair | None]] = {
        site: [None] * len(shapes) for site, shapes in prefix_shapes(model).items()
    }
    for place in places:
        values[place.site][place.layer] = kept.pairs.get(place.module)
    return values


def init_from_text(
    model: nn.Module,
    prefix: PrefixTuning,
    input_ids: Tensor | Sequence[int],
    decoder_input_ids: Tensor | Sequence[int] | None = None,
) -> float:
    """Makes the prefix the keys and values of a real text (section 4.3 of Li & Liang 2021).

    The frozen model runs once on the text; an MLP is fitted to what it gives
    (:meth:`peft_kernels.nn.PrefixTuning.fit`). A decoder with such a prefix and shifted positions
    computes what it computes for the text followed by its input.

    Args:
        model: the model, with or without the prefix in it.
        prefix: the prefix.
        input_ids: tokens ``[T]``, or ``[P, T]`` for P tasks; repeated or cut to the prefix' length.
        decoder_input_ids: those of an encoder-decoder's decoder, the same tokens by default.

    Returns:
        The largest relative error of a layer, as of :meth:`peft_kernels.nn.PrefixTuning.fit`.
    """
    device = next(model.parameters()).device
    ids = _of_length(input_ids, prefix, device)
    inputs = {"input_ids": ids}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = input_ids if decoder_input_ids is None else decoder_input_ids
        inputs["decoder_input_ids"] = _of_length(decoder, prefix, device)
    made = text_values(model, **inputs)
    wanted = {
        site: [
            None if shape is None else pair for shape, pair in zip(shapes, made[site], strict=True)
        ]
        for site, shapes in prefix.layers.items()
    }
    return prefix.fit(wanted)


def _of_length(tokens: Any, prefix: PrefixTuning, device: torch.device) -> Tensor:
    """``[P, L]``: the tokens, repeated and cut."""
    ids = torch.atleast_2d(torch.as_tensor(tokens, device=device))
    if ids.dim() != 2 or ids.shape[0] != prefix.tasks or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be tokens of {prefix.tasks} texts, [{prefix.tasks}, T]; "
            f"got {list(ids.shape)}"
        )
    return ids.repeat(1, -(-prefix.length // ids.shape[1]))[:, : prefix.length]


# ---- preparing a model ---------------------------------------------------------------------------


def use_prefix_attention(
    model: nn.Module, places: Sequence[Place], when: Callable[[], bool] | None = None
) -> None:
    """Has attention modules that can be told by a config call :func:`_attention.attend`.

    With ``when`` they do while that says so, as of :func:`..attention.pinned.pin`.

    BigBird-Pegasus' decoder has a causal mask in eager attention and ``is_causal`` False, by which
    alone a causal mask is known that isn't made.
    """
    pin(model, [place.module for place in places if calls_the_interface(place.module)], when)
    for place in places:
        if place.site == "self" and getattr(place.module, "is_decoder", False) is True:
            place.module.__dict__[IS_CAUSAL] = True


@contextmanager
def _prepared(model: nn.Module, places: Sequence[Place]) -> Iterator[None]:
    """Attention modules that call :func:`_attention.attend`, for the duration of a block."""
    use_prefix_attention(model, places)
    take_over(places)
    try:
        yield
    finally:
        detach(model)
        unpin(model)


def check_fits(layers: Any, places: Sequence[Place]) -> None:
    """Raises a ValueError that names the first of a prefix' layers that the model doesn't have."""
    found = {(p.site, p.layer): (p.kv_heads, p.head_dim) for p in places}
    for site, shapes in layers.items():
        count = sum(place == site for place, _ in found)
        if count != len(shapes):
            raise ValueError(
                f"prefix has {len(shapes)} layers at {site}, and the model has {count}"
            )
        for index, shape in enumerate(shapes):
            if shape is not None and tuple(shape) != found[site, index]:
                raise ValueError(
                    f"prefix has {shape[0]} key/value heads of size {shape[1]} at {site}, layer "
                    f"{index}; the model's has {found[site, index][0]} of size "
                    f"{found[site, index][1]}"
                )


def shifts_positions(model: Any, places: Sequence[Place], asked: bool | None) -> bool:
    """Whether positions are to be shifted; the default is for single decoders."""
    stacks = sorted({place.stack for place in places})
    if asked is None:
        encodes = any(_is_encoders(place.module) for place in places)
        owner = position_owner(model, stacks[0])
        return len(stacks) == 1 and owner is not None and not encodes
    if asked and not all(_can_shift(model, place) for place in places if place.site == "self"):
        raise ValueError(
            f"shift_positions must be False or None for {type(model).__name__}, which takes no "
            "position ids that count from 0"
        )
    return asked


def _lengths_of(prefix: PrefixTuning) -> tuple[int, ...] | None:
    """The lengths of a bank's prefixes, if they differ."""
    lengths = prefix.lengths if isinstance(prefix, PrefixBank) else ()
    return lengths if len(set(lengths)) > 1 else None


def leaves_positions(model: nn.Module, prefix: nn.Module) -> bool:
    """Whether this prefix is in the model and leaves positions alone that could be shifted."""
    for host in model.modules():
        if PREFIX_HOOK in host.__dict__ and host._modules.get(CHILD) is prefix:
            places = attention_places(host)
            shifts = host.__dict__[PREFIX_HOOK].moves_positions
            return not shifts and all(_can_shift(host, place) for place in places)
    return False


def window_of(model: nn.Module) -> int | None:
    """The window, or chunk, that some of the model's layers attend within; None without."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    kinds = set(getattr(config, "layer_types", None) or ("sliding_attention", "chunked_attention"))
    for kind, name in (
        ("sliding_attention", "sliding_window"),
        ("chunked_attention", "attention_chunk_size"),
    ):
        size: int | None = getattr(config, name, None)
        if kind in kinds and size is not None:
            return size
    return None


def _warn_of_window(model: nn.Module, prefix: PrefixTuning) -> None:
    if prefix.read_from_folder and (size := window_of(model)) is not None:
        warnings.warn(
            f"model has layers that attend within a window of {size}: here all queries see the "
            "whole prefix, and PEFT's window cuts it. If PEFT trained this folder's prefix, this "
            "computes something else wherever prefix and text are longer than the window: train "
            "it further here, or run it with PEFT",
            UserWarning,
            stacklevel=3,
        )


def _can_shift(model: nn.Module, place: Place) -> bool:
    if own_attention.is_t5(place.module):
        return True
    ways = (position_owner, padded_position_owner, position_table)
    return any(way(model, place.stack) is not None for way in ways)


def _is_encoders(module: Any) -> bool:
    """Whether it is an encoder's, or of a family of encoders."""
    own = own_attention.is_bert(module) or own_encoders.own_sizes(module) is not None
    return own or not getattr(module, "is_causal", True)
