"""The tutorials' charts: what was learnt, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {"fused": "#0f6cbd", "reference": "#8a8f98", "peft": "#e08a1e", "merged": "#3a9a5b"}
# Of tutorial 04's methods: a hue for each, the lighter one and a square where an MLP is added.
LINES = (
    ("#3a9a5b", "o"),
    ("#e08a1e", "o"),
    ("#f0bd7a", "s"),
    ("#0f6cbd", "o"),
    ("#7fb2e0", "s"),
)
BITS_COLOURS = ("#8a8f98", "#3a9a5b", "#7fb2e0", "#0f6cbd", "#e08a1e")  # of tutorial 05's kinds
SMOOTHING = 0.8


class SoftPromptOutcome(Protocol):
    """What tutorial 04's chart shows of a training."""

    length: int
    trained: int
    test: float


class BitsCost(Protocol):
    """What tutorial 05's chart shows of a kind of weights."""

    bits: float
    weight_bytes: int
    peak_bytes: int | None
    step_seconds: float
    text_seconds: float


def save_chart(
    path: Path,
    names: Mapping[str, str],
    losses: Mapping[str, Sequence[float]],
    accuracies: Mapping[str, float],
    seconds: Mapping[str, float],
    megabytes: Mapping[str, Mapping[str, float]],
) -> None:
    """Draws tutorial 01's four panels: losses over the steps, accuracies, step times and memory.

    ``names`` maps a variant to its caption and ``accuracies`` a moment to the test accuracy then;
    ``megabytes`` maps a kind of memory to the MB of each variant.
    """
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle("LoRA fine-tuning of all-MiniLM-L6-v2 on docstrings", fontsize=14)
    _draw_losses(axes[0, 0], names, losses)
    _draw_accuracies(axes[0, 1], accuracies)
    _draw_seconds(axes[1, 0], names, seconds)
    _draw_memory(axes[1, 1], names, megabytes)
    _save(figure, path)


def save_many_adapters_chart(
    path: Path,
    names: Mapping[str, str],
    seconds: Mapping[str, Mapping[int, float]],
    accuracies: Mapping[str, Mapping[str, float]],
) -> None:
    """Draws tutorial 02's two panels: the time of a batch, and what each adapter has learnt.

    ``names`` maps a way to serve to its caption, ``seconds`` a way to its time by number of
    adapters, and ``accuracies`` a stage of training to each task's.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    figure.suptitle("Many LoRA adapters on one all-MiniLM-L6-v2", fontsize=14)
    _draw_latencies(axes[0], names, seconds)
    _draw_tasks(axes[1], accuracies)
    _save(figure, path)


def save_fusion_chart(path: Path, weights: Mapping[int, Mapping[str, float]]) -> None:
    """Draws tutorial 03's heat map: by layer and adapter, its mean weight in the fusion."""
    figure, axis = pyplot.subplots(figsize=(6, 5), layout="constrained")
    figure.suptitle("Which adapters the fusion listens to", fontsize=14)
    image = _draw_weights(axis, weights)
    figure.colorbar(image, label="mean weight over the tokens of the test")
    _save(figure, path)


def save_soft_prompts_chart(
    path: Path, head: float, outcomes: Mapping[str, Sequence[SoftPromptOutcome]]
) -> None:
    """Draws tutorial 04's two panels: accuracy by soft tokens and by parameters.

    ``head`` is the accuracy without soft tokens, and ``outcomes`` maps a method to what it has come
    to with each number of them.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    figure.suptitle("Soft tokens in all-MiniLM-L6-v2, and accuracy on new modules", fontsize=14)
    _draw_soft_prompts(axes[0], head, outcomes, lambda outcome: outcome.length)
    _draw_soft_prompts(axes[1], head, outcomes, lambda outcome: outcome.trained)
    lengths = [outcome.length for outcome in next(iter(outcomes.values()))]
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(lengths, [str(length) for length in lengths])
    axes[0].set(title="By soft tokens", xlabel="soft tokens", ylabel="%")
    axes[1].set_xscale("log")
    axes[1].set(title="By what trains beside the head", xlabel="parameters")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=len(names))
    _save(figure, path)


def save_bits_chart(path: Path, names: Mapping[str, str], costs: Mapping[str, BitsCost]) -> None:
    """Draws tutorial 05's three panels, by bits: memory, a training step, a short text's forward.

    ``names`` maps a kind of weights to its caption, and ``costs`` to what was measured of it.
    """
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    figure.suptitle("LoRA over the linear layers of all-MiniLM-L6-v2, by bits", fontsize=14)
    captions = [
        f"{names[kind].replace(', ', chr(10))}\n({c.bits:.2f})" for kind, c in costs.items()
    ]
    colours = BITS_COLOURS[: len(costs)]
    weights = [cost.weight_bytes / 1e6 for cost in costs.values()]
    bars = axes[0].bar(captions, weights, color=colours)
    axes[0].bar_label(bars, fmt="%.1f", padding=2)
    if all(cost.peak_bytes is not None for cost in costs.values()):
        peaks = [(cost.peak_bytes or 0) / 1e6 for cost in costs.values()]
        bars = axes[0].bar(captions, peaks, bottom=weights, color="#e1e4e9", label="a step, on top")
        axes[0].bar_label(bars, fmt="%.0f", label_type="center")
        axes[0].legend(frameon=False, loc="upper right")
    axes[0].set(title="Memory: weights, and the peak of a training step", ylabel="MB")
    axes[0].margins(y=0.2)
    step = [1e3 * cost.step_seconds for cost in costs.values()]
    axes[1].bar_label(axes[1].bar(captions, step, color=colours), fmt="%.0f", padding=2)
    axes[1].set(title="Time of a training step (median)", ylabel="ms")
    text = [1e3 * cost.text_seconds for cost in costs.values()]
    axes[2].bar_label(axes[2].bar(captions, text, color=colours), fmt="%.1f", padding=2)
    axes[2].set(title="Time of one short text's forward (median)", ylabel="ms")
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
    _save(figure, path)


def save_serving_chart(
    path: Path,
    names: Mapping[str, str],
    loads: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> None:
    """Draws tutorial 06's two panels, by adapters among the requests: tokens a second, and waits.

    ``names`` maps a way to serve to its caption, and ``loads`` a way to what was measured.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    figure.suptitle("Many LoRA adapters on one SmolLM2-135M, served by vLLM", fontsize=14)
    panels = {"tokens_per_second": ("Throughput", "tokens/s"), "latency": ("A request's time", "s")}
    colours = {"ours": COLOURS["fused"], "stock": COLOURS["reference"]}
    for axis, (kind, (title, unit)) in zip(axes, panels.items(), strict=True):
        for way, by_count in loads.items():
            values = [load[kind] for load in by_count.values()]
            places = list(range(len(values)))
            axis.plot(places, values, color=colours[way], marker="o", label=names[way])
            axis.set_xticks(places, [str(count) for count in by_count])
        axis.set(title=title, xlabel="different adapters among the requests", ylabel=unit)
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_latencies(axis, names, seconds) -> None:
    """The base has no adapters, so it is a level to compare with."""
    base = 1e3 * seconds["base"][0]
    axis.axhline(base, color=COLOURS["reference"], linestyle="--", label=names["base"])
    colours = {"pool": COLOURS["fused"], "merged": COLOURS["merged"], "peft": COLOURS["peft"]}
    for way in colours.keys() & seconds.keys():
        counts = seconds[way]
        axis.plot(
            list(counts),
            [1e3 * s for s in counts.values()],
            color=colours[way],
            marker="o",
            label=names[way],
        )
    axis.set_xscale("log", base=2)
    ticks = list(seconds["pool"])
    axis.set_xticks(ticks, [str(count) for count in ticks])
    axis.set(title="Time of a batch (median)", xlabel="different adapters in it", ylabel="ms")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="upper left")
    axis.margins(y=0.3)


def _draw_tasks(axis, accuracies) -> None:
    width = 0.8 / len(accuracies)
    colours = ("#e1e4e9", COLOURS["reference"], COLOURS["fused"])
    for i, (stage, by_task) in enumerate(accuracies.items()):
        places = [group + i * width for group in range(len(by_task))]
        heights = [100 * a for a in by_task.values()]
        axis.bar(places, heights, 0.9 * width, color=colours[i], label=stage)
    tasks = list(next(iter(accuracies.values())))
    axis.set_xticks([group + width for group in range(len(tasks))], tasks, rotation=20)
    axis.set(title="Accuracy on modules never trained on", ylabel="%", ylim=(0, 115))
    axis.legend(frameon=False, ncols=len(accuracies), loc="upper center")


def _draw_soft_prompts(axis, head, outcomes, x_of) -> None:
    axis.axhline(100 * head, color=COLOURS["reference"], linestyle="--", label="head alone")
    for (name, line), (colour, marker) in zip(outcomes.items(), LINES, strict=True):
        axis.plot(
            [x_of(outcome) for outcome in line],
            [100 * outcome.test for outcome in line],
            color=colour,
            marker=marker,
            label=name,
        )


def _draw_weights(axis, weights):
    """Each cell has its number on it, white where the cell is dark."""
    adapters = list(next(iter(weights.values())))
    rows = [[row[name] for name in adapters] for row in weights.values()]
    image = axis.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rows):
        for x, weight in enumerate(row):
            colour = "white" if weight > 0.5 else "black"
            axis.text(x, y, f"{weight:.2f}", ha="center", va="center", color=colour)
    axis.set_xticks(range(len(adapters)), adapters)
    axis.set_yticks(range(len(rows)), [str(layer) for layer in weights])
    axis.set(xlabel="adapter, by the task it was trained on", ylabel="layer")
    axis.tick_params(length=0)
    return image


def _draw_losses(axis, names, losses) -> None:
    """Later curves are thinner, so that equal ones all show."""
    for i, (variant, values) in enumerate(losses.items()):
        style = {"linewidth": 5 - 2 * i, "linestyle": ("-", "-", "--")[i]}
        axis.plot(
            range(1, len(values) + 1),
            _smoothed(values),
            color=COLOURS[variant],
            label=names[variant],
            **style,
        )
    axis.set(title="Training loss, moving average", xlabel="step")
    axis.set_ylim(0, 1.1 * max(max(values) for values in losses.values()))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, loc="lower left")


def _smoothed(values: Sequence[float]) -> list[float]:
    smooth = [values[0]]
    for value in values[1:]:
        smooth.append(SMOOTHING * smooth[-1] + (1 - SMOOTHING) * value)
    return smooth


def _draw_accuracies(axis, accuracies) -> None:
    colours = ["#c9ced6"] * (len(accuracies) - 1) + [COLOURS["fused"]]
    bars = axis.bar(list(accuracies), [100 * a for a in accuracies.values()], color=colours)
    axis.bar_label(bars, fmt="%.1f %%", padding=2)
    axis.set(title="Accuracy on modules never trained on", ylabel="%", ylim=(0, 100))


def _draw_seconds(axis, names, seconds) -> None:
    bars = axis.barh(
        [names[v] for v in seconds],
        [1e3 * s for s in seconds.values()],
        color=[COLOURS[v] for v in seconds],
    )
    axis.bar_label(bars, fmt="%.0f ms", padding=3)
    axis.set(title="Time of a training step (median)", xlabel="ms")
    axis.margins(x=0.15)
    axis.invert_yaxis()


def _draw_memory(axis, names, megabytes) -> None:
    variants = list(next(iter(megabytes.values())))
    width = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        places = [group + i * width for group in range(len(megabytes))]
        heights = [kind[variant] for kind in megabytes.values()]
        bars = axis.bar(places, heights, 0.9 * width, color=COLOURS[variant], label=names[variant])
        axis.bar_label(bars, fmt="%.0f", padding=2)
    middle = width * (len(variants) - 1) / 2
    axis.set_xticks([group + middle for group in range(len(megabytes))], list(megabytes))
    axis.set(title="Memory of a training step", ylabel="MB")
    axis.margins(y=0.2)
    axis.legend(frameon=False, ncols=len(variants), loc="upper left")
