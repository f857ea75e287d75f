"""Recorded runs as they are read: all that a run may lack is absent, and nothing else of its form shows behind this."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.sweep import Found

FILES = ("results.json", "models.json", "accuracy.json", "memory.json", "experiments.json")
HEADLINE = ("cold", "default")
EARLIER = ("warm", "recycled")  # what runs of format 1 have measured, and do not say


@dataclass(frozen=True)
class Pass:
    """A forward or a backward of a case, in a regime."""

    layer: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    regime: tuple[str, str]  # caches, malloc
    name: str
    torch: float  # seconds
    normops: float
    floor: float | None
    quartiles: tuple[float, float] | None

    @property
    def speedup(self) -> float:
        return self.torch / self.normops

    @property
    def floors(self) -> float | None:
        return self.normops / self.floor if self.floor else None

    @property
    def torch_floors(self) -> float | None:
        return self.torch / self.floor if self.floor else None

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * {"float64": 8, "float32": 4}.get(self.dtype, 2)


@dataclass
class Run:
    name: str
    folder: Path
    environment: dict[str, str]
    passes: list[Pass] = field(default_factory=list)
    doubtful: int = 0
    noise: float | None = None  # root mean square of the logarithm of torch over torch
    accuracy: list[Mapping] = field(default_factory=list)
    sweeps: list[Found] = field(default_factory=list)
    mistakes: list[Mapping] = field(default_factory=list)
    training: list[Mapping] = field(default_factory=list)
    models: list[Mapping] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Mapping[str, int]] = field(default_factory=dict)  # bytes, by model and form of it
    experiments: dict[str, Mapping] = field(default_factory=dict)
    raw: Mapping = field(default_factory=dict)  # of results.json
    label: str = ""  # the name without what all have in common

    @property
    def machine(self) -> str:
        kernels = self.environment.get("cpu kernels", "").split()
        where = self.environment.get("gpu") or self.environment.get("cpu", "an unknown processor")
        return ", ".join([where, *kernels[:1]])

    @property
    def against(self) -> str:
        return self.environment.get("against", "torch eager")

    @property
    def threads(self) -> int | None:
        first = self.environment.get("cpu threads", "").partition(" ")[0]
        return int(first) if first.isdigit() else None

    def regimes(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(one.regime for one in self.passes))

    @property
    def headline(self) -> tuple[str, str] | None:
        """The regime to quote: that of a model where there is one."""
        regimes = self.regimes()
        return HEADLINE if HEADLINE in regimes else regimes[0] if regimes else None


def mean(values: Iterable[float]) -> float | None:
    values = [value for value in values if value and value > 0]
    return statistics.geometric_mean(values) if values else None


def _passes(timing: Mapping) -> Iterable[Pass]:
    case, regime = timing["case"], timing.get("regime")
    for name in ("forward", "backward"):
        if not (found := timing.get(name)):
            continue
        quartiles = found.get("quartiles") or found.get("speedup_quartiles")
        yield Pass(
            case["layer"],
            tuple(case["shape"]),
            case["dtype"],
            case.get("layout", "contiguous"),
            (regime["caches"], regime["malloc"]) if regime else EARLIER,
            name,
            found["torch"],
            found["normops"],
            found.get("floor"),
            tuple(quartiles) if quartiles else None,
        )


def _fill(run: Run, data: Mapping) -> None:
    timings = data.get("timings", [])
    run.raw = data
    run.doubtful = sum(bool(timing.get("doubts")) for timing in timings)
    run.passes = [one for timing in timings if not timing.get("doubts") for one in _passes(timing)]
    null = [one for timing in data.get("null", []) if not timing.get("doubts") for one in _passes(timing)]
    if null:
        run.noise = math.sqrt(statistics.fmean(math.log(one.speedup) ** 2 for one in null))
    run.accuracy = data.get("accuracy", [])
    run.training = data.get("training", [])


def _as_case(error: Mapping) -> Mapping:
    """An error of ``python -m bench accuracy`` in the form of those of the layers."""
    cell = error["cell"]
    parts = [cell["function"], cell.get("activation"), "residual" if cell.get("residual") else None]
    return {**error, "case": {**cell, "layer": " + ".join(filter(None, parts))}}


def read_run(folder: Path) -> Run | None:
    """None where there is nothing recorded.

    Raises:
        ValueError: a file that is there is not what its name says.
    """
    found = {name: folder / name for name in FILES if (folder / name).is_file()}
    if not found:
        return None
    run = Run(folder.name, folder, {})
    for name, path in found.items():
        try:
            data = json.loads(path.read_text())
            run.environment |= {key: str(value) for key, value in data.get("environment", {}).items()}
            if name == "results.json":
                _fill(run, data)
            elif name == "models.json":
                run.models, run.failed = data.get("models", []), data.get("failed", {})
            elif name == "memory.json":
                run.memory = data.get("bytes", {})
            elif name == "accuracy.json":
                run.accuracy = [*run.accuracy, *map(_as_case, data.get("errors", []))]
                run.sweeps, run.mistakes = [*map(Found.of, data.get("sweeps", []))], data.get("mistakes", [])
            else:
                run.experiments = data.get("experiments", {})
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{path} is not a record of the benchmark ({type(error).__name__}: {error})") from None
    return run


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The folders, or the runs in them; in the order of their dates."""
    runs = []
    for folder in folders:
        if (run := read_run(folder)) is not None:
            runs.append(run)
        elif folder.is_dir():
            runs += [run for inner in sorted(folder.iterdir()) if inner.is_dir() and (run := read_run(inner))]
    runs.sort(key=lambda run: (run.environment.get("date", ""), run.name))
    short = [re.sub(r"^\d{4}-\d\d-\d\d-", "", run.name) for run in runs]
    for run, label in zip(runs, short, strict=True):
        run.label = label if short.count(label) == 1 else run.name
    return runs
