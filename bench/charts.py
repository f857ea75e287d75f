"""The figures as charts."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.digits import Training
from bench.measure import Comparison, Timing
from bench.regimes import CACHES, HEADLINE, Regime
from bench.report import regimes_of
from bench.results import sure
from bench.sweep import Found

TORCH, NORMOPS, BACKWARD = "#9aa5b1", "#14507d", "#f08a4b"
GRID, LINE = "#e3e7eb", "#3c4650"
CHARTED = [HEADLINE, Regime("warm", "recycled")]  # the two extremes


FLOOR_NOTE = (
    "The floor, 1x, is the time of a copy of the tensor in the same regime (backward: of 1.5 copies, as it reads two "
    "tensors). A layer that reads once,\nwrites once and is as fast as memory has 1x; what needs a second pass over "
    "memory, because statistics come first, has up to 1.5x (backward: 1.7x). Below 1x, the output lies in large "
    "pages\nand the copy's in small ones, which take longer to clear."
)


def write_charts(
    folder: Path, timings: list[Timing], trainings: list[Training], environment: Mapping[str, str], all_regimes: bool
) -> list[str]:
    """Without what is in doubt. Returns the names of the files."""
    figures = {}
    shown = sure(timings)
    regimes = regimes_of(shown)
    wanted = [regime for regime in regimes if regime in CHARTED]
    for device in dict.fromkeys(timing.case.device for timing in shown):
        for regime in regimes if all_regimes or not wanted else wanted:
            here = [timing for timing in shown if timing.case.device == device and timing.regime == regime]
            if here:
                facts = f"{subtitle(environment)}\n{regime.name}: {CACHES[regime.caches]}"
                figures[f"speedup_{device}_{regime.slug}.png"] = _speedups(here, device, facts)
                figures[f"floors_{device}_{regime.slug}.png"] = _floors(here, device, facts)
    if trainings:
        figures["digits.png"] = _losses(trainings)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120, facecolor="white")
    return list(figures)


def subtitle(environment: Mapping[str, str]) -> str:
    """The machine and the date."""
    threads = environment["cpu threads"].partition(" ")[0]
    torch_version = environment["torch"].partition(" ")[0]
    where = environment.get("gpu", f"{environment['cpu']}, {threads} threads, {environment['cpu kernels'].split()[0]}")
    return f"{where}, torch {torch_version}, {environment['date']}"


def bare(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(which="both", length=0, labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)


def _case_panels(
    title: str,
    facts: str,
    timings: list[Timing],
    panels: list[str],
    draw: Callable[[Axes, str, Timing, float], None],
) -> Figure:
    """A row for each case under the name of its layer, and for each dtype the `panels`, which `draw` fills."""

    def label(case):
        return case.size if case.layout == "contiguous" else f"{case.size} {case.layout}"

    rows = {}
    for case in (timing.case for timing in timings):
        rows.setdefault((case.layer, None), len(rows))
        rows.setdefault((case.layer, label(case)), len(rows))
    columns = [(dtype, panel) for dtype in dict.fromkeys(timing.case.dtype for timing in timings) for panel in panels]

    figure = Figure(figsize=(2 + max(2.6 * len(columns), 7), 2.4 + 0.24 * len(rows)), layout="constrained")
    all_axes = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (dtype, panel) in zip(all_axes, columns, strict=True):
        bare(axes, "x")
        axes.set_title(f"{dtype} {panel}", fontsize=10)
        axes.axvline(1, color=LINE, linewidth=1)
        axes.tick_params(labeltop=True)
        for timing in timings:
            if timing.case.dtype == dtype:
                draw(axes, panel, timing, rows[timing.case.layer, label(timing.case)])
    axes.set_xscale("log", base=2)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_yticks([*rows.values()], [name or layer for layer, name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for text, (_, name) in zip(all_axes[0].get_yticklabels(), rows, strict=True):
        text.set_fontweight("normal" if name else "bold")
    headline(figure, title, facts)
    _legend(figure, all_axes[0])
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Each label once, below everything."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique, loc="outside lower center", ncols=len(unique), frameon=False, fontsize=9)


def headline(figure: Figure, title: str, facts: str) -> None:
    """The title, with the facts in smaller letters below."""
    figure.suptitle(f"$\\bf{{{title.replace(' ', chr(92) + ' ')}}}$\n{facts}", fontsize=8.5)


def _speedups(timings: list[Timing], device: str, facts: str) -> Figure:
    def draw(axes: Axes, _: str, timing: Timing, row: float) -> None:
        passes = [("forward", timing.forward, NORMOPS, -0.2), ("backward", timing.backward, BACKWARD, 0.2)]
        for name, comparison, color, offset in passes:
            # From 1: to the right it is faster, to the left slower.
            axes.barh(row + offset, comparison.speedup - 1, 0.38, left=1, color=color, label=name)
            low, high = comparison.quartiles
            axes.plot([low, high], [row + offset] * 2, color=LINE, linewidth=0.8)
            faster = comparison.speedup >= 1
            axes.annotate(
                f"{comparison.speedup:.2f}",
                (max(comparison.speedup, high) if faster else min(comparison.speedup, low), row + offset),
                xytext=(2 if faster else -2, 0),
                textcoords="offset points",
                ha="left" if faster else "right",
                va="center_baseline",
                fontsize=6,
                color=LINE,
            )

    facts = f"{facts}\nA line on a bar: the quartiles of the single rounds"
    return _case_panels(f"Speedup of normops over torch ({device})", facts, timings, [""], draw)


def _floors(timings: list[Timing], device: str, facts: str) -> Figure:
    def draw(axes: Axes, panel: str, timing: Timing, row: float) -> None:
        comparison: Comparison = getattr(timing, panel)
        axes.plot([comparison.torch_floors, comparison.normops_floors], [row, row], color=GRID, linewidth=3, zorder=1)
        axes.scatter(comparison.torch_floors, row, 26, color=TORCH, label="torch", zorder=2)
        axes.scatter(comparison.normops_floors, row, 26, color=NORMOPS, label="normops", zorder=3)

    title = f"Time as a multiple of copying the tensors ({device})"
    return _case_panels(title, f"{facts}\n{FLOOR_NOTE}", timings, ["forward", "backward"], draw)


SWEPT = {"mean": "mean / deviation", "size": "largest element", "length": "elements of a statistic", "rows": "rows"}
SWEPT_DTYPES = ["float32", "bfloat16"]
OUT_OF_SIGHT = 1e-9, 1e3  # errors below and above are drawn there, those that are not finite too


def sweeps_figure(found: Sequence[Found], facts: str) -> Figure:
    """The largest error of each function over what a sweep changes."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    rows = figure.subplots(len(SWEPT_DTYPES), len(SWEPT), sharex="col", sharey=True)
    for (dtype, (sweep, axis)), axes in zip(product(SWEPT_DTYPES, SWEPT.items()), rows.flat, strict=True):
        bare(axes, "y")
        here = [one for one in found if (one.point.sweep, one.point.dtype) == (sweep, dtype)]
        values = {one.point.value: one.place for one in sorted(here, key=lambda one: one.point.value)}
        for side, color in (("torch", TORCH), ("normops", NORMOPS)):
            for function in sorted({one.point.function for one in here}):
                largest = dict.fromkeys(values, OUT_OF_SIGHT[0])
                for one in here:
                    if one.point.function == function:
                        error = max(getattr(one, side).values())
                        largest[one.point.value] = min(max(largest[one.point.value], error), OUT_OF_SIGHT[1])
                axes.plot(range(len(values)), [*largest.values()], color=color, linewidth=1, alpha=0.8, label=side)
        axes.axhline(torch.finfo(getattr(torch, dtype)).eps, color=LINE, linewidth=0.8, linestyle=":", label="eps")
        axes.set_yscale("log")
        axes.set_xticks(range(len(values)), [*values.values()], rotation=90)
        axes.set_title(f"{dtype}, by {axis}", fontsize=9)
    rows[0, 0].set_ylim(OUT_OF_SIGHT[0] / 2, OUT_OF_SIGHT[1] * 2)
    _legend(figure, rows[0, 0])
    facts = f"{facts}\nA line for each function; at the upper edge, what is not finite or larger still"
    headline(figure, "Largest error against float64, relative to the terms of the result", facts)
    return figure


def _losses(trainings: list[Training]) -> Figure:
    figure = Figure(figsize=(5.2 * len(trainings), 5.4), layout="constrained")
    figure.suptitle("Training on the digits images", fontsize=13, fontweight="bold")
    columns = figure.subplots(2, len(trainings), sharex=True, squeeze=False, height_ratios=[2, 1]).T
    for training, (losses, differences) in zip(trainings, columns, strict=True):
        steps = np.arange(1, len(training.torch.losses) + 1)
        bare(losses, "y")
        losses.set_title(training.network, fontsize=10)
        losses.plot(steps, training.torch.losses, color=TORCH, linewidth=4, label="torch")
        losses.plot(steps, training.normops.losses, color=NORMOPS, linewidth=1, label="normops")
        losses.set_ylabel("loss", fontsize=9)
        losses.legend(frameon=False, fontsize=9)

        bare(differences, "y")
        difference = np.abs(np.divide(training.normops.losses, training.torch.losses) - 1)
        # Equal losses have no place on a logarithmic axis.
        differences.plot(steps, np.where(difference > 0, difference, np.nan), ".", color=NORMOPS, markersize=3)
        differences.set_yscale("log")
        differences.set_ylim(1e-9, 1e-1)
        differences.set_yticks(10.0 ** np.arange(-8, 0, 2))
        differences.yaxis.set_minor_formatter(NullFormatter())
        differences.set_ylabel("relative difference", fontsize=9)
        differences.set_xlabel("step", fontsize=9)
    return figure
