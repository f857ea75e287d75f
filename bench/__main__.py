"""``python -m bench``: how fast and how exact the layers of normops are, beside those of torch."""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import report
from bench.accuracy import measure_accuracy
from bench.cases import DTYPES, LAYERS, LAYOUTS, Case, accuracy_cases, timed_cases
from bench.charts import write_charts
from bench.digits import NETWORKS, train
from bench.measure import recycle_memory, time_case
from normops.__main__ import description
from normops._ops import BUILD_INFO


def _earlier_results(path: str) -> dict:
    try:
        results = json.loads(Path(path).read_text())
        results["timings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{path} is not a results.json of this benchmark ({error})") from None
    return results


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compares the layers of normops with those of torch: speed, forward and backward; errors against "
        "float64; and two small networks trained on real images with either. Prints tables and writes them with all "
        "figures (results.json), as Markdown (results.md) and as charts.",
    )
    add = parser.add_argument_group("what").add_argument
    add("--only", choices=["layers", "digits"], help="leave out the other part (default: both)")
    add(
        "--layers",
        nargs="+",
        choices=LAYERS,
        default=list(LAYERS),
        metavar="LAYER",
        help=f"of {', '.join(LAYERS)} (default: all)",
    )
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16"],
        metavar="DTYPE",
        help=f"of {', '.join(DTYPES)} (default: float32 bfloat16)",
    )
    add(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        default=LAYOUTS,
        metavar="LAYOUT",
        help=f"of {', '.join(LAYOUTS)} (images and volumes only; default: both)",
    )
    add(
        "--devices",
        nargs="+",
        choices=["cpu", "cuda"],
        default=["cpu"],
        metavar="DEVICE",
        help="of cpu, cuda (default: cpu)",
    )
    add("--quick", action="store_true", help="small shapes, little time for each, two epochs")

    add = parser.add_argument_group("how").add_argument
    add("--threads", type=int, help="CPU threads (default: as many as torch takes)")
    add(
        "--against",
        choices=["eager", "compile"],
        default="eager",
        help="time torch's layers as they are (the default), or under torch.compile, which takes seconds more for each",
    )
    add(
        "--floor",
        choices=["clone", "copy"],
        default="clone",
        help="the time to compare with: x.clone(), or y.copy_(x) into memory that is there already. A forward pass "
        "moves as much memory as one copy, a backward pass as much as one and a half (default: clone)",
    )
    add(
        "--outputs",
        choices=["recycled", "fresh"],
        default="recycled",
        help="recycled: malloc keeps freed memory, so an output lies in memory used before, as with an allocator that "
        "caches. fresh: malloc's defaults, with which glibc gets large outputs from the kernel and the cost of "
        "clearing them is in every time, the floor's too (default: recycled)",
    )
    add("--seconds", type=float, help="time for each case (default: 1, or 0.2 if --quick)")
    add("--rounds", type=int, help="exact number of rounds for each case, however long")

    add = parser.add_argument_group("results").add_argument
    add(
        "--output",
        type=Path,
        default=Path("bench/results/latest"),
        metavar="DIR",
        help="folder for what is written (default: %(default)s)",
    )
    add(
        "--compare",
        type=_earlier_results,
        metavar="OLD.json",
        help="also print how the speedups have changed since the run that wrote this results.json",
    )
    arguments = parser.parse_args()
    if arguments.seconds is None:
        arguments.seconds = 0.2 if arguments.quick else 1.0
    if "cuda" in arguments.devices and not BUILD_INFO["cuda"]:
        parser.error("this normops was built without CUDA kernels; build it where torch finds the CUDA toolkit")
    if "cuda" in arguments.devices and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    return arguments


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    outputs = arguments.outputs
    if outputs == "recycled" and not recycle_memory():
        outputs = "fresh (only glibc's malloc can be told to recycle)"
    environment = {
        **description(),
        "cpu": _cpu_model(),
        "cpu load": f"{os.getloadavg()[0]:.1f} in the last minute, by this and other programs",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "outputs": outputs,
        "floor": {"clone": "x.clone()", "copy": "y.copy_(x)"}[arguments.floor],
        "against": f"torch {arguments.against}",
    }
    if "cuda" in arguments.devices:
        environment["gpu"] = torch.cuda.get_device_name()
    return environment


class _Bar:
    """One progress bar for everything; drawn only between measurements, so that it disturbs none, and on terminals."""

    def __init__(self, console: Console, total: int):
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        times = TimeElapsedColumn(), TimeRemainingColumn()
        self.progress = Progress(
            *columns, *times, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
        )
        self.task = self.progress.add_task("", total=total)

    def say(self, text: str) -> None:
        self.progress.update(self.task, description=text, refresh=True)

    def advance(self) -> None:
        self.progress.update(self.task, advance=1, refresh=True)

    def track(self, what: str, cases: Iterable[Case]) -> Iterator[Case]:
        for case in cases:
            self.say(f"{what}: {case.name}")
            yield case
            self.advance()


def main() -> int:
    arguments = _parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(highlight=False)
    console.width = min(console.width, 120) if console.is_terminal else 120
    options = {name: value for name, value in vars(arguments).items() if name not in ("compare", "output")}
    results = report.Results(_environment(arguments), options)
    tables = []

    def show(*new_tables):
        tables.extend(new_tables)
        for table in new_tables:
            console.print(table, "")

    selection = arguments.layers, arguments.dtypes, arguments.layouts, arguments.devices
    accuracies, timed = accuracy_cases(*selection), timed_cases(*selection, quick=arguments.quick)
    networks, epochs = list(NETWORKS), 2 if arguments.quick else 10
    if arguments.only == "layers":
        networks = []
    elif arguments.only == "digits":
        accuracies, timed = [], []
    trainings = [(network, device) for network in networks for device in arguments.devices]

    start = time.perf_counter()
    show(report.environment_table(results.environment))
    bar = _Bar(console, len(accuracies) + len(timed) + epochs * len(trainings))
    with bar.progress:
        if accuracies:
            results.accuracy = [measure_accuracy(case) for case in bar.track("accuracy", accuracies)]
            show(*report.accuracy_tables(results.accuracy))
        if timed:
            how = arguments.against, arguments.floor, arguments.seconds, arguments.rounds
            results.timings = [time_case(case, *how) for case in bar.track("time", timed)]
            show(*report.timing_tables(results.timings), report.means_table(results.timings))
        for network, device in trainings:
            bar.say(f"digits: {network} {device}")
            results.training.append(train(network, device, epochs, on_epoch=bar.advance))
        if trainings:
            show(report.training_table(results.training))
    if arguments.compare:
        show(report.changes_table(arguments.compare, results.timings))

    arguments.output.mkdir(parents=True, exist_ok=True)
    results.write_json(arguments.output / "results.json")
    charts = write_charts(arguments.output, results.timings, results.training)
    report.write_markdown(arguments.output / "results.md", tables, charts)
    console.print(f"{time.perf_counter() - start:.0f} seconds; all of it is in {arguments.output}")

    wrong = [timing for timing in results.timings if not timing.agrees]
    for timing in wrong:
        differences = ", ".join(f"{name} {difference:.1e}" for name, difference in timing.differences.items())
        console.print(f"[red]normops and torch differ[/] in {timing.case.name}: {differences}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
