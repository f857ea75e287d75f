"""``python -m bench``: the layers one by one, their accuracy, and two small networks in training."""

import argparse
import dataclasses
import time
from collections.abc import Iterator

import torch
from rich.table import Table

from bench import report
from bench.accuracy import measure_accuracy
from bench.cases import DTYPES, LAYERS, LAYOUTS, Case, accuracy_cases, fused_cases, timed_cases
from bench.charts import write_charts
from bench.command import Bar, add_common, finish, make_console, mallocs, parse
from bench.digits import NETWORKS, train
from bench.machine import environment, results_folder
from bench.measure import How, Timing, time_case
from bench.regimes import CACHES, Regime
from bench.results import Results, changes, doubt_multiples, objections
from bench.tables import environment_table, write_markdown
from bench.worker import Worker

SECONDS = {"quick": 0.1, "default": 0.4, "full": 1.0}  # for each case in each regime
NULL_CASES = 4
ACCURACY_SECONDS, EPOCH_SECONDS = 0.1, 0.6  # about; for the progress bar


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compares the layers of normops with those of torch: speed, forward and backward, with cold and "
        "with warm caches; errors against float64; and two small networks trained on real images with either. Prints "
        "tables and writes them with all figures (results.json), as Markdown (results.md) and as charts. "
        "`python -m bench models` does it for whole models.",
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
        help=f"of {', '.join(DTYPES)} (default: float32, and fewer cases in bfloat16)",
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
    add(
        "--fused",
        action="store_true",
        help="instead of the layers alone, norms with the activation, the addition or both that stand around them, in "
        "one call, against torch's operators one after the other",
    )
    add("--match", nargs="+", metavar="TEXT", help="only cases whose names contain one of these, such as 8x64x80x80")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes, little time for each, two epochs")
    size.add_argument("--full", action="store_true", help="more shapes, all of them in all dtypes, more time for each")

    add = parser.add_argument_group("how").add_argument
    add(
        "--caches",
        nargs="+",
        choices=CACHES,
        default=list(CACHES),
        metavar="CACHES",
        help="; ".join(f"{name}: {text}" for name, text in CACHES.items()) + " (default: both)",
    )
    add(
        "--against",
        choices=["eager", "compile", "parts"],
        default="eager",
        help="time torch's layers as they are (the default), or under torch.compile, which takes seconds more for "
        "each; parts, for --fused: the norm of normops and torch's operators around it",
    )
    add(
        "--floor",
        choices=["clone", "copy"],
        default="clone",
        help="the time to compare with: x.clone(), or y.copy_(x) into memory that is there already. A forward pass "
        "moves as much memory as one copy, a backward pass as much as one and a half (default: clone)",
    )
    add(
        "--gradients",
        choices=["handed", "kept"],
        default="handed",
        help="with cold caches: hand the gradient of the output over, as layers of a network do, so that on the CPU "
        "that of the input may take its place (the default), or keep it. With warm caches it is always kept",
    )
    add(
        "--seconds",
        type=float,
        help="time for each case in each regime "
        f"(default: {SECONDS['default']}; {SECONDS['quick']} if --quick, {SECONDS['full']} if --full)",
    )
    add("--rounds", type=int, help="exact number of rounds for each case, however long")
    add_common(parser, "bench/results/latest", mallocs=["default", "recycled"])
    return parser


class Timekeeper:
    """Times cases in all regimes, each in the process that has its malloc; doubtful ones once more at the end."""

    def __init__(self, arguments: argparse.Namespace, how: How, bar: Bar):
        self.how, self.bar, self.caches = how, bar, arguments.caches
        self.workers = [Worker(malloc, torch.get_num_threads()) for malloc in mallocs(arguments)]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for worker in self.workers:
            worker.close()

    def estimate(self) -> float:
        """Seconds that a case takes in one process."""
        return len(self.caches) * self.how.seconds * 1.2 + 0.15

    def parts(self, case: Case) -> list[Worker]:
        # Torch's allocator for CUDA always recycles.
        return self.workers if case.device == "cpu" else self.workers[-1:]

    def time(self, case: Case, null: bool = False) -> Iterator[Timing]:
        for worker in self.parts(case):
            self.bar.say(f"{'torch against itself' if null else 'time'}: {case.name}")
            yield from worker.run(
                time_case, case, [Regime(caches, worker.malloc) for caches in self.caches], self.how, null
            )
            self.bar.advance(self.estimate())

    def again(self, timings: list[Timing], null: bool = False) -> None:
        """In place. A machine that is still busy after a tenth of them is not asked for the rest."""
        doubtful = [index for index, timing in enumerate(timings) if timing.doubts]
        in_vain = 0
        for index in doubtful:
            timing = timings[index]
            self.bar.say(f"again: {timing.case.name}")
            worker = next(worker for worker in self.workers if worker.malloc == timing.regime.malloc)
            (fresh,) = worker.run(time_case, timing.case, [timing.regime], self.how, null)
            timings[index] = fresh
            in_vain += bool(fresh.doubts)
            if in_vain > max(3, len(timings) / 10):
                return


@dataclasses.dataclass
class Plan:
    accuracies: list[Case]
    timed: list[Case]
    null: list[Case]  # torch's layer against itself
    trainings: list[tuple[str, str]]  # networks and devices
    epochs: int

    @classmethod
    def of(cls, arguments: argparse.Namespace, selection: str) -> "Plan":
        chosen = arguments.layers, arguments.dtypes, arguments.layouts, arguments.devices
        accuracies, timed = accuracy_cases(*chosen), timed_cases(*chosen, selection)
        networks = list(NETWORKS)
        if arguments.fused:
            accuracies, timed, networks = [], fused_cases(*chosen[1:], selection), []
        if arguments.only == "digits":
            accuracies, timed = [], []
        if arguments.only == "layers" or arguments.match:
            networks = []
        if arguments.match:
            accuracies, timed = [], [case for case in timed if any(text in case.name for text in arguments.match)]
        null = timed[:: -(-len(timed) // NULL_CASES)] if timed else []
        trainings = [(network, device) for network in networks for device in arguments.devices]
        return cls(accuracies, timed, null, trainings, 2 if selection == "quick" else 10)


def measure(plan: Plan, results: Results, keeper: Timekeeper, bar: Bar) -> Iterator[tuple[Table, bool]]:
    """Fills `results`, and yields tables as there is something to show, and whether on the console too."""
    timings = [case for case in plan.timed + plan.null for _ in keeper.parts(case)]
    bar.expect(
        ACCURACY_SECONDS * len(plan.accuracies)
        + keeper.estimate() * len(timings)
        + EPOCH_SECONDS * plan.epochs * len(plan.trainings)
    )
    for case in plan.accuracies:
        bar.say(f"accuracy: {case.name}")
        results.accuracy.append(measure_accuracy(case))
        bar.advance(ACCURACY_SECONDS)
    yield from ((table, True) for table in report.accuracy_tables(results.accuracy))

    for case in plan.timed:
        if case in plan.null:
            results.null += keeper.time(case, null=True)
        results.timings += keeper.time(case)
    keeper.again(results.timings)
    keeper.again(results.null, null=True)
    doubt_multiples(results.timings)
    doubt_multiples(results.null)
    for number, regime in enumerate(report.regimes_of(results.timings)):
        here = [timing for timing in results.timings if timing.regime == regime]
        yield from ((table, number == 0) for table in report.timing_tables(here))
    if plan.timed:
        yield report.null_table(results.null), False
        yield report.means_table(results.timings), True
    if any(timing.doubts for timing in results.timings):
        yield report.doubts_table(results.timings), False

    for network, device in plan.trainings:
        bar.say(f"digits: {network} {device}")
        results.training.append(train(network, device, plan.epochs, on_epoch=lambda: bar.advance(EPOCH_SECONDS)))
    if plan.trainings:
        yield report.training_table(results.training), True


def main(argv: list[str]) -> int:
    arguments = parse(parser(), argv)
    selection = "quick" if arguments.quick else "full" if arguments.full else "default"
    seconds = arguments.seconds or SECONDS[selection]
    how = How(arguments.against, arguments.floor, arguments.gradients, seconds, arguments.rounds)
    console = make_console()
    facts = {**environment(), "floor": {"clone": "x.clone()", "copy": "y.copy_(x)"}[how.floor]}
    facts |= {"gradients": f"{how.gradients}, if cold", "against": f"torch {how.against}"}
    if "cuda" in arguments.devices:
        facts["gpu"] = torch.cuda.get_device_name()
    options = {name: value for name, value in vars(arguments).items() if name not in ("compare", "output")}
    results, plan = Results(facts, options), Plan.of(arguments, selection)
    folder, elsewhere = results_folder(arguments.output)
    if elsewhere:
        console.print(elsewhere, "")

    start = time.perf_counter()
    tables = [environment_table(facts)]
    console.print(tables[0], "")
    bar = Bar(console)
    with bar.progress, Timekeeper(arguments, how, bar) as keeper:
        for table, on_console in measure(plan, results, keeper, bar):
            tables.append(table)
            if on_console:
                console.print(table, "")
    if arguments.compare:
        tables.append(report.changes_table(changes(arguments.compare, dataclasses.asdict(results))))
        console.print(tables[-1], "")

    verdict = report.verdict(results.timings, results.null, facts["against"])
    results.write_json(folder / "results.json")
    charts = write_charts(folder, results.timings, results.training, facts, arguments.full)
    write_markdown(folder / "results.md", "Benchmark of normops", verdict, tables, charts)
    wrong = [
        f"{timing.case.name}: " + ", ".join(f"{name} {value:.1e}" for name, value in timing.differences.items())
        for timing in results.timings
        if not timing.agrees
    ]
    return finish(console, folder, start, verdict, wrong, bool(objections(results.timings, results.null)))
