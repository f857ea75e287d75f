"""``python tests/big.py [NAME ...]``: tensors and lengths beyond what 32 bits count, one after the other.

Each case runs in a process of its own, needs up to 13 GiB and takes minutes; one that the memory which is free now does
not suffice for is left out, and said to be. Inputs repeat a short pattern, so that the results are known without a
reference of the same size. Prints a table.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import normops.functional as F

ROOT = Path(__file__).parent.parent
BEYOND = 2**31 + 2**21  # elements: 4 GiB in bfloat16
GIB = 2**30


def _pattern(shape, dtype=torch.bfloat16):
    """-1, 1, -1, 1, ...: mean 0 and variance 1 over anything even."""
    x = torch.empty(shape, dtype=dtype)
    x.view(-1, 2).copy_(torch.tensor([-1.0, 1.0], dtype=dtype))
    return x


def _check(call, x, parameters=()):
    """The norm of the pattern is the pattern; the gradient, for one of the output that is it too, nearly zero."""
    x.requires_grad_()
    y = call(x)
    flat, given = y.detach().flatten(), x.detach().flatten()
    step = 2**24
    worst = 0.0
    for begin in range(0, flat.numel(), step):
        worst = max(worst, (flat[begin : begin + step] - given[begin : begin + step]).abs().max().item())
    assert worst <= 2**-8, worst  # a rounding of bfloat16, and eps
    gradients = torch.autograd.grad(y, (x, *parameters), y.detach())
    flat = gradients[0].flatten()
    worst = max(flat[begin : begin + step].abs().max().item() for begin in range(0, flat.numel(), step))
    # dy - xhat * mean(dy * xhat) is zero but for eps and the rounding of y.
    assert worst <= 2**-7, worst
    return gradients[1:]


def rows():
    _check(lambda x: F.layer_norm(x, (4096,)), _pattern((BEYOND // 4096, 4096)))


def one_row():
    _check(lambda x: F.layer_norm(x, (BEYOND,)), _pattern((1, BEYOND)))


def one_row_rms():
    _check(lambda x: F.rms_norm(x, (BEYOND,)), _pattern((1, BEYOND)))


def planes():
    weight = torch.ones(64, requires_grad=True)
    x = _pattern((BEYOND // (64 * 1024), 64, 1024))
    (dweight,) = _check(lambda x: F.batch_norm(x, None, None, weight, training=True), x, (weight,))
    assert abs(dweight[63].item() / (BEYOND / 64) - 1) < 0.01


def one_group():
    _check(lambda x: F.group_norm(x, 1), _pattern((1, 64, BEYOND // 64)))


def channels_last():
    x = _pattern((BEYOND // (64 * 1024), 32, 32, 64)).permute(0, 3, 1, 2)
    # In this layout the pattern runs along the channels; over the batch each is constant, and a group is not.
    x.requires_grad_()
    y = F.group_norm(x, 8)
    assert (y[-1].detach() - x[-1].detach()).abs().max() <= 2**-8
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    assert gradient[-1].abs().max() <= 2**-7


def many_channels():
    for shape in ((8, 100_000, 16), (8, 100_000)):
        x = torch.randn(shape, requires_grad=True)
        y = F.batch_norm(x, None, None, training=True)
        exact = torch.nn.functional.batch_norm(x.detach().double(), None, None, training=True)
        torch.testing.assert_close(y.detach().double(), exact, rtol=1e-4, atol=1e-5)
        y.sum().backward()
        assert x.grad.abs().max() < 1e-4


def nothing():
    for shape in ((0, 6, 5), (4, 6, 0)):
        x = torch.empty(shape, requires_grad=True)
        F.group_norm(x, 3).sum().backward()
        F.layer_norm(x, (shape[-1],)).sum().backward() if shape[-1] else None
        assert x.grad.shape == shape


def one_position():
    x = torch.randn(1_000_000, 32, 1, requires_grad=True)
    y = F.batch_norm(x, None, None, training=True)
    exact = torch.nn.functional.batch_norm(x.detach().double(), None, None, training=True)
    torch.testing.assert_close(y.detach().double(), exact, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()


SMALL = (nothing, one_position, many_channels)
LARGE = (rows, one_row, one_row_rms, planes, one_group, channels_last)
CASES = {case.__name__: case for case in SMALL + LARGE}
NEED = {case.__name__: 2 if case in SMALL else 13 for case in CASES.values()}  # GiB


def _available():
    """GiB that can be taken without swapping."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 / GIB


def main(names):
    if len(names) == 2 and names[0] == "--only":
        begin = time.perf_counter()
        CASES[names[1]]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        print(f"| `{names[1]}` | {time.perf_counter() - begin:.0f} s | {peak:.1f} GiB |", flush=True)
        return 0
    left_out, failed = [], []
    for name in names or CASES:
        if _available() < NEED[name]:
            left_out.append(name)
        elif subprocess.run([sys.executable, __file__, "--only", name]).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}; too large for this machine now: {', '.join(left_out) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
