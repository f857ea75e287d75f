"""Times torch's layer, that of normops and a copy of the tensor in turns, so that all meet the same conditions."""

import copy
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer  # waits for the device

import normops
from bench import fused
from bench.cases import Case
from bench.disturbance import collect
from bench.regimes import Flush, Regime
from bench.worker import station

TURN_SECONDS = 0.005

# For differences from torch in at least float32: in the short dtypes torch's sums are too inexact to check by.
TOLERANCES = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 1e-3, "float64": 1e-9}


def copies_of(case: Case) -> tuple[float, float]:
    """What forward and backward move: reading x and writing y is one copy, x, dy and dx are one and a half."""
    return fused.copies(case.layer) if case.is_fused else (1.0, 1.5)


class _Between(torch.autograd.Function):
    """Calls what is in a list when a backward pass comes by. It goes to nodes in the order opposite to that in which
    they were made, so this is between those that were made after and before."""

    @staticmethod
    def forward(ctx, calls: list[Callable[[], None]], leaf: Tensor) -> Tensor:
        ctx.calls = calls
        return leaf.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        for call in ctx.calls:
            call()
        return None, grad


class Passes:
    """The forward and the backward pass of one layer on one input."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor):
        self.layer = layer
        self.x = x.detach().requires_grad_()
        self.inputs = [self.x, *layer.parameters()]
        self.output = layer(self.x)
        self._outputs = self.output if isinstance(self.output, tuple) else (self.output,)
        # In a network the gradient mostly comes in the layout of the output.
        self.dy = [torch.empty_like(output).copy_(dy) for output in self._outputs]
        self._between: list[Callable[[], None]] = []
        self._leaf = torch.zeros((), requires_grad=True)

    @functools.cached_property
    def _above(self) -> list[Tensor]:
        """As a network stands above: what multiplies keeps no gradient, and Python has not seen the one it hands on."""
        return [_Between.apply(self._between, self._leaf), *(output * 1.0 for output in self._outputs)]

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.output, self.inputs, self.dy, retain_graph=True)

    def backward_in_a_network(self, flush: Callable[[], None]) -> float:
        """The seconds from when the gradient has been made and handed over, and caches are emptied. On the CPU that of
        the input may take its place."""
        times: list[float] = []
        self._between[:] = [flush, lambda: times.append(timer())]
        gradients = [torch.ones_like(self._leaf), *self.dy]
        torch.autograd.grad(self._above, [*self.inputs, self._leaf], gradients, retain_graph=True)
        return timer() - times[0]

    def results(self) -> dict[str, Tensor]:
        names = ["output", "dx", *(f"d{name.rpartition('.')[2]}" for name, _ in self.layer.named_parameters())]
        return dict(zip(names, [self._outputs[0].detach(), *self.backward()], strict=True))


def largest_errors(results: dict[str, Tensor], references: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to its largest value."""

    def error(result, reference):
        return ((result.to(reference.dtype) - reference).abs().max() / reference.abs().max()).item()

    return {name: error(results[name], reference) for name, reference in references.items()}


def typical_errors(results: dict[str, Tensor], references: dict[str, Tensor]) -> dict[str, float]:
    """The root mean square of the errors, relative to that of the values. Before a corner of an activation, rounding
    decides which of two derivatives an element has: of millions a few differ, and the largest error is one of theirs.
    """

    def error(result, reference):
        return ((result.to(reference.dtype) - reference).norm() / reference.norm()).item()

    return {name: error(results[name], reference) for name, reference in references.items()}


def reference_results(layer: nn.Module, x: Tensor, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of torch's layer in `dtype`, or in that of `x` if it is wider."""
    dtype = torch.promote_types(x.dtype, dtype)
    return Passes(copy.deepcopy(layer).to(dtype), x.to(dtype), dy.to(dtype)).results()


@dataclass
class Comparison:
    """Medians of the same thing done by torch and by normops, in seconds, and the ratio of the first to the second."""

    torch: float
    normops: float
    speedup: float
    quartiles: tuple[float, float]  # of the speedups of the single rounds
    error: float  # the standard error of the logarithm of the speedup, as far as it shows within a run
    floor: float | None = None  # the time that memory alone would take

    @classmethod
    def of(
        cls, torch_times: Sequence[float], normops_times: Sequence[float], floor: float | None = None
    ) -> "Comparison":
        theirs, ours = statistics.median(torch_times), statistics.median(normops_times)
        ratios = np.divide(torch_times, normops_times)
        low, high = np.percentile(ratios, [25, 75]).tolist()
        # Of the median of normally distributed values, whose quartiles are 1.349 standard deviations apart.
        error = 1.2533 * math.log(high / low) / 1.349 / math.sqrt(len(ratios))
        return cls(theirs, ours, theirs / ours, (low, high), error, floor)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, relative."""
        low, high = self.quartiles
        return (high - low) / 2 / self.speedup

    @property
    def torch_floors(self) -> float:
        return self.torch / self.floor

    @property
    def normops_floors(self) -> float:
        return self.normops / self.floor


@dataclass
class Timing:
    case: Case
    regime: Regime
    rounds: int
    forward: Comparison
    backward: Comparison
    differences: dict[str, float]  # of the results from those of torch
    doubts: list[str] = field(default_factory=list)  # signs that the machine was not left alone

    @property
    def agrees(self) -> bool:
        allowed = TOLERANCES[self.case.dtype] * (3 if self.case.is_fused else 1)
        return all(difference <= allowed for difference in self.differences.values())

    @property
    def passes(self) -> dict[str, Comparison]:
        return {"forward": self.forward, "backward": self.backward}


@dataclass(frozen=True)
class How:
    """How a case is timed; see the options of the command line."""

    against: str = "eager"
    floor: str = "clone"
    gradients: str = "handed"
    seconds: float = 0.4
    rounds: int | None = None


def time_case(case: Case, regimes: Sequence[Regime], how: How, null: bool = False) -> list[Timing]:
    """In regimes of the same malloc, which is that of the process. `null`: torch's layer takes both parts."""
    layer = case.make_layer()
    x, dy = case.make_data()
    other = copy.deepcopy(layer)
    if not null:
        other = other.fuse() if case.is_fused else normops.convert(other)
    ours = Passes(other, x, dy)
    differ = typical_errors if case.is_fused else largest_errors
    differences = differ(ours.results(), reference_results(layer, x, dy, torch.float32))
    if how.against == "parts" and not null:
        normops.convert(layer)
    if how.against == "compile" and not null:
        torch.compiler.reset()  # the layers share their code, and compiled forms of one code object are limited
        torch._functorch.config.donated_buffer = False  # or the backward pass could run but once
        layer = torch.compile(layer, dynamic=False)
    theirs = Passes(layer, x, dy)

    there = torch.empty_like(x)
    calls = {
        "torch forward": theirs.forward,
        "normops forward": ours.forward,
        "floor": x.clone if how.floor == "clone" else lambda: there.copy_(x),
        "torch backward": theirs.backward,
        "normops backward": ours.backward,
    }
    cold = {name: flushed(call) for name, call in calls.items()}
    if how.gradients == "handed":
        cold |= {"torch backward": theirs.backward_in_a_network, "normops backward": ours.backward_in_a_network}
    timings = []
    for regime in regimes:
        turn = cold_turns(cold, station().flush(case.device)) if regime.caches == "cold" else warm_turns(calls)
        turn(0)
        rounds = collect(turn, station().watch, how.seconds, how.rounds)
        one_copy = statistics.median(rounds.times["floor"])
        forward, backward = (
            Comparison.of(rounds.times[f"torch {name}"], rounds.times[f"normops {name}"], copies * one_copy)
            for name, copies in zip(("forward", "backward"), copies_of(case), strict=True)
        )
        timings.append(Timing(case, regime, len(rounds), forward, backward, differences, rounds.doubts))
    return timings


def _order(names: Sequence[str], turn: int) -> Sequence[str]:
    """One way and back, so that none always comes after the same other."""
    return names if turn % 2 == 0 else names[::-1]


def warm_turns(calls: dict[str, Callable]) -> Callable[[int], dict[str, float]]:
    def repeated(call: Callable, repetitions: int) -> float:
        call()  # does not count: it leaves the caches as a call finds them in a loop
        start = timer()
        for _ in repeat(None, repetitions):
            call()
        return (timer() - start) / repetitions

    repetitions = {name: max(1, round(TURN_SECONDS / repeated(call, 3))) for name, call in calls.items()}

    def turn(number: int) -> dict[str, float]:
        return {name: repeated(calls[name], repetitions[name]) for name in _order(list(calls), number)}

    return turn


def flushed(call: Callable) -> Callable[[Flush], float]:
    def seconds(flush: Flush) -> float:
        flush()
        start = timer()
        call()
        return timer() - start

    return seconds


def cold_turns(calls: dict[str, Callable[[Flush], float]], flush: Flush) -> Callable[[int], dict[str, float]]:
    """Of calls that empty the caches when they are ready, and tell how long they took from then on."""

    def turn(number: int) -> dict[str, float]:
        return {name: calls[name](flush) for name in _order(list(calls), number)}

    return turn
