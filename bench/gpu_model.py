"""``python -m bench.gpu_model``: what the CUDA kernels would take on cards that are not here. A prediction, no result.

The launchers are run for the shapes of ``bench.gpu`` on an emulator that runs one block of each launch and counts what
it does, so launches, blocks, threads, sectors of memory and loads of a thread are those of a card. Registers,
instructions and loads in flight are those of the compiled kernels (tests/cuda/resources.txt). A kernel takes as long as
the slowest of

- its sectors at the bandwidth of a copy (what a stage before has left in half of the second-level cache, and its
  statistics, at that of the cache; what a block asks for again the first-level cache has, and so it has the parameters
  of rows, which all blocks read, where half of it holds what a block reads),
- the loads of its busiest thread, as many at a time as are under way at once, at the latency of memory, for all blocks
  that have to wait for the place of another,
- its instructions at a rate that such code reaches,

where two that are near each other add up to somewhat more (a mean of fourth powers), and a start and an end.
"""

import argparse
import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import normops
from bench.cases import Case
from bench.gpu import TRAFFIC, cases

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests/cuda")]
import resources  # noqa: E402
from emulator import backend  # noqa: E402

SECTOR = 32
POWER = 4  # of the mean of what limits a kernel
INSTRUCTIONS_PER_CLOCK = 2.6  # of a multiprocessor, which could issue 4
SECONDS_PER_LAUNCH = 1.5e-6  # to start and to drain, in a graph


@dataclass(frozen=True)
class Card:
    name: str
    emulated: str  # its architecture, as the emulator has it
    compiled: str  # the architecture whose machine code stands for it
    multiprocessors: int
    clock: float
    bandwidth: float  # of a copy, reading and writing
    latency: float
    cache: float  # bytes of the second level
    cache_bandwidth: float
    first_cache: float  # bytes of the first level, of a multiprocessor


CARDS = [
    Card("A100", "sm_80", "80", 108, 1.41e9, 1.75e12, 0.65e-6, 40e6, 4.0e12, 192e3),
    Card("H100", "sm_90", "90", 132, 1.75e9, 3.0e12, 0.75e-6, 50e6, 5.5e12, 256e3),
    Card("H200", "sm_90", "90", 132, 1.9e9, 4.3e12, 0.75e-6, 50e6, 5.5e12, 256e3),
    Card("B200", "sm_100", "100", 148, 1.85e9, 7.0e12, 0.8e-6, 126e6, 10.0e12, 256e3),
    Card("RTX 4090", "sm_89", "80", 128, 2.5e9, 0.92e12, 0.6e-6, 72e6, 4.0e12, 128e3),
]

# How often a kernel reads and writes the elements of the input, and how often of these it reads what the stage before
# has just read.
PASSES = resources.passes()

# What reads the tensors before the kernels that read them again.
STAGES_BEFORE = ("moments_kernel", "grad_sums_kernel", "long_row_sums_kernel")

# How often torch's kernels read and write them, forward and backward, as far as is known, which has been neither read
# up nor measured: statistics, then the output; the sums for the parameters, the sums for dx, then dx, of which
# LayerNorm's last two are one kernel that reads twice. A cache may answer what is read again.
TORCH = {
    "layer_norm": (3, 7),
    "rms_norm": (3, 7),
    "batch_norm": (3, 5),
    "instance_norm": (3, 5),
    "group_norm": (3, 5),
    "batch_norm_eval": (2, 5),
}


@dataclass
class Prediction:
    kernel: str
    seconds: float
    limit: str


def predict_kernel(card, launches, table, tensor_bytes, element_size, warm):
    """``warm``: a stage before has read the same tensors."""
    name = resources.short(launches.name)
    short, arguments = resources.parts(name)
    figures = table[name, card.compiled]
    reads, _, again = PASSES.get(short, (0, 0, 0))
    blocks, threads = launches.blocks / launches.launches, launches.threads / launches.blocks
    resident = max(1, min(65536 // (-(-figures["registers"] // 8) * 8 * threads), 2048 // threads, 32))
    resident = min(resident * card.multiprocessors, blocks)
    read, written = (
        SECTOR * sectors / launches.launches for sectors in (launches.distinct_read, launches.sectors_written)
    )
    near = max(0.0, read - reads * tensor_bytes)  # what many blocks read, or the kernel before has written
    if short.startswith("row") and read / blocks <= card.first_cache / 2:
        near *= min(1.0, card.multiprocessors / blocks)
    beyond = 0.0 if reads else max(0.0, near - card.cache / 2)
    cached = min(1.0, card.cache / 2 / tensor_bytes / again) if warm and again else 0.0
    again = again * cached * tensor_bytes
    near += again - beyond
    far = reads * tensor_bytes - again + written + beyond
    if reads:
        vectors = tensor_bytes / element_size / resources.vector_size(short, arguments)
        listed = resources.vectors_of_thread(short, arguments)
        instructions = (figures["loop"] or figures["path"]) / listed * vectors / 32
    else:
        instructions = figures["path"] * blocks * threads / 32
    at_work = min(card.multiprocessors, blocks)
    limits = {
        "bandwidth": far / card.bandwidth + near / card.cache_bandwidth,
        "latency": blocks / resident * max(1.0, launches.chain / max(1, figures["flight"])) * card.latency,
        "instructions": instructions / (INSTRUCTIONS_PER_CLOCK * card.clock * at_work),
    }
    seconds = sum(limit**POWER for limit in limits.values()) ** (1 / POWER)
    limit = max(limits, key=limits.get) if seconds > SECONDS_PER_LAUNCH else "launch"
    return Prediction(short, launches.launches * (seconds + SECONDS_PER_LAUNCH), limit)


COUNTED = {}  # by what was launched


@functools.cache
def launches_of(case, architecture):
    """The launches of (forward, backward), each in the order of the kernels' names; the bytes of the input. Counted
    once for all architectures on which the same kernels have as many blocks and threads."""
    library = backend.library()
    library.device(architecture)
    library.seed(0)  # the first block
    layer = normops.convert(case.make_layer())
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    x = torch.empty(case.shape, dtype=getattr(torch, case.dtype)).contiguous(memory_format=memory_format)
    x.requires_grad_()

    def run():
        library.clear()
        y = layer(x)
        passes = [library.report()]
        library.clear()
        y.backward(torch.empty_like(y))
        return [*passes, library.report()]

    with backend.entered():
        with library.dry():
            launched = [(of.name, of.launches, of.blocks, of.threads) for ran in run() for of in ran]
        if (key := (case, *launched)) not in COUNTED:
            with library.sampled():
                COUNTED[key] = run()
    library.device()
    library.seed()
    return COUNTED[key], x.numel() * x.element_size()


def predict(case, card, table):
    """(pass, sizes of the input that have to move, those that do, seconds of the floor, launches, bytes of the input,
    kernels) of both passes. The floor moves every byte once, in one launch."""
    passes, size = launches_of(case, card.emulated)
    element = torch.finfo(getattr(torch, case.dtype)).bits // 8
    for name, traffic, ran in zip(("forward", "backward"), TRAFFIC, passes, strict=True):
        warm = any(launches.kernel.split("::")[-1] in STAGES_BEFORE for launches in ran)
        kernels = [predict_kernel(card, launches, table, size, element, warm) for launches in ran]
        floor = traffic * size / card.bandwidth + SECONDS_PER_LAUNCH
        moved = sum(sum(PASSES.get(kernel.kernel, (0, 0, 0))[:2]) for kernel in kernels)
        yield name, traffic, moved, floor, sum(launches.launches for launches in ran), size, kernels


# (input of more bytes than these, and at most these, what is asked of the predicted time over the floor)
ASKED = [(32e6, float("inf"), 1.5), (4e6, 32e6, 2.5)]


def summary(rows):
    """Card by card, how many passes take no longer than is asked; how many of the others read a tensor twice; the
    worst."""
    lines = ["| card | input | passes | as asked | others, that read twice | worst |\n|---|---|---|---|---|---|"]
    for card in dict.fromkeys(row["card"] for row in rows):
        for least, most, asked in ASKED:
            of_size = [row for row in rows if row["card"] == card and least < row["input"] <= most]
            if not of_size:
                continue
            others = [row for row in of_size if row["over_floor"] > asked]
            twice = sum(row["moved"] > row["bytes"] for row in others)
            met = f"{len(of_size) - len(others)} ({asked} times the floor) | {len(others)}, {twice}"
            worst = max(of_size, key=lambda row: row["over_floor"])
            size = f"{least / 1e6:.0f} to {most / 1e6:.0f} MB" if most < float("inf") else f"above {least / 1e6:.0f} MB"
            name = f"{worst['case']} {worst['pass']}: {worst['over_floor']:.2f} ({worst['limit']})"
            lines.append(f"| {card} | {size} | {len(of_size)} | {met} | {name} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", description=__doc__.splitlines()[0])
    parser.add_argument("--cards", nargs="+", choices=[card.name for card in CARDS], default=[c.name for c in CARDS])
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument("--json", type=Path, help="write all of it to this file")
    arguments = parser.parse_args()
    os.environ["NORMOPS_EMULATOR_VARIANT"] = "counting"
    table, rows = resources.read(), []
    print("**A prediction, made without a card.**\n")
    print("Moved: how often tensors of the input's size go over memory: at the least, here, in torch (assumed).\n")
    print("| card | case | pass | MB | launches | moved | predicted µs | over floor | limits |")
    print("|---|---|---|---|---|---|---|---|---|")
    for card in CARDS:
        if card.name not in arguments.cards:
            continue
        for planned in cases():
            case = Case(planned.layer, planned.shape, planned.dtype, planned.layout, "cpu")
            if arguments.match not in case.name:
                continue
            for what, traffic, moved, floor, launches, size, kernels in predict(case, card, table):
                seconds = sum(kernel.seconds for kernel in kernels)
                slowest = max(kernels, key=lambda kernel: kernel.seconds)
                name = case.name.removesuffix(" cpu")
                rows.append(
                    {
                        "card": card.name,
                        "case": name,
                        "pass": what,
                        "input": size,
                        "bytes": traffic * size,
                        "moved": moved * size,
                        "moved_by_torch": TORCH[case.layer][what == "backward"] * size,
                        "launches": launches,
                        "predicted_us": 1e6 * seconds,
                        "over_floor": seconds / floor,
                        "limit": f"{slowest.kernel}: {slowest.limit}",
                    }
                )
                row = rows[-1]
                sizes = f"{traffic}, {moved:g}, {TORCH[case.layer][what == 'backward']}"
                figures = f"{launches} | {sizes} | {row['predicted_us']:.1f} | {row['over_floor']:.2f}"
                print(f"| {card.name} | {name} | {what} | {size / 1e6:.1f} | {figures} | {row['limit']} |", flush=True)
    print("\n" + summary(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"prediction": True, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
