"""What a call takes besides what it returns, and what many calls leave behind."""

import ctypes
import gc
import math
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, OVER_CHANNELS
from layouts import each_memory_format

import normops.functional as F

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.real_device,
]

# 32 MiB, which malloc maps anew each time: none of it is left from the call before.
SHAPE = (8, 64, 128, 128)
MIB = 2**20


def status(name):
    """Of this process, in bytes: VmRSS is what is in memory, VmHWM the most there was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def peak(function):
    """What ``function`` returns, and the most memory it had taken at any time."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # what other tests have freed would be taken without notice
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the most starts from here
    except OSError:
        pytest.skip("the kernel keeps its peak of memory")
    before = status("VmRSS")
    result = function()
    return result, status("VmHWM") - before


def bytes_of(results):
    return sum(result.numel() * result.element_size() for result in results)


# One of each way through the engines on every commit.
FEW = ("batch_norm_training", "group_norm_3", "layer_norm_1d", "rms_norm_2d")
MARKS = {case.name: () if case.name in FEW else pytest.mark.nightly for case in CASES}


@each_memory_format
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=MARKS[case.name]) for case in CASES])
def test_peak(case, memory_format, threads):
    """Forward: the output, and two statistics in float64 for each that there is. Backward: the gradients. Besides that
    a scratch: of rows 64 pairs of sums as long as a row, and otherwise less than a sixteenth of the input. Rows that do
    not lie one behind the other are copied, and RMSNorm brings its output into the input's order again."""
    threads(1)
    case.sample((2, 6, 4, 4)).results(grad=torch.ones(2, 6, 4, 4))  # what is loaded or taken once
    sample = case.sample(SHAPE)
    sample = sample.with_input(sample.input.detach().contiguous(memory_format=memory_format))
    grad = torch.ones_like(sample.input)
    size = bytes_of([grad])
    row = math.prod(case.parameter_shape(SHAPE)) if case.row_dims else 0
    statistics = 16 * (grad.numel() // row if row else SHAPE[0] * SHAPE[1])
    scratch = statistics + size // 16 + MIB + 64 * 2 * 4 * row
    scattered = case.row_dims is not None and memory_format is torch.channels_last
    output, taken = peak(sample.run)
    copies = scattered * (2 if case.op == "rms_norm" else 1)
    assert size <= taken <= size * (1 + copies) + scratch, f"{taken / MIB:.1f} MiB for {size / MIB:.1f}"
    gradients, taken = peak(lambda: torch.autograd.grad(output, [sample.input, *sample.parameters.values()], grad))
    copies += scattered  # of dy as well
    assert size <= taken <= bytes_of(gradients) + size * copies + scratch, f"backward: {taken / MIB:.1f} MiB"


def test_half_precision_makes_no_float_copy():
    """Of inputs in 16 bits, with parameters in float32."""
    x = torch.zeros(16, 64, 128, 128, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(64, requires_grad=True)
    F.group_norm(x, 8, weight)
    y, taken = peak(lambda: F.group_norm(x, 8, weight))
    assert taken <= bytes_of([y]) * 17 / 16 + MIB
    _, taken = peak(lambda: torch.autograd.grad(y, (x, weight), y))
    assert taken <= bytes_of([y]) * 17 / 16 + MIB


def grown(calls):
    """By how much the process has, after this many forwards and backwards of each kind."""
    shape = (2, 6, 3, 2)
    grad, residual, mask = torch.ones(shape), torch.ones(shape), torch.ones(2, 3, 2, dtype=torch.bool)
    mask[0, 2] = False
    kinds = [(case.sample(shape), {}) for case in CASES + OVER_CHANNELS]
    kinds += [(sample, {"activation": "gelu", "residual": residual}) for sample, _ in kinds]
    kinds += [(case.sample(shape), {"mask": mask}) for case in CASES if case.over_batch or case.groups]
    kinds += [(case.sample(shape), {"memory_efficient": True}) for case in CASES if case.name in FEW]

    def run(count):
        for _ in range(count):
            for sample, more in kinds:
                sample.results(grad=grad, **more)

    run(100)  # caches of all sorts
    gc.collect()
    before = status("VmRSS")
    run(calls // len(kinds))
    gc.collect()
    return status("VmRSS") - before


def test_nothing_is_left_behind():
    """A call that lost its smallest block, of 16 bytes and malloc's 16, would have grown by more."""
    assert grown(10_000) < 10_000 * 32


@pytest.mark.nightly
def test_nothing_is_left_behind_by_a_million():
    """Of one of the kinds alone, 30,000 calls would lose more."""
    assert grown(1_000_000) < MIB // 2
