"""What a run has measured: as JSON, what of it can be trusted, and how it differs from that of an earlier run."""

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.accuracy import Accuracy
from bench.digits import Training
from bench.disturbance import is_multiple, scheduler_slice
from bench.measure import Timing

FORMAT = 2
DOUBTFUL_SHARE = 0.1  # of the timings; more, and the run says nothing
NOISY = 0.1  # by which torch may differ from itself; more, likewise
ERROR_RATE = 0.01  # of saying that something has changed between two runs when nothing has


@dataclass
class Results:
    environment: dict[str, str]
    options: dict
    accuracy: list[Accuracy] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    null: list[Timing] = field(default_factory=list)  # torch's layer against itself
    training: list[Training] = field(default_factory=list)
    format: int = FORMAT

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read_earlier(path: str, key: str = "timings") -> dict:
    """
    Raises:
        ValueError: not a file written by this form of the benchmark.
    """
    try:
        results = json.loads(Path(path).read_text())
        results["environment"], results[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results that could be compared with these ({error})") from None
    if results.get("format") != FORMAT:
        raise ValueError(f"{path} was written by an earlier form of the benchmark, in other regimes: measure again")
    return results


def sure(timings: Iterable[Timing]) -> list[Timing]:
    return [timing for timing in timings if not timing.doubts]


def doubt_multiples(timings: Iterable[Timing]) -> None:
    """Marks timings that are multiples of a scheduler's slice, if there are too many for chance."""
    timings = list(timings)

    def medians(timing):
        return [seconds for passed in timing.passes.values() for seconds in (passed.torch, passed.normops)]

    slice_seconds = scheduler_slice([seconds for timing in timings for seconds in medians(timing)])
    for timing in timings:
        if any(is_multiple(seconds, slice_seconds) for seconds in medians(timing)):
            timing.doubts.append(f"multiple of a scheduler's slice of {1e3 * slice_seconds:.2f} ms")


def noise(null: Iterable[Timing]) -> float:
    """How far torch is from itself: the root mean square of the logarithm of the ratio, which ought to be 0."""
    logarithms = [math.log(passed.speedup) for timing in sure(null) for passed in timing.passes.values()]
    return math.sqrt(statistics.fmean(value * value for value in logarithms)) if logarithms else math.nan


def objections(timings: list[Timing], null: list[Timing]) -> list[str]:
    """Reasons not to trust the run as a whole."""
    found = []
    for what, some in ("timings", timings), ("timings of torch against itself", null):
        doubtful = len(some) - len(sure(some))
        if doubtful > DOUBTFUL_SHARE * len(some):
            found.append(f"{doubtful} of {len(some)} {what} are in doubt")
    # Not a number where nothing of it is left, which the doubts say.
    if noise(null) > NOISY:
        found.append(f"torch differs from itself by {noise(null):.0%}")
    return found


@dataclass
class Change:
    """Of a speedup, or of the geometric mean of several, from an earlier run to this one."""

    of: str
    cases: int
    old: float
    new: float
    noise: float  # a change of the logarithm below this is none

    @property
    def is_one(self) -> bool:
        return abs(math.log(self.new / self.old)) > self.noise


@dataclass
class Changes:
    means: list[Change]
    cases: list[Change]
    differs: list[str]  # in the environment

    @property
    def verdict(self) -> str:
        count = sum(change.is_one for change in self.means + self.cases)
        of = f"{len(self.means)} means and {len(self.cases)} passes"
        if not self.cases:
            return "Nothing to compare: no case that is not in doubt is in both runs"
        return f"Changed: {count} of {of}" if count else f"No difference: no change of {of} exceeds the noise"


def _key(timing: Mapping) -> tuple:
    case, regime = timing["case"], timing["regime"]
    return (*(str(list(value)) if name == "shape" else value for name, value in case.items()), *regime.values())


def changes(old: Mapping, new: Mapping) -> Changes:
    """Of two runs of single layers, both as in JSON."""
    before = {_key(timing): timing for timing in sure_ones(old["timings"])}
    null_squares = sum(_null_square(run) for run in (old, new))
    rows = []
    for timing in sure_ones(new["timings"]):
        earlier = before.get(_key(timing), {})
        case, regime = timing["case"], "{caches} caches, {malloc} malloc".format(**timing["regime"])
        size = "x".join(map(str, case["shape"]))
        for name in ("forward", "backward") if earlier else ():
            text = f"{case['layer']} {size} {case['dtype']} {case['layout']} {case['device']} {name}, {regime}"
            rows.append((f"{case['layer']} {name}, {regime}", text, earlier[name], timing[name], null_squares))
    return judge(rows, old, new)


def sure_ones(timings: Iterable[Mapping]) -> list[Mapping]:
    """`sure`, of timings that come from JSON."""
    return [timing for timing in timings if not timing["doubts"]]


def judge(rows: Iterable[tuple[str, str, Mapping, Mapping, float]], old: Mapping, new: Mapping) -> Changes:
    """What has changed between two runs. Of each pass a row: the mean it is part of, its name, what was measured then
    and now (`Comparison`), and the squared noise of torch against itself, in both runs together.

    A change counts if it is larger than that and the errors within both runs explain; the level takes into account how
    many are looked at."""
    means = defaultdict(list)
    cases = []
    for group, text, earlier, now, null_squares in rows:
        noise = math.sqrt(earlier["error"] ** 2 + now["error"] ** 2 + null_squares)
        cases.append((text, 1, earlier["speedup"], now["speedup"], noise))
        means[group].append(cases[-1])
    mean_rows = []
    for text, members in means.items():
        speedups = (statistics.geometric_mean(row[index] for row in members) for index in (2, 3))
        mean_rows.append((text, len(members), *speedups, math.sqrt(sum(row[4] ** 2 for row in members)) / len(members)))

    count = len(cases) + len(mean_rows)
    level = statistics.NormalDist().inv_cdf(1 - ERROR_RATE / 2 / count) if count else math.inf

    def finished(rows):
        return [Change(*row[:4], level * row[4]) for row in rows]

    here, there = new["environment"], old["environment"]
    keys = ("cpu", "cpu kernels", "cpu threads", "torch", "against", "floor", "gradients")
    differs = [f"{key}: {there.get(key)} -> {here.get(key)}" for key in keys if here.get(key) != there.get(key)]
    return Changes(finished(mean_rows), finished(cases), differs)


def _null_square(run: Mapping) -> float:
    speedups = [
        timing[name]["speedup"] for timing in run["null"] if not timing["doubts"] for name in ("forward", "backward")
    ]
    return null_square(speedups)


def null_square(speedups: list[float]) -> float:
    """The mean square of the logarithms. Without a null run: what was usual in those there were."""
    return statistics.fmean(math.log(speedup) ** 2 for speedup in speedups) if speedups else 0.03**2
