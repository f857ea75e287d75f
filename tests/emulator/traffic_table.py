"""What the CUDA kernels move, counted while they run: the table in CONTRIBUTING.md, and tests/cuda/traffic.txt.

``python -m emulator.traffic_table`` compares them with the kernels as they are, ``--update`` writes them anew. Of the
emulator's variants it takes "counting" (NORMOPS_EMULATOR_VARIANT).
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable

import torch

import normops  # noqa: F401  (registers the operators)
from emulator import backend
from emulator.build import ROOT

OPS = torch.ops.normops
CONTRIBUTING, RECORD = ROOT / "CONTRIBUTING.md", ROOT / "tests/cuda/traffic.txt"
BEGIN, END = "<!-- moved: written by tests/emulator/traffic_table.py -->", "<!-- end of moved -->"
HEAD = "| kernels | when | reads | writes | floor | besides |\n|---|---|---|---|---|---|\n"
ALL = [True, True, True, False]


def like(x, value=1.0):
    return torch.full_like(x, value, memory_format=torch.preserve_format)


def row_pass(shape, backward=False, dtype=torch.float32):
    """(what runs before, what is counted): each takes x, and the second returns the tensors that it is counted for."""

    def arguments(x):
        parameter = torch.ones(x.shape[-1], dtype=x.dtype)
        return parameter, parameter.clone()

    def forward(x):
        weight, bias = arguments(x)
        y, mean, rstd = OPS._row_norm(x, 1, weight, bias, 1e-5, True)
        return [x, y], (mean, rstd)

    def run_backward(x, statistics):
        dy = like(x)
        return lambda: [x, dy, OPS._row_norm_backward(dy, x, 1, *statistics, arguments(x)[0], 1e-5, True, ALL)[0]]

    return x_of(shape, dtype), forward, run_backward if backward else None


def sum_pass(shape):
    def forward(x):
        residual = like(x)
        y, total, mean, rstd = OPS._add_row_norm(x, residual, 1, torch.ones(shape[-1]), None, 1e-5, False, 0.0)
        return [x, residual, y, total], (mean, rstd)

    return x_of(shape), forward, None


def channel_pass(shape, groups=None, over_batch=True, layout=torch.contiguous_format, backward=None, **more):
    """``backward``: its mask. ``more``: given statistics, activation, with a residual."""
    channels, groups = shape[1], groups or shape[1]
    given = more.pop("given", False)
    residual = more.pop("residual", False)

    def forward(x):
        weight, bias, statistics = torch.ones(channels), torch.ones(channels), [torch.ones(groups).double()] * 2
        added = [like(x)] if residual else []
        y, mean, var = OPS._channel_norm(
            x, *(statistics if given else [None, None]), weight, bias, groups, over_batch, 1e-5, *added, **more
        )
        return [x, y, *added], (mean, var)

    def run_backward(x, statistics):
        dy, added = like(x), [like(x)] if residual else []

        def run():
            grads = OPS._channel_norm_backward(
                dy, x, *statistics, torch.ones(channels), groups, over_batch, 1e-5, not given, backward,
                bias=torch.ones(channels), residual=added[0] if added else None, **more,
            )  # fmt: skip
            return [x, dy, *added, *(grad for grad in (grads[0], grads[3]) if grad is not None)]

        return run

    return x_of(shape, layout=layout), forward, run_backward if backward else None


def x_of(shape, dtype=torch.float32, layout=torch.contiguous_format):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)


@dataclasses.dataclass
class Row:
    """A line of the table; ``steps`` make what is counted for it."""

    kernels: str
    when: str
    floor: int  # each tensor once
    besides: str
    steps: Callable
    architecture: str = "sm_90"


LAST, PLANES, ODD_PLANES = {"layout": torch.channels_last}, (4, 8, 16, 16), (8, 8, 7, 7)
SMALL = (
    "BatchNorm of 8 samples and more, of planes of up to 256 positions that are no whole vectors: as many channels as "
    "are whole vectors together, of up to 8,192 of them"
)
PARTS = "48 bytes per chunk: up to 16 vectors of 256 threads, along lines or (48 bytes for each column) across them"
ROWS = [
    Row(
        "row_forward",
        "rows up to 65,536 (float 32,768, double 16,384; single elements 12,288, double 8,192), with clusters 8 times "
        "as many (single elements not)",
        2,
        "16 bytes a row",
        lambda: row_pass((4, 2048)),
    ),
    Row(
        "moments, merge, long_row_forward",
        "longer rows",
        2,
        "16 bytes per chunk",
        lambda: row_pass((2, 40960)),
        "sm_80",
    ),
    Row("row_forward", "the sum of two inputs, and its norm", 4, "16 bytes a row", lambda: sum_pass((4, 2048))),
    Row(
        "row_backward, column_sums",
        "rows up to 8,192 (double 4,096; single elements 4,096, double 2,048), with clusters 8 times as many; without, "
        "up to 16,384 (float 12,288, double 6,144), as shared memory allows",
        3,
        "16 bytes per column and block, of which there are at most 1,024 or one for 256 turns",
        lambda: row_pass((8, 2048), backward=True),
    ),
    Row(
        "long_row_sums, grad_merge, long_row_backward",
        "longer rows",
        3,
        "32 bytes per row and 32 vectors of it; where rows are cut into chunks, of 16 to 128, `column_sums`, and 16 "
        "per column and chunk",
        lambda: row_pass((2, 16384), backward=True),
        "sm_80",
    ),
    Row(
        "slab_forward",
        "contiguous, up to 65,536 elements per statistic (float 32,768, double 16,384, single elements 8,192)",
        2,
        "16 bytes a slab",
        lambda: channel_pass(PLANES),
    ),
    Row(
        "slab_backward",
        "contiguous, up to 32,768 (float 16,384, double 8,192, single elements 4,096), with clusters 8 times as "
        "many, with each plane of a group in one block",
        3,
        "32 bytes per channel and sample",
        lambda: channel_pass(PLANES, backward=ALL),
    ),
    Row("wide_slab_forward", SMALL, 2, "16 bytes a channel", lambda: channel_pass(ODD_PLANES)),
    Row(
        "wide_slab_backward",
        "its backward, of up to 4,096 vectors",
        3,
        "32 bytes a channel",
        lambda: channel_pass(ODD_PLANES, backward=ALL),
    ),
    Row("moments, merge, apply", "other statistics of the input", 2, PARTS, lambda: channel_pass(PLANES, **LAST)),
    Row(
        "grad_sums, grad_merge, grad_apply",
        "their backward",
        3,
        "32 bytes per chunk",
        lambda: channel_pass(PLANES, backward=ALL, **LAST),
    ),
    Row("merge, apply", "evaluation", 2, "", lambda: channel_pass(PLANES, given=True)),
    Row(
        "grad_merge, apply",
        "its backward, dx alone",
        2,
        "",
        lambda: channel_pass(PLANES, given=True, backward=[True, False, False, False]),
    ),
    Row(
        "grad_sums, grad_merge, apply",
        "with dweight and dbias",
        3,
        "32 bytes per chunk",
        lambda: channel_pass(PLANES, given=True, backward=ALL),
    ),
    Row(
        "slab_forward",
        "with an activation and a residual",
        3,
        "",
        lambda: channel_pass(PLANES, activation="silu", residual=True),
    ),
    Row(
        "slab_backward",
        "its backward",
        5,
        "",
        lambda: channel_pass(PLANES, activation="silu", residual=True, backward=[True] * 4),
    ),
    Row(
        "merge, grad_sums, grad_merge, grad_apply",
        "with an activation, of other statistics",
        3,
        "32 bytes per chunk",
        lambda: channel_pass(PLANES, activation="silu", backward=ALL, **LAST),
    ),
]


def short(kernel):
    return kernel.split("::")[-1].removesuffix("_kernel")


def count(row):
    """What each kernel read and wrote of the tensors, [(reads, writes) of each tensor], in their sizes; launches."""
    library = backend.library()
    library.device(row.architecture)
    try:
        with backend.entered():
            x, forward, backward = row.steps()
            library.clear()
            tensors, statistics = forward(x)
            if backward:
                run = backward(x, statistics)
                library.clear()
                tensors = run()
        size = x.numel() * x.element_size()
        moved = {}
        for tensor in tensors:
            for kernel, (read, written) in library.moved(tensor).items():
                moved.setdefault(short(kernel), []).append((read / size, written / size))
        return moved, library.report()
    finally:
        library.device()


def times(value):
    return "e" if value == 1 else f"{value:g}e"


def counted(rows=ROWS):
    """(lines of the table, the record: kernel -> figures)."""
    lines, record = [], {}
    for row in rows:
        moved, launched = count(row)
        ran = {short(launches.kernel) for launches in launched}
        names = row.kernels.split(", ")
        if ran != set(names):
            sys.exit(f"{row.when}: expected {row.kernels}, {', '.join(sorted(ran))} ran")
        reads, writes = (sum(pair[way] for of in moved.values() for pair in of) for way in (0, 1))
        kernels = ", ".join(f"`{name}`" for name in names)
        lines.append(
            f"| {kernels} | {row.when} | {times(reads)} | {times(writes)} | {times(row.floor)} | {row.besides} |\n"
        )
        before = [0.0] * len(next(iter(moved.values())))
        for name in names:
            of = moved.get(name, [])
            again = sum(read for (read, _), earlier in zip(of, before, strict=True) if earlier)
            before = [earlier + read for (read, _), earlier in zip(of, before, strict=True)]
            record.setdefault(name, (*(sum(pair[way] for pair in of) for way in (0, 1)), again))
    return lines, record


def record_text(record):
    """Of each kernel, as the first line of the table has it."""
    lines = [("kernel", "reads", "writes", "again")]
    lines += [(name, *(f"{figure:g}" for figure in figures)) for name, figures in sorted(record.items())]
    return "".join(" ".join(f"{cell:<18}" for cell in line).rstrip() + "\n" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the table and the record anew")
    arguments = parser.parse_args()
    lines, record = counted()
    table, text = f"{BEGIN}\n\n{HEAD}{''.join(lines)}\n{END}", record_text(record)
    document = CONTRIBUTING.read_text()
    updated = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, document, flags=re.DOTALL)
    if arguments.update:
        CONTRIBUTING.write_text(updated)
        RECORD.write_text(text)
    elif document != updated or RECORD.read_text() != text:
        sys.exit(f"what kernels move is not what is recorded, or --update was forgotten:\n{table}\n{text}")


if __name__ == "__main__":
    main()
