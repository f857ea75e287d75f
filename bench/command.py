"""What the commands of the benchmark have in common: options, progress, the last lines."""

import argparse
import functools
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.regimes import MALLOCS, can_recycle
from bench.results import read_earlier
from normops._ops import BUILD_INFO

WRONG, DOUBTFUL = 1, 3  # exit statuses; argparse has 2


def _earlier(path: str, key: str) -> dict:
    try:
        return read_earlier(path, key)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_common(parser: argparse.ArgumentParser, output: str, mallocs: list[str], key: str | None = "timings") -> None:
    """The options. ``key``: what a file to compare with has to hold, if that can be done."""
    add = parser.add_argument_group("process").add_argument
    add("--threads", type=int, help="CPU threads (default: as many as torch takes)")
    add(
        "--malloc",
        nargs="+",
        choices=MALLOCS,
        default=mallocs,
        metavar="MALLOC",
        help="; ".join(f"{name}: {text}" for name, text in MALLOCS.items()) + f" (default: {' '.join(mallocs)})",
    )
    add = parser.add_argument_group("results").add_argument
    add(
        "--output",
        type=Path,
        default=Path(output),
        metavar="DIR",
        help="folder for what is written; a temporary one if this cannot be written to (default: %(default)s)",
    )
    if key:
        text = "also print how the speedups have changed since the run that wrote this file"
        add("--compare", type=functools.partial(_earlier, key=key), metavar="OLD.json", help=text)


def mallocs(arguments: argparse.Namespace) -> list[str]:
    """Those chosen, in the order of `MALLOCS`, as far as there are any to choose from here."""
    return [name for name in MALLOCS if name in arguments.malloc and (name == "default" or can_recycle())]


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    arguments = parser.parse_args(argv)
    if not mallocs(arguments):
        parser.error("only glibc's malloc can be told to recycle: choose --malloc default")
    if "cuda" in getattr(arguments, "devices", ()):
        if not BUILD_INFO["cuda"]:
            parser.error("this normops was built without CUDA kernels; build it where torch finds the CUDA toolkit")
        if not torch.cuda.is_available():
            parser.error("torch finds no CUDA device here")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def make_console() -> Console:
    console = Console(highlight=False)
    console.width = min(console.width, 120) if console.is_terminal else 120
    return console


class Bar:
    """One progress bar for everything, in seconds. Drawn on terminals, and only between measurements: it disturbs
    none."""

    def __init__(self, console: Console):
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        self.progress = Progress(
            *columns,
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._console = console
        self._task = self.progress.add_task("", total=None)

    def expect(self, seconds: float) -> None:
        self.progress.update(self._task, total=seconds)
        if self.progress.disable:
            self._console.print(f"This will take about {max(1, round(seconds / 60))} min", "")

    def say(self, text: str) -> None:
        self.progress.update(self._task, description=text, refresh=True)

    def advance(self, seconds: float) -> None:
        self.progress.update(self._task, advance=seconds, refresh=True)


def finish(console: Console, folder: Path, start: float, verdict: list[str], wrong: list[str], doubtful: bool) -> int:
    """The last lines, and the exit status."""
    for line in verdict:
        console.print(line)
    console.print(f"{time.perf_counter() - start:.0f} seconds; all of it is in {folder}")
    for text in wrong:
        console.print(f"[red]normops and torch differ[/] in {text}")
    return WRONG if wrong else DOUBTFUL if doubtful else 0
