"""The drawings of the page: of any number of runs, in colours that differ in lightness too."""

from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.charts import BACKWARD, LINE, NORMOPS, TORCH, bare
from bench.page.runs import Pass, Run, mean

MARKERS = "os^DvPX*"
SHADES = [NORMOPS, BACKWARD, "#6f8f3a", "#7a4fa0", "#1b1f24", "#b0413e"]


def _times(axes, axis: str = "x") -> None:
    ruler = getattr(axes, f"{axis}axis")
    getattr(axes, f"set_{axis}scale")("log", base=2)
    ruler.set_major_locator(LogLocator(base=2))
    ruler.set_minor_locator(NullLocator())
    ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def means(rows: list[tuple[str, dict[str, float | None]]], title: str, names: Iterable[str]) -> Figure:
    """Bars from 1: a row for each label, and in it a bar for each name that has a value."""
    names = list(names)
    shown = [(label, [name for name in names if values.get(name) is not None], values) for label, values in rows]
    bars, gap = sum(len(here) for _, here, _ in shown), 0.7  # a gap between rows, in bars
    figure = Figure(figsize=(6.6, 1.1 + 0.17 * (bars + gap * len(rows))), layout="constrained")
    axes = figure.subplots()
    bare(axes, "x")
    middles, y = [], 0.0
    for _, here, values in shown:
        middles.append(y + len(here) / 2)
        for name in here:
            value, place = values[name], names.index(name)
            style = {"color": SHADES[place % len(SHADES)], "hatch": ["", "///", "...", "xxx"][place % 4]}
            axes.barh(y + 0.5, value - 1, 0.9, left=1, edgecolor="white", linewidth=0.4, label=name, **style)
            side = 1 if value >= 1 else -1
            axes.annotate(
                f"{value:.2f}",
                (value, y + 0.5),
                xytext=(3 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=7,
                color=LINE,
            )
            y += 1
        y += gap
    axes.axvline(1, color=LINE, linewidth=1)
    _times(axes)
    axes.margins(x=0.12)
    axes.set_yticks(middles, [label for label, _ in rows])
    axes.set_ylim(y, -gap)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    # Above the bars, of which there may be many; and the title with it, which over the axes alone would be cut.
    figure.legend(
        unique.values(),
        unique,
        title=title,
        title_fontsize=10,
        loc="outside upper center",
        ncols=min(2, max(1, len(unique))),
        frameon=False,
        fontsize=8,
    )
    return figure


def cases(run: Run, title: str) -> Figure:
    """Every case as a mark, in a row for each layer, forward above backward."""
    layers = list(dict.fromkeys(one.layer for one in run.passes))
    regimes = run.regimes()
    figure = Figure(figsize=(6.6, 1.4 + 0.55 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(regimes), sharey=True, sharex=True, squeeze=False)[0]
    for panel, regime in zip(axes, regimes, strict=True):
        bare(panel, "x")
        panel.set_title(f"{regime[0]}, {regime[1]}", fontsize=9)
        panel.axvline(1, color=LINE, linewidth=1)
        for name, offset, colour, marker in (("forward", -0.17, NORMOPS, "o"), ("backward", 0.17, BACKWARD, "^")):
            here = [one for one in run.passes if one.regime == regime and one.name == name]
            rows = [layers.index(one.layer) + offset for one in here]
            panel.scatter([one.speedup for one in here], rows, 16, colour, marker, alpha=0.75, linewidth=0, label=name)
        _times(panel)
        panel.tick_params(axis="x", labelsize=7)
    axes[0].set_yticks(range(len(layers)), layers)
    axes[0].set_ylim(len(layers) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def sizes(run: Run, regime: tuple[str, str]) -> Figure:
    """Speedup and distance to the floor against the size of the tensor."""
    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    here = [one for one in run.passes if one.regime == regime]
    layers = list(dict.fromkeys(one.layer for one in here))
    for panel, title, value in (
        (left, "speedup over torch", lambda one: one.speedup),
        (right, "time over that of a copy", lambda one: one.floors),
    ):
        bare(panel, "both")
        panel.set_title(title, fontsize=9)
        panel.axhline(1, color=LINE, linewidth=1)
        for place, layer in enumerate(layers):
            points = [(one.bytes / 2**20, value(one), one.name) for one in here if one.layer == layer and value(one)]
            for name, filled in (("forward", True), ("backward", False)):
                shade = SHADES[place % len(SHADES)]
                panel.scatter(
                    [x for x, _, which in points if which == name],
                    [y for _, y, which in points if which == name],
                    18,
                    facecolors=shade if filled else "none",
                    edgecolors=shade,
                    linewidths=0.8,
                    marker=MARKERS[place % len(MARKERS)],
                    label=layer if filled else None,
                )
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        _times(panel, "y")
        panel.set_xlabel("MiB of the input; hollow: backward", fontsize=8)
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(3, max(1, len(layers))), frameon=False, fontsize=8)
    return figure


def losses(training: dict) -> Figure:
    figure = Figure(figsize=(6.6, 2.6), layout="constrained")
    axes = figure.subplots()
    bare(axes, "y")
    steps = range(1, len(training["torch"]["losses"]) + 1)
    axes.plot(steps, training["torch"]["losses"], color=TORCH, linewidth=4, label="torch")
    axes.plot(steps, training["normops"]["losses"], color=NORMOPS, linewidth=1, label="normops")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    return figure


def by_layer(passes: list[Pass], value) -> dict[str, dict[str, float | None]]:
    """Geometric means of a value: for each layer, and of all, forward and backward."""
    layers = list(dict.fromkeys(one.layer for one in passes))
    chosen = {"all": passes, **{layer: [one for one in passes if one.layer == layer] for layer in layers}}
    return {
        layer: {name: mean(value(one) for one in some if one.name == name) for name in ("forward", "backward")}
        for layer, some in chosen.items()
    }
