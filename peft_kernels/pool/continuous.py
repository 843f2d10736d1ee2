"""Requests that name their adapters, under transformers' continuous batching."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn

from peft_kernels.calls.carried import unwrap, wrap
from peft_kernels.calls.rows import Entries
from peft_kernels.integrations.transformers import continuous
from peft_kernels.modules.checks import check_size
from peft_kernels.pool.store import Store
from peft_kernels.pool.versions import Version

CHILD = "__child#"  # between a request's id and the number of one of its further sequences
Routed = Callable[[Sequence[int | None], Entries, dict[int, Version]], AbstractContextManager[None]]


class Request:
    """A request that isn't over yet; as long as it lives, its adapter's version stays in place."""

    def __init__(self, version: Version | None, sequences: int) -> None:
        self.version = version
        self.left = sequences


class ContinuousBatching:
    """transformers' engine of continuous batching, whose requests name adapters of a pool.

    :meth:`peft_kernels.AdapterPool.continuous_batching` makes one; a ``with`` block runs its
    engine. At its end the engine answers what it has and stops; after an error it stops at once.

    A request has its adapter's version of when it came until it is over, whatever is loaded,
    replaced or unloaded meanwhile. Methods may be called from any thread.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        routed: Routed,
        generation_config: Any,
        continuous_batching_config: Any,
    ) -> None:
        self._model, self._store, self._routed = model, store, routed
        self._requests: dict[str, Request] = {}
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()  # guards both
        self._numbers = itertools.count()
        for name, layer in store.layers.items():
            if layer.place.apart is not None:
                raise ValueError(
                    f"{name} {layer.place.apart}, and one row has several requests: leave the "
                    "layer out of target_modules"
                )
        last = getattr(model, "get_output_embeddings", lambda: None)()
        self._adapts_last = any(layer is last for layer in store.layers.values())
        self._configs = generation_config, continuous_batching_config
        self._manager: Any = None
        self._open = ExitStack()

    def __enter__(self) -> ContinuousBatching:
        if self._manager is not None and self.is_running():
            raise RuntimeError("the engine runs already; pool.continuous_batching makes another")
        with ExitStack() as opened:
            opened.enter_context(self._store.hold([]))  # the pool can't be detached meanwhile
            opened.callback(self._requests.clear)
            self._manager = continuous.new_manager(self._model, *self._configs)
            opened.callback(self._manager.destroy)
            continuous.tell_of_ended(self._manager, self._ended)
            wrap(self._model, "_call_impl", self._around_call)
            opened.callback(unwrap, self._model, "_call_impl", self._around_call)
            self._manager.start()
            self._open = opened.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._open:
            self._manager.stop(block=True, hard_stop=kind is not None)

    def add_request(
        self,
        input_ids: Sequence[int],
        adapter: str | None = None,
        *,
        request_id: str | None = None,
        **options: Any,
    ) -> str:
        """Hands the engine a request, and returns its id.

        Args:
            input_ids: the prompt's tokens, at least one.
            adapter: the name of its adapter in the pool; None is the base model.
            request_id: without "__child#"; by default one that no other has.
            options: those of transformers' ``ContinuousBatchingManager.add_request``, such as
                ``max_new_tokens``, ``streaming`` and ``eos_token_id``.

        Raises:
            ValueError: the pool has no adapter of this name, a request of this id isn't over, or
                tokens or an id that the engine couldn't take.
            TypeError: tokens or a ``max_new_tokens`` that aren't integers, or an id or a name that
                isn't a string.
            RuntimeError: the engine has stopped, or hasn't begun.
        """
        if self._manager is None:
            raise RuntimeError("the engine runs in a with block, which hasn't been entered")
        _check_string("request_id", request_id)
        _check_string("adapter", adapter)
        if request_id is not None and CHILD in request_id:
            raise ValueError(
                f"request_id must not have {CHILD!r}, which marks further sequences; got "
                f"{request_id!r}"
            )
        if (longest := options.get("max_new_tokens")) is not None:
            check_size("max_new_tokens", longest)
        tokens = _tokens_of(self._model, input_ids)
        names = [] if adapter is None else [adapter]
        with self._store.hold(names) as (versions, keep):
            request = Request(versions.get(adapter or ""), self._manager.num_return_sequences)
            keep(request)
        given = self._added(request, request_id)
        try:
            taken = self._manager.add_request(tokens, request_id=given, **options)
        except BaseException:
            self._ended_all(given)
            raise
        if taken is None or not self.is_running():
            self._ended_all(given)
            error = self._manager.background_thread_status.fatal_error
            raise RuntimeError(
                f"the engine has stopped and takes no request{f': {error}' if error else ''}"
            )
        return given

    def add_requests(
        self,
        inputs: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        **options: Any,
    ) -> list[str]:
        """:meth:`add_request` for each of ``inputs``, ``adapters[i]`` for ``inputs[i]``; their ids.

        Raises:
            ValueError: not as many adapters as inputs, or as :meth:`add_request`; those before the
                one that it names are with the engine then.
        """
        if isinstance(adapters, str) or len(adapters) != len(inputs):
            raise ValueError(
                f"adapters must have a name or None for each of {len(inputs)} inputs; "
                f"got {adapters!r}"
            )
        pairs = zip(inputs, adapters, strict=True)
        return [self.add_request(ids, adapter, **options) for ids, adapter in pairs]

    def cancel_request(self, request_id: str) -> None:
        """Has the engine drop a request and its further sequences.

        Its adapter is let go with the engine's next step. A request that is over stays as it is.
        """
        with self._lock:  # what the engine hasn't taken yet, it drops when it does
            if request_id not in self._requests:
                return
            self._manager.cancel_request(request_id)
            for number in range(self._manager.num_return_sequences - 1):
                self._manager.cancel_request(f"{request_id}{CHILD}{number}")
            self._cancelled.add(request_id)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> Any:
        """transformers' GenerationOutput that comes next, or None after ``timeout`` seconds."""
        return self._manager.get_result(request_id, timeout)

    def request_id_iter(self, request_id: str) -> Iterator[Any]:
        """The results of one request; several where it has ``streaming=True``."""
        return self._manager.request_id_iter(request_id)

    def register_result_handler(self, request_id: str, callback: Callable[[Any], Any]) -> None:
        """Has the running event loop call ``callback`` with each result of one request."""
        self._manager.register_result_handler(request_id, callback)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._manager)

    def is_running(self) -> bool:
        """Whether the engine's thread is alive."""
        return self._manager.is_running()

    # ---- requests --------------------------------------------------------------------------------

    def _added(self, request: Request, request_id: str | None) -> str:
        with self._lock:
            given = f"request_{next(self._numbers)}" if request_id is None else request_id
            if given in self._requests or given in self._cancelled:
                raise ValueError(f"request_id must be new; a request {given!r} isn't over")
            self._requests[given] = request
            return given

    def _ended(self, request_id: str) -> None:
        """One sequence of a request is over."""
        first = request_id.partition(CHILD)[0]
        with self._lock:
            if (request := self._requests.get(first)) is None:
                return
            request.left -= 1
            if not request.left:
                del self._requests[first]

    def _ended_all(self, request_id: str) -> None:
        with self._lock:
            self._requests.pop(request_id, None)

    def _forget_cancelled(self) -> None:
        """Of the requests that were cancelled, those that the engine has dropped are over."""
        with self._lock:
            for request_id in list(self._cancelled):
                if not continuous.is_waiting_or_running(self._manager, request_id, CHILD):
                    self._cancelled.discard(request_id)
                    self._requests.pop(request_id, None)

    def _request_of(self, name: str) -> Request:
        """The request of a sequence; the lock is held."""
        request = self._requests.get(name.partition(CHILD)[0])
        if request is None:
            raise RuntimeError(
                f"the engine runs a request {name!r} that was not added here, or that is over: "
                "which adapter it has is not known"
            )
        return request

    # ---- steps, in the engine's thread -----------------------------------------------------------

    def _around_call(
        self, module: nn.Module, proceed: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around the model's calls: the engine's have a route, a request's adapter by token."""
        step = continuous.step_of(self._manager, kwargs)
        if step is None:
            return proceed(*args, **kwargs)
        with self._lock:  # and the requests stay where they are until the step is over
            held = [self._request_of(name) for name, _ in step.requests]
        versions = [request.version for request in held]
        slots: list[int | None] = []
        for version, (_, count) in zip(versions, step.requests, strict=True):
            slots += [None if version is None else version.slot] * count
        slots += [None] * (step.tokens - len(slots))
        used = {version.slot: version for version in versions if version is not None}
        with self._store.hold([]), self._routed(slots, Entries(1, step.tokens), used):
            if self._adapts_last:
                output = continuous.with_all_logits(module, proceed, kwargs)
            else:
                output = proceed(*args, **kwargs)
        self._forget_cancelled()
        return output


def _check_string(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string or None; got {value!r}")


def _tokens_of(model: Any, input_ids: Any) -> list[int]:
    """The prompt as integers: any other would end the engine, and with it all requests."""
    try:
        tokens = [operator.index(token) for token in input_ids]
    except TypeError as error:
        raise TypeError(
            f"input_ids must be the integers of one prompt; got {input_ids!r}"
        ) from error
    if not tokens:
        raise ValueError("input_ids must have at least one token; got none")
    room = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if room is not None and not 0 <= min(tokens) <= max(tokens) < room:
        raise ValueError(f"input_ids must be in [0, {room}); got {min(tokens)} to {max(tokens)}")
    return tokens
