"""The figures as charts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.digits import Training
from bench.measure import Comparison, Timing

TORCH, NORMOPS, BACKWARD = "#9aa5b1", "#14507d", "#f08a4b"
GRID, LINE = "#e3e7eb", "#3c4650"


def write_charts(folder: Path, timings: list[Timing], trainings: list[Training]) -> list[str]:
    """Returns the names of the files."""
    figures = {}
    for device in dict.fromkeys(timing.case.device for timing in timings):
        here = [timing for timing in timings if timing.case.device == device]
        figures[f"speedup_{device}.png"] = _speedups(here, device)
        figures[f"floors_{device}.png"] = _floors(here, device)
    if trainings:
        figures["digits.png"] = _losses(trainings)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=130, facecolor="white")
    return list(figures)


def _bare(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(which="both", length=0, labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)


def _case_panels(
    title: str, timings: list[Timing], panels: list[str], draw: Callable[[Axes, str, Timing, float], None]
) -> Figure:
    """A row for each case under the name of its layer, and for each dtype the `panels`, which `draw` fills."""

    def label(case):
        return case.size if case.layout == "contiguous" else f"{case.size} {case.layout}"

    rows = {}
    for case in (timing.case for timing in timings):
        rows.setdefault((case.layer, None), len(rows))
        rows.setdefault((case.layer, label(case)), len(rows))
    columns = [(dtype, panel) for dtype in dict.fromkeys(timing.case.dtype for timing in timings) for panel in panels]

    figure = Figure(figsize=(2 + max(2.6 * len(columns), 7), 1.6 + 0.24 * len(rows)), layout="constrained")
    all_axes = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (dtype, panel) in zip(all_axes, columns, strict=True):
        _bare(axes, "x")
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
    figure.suptitle(title, fontsize=13, fontweight="bold")
    handles, labels = all_axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique, loc="outside lower center", ncols=len(unique), frameon=False, fontsize=9)
    return figure


def _speedups(timings: list[Timing], device: str) -> Figure:
    def draw(axes: Axes, _: str, timing: Timing, row: float) -> None:
        passes = [("forward", timing.forward, NORMOPS, -0.2), ("backward", timing.backward, BACKWARD, 0.2)]
        for name, comparison, color, offset in passes:
            # From 1: to the right it is faster, to the left slower.
            axes.barh(row + offset, comparison.speedup - 1, 0.38, left=1, color=color, label=name)
            faster = comparison.speedup >= 1
            axes.annotate(
                f"{comparison.speedup:.2f}",
                (comparison.speedup, row + offset),
                xytext=(2 if faster else -2, 0),
                textcoords="offset points",
                ha="left" if faster else "right",
                va="center_baseline",
                fontsize=6,
                color=LINE,
            )

    return _case_panels(f"Speedup of normops over torch ({device})", timings, [""], draw)


def _floors(timings: list[Timing], device: str) -> Figure:
    def draw(axes: Axes, panel: str, timing: Timing, row: float) -> None:
        comparison: Comparison = getattr(timing, panel)
        axes.plot([comparison.torch_floors, comparison.normops_floors], [row, row], color=GRID, linewidth=3, zorder=1)
        axes.scatter(comparison.torch_floors, row, 26, color=TORCH, label="torch", zorder=2)
        axes.scatter(comparison.normops_floors, row, 26, color=NORMOPS, label="normops", zorder=3)

    title = f"Time as a multiple of copying the tensors ({device})"
    return _case_panels(title, timings, ["forward", "backward"], draw)


def _losses(trainings: list[Training]) -> Figure:
    figure = Figure(figsize=(5.2 * len(trainings), 5.4), layout="constrained")
    figure.suptitle("Training on the digits images", fontsize=13, fontweight="bold")
    columns = figure.subplots(2, len(trainings), sharex=True, squeeze=False, height_ratios=[2, 1]).T
    for training, (losses, differences) in zip(trainings, columns, strict=True):
        steps = np.arange(1, len(training.torch.losses) + 1)
        _bare(losses, "y")
        losses.set_title(training.network, fontsize=10)
        losses.plot(steps, training.torch.losses, color=TORCH, linewidth=4, label="torch")
        losses.plot(steps, training.normops.losses, color=NORMOPS, linewidth=1, label="normops")
        losses.set_ylabel("loss", fontsize=9)
        losses.legend(frameon=False, fontsize=9)

        _bare(differences, "y")
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
