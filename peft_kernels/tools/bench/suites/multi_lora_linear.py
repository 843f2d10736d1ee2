"""What multi_lora_linear is measured on: cases with the ratio they must reach, and its rivals.

Every ratio is to the bare frozen layer, ``F.linear``, in float32 on a CPU and in the case's own
dtype on a GPU; with a backward, to the bare layer's forward and backward to x. Rank 16 where
nothing else is said.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import _library
from peft_kernels.ops.multi_lora_linear import (
    PAGE,
    BankDropout,
    LoRABank,
    example_ids,
    example_inputs,
    example_trained,
    multi_lora_linear,
)
from peft_kernels.tools.bench.case import BaseCase
from peft_kernels.tools.bench.implementation import Implementation, copy_values, from_module

SHAPE = "rows x seq, k = n, adapters"
BARE = "bare layer"
FUSED = "peft_kernels"
RIVALS = ("reference", "gather + bmm", "peft")
DROPOUT_P = 0.1


@dataclass(frozen=True)
class Case(BaseCase):
    """x [rows, seq, k], each row with one of ``adapters`` adapters, out of ``pool`` that are there.

    ``ranks`` are dealt out to the pool in turn.
    """

    rows: int
    seq: int
    n: int
    k: int
    adapters: int
    pool: int
    ranks: tuple[int, ...] = (16,)
    dtype: torch.dtype = torch.float32
    backward: bool = False
    title: str = ""

    @property
    def shape(self) -> str:
        width = f"{self.k}" if self.n == self.k else f"{self.n}x{self.k}"
        pool = f" of {self.pool}" if self.pool != self.adapters else ""
        ranks = "" if self.ranks == (16,) else ", rank " + ", ".join(map(str, self.ranks))
        return f"{self.rows}x{self.seq}, {width}, {self.adapters}{pool}{ranks}"

    @property
    def target(self) -> float | None:
        """The highest ratio allowed, or None where none is set."""
        return TARGETS.get(self)


def _square(rows: int, seq: int, k: int, adapters: int, **options: Any) -> Case:
    return Case(rows, seq, k, k, adapters, options.pop("pool", adapters), **options)


_POOL = ", by the size of the pool"
_RANKS = ", by rank"
TARGETS: dict[Case, float | None] = {
    _square(64, 1, 1024, 64): 1.12,
    _square(32, 1, 2048, 32): 0.90,
    _square(32, 1, 2048, 4): 0.80,
    _square(32, 16, 1024, 32): 1.05,
    _square(8, 64, 1024, 8): 1.04,
    **{_square(32, 1, 1024, 8, pool=pool, title=_POOL): None for pool in (8, 64, 256, 1000)},
    **{
        _square(32, 16, 1024, 32, ranks=ranks, title=_RANKS): None
        for ranks in ((8,), (64,), (8, 64), (8, 16, 32, 64))
    },
    _square(32, 16, 1024, 8, backward=True): None,
    _square(8, 64, 1024, 8, backward=True): None,
    _square(64, 1, 1024, 64, dtype=torch.bfloat16): None,
    _square(32, 16, 1024, 32, dtype=torch.bfloat16): None,
}
CASES = tuple(TARGETS)


def cases(
    shapes: Iterable[tuple[int, int, int]] | None, dtype: torch.dtype, backward: bool
) -> list[Case]:
    """Rows m with an adapter each, for shapes m x n x k; or the suite's own cases."""
    if shapes is not None:
        return [Case(m, 1, n, k, m, m, dtype=dtype, backward=backward) for m, n, k in shapes]
    return [c for c in CASES if c.dtype is dtype and c.backward is backward]


# ---- implementations -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    x: Tensor  # [rows, seq, k]
    weight: Tensor
    bias: Tensor
    bank: LoRABank
    ids: Tensor  # [rows]
    dropout_p: float

    @property
    def present(self) -> list[int]:
        return sorted(set(self.ids.tolist()))


def implementations(
    case: Case,
    *,
    device: torch.device | str = "cpu",
    dropout_p: float = 0.0,
    compiled: bool = False,
) -> dict[str, Implementation]:
    """The bare layer, ours and its rivals, on the same values. Peers take part where installed."""
    inputs = _inputs(case, device, dropout_p)
    found = {
        BARE: _bare(inputs, case.bare_dtype(device)),
        FUSED: _ours(inputs, "auto"),
        "reference": _ours(inputs, "reference"),
        "gather + bmm": _gathered(inputs),
    }
    if compiled:
        gathered = _gathered(inputs)
        forward = torch.compile(gathered.forward)
        found["torch.compile"] = Implementation(
            forward, gathered.x, gathered.parameters, gathered.frozen
        )
    # PEFT's mixed batches are for inference alone, and 1,000 modules a layer take minutes to make.
    if importlib.util.find_spec("peft") and not case.backward and case.pool <= 64:
        found["peft"] = _peft(inputs)
    return found


def exact(case: Case, *, device: torch.device | str = "cpu") -> Implementation:
    """The reference on the same values in float64."""
    inputs = _inputs(case, device, 0.0)
    wide = {name: getattr(inputs, name).double() for name in ("x", "weight", "bias")}
    bank = inputs.bank._replace(a=inputs.bank.a.double(), b=inputs.bank.b.double())
    return _ours(replace(inputs, bank=bank, **wide), "reference")


def _inputs(case: Case, device: torch.device | str, dropout_p: float) -> _Inputs:
    torch.manual_seed(0)
    ranks = [case.ranks[i % len(case.ranks)] for i in range(case.pool)]
    ids = example_ids(case.rows, case.adapters, "distinct")
    # The adapters of the batch lie anywhere in the pool.
    ids = torch.randperm(case.pool)[: case.adapters].int()[ids.long()]
    made: Any = example_inputs(
        case.rows * case.seq,
        case.n,
        case.k,
        ranks,
        ids=ids,
        dtype=case.dtype,
        adapter_dtype=torch.float32,
        device=device,
    )
    x = made["x"].view(case.rows, case.seq, case.k)
    return _Inputs(x, made["weight"], made["bias"], made["banks"][0], made["ids"], dropout_p)


def _bare(inputs: _Inputs, dtype: torch.dtype) -> Implementation:
    """The frozen layer alone."""
    x, weight, bias = (t.to(dtype) for t in (inputs.x, inputs.weight, inputs.bias))
    return Implementation(lambda x: F.linear(x, weight, bias), x, (), (weight, bias))


def _ours(inputs: _Inputs, backend: str) -> Implementation:
    bank = inputs.bank
    trained = example_trained(bank, inputs.present)
    dropout = None
    if inputs.dropout_p:
        rates = torch.full(bank.ranks.shape, inputs.dropout_p, dtype=torch.float64)
        seeds = torch.arange(len(bank.ranks))
        dropout = BankDropout(rates.to(bank.a.device), seeds.to(bank.a.device))

    def forward(x: Tensor) -> Tensor:
        with _library.backend(backend):
            return multi_lora_linear(
                x,
                inputs.weight,
                bank,
                inputs.ids,
                bias=inputs.bias,
                dropout=dropout,
                trained=trained,
            )

    frozen = (inputs.weight, inputs.bias, inputs.ids, trained.rows, *bank, *(dropout or ()))
    return Implementation(forward, inputs.x, (*trained.a, *trained.b), frozen)


@functools.cache
def _page_rows(rank: int) -> Tensor:
    return torch.arange(rank)


def _matrices(bank: LoRABank, slot: int) -> tuple[Tensor, Tensor]:
    """A [r, k] and B^T [r, n] of one adapter."""
    q = _page_rows(int(bank.ranks[slot]))
    rows = bank.table[slot, q // PAGE].long() * PAGE + q % PAGE
    return bank.a[rows], bank.b[rows]


def _gathered(inputs: _Inputs) -> Implementation:
    """Ranks padded to the largest, each row's matrices gathered, two batched products."""
    bank, scales = inputs.bank, inputs.bank.scales[:, None, None]
    slots, most = len(bank.ranks), int(bank.ranks.max())
    a = bank.a.new_zeros(slots, most, bank.a.shape[1])
    b = bank.b.new_zeros(slots, most, bank.b.shape[1])
    for slot in range(slots):
        own_a, own_b = _matrices(bank, slot)
        a[slot, : len(own_a)], b[slot, : len(own_b)] = own_a, own_b
    a.requires_grad_(), b.requires_grad_()
    ids = inputs.ids.long()

    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, inputs.weight, inputs.bias)
        own = F.dropout(x, inputs.dropout_p).to(a.dtype)
        s = torch.bmm(own, a[ids].transpose(1, 2)) * scales[ids]
        return y + torch.bmm(s, b[ids]).to(y.dtype)

    frozen = (inputs.weight, inputs.bias, inputs.ids)
    return Implementation(forward, inputs.x, (a, b), frozen)


def _peft(inputs: _Inputs) -> Implementation:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = nn.Linear(inputs.bank.a.shape[1], inputs.bank.b.shape[1], device="meta")
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    base.bias = nn.Parameter(inputs.bias, requires_grad=False)
    layer: Any = None
    for slot in inputs.present:
        own_a, own_b = _matrices(inputs.bank, slot)
        name, r = str(slot), len(own_a)
        config = LoraConfig(r=r, lora_alpha=r, lora_dropout=inputs.dropout_p)
        if layer is None:
            layer = Linear(base, name, config=config, r=r, lora_alpha=r)
        else:
            layer.update_layer(name, r, lora_alpha=r, config=config)
        layer = layer.to(inputs.x.device)
        copy_values(layer.lora_A[name].weight, own_a)
        copy_values(layer.lora_B[name].weight, own_b.T)
        layer.scaling[name] = float(inputs.bank.scales[slot])
    layer.eval()
    names = [str(slot) for slot in inputs.ids.tolist()]
    return from_module(layer, inputs.x, lambda x: layer(x, adapter_names=names))
