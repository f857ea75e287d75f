"""``python -m bench accuracy``: errors against float64 of every function with whatever may follow it in the same pass,
beside those of torch's separate operators; of numbers that layers rarely meet (`bench.sweep`); and what torch has wrong
(`bench.mistakes`)."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from rich.table import Table
from torch import Tensor

from bench import sweep, verdict
from bench.cases import DTYPES, LAYOUTS
from bench.charts import subtitle, sweeps_figure
from bench.command import WRONG, finish, make_console
from bench.machine import environment, results_folder
from bench.mistakes import MISTAKES, PREAMBLE
from bench.tables import environment_table, make_table, write_markdown
from normops import _activations, compilation
from normops import functional as F

SLOPE = 0.2
LISTED = 20  # of what is worse than torch
SHAPE = (8, 32, 14, 14)
CHANNELS = {"weight": (SHAPE[1],), "bias": (SHAPE[1],)}
ROWS = {"weight": SHAPE[-1:], "bias": SHAPE[-1:]}


@dataclass(frozen=True)
class Function:
    name: str
    parameters: dict[str, tuple[int, ...]]
    fixed: dict[str, Any]

    @property
    def sums(self) -> bool:
        """Whether it adds first, and returns the sum as well."""
        return self.name.startswith("add_")


def _rows(name: str, *parameters: str) -> Function:
    return Function(name, {key: ROWS[key] for key in parameters}, {"normalized_shape": SHAPE[-1:]})


FUNCTIONS = {
    "batch_norm": Function("batch_norm", CHANNELS, {"running_mean": None, "running_var": None, "training": True}),
    "batch_norm_eval": Function("batch_norm", CHANNELS, {"running_mean": SHAPE[1], "running_var": SHAPE[1]}),
    "instance_norm": Function("instance_norm", CHANNELS, {}),
    "group_norm": Function("group_norm", CHANNELS, {"num_groups": 4}),
    "layer_norm": _rows("layer_norm", "weight", "bias"),
    "rms_norm": _rows("rms_norm", "weight"),
    "channel_layer_norm": Function("channel_layer_norm", CHANNELS, {}),
    "channel_rms_norm": Function("channel_rms_norm", {"weight": CHANNELS["weight"]}, {}),
    "add_layer_norm": _rows("add_layer_norm", "weight", "bias"),
    "add_rms_norm": _rows("add_rms_norm", "weight"),
}
LISTED = 20
RESULTS = ["output", "dx", "dresidual", "dparameters"]


@dataclass(frozen=True)
class Cell:
    function: str
    activation: str | None
    residual: bool
    dtype: str
    layout: str
    mean: float = 0.0  # of the data, whose standard deviation is one
    scale: float = 1.0  # of the data


def cells(
    functions: Sequence[str],
    activations: Sequence[str | None],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    means: Sequence[float],
    scales: Sequence[float],
) -> Iterator[Cell]:
    for name, *rest in product(functions, activations, (False, True), dtypes, layouts, means, scales):
        cell = Cell(name, *rest)
        if not FUNCTIONS[name].sums or (cell.activation is None and cell.residual):
            yield cell


@dataclass
class Errors:
    """Relative to the largest value of each result."""

    cell: Cell
    normops: dict[str, float]
    torch: dict[str, float]

    @property
    def floor(self) -> dict[str, float]:
        """Of float64 nothing is asked: the reference is no better."""
        dtype = getattr(torch, self.cell.dtype)
        floors = {name: verdict.floor(dtype, name) for name in self.normops}
        return dict.fromkeys(floors, math.inf) if dtype == torch.float64 else floors

    def record(self) -> dict[str, Any]:
        sides = {side: verdict.rounded(getattr(self, side)) for side in ("normops", "torch")}
        return {"cell": asdict(self.cell), **sides}

    def __str__(self) -> str:
        return str(self.cell)


def separate(name: str, input: Tensor, *, activation=None, negative_slope=SLOPE, residual=None, **arguments) -> Any:
    """Torch's operators one after the other, each rounding to the dtype of the input."""
    if name.startswith("add_"):
        total = input + residual
        return getattr(TF, name.removeprefix("add_"))(total, **arguments), total
    if name.startswith("channel_"):
        y = sweep.across_channels(getattr(TF, name.removeprefix("channel_")), input, **arguments)
    else:
        y = getattr(TF, name)(input, **arguments)
    return _activations.apply(y if residual is None else y + residual, activation, negative_slope)


def _ours(name: str, input: Tensor, **arguments: Any) -> Any:
    return getattr(F, name)(input, **arguments)


def measure(cell: Cell) -> Errors:
    function = FUNCTIONS[cell.function]
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    memory_format = torch.contiguous_format if cell.layout == "contiguous" else torch.channels_last

    def tensor(values: Tensor) -> Tensor:
        return values.to(dtype, memory_format=memory_format)

    tensors = {"input": tensor((torch.randn(SHAPE) + cell.mean) * cell.scale)}
    if cell.residual:
        tensors["residual"] = tensor(torch.randn(SHAPE) * (cell.scale if function.sums else 1))
    tensors |= {key: (torch.rand(shape) + 0.5).to(dtype) for key, shape in function.parameters.items()}
    # A statistic that is given is described by its size.
    fixed = {
        key: torch.rand(value).to(dtype) + 0.5 if key.startswith("running_") and value else value
        for key, value in function.fixed.items()
    }
    if cell.activation is not None:
        fixed["activation"] = cell.activation
    if cell.activation == "leaky_relu":
        fixed["negative_slope"] = SLOPE
    if function.name.endswith("rms_norm"):
        fixed["eps"] = 1e-6
    grads = [tensor(torch.randn(SHAPE)) for _ in range(2 if function.sums else 1)]

    def results(compute: Callable[..., Any], kind: torch.dtype) -> dict[str, list[Tensor]]:
        def convert(value):
            return value.to(kind) if isinstance(value, torch.Tensor) else value

        leaves = {key: convert(value.detach()).requires_grad_() for key, value in tensors.items()}
        output = compute(function.name, **leaves, **{key: convert(value) for key, value in fixed.items()})
        outputs = output if function.sums else (output,)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), [convert(grad) for grad in grads])
        by_name = dict(zip(leaves, gradients, strict=True))
        return {
            "output": [output.detach() for output in outputs],
            "dx": [by_name["input"]],
            "dresidual": [by_name["residual"]] if cell.residual else [],
            "dparameters": [by_name[key] for key in function.parameters],
        }

    exact = results(compose, torch.float64)

    def errors(compute: Callable[..., Any]) -> dict[str, float]:
        return {
            name: max(
                ((value.double() - reference).abs().max() / reference.abs().max()).item()
                for value, reference in zip(values, exact[name], strict=True)
            )
            for name, values in results(compute, dtype).items()
            if values
        }

    return Errors(cell, errors(_ours), errors(separate))


def compose(name: str, input: Tensor, **arguments: Any) -> Any:
    """The function in torch's operators, in the arithmetic of its input."""
    order = {
        "batch_norm": ("running_mean", "running_var", "weight", "bias", "training"),
        "instance_norm": ("running_mean", "running_var", "weight", "bias", "use_input_stats"),
        "group_norm": ("num_groups", "weight", "bias", "eps"),
        "channel_layer_norm": ("weight", "bias", "eps"),
        "channel_rms_norm": ("weight", "bias", "eps"),
    }.get(name, ("residual",) * name.startswith("add_") + ("normalized_shape", "weight", "bias", "eps"))
    if name.endswith("rms_norm"):
        order = tuple(key for key in order if key != "bias")
    defaults = {"training": False, "use_input_stats": True, "eps": 1e-5}
    positional = [arguments.pop(key, defaults.get(key)) for key in order]
    return compilation.decomposed(name, input, *positional, **arguments)


def largest(errors: Iterable[Errors], who: str) -> dict[str, float]:
    """Of every result."""
    found: dict[str, float] = {}
    for error in errors:
        for name, value in getattr(error, who).items():
            found[name] = max(found.get(name, 0.0), value)
    return found


def table(errors: Sequence[Errors], by: str, dtype: str) -> Table:
    """The largest errors of one dtype, in units of its machine epsilon, normops' and torch's."""
    unit = torch.finfo(getattr(torch, dtype)).eps
    title = f"{dtype}, by {by}: largest errors in units of {unit:.3g}, normops' and torch's"
    result = make_table(title, by, *(column for name in RESULTS for column in (name, "torch")))
    groups: dict[str, list[Errors]] = {}
    for error in errors:
        if error.cell.dtype == dtype:
            groups.setdefault(str(getattr(error.cell, by)), []).append(error)
    groups["largest"] = [error for group in groups.values() for error in group]
    for name, group in groups.items():
        ours, theirs = largest(group, "normops"), largest(group, "torch")
        row = [f"{who[key] / unit:.2f}" if key in who else "" for key in RESULTS for who in (ours, theirs)]
        result.add_row(name, *row)
    return result


def sweep_table(found: Sequence[sweep.Found], name: str) -> Table:
    """The largest errors by what the sweep changes, in units of the machine epsilon of each dtype."""
    here = [one for one in found if one.point.sweep == name]
    dtypes = [dtype for dtype in DTYPES if any(one.point.dtype == dtype for one in here)]
    how = sweep.SWEEPS[name]
    columns = [f"{dtype}, {who}" for dtype in dtypes for who in ("normops", "torch")]
    result = make_table(f"{how.title}: largest errors in units of eps", how.axis, *columns)
    for place in dict.fromkeys(one.place for one in sorted(here, key=lambda one: one.point.value)):
        row = [place]
        for dtype in dtypes:
            group = [one for one in here if (one.place, one.point.dtype) == (place, dtype)]
            for who in ("normops", "torch"):
                errors = (error / one.unit for one in group for error in getattr(one, who).values())
                row.append(f"{max(errors):.3g}" if group else "")
        result.add_row(*row)
    return result


def mistakes_table(mistakes: Sequence[Mapping[str, Any]]) -> Table:
    caption = "Printed by the lines below, where F is torch.nn.functional or normops.functional"
    result = make_table("What torch has wrong", "what", "torch", "normops", caption=caption)
    for one in mistakes:
        result.add_row(one["name"], f"{one['torch']:.2g}", f"{one['normops']:.2g}")
    return result


def _lines(mistakes: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"{one['name']}:\n\n```python\n{one['lines']}```\n" for one in mistakes]
    return "\n".join(["\n## The lines\n", f"```python\n{PREAMBLE}```\n", *parts])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench accuracy",
        description="Errors of every function with every activation, with and without a residual, in every dtype and "
        "layout, against torch in float64, beside the errors of torch's separate operators; then of data far from "
        "zero, huge, tiny, denormal and constant, of long rows and many rows. Prints the largest, what torch has "
        "wrong, and whether normops is anywhere worse than twice torch, in which case it ends with status 1. Writes "
        "all of it (accuracy.json, accuracy.md, accuracy.png).",
    )
    activations = ["none", *_activations.FUNCTIONS]
    for name, choices in {
        "functions": list(dict.fromkeys([*FUNCTIONS, *sweep.FUNCTIONS])),
        "activations": activations,
        "dtypes": DTYPES,
        "layouts": LAYOUTS,
    }.items():
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=choices, metavar=name.upper(), help="default: all"
        )
    parser.add_argument("--means", nargs="+", type=float, default=[0.0], help="of the data, in standard deviations")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], help="of the data")
    names = list(sweep.SWEEPS)
    parser.add_argument(
        "--sweeps",
        nargs="*",
        choices=names,
        default=names,
        metavar="SWEEP",
        help=f"of {', '.join(names)} (default: all)",
    )
    parser.add_argument(
        "--mistakes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="what torch has wrong, by name, with the lines that show it (default: yes)",
    )
    parser.add_argument("--output", type=Path, default=Path("bench/results/accuracy"), help="folder for accuracy.json")
    return parser


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    console, start = make_console(), time.perf_counter()
    chosen = [None if name == "none" else name for name in arguments.activations]
    what = [name for name in arguments.functions if name in FUNCTIONS], chosen, arguments.dtypes, arguments.layouts
    errors = [measure(cell) for cell in cells(*what, arguments.means, arguments.scales)]
    points = sweep.points(arguments.sweeps, arguments.functions, arguments.dtypes, arguments.layouts)
    found = [sweep.measure(point) for point in points]
    tables = [table(errors, by, dtype) for dtype, by in product(arguments.dtypes, ("function", "activation"))]
    swept = list(dict.fromkeys(point.sweep for point in points))
    tables += [sweep_table(found, name) for name in swept]
    mistakes = [mistake.record() for mistake in MISTAKES] if arguments.mistakes else []
    if mistakes:
        tables.append(mistakes_table(mistakes))
    for each in tables:
        console.print(each, "")
    folder, instead = results_folder(arguments.output)
    if instead:
        console.print(instead)
    data = {
        "environment": environment(),
        "errors": [error.record() for error in errors],
        "sweeps": [one.record() for one in found],
        "mistakes": mistakes,
    }
    (folder / "accuracy.json").write_text(json.dumps(data, separators=(",", ":")))
    charts = []
    if found:
        charts = ["accuracy.png"]
        sweeps_figure(found, subtitle(environment())).savefig(folder / charts[0], dpi=120, facecolor="white")
    wrong = verdict.worse([*errors, *found])
    said = [f"{len(errors)} cells, {len(found)} points. The reference is float64, whose own errors are not known."]
    if "precise" in arguments.sweeps and "precise" not in swept:
        said.append("Nothing was compared with numbers of 50 digits: mpmath is not installed")
    said += [f"Worse than twice torch: {text}" for text in wrong[:LISTED]]
    if len(wrong) > LISTED:
        said.append(f"Worse than twice torch: {len(wrong) - LISTED} more")
    if not wrong:
        said.append("normops is nowhere worse than twice torch, nor than rounding explains where torch's error is less")
    write_markdown(folder / "accuracy.md", "Errors", said, [environment_table(environment()), *tables], charts)
    if mistakes:
        console.print(_lines(mistakes), markup=False)
        with (folder / "accuracy.md").open("a") as file:
            file.write(_lines(mistakes))
    finish(console, folder, start, said, [], doubtful=False)
    return WRONG if wrong else 0
