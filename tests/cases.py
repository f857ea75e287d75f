"""The tables of functions and modules that all tests run over, and the tensors to call them with."""

import dataclasses
import itertools
import math

import pytest
import torch

import normops.functional

SHAPE = (4, 6, 5, 7)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@dataclasses.dataclass(frozen=True)
class Case:
    """A function in one of its modes. Any input of shape (N, C, ...) will do for every one of them."""

    name: str
    op: str
    options: dict = dataclasses.field(default_factory=dict)
    parameter_names: tuple[str, ...] = ("weight", "bias")
    row_dims: int | None = None  # of the layers that work on rows: how many dimensions are a row
    groups: int | None = None  # of group_norm; as many of them as divide C, and 0 for C
    given_stats: bool = False  # the statistics are arguments

    @property
    def over_batch(self):
        """Whether the elements of one sample depend on those of others."""
        return self.op == "batch_norm" and not self.given_stats

    @property
    def over_channels(self):
        """Whether a statistic is one of a position, over its channels."""
        return self.op.startswith("channel_")

    def parameter_shape(self, shape):
        return tuple(shape[-self.row_dims :] if self.row_dims else shape[1:2])

    def enough(self, shape):
        """``shape``, with two positions where it would leave one value to normalise, which is an error."""
        counted = {"instance_norm": shape[2:], "batch_norm": shape[:1] + shape[2:], "group_norm": shape[:1] + shape[2:]}
        if self.given_stats or math.prod(counted.get(self.op, (2,))) != 1:
            return shape
        return (*shape[: max(2, len(shape) - 1)], 2)

    def sample(self, shape=SHAPE, dtype=torch.float32, parameter_dtype=None, device="cpu", names=None):
        """Random arguments for an input of ``shape``; ``names`` are the parameters to give, all of them by default."""
        like = {"device": device, "dtype": parameter_dtype or dtype}
        channels, parameter_shape = shape[1:2], self.parameter_shape(shape)
        fixed = dict(self.options)
        if self.row_dims:
            fixed["normalized_shape"] = parameter_shape
        if self.groups is not None:
            fixed["num_groups"] = math.gcd(self.groups, *channels)
        if self.given_stats:
            fixed |= {"running_mean": torch.randn(channels, **like), "running_var": torch.rand(channels, **like) + 0.5}
        elif self.op == "batch_norm":
            fixed |= {"running_mean": None, "running_var": None}
        input = (2 * torch.randn(shape, device=device) + 1).to(dtype).requires_grad_()
        names = self.parameter_names if names is None else names
        parameters = {name: torch.randn(parameter_shape, **like).requires_grad_() for name in names}
        return Sample(self, input, parameters, fixed)


@dataclasses.dataclass
class Sample:
    """The arguments of one call."""

    case: Case
    input: torch.Tensor
    parameters: dict[str, torch.Tensor]
    fixed: dict

    def run(self, functions=normops.functional, **more):
        """The call, answered by normops, by ``torch.nn.functional`` or by ``reference``."""
        return getattr(functions, self.case.op)(self.input, **self.parameters, **self.fixed, **more)

    def results(self, functions=normops.functional, grad=None, **more):
        """The output and, given the gradient of the output, the gradients of all that require one, by name."""
        output = self.run(functions, **more)
        if grad is None:
            return {"output": output.detach()}
        leaves = {"grad_input": self.input, **{f"grad_{name}": p for name, p in self.parameters.items()}}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        return {"output": output.detach()} | dict(
            zip(leaves, torch.autograd.grad(output, leaves.values(), grad), strict=True)
        )

    def with_input(self, input):
        return dataclasses.replace(self, input=input.detach().requires_grad_(self.input.requires_grad))

    def double(self):
        """The same call in float64, on the CPU."""

        def convert(value):
            if not isinstance(value, torch.Tensor):
                return value
            if not value.is_floating_point():
                return value.cpu()
            return value.detach().cpu().double().requires_grad_(value.requires_grad)

        parameters = {name: convert(value) for name, value in self.parameters.items()}
        fixed = {name: convert(value) for name, value in self.fixed.items()}
        if self.case.op == "rms_norm" and fixed.get("eps") is None:
            fixed["eps"] = torch.finfo(torch.promote_types(self.input.dtype, torch.float32)).eps
        return Sample(self.case, convert(self.input), parameters, fixed)


CASES = [
    Case("batch_norm_training", "batch_norm", {"training": True}),
    Case("batch_norm_eval", "batch_norm", {"training": False}, given_stats=True),
    Case("instance_norm", "instance_norm"),
    Case("instance_norm_given", "instance_norm", {"use_input_stats": False}, given_stats=True),
    Case("group_norm_1", "group_norm", groups=1),
    Case("group_norm_3", "group_norm", groups=3),
    Case("group_norm_C", "group_norm", groups=0),
    Case("layer_norm_1d", "layer_norm", row_dims=1),
    Case("layer_norm_2d", "layer_norm", row_dims=2),
    Case("rms_norm_1d", "rms_norm", parameter_names=("weight",), row_dims=1),
    Case("rms_norm_2d", "rms_norm", {"eps": 1e-5}, parameter_names=("weight",), row_dims=2),
]
# LayerNorm2d and its kin, which torch does not have.
OVER_CHANNELS = [
    Case("layer_norm", "channel_layer_norm"),
    Case("rms_norm", "channel_rms_norm", {"eps": 1e-5}, parameter_names=("weight",)),
]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


each_case = each(CASES)
each_channel_case = each([case for case in CASES if not case.row_dims])
each_row_case = each([case for case in CASES if case.row_dims])
each_independent_case = each([case for case in CASES if not case.over_batch])
# Some of the parameters, down to none of them.
each_with_absent_parameters = pytest.mark.parametrize(
    "case, names",
    [
        pytest.param(case, names, id=f"{case.name}-{'-'.join(names) or 'plain'}")
        for case in CASES
        for count in range(len(case.parameter_names))
        for names in itertools.combinations(case.parameter_names, count)
    ],
)
# Some of the input and the parameters, at least one of them.
each_with_leaves = pytest.mark.parametrize(
    "case, leaves",
    [
        pytest.param(case, leaves, id=f"{case.name}-{'-'.join(leaves)}")
        for case in CASES
        for count in range(1, 2 + len(case.parameter_names))
        for leaves in itertools.combinations(("input", *case.parameter_names), count)
    ],
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclasses.dataclass(frozen=True)
class ModuleCase:
    """A module class of torch.nn, and of normops, with arguments for its constructor and the shape of an input."""

    name: str
    args: tuple
    shape: tuple[int, ...]
    kwargs: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.kwargs.items())])

    def make(self, namespace, **kwargs):
        return getattr(namespace, self.name)(*self.args, **self.kwargs, **kwargs)


_SPATIAL = {1: (7,), 2: (5, 7), 3: (3, 4, 5)}
_BATCH_NORMS = [
    ModuleCase(f"BatchNorm{d}d", (6,), (4, 6, *_SPATIAL[d]), kwargs)
    for d in _SPATIAL
    for kwargs in ({}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 1e-3})
]
_INSTANCE_NORMS = [
    ModuleCase(f"InstanceNorm{d}d", (6,), (4, 6, *_SPATIAL[d]), kwargs)
    for d in _SPATIAL
    for kwargs in (
        {},
        {"affine": True},
        {"track_running_stats": True},
        {"affine": True, "track_running_stats": True, "momentum": 0.3},
        {"track_running_stats": True, "momentum": None},
    )
]
MODULES = [
    *_BATCH_NORMS,
    ModuleCase("BatchNorm1d", (6,), (9, 6)),
    ModuleCase("SyncBatchNorm", (6,), SHAPE),
    ModuleCase("SyncBatchNorm", (6,), (9, 6), {"affine": False, "momentum": None}),
    *_INSTANCE_NORMS,
    *(ModuleCase("GroupNorm", (groups, 6), SHAPE) for groups in (1, 3, 6)),
    ModuleCase("GroupNorm", (3, 6), SHAPE, {"affine": False}),
    ModuleCase("LayerNorm", (7,), SHAPE),
    ModuleCase("LayerNorm", ((5, 7),), SHAPE, {"bias": False}),
    ModuleCase("LayerNorm", (7,), SHAPE, {"elementwise_affine": False}),
    ModuleCase("RMSNorm", (7,), SHAPE),
    ModuleCase("RMSNorm", ((5, 7),), SHAPE, {"eps": 1e-3}),
    ModuleCase("RMSNorm", (7,), SHAPE, {"elementwise_affine": False}),
]
LAZY_MODULES = [
    ModuleCase(f"Lazy{kind}Norm{d}d", (), (4, 6, *_SPATIAL[d])) for kind in ("Batch", "Instance") for d in _SPATIAL
]

each_module = pytest.mark.parametrize("case", MODULES, ids=str)
each_lazy_module = pytest.mark.parametrize("case", LAZY_MODULES, ids=str)
