"""The figures of the models as tables, as a chart, and what follows from them in a few sentences."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from bench.charts import BACKWARD, LINE, NORMOPS, TORCH, bare, headline, subtitle
from bench.machine import MIB
from bench.measure import Comparison
from bench.models.measure import ModelTiming
from bench.models.step import FUSED, PARTS
from bench.results import DOUBTFUL_SHARE, FORMAT, NOISY, Changes, judge, null_square, sure_ones
from bench.tables import make_table, speedup

COMPARED = "norm forward", "norm backward", "norm", "step"
CHARTED = {"norm forward": NORMOPS, "norm backward": BACKWARD, "step": TORCH}
WHAT = {True: "training", False: "inference"}


@dataclass
class ModelResults:
    environment: dict[str, str]
    options: dict
    models: list[ModelTiming] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # model: why
    format: int = FORMAT

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def _ratio(comparison: Comparison | None, doubtful: bool) -> str:
    return f"{speedup(comparison.speedup, doubtful)} ±{comparison.spread:3.0%}" if comparison else ""


def models_table(timings: list[ModelTiming]) -> Table:
    columns = ["norm fwd", "norm bwd", "norms", "copies", "step", "null step", "peak MiB"]
    compiled = any(timing.compiled for timing in timings)
    caption = (
        "torch / normops, ± half the interquartile range: time in the forward and in the backward of norm layers, in "
        "both, and of a whole step; copies: torch / layers that only move memory, for both passes: the floor; null: "
        "torch / torch; ?: in doubt; peak: of tensors, with torch -> with normops -> "
        'fused. Fused: torch\'s layers under backend="normops" of torch.compile: time in norms, activations and '
        "additions, a whole step, and how many fusions there are"
    )
    columns += ["fused parts", "fused step", "fusions"]
    columns += ["compiled"] if compiled else []
    table = make_table("Models", "model", "malloc", *columns, texts=2, caption=caption)
    for timing in timings:
        parts, doubtful = timing.parts, bool(timing.doubts)
        compared = {**parts, "copies": timing.floor.get("norm")}
        cells = [
            _ratio(compared.get(part), doubtful) for part in ("norm forward", "norm backward", "norm", "copies", "step")
        ]
        null = timing.null["step"]
        peak = " -> ".join(f"{peak / MIB:.0f}" for peak in timing.peak_bytes.values())
        row = [timing.model, timing.malloc, *cells, f"{null.speedup:.2f} ±{null.spread:3.0%}", peak]
        row += [*(_ratio(timing.fused.get(part), doubtful) for part in (FUSED, "step")), str(timing.fusions)]
        table.add_row(*row, *[_ratio(timing.compiled, doubtful)] * compiled)
    return table


def parts_table(timings: list[ModelTiming]) -> Table:
    caption = (
        "A step is a forward and a backward pass, or a forward pass in inference, by the clock. Parts are self times "
        "of operators, in steps that a profiler watches. Those called by norm layers count as norms; activations and "
        "adds (residuals, gradients that meet) with their backward. copies: layers that copy their input, and going "
        "back read two tensors and write one in place; null: torch's layers against themselves"
    )
    columns = ["torch ms", "normops ms", "copies ms", "torch / normops", "null"]
    table = make_table("Where the time goes", "model", "malloc", "part", *columns, texts=3, caption=caption)
    for timing in timings:
        label = timing.model, timing.malloc
        for part in [*PARTS, "step"]:
            if comparison := timing.parts.get(part):
                null = timing.null[part]
                times = [f"{1e3 * seconds:.2f}" for seconds in (comparison.torch, comparison.normops)]
                times.append(f"{1e3 * timing.floor[part].normops:.2f}" if part in timing.floor else "")
                cells = *times, _ratio(comparison, bool(timing.doubts)), f"{null.speedup:.2f} ±{null.spread:3.0%}"
                table.add_row(*label, part, *cells)
                label = "", ""
        if timing.compiled:
            times = (f"{1e3 * seconds:.2f}" for seconds in (timing.compiled.torch, timing.compiled.normops))
            table.add_row("", "", "compiled step", *times, "", _ratio(timing.compiled, bool(timing.doubts)), "")
        table.add_section()
    return table


def sure(timings: list[ModelTiming]) -> list[ModelTiming]:
    return [timing for timing in timings if not timing.doubts]


def noise(timings: list[ModelTiming], part: str) -> float:
    """Of torch against itself: the root mean square of the logarithm of the ratio."""
    logarithms = [math.log(timing.null[part].speedup) for timing in sure(timings) if part in timing.null]
    return math.sqrt(statistics.fmean(value * value for value in logarithms)) if logarithms else math.nan


def distance(timings: list[ModelTiming]) -> float:
    """From the floor: how much longer the norms of normops take, as a geometric mean."""
    return statistics.geometric_mean(
        timing.floor["norm"].speedup / timing.parts["norm"].speedup for timing in timings if "norm" in timing.floor
    )


def verdict(timings: list[ModelTiming], failed: Mapping[str, str]) -> list[str]:
    lines = []
    for malloc in dict.fromkeys(timing.malloc for timing in timings):
        here = [timing for timing in sure(timings) if timing.malloc == malloc]
        means = {
            part: statistics.geometric_mean(timing.parts[part].speedup for timing in here if part in timing.parts)
            for part in COMPARED
            if any(part in timing.parts for timing in here)
        }
        for part in (FUSED, "step"):
            if fused := [timing.fused[part].speedup for timing in here if timing.fused]:
                means[f"fused {part}"] = statistics.geometric_mean(fused)
        if means:
            text = ", ".join(f"{part} {mean:.2f}" for part, mean in means.items())
            lines.append(f"{malloc} malloc: torch / normops {text} (geometric means of {len(here)} models)")
        if floors := [timing.floor["norm"].speedup for timing in here if "norm" in timing.floor]:
            lines.append(
                f"{malloc} malloc: torch / layers that only move memory, norm {statistics.geometric_mean(floors):.2f}; "
                f"the norms of normops take {distance(here):.2f} times as long as such layers"
            )
        noises = {part: noise(here, part) for part in ("norm forward", "norm backward", "step")}
        text = ", ".join(f"{part} {value:.1%}" for part, value in noises.items() if not math.isnan(value))
        if text:
            lines.append(f"{malloc} malloc: torch differs from itself by {text} (root mean square)")
        slower = [
            (comparison.speedup, f"{timing.model} {part} {comparison.speedup:.2f}")
            for timing in here
            for part, comparison in timing.parts.items()
            if part in CHARTED and comparison.speedup < math.exp(-2 * noises[part]) and comparison.quartiles[1] < 1
        ]
        if slower:
            found = "; ".join(text for _, text in sorted(slower))
            lines.append(f"{malloc} malloc: slower than torch by more than the noise: {found}")
    for timing in timings:
        if timing.doubts:
            lines.append(f"In doubt and left out: {timing.model}, {timing.malloc} malloc: {'; '.join(timing.doubts)}")
    lines += [f"Not measured: {model}: {why}" for model, why in failed.items()]
    return lines + [f"NOT TO BE TRUSTED: {text}" for text in objections(timings)]


def objections(timings: list[ModelTiming]) -> list[str]:
    found = []
    doubtful = len(timings) - len(sure(timings))
    if doubtful > DOUBTFUL_SHARE * len(timings):
        found.append(f"{doubtful} of {len(timings)} models are in doubt")
    if noise(timings, "step") > NOISY:
        found.append(f"a step of torch differs from itself by {noise(timings, 'step'):.0%}")
    return found


def changes(old: Mapping, new: Mapping) -> Changes:
    """Of two runs of models, both as in JSON."""
    before = {(timing["model"], timing["malloc"]): timing for timing in sure_ones(old["models"])}
    rows = []
    for part in COMPARED:
        runs = [
            [timing["null"][part]["speedup"] for timing in sure_ones(run["models"]) if part in timing["null"]]
            for run in (old, new)
        ]
        null_squares = sum(map(null_square, runs))
        for timing in sure_ones(new["models"]):
            earlier = before.get((timing["model"], timing["malloc"]), {"parts": {}})
            if part in earlier["parts"] and part in timing["parts"]:
                group = f"{part}, {timing['malloc']} malloc"
                text = f"{timing['model']} {group}"
                rows.append((group, text, earlier["parts"][part], timing["parts"][part], null_squares))
    return judge(rows, old, new)


def write_chart(folder: Path, timings: list[ModelTiming], environment: Mapping[str, str]) -> list[str]:
    timings = sure(timings)
    names = []
    for malloc in dict.fromkeys(timing.malloc for timing in timings):
        here = [timing for timing in timings if timing.malloc == malloc]
        figure = Figure(figsize=(9, 1.8 + 0.55 * len(here)), layout="constrained")
        axes = figure.subplots()
        bare(axes, "x")
        for row, timing in enumerate(here):
            for offset, (part, color) in zip((-0.27, 0, 0.27), CHARTED.items(), strict=True):
                if comparison := timing.parts.get(part):
                    low, high = comparison.quartiles
                    axes.barh(row + offset, comparison.speedup - 1, 0.25, left=1, color=color, label=part)
                    axes.plot([low, high], [row + offset] * 2, color=LINE, linewidth=0.8)
                    end = max(high, 1.0)
                    text = f" {comparison.speedup:.2f}"
                    axes.text(end, row + offset, text, fontsize=6, va="center_baseline", color=LINE)
        axes.axvline(1, color=LINE, linewidth=1)
        axes.set_yticks(range(len(here)), [f"{timing.model}\n{WHAT[timing.training]}" for timing in here], fontsize=7)
        axes.set_ylim(len(here) - 0.4, -0.6)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        facts = f"{malloc} malloc; a line on a bar: the quartiles of the single rounds; torch against itself: step "
        facts += f"{noise(here, 'step'):.1%}, norms {noise(here, 'norm'):.1%}"
        headline(figure, "Time in models, torch over normops", f"{subtitle(environment)}\n{facts}")
        names.append(f"models_{malloc}.png")
        figure.savefig(folder / names[-1], dpi=120, facecolor="white")
    return names
