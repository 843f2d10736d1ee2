"""The chart of ``peft-kernels bench``: a panel a group, ratios as bars, targets as lines."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0f6cbd", "#8a8f98", "#5aa469", "#e08a1e", "#a05195", "#d45087")
CEILING = 3.0


def save_chart(path: Path, suite: ModuleType, groups: list[list[Any]]) -> None:
    """Draws the ratios of each group's rows; a bar above CEILING is cut off and labelled."""
    figure = Figure(figsize=(12.5, 3.6 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axis, rows in zip(axes, groups, strict=True):
        _draw_group(axis, suite, rows)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=7)
    figure.savefig(path, dpi=120)


def _draw_group(axis, suite: ModuleType, rows: list[Any]) -> None:
    rivals = list(dict.fromkeys(n for row in rows for n in row.timings if n != suite.BARE))
    width = 0.8 / len(rivals)
    for i, name in enumerate(rivals):
        taking_part = [(j, row.timings[name]) for j, row in enumerate(rows) if name in row.timings]
        places = [j - 0.4 + (i + 0.5) * width for j, _ in taking_part]
        ratios = [timing.ratio for _, timing in taking_part]
        heights = [min(ratio, CEILING) for ratio in ratios]
        axis.bar(places, heights, 0.92 * width, color=COLOURS[i % len(COLOURS)], label=name)
        for place, ratio in zip(places, ratios, strict=True):
            _label(axis, place, ratio)
    _draw_targets(axis, rows)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [row.case.shape for row in rows], fontsize=8)
    axis.set(title=rows[0].case.group, ylabel=f"time / {suite.BARE}", xlim=(-0.6, len(rows) - 0.4))
    axis.spines[["top", "right"]].set_visible(False)


def _label(axis, place: float, ratio: float) -> None:
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
    axis.text(place, min(ratio, CEILING), text, ha="center", va="bottom", rotation=90, fontsize=7)


def _draw_targets(axis, rows: list[Any]) -> None:
    marked = [(j, row.target) for j, row in enumerate(rows) if row.target is not None]
    for number, (j, target) in enumerate(marked):
        label = "must reach" if number == 0 else None
        axis.hlines(target, j - 0.42, j + 0.42, "#c0392b", "dashed", linewidth=1.2, label=label)
