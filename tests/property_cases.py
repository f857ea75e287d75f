"""What hypothesis draws calls from, and how far their results may be from the reference."""

import dataclasses
import math
import os

import reference
import torch
from cases import CASES, DTYPES, OVER_CHANNELS, Sample
from comparison import largest, roundoff
from fusion_cases import ACTIVATIONS, extras
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# In the suite the examples are the same in every run; `make fuzz` draws new ones (tests/fuzz.py).
FUZZING = bool(os.environ.get("NORMOPS_FUZZ"))


def bounded(examples):
    """The settings of a test: how many examples the suite runs; fuzzing, several times as many."""
    return settings(
        max_examples=5 * examples if FUZZING else examples,
        derandomize=not FUZZING,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


SIZES = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 61, 64, 67, 127, 257])
MOST = 4000  # elements


@st.composite
def shapes(draw, least=0, most=6):
    shape, room = [], MOST
    for _ in range(draw(st.integers(least, most))):
        size = draw(SIZES.filter(lambda size, room=room: size <= room))
        shape.append(size)
        room //= max(size, 1)
    return tuple(draw(st.permutations(shape)))


@st.composite
def layouts(draw, dims):
    """How to lay a tensor out, as a function of its values."""
    order = draw(st.permutations(range(dims)))
    kind = draw(st.sampled_from(["dense", "dense", "slice", "step", "expand", "overlap", "channels_last"]))
    dim = draw(st.integers(0, max(dims - 1, 0)))
    offset = draw(st.integers(0, 3))
    strides = draw(st.lists(st.integers(0, 5), min_size=dims, max_size=dims))

    def lay_out(values):
        values = values.detach()
        if kind == "channels_last" and dims in (4, 5):
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            return values.contiguous(memory_format=formats[dims])
        if kind == "overlap":
            end = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
            storage = values.flatten()
            storage = torch.cat([storage, storage.new_ones(offset + max(0, end - len(storage)))])
            return storage.as_strided(values.shape, strides, offset) if values.numel() else values
        if dims and kind == "expand":
            values = values[(slice(None),) * dim + (slice(0, 1),)].expand_as(values)
            return values
        room = list(values.shape)
        if dims and kind in ("slice", "step"):
            room[dim] = 2 * room[dim] + offset
        storage = values.new_ones(math.prod(room) + offset)[offset:]
        inverse = sorted(range(dims), key=order.__getitem__)
        whole = storage.view([room[d] for d in order]).permute(inverse)
        if dims:
            step = 2 if kind == "step" else 1
            start = offset if kind in ("slice", "step") else 0
            whole = whole[(slice(None),) * dim + (slice(start, start + step * values.shape[dim], step),)]
        return whole.copy_(values)

    lay_out.__qualname__ = f"{kind}, dim {dim}, order {order}, offset {offset}, strides {strides}"
    return lay_out


def least_dims(case):
    return case.row_dims or (2 if case.op != "instance_norm" or case.given_stats else 3)


@st.composite
def samples(draw, cases=(*CASES, *OVER_CHANNELS), dtypes=tuple(DTYPES), plain=False):
    """Calls; ``plain`` ones have neither an activation nor anything else that torch does not have."""
    case = draw(st.sampled_from(cases))
    shape = case.enough(draw(shapes(least_dims(case))))
    if case.op == "group_norm" and shape[1] == 0:  # which no number of groups divides
        shape = (shape[0], 1, *shape[2:])
        shape = case.enough(shape)
    dtype = draw(st.sampled_from(dtypes))
    parameter_dtype = draw(st.sampled_from([dtype, *DTYPES]))
    names = draw(st.sets(st.sampled_from(case.parameter_names)).map(sorted))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    sample = case.sample(shape, dtype, parameter_dtype, names=names)
    if case.op != "rms_norm" or draw(st.booleans()):
        sample.fixed["eps"] = draw(st.sampled_from([1e-5, 1e-3, 1.0]))
    mean, size = draw(st.sampled_from([0.0, 1.0, 100.0])), draw(st.sampled_from([1.0, 1.0, 1e-3, 1e3]))
    largest = torch.finfo(dtype).max / 2
    values = (size * (torch.randn(shape, dtype=torch.float64) + mean)).clamp(-largest, largest).to(dtype)
    sample = sample.with_input(draw(layouts(len(shape)))(values))
    return sample if plain else draw(extended(sample))


@st.composite
def extended(draw, sample):
    """The call with what may follow, and with parameters of samples, masks and the rest of the keywords."""
    case, shape, fixed = sample.case, sample.input.shape, dict(sample.fixed)
    parameters = dict(sample.parameters)
    form = draw(st.sampled_from(["plain", "fused", "fused", "efficient"]))
    if form == "efficient":
        fixed |= extras(draw(st.sampled_from([None, "leaky_relu", "elu"]))) | {"memory_efficient": True}
    if form == "fused":
        fixed |= extras(draw(st.sampled_from(ACTIVATIONS)))
        if draw(st.booleans()):
            residual = (3 * torch.randn(shape)).to(sample.input.dtype)
            parameters["residual"] = draw(layouts(len(shape)))(residual).requires_grad_()
    if (case.row_dims or case.over_channels) and draw(st.booleans()):
        fixed["weight_offset"] = draw(st.sampled_from([1.0, -0.5]))
    if not case.over_channels and draw(st.integers(0, 3)) == 0:
        own = shape[:1]
        if case.row_dims:  # weight and bias have to differ along the same dimensions
            own = [draw(st.sampled_from([1, size])) for size in shape[: -case.row_dims]]
        for name in sorted(set(parameters) - {"residual"}):
            like = {"dtype": parameters[name].dtype}
            parameters[name] = torch.randn(*own, *case.parameter_shape(shape), **like).requires_grad_()
    if (
        not (case.row_dims or case.over_channels)
        and len(shape) > 2
        and math.prod(shape)
        and draw(st.integers(0, 3)) == 0
    ):
        # Two valid positions for each statistic at least, or none.
        mask = torch.rand(shape[0], *shape[2:]) < draw(st.sampled_from([0.3, 0.8]))
        counts = mask.flatten(1).sum(1, keepdim=True)
        few = counts < 2
        if case.over_batch:
            few = (counts.sum() < 2).expand_as(few)
        mask.view(shape[0], -1).logical_or_(few)
        fixed["mask"] = mask
    leaves = {"input": sample.input, **parameters}
    wanted = draw(st.sets(st.sampled_from(sorted(leaves)), min_size=1))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    return Sample(case, sample.input, parameters, fixed)


KINKS = {"relu": [0], "relu6": [0, 6], "leaky_relu": [0], "hardswish": [-3, 3]}
# Those of the arithmetic and of a chain of 256 terms, as in comparison.tolerance.
ROUNDINGS = 8 + 4 * 16
# No derivative of an activation is larger, nor a second one where there is one.
STEEPEST = 1.5


@dataclasses.dataclass
class Sizes:
    """How large the numbers are that results are made of, in float64."""

    xhat: float  # what is normalized
    slope: float  # rstd * weight
    weight: float
    center: float  # the error of xhat that the reference's own mean brings about: its sum is rounded in float64
    z: torch.Tensor  # what an activation is applied to
    terms: float  # the sum of the absolute values of what z is a sum of


def _without(exact, **changes):
    parameters = {name: value for name, value in exact.parameters.items() if name not in changes}
    fixed = {name: value for name, value in exact.fixed.items() if name not in (*changes, "memory_efficient")}
    return Sample(exact.case, exact.input.detach().requires_grad_(), parameters, fixed)


def _scale(sample):
    """How large the output is, and its derivative where the statistics are constants."""
    output = sample.run(reference, frozen=True)
    (slope,) = torch.autograd.grad(output.sum(), sample.input)
    return largest(output.detach()), largest(slope)


def sizes(exact):
    nothing = dict.fromkeys(["activation", "negative_slope"])
    z = _without(exact, **nothing).run(reference).detach()
    (terms, slope), (xhat, rstd) = (
        _scale(_without(exact, bias=None, residual=None, **nothing, **more)) for more in ({}, {"weight": None})
    )
    center = 16 * torch.finfo(torch.float64).eps * largest(exact.input.detach()) * rstd
    weight = slope / rstd if rstd else 0.0
    terms += sum(largest(exact.parameters[name].detach()) for name in ("bias", "residual") if name in exact.parameters)
    return Sizes(xhat, slope, weight, center, z, terms)


def _reduced(case, terms, parameter):
    """The sums of ``terms``, which have the input's shape, that belong to the elements of a parameter."""
    if case.row_dims:
        return terms.sum_to_size(parameter.shape)
    sums = terms.flatten(2).sum(2) if terms.dim() > 2 else terms
    return sums if parameter.dim() == 2 else sums.sum(0)


def check_errors(sample):
    """Compares output and gradients with the reference in float64.

    An error may be

    - half a unit in the last place of the result, and what the dtype cannot hold at its lower end;
    - in the arithmetic: the 8 roundings and the chains of 256 sums of ``comparison.tolerance``, of the terms that a
      result is the sum of. Those of dx are rstd * weight * dz times one, the mean of others, and xhat * mean(xhat * .),
      where the mean of |xhat| is at most one: 2 + max |xhat|. Those of parameters' gradients are summed up;
    - of the reference, whose mean is no finer than float64 has it: ``Sizes.center``;
    - behind an activation: its slope, and its change of slope times the error of z, relative to z;
    - dz is rounded to the dtype of the input in between, if there is an activation;
    - memory-efficient: xhat as the rounded output has it, whose bias is less than 4 times the weight, and whose elu has
      lost up to 8 bits.
    """
    torch.manual_seed(0)
    exact = sample.double()
    size = sizes(exact)
    activation = sample.fixed.get("activation")
    dtype = sample.input.dtype
    unit = roundoff(dtype) * ROUNDINGS
    grad = torch.randn(sample.input.shape).to(dtype)
    for kink in KINKS.get(activation, ()):  # on which side of it z is, roundings decide
        grad[(size.z - kink).abs() <= 4 * unit * (size.terms + abs(kink))] = 0
    results = sample.results(grad=grad)
    exact.fixed = {name: value for name, value in exact.fixed.items() if name != "memory_efficient"}
    expected = exact.results(reference, grad.double())
    assert results.keys() == expected.keys()

    dz = grad.double().abs() * (1 if activation is None else STEEPEST * (1 + size.terms + size.weight))
    through = unit + size.center + (torch.finfo(dtype).eps if activation else 0)
    if sample.fixed.get("memory_efficient"):
        through += torch.finfo(dtype).eps * (size.xhat + 4) * (256 if activation == "elu" else 1)
    allowed = {
        "output": (unit * size.terms + size.center * size.weight) * (STEEPEST if activation else 1),
        "grad_input": through * size.slope * largest(dz) * (2 + size.xhat),
        "grad_residual": through * largest(dz),
    }
    for name, parameter in exact.parameters.items():
        if name != "residual":
            allowed[f"grad_{name}"] = through * largest(_reduced(sample.case, dz * (1 + size.xhat), parameter))
    leaves = {"output": sample.input, "grad_input": sample.input}
    leaves |= {f"grad_{name}": parameter for name, parameter in sample.parameters.items()}
    for name, result in results.items():
        assert (result.shape, result.dtype) == (leaves[name].shape, leaves[name].dtype), name
        limits = torch.finfo(result.dtype)
        within = expected[name].abs() < limits.max / 2
        error = (result.double() - expected[name]).abs()
        bound = limits.eps / 2 * expected[name].abs() + allowed[name] + limits.smallest_normal
        wrong = within & ~(error <= bound)
        assert not wrong.any(), f"{name}: error {error[wrong].max():.3g}, where {bound[wrong].min():.3g} is allowed"


def describe(sample):
    tensors = {"input": sample.input, **sample.parameters}
    said = [f"{n}: {t.dtype} {tuple(t.shape)} {t.stride()} {t.requires_grad}" for n, t in tensors.items()]
    return f"{sample.case.name}: {'; '.join(said)}; {sample.fixed}"
