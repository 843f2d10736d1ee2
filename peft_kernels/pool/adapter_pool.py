"""Many LoRA adapters for one model, each row of a batch with its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats import peft_lora
from peft_kernels.formats.folder import path_of
from peft_kernels.integrations.peft.beside import check_without_peft
from peft_kernels.models.in_place import check_in_place
from peft_kernels.models.modules_to_save import warn_of_left_out, writable_task_type
from peft_kernels.ops.multi_lora_linear import PAGE
from peft_kernels.pool.pages import PoolFullError
from peft_kernels.pool.routed import Routed
from peft_kernels.pool.store import PoolMemory
from peft_kernels.pool.versions import Source, Version, new_version, read_version

__all__ = ["AdapterPool", "PoolFullError", "PoolMemory"]


class AdapterPool(Routed):
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

    def __init__(self) -> None:
        raise TypeError("an AdapterPool is made by AdapterPool.attach(model, ...)")

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


def _checked_seed(seed: int | None, default: int) -> int:
    if seed is None:
        return default
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int in [0, 2**63); got {seed!r}")
    return seed


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
