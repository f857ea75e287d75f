"""Numbers that layers rarely meet: the errors of normops and of torch on them, and how large they may be.

A sweep changes one thing from one end to the other: the mean of the data, their size, how many elements a statistic
has, how many rows there are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from bench import exact, verdict
from normops import functional as F

ROW_FUNCTIONS = ["layer_norm", "rms_norm"]
COMPUTED = ["batch_norm", "instance_norm", "group_norm", *ROW_FUNCTIONS, "channel_layer_norm"]
FUNCTIONS = [*COMPUTED, "batch_norm_eval"]
LAYOUTS = ["contiguous", "channels_last", "transposed", "positions first", "sliced"]
COMMON_LAYOUTS = LAYOUTS[:2]
DEFAULT_EPS, LEAST_EPS = 1e-5, 1e-70  # float32 has no such number as the latter
ELEMENTS = 1 << 15


@dataclass(frozen=True)
class Point:
    sweep: str
    value: float  # what the sweep changes
    function: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = "contiguous"
    mean: float = 0.0  # in standard deviations
    size: float | None = None  # of the largest element; without it the standard deviation is one
    constant: float | None = None  # all elements
    eps: float = DEFAULT_EPS
    bias: bool = True  # which would hide an output that is small
    groups: int = 4  # of group_norm
    gradient: float = 0.0  # the mean of dy, whose standard deviation is one
    precise: bool = False  # compared with numbers of 50 digits

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        eps = "" if self.eps == DEFAULT_EPS else f", eps {self.eps:g}"
        return f"{self.function} {size} {self.dtype} {self.layout}, {SWEEPS[self.sweep].axis} {self.value:g}{eps}"


def _shape(function: str) -> tuple[int, ...]:
    return (64, 512) if function in ROW_FUNCTIONS else (4, 32, 16, 16)


def _layouts(function: str) -> list[str]:
    return COMMON_LAYOUTS[:1] if function in ROW_FUNCTIONS else COMMON_LAYOUTS


def means() -> Iterator[Point]:
    values = [0.0, *(10.0**power for power in range(7))]
    for function, dtype, mean in product(FUNCTIONS, ["float32", "bfloat16", "float16"], values):
        for layout in _layouts(function):
            if mean <= 1e4 or dtype != "float16":
                yield Point("mean", mean, function, _shape(function), dtype, layout, mean=mean)


def sizes() -> Iterator[Point]:
    values = [1e-30, 1e-25, 1e-20, 1e-15, 1e-10, 1e-5, 1, 1e5, 1e10, 1e15, 1e18, 1e20, 1e25, 1e30, 1e35, 3e38]
    for function, dtype, size, eps in product(COMPUTED, ["float32", "bfloat16"], values, [DEFAULT_EPS, LEAST_EPS]):
        for layout in _layouts(function):
            data = {"mean": 1.0, "size": size, "eps": eps, "bias": False}
            yield Point("size", size, function, _shape(function), dtype, layout, **data)


def lengths() -> Iterator[Point]:
    values = [2, 3, 8, 17, 64, 255, 1024, 4096, 65536, 1 << 20, 1 << 24]
    for length, function, dtype in product(values, COMPUTED, ["float32", "bfloat16"]):
        count = max(1, ELEMENTS // length)
        groups, width = min(4, count), 4 if length % 4 == 0 else 1  # of the latter, a group's channels
        shapes = {
            "batch_norm": (length, count),
            "instance_norm": (1, count, length),
            "group_norm": (count // groups, groups * width, length // width),
            "channel_layer_norm": (1, length, count),
        }
        shape = shapes.get(function, (count, length))
        yield Point("length", length, function, shape, dtype, mean=3.0, groups=groups)


def rows() -> Iterator[Point]:
    for power, function, dtype in product(range(3, 7), COMPUTED, ["bfloat16", "float16", "float32"]):
        count = 10**power
        shape = (count // 8, 16, 8) if function == "channel_layer_norm" else (count, 16)
        if function != "instance_norm" and (dtype == "bfloat16" or power < 6):
            yield Point("rows", count, function, shape, dtype, gradient=0.5)


def denormals() -> Iterator[Point]:
    values = {
        "float32": [1e-37, 1e-39, 1e-41, 1e-43],
        "bfloat16": [1e-37, 1e-38, 1e-39, 1e-40],
        "float16": [1e-4, 1e-5, 1e-6, 1e-7],
    }
    for function, (dtype, own), eps in product(COMPUTED, values.items(), [DEFAULT_EPS, LEAST_EPS]):
        for size, layout in product(own, _layouts(function)):
            data = {"mean": 1.0, "size": size, "eps": eps, "bias": False}
            yield Point("denormal", size, function, _shape(function), dtype, layout, **data)


def constants() -> Iterator[Point]:
    values = [0.0, 1e-40, 0.1, 1.0, 1000.1, 1e10, 3e38]
    for function, dtype, value in product(COMPUTED, ["float32", "bfloat16", "float16"], values):
        for layout in _layouts(function):
            if dtype != "float16" or 1e-7 < value < 6e4:
                yield Point("constant", value, function, _shape(function), dtype, layout, constant=value)


def layouts() -> Iterator[Point]:
    """In each the gradient is contiguous."""
    for function, dtype, (place, layout) in product(FUNCTIONS, ["float32", "bfloat16"], enumerate(LAYOUTS)):
        if function not in ROW_FUNCTIONS:
            yield Point("layout", place, function, (4, 32, 50, 1), dtype, layout, mean=1.0)


def precise() -> Iterator[Point]:
    if find_spec("mpmath") is None:
        return

    def shape(function):
        return (4, 24) if function in ROW_FUNCTIONS else (2, 4, 3, 3)

    for function, dtype, mean in product(FUNCTIONS, ["float64", "float32"], [0.0, 1.0, 1e3, 1e6]):
        yield Point("precise", mean, function, shape(function), dtype, mean=mean, precise=True)
    for function, size in product(COMPUTED, [1e-150, 1e-30, 1e30, 1e150]):
        data = {"size": size, "eps": 1e-300, "bias": False, "precise": True}
        yield Point("precise", size, function, shape(function), "float64", **data)


@dataclass(frozen=True)
class Sweep:
    points: Callable[[], Iterator[Point]]
    axis: str  # what its values are
    title: str


SWEEPS = {
    "mean": Sweep(means, "mean", "Means of the data, in standard deviations"),
    "size": Sweep(sizes, "largest element", "Sizes of the data, with eps of 1e-5 and of 1e-70"),
    "length": Sweep(lengths, "length", "Elements of a statistic"),
    "rows": Sweep(rows, "rows", "Rows of 16 elements"),
    "denormal": Sweep(denormals, "largest element", "Denormal data, with the same"),
    "constant": Sweep(constants, "constant", "Constant data"),
    "layout": Sweep(layouts, "layout", "Layouts: " + ", ".join(f"{i} {name}" for i, name in enumerate(LAYOUTS))),
    "precise": Sweep(precise, "mean or largest element", "Small tensors against numbers of 50 digits"),
}


def points(
    sweeps: Iterable[str], functions: Sequence[str], dtypes: Sequence[str], layouts: Sequence[str]
) -> list[Point]:
    """Those of the functions and dtypes, and in any layout but the common ones that are not among ``layouts``."""
    unwanted = set(COMMON_LAYOUTS) - set(layouts)
    return [
        point
        for sweep in sweeps
        for point in SWEEPS[sweep].points()
        if point.function in functions and point.dtype in dtypes and point.layout not in unwanted
    ]


@dataclass
class Found:
    """Errors relative to the size of what a result is the sum of."""

    point: Point
    normops: dict[str, float]
    torch: dict[str, float]
    floor: dict[str, float]  # see `allowed`

    def record(self) -> dict[str, Any]:
        """For JSON, without what is as usual."""
        usual = {field.name: field.default for field in fields(Point)}
        point = {name: value for name, value in asdict(self.point).items() if value != usual[name]}
        errors = {side: verdict.rounded(getattr(self, side)) for side in ("normops", "torch", "floor")}
        return {"point": point, **errors}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Found":
        point = Point(**{**record["point"], "shape": tuple(record["point"]["shape"])})
        return cls(point, *(dict(record[side]) for side in ("normops", "torch", "floor")))

    @property
    def unit(self) -> float:
        return torch.finfo(getattr(torch, self.point.dtype)).eps

    @property
    def place(self) -> str:
        """On the axis of the sweep."""
        value = self.point.value
        return f"{value:.0f}" if value == round(value) and value < 1e8 else f"{value:g}"

    def __str__(self) -> str:
        return str(self.point)


def _lay_out(values: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":  # (N, L, C, 1), seen as (N, C, L, 1)
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "positions first":
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":
        return values.repeat_interleave(2, 2)[:, :, ::2]
    return values.contiguous()


def _tensors(point: Point, parameters: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, point.dtype)
    if point.constant is not None:
        values = torch.full(point.shape, point.constant, dtype=torch.float64)
    else:
        values = torch.randn(point.shape, dtype=torch.float64 if point.dtype == "float64" else torch.float32)
        values = values.double() + point.mean if values.numel() <= 1 << 20 else values + point.mean
        if point.size is not None:
            values *= point.size / values.abs().max()
    dy = (torch.randn(point.shape) + point.gradient).to(dtype)
    tensors = {
        "input": _lay_out(values.to(dtype), point.layout),
        "weight": (torch.rand(parameters) + 0.5).to(dtype),
        "dy": dy if point.sweep == "layout" else _lay_out(dy, point.layout),
    }
    if point.bias and point.function != "rms_norm":
        tensors["bias"] = torch.randn(parameters).to(dtype)
    if point.function == "batch_norm_eval":
        tensors["running_mean"] = (torch.randn(parameters) / 10 + point.mean).to(dtype)
        tensors["running_var"] = (torch.rand(parameters) + 0.5).to(dtype)
    return tensors


def across_channels(norm: Callable[..., Tensor], x: Tensor, **arguments: Any) -> Tensor:
    """A norm of rows, of the channels at each position."""
    return norm(x.movedim(1, -1), normalized_shape=x.shape[1:2], **arguments).movedim(-1, 1)


def _call(library: Any, point: Point, x: Tensor, weight: Tensor, bias: Tensor | None, *statistics: Tensor) -> Tensor:
    """The layer of the library; of torch, what comes nearest to it."""
    name, eps = point.function, point.eps
    if name == "batch_norm":
        return library.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    if name == "batch_norm_eval":
        return library.batch_norm(x, *statistics, weight, bias, eps=eps)
    if name == "group_norm":
        return library.group_norm(x, point.groups, weight, bias, eps)
    if name == "instance_norm":
        return library.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if name == "rms_norm":
        return library.rms_norm(x, x.shape[-1:], weight, eps=eps)
    if name == "channel_layer_norm":
        if library is F:
            return F.channel_layer_norm(x, weight, bias, eps=eps)
        return across_channels(library.layer_norm, x, weight=weight, bias=bias, eps=eps)
    return library.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _results(library: Any, point: Point, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    leaves = [tensors[name].detach().requires_grad_() for name in ("input", "weight", "bias") if name in tensors]
    statistics = [tensors[name] for name in ("running_mean", "running_var") if name in tensors]
    x, weight, bias = [*leaves, None][:3]
    output = _call(library, point, x, weight, bias, *statistics)
    gradients = torch.autograd.grad(output, leaves, tensors["dy"])
    return {"output": output.detach(), **dict(zip(("dx", "dweight", "dbias"), gradients, strict=False))}


def measure(point: Point) -> Found:
    form = exact.form(point.function, point.shape, point.groups)
    tensors = _tensors(point, math.prod(form.parameters))
    arrays = {name: exact.numbers(tensor, point.precise) for name, tensor in tensors.items()}
    known = exact.normalize(point.function, form, arrays, point.eps)
    most = torch.finfo(getattr(torch, point.dtype)).max / 2

    def errors(library: Any) -> dict[str, float]:
        found = _results(library, point, tensors)
        return {
            name: exact.error(exact.numbers(found[name], point.precise), values, most) / known.sizes[name]
            for name, values in known.values.items()
        }

    return Found(point, errors(F), errors(TF), {name: allowed(point, name, size) for name, size in known.sizes.items()})


def allowed(point: Point, result: str, size: float) -> float:
    """`bench.verdict.floor`, and

    - in float64, whose statistics are no finer than the arithmetic, the rounding of the mean, in deviations;
    - the smallest number of the dtype; of bfloat16 the smallest normal one, as some processors have no others.
    """
    dtype = getattr(torch, point.dtype)
    limits = torch.finfo(dtype)
    of_mean = point.mean * limits.eps if dtype == torch.float64 else 0.0
    least = limits.smallest_normal * (1 if dtype == torch.bfloat16 else limits.eps)
    return max(verdict.floor(dtype, result) + of_mean, least / size)
