"""The figures as tables on the console, as Markdown and as JSON."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.accuracy import Accuracy
from bench.digits import TEST_IMAGES, Run, Training
from bench.measure import Comparison, Timing

NOTICEABLE = 0.05  # a smaller change of a speedup between two runs is noise


@dataclass
class Results:
    environment: dict[str, str]
    options: dict
    accuracy: list[Accuracy] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def write_markdown(path: Path, tables: Iterable[Table], charts: Iterable[str]) -> None:
    with path.open("w") as file:
        console = Console(file=file, width=200)
        file.write("# Benchmark of normops\n")
        for table in tables:
            file.write(f"\n## {table.title}\n")
            caption = table.caption
            table.title = table.caption = None
            table.box, table.padding = box.MARKDOWN, (0, 1)
            table.show_edge = table.show_header = True
            console.print(table)
            file.write(f"{caption}\n" if caption else "")
        file.writelines(f"\n![{chart}]({chart})\n" for chart in charts)


def _table(title: str, *columns: str, texts: int = 1, caption: str | None = None, **options) -> Table:
    """A table whose first columns are texts and whose others are numbers."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, **options)
    table.title_justify = table.caption_justify = "left"
    for index, column in enumerate(columns):
        # On a narrow terminal the texts are folded; a number is never cut.
        table.add_column(column, **({"overflow": "fold"} if index < texts else {"justify": "right", "no_wrap": True}))
    return table


def environment_table(environment: Mapping[str, str]) -> Table:
    table = _table("Environment", "", "", texts=2, show_header=False)
    for row in environment.items():
        table.add_row(*row)
    return table


def timing_tables(timings: list[Timing]) -> Iterator[Table]:
    columns = ["torch", "normops", "speedup", "floors"]
    for (layer, device), group in groupby(timings, key=lambda timing: (timing.case.layer, timing.case.device)):
        table = _table(f"{layer} on {device}, medians in µs", "shape", "dtype", "layout", "pass", *columns, texts=4)
        for timing in group:
            case = timing.case
            table.add_row(case.size, case.dtype, case.layout, "forward", *_comparison(timing.forward))
            table.add_row("", "", "", "backward", *_comparison(timing.backward))
        yield table


def _comparison(comparison: Comparison) -> list[str]:
    low, high = comparison.speedup_quartiles
    spread = (high - low) / 2 / comparison.speedup
    return [
        _microseconds(comparison.torch),
        _microseconds(comparison.normops),
        f"{_speedup(comparison.speedup)} ±{spread:3.0%}",
        f"{comparison.normops_floors:.2f}",
    ]


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.{1 if seconds < 1e-4 else 0}f}"


def _speedup(speedup: float) -> str:
    return f"[{'green' if speedup >= 1 else 'red'}]{speedup:.2f}[/]"


def means_table(timings: list[Timing]) -> Table:
    caption = (
        "speedup: ratio of the medians, ± half the interquartile range of that of single rounds; "
        "floors: the time of normops over that of the floor, which in a backward pass is 1.5 copies"
    )
    columns = ["cases", "fwd speedup", "floors", "bwd speedup", "floors"]
    table = _table("Geometric means", "layer", *columns, caption=caption)
    layers = dict.fromkeys(timing.case.layer for timing in timings)
    groups = {layer: [timing for timing in timings if timing.case.layer == layer] for layer in layers}
    for name, group in {**groups, "all": timings}.items():
        row = [name, str(len(group))]
        for comparisons in ([timing.forward for timing in group], [timing.backward for timing in group]):
            row.append(_speedup(statistics.geometric_mean(comparison.speedup for comparison in comparisons)))
            row.append(f"{statistics.geometric_mean(comparison.normops_floors for comparison in comparisons):.2f}")
        table.add_row(*row)
    return table


def accuracy_tables(accuracies: list[Accuracy]) -> Iterator[Table]:
    tensors = ["output", "dx", "dweight", "dbias"]
    caption = "The largest error against float64, relative to the largest value"
    for mean, group in groupby(accuracies, key=lambda accuracy: accuracy.case.mean):
        title = f"Accuracy on data of mean {mean:g} and variance 1"
        table = _table(title, "layer", "dtype", "layout", "by", *tensors, texts=4, caption=caption)
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
    table = _table(
        "Training on the digits images", "network", "layers", "loss by epoch", *columns, texts=3, caption=caption
    )
    for training in trainings:
        difference = f"{training.epoch_difference:.0e} ({training.step_difference:.0e})"
        table.add_row(training.network, "torch", *_run(training.torch))
        table.add_row("", "normops", *_run(training.normops), _speedup(training.speedup), difference)
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


def changes_table(old: Mapping, timings: list[Timing]) -> Table:
    """The speedups of an earlier run's JSON beside these, the worst change first."""
    before = {_key(timing["case"]): timing for timing in old["timings"]}
    rows = []
    for timing in timings:
        if earlier := before.get(_key(dataclasses.asdict(timing.case))):
            for name in ("forward", "backward"):
                speedups = earlier[name]["speedup"], getattr(timing, name).speedup
                rows.append((speedups[1] / speedups[0] - 1, timing.case.name, name, *speedups))

    caption = f"{len(rows) // 2} of {len(timings)} cases are in both runs; changes over {NOTICEABLE:.0%} are coloured"
    table = _table("Speedups since the earlier run", "case", "pass", "old", "new", "change", texts=2, caption=caption)
    for change, case, name, earlier, now in sorted(rows):
        colour = "default" if abs(change) < NOTICEABLE else "green" if change > 0 else "red"
        table.add_row(case, name, f"{earlier:.2f}", f"{now:.2f}", f"[{colour}]{change:+.0%}[/]")
    return table


def _key(case: Mapping) -> tuple:
    return case["layer"], tuple(case["shape"]), case["dtype"], case["layout"], case["device"]
