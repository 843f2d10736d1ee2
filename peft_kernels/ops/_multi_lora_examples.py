"""Example inputs of ``multi_lora_linear``, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels.ops._lora_banks import PAGE, LoRABank, Trained


def example_bank(
    n: int,
    k: int,
    ranks: Sequence[int],
    *,
    max_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoRABank:
    """Random adapters of the given ranks in pages out of order; whatever isn't theirs is NaN."""
    counts = [-(-r // PAGE) for r in ranks]
    most = max([-(-(max_rank or 0) // PAGE), 1, *counts])
    pages = torch.randperm(sum(counts) + 2)
    table = torch.full((len(ranks), most), 2**30, dtype=torch.int32)
    a = torch.full((len(pages) * PAGE, k), torch.nan)
    b = torch.full((len(pages) * PAGE, n), torch.nan)
    first = 0
    for slot, (r, count) in enumerate(zip(ranks, counts, strict=True)):
        own = pages[first : first + count]
        table[slot, :count] = own
        rows = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()[:r]
        a[rows] = torch.randn(r, k) * max(k, 1) ** -0.5
        b[rows] = torch.randn(r, n) * max(r, 1) ** -0.5
        first += count
    scales = torch.rand(len(ranks)) + 0.5
    rank_row = torch.tensor(ranks, dtype=torch.int32)
    bank = LoRABank(a.to(dtype), b.to(dtype), table, rank_row, scales)
    return LoRABank(*(tensor.to(device) for tensor in bank))


def example_ids(
    count: int, slots: int, popularity: str = "uniform", device: torch.device | str = "cpu"
) -> Tensor:
    """Adapters of ``count`` rows, drawn as in the serving papers' benchmarks.

    ``popularity`` is ``"distinct"``, ``"uniform"``, ``"zipf"`` (1.5), ``"identical"``, ``"skewed"``
    (half the rows on one adapter, every tenth without) or ``"none"``.
    """
    if popularity == "distinct":
        ids = torch.arange(count) % slots
    elif popularity == "uniform":
        ids = torch.randint(slots, (count,))
    elif popularity == "zipf":
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** -1.5
        ids = torch.multinomial(weights, count, replacement=True) if count else torch.zeros(0)
    elif popularity == "identical":
        ids = torch.full((count,), slots - 1)
    elif popularity == "skewed":
        ids = torch.randint(slots, (count,))
        ids[torch.rand(count) < 0.5] = 0
        ids[torch.rand(count) < 0.1] = -1
    elif popularity == "none":
        ids = torch.full((count,), -1)
    else:
        raise ValueError(f"popularity is unknown: {popularity!r}")
    return ids.to(device, torch.int32)


def example_inputs(
    m: int,
    n: int | Sequence[int],
    k: int,
    ranks: Sequence[int],
    *,
    ids: Tensor | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, object]:
    """Random arguments of :func:`multi_lora_linear`; several n make a bank each."""
    widths = [n] if isinstance(n, int) else list(n)
    total = sum(widths)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape) * std).to(device, dtype)

    inputs: dict[str, object] = {
        "x": normal(m, k, std=1.0),
        "weight": normal(total, k, std=max(k, 1) ** -0.5),
        "banks": [
            example_bank(
                w, k, ranks, max_rank=max_rank, dtype=adapter_dtype or dtype, device=device
            )
            for w in widths
        ],
        "ids": example_ids(m, len(ranks), "skewed", device) if ids is None else ids.to(device),
    }
    if bias:
        inputs["bias"] = normal(total, std=1.0)
    return inputs


def example_trained(bank: LoRABank, slots: Sequence[int]) -> Trained:
    """Fresh leaves with the values of the named adapters, to receive their gradients."""
    rows = torch.full_like(bank.ranks, -1)
    a, b, first = [], [], 0
    for slot in slots:
        r = int(bank.ranks[slot])
        q = torch.arange(r, device=bank.a.device)
        pages = bank.table[slot, q // PAGE].long() * PAGE + q % PAGE
        a.append(bank.a[pages].requires_grad_())
        b.append(bank.b[pages].requires_grad_())
        rows[slot] = first
        first += r
    return Trained(rows, a, b)
