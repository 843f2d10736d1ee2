"""Times vLLM without LoRA, with its own LoRA and with this package's, in turns.

    make test-vllm                                        # makes .venv-vllm, among others
    PYTHONPATH=. .venv-vllm/bin/python python/tools/vllm_serving.py           # prints the tables
    ... --json benchmarks/results/vllm-serving.json       # and keeps them, cell by cell
    ... --model 1024 --dtype bfloat16 --adapters 1 16 --rounds 5              # a part

Each engine is a process of its own, and waits while another one is asked. A prefill is what it
takes until each of the requests has its first token, a decode the tokens after it. Adapters have
ranks 32, 8, 64 and 16 in turn, on all seven linear layers; weights are random. vLLM's own LoRA is
so slow that it gets shorter requests, and both others get the same beside it. A cell that the file
has is kept and not measured again, but with --again. The floors are what was set before anything
was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _vllm_engine import MODELS, NONE, OURS, STOCK, Batch, Process, widths, write_folders

DTYPES = ("float32", "bfloat16")
SEQUENCES = 16  # as many as there are adapters, where those are more
# The least of tokens a second, by adapters: prefill and decode over those without LoRA.
FLOORS = {0: (0.99, 0.99), 1: (0.97, 0.95), 16: (0.93, 0.85)}
OVER_STOCK = (15, 4)  # the same over vLLM's own, where there are adapters

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """What a row of the record is of."""

    model: str
    dtype: str
    compiled: bool
    threads: int
    batch: Batch
    beside_stock: bool

    @property
    def is_long(self) -> bool:
        """Beside vLLM's own, which is slow, or of more requests than the others."""
        return self.beside_stock or self.batch.sequences > SEQUENCES

    @property
    def ways(self) -> tuple[str, ...]:
        return (NONE, OURS, STOCK) if self.beside_stock else (NONE, OURS)


def cells(options: argparse.Namespace) -> Iterator[list[Cell]]:
    """Those that are asked for, in groups that the same engines serve."""
    slots: dict[int, list[tuple[Batch, bool]]] = {}
    for adapters in options.adapters:
        sequences = max(SEQUENCES, adapters)
        own = slots.setdefault(sequences, [])
        own.append((Batch(adapters, sequences, options.prompt, options.tokens), False))
        if adapters in options.stock:
            short = Batch(adapters, sequences, options.stock_prompt, options.stock_tokens)
            own.append((short, True))
    for model in (name for name in MODELS if options.model in name):
        for dtype in options.dtype:
            for group in slots.values():
                host = model, dtype, options.compiled, options.threads
                yield [Cell(*host, *batch) for batch in group]


# ---- what is timed -----------------------------------------------------------------------------


def measured(group: Sequence[Cell], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each cell, as it is done; the long ones take one round."""
    first = group[0]
    ways = dict.fromkeys(way for cell in group for way in cell.ways)
    largest = Batch(*(max(column) for column in zip(*(
        (c.batch.adapters, c.batch.sequences, c.batch.prompt, c.batch.tokens) for c in group
    ), strict=True)))  # fmt: skip
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_folders(folder, first.model, first.dtype)
        engines = {}
        for way in ways:
            args = folder, first.dtype, largest, first.compiled
            engines[way] = Process(way, first.threads, *args)
            stack.callback(engines[way].close)
        for cell in group:
            yield _measure(cell, engines, 1 if cell.is_long else rounds)


def _measure(cell: Cell, engines: dict[str, Process], rounds: int) -> dict[str, Any]:
    batch = cell.batch
    own = {way: engines[way] for way in cell.ways}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in own}
    peaks = dict.fromkeys(own, 0)
    for engine in own.values():
        engine.serve(Batch(batch.adapters, batch.sequences, batch.prompt, 1))
    for number in range(rounds):
        for way in list(own)[:: -1 if number % 2 else 1]:
            answer = own[way].serve(batch)
            seconds[way].append((answer.prefill, answer.decode))
            peaks[way] = max(peaks[way], answer.peak_bytes)
    return {"cell": asdict(cell), "seconds": seconds, "peak_bytes": peaks}


# ---- the tables --------------------------------------------------------------------------------


def table(rows: Rows) -> str:
    """In Markdown, from the record: beside no LoRA, and beside vLLM's own."""
    rows = sorted(rows, key=_place)
    parts = (_beside_none(rows), _beside_stock(rows))
    return "\n\n".join(part for part in parts if part)


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    cell = row["cell"]
    model, dtype = list(MODELS).index(cell["model"]), DTYPES.index(cell["dtype"])
    return model, dtype, cell["compiled"], cell["batch"]["adapters"]


def _beside_none(rows: Rows) -> str:
    own = [row for row in rows if not row["cell"]["beside_stock"]]
    lines = [
        "| model | dtype | adapters | requests | LoRA's multiplications, of the layers' "
        "| prefill, tokens/s: no LoRA | ratio | must reach | LoRA's weights, of the layers' "
        "| decode, tokens/s: no LoRA | ratio | must reach | peak, MB: no LoRA | ours |",
        "| --- | --- | ---: | ---: |" + " ---: |" * 10,
    ]
    for row in own:
        floors = FLOORS.get(row["cell"]["batch"]["adapters"], (None, None))
        timed = [_timed(row, phase, NONE, OURS, floors[phase]) for phase in (0, 1)]
        share, adapters = _share(row), row["cell"]["batch"]["adapters"]
        cells = [*_head(row), f"{share:.1%}", *timed[0], f"{adapters * share:.1%}", *timed[1]]
        lines.append(_line([*cells, *_peaks(row, NONE, OURS)]))
    return "\n".join(lines) if own else ""


def _beside_stock(rows: Rows) -> str:
    own = [row for row in rows if row["cell"]["beside_stock"]]
    lines = [
        "| model | dtype | adapters | requests | prefill, tokens/s: vLLM's own | ours, times it "
        "| must reach | decode, tokens/s: vLLM's own | ours, times it | must reach "
        "| peak, MB: vLLM's own | ours |",
        "| --- | --- | ---: | ---: |" + " ---: |" * 8,
    ]
    for row in own:
        floors = OVER_STOCK if row["cell"]["batch"]["adapters"] else (None, None)
        timed = [_timed(row, phase, STOCK, OURS, floors[phase]) for phase in (0, 1)]
        lines.append(_line([*_head(row), *timed[0], *timed[1], *_peaks(row, STOCK, OURS)]))
    return "\n".join(lines) if own else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(row: dict[str, Any]) -> list[str]:
    cell, batch = row["cell"], row["cell"]["batch"]
    dtype = cell["dtype"] + (", compiled" if cell["compiled"] else "")
    requests = f"{batch['sequences']} of {batch['prompt']} + {batch['tokens']} tokens"
    return [cell["model"], dtype, str(batch["adapters"]), requests]


def _share(row: dict[str, Any]) -> float:
    """r (k + n) of k n: an adapter's multiplications for a row, and its weights, by the layers'.

    No kernel can spare them. A prefill makes them for each row; a decode's step, of few rows, reads
    those of all its adapters. At the mean rank of the batch.
    """
    of_layers = widths(MODELS[row["cell"]["model"]]).values()
    rank = Batch(**row["cell"]["batch"]).mean_rank
    return rank * sum(k + n for k, n in of_layers) / sum(k * n for k, n in of_layers)


def _timed(row: dict[str, Any], phase: int, base: str, way: str, floor: float | None) -> list[str]:
    """The base's tokens a second, how many times those of it, and whether that is enough."""
    batch, seconds = row["cell"]["batch"], row["seconds"]
    tokens = batch["sequences"] * batch[("prompt", "tokens")[phase]]
    theirs, ours = ([one[phase] for one in seconds[name]] for name in (base, way))
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    stated = f"≥ {floor:g} {'reached' if ratio >= floor else 'missed'}" if floor else "-"
    return [f"{tokens / statistics.median(theirs):.0f}", f"{ratio:.2f}", stated]


def _peaks(row: dict[str, Any], *ways: str) -> list[str]:
    return [f"{row['peak_bytes'][way] / 1e6:.0f}" for way in ways]


# ---- the record --------------------------------------------------------------------------------


def _kept(path: Path | None) -> Rows:
    return json.loads(path.read_text()) if path and path.exists() else []


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the record goes, cell by cell")
    parser.add_argument("--again", action="store_true", help="measures what the record has anew")
    parser.add_argument("--model", default="", help="a part of the models' names")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--adapters", nargs="+", type=int, default=[0, 1, 8, 16, 64])
    parser.add_argument("--stock", nargs="*", type=int, default=[0, 1, 16], help="the same of its")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a request's prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are decoded after one")
    parser.add_argument("--stock-prompt", type=int, default=16)
    parser.add_argument("--stock-tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    compiled = "vLLM's default: without LoRA a compiled model; with LoRA it compiles none on a CPU"
    parser.add_argument("--compiled", action="store_true", help=compiled)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    rows = _kept(options.json)
    for group in cells(options):
        if options.again:
            rows = [row for row in rows if row["cell"] not in [asdict(cell) for cell in group]]
        done = [row["cell"] for row in rows]
        todo = [cell for cell in group if asdict(cell) not in done]
        for row in measured(todo, options.rounds) if todo else ():
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
