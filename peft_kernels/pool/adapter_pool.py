"""Many LoRA adapters for one model, each row of a batch with its own."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.calls.carried import unwrap, wrap
from peft_kernels.calls.router import Router, Selection
from peft_kernels.calls.rows import Entries, Ids, entries_of, place_of
from peft_kernels.codes.layers import readable
from peft_kernels.formats import peft_lora
from peft_kernels.formats.folder import path_of
from peft_kernels.integrations.peft.beside import check_without_peft
from peft_kernels.models.fast_paths import choose_fast_paths, has_adapters
from peft_kernels.models.freezing import freeze
from peft_kernels.models.in_place import check_in_place, keep_in_place, let_go
from peft_kernels.models.input_grads import let_gradients_be, let_gradients_through
from peft_kernels.models.modules_to_save import (
    check_task_type,
    warn_of_left_out,
    writable_task_type,
)
from peft_kernels.models.resizing import choose_resizing
from peft_kernels.models.swap import named, replace_modules, required_targets
from peft_kernels.modules.bases import check_bases
from peft_kernels.modules.fully_sharded import reshard
from peft_kernels.modules.names import plain_parameters, unwrapped
from peft_kernels.modules.replaced import fault_of_instance
from peft_kernels.nn._gathered import check_can_leave
from peft_kernels.nn.multi_lora import MultiLoRALinear, holders, zero_grads
from peft_kernels.nn.multi_lora_codes import QuantizedMultiLoRALinear
from peft_kernels.ops.multi_lora_linear import PAGE
from peft_kernels.pool.continuous import ContinuousBatching
from peft_kernels.pool.pages import PoolFullError
from peft_kernels.pool.store import PoolMemory, Store
from peft_kernels.pool.versions import Source, Version, new_version, read_version

__all__ = ["AdapterPool", "PoolFullError", "PoolMemory"]


class AdapterPool:
    """Holds many LoRA adapters for a model, and gives each row of a batch the one it asks for.

    ``pool = AdapterPool.attach(model, ["q_proj", "v_proj"], capacity=512)`` swaps
    :class:`peft_kernels.nn.MultiLoRALinear` in, ``pool.load("a", "path/to/adapter")`` reads PEFT's
    format, and ``with pool.route(["a", None, "b"]): model(x)`` serves three rows, the second by the
    base model alone. An adapter takes pages of 8 rank rows in each layer that it adapts, as many as
    its rank there needs, and costs what that rank costs.

    :meth:`create` makes an adapter to train, ``torch.optim.AdamW(pool.parameters("a"))`` trains it
    in place, alone or beside others in one batch, and :meth:`save` writes it in PEFT's format.

    Several threads may use a pool at once, and load while others run the model. A route belongs to
    the call: a thread or an asyncio task has its own. It holds the versions of its adapters that it
    found when it was entered, and so does the autograd graph of a forward in it: their pages go to
    others only when the last of those is gone. So neither a forward nor a backward ever sees parts
    of two adapters in one.
    """

    _model: nn.Module
    _store: Store
    _router: Router
    _thawed: Sequence[str]  # what required gradients before
    _holders: Sequence[nn.Module]  # whose zero_grad() is told of the layers below
    _slots: int
    _max_rank: int
    _task_type: str | None

    def __init__(self) -> None:
        raise TypeError("an AdapterPool is made by AdapterPool.attach(model, ...)")

    # ---- attach and detach -------------------------------------------------------------------

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        target_modules: str | Iterable[str],
        *,
        capacity: int,
        max_rank: int = 64,
        max_adapters: int | None = None,
        adapter_dtype: torch.dtype | None = None,
        evict: str | None = None,
        unrouted: str = "base",
        exclude_modules: str | Iterable[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        task_type: str | None = None,
    ) -> AdapterPool:
        """Swaps MultiLoRALinear into ``model``, in place, and freezes all of it.

        A RuntimeWarning names another method's parameters that trained until now. A head is frozen
        without one, for most are served: unfreeze a new one to train it with :meth:`create`.
        :meth:`detach` has all of them train again.

        The model may be moved and cast afterwards; its adapters go with it. While it is in a pool
        it can't be deep-copied or pickled; its state dict is the base model's.

        Args:
            model: any module; the layers to replace are below it, and must be plain linear layers.
            target_modules, exclude_modules, layers_to_transform, layers_pattern: which layers, as
                in :func:`peft_kernels.swap_linear`.
            capacity: the rank rows that each layer has room for, rounded up to whole pages of 8. An
                adapter of rank r takes r of them, rounded up likewise.
            max_rank: the highest rank of one adapter, rounded up likewise.
            max_adapters: how many adapters fit at most; by default as many as a layer has pages.
            adapter_dtype: of the adapters: float32, or the dtype of the base, which is the default.
            evict: ``"lru"`` lets an adapter that doesn't fit take the place of those that were
                routed longest ago. Pinned ones, those in use and those in training stay.
            unrouted: what a forward without a route gets: ``"base"``, the base model, or
                ``"error"``, a RuntimeError, for a server in which every row has a tenant.
            task_type: PEFT's name of the task, which :meth:`save` writes.

        Raises:
            ValueError: a pattern that selects nothing, or a value out of range.
            TypeError: a target that isn't a plain linear layer, or a value of the wrong type.

        Nothing is changed when one is raised.
        """
        check_task_type(task_type)
        given, model = model, unwrapped(model)
        targets = required_targets(
            model,
            target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            task_type=task_type,
        )
        in_codes = readable(targets)
        reshard(model)
        check_bases(model, targets, takes_values=True, may_be_sharded=True, in_codes=in_codes)
        pages = _pages_for("capacity", capacity)
        max_pages = min(_pages_for("max_rank", max_rank), pages)
        slots = pages if max_adapters is None else _positive("max_adapters", max_adapters)
        if evict not in (None, "lru"):
            raise ValueError(f"evict must be None or 'lru'; got {evict!r}")
        if unrouted not in ("base", "error"):
            raise ValueError(f"unrouted must be 'base' or 'error'; got {unrouted!r}")

        self = cls.__new__(cls)
        self._model, self._max_rank = model, max_pages * PAGE
        self._router, self._slots = Router(refuses=unrouted == "error"), slots
        self._task_type = task_type
        parameters = plain_parameters(model)  # by name: parallelize_module makes others
        self._thawed = [name for name, p in parameters.items() if p.requires_grad]
        try:
            layers: dict[str, MultiLoRALinear] = {}
            for name, module in targets.items():
                with named(name):
                    kind = QuantizedMultiLoRALinear if module in in_codes else MultiLoRALinear
                    layers[name] = kind.from_linear(
                        module,
                        slots=slots,
                        pages=pages,
                        max_pages=max_pages,
                        router=self._router,
                        adapter_dtype=adapter_dtype,
                        place=place_of(model, name),
                    )
        except BaseException:
            self._thaw()
            raise
        self._store = Store(
            layers, pages=pages, slots=slots, router=self._router, lru=evict == "lru"
        )
        replace_modules(model, {targets[name]: layer for name, layer in layers.items()})
        freeze(model, train_head=False)
        keep_in_place(model, layers.values())
        choose_fast_paths(model)
        choose_resizing(model)
        let_gradients_through(model)
        for method, around in self._arounds():
            if callable(getattr(model, method, None)):
                wrap(model, method, around)
        self._holders = holders(given)
        for module in self._holders:
            wrap(module, "zero_grad", zero_grads)
        return self

    def _arounds(self) -> list[tuple[str, Callable[..., Any]]]:
        """What goes around which of the model's methods."""
        packing = ("generate_batch", "init_continuous_batching")
        return [
            ("_call_impl", self._router.around_call),
            ("generate", self._router.around_generate),
            *((method, self._router.around_packing) for method in packing),
        ]

    def _thaw(self) -> None:
        parameters = plain_parameters(self._model)
        for name in parameters.keys() & self._thawed:
            parameters[name].requires_grad_(True)

    def detach(self) -> None:
        """Puts the model's own layers back, with their Parameters, and drops all adapters.

        What required gradients before :meth:`attach` does so again. Parameters of trainable
        adapters keep their values, in memory of their own. The pool has no layers any more.

        Raises:
            RuntimeError: a route is open, in this thread or another; a weight is in codes that
                fully_shard holds.
            TypeError: a layer was given another forward, was compiled by itself, parametrized,
                pruned or the like.

        Nothing is changed when one is raised.
        """
        for name, layer in self._store.layers.items():
            if fault := fault_of_instance(layer):
                raise TypeError(f"{name} {fault}")
            check_can_leave(name, layer)
        layers = self._store.close()
        for method, around in self._arounds():
            unwrap(self._model, method, around)
        for module in self._holders:
            unwrap(module, "zero_grad", zero_grads)
        let_go(self._model, layers.values())
        replace_modules(self._model, {layer: layer.plain() for layer in layers.values()})
        choose_fast_paths(self._model)
        choose_resizing(self._model)
        if not has_adapters(self._model):
            let_gradients_be(self._model)
        self._thaw()
        self._thawed, self._holders = [], []

    # ---- adapters ----------------------------------------------------------------------------

    def load(
        self,
        name: str,
        source: Source,
        *,
        config: Mapping[str, Any] | None = None,
        pinned: bool = False,
        trainable: bool = False,
        seed: int | None = None,
    ) -> None:
        """Loads an adapter in PEFT's format: rsLoRA, rank and alpha patterns included.

        Layers of the pool that it doesn't adapt stay as they are for its rows.

        Args:
            name: what :meth:`route` calls it.
            source: a folder that PEFT or :meth:`save` has written, or the tensors of one by their
                keys (``base_model.model.<layer>.lora_A.weight``).
            config: with tensors, fields of PEFT's LoraConfig, and its defaults for the others.
            pinned: it is never evicted.
            trainable: its matrices are :meth:`parameters`, and it isn't evicted while any of them
                requires gradients. Its pages in a layer must follow one another.
            seed: tells its dropout masks from other adapters'; made from its name by default.

        Raises:
            PoolFullError: there is no room for it; the message says where.
            ValueError: the name is taken, a rank is above ``max_rank``, the pool lacks a layer, or
                the source isn't a supported adapter (:func:`peft_kernels.load_adapter`).
            FileNotFoundError: the folder isn't an adapter.
            TypeError: tensors without a config, or a value of the wrong type.

        Nothing is changed when one is raised.
        """
        version, matrices = self._read(name, source, config)
        version.pinned, version.trainable = pinned, trainable
        version.seed = _checked_seed(seed, version.seed)
        self._store.add(version, lambda layer: matrices[layer][:2])
        if trainable:
            _warn_of_processes()

    def replace(
        self, name: str, source: Source, *, config: Mapping[str, Any] | None = None
    ) -> None:
        """Loads another version of an adapter under its name, pinned or trainable as it was.

        A forward sees one version or the other. A version that nothing uses is written over, so a
        full pool has room for that, and the Parameters of a trainable adapter stay the same objects
        where the rank does. A version in use needs room for both until its last use is over, and
        then :meth:`parameters` are new ones.

        Raises:

        As :meth:`load`, and ValueError: there is no adapter of this name.
        """
        version, matrices = self._read(name, source, config)
        self._store.add(version, lambda layer: matrices[layer][:2], replaces=True)

    def create(
        self,
        name: str,
        r: int,
        *,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming_uniform",
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        target_modules: str | Iterable[str] | None = None,
        seed: int | None = None,
    ) -> None:
        """Makes a new adapter to train. Its update is zero at first.

        Args:
            name: what :meth:`route` calls it.
            r, alpha: rank and alpha where no pattern says otherwise.
            dropout, use_rslora, init: as in :class:`peft_kernels.nn.LoRALinear`.
            rank_pattern, alpha_pattern: as in :func:`peft_kernels.swap_linear`.
            target_modules: which of the pool's layers it adapts, all by default: a list of endings
                of their names, or a regular expression for the full name.
            seed: tells its dropout masks from other adapters'; made from its name by default.

        Raises:
            PoolFullError: there is no room for it; the message says where.
            ValueError, TypeError: the name is taken, or a value is wrong.

        Nothing is changed when one is raised.
        """
        version = new_version(
            name,
            r,
            alpha,
            dropout,
            use_rslora,
            init,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            target_modules=target_modules,
            layers=self._store.layers,
            max_rank=self._max_rank,
        )
        version.trainable = True
        version.seed = _checked_seed(seed, version.seed)

        def draw(layer: str) -> tuple[Tensor, Tensor]:
            return self._store.layers[layer].draw(version.layers[layer][0], init)

        self._store.add(version, draw)
        _warn_of_processes()

    def _read(
        self, name: str, source: Source, config: Mapping[str, Any] | None
    ) -> tuple[Version, dict[str, peft_lora.Adapter]]:
        return read_version(
            name,
            source,
            config,
            model=self._model,
            layers=self._store.layers,
            max_rank=self._max_rank,
        )

    def unload(self, name: str) -> None:
        """Drops an adapter. Routes that hold it go on with it; later ones don't find it.

        Parameters of a trainable adapter keep their values, in memory of their own.

        Raises:
            ValueError: there is no adapter of this name.
        """
        self._store.drop(name)

    def save(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Writes an adapter in PEFT's format, as :func:`peft_kernels.save_adapter` does.

        Its layers alone are written: a UserWarning names what else trains in the model. The task
        type is :meth:`attach`'s, but for those that have PEFT look for a head in the folder: then
        it is None, and a UserWarning says so.

        Raises:
            ValueError: there is no adapter of this name, or PEFT has adapters in the model too.
            NotADirectoryError: ``folder`` is a file.
            RuntimeError: something has replaced a layer of the pool.
        """
        path = path_of("folder", folder)
        check_in_place(self._model)
        check_without_peft(self._model, self._store.layers)
        version, matrices = self._store.read(name)
        layers = {
            layer: peft_lora.AdaptedLayer(
                peft_lora.Adapter(*matrices[layer]),
                scale,
                version.use_rslora,
                version.dropout,
                self._store.layers[layer].fan_in_fan_out,
            )
            for layer, (_, scale) in version.layers.items()
        }
        task_type = writable_task_type(self._model, self._task_type, with_heads=False, stacklevel=3)
        warn_of_left_out(self._model, ())
        peft_lora.write_adapter(self._model, layers, path, task_type=task_type)

    def pin(self, name: str) -> None:
        """Keeps an adapter from being evicted; ValueError if there is none of this name."""
        self._store.find(name).pinned = True

    def unpin(self, name: str) -> None:
        """Lets an adapter be evicted again; ValueError if there is none of this name."""
        self._store.find(name).pinned = False

    # ---- what is there -----------------------------------------------------------------------

    def names(self) -> list[str]:
        """The adapters, in the order in which they came."""
        return list(self._store.adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._store.adapters

    def __len__(self) -> int:
        return len(self._store.adapters)

    def __repr__(self) -> str:
        return (
            f"AdapterPool({self.names()}, layers={len(self._store.layers)}, "
            f"capacity={self._store.book.page_count * PAGE}, max_rank={self._max_rank})"
        )

    def ranks(self, name: str) -> dict[str, int]:
        """An adapter's rank in each layer that it adapts; ValueError if there is none so named."""
        return {layer: r for layer, (r, _) in self._store.find(name).layers.items()}

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The Parameters of a trainable adapter, for an optimizer: see :meth:`named_parameters`."""
        return [parameter for _, parameter in self.named_parameters(name)]

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The matrices of a trainable adapter: ``<layer>.lora_A`` and ``<layer>.lora_B``.

        A is [r, k]; B is [r, n], transposed as the pages hold it. They are views of the pages, so
        that an optimizer's step is there in the next forward, and they aren't the model's own: only
        its ``zero_grad()`` reaches them, and that of wrappers that :meth:`attach` was given.

        Raises:
            ValueError: there is no adapter of this name, or it isn't trainable.
        """
        version = self._store.find(name)
        if not version.trainable:
            raise ValueError(f"{name!r} isn't trainable; load it with trainable=True")
        named = []
        for layer, bound in self._store.bound(version).items():
            named += [(f"{layer}.lora_A", bound.lora_a), (f"{layer}.lora_B", bound.lora_b)]
        return iter(named)

    def memory(self) -> PoolMemory:
        """What is reserved, used and free."""
        return self._store.memory()

    # ---- routing -----------------------------------------------------------------------------

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


def _positive(argument: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int; got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1; got {value}")
    return value


def _checked_seed(seed: int | None, default: int) -> int:
    if seed is None:
        return default
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int in [0, 2**63); got {seed!r}")
    return seed


def _pages_for(argument: str, rows: int) -> int:
    return -(-_positive(argument, rows) // PAGE)


def _warn_of_processes() -> None:
    """The parameters aren't the model's, so that nothing which wraps it knows of them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = torch.distributed.get_world_size()
        if count > 1:
            warnings.warn(
                "a pool's parameters are its own, not the model's: DistributedDataParallel, made "
                f"before attach or after, averages no gradient of theirs over the {count} "
                "processes; one made after leaves them out of its zero_grad. Average the gradients "
                "of pool.parameters(name) after each backward, and zero them by the optimizer",
                RuntimeWarning,
                stacklevel=3,
            )
