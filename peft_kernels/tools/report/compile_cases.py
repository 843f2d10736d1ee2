"""The calls whose launches ``compile.py`` compiles, on tensors without data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch

from peft_kernels.ops._gguf_blocks import BLOCKS
from peft_kernels.tools.report.compile_norm import NORM_CASES, NormCase
from peft_kernels.tools.report.compile_prefix import PREFIX_CASES, PrefixCase
from peft_kernels.tools.report.compile_prompt import PROMPT_CASES, PromptCase
from peft_kernels.triton.adapter import launch as adapter_launchers
from peft_kernels.triton.adapter_fusion import launch as fusion_launchers
from peft_kernels.triton.common import cost
from peft_kernels.triton.dora_linear import launch as dora_launchers
from peft_kernels.triton.lora_linear import launch as launchers
from peft_kernels.triton.lora_linear import modelled, plans, tilings
from peft_kernels.triton.lora_linear_codes import launch as codes_launchers
from peft_kernels.triton.multi_lora_linear import launch as multi_launchers

N = K = 4096


def _dtypes(dtype: str, adapter_dtype: str) -> str:
    return f"{dtype}/{adapter_dtype}".replace("bfloat", "bf").replace("float", "f")


@dataclass(frozen=True)
class Case:
    """A forward and backward of `lora_linear` whose launches are compiled."""

    m: int
    r: int
    dtype: str
    adapter_dtype: str
    dropout: bool
    plans: tuple[str, ...]

    def label(self) -> str:
        dropout = " dropout" if self.dropout else ""
        return f"m={self.m} r={self.r} {_dtypes(self.dtype, self.adapter_dtype)}{dropout}"

    def run(self) -> None:
        x, weight, bias, dy = _base(self.m, N, self.dtype)
        a, b = (
            _empty(self.r, K, dtype=self.adapter_dtype),
            _empty(N, self.r, dtype=self.adapter_dtype),
        )
        seed = _empty(dtype="int64") if self.dropout else None
        p = 0.1 if self.dropout else 0.0
        for plan in self.plans:
            with plans.force(plan):
                _, s = launchers.lora_linear_fwd(x, weight, bias, a, b, 1.0, None, p, seed)
                launchers.lora_linear_bwd(
                    dy, x, weight, a, b, s, 1.0, None, p, seed, True, True, True
                )


@dataclass(frozen=True)
class DoraCase(Case):
    """The same of `dora_linear`."""

    def label(self) -> str:
        return f"dora {super().label()}"

    def run(self) -> None:
        x, weight, bias, dy = _base(self.m, N, self.dtype)
        a, b, gain = (
            _empty(self.r, K, dtype=self.adapter_dtype),
            _empty(N, self.r, dtype=self.adapter_dtype),
            _empty(N, dtype="float32"),
        )
        seed = _empty(dtype="int64") if self.dropout else None
        options = 1.0, None, 0.1 if self.dropout else 0.0, seed
        inputs = x, weight, bias, a, b, gain
        for plan in self.plans:
            with plans.force(plan):
                y, s = dora_launchers.dora_linear_fwd(*inputs, *options)
                needs = True, True, True, True
                dora_launchers.dora_linear_bwd(dy, *inputs, y, s, *options, *needs)


@dataclass(frozen=True)
class TilesCase:
    """Another case with each tile that a shape may get, and with the sums over k in ``splits``."""

    case: Case
    splits: tuple[int, ...] = (1,)

    @property
    def dtype(self) -> str:
        return self.case.dtype

    def label(self) -> str:
        return self.case.label()

    def run(self) -> None:
        count = max(len(tiles) for kernels in tilings.TILES.values() for tiles in kernels.values())
        for index, splits in itertools.product(range(count + 1), self.splits):
            with patch.object(tilings, "tiling", partial(_tiling_of, index, splits)):
                self.case.run()


def _tiling_of(
    index: int, splits: int, name: str, kernel: str, dtype: torch.dtype,
    product: cost.Product, chip: cost.Chip | None,
) -> tilings.Tiling:  # fmt: skip
    tiles = tilings.candidates(name, kernel, dtype, product.m)
    tile = tiles[min(index, len(tiles) - 1)]
    return tilings.Tiling(tile, splits if splits in tilings.splits_of(kernel, tile) else 1)


@dataclass(frozen=True)
class PartsCase:
    """Another case whose library's plan adds up S in the most parts that it may."""

    case: Case

    @property
    def dtype(self) -> str:
        return self.case.dtype

    def label(self) -> str:
        return f"{self.case.label()} S in parts"

    def run(self) -> None:
        most = modelled.PARTS_OF_S[-1]
        with patch.object(modelled, "parts_of_s", lambda *asked: most):
            self.case.run()


@dataclass(frozen=True)
class CodesCase(Case):
    """The same of `lora_linear` over a weight in codes."""

    kind: str = "4-bit"

    def label(self) -> str:
        return f"{self.kind} {super().label()}"

    def run(self) -> None:
        x, _, bias, dy = _base(self.m, N, self.dtype)
        weight = _in_codes(self.kind)
        a, b = (
            _empty(self.r, K, dtype=self.adapter_dtype),
            _empty(N, self.r, dtype=self.adapter_dtype),
        )
        seed = _empty(dtype="int64") if self.dropout else None
        options = 1.0, None, 0.1 if self.dropout else 0.0, seed
        for plan in self.plans:
            with plans.force(plan):
                _, s = codes_launchers.lora_linear_codes(x, *weight, bias, a, b, *options)
                needs = True, True, True
                codes_launchers.lora_linear_codes_bwd(dy, x, *weight, a, b, s, *options, *needs)


def _in_codes(kind: str) -> tuple:
    """A weight's arguments, without data."""
    blocks = N * K // 64
    codes, scales = _empty(N * K // 2, dtype="uint8"), _empty(blocks, dtype="uint8")
    book, nested_book = _empty(16, dtype="float32"), _empty(256, dtype="float32")
    nested = _empty(blocks // 256, dtype="float32"), nested_book, _empty(dtype="float32")
    if kind == "4-bit nested":
        return codes, scales, None, book, *nested, N, 64, 1, 256, 1.0, "planes"
    rest: tuple = (None, None, None, None, None, N)
    if kind == "int8":
        codes, scales = _empty(N, K, dtype="int8"), _empty(N, dtype="float32")
        return codes, scales, *rest, K, 1, 0, 1.0, "planes"
    if kind == "e4m3 128 x 128":
        codes, scales = _empty(N, K, dtype="float8_e4m3fn"), _empty(blocks // 256, dtype="float32")
        return codes, scales, *rest, 128, 128, 0, 1.0, "planes"
    elements, size = BLOCKS[kind]
    codes = _empty(N * K // elements * size, dtype="uint8")
    return codes, _empty(0, dtype="float32"), *rest, elements, 1, 0, 1.0, kind


@dataclass(frozen=True)
class MultiCase:
    """The same of `multi_lora_linear`, and of its delta alone, added to another's y and dx."""

    m: int
    max_rank: int
    widths: tuple[int, ...]
    dtype: str
    adapter_dtype: str
    dropout: bool
    plan: str
    per_id: int = 1

    def label(self) -> str:
        dropout = " dropout" if self.dropout else ""
        banks = f" {len(self.widths)} banks" if len(self.widths) > 1 else ""
        dtypes = _dtypes(self.dtype, self.adapter_dtype)
        return f"{self.plan} m={self.m} R={self.max_rank}{banks} {dtypes}{dropout}"

    def run(self) -> None:
        x, weight, bias, dy = _base(self.m, sum(self.widths), self.dtype)
        slots, rows, pages = 32, 4096, self.max_rank // 8
        a = [_empty(rows, K, dtype=self.adapter_dtype) for _ in self.widths]
        b = [_empty(rows, width, dtype=self.adapter_dtype) for width in self.widths]

        def by_slot(*shape: int, dtype: str) -> list[torch.Tensor]:
            return [_empty(slots, *shape, dtype=dtype) for _ in self.widths]

        tables, ranks = by_slot(pages, dtype="int32"), by_slot(dtype="int32")
        ids = _empty(self.m // self.per_id, dtype="int32")
        route = (ids, ids, _empty(slots + 2, dtype="int32"))
        rest = (a, b, tables, ranks, by_slot(dtype="float32"), *route)
        p, seeds = (
            (by_slot(dtype=dtype) if self.dropout else []) for dtype in ("float64", "int64")
        )
        fwd, bwd = multi_launchers.multi_lora_linear_fwd, multi_launchers.multi_lora_linear_bwd
        y, s = fwd(x, weight, bias, *rest, p, seeds, self.plan)
        multi_launchers.multi_lora_linear_add(y, x, *rest, p, seeds, self.plan)
        if self.plan != "decode":
            trained = (by_slot(dtype="int32"), [512] * len(self.widths))
            for base in (weight, None):
                bwd(dy, x, base, *rest, s, p, seeds, *trained, True, self.plan)


@dataclass(frozen=True)
class AdapterCase:
    """The same of `adapter`, all of whose options are used or none."""

    m: int
    r: int
    dtype: str
    adapter_dtype: str
    full: bool  # biases, both LayerNorms, x and another residual, dropout, a scale by channel
    activation: str

    def label(self) -> str:
        full = " full" if self.full else ""
        dtypes = _dtypes(self.dtype, self.adapter_dtype)
        return f"{self.activation} m={self.m} r={self.r} {dtypes}{full}"

    def run(self) -> None:
        x, _, _, dy = _base(self.m, N, self.dtype)
        residual = _empty(self.m, N, dtype=self.dtype) if self.full else None

        def parameter(*shape: int) -> torch.Tensor:
            return _empty(*shape, dtype=self.adapter_dtype)

        def optional(size: int) -> torch.Tensor | None:
            return parameter(size) if self.full else None

        down, up = parameter(self.r, K), parameter(N, self.r)
        inputs = (
            x, residual, down, optional(self.r), up, optional(N), 1.0, optional(N),
            optional(K), optional(K), 1e-5, optional(N), optional(N), 1e-5,
        )  # fmt: skip
        seed = _empty(dtype="int64") if self.full else None
        rest = (self.activation, self.full, 0.1 if self.full else 0.0, seed)
        _, z, statistics = adapter_launchers.adapter_fwd(*inputs, *rest)
        needs = (True, self.full, True, True, self.full, self.full)
        adapter_launchers.adapter_bwd(dy, *inputs, z, statistics, *rest, *needs)


@dataclass(frozen=True)
class FusionCase:
    """The same of `adapter_fusion`; the query is x, or with ``other_query`` another tensor."""

    m: int
    sizes: tuple[int, ...]
    dtype: str
    adapter_dtype: str
    other_query: bool
    activation: str

    def label(self) -> str:
        query = " query" if self.other_query else ""
        dtypes = _dtypes(self.dtype, self.adapter_dtype)
        sizes = f"{len(self.sizes)} x {self.sizes[0]}"
        return f"fusion {self.activation} m={self.m} {sizes} {dtypes}{query}"

    def run(self) -> None:
        x, _, _, dy = _base(self.m, N, self.dtype)
        query = _empty(self.m, K, dtype=self.dtype) if self.other_query else None
        ranks, adapters = sum(self.sizes), len(self.sizes)

        def parameter(*shape: int) -> torch.Tensor:
            return _empty(*shape, dtype=self.adapter_dtype)

        mix = parameter(N, ranks + adapters)
        inputs = (
            x, query, parameter(ranks, K), parameter(ranks), parameter(ranks + adapters, K),
            parameter(ranks + adapters), mix[:, :ranks], mix[:, ranks:].T,
            list(self.sizes), self.activation,
        )  # fmt: skip
        _, z, w, p = fusion_launchers.adapter_fusion_fwd(*inputs, dy)
        needs = (True, self.other_query, True, True, True)
        fusion_launchers.adapter_fusion_bwd(dy, *inputs, z, w, p, *needs)


def _empty(*shape: int, dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _base(m: int, n: int, dtype: str) -> tuple[torch.Tensor, ...]:
    """x, weight, bias and dy without data."""
    return tuple(_empty(*shape, dtype=dtype) for shape in ((m, K), (n, K), (n,), (m, n)))


AnyCase = (
    Case | TilesCase | PartsCase | MultiCase | AdapterCase | FusionCase | PrefixCase | PromptCase
    | NormCase
)  # fmt: skip

CASES: tuple[AnyCase, ...] = (
    # the heaviest use of every tile: the widest rank block, float32 adapters (three products for
    # one), dropout
    Case(8192, 64, "bfloat16", "float32", True, plans.PLANS),
    Case(16, 64, "bfloat16", "float32", True, plans.PLANS),
    # float16 multiplies float32 adapters in another way
    Case(8192, 64, "float16", "float32", True, ("i", "ii")),
    # the lightest
    Case(8192, 16, "bfloat16", "bfloat16", False, ("i", "ii")),
    # both tiles of programs that stay, where the chip has descriptors, and float16's
    Case(8192, 64, "bfloat16", "float32", True, (plans.PERSISTENT,)),
    Case(8192, 64, "float16", "float32", True, (plans.PERSISTENT,)),
    Case(8192, 16, "bfloat16", "bfloat16", False, (plans.PERSISTENT,)),
    DoraCase(8192, 16, "bfloat16", "float32", False, (plans.PERSISTENT,)),
    # every tile of the products, whole and in parts
    TilesCase(Case(64, 64, "bfloat16", "float32", True, ("i", "ii")), tilings.SPLITS),
    TilesCase(Case(64, 64, "float16", "float32", True, ("i", "ii"))),
    TilesCase(DoraCase(64, 64, "bfloat16", "float32", True, ("i", "ii"))),
    TilesCase(Case(8192, 64, "bfloat16", "float32", True, ("i", "ii")), (1, 2)),
    # terms in one operand, and A in terms: the widest rank blocks, the lightest, every tile
    Case(8192, 32, "bfloat16", "float32", True, ("i", "i_terms")),
    Case(8192, 32, "bfloat16", "bfloat16", True, ("i",)),
    Case(8192, 16, "bfloat16", "float32", False, ("i", "i_terms")),
    TilesCase(Case(64, 16, "bfloat16", "float32", True, ("ii", "ii_terms")), tilings.SPLITS),
    TilesCase(DoraCase(64, 16, "bfloat16", "float32", True, ("ii", "ii_terms"))),
    TilesCase(Case(8192, 16, "bfloat16", "float32", True, ("ii", "ii_terms")), (1, 2)),
    # S in parts beside the library's GEMM
    PartsCase(Case(64, 64, "bfloat16", "float32", True, ("library",))),
    PartsCase(Case(8192, 64, "bfloat16", "float32", False, ("library",))),
    PartsCase(DoraCase(8192, 64, "float16", "float32", False, ("library",))),
    # float32 takes the library's GEMM unless `tune` says otherwise
    Case(8192, 64, "float32", "float32", True, ("library",)),
    # the same five for many adapters
    MultiCase(8192, 64, (4096,), "bfloat16", "float32", True, "grouped"),
    MultiCase(64, 64, (4096,), "bfloat16", "float32", True, "grouped"),
    MultiCase(8192, 64, (4096,), "float16", "float32", True, "grouped"),
    MultiCase(8192, 16, (2048, 1024, 1024), "bfloat16", "bfloat16", False, "single", 1024),
    MultiCase(8192, 64, (4096,), "float32", "float32", True, "grouped"),
    # few rows
    MultiCase(16, 64, (4096,), "bfloat16", "bfloat16", False, "decode"),
    MultiCase(16, 64, (2048, 1024, 1024), "float16", "float32", False, "decode"),
)
# the heaviest and the lightest of `adapter`, and its float32 products
ADAPTER_CASES = (
    AdapterCase(8192, 64, "bfloat16", "float32", True, "gelu_tanh"),
    AdapterCase(8192, 64, "bfloat16", "bfloat16", True, "gelu"),
    AdapterCase(8192, 64, "float16", "float32", False, "silu"),
    AdapterCase(8192, 32, "bfloat16", "float32", True, "gelu"),
    AdapterCase(8192, 16, "float16", "float32", True, "gelu"),
    AdapterCase(8192, 64, "bfloat16", "float32", True, "gelu"),
    AdapterCase(8192, 16, "bfloat16", "bfloat16", False, "relu"),
    AdapterCase(8192, 16, "bfloat16", "float32", False, "relu"),
    AdapterCase(8192, 64, "float32", "float32", True, "gelu"),
)
# the same of `adapter_fusion`; the heaviest has a query of its own
FUSION_CASES = (
    FusionCase(8192, (64,) * 8, "bfloat16", "float32", True, "gelu_tanh"),
    FusionCase(64, (16, 16), "float16", "float16", False, "relu"),
    FusionCase(8192, (48,) * 8, "float32", "float32", False, "gelu"),
)
# the same of `dora_linear` as of `lora_linear`
DORA_CASES = (
    DoraCase(8192, 64, "bfloat16", "float32", True, plans.PLANS),
    DoraCase(16, 64, "bfloat16", "float32", True, plans.PLANS),
    DoraCase(8192, 16, "bfloat16", "float32", True, ("ii", "ii_terms")),
    DoraCase(8192, 64, "float16", "float32", True, ("i", "ii")),
    DoraCase(8192, 16, "bfloat16", "bfloat16", False, ("i", "ii")),
    DoraCase(8192, 64, "float32", "float32", True, ("library",)),
)
# weights in codes: every layout, the heaviest in each dtype, few rows and many
CODES_CASES = (
    CodesCase(8192, 64, "bfloat16", "float32", True, plans.CODES_PLANS, "4-bit nested"),
    CodesCase(16, 64, "bfloat16", "float32", True, ("fused",), "4-bit nested"),
    CodesCase(8192, 64, "float16", "float32", True, ("fused",), "4-bit nested"),
    CodesCase(8192, 64, "float32", "float32", True, plans.CODES_PLANS, "4-bit nested"),
    CodesCase(8192, 16, "bfloat16", "bfloat16", False, plans.CODES_PLANS, "int8"),
    CodesCase(8192, 64, "bfloat16", "float32", True, plans.CODES_PLANS, "e4m3 128 x 128"),
    *(CodesCase(512, 64, "bfloat16", "float32", True, plans.CODES_PLANS, kind) for kind in BLOCKS),
    CodesCase(16, 64, "bfloat16", "float32", True, ("fused",), "q6_K"),
)
CASES += ADAPTER_CASES + FUSION_CASES + PREFIX_CASES + PROMPT_CASES + DORA_CASES + CODES_CASES
CASES += NORM_CASES
