"""Conversions of layers that are not torch's: classes that compute the same under another name.

An entry is a claim that a function on normops computes what a class computes. The claim is tested before a layer is
converted, on a copy of the layer with random parameters.
"""

import copy
import dataclasses
import fnmatch
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence

import torch

from normops.modules._dropin import printed

__all__ = ["register_conversion"]

_INTERNAL = frozenset(torch.nn.Module().__dict__)


@dataclasses.dataclass(frozen=True)
class _Entry:
    layer: type | str
    forward: Callable
    input_shape: Callable

    def matches(self, cls):
        if isinstance(self.layer, type):
            return cls is self.layer
        return fnmatch.fnmatchcase(f"{cls.__module__}.{cls.__qualname__}", self.layer)

    @property
    def is_pattern(self):
        return isinstance(self.layer, str) and any(character in self.layer for character in "*?[")


_entries: list[_Entry] = []
_classes: dict[tuple[type, Callable], type] = {}
# What the test of an entry said of a class in one configuration: None, or why it does not fit.
_verdicts: dict[tuple, str | None] = {}


def _last_dimensions(module):
    shape = getattr(module, "normalized_shape", None)
    if shape is None:
        weight = getattr(module, "weight", None)
        shape = (16,) if weight is None else weight.shape
    return [(*leading, *shape) for leading in ((2, 3), (), (5,), (2, 1, 3))]


def register_conversion(
    layer: type | str,
    forward: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
    *,
    input_shape: Callable[[torch.nn.Module], Sequence[int] | Sequence[Sequence[int]]] = _last_dimensions,
) -> None:
    """Teaches :func:`convert` a class of layers that is not torch's.

    From then on ``convert`` gives layers of exactly this class the new ``forward`` (by a subclass with the same name:
    ``isinstance``, parameters, ``state_dict`` and all else stay), and ``revert`` takes it away::

        normops.register_conversion(MyRMSNorm, lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.eps))

    The first time a layer of the class is converted, and again for every new combination of its options and parameter
    dtypes, both forwards are run with random parameters on random inputs, of float32, float16, bfloat16 and the dtypes
    of the parameters and of several ranks, as far as the class itself accepts them; in training and in evaluation,
    twice with the same input, and without gradients. They have to agree in the dtype and shape of the output, in what
    they leave in buffers and, up to a few roundings of the narrowest dtype involved, in output and gradients. The layer
    itself is not touched by this.

    Some well-known classes are registered already: see :mod:`normops.lookalikes`.

    Args:
        layer: the class, or its full name, which need not be importable yet. A name may have wildcards (``*``, ``?``);
            it then stands for classes that may or may not be what is claimed, and those that are not are left alone.
        forward: the new forward. Called with the module and one tensor; must not be a bound method.
        input_shape: given the module, the shape of an input to test with, or a list of several. By default
            ``normalized_shape``, or the shape of ``weight``, behind no, one, two and three other dimensions.

    Later entries come before earlier ones.

    Raises:
        TypeError: ``layer`` is neither a class of modules nor a string, or ``forward`` cannot be called.

    ``convert`` raises ``ValueError`` for a layer whose registered forward (by class or by full name) turns out to
    compute something else; it changes nothing then.
    """
    if not isinstance(layer, str) and not (isinstance(layer, type) and issubclass(layer, torch.nn.Module)):
        raise TypeError(f"register_conversion: expected layer to be a class of modules or its name, got {layer!r}")
    if not callable(forward):
        raise TypeError(f"register_conversion: expected forward to be a function, got {type(forward).__name__}")
    _entries.insert(0, _Entry(layer, forward, input_shape))


def original_class(cls: type) -> type | None:
    """The class that a class made here replaces."""
    return cls.__dict__.get("_normops_original")


def is_known(cls: type) -> bool:
    """Whether there is an entry for a class."""
    return any(entry.matches(cls) for entry in _entries)


def replacement_class(module: torch.nn.Module) -> type | None:
    """The class that ``convert`` gives a module by an entry that matches and fits, or None."""
    cls = type(module)
    if original_class(cls) or "forward" in module.__dict__:
        return None
    for entry in _entries:
        if entry.matches(cls):
            why_not = _verdict(entry, module)
            if why_not is None:
                return _class_for(cls, entry.forward)
            if not entry.is_pattern:
                raise ValueError(f"convert: the forward registered for {cls.__qualname__} does not fit: {why_not}")
    return None


def why_left(module: torch.nn.Module) -> str:
    """Why no entry converts a module."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    reasons = [_verdict(entry, module) for entry in _entries if entry.matches(type(module))]
    return "; ".join(dict.fromkeys(filter(None, reasons))) or "no entry"


def _class_for(cls, forward):
    if (cls, forward) not in _classes:
        body = {
            # The argument has the name it has in the original, whatever that is.
            "forward": lambda self, *args, **kwargs: forward(self, *args, *kwargs.values()),
            "__doc__": cls.__doc__,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__reduce_ex__": _reduce,
            "__repr__": lambda self: printed(cls.__repr__(self)),
            "_normops_original": cls,
            "_normops_forward": staticmethod(forward),
        }
        _classes[cls, forward] = type(cls.__name__, (cls,), body)
    return _classes[cls, forward]


def _reduce(self, protocol):
    """Pickles name the original class and the forward; the class itself exists only where normops has made it."""
    cls = type(self)
    _, _, *rest = super(cls, self).__reduce_ex__(protocol)
    return _rebuild, (original_class(cls), _name(cls._normops_forward)), *rest


def _name(function):
    return f"{function.__module__}.{getattr(function, '__qualname__', '')}"


def _rebuild(cls, name):
    """A module of the class that was pickled or, where its forward is not registered, of the original."""
    for entry in _entries:
        if entry.matches(cls) and _name(entry.forward) == name:
            cls = _class_for(cls, entry.forward)
            break
    return cls.__new__(cls)


def _verdict(entry, module):
    key = (
        entry,
        type(module),
        repr(_options(module)),
        tuple((name, tensor.dtype) for name, tensor in module.named_parameters(recurse=False)),
    )
    if key not in _verdicts:
        try:
            _verdicts[key] = _compare(entry, module)
        except Exception as error:
            _verdicts[key] = f"{type(error).__name__}: {error}"
    return _verdicts[key]


def _options(module):
    return {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}


def _twin(module):
    """A layer of the same class and options on the CPU, with random parameters and without hooks."""
    twin = type(module).__new__(type(module))
    torch.nn.Module.__init__(twin)
    twin.__dict__.update(_options(module))

    def random(tensor):
        return torch.randn(tensor.shape, dtype=tensor.dtype, device="cpu")

    for name, parameter in module._parameters.items():
        twin.register_parameter(name, None if parameter is None else torch.nn.Parameter(random(parameter)))
    for name, buffer in module._buffers.items():
        twin.register_buffer(name, None if buffer is None else buffer.detach().cpu().clone())
    return twin


def _results(forward, twin, x, grad):
    """By name: output, gradients, the outputs of a second call and of one without gradients, and then buffers."""
    leaves = {"input": x, **dict(twin.named_parameters())}
    output = forward(x)
    if grad is None:
        grad = torch.randn(output.shape, dtype=torch.float32, device="cpu").to(output.dtype)
    gradients = torch.autograd.grad(output, leaves.values(), grad, allow_unused=True)
    named = {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}
    again = forward(x).detach()
    with torch.no_grad():
        alone = forward(x)
    outputs = {"output": output.detach(), "output of a second call": again, "output without gradients": alone}
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in twin.named_buffers()}
    return {**outputs, **named, **buffers}, grad


def _shapes(entry, module):
    shapes = entry.input_shape(module)
    return [tuple(shapes)] if isinstance(shapes[0], int) else [tuple(shape) for shape in shapes]


def _calls(entry, module, layers):
    """What to call a layer with: the layer, whether it is training, the shape, dtype and size of an input."""
    dtypes = {torch.float32, torch.bfloat16, torch.float16, *(p.dtype for p in module.parameters())}
    usual, *others = _shapes(entry, module)
    # Small inputs, so that eps matters, and large ones.
    everything = [((usual,), sorted(dtypes, key=str), (1e-3, 1.0, 30.0)), (others, (torch.float32,), (1.0,))]
    for shapes, kinds, sizes in everything:
        yield from itertools.product(layers, (True, False), shapes, kinds, sizes)


def _compare(entry, module):
    """None if the entry's forward computes what the module computes, or what differs."""
    if module._modules:
        return "it has submodules"
    required = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(required) != 1:
        return "its forward takes more than one argument"
    tested, refusal = False, None
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        twin = _twin(module)
        # With the parameters as they are, and in float32, where nothing hides behind roundings.
        layers = (twin, copy.deepcopy(twin).float())
        for layer, training, shape, dtype, size in _calls(entry, twin, layers):
            # Either has its own buffers, in case a forward changes them.
            theirs, ours = (copy.deepcopy(layer).train(training) for _ in range(2))
            x = (size * (torch.randn(shape, device="cpu") + 0.5)).to(dtype).requires_grad_()
            try:
                expected, grad = _results(theirs, theirs, x, None)
            except Exception as error:  # not a dtype or a rank of this class
                refusal = error
                continue
            results, _ = _results(functools.partial(entry.forward, ours), ours, x, grad)
            narrowest = max(torch.finfo(tensor.dtype).eps for tensor in (x, *layer.parameters()))
            difference = _difference(results, expected, narrowest)
            if difference:
                mode = "training" if training else "evaluation"
                kind = str(dtype).removeprefix("torch.")
                return f"{difference}, in {mode}, given {kind} of size {size} and shape {list(shape)}"
            tested = True
    return None if tested else f"it accepts no floating input of these shapes: {refusal}"


def _difference(results, expected, eps):
    """What differs, if anything by more than roundings.

    A class may round to its dtype twice, where normops does once at the end: 2 units of the narrowest dtype. In its
    backward it may round after each operation, and terms cancel: 8 units. Arithmetic in float32, or in float64 where
    all is float64, adds up to 32 units of its own.
    All of this is of the largest value, and far below what another formula would give on random data.
    """
    for name, theirs in expected.items():
        ours = results[name]
        if ours is None or theirs is None:
            if ours is not theirs:
                return f"{name} is there in one and not in the other"
            continue
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return f"{name} is {ours.dtype} of shape {list(ours.shape)}, not {theirs.dtype} of {list(theirs.shape)}"
        if not theirs.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"{name} differs"
            continue
        if not torch.isfinite(theirs).all():
            continue  # beyond the range of the dtype
        arithmetic = min(eps, torch.finfo(torch.float32).eps)
        allowed = ((8 if name.startswith("gradient") else 2) * eps + 32 * arithmetic) * theirs.double().abs().max()
        error = (ours.double() - theirs.double()).abs().max()
        if not error <= allowed:
            return f"{name} differs by {error:.2g}, where {allowed:.2g} is rounding"
    return None
