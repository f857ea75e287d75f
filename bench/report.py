"""The figures of the layers as tables, and what follows from them in a few sentences."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from rich.table import Table

from bench.accuracy import Accuracy
from bench.digits import TEST_IMAGES, Run, Training
from bench.measure import Comparison, Timing
from bench.regimes import HEADLINE, Regime
from bench.results import Changes, noise, objections, sure
from bench.tables import make_table, speedup

FLOOR = (
    "floor: the time of a copy of the tensor in the same regime, for a backward pass, which reads two tensors, of 1.5 "
    "copies. floors: time over floor; a layer that reads once and writes once, as fast as memory goes, has 1.0, and "
    "one that has to read twice can have 1.5"
)
LISTED = 8


def regimes_of(timings: Iterable[Timing]) -> list[Regime]:
    return list(dict.fromkeys(timing.regime for timing in timings))


def timing_tables(timings: list[Timing]) -> Iterator[Table]:
    """Of one regime."""
    columns = ["torch", "normops", "speedup", "floors"]
    for (layer, device), group in groupby(timings, key=lambda timing: (timing.case.layer, timing.case.device)):
        title = f"{layer} on {device}, {_regime(timings[0].regime, device)}, medians in µs"
        table = make_table(title, "shape", "dtype", "layout", "pass", *columns, texts=4)
        for timing in group:
            case, doubtful = timing.case, bool(timing.doubts)
            table.add_row(case.size, case.dtype, case.layout, "forward", *_comparison(timing.forward, doubtful))
            table.add_row("", "", "", "backward", *_comparison(timing.backward, doubtful))
        yield table


def _regime(regime: Regime, device: str) -> str:
    return regime.name if device == "cpu" else f"{regime.caches} caches"


def _comparison(comparison: Comparison, doubtful: bool) -> list[str]:
    return [
        _microseconds(comparison.torch),
        _microseconds(comparison.normops),
        f"{speedup(comparison.speedup, doubtful)} ±{comparison.spread:3.0%}",
        f"{comparison.normops_floors:.2f}",
    ]


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.{1 if seconds < 1e-4 else 0}f}"


def means_table(timings: list[Timing]) -> Table:
    """Of all regimes, without what is in doubt."""
    caption = (
        "speedup: ratio of the medians, ± half the interquartile range of that of single rounds; ?: in doubt, and left "
        f"out of the means; {FLOOR}"
    )
    columns = ["passes", "fwd speedup", "least", "floors", "bwd speedup", "least", "floors"]
    table = make_table("Geometric means", "regime", "layer", *columns, texts=2, caption=caption)
    for regime in regimes_of(timings):
        here = [timing for timing in sure(timings) if timing.regime == regime]
        layers = dict.fromkeys(timing.case.layer for timing in here)
        groups = {layer: [timing for timing in here if timing.case.layer == layer] for layer in layers}
        label = regime.name
        for name, group in {**groups, "all": here}.items():
            if group:
                table.add_row(label, name, str(2 * len(group)), *_means(group))
                label = ""
        table.add_section()
    return table


def _means(group: list[Timing]) -> Iterator[str]:
    for comparisons in ([timing.forward for timing in group], [timing.backward for timing in group]):
        yield speedup(statistics.geometric_mean(comparison.speedup for comparison in comparisons))
        yield speedup(min(comparison.speedup for comparison in comparisons))
        yield f"{statistics.geometric_mean(comparison.normops_floors for comparison in comparisons):.2f}"


def null_table(null: list[Timing]) -> Table:
    caption = "Both columns are torch's layer: what differs from 1 is noise, in the other tables too"
    table = make_table("Torch against itself", "case", "regime", "forward", "backward", texts=2, caption=caption)
    for timing in null:
        mark = "?" if timing.doubts else ""
        cells = (f"{one.speedup:.2f}{mark} ±{one.spread:3.0%}" for one in timing.passes.values())
        table.add_row(timing.case.name, timing.regime.name, *cells)
    return table


def doubts_table(timings: list[Timing]) -> Table:
    caption = "Measured again and still in doubt; left out of means and charts"
    table = make_table("In doubt", "case", "regime", "why", texts=3, caption=caption)
    for timing in timings:
        if timing.doubts:
            table.add_row(timing.case.name, timing.regime.name, "; ".join(timing.doubts))
    return table


def verdict(timings: list[Timing], null: list[Timing], against: str) -> list[str]:
    """What a reader takes home."""
    lines = []
    for regime in regimes_of(timings):
        here = [timing for timing in sure(timings) if timing.regime == regime]
        if not here:
            continue
        forward, backward = (
            statistics.geometric_mean(timing.passes[name].speedup for timing in here)
            for name in ("forward", "backward")
        )
        lead = "As in a model: " if regime == HEADLINE else ""
        lines.append(
            f"{lead}{regime.name}: normops is {forward:.2f} times as fast as {against} forward and {backward:.2f} "
            f"times backward (geometric means of {len(here)} cases)"
        )
    slower = _slower(timings, noise(null))
    if slower:
        more = f" and {len(slower) - LISTED} more" if len(slower) > LISTED else ""
        lines.append(f"Slower than {against} by more than the noise: {'; '.join(slower[:LISTED])}{more}")
    elif sure(timings):
        lines.append(f"No pass is slower than {against} by more than the noise")
    if not math.isnan(noise(null)):
        lines.append(
            f"Noise: torch differs from itself by {noise(null):.1%} (root mean square of {2 * len(null)} passes)"
        )
    doubtful = len(timings) - len(sure(timings))
    if doubtful:
        lines.append(f"{doubtful} of {len(timings)} timings are in doubt and left out: see the reasons")
    lines += [f"NOT TO BE TRUSTED: {objection}" for objection in objections(timings, null)]
    return lines


def _slower(timings: list[Timing], null_noise: float) -> list[str]:
    """The worst first."""
    allowed = 0.0 if math.isnan(null_noise) else null_noise
    found = []
    for timing in sure(timings):
        for name, comparison in timing.passes.items():
            # By more than torch's layer may be slower than itself, and in three rounds of four.
            if comparison.speedup < math.exp(-2 * allowed) and comparison.quartiles[1] < 1:
                text = f"{timing.case.name} {name} {comparison.speedup:.2f} ({timing.regime.name})"
                found.append((comparison.speedup, text))
    return [text for _, text in sorted(found)]


def accuracy_tables(accuracies: list[Accuracy]) -> Iterator[Table]:
    tensors = ["output", "dx", "dweight", "dbias"]
    caption = "The largest error against float64, relative to the largest value"
    for mean, group in groupby(accuracies, key=lambda accuracy: accuracy.case.mean):
        title = f"Accuracy on data of mean {mean:g} and variance 1"
        table = make_table(title, "layer", "dtype", "layout", "by", *tensors, texts=4, caption=caption)
        for accuracy in group:
            case = accuracy.case
            table.add_row(case.layer, case.dtype, case.layout, "torch", *_errors(accuracy.torch, tensors))
            table.add_row("", "", "", "normops", *_errors(accuracy.normops, tensors))
        yield table


def _errors(errors: Mapping[str, float], tensors: list[str]) -> list[str]:
    return [f"{errors[name]:.1e}" if name in errors else "" for name in tensors]


def training_table(trainings: list[Training]) -> Table:
    columns = ["loss", "accuracy", "ms a step", "speedup", "difference"]
    caption = (
        "The ConvNet has BatchNorm2d, the Transformer LayerNorm. accuracy: on images not trained on; "
        "difference: the largest relative one between the losses of an epoch (of a single step)"
    )
    table = make_table(
        "Training on the digits images", "network", "layers", "loss by epoch", *columns, texts=3, caption=caption
    )
    for training in trainings:
        difference = f"{training.epoch_difference:.0e} ({training.step_difference:.0e})"
        ratio = speedup(training.speedup, bool(training.doubts))
        table.add_row(training.network, "torch", *_run(training.torch))
        table.add_row("", "normops", *_run(training.normops), ratio, difference)
    return table


def _run(run: Run) -> list[str]:
    return [
        _sparkline(run.epoch_losses),
        f"{run.epoch_losses[-1]:.5f}",
        f"{run.correct / TEST_IMAGES:.2%}",
        f"{1e3 * run.step_seconds:.2f}",
    ]


def _sparkline(values: list[float]) -> str:
    blocks = "▁▂▃▄▅▆▇█"
    low, high = min(values), max(values)
    return "".join(blocks[round((value - low) / (high - low or 1) * (len(blocks) - 1))] for value in values)


def changes_table(changes: Changes) -> Table:
    """The means, and the cases that have changed, the worst first."""
    caption = f"{changes.verdict}. noise: what two runs of the same may differ by, from their spread and null runs"
    if changes.differs:
        caption += f". The runs are not of the same kind ({'; '.join(changes.differs)})"
    columns = ["cases", "old", "new", "change", "noise"]
    table = make_table("Speedups since the earlier run", "of", *columns, caption=caption)
    changed = sorted((one for one in changes.cases if one.is_one), key=lambda one: one.new / one.old)
    for change in changes.means + changed:
        ratio = change.new / change.old
        colour = "default" if not change.is_one else "green" if ratio > 1 else "red"
        numbers = f"{change.old:.2f}", f"{change.new:.2f}", f"[{colour}]{ratio - 1:+.0%}[/]", f"±{change.noise:.0%}"
        table.add_row(change.of, str(change.cases), *numbers)
    return table
