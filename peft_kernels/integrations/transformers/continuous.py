"""transformers' continuous batching: an engine whose every row in a step has a request's name.

The engine packs the tokens of several requests into one row, in a thread of its own. What a step
holds stands beside the tensors that its forward is called with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

MANAGER, CACHED = "init_continuous_batching", "_cached_continuous_batching_manager"


class Step(NamedTuple):
    """What one forward of the engine holds."""

    requests: list[tuple[str, int]]  # (request's id, how many tokens of it), in their order
    tokens: int  # of the row, which may end in padding


def new_manager(model: nn.Module, generation_config: Any, config: Any) -> Any:
    """transformers' manager for a model whose requests don't have the same weights.

    Blocks of keys and values are shared between requests that begin alike, which is wrong where
    their weights differ; a graph or compiled code has the rows of the step that it was made in; and
    batches made ahead aren't those that run. So none of that is done.

    Raises:
        RuntimeError: transformers is too old, or the model has a manager from before.
        TypeError: a model without continuous batching.
        ValueError: a configuration that asks for one of those.
    """
    import transformers

    wanted = getattr(transformers, "ContinuousBatchingConfig", None)
    if wanted is None:
        raise RuntimeError(
            "continuous batching with adapters must have transformers 5, with its "
            f"ContinuousBatchingConfig; got {transformers.__version__}. Use generate, in pool.route"
        )
    if not callable(getattr(model, MANAGER, None)):
        raise TypeError(
            f"model must be one of transformers' that generate; got {type(model).__name__}"
        )
    if getattr(model, CACHED, None) is not None:
        raise RuntimeError(
            "the model has a manager that generate_batch kept, whose blocks requests share: call "
            "model.destroy_cached_continuous_batching_manager() first"
        )
    config = wanted() if config is None else config
    if not isinstance(config, wanted):
        raise TypeError(
            "continuous_batching_config must be a ContinuousBatchingConfig; got "
            f"{type(config).__name__}"
        )
    generating = generation_config or model.generation_config
    _check(config, generating)
    alone = {"allow_block_sharing": False, "use_async_batching": False, "use_cuda_graph": False}
    config = replace(config, **alone)
    return getattr(model, MANAGER)(generation_config=generating, continuous_batching_config=config)


def _check(config: Any, generation_config: Any) -> None:
    compiled = ("varlen_compile_config", "decode_compile_config", "default_compile_level")
    wrong = [name for name in ("use_async_batching", "use_cuda_graph") if _wants(config, name)]
    wrong += [name for name in compiled if getattr(config, name, None)]
    if wrong:
        raise ValueError(
            f"continuous_batching_config.{wrong[0]} must be left as it is by default; got "
            f"{getattr(config, wrong[0])!r}: each step has other adapters"
        )
    if getattr(generation_config, "compile_config", None) is not None:
        raise ValueError(
            "generation_config.compile_config must be None; got "
            f"{generation_config.compile_config!r}: each step has other adapters"
        )


def _wants(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return any(value) if isinstance(value, tuple) else bool(value)


def step_of(manager: Any, kwargs: dict[str, Any]) -> Step | None:
    """What a forward with these arguments holds; None if it isn't of this manager's engine.

    Raises:
        RuntimeError: an engine that isn't as it was in the versions of transformers that are known.
    """
    processor = manager.batch_processor
    if processor is None or kwargs.get("cache") is not processor.cache:
        return None
    tokens = kwargs["input_ids"].shape[1]
    try:
        held = processor.inputs_and_outputs.requests_in_batch
        requests = [(one.state.request_id, one.query_length) for one in held]
    except AttributeError as error:
        raise RuntimeError(
            f"transformers' engine isn't as it was in 5.23, which is known: {error}"
        ) from error
    if sum(count for _, count in requests) > tokens:
        raise RuntimeError(
            f"transformers' engine isn't as it was in 5.23, which is known: {tokens} tokens of "
            f"{requests}"
        )
    return Step(requests, tokens)


def tell_of_ended(manager: Any, ended: Callable[[str], None]) -> None:
    """Has ``ended(request_id)`` called for each request that is over, before its result is out."""
    router = manager.output_router
    deliver, deliver_batch = router.deliver, router.deliver_batch

    def tell(output: Any) -> None:
        if output.is_finished():
            ended(output.request_id)

    def told(output: Any) -> None:
        tell(output)
        deliver(output)

    def all_told(outputs: list[Any]) -> None:
        for output in outputs:
            tell(output)
        deliver_batch(outputs)

    router.deliver, router.deliver_batch = told, all_told


def is_waiting_or_running(manager: Any, request_id: str, child: str) -> bool:
    """Whether the engine has a request, or a further sequence of it, that it has taken.

    Args:
        child: what stands between a request's id and a further sequence's number.
    """
    scheduler = manager.batch_processor.scheduler
    taken = (*scheduler.active_requests, *scheduler.waiting_requests)
    return any(name.partition(child)[0] == request_id for name in taken)


def with_all_logits(model: nn.Module, proceed: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """A forward whose last layer is given all tokens, and those logits of it that were wanted."""
    kept = kwargs.pop("logits_to_keep", None)
    output = proceed(**kwargs)
    if kept is not None:
        output.logits = output.logits[:, kept]
    return output
