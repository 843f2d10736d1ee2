"""The routes of a pool: which rows of a call have which of its adapters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft_kernels.calls.router import Selection
from peft_kernels.calls.rows import Entries, Ids, entries_of
from peft_kernels.pool.attached import Attached
from peft_kernels.pool.continuous import ContinuousBatching
from peft_kernels.pool.versions import Version


class Routed(Attached):
    """A pool in a model, that gives rows their adapters."""

    @contextmanager
    def route(self, ids: Ids) -> Iterator[None]:
        """Gives rows their adapters, for every forward of the call inside a ``with`` block.

        The route belongs to the thread or asyncio task that enters it, which must leave it too, and
        to the tasks and ``asyncio.to_thread`` calls that it starts while it is open. Another thread
        has none of it: hand it :meth:`bind`'s result, or ``contextvars.copy_context().run``. Who
        goes on with a route that has ended gets a RuntimeError.

        A backward that computes forwards again (gradient checkpointing) belongs inside too. A CUDA
        graph is captured inside, with gradients off and not of compiled code, and replayed inside
        any route that has as many entries and was the last that the same thread entered.

        Args:
            ids: the name of each row's adapter, or None: a flat list has one for each row of the
                batch (rows are the first dimension of what the model is given), or one for all of
                them; a list of lists has one for each token of each row. ``generate`` takes one for
                each row that it is given, whose beams and sequences have it too.

        Raises:
            ValueError: there is no adapter of some name, or lists of unequal lengths. And from the
                model's forward, naming the layer: rows or tokens that aren't as many, or an expert
                of a mixture, which is given some of the tokens in any order, in a route of several
                adapters.
            TypeError: not a sequence of names, or of sequences of names.
            RuntimeError: at the end of the block, where it is another task's or thread's, or one
                that was entered inside it is still open.

        Nothing has run when one is raised.
        """
        names, entries = entries_of(ids)
        with (
            self._store.hold(_distinct(names)) as (versions, keep),
            self._routed(names, entries, versions, keep),
        ):
            yield

    def bind(self, function: Callable[..., Any], ids: Ids) -> Callable[..., Any]:
        """``function`` with a route around each of its calls, in whichever thread makes them.

        For a call that another thread makes, such as a streamer's ``generate``:

            thread = threading.Thread(target=pool.bind(model.generate, ["a"]), kwargs=inputs)

        As long as the result exists it holds the versions of its adapters that are there now,
        whatever is replaced or unloaded meanwhile.

        Args:
            function: what is called, such as the model or its ``generate``. Of a coroutine function
                a coroutine function is made.
            ids: as of :meth:`route`.

        Raises:
            ValueError, TypeError: as :meth:`route`; or a generator function, whose route would be
                open between its steps, in whatever takes them.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"function must not be a generator's, got {function!r}; bind what it calls"
            )
        names, entries = entries_of(ids)
        with self._store.hold(_distinct(names)) as (versions, keep):
            bound = self._bound(function, lambda: self._routed(names, entries, versions, keep))
            keep(bound)
        return bound

    def continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None
    ) -> ContinuousBatching:
        """transformers' continuous batching, in which each request names its adapter.

            with pool.continuous_batching(generation_config) as engine:
                engine.add_request(input_ids, "legal", max_new_tokens=64)
                output = engine.get_result()

        The engine runs in a thread of its own and packs the tokens of all requests into one row,
        which is routed by token. It shares no blocks of keys and values between requests, whose
        weights differ, and has no CUDA graphs and no batches made ahead. With transformers 5.

        Args:
            generation_config: transformers' GenerationConfig, the model's by default.
            continuous_batching_config: transformers' ContinuousBatchingConfig.

        Raises:
            RuntimeError: an older transformers; the model has a manager that generate_batch kept;
                the pool is detached.
            TypeError: a model without continuous batching, or a config of another class.
            ValueError: within a route; a config that asks for graphs, compiled code or batches made
                ahead; a pool with an expert of a mixture, which is given tokens in any order.
        """
        return ContinuousBatching(
            self._model,
            self._store,
            lambda slots, entries, versions: self._routed(slots, entries, versions, _kept),
            generation_config,
            continuous_batching_config,
        )

    def _bound(
        self, function: Callable[..., Any], routed: Callable[[], AbstractContextManager[None]]
    ) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._store.hold([]), routed():
                return function(*args, **kwargs)

        @functools.wraps(function, updated=())
        async def call_in_task(*args: Any, **kwargs: Any) -> Any:
            with self._store.hold([]), routed():
                return await function(*args, **kwargs)

        return call_in_task if inspect.iscoroutinefunction(function) else call

    def _routed(
        self,
        names: Sequence[Hashable],
        entries: Entries,
        versions: Mapping[Any, Version],
        keep: Callable[[object], None],
    ) -> AbstractContextManager[None]:
        """A route to versions that are held."""
        selection = Selection(
            [-1 if name is None else versions[name].slot for name in names],
            self._slots,
            entries=entries,
            trained=tuple(v.slot for v in versions.values() if v.trainable),
            dropout={v.slot: (v.dropout, v.seed) for v in versions.values() if v.dropout},
            buffers=self._router.buffers,
            on_graph=keep,
        )
        keep(selection)  # a thread that inherited the route may be in a layer when it ends
        return self._router.use(selection, self._store.devices())


def _kept(holder: object) -> None:
    """Of versions that somebody holds as long as anything may read them."""


def _distinct(names: Iterable[str | None]) -> dict[str, None]:
    return dict.fromkeys(name for name in names if name is not None)
