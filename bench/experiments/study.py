"""What experiments have in common: how long they last, what they find, how they are drawn."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from bench.charts import BACKWARD, NORMOPS, TORCH, bare

# Told apart without colour by lightness, dash and marker.
STYLES = [
    {"color": TORCH, "linestyle": "-", "marker": "o"},
    {"color": NORMOPS, "linestyle": "-", "marker": "s"},
    {"color": BACKWARD, "linestyle": "--", "marker": "^"},
    {"color": "#2f8f6f", "linestyle": "-.", "marker": "D"},
    {"color": "#7a4fa0", "linestyle": ":", "marker": "v"},
    {"color": "#1b1f24", "linestyle": (0, (5, 1, 1, 1)), "marker": "x"},
    {"color": "#b0413e", "linestyle": (0, (1, 1)), "marker": "P"},
    {"color": "#5b6f80", "linestyle": (0, (8, 2)), "marker": "*"},
]


@dataclass(frozen=True)
class Scale:
    """How much is done: every seed is a repetition, `share` a part of the usual training."""

    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = 1.0

    def __call__(self, count: int, least: int = 1) -> int:
        return max(least, round(count * self.share))


@dataclass(frozen=True)
class Finding:
    """A claim, in how many of the repetitions it held, and what was measured, in a sentence."""

    claim: str
    agreed: int
    of: int
    says: str

    @property
    def verdict(self) -> str:
        if self.agreed == self.of:
            return "held"
        return f"held in {self.agreed} of {self.of}" if 2 * self.agreed > self.of else "did not hold"


def outcome(kept: Mapping) -> str:
    """Of a recorded finding: the verdict, and in how many of the repetitions the claim was true."""
    counts = f"{kept['agreed']} of {kept['of']}"
    return kept["verdict"] if counts in kept["verdict"] else f"{kept['verdict']} ({counts})"


@dataclass(frozen=True)
class Experiment:
    key: str
    name: str  # of its files
    title: str
    setup: str  # what is done, on what
    seconds: float  # about, on two cores
    ticks: Callable[[Scale], int]  # how often `run` reports progress
    run: Callable[[Scale, Callable[[], None]], dict]
    figure: Callable[[dict], Figure]
    table: Callable[[dict], Table]
    findings: Callable[[dict], list[Finding]]


def finding(claim: str, outcomes: Iterable[bool], says: str) -> Finding:
    outcomes = list(outcomes)
    return Finding(claim, sum(outcomes), len(outcomes), says)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def percents(values: Sequence[float]) -> str:
    """The median, and the extremes if there is more than one."""
    text = percent(median(values))
    return text if len(values) == 1 else f"{text} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def repeated(scale_seeds: Sequence[int]) -> str:
    return f"{len(scale_seeds)} seeds" if len(scale_seeds) > 1 else "one seed"


def panels(count: int, title: str, *, columns: int = 3, size: tuple[float, float] = (4.2, 3.4), **options):
    """A figure with that many axes in rows, under a title."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, list(axes[:count])


def plain(axes: Axes, title: str, xlabel: str, ylabel: str, grid: str = "both") -> None:
    bare(axes, grid)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)


def legend(axes: Axes, **options) -> None:
    axes.legend(**{"frameon": False, "fontsize": 8, **options})


def legend_below(figure: Figure, axes: Axes) -> None:
    """Where there is no room among many lines."""
    entries = axes.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
