"""Times torch's layer, that of normops and a copy of the tensor in turns, so that all meet the same conditions."""

import copy
import ctypes
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import normops
from bench.cases import Case

TURN_SECONDS = 0.005
FORWARD_COPIES = 1.0  # reads x, writes y
BACKWARD_COPIES = 1.5  # reads x and dy, writes dx

# For differences from torch in at least float32: in the short dtypes torch's sums are too inexact to check by.
TOLERANCES = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 1e-3, "float64": 1e-9}


def recycle_memory() -> bool:
    """Makes malloc keep freed memory for the next call instead of returning it; False where malloc is not glibc's.

    By default glibc maps every large block anew and unmaps it when it is freed, so each layer would be charged with
    the kernel clearing the pages of its output. M_MMAP_THRESHOLD alone would not do: glibc caps it at 32 MiB.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(m_mmap_max, 0) == 1 and mallopt(m_trim_threshold, -1) == 1


class Passes:
    """The forward and the backward pass of one layer on one input."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor):
        self.layer = layer
        self.x = x.detach().requires_grad_()
        self.inputs = [self.x, *layer.parameters()]
        self.output = layer(self.x)
        # In a network the gradient mostly comes in the layout of the output.
        self.dy = torch.empty_like(self.output).copy_(dy)

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.output, self.inputs, self.dy, retain_graph=True)

    def results(self) -> dict[str, Tensor]:
        names = ["output", "dx", "dweight", "dbias"][: 1 + len(self.inputs)]
        return dict(zip(names, [self.output.detach(), *self.backward()], strict=True))


def largest_errors(results: dict[str, Tensor], references: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to its largest value."""

    def error(result, reference):
        return ((result.to(reference.dtype) - reference).abs().max() / reference.abs().max()).item()

    return {name: error(results[name], reference) for name, reference in references.items()}


def reference_results(layer: nn.Module, x: Tensor, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of torch's layer in `dtype`, or in that of `x` if it is wider."""
    dtype = torch.promote_types(x.dtype, dtype)
    return Passes(copy.deepcopy(layer).to(dtype), x.to(dtype), dy.to(dtype)).results()


@dataclass
class Comparison:
    """One pass: medians in seconds, and the spread of the speedups of the single rounds."""

    torch: float
    normops: float
    floor: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    torch_floors: float
    normops_floors: float

    @classmethod
    def of(cls, torch_times: list[float], normops_times: list[float], copy_times: list[float], copies: float):
        theirs, ours, one_copy = (statistics.median(times) for times in (torch_times, normops_times, copy_times))
        floor = copies * one_copy
        quartiles = np.percentile(np.divide(torch_times, normops_times), [25, 75]).tolist()
        return cls(theirs, ours, floor, theirs / ours, tuple(quartiles), theirs / floor, ours / floor)


@dataclass
class Timing:
    case: Case
    rounds: int
    forward: Comparison
    backward: Comparison
    differences: dict[str, float]  # of the results from those of torch

    @property
    def agrees(self) -> bool:
        return all(difference <= TOLERANCES[self.case.dtype] for difference in self.differences.values())


def time_case(case: Case, against: str, floor: str, seconds: float, rounds: int | None) -> Timing:
    layer = case.make_layer()
    x, dy = case.make_data()
    ours = Passes(normops.convert(copy.deepcopy(layer)), x, dy)
    differences = largest_errors(ours.results(), reference_results(layer, x, dy, torch.float32))
    if against == "compile":
        torch.compiler.reset()  # the layers share their code, and compiled forms of one code object are limited
        torch._functorch.config.donated_buffer = False  # or the backward pass could run but once
        layer = torch.compile(layer, dynamic=False)
    theirs = Passes(layer, x, dy)

    warm = torch.empty_like(x)
    calls = {
        "torch forward": theirs.forward,
        "normops forward": ours.forward,
        "floor": x.clone if floor == "clone" else lambda: warm.copy_(x),
        "torch backward": theirs.backward,
        "normops backward": ours.backward,
    }
    times = _in_turns(calls, seconds, rounds)
    forward = Comparison.of(times["torch forward"], times["normops forward"], times["floor"], FORWARD_COPIES)
    backward = Comparison.of(times["torch backward"], times["normops backward"], times["floor"], BACKWARD_COPIES)
    return Timing(case, len(times["floor"]), forward, backward, differences)


def _in_turns(calls: dict[str, Callable], seconds: float, rounds: int | None) -> dict[str, list[float]]:
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for name, call in calls.items()
    }
    times = defaultdict(list)
    start = time.perf_counter()
    for done in itertools.count(1):
        for name, timer in timers.items():
            # It first looks for the block size, which also leaves the caches as this call finds them in a loop.
            times[name].append(timer.blocked_autorange(min_run_time=TURN_SECONDS).median)
        if done == rounds or (rounds is None and done >= 3 and time.perf_counter() - start > seconds):
            return times
