"""Prefix tuning: trained keys and values before those of the text (Li & Liang 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.modules.bases import check_memory
from peft_kernels.modules.checks import check_choice, check_share, check_size
from peft_kernels.modules.replaced import check_all_stored
from peft_kernels.nn._drawn import Drawn
from peft_kernels.nn._kept import KeepingModule
from peft_kernels.nn._prefix_parts import FlatPrefix, MLPPrefix, Pair, Shape

SITES = ("self", "encoder", "cross")
REPARAMETRIZATIONS = ("flat", "mlp")
Values = Mapping[str, Sequence[Pair | None]]


class PrefixTuning(Drawn, KeepingModule):
    """Keys and values of ``length`` virtual tokens for each attention layer of a model.

    Called without arguments it returns, for each site, a list over the layers of
    ``(prefix_k, prefix_v)``, ``[Hkv, L, D]`` each (``[P, Hkv, L, D]`` of a bank of P tasks), or
    None for a layer that has no prefix: what :func:`peft_kernels.ops.prefix_attention` takes. The
    reparametrisation is computed once for all layers and rows.

    "flat" trains the keys and values themselves. "mlp" trains P', ``[L, dim]``, and makes
    ``P = W_n tanh(... tanh(W_1 P'))`` of it, depth n, for each site with a P' and an MLP of its own
    (section 4.3 of the paper); the tasks of a bank have a P' each and share the MLP. When training
    is over, :meth:`eject` keeps P and drops the MLP. The paper's third form, "embedding-only",
    trains embeddings whose keys and values the model computes: that is prompt tuning.

    Trainable numbers, of a site whose layers' keys and values are ``n = sum of 2 Hkv D`` wide: flat
    ``L n``; mlp ``L dim`` and the MLP's ``(dim + 1) mid``, ``(mid + 1) mid`` for each depth above
    2, and ``(mid + 1) n``.

    ``state_dict`` holds all of it, P' and MLP included, so that training goes on from a saved state
    as if it had not stopped; :meth:`config` gives the arguments that make the module again.

    Args:
        length: L, the number of virtual tokens.
        layers: ``(Hkv, D)`` of each attention layer, key/value heads and their size, None for a
            layer without a prefix; or a mapping from site to such a list. Sites are "self" (a
            decoder's or a lone encoder's self-attention), "encoder" (an encoder-decoder's encoder)
            and "cross".
        tasks: P, prefixes in the bank.
        reparametrization: "flat" or "mlp".
        mid: the MLP's inner width.
        dim: the width of P'; by default Hkv * D of the first layer that has a prefix.
        depth: the MLP's number of linear layers; 1 is a linear map of P'.
        init: "normal", "zero" (keys and values start as zero), or the values to start from, as
            :meth:`fit` takes them.
        std: the deviation of "normal", of the flat values (default 0.02) or of P' (default 1). The
            MLP's linear layers are drawn as torch's.
        dropout: the share of the keys' and values' elements that is dropped in training, one draw
            for the whole batch.
        device, dtype: of all that trains.

    Raises:
        ValueError: a length, size or share out of range, no layer, an unknown site or choice, or
            values that don't fit.
        TypeError: a size that isn't an int.
    """

    read_from_folder = False  # whether it comes from a folder, which PEFT may have trained

    @torch.inference_mode(False)
    def __init__(
        self,
        length: int,
        layers: Sequence[Shape | None] | Mapping[str, Sequence[Shape | None]],
        *,
        tasks: int = 1,
        reparametrization: str = "flat",
        mid: int = 512,
        dim: int | None = None,
        depth: int = 2,
        init: str | Values | Sequence[Pair | None] = "normal",
        std: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("reparametrization", reparametrization, REPARAMETRIZATIONS)
        if isinstance(init, str):
            check_choice("init", init, ("normal", "zero"))
        for name, size in {"length": length, "tasks": tasks, "mid": mid, "depth": depth}.items():
            check_size(name, size)
        check_share("dropout", dropout)
        self.layers = _checked_layers(layers)
        self.length, self.tasks, self.dropout = length, tasks, float(dropout)
        self.reparametrization, self.mid, self.depth = reparametrization, mid, depth
        self.dim = _default_dim(self.layers) if dim is None else dim
        check_size("dim", self.dim)
        self.std = std
        factory: Any = {"device": device, "dtype": dtype}
        self.sites = nn.ModuleDict({name: self._site(name, factory) for name in self.layers})
        self._init = init if isinstance(init, str) else "normal"
        self.reset_parameters(self._init)
        if not isinstance(init, str):
            self.fit(init)

    def _site(self, name: str, factory: dict[str, Any]) -> FlatPrefix | MLPPrefix:
        shapes = _present(self.layers[name])
        if self.reparametrization == "flat":
            return FlatPrefix(self.tasks, self.length, shapes, factory)
        return MLPPrefix(self.tasks, self.length, shapes, self.dim, self.mid, self.depth, factory)

    def reset_parameters(self, init: str = "normal") -> None:
        """Draws all parameters anew; with "zero" the keys and values are zero."""
        check_all_stored(self)
        check_choice("init", init, ("normal", "zero"))
        for site in self._prefixes():
            site.reset_parameters(init, self.std)

    def _draw(self) -> None:
        self.reset_parameters(self._init)

    def forward(self, sites: Sequence[str] | None = None) -> dict[str, list[Pair | None]]:
        """Keys and values by site and layer, ``[Hkv, L, D]``, or ``[P, Hkv, L, D]`` if P > 1.

        Where no gradient is wanted, an MLP's output is kept until a parameter changes.

        Args:
            sites: those wanted, all by default; sites that the prefix hasn't are left out.
        """
        wanted = [name for name in self.layers if sites is None or name in sites]
        if self.reparametrization == "flat" or torch.is_grad_enabled() or self._drops():
            return self._evaluate(wanted)
        everything = self._kept.get(
            lambda: self._evaluate(list(self.layers)), list(self.parameters())
        )
        return {name: everything[name] for name in wanted}

    def layer(self, site: str, index: int) -> Pair | None:
        """One layer's keys and values by themselves: of the MLP's end, that layer's part alone."""
        if self.layers[site][index] is None:
            return None
        prefix: Any = self.sites[site]
        return self._finish(prefix.layer(index, prefix.hidden()))

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, values: Values | Sequence[Pair | None]) -> float:
        """Makes the prefix equal to given keys and values, e.g. those of a real text.

        Flat values are copied. Of an MLP the last linear layer is solved for, by least squares
        given its input: exactly, up to rounding, as long as ``P * L`` is at most ``mid`` (``dim``
        at depth 1).

        Args:
            values: a list over the layers of ``(keys, values)``, ``[Hkv, L, D]`` or
                ``[P, Hkv, L, D]``, or None where the layer has no prefix; a mapping from site to
                such a list where there are several. A site that isn't there stays as it is.

        Returns:
            The largest ``norm(prefix - values) / norm(values)`` of a layer after it.

        Raises:
            ValueError: an unknown site, or a list or shapes that don't fit; nothing is changed.
            RuntimeError: the prefix is on the meta device.
        """
        check_all_stored(self)
        check_memory(next(self.parameters()), "the prefix")
        by_site = _by_site(values, self.layers)
        checked = {name: self._checked_values(name, given) for name, given in by_site.items()}
        worst = 0.0
        for name, targets in checked.items():
            prefix: Any = self.sites[name]
            prefix.fit(targets)
            hidden = prefix.hidden()
            for index, target in targets.items():
                made = torch.stack(prefix.layer(index, hidden), 1)
                error = (made - target).norm() / target.norm().clamp_min(1e-30)
                worst = max(worst, error.item())
        return worst

    @torch.inference_mode(False)
    @torch.no_grad()
    def eject(self) -> PrefixTuning:
        """Drops the reparametrisation and keeps its output as flat parameters; the same prefix.

        The parameters are new ones: an optimizer must be given them. Returns the module itself.
        """
        for name, prefix in self.sites.items():
            if isinstance(prefix, MLPPrefix):
                weight = prefix.embedding
                factory = {"device": weight.device, "dtype": weight.dtype}
                flat = FlatPrefix(self.tasks, self.length, _present(self.layers[name]), factory)
                hidden = prefix.hidden()
                for index in _present(self.layers[name]):
                    flat.values[str(index)].copy_(torch.stack(prefix.layer(index, hidden), 1))
                flat.requires_grad_(weight.requires_grad)
                self.sites[name] = flat.train(self.training)
        self.reparametrization = "flat"
        return self

    def table(self, site: str = "self") -> Tensor:
        """One table, ``[P, L, columns]``: layer by layer, keys then values, heads, head size."""
        prefix: Any = self.sites[site]
        hidden = prefix.hidden()
        rows = [
            torch.stack(prefix.layer(index, hidden), 1).permute(0, 3, 1, 2, 4).flatten(2)
            for index in _present(self.layers[site])
        ]
        return torch.cat(rows, -1)

    def from_table(self, table: Tensor, site: str = "self") -> list[Pair | None]:
        """The values of a table of :meth:`table`'s layout, ``[L, columns]`` or ``[P, L, columns]``.

        Raises:
            ValueError: a table of another size.
        """
        shapes = _present(self.layers[site])
        widths = [2 * heads * size for heads, size in shapes.values()]
        expected = (self.tasks, self.length, sum(widths))
        if table.shape != expected and (self.tasks > 1 or table.shape != expected[1:]):
            raise ValueError(f"table must be {list(expected)}; got {list(table.shape)}")
        values: list[Pair | None] = [None] * len(self.layers[site])
        parts = table.view(expected).split(widths, -1)
        for (index, (heads, size)), part in zip(shapes.items(), parts, strict=True):
            k, v = part.unflatten(-1, (2, heads, size)).permute(2, 0, 3, 1, 4).unbind(0)
            values[index] = (k, v)
        return values

    def config(self) -> dict[str, Any]:
        """The arguments that make a module of this one's shape, as what JSON can hold."""
        names = ("length", "layers", "tasks", "reparametrization", "mid", "dim", "depth", "std")
        layers = {
            name: [None if shape is None else list(shape) for shape in shapes]
            for name, shapes in self.layers.items()
        }
        given = {name: getattr(self, name) for name in names}
        return given | {"layers": layers, "dropout": self.dropout}

    def extra_repr(self) -> str:
        counts = ", ".join(f"{name}: {len(_present(x))}" for name, x in self.layers.items())
        return (
            f"length={self.length}, layers=({counts}), tasks={self.tasks}, "
            f"reparametrization={self.reparametrization}, dropout={self.dropout}"
        )

    # -- parts

    def _prefixes(self) -> list[Any]:
        return list(self.sites.values())

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _evaluate(self, sites: Sequence[str]) -> dict[str, list[Pair | None]]:
        made: dict[str, list[Pair | None]] = {}
        for name in sites:
            shapes = self.layers[name]
            prefix: Any = self.sites[name]
            hidden = prefix.hidden()
            made[name] = [
                None if shape is None else self._finish(prefix.layer(index, hidden))
                for index, shape in enumerate(shapes)
            ]
        return made

    def _finish(self, pair: Pair) -> Pair:
        k, v = pair
        if self.tasks == 1:
            k, v = k[0], v[0]
        if self._drops():
            k, v = F.dropout(k, self.dropout), F.dropout(v, self.dropout)
        return k, v

    def _checked_values(self, site: str, given: Sequence[Pair | None]) -> dict[int, Tensor]:
        """``[P, 2, Hkv, L, D]`` of each layer that has a prefix."""
        shapes = self.layers[site]
        if len(given) != len(shapes):
            raise ValueError(
                f"values of {site} must have {len(shapes)} layers, as the prefix; got {len(given)}"
            )
        targets = {}
        for index, (heads, size) in _present(shapes).items():
            pair, expected = given[index], (self.tasks, heads, self.length, size)
            if pair is None:
                raise ValueError(f"values of {site} must have keys and values for layer {index}")
            for x in pair:
                if tuple(x.shape) != expected and (self.tasks > 1 or x.shape != expected[1:]):
                    raise ValueError(
                        f"values of {site}, layer {index}, must be {list(expected)}; "
                        f"got {list(x.shape)}"
                    )
            targets[index] = torch.stack([x.view(expected) for x in pair], 1)
        return targets


# ---- arguments -----------------------------------------------------------------------------------


def _checked_layers(layers: Any) -> dict[str, list[Shape | None]]:
    by_site = layers if isinstance(layers, Mapping) else {"self": layers}
    checked: dict[str, list[Shape | None]] = {}
    for name, shapes in by_site.items():
        check_choice("layers", name, SITES)
        checked[name] = [None if shape is None else tuple(shape) for shape in shapes]  # type: ignore[misc]
        for index, shape in enumerate(checked[name]):
            if shape is not None and (len(shape) != 2 or min(shape) < 1):
                raise ValueError(
                    f"layers of {name} must be (key/value heads, head size) or None; layer {index} "
                    f"is {shape}"
                )
    if not any(_present(shapes) for shapes in checked.values()):
        raise ValueError("layers must have at least one layer with a prefix; got none")
    return checked


def _present(shapes: Sequence[Shape | None]) -> dict[int, Shape]:
    """The layers that have a prefix, by index."""
    return {index: shape for index, shape in enumerate(shapes) if shape is not None}


def _default_dim(layers: Mapping[str, Sequence[Shape | None]]) -> int:
    heads, size = next(shape for shapes in layers.values() for shape in shapes if shape is not None)
    return heads * size


def _by_site(values: Any, layers: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        if len(layers) > 1:
            raise ValueError(f"values must be by site, one of {', '.join(layers)}")
        return {next(iter(layers)): values}
    if unknown := sorted(set(values) - set(layers)):
        raise ValueError(f"values must be of {', '.join(layers)}; got {unknown[0]}")
    return values
