"""Embeddings that carry an adapter aren't resized: new ones would take their place without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from peft_kernels.calls.carried import unwrap, wrap
from peft_kernels.models.fast_paths import has_adapters
from peft_kernels.models.input_grads import embeddings_of
from peft_kernels.modules.names import plain_modules

_METHOD = "resize_token_embeddings"


def choose_resizing(model: nn.Module) -> None:
    """Has models of transformers' refuse to resize embeddings with an adapter, and only those.

    To be called when adapters came or went. Refused at once: ``resize_token_embeddings`` replaces
    the input embeddings first, and what raises after that leaves a model of two sizes.
    """
    for host in plain_modules(model).values():
        if callable(getattr(host, _METHOD, None)):
            unwrap(host, _METHOD, _refuse)
            if any(has_adapters(part) for part in _embeddings(host)):
                wrap(host, _METHOD, _refuse)


def _embeddings(host: Any) -> Iterator[nn.Module]:
    """The output and input embeddings of a model of transformers'."""
    for find in ("get_output_embeddings", "get_input_embeddings"):
        if (found := embeddings_of(host, find)) is not None:
            yield found


def _refuse(
    host: nn.Module,
    proceed: Callable[..., Any],
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around ``resize_token_embeddings``: a call that would change a size is an error."""
    adapted = [part for part in _embeddings(host) if has_adapters(part)]
    changes = new_num_tokens is not None or pad_to_multiple_of is not None
    if adapted and changes and _new_sizes(host, new_num_tokens, pad_to_multiple_of):
        names = {module: name for name, module in plain_modules(host).items()}
        raise RuntimeError(
            f"resize_token_embeddings would put new embeddings in place of {names[adapted[0]]}, "
            "without its adapter; nothing was changed. Resize before swap_linear, load_adapter, "
            "AdapterPool.attach or insert_adapter, or after unload(), detach() or remove_adapters()"
        )
    return proceed(new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def _new_sizes(host: Any, tokens: int | None, multiple: int | None) -> bool:
    """Whether any of the embeddings would have another number of rows than it has."""
    weights = (getattr(part, "weight", None) for part in _embeddings(host))
    rows = {weight.shape[0] for weight in weights if isinstance(weight, Tensor)}
    wanted = host.get_input_embeddings().weight.shape[0] if tokens is None else tokens
    if multiple:
        wanted = -(-wanted // multiple) * multiple
    return rows != {wanted}
