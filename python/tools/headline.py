"""Writes README's table of headline ratios, and its chart, from the records of each machine.

    python python/tools/headline.py

A ratio is our time over the peer's, each measured against the same bare layer in the same rounds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from _results import MACHINES, Machine, times


@dataclass(frozen=True)
class Line:
    """A line of the table, and of the chart: an op beside its peer, over a group's shapes."""

    what: str
    peer: str  # as the reader knows it
    op: str
    recorded: str  # as the record has it
    group: str = "float32 forward+backward"

    def ratios(self, machine: Machine) -> list[float]:
        return list(times(machine, self.op, self.recorded, self.group))


ROOT = Path(__file__).parents[2]
README, CHART = ROOT / "README.md", ROOT / "docs" / "headline.svg"
BEGIN, END = "<!-- headline: written by python/tools/headline.py -->", "<!-- headline: end -->"
FORWARD = "float32 forward"
COMPOSITION = "composition in PEFT"
LINES = (
    Line("LoRA layer, forward", "PEFT", "lora_linear", "peft", FORWARD),
    Line("LoRA layer, training", "PEFT", "lora_linear", "peft"),
    Line("LoRA layer in bfloat16, forward", "PEFT", "lora_linear", "peft", "bfloat16 forward"),
    Line(
        "LoRA layer in bfloat16, training",
        "PEFT",
        "lora_linear",
        "peft",
        "bfloat16 forward+backward",
    ),
    Line("an adapter per row, forward", "PEFT", "multi_lora_linear", "peft", FORWARD),
    Line("BERT layers with adapters, forward", "adapters", "adapter", "adapters", FORWARD),
    Line("BERT layers with adapters, training", "adapters", "adapter", "adapters"),
    Line("BERT layers with a fusion, forward", "adapters", "adapter_fusion", "adapters", FORWARD),
    Line("BERT layers with a fusion, training", "adapters", "adapter_fusion", "adapters"),
    Line(
        "attention with a prefix, forward", "PEFT's way", "prefix_attention", COMPOSITION, FORWARD
    ),
    Line("attention with a prefix, training", "PEFT's way", "prefix_attention", COMPOSITION),
    Line(
        "prompt tuning, a training step",
        "PEFT",
        "prompt_lookup",
        "peft",
        "float32 forward+backward, a training step",
    ),
)


def table() -> str:
    """The table in markdown."""
    names = [f"{machine.name} | faster in" for machine in MACHINES]
    lines = [f"| what | beside | {' | '.join(names)} |"]
    lines.append("| --- | --- |" + " ---: | ---: |" * len(MACHINES))
    for line in LINES:
        cells = [cell for machine in MACHINES for cell in _cells(line.ratios(machine))]
        lines.append(f"| {line.what} | {line.peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(ratios: list[float]) -> tuple[str, str]:
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return spread, f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"


# ---- chart -----------------------------------------------------------------------------------

COLOURS = ("#0f6cbd", "#e08a1e")
LEFT, SCALE, TOP, ROW, BAR = 285, 330, 58, 44, 13  # pixels
LARGEST = 1.4


def chart() -> str:
    """An SVG: the median of each line as a bar, least and greatest as a thin one."""
    width, height = round(LEFT + SCALE * LARGEST + 40), TOP + ROW * len(LINES) + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" font-family="sans-serif" font-size="14" role="img">',
        "<title>Time of peft_kernels over the peer's, by op and machine</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(16, 22, "Time / the peer's: shorter is faster. Bar: median; line: all shapes."),
    ]
    for index, machine in enumerate(MACHINES):
        x = 16 + 130 * index
        parts.append(f'<rect x="{x}" y="33" width="12" height="12" fill="{COLOURS[index]}"/>')
        parts.append(_text(x + 18, 44, machine.name))
    bottom = TOP + ROW * len(LINES)
    for tick in (0.25, 0.5, 0.75, 1.0, 1.25):
        x = LEFT + SCALE * tick
        colour, dash = ("#222", "") if tick == 1 else ("#ccc", ' stroke-dasharray="3 3"')
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{colour}"{dash}/>')
        parts.append(_text(x, bottom + 18, f"{tick:g}", "middle"))
    parts.append(_text(LEFT + SCALE, bottom + 36, "as fast as the peer", "middle"))
    for index, line in enumerate(LINES):
        parts += _bars(line, TOP + ROW * index + 8)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bars(line: Line, y: int) -> list[str]:
    parts = [_text(LEFT - 10, y + 11, line.what, "end")]
    parts.append(_text(LEFT - 10, y + 26, f"beside {line.peer}", "end", "#666", 12))
    for index, machine in enumerate(MACHINES):
        ratios, top = line.ratios(machine), y + (BAR + 2) * index
        middle = top + BAR / 2
        length = SCALE * statistics.median(ratios)
        least, greatest = (LEFT + SCALE * min(r, LARGEST) for r in (min(ratios), max(ratios)))
        parts.append(
            f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" '
            f'fill="{COLOURS[index]}"/>'
        )
        parts.append(
            f'<path d="M{least:.1f} {middle:g}H{greatest:.1f}" stroke="#222" stroke-width="1.5"/>'
        )
    return parts


def _text(
    x: float, y: float, text: str, anchor: str = "start", fill: str = "#222", size: int = 14
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" '
        f'font-size="{size}">{text}</text>'
    )


# ---- README ----------------------------------------------------------------------------------


def with_table(page: str) -> str:
    """The page with the table between its markers written anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    README.write_text(with_table(README.read_text()))
    CHART.write_text(chart())


if __name__ == "__main__":
    main()
