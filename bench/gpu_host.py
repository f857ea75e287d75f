"""``python -m bench.gpu_host``: what a call takes of the host's time before a card has its work.

Needs no card: the launchers are linked with a CUDA runtime that starts nothing (tests/cuda/stub.py), and tensors lie in
the host's memory. What is missing is the launch itself, about two microseconds a kernel, and the device's allocator.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import normops
from normops import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/cuda"))
import stub  # noqa: E402

OPS = torch.ops.normops
CALLS, ROUNDS = 200, 15
MASK = [True, True, True, False]


def seconds(call):
    """The median over rounds of the mean of some calls."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS)
    return statistics.median(times)


def rows():
    """(name, forward, backward): as a layer in inference, as the operator that autograd calls."""
    x, dy = torch.randn(2, 64, 1024).bfloat16()
    weight, bias = torch.ones(2, 1024).bfloat16()
    _, mean, rstd = OPS._row_norm(x, 1, weight, bias, 1e-5, True)
    yield (
        "layer_norm",
        lambda: F.layer_norm(x, (1024,), weight, bias),
        lambda: OPS._row_norm_backward(dy, x, 1, mean, rstd, weight, 1e-5, True, MASK),
    )
    yield (
        "add_rms_norm",
        lambda: F.add_rms_norm(x, dy, (1024,), weight),
        lambda: OPS._row_norm_backward(dy, x, 1, mean, rstd, weight, 1e-5, False, MASK, grad_sum=dy),
    )


def channels():
    for name, shape, memory_format in (
        ("batch_norm slab", (8, 64, 8, 8), torch.contiguous_format),
        ("batch_norm", (8, 64, 64, 64), torch.channels_last),
    ):
        x, dy = (torch.randn(shape).bfloat16().contiguous(memory_format=memory_format) for _ in range(2))
        layer = normops.convert(nn.BatchNorm2d(64))
        weight, bias = layer.weight.detach(), layer.bias.detach()
        _, mean, var = OPS._channel_norm(x, None, None, weight, bias, 64, True, 1e-5)
        stats = layer.running_mean, layer.running_var
        yield (
            name,
            lambda x=x, stats=stats, weight=weight, bias=bias: F.batch_norm(x, *stats, weight, bias, training=True),
            lambda x=x, dy=dy, mean=mean, var=var, weight=weight: OPS._channel_norm_backward(
                dy, x, mean, var, weight, 64, True, 1e-5, True, MASK
            ),
        )


def through_autograd():
    """Forward, and backward with the engine of autograd."""
    x = torch.randn(64, 1024).bfloat16().requires_grad_()
    layer = normops.convert(nn.LayerNorm(1024)).bfloat16()
    dy, leaves = torch.randn_like(x), [x, *layer.parameters()]
    y = layer(x)
    yield (
        "layer_norm, autograd",
        lambda: layer(x),
        lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_host", description=__doc__.splitlines()[0])
    parser.parse_args()
    if not stub.possible():
        parser.error("needs the kernels as nvcc compiles them (make cuda) and CUDA's headers")
    print("| call | pass | launches | host µs, without the launches themselves |\n|---|---|---|---|")
    with stub.entered(), torch.no_grad():
        cases = [*rows(), *channels()]
        with torch.enable_grad():
            cases += through_autograd()
        for name, forward, backward in cases:
            for what, call in (("forward", forward), ("backward", backward)):
                with torch.set_grad_enabled("autograd" in name):
                    launches = sum(count for _, count, _ in stub.launched(call))
                    print(f"| {name} | {what} | {launches} | {1e6 * seconds(call):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
