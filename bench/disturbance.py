"""Whether something else ran while times were taken: signs of it in the system, in work of known length, in the times.

A round of measurements that was disturbed is thrown away and taken again after a pause. If that does not end, what was
measured is marked as doubtful, with the reason.
"""

import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from bench.machine import processors

MIN_ROUNDS = 5
PATIENCE = 3  # times the planned time, for undisturbed rounds
PATIENCE_OF_ALL = 40.0  # seconds beyond the planned time, for all that one process measures
PAUSE = 0.1  # seconds between two looks at a busy machine
# What an idle machine stays well below, and a competitor for one core of many exceeds.
SLOW_PROBE = 1.35  # of the fastest probe
WAITED = 0.05  # of the time, all threads together
FOREIGN = 0.15  # cores
STOLEN = 0.02  # of the time of the cores


@dataclass
class Snapshot:
    """Of counters that grow, in seconds; those that this system does not have stay 0."""

    clock: float
    waited: float = 0.0  # threads of this process, for a core
    own: float = 0.0  # cores' time that this process used
    busy: float = 0.0  # cores' time that all processes used
    stolen: float = 0.0  # by other virtual machines

    def __sub__(self, other: "Snapshot") -> "Snapshot":
        return Snapshot(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))

    def __add__(self, other: "Snapshot") -> "Snapshot":
        return Snapshot(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class System:
    """The counters of Linux. Elsewhere there are none, and the probe and the times have to tell."""

    ticks = 100  # a second, in /proc/stat, whatever the kernel's own rate is

    def __init__(self):
        self.cpus = {f"cpu{cpu}" for cpu in processors()}

    def snapshot(self) -> Snapshot:
        busy, stolen = self._stat()
        return Snapshot(time.perf_counter(), self._waited(), time.process_time(), busy, stolen)

    def _stat(self) -> tuple[float, float]:
        busy = stolen = 0
        try:
            with open("/proc/stat") as file:
                for name, *fields in map(str.split, file):
                    if not name.startswith("cpu"):
                        break
                    if name in self.cpus:
                        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
                        busy += user + nice + system + irq + softirq
                        stolen += steal
        except (OSError, ValueError):
            return 0.0, 0.0
        return busy / self.ticks, stolen / self.ticks

    @staticmethod
    def _waited() -> float:
        nanoseconds = 0
        for path in Path("/proc/self/task").glob("*/schedstat"):
            try:
                nanoseconds += int(path.read_text().split()[1])
            except (OSError, ValueError, IndexError):  # a thread that has ended, or a kernel that does not count
                continue
        return nanoseconds / 1e9


def signs_in_counters(spent: Snapshot, cores: int, threads: int) -> list[str]:
    """What the counters say of a stretch of at least half a second, during which /proc/stat ticks often enough."""
    signs = []
    foreign = (spent.busy - spent.own) / spent.clock
    # Cores that are not needed here may be used by others.
    if foreign > max(cores - threads, 0) + FOREIGN:
        signs.append(f"other processes used {foreign:.1f} cores")
    if spent.stolen / spent.clock / cores > STOLEN:
        signs.append(f"other virtual machines took {spent.stolen / spent.clock / cores:.0%} of the time")
    return signs


class Watch:
    """Looks for signs of a disturbance between `begin` and `end`, which are a round apart, and over many rounds."""

    def __init__(self):
        self.patience, self.disturbed = PATIENCE_OF_ALL, False
        self.threads, self.cores = torch.get_num_threads(), len(processors())
        self._system = System()
        # Slow to compute, small enough for the second-level caches, large enough to occupy all threads.
        self._work = torch.full([32768 * self.threads], 2.5)
        self._result = torch.empty_like(self._work)
        self.fastest = min(self.probe() for _ in range(10))

    def probe(self, repetitions: int = 3) -> float:
        self._work.add_(0)  # wakes the threads and fetches the numbers
        start = time.perf_counter()
        for _ in range(repetitions):
            torch.lgamma(self._work, out=self._result)
        return (time.perf_counter() - start) / repetitions

    def begin(self) -> None:
        self._start = self._system.snapshot()

    def end(self) -> tuple[list[str], Snapshot]:
        """The signs, and what the round has taken."""
        spent = self._system.snapshot() - self._start
        signs = []
        if spent.waited > WAITED * spent.clock:
            signs.append("threads waited for a core")
        probe = self.probe()
        self.fastest = min(self.fastest, probe)
        if probe > SLOW_PROBE * self.fastest:
            signs.append("work of known length took longer")
        self.disturbed = bool(signs)
        return signs, spent

    def quiet(self) -> bool:
        """Takes some 30 ms, in which a competitor for a core cannot stay unnoticed."""
        self.begin()
        self.probe(90)
        return not self.end()[0]

    def signs(self, spent: Snapshot) -> list[str]:
        """Those of many rounds together."""
        return signs_in_counters(spent, self.cores, self.threads) if spent.clock else []


class Watcher(Protocol):
    patience: float  # seconds that may still be waited
    disturbed: bool  # the last round

    def quiet(self) -> bool: ...
    def begin(self) -> None: ...
    def end(self) -> tuple[list[str], Snapshot]: ...
    def signs(self, spent: Snapshot) -> list[str]: ...


@dataclass
class Rounds:
    times: dict[str, list[float]]  # of each call, a round each
    doubts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.times.values())))


def settle(
    watch: Watcher,
    limit: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Waits until nothing else runs, but `limit` seconds at most."""
    until = clock() + limit
    while clock() < until and not watch.quiet():
        sleep(PAUSE)


def collect(
    take_round: Callable[[int], dict[str, float]],
    watch: Watcher,
    seconds: float,
    rounds: int | None = None,
    min_rounds: int = MIN_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Rounds:
    """Takes `rounds` undisturbed rounds, or as many as fit in `seconds`, waiting for the machine where it has to.

    `take_round` is given how many were taken before and returns the seconds of each call.
    """
    quiet, disturbed, reasons = [], [], Counter()
    enough = rounds or min_rounds
    spent = Snapshot(0.0)

    def wait() -> None:
        settle(watch, min(PATIENCE * seconds, watch.patience), clock, sleep)

    gc.collect()  # now, rather than in between: no round leaves much behind
    start = clock()
    if watch.disturbed:
        wait()
    while True:
        watch.begin()
        times = take_round(len(quiet) + len(disturbed))
        signs, taken = watch.end()
        if signs:
            disturbed.append(times)
            reasons.update(signs)
        else:
            quiet.append(times)
            spent += taken
        elapsed = clock() - start
        if len(quiet) == rounds or (rounds is None and len(quiet) >= min_rounds and elapsed > seconds):
            doubts = watch.signs(spent)
            break
        if len(disturbed) >= enough and elapsed > seconds + min(PATIENCE * seconds, watch.patience):
            doubts = [sign for sign, _ in reasons.most_common()]
            break
        if signs:
            wait()
    if disturbed:
        watch.patience = max(0.0, watch.patience - max(0.0, elapsed - seconds))
    kept = quiet if len(quiet) >= enough else quiet + disturbed
    return Rounds({name: [times[name] for times in kept] for name in kept[0]}, doubts)


def scheduler_slice(medians: Sequence[float]) -> float | None:
    """The time of which far too many of the medians are multiples, if there is one.

    Threads that spin while another has lost its core wait until the scheduler gives it back. Calls then take one, two
    or three slices of a few milliseconds, and agree with each other perfectly.
    """
    shortest, longest, tolerance, most = 0.9e-3, 13e-3, 0.01, 8
    medians = [median for median in medians if shortest <= median]
    candidates = [median / k for median in medians for k in (1, 2, 3) if shortest <= median / k <= longest]
    best, hits = None, []
    for candidate in candidates:
        found = [m for m in medians if _is_multiple(m, candidate, tolerance, most)]
        if len(found) > len(hits):
            best, hits = candidate, found
    # Two or three calls of equal or simply related lengths are not rare.
    if best is None or len(hits) < 8 or len({round(hit / best) for hit in hits}) < 3:
        return None
    # A time of any length is within the tolerance of a multiple with this probability, or less.
    chance = 2 * tolerance
    others, more = len(medians) - 1, len(hits) - 1
    probability = sum(math.comb(others, n) * chance**n * (1 - chance) ** (others - n) for n in range(more, others + 1))
    if len(hits) < len(medians) / 4 or probability * len(candidates) > 1e-4:
        return None
    return statistics.median(hit / round(hit / best) for hit in hits)


def _is_multiple(seconds: float, of: float, tolerance: float = 0.01, most: int = 8) -> bool:
    k = round(seconds / of)
    return 1 <= k <= most and abs(seconds - k * of) < tolerance * of


def is_multiple(seconds: float, of: float | None) -> bool:
    return of is not None and _is_multiple(seconds, of)
