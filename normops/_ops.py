"""Loads the compiled library, which registers the operators, and says what they return without computing it."""

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch


def _load() -> ModuleType:
    how = (
        f"It has to be built for the installed torch ({torch.__version__}): run pip install --no-build-isolation . "
        "in the source tree."
    )
    # A second library that registers the same operators ends the process.
    found, loaded = importlib.util.find_spec("normops._C"), torch.ops.loaded_libraries
    if found and hasattr(torch.ops.normops, "_row_norm") and found.origin not in loaded:
        others = [path for path in loaded if path.rpartition("normops")[1]]
        raise ImportError(
            f"another copy of normops ({', '.join(others)}) is in use in this process, not {found.origin}"
        )
    try:
        from normops import _C
    except ImportError as error:
        raise ImportError(f"normops could not load its compiled library ({error}). {how}") from error
    built_for = _C.build_info()["torch"]
    # Torch promises no binary interface across minor versions, and a mismatch need not show when it is loaded.
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(f"normops was compiled for torch {built_for}. {how}")
    loaded.add(_C.__file__)
    return _C


_C = _load()
BUILD_INFO: dict[str, Any] = _C.build_info()

# The package can be imported again, as it is where it has been taken out of sys.modules.
_register_fake = functools.partial(torch.library.register_fake, allow_override=True)


def _acc_dtype(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _parameter_shape(input, leading, plain, varying):
    """That of weight and bias; ``varying`` has a bit for each dimension along which they differ (csrc/extras.h)."""
    if not varying:
        return plain
    return [*(size if varying >> d & 1 else 1 for d, size in enumerate(input.shape[:leading])), *plain]


def _parameter_dtype(input, weight):
    """The dtype of dweight and dbias. CUDA kernels write them in that of the weight, if the input has it too."""
    own = weight is not None and weight.dtype == input.dtype and input.device.type == "cuda"
    return input.dtype if own else _acc_dtype(input)


def _dense_like(input):
    """Layers return, as torch's do, a dense tensor in the memory format the input suggests."""
    return torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))


def _masked(output_mask, *makers):
    return tuple(make() if wanted else None for wanted, make in zip(output_mask, makers, strict=True))


def _row_statistics(input, normalized_ndim):
    if normalized_ndim == 0:  # rows are channels
        shape = [input.shape[0], 1, *input.shape[2:]]
        return tuple(input.new_empty(shape, dtype=torch.float64) for _ in range(2))
    shape = [*input.shape[: input.dim() - normalized_ndim], *[1] * normalized_ndim]
    return tuple(input.new_empty(shape, dtype=torch.float64) for _ in range(2))


@_register_fake("normops::_row_norm")
def _(input, normalized_ndim, weight, bias, eps, centered, *extras, **more):
    # LayerNorm is always contiguous, as torch's.
    contiguous = centered or normalized_ndim == 0
    output = input.new_empty(input.shape) if contiguous else _dense_like(input)
    return output, *_row_statistics(input, normalized_ndim)


@_register_fake("normops::_add_row_norm")
def _(input, residual, normalized_ndim, weight, bias, eps, centered, weight_offset=0.0):
    return *(input.new_empty(input.shape) for _ in range(2)), *_row_statistics(input, normalized_ndim)


@_register_fake("normops::_row_norm_backward")
def _(
    grad_output,
    input,
    normalized_ndim,
    mean,
    rstd,
    weight,
    eps,
    centered,
    output_mask,
    bias=None,
    residual=None,
    output=None,
    activation=None,
    negative_slope=0.01,
    weight_offset=0.0,
    grad_sum=None,
    varying=0,
):
    leading = input.dim() - normalized_ndim

    def parameter():
        plain = input.shape[leading:] if normalized_ndim else [input.shape[1]]
        shape = _parameter_shape(input, leading, plain, varying)
        return input.new_empty(shape, dtype=_parameter_dtype(input, weight))

    def grad_input():
        return input.new_empty(input.shape) if centered or normalized_ndim == 0 else _dense_like(grad_output)

    return _masked(output_mask, grad_input, parameter, parameter, grad_input)


@_register_fake("normops::_channel_norm")
def _(input, mean, var, weight, bias, num_groups, over_batch, eps, *extras, **more):
    statistics = [num_groups] if over_batch else [input.shape[0], num_groups]
    return _dense_like(input), *(input.new_empty(statistics, dtype=torch.float64) for _ in range(2))


@_register_fake("normops::_channel_norm_tracked")
def _(input, running_mean, running_var, weight, bias, over_batch, momentum, eps, *extras, **more):
    statistics = input.shape[1 if over_batch else 0 : 2]
    return _dense_like(input), *(input.new_empty(statistics, dtype=torch.float64) for _ in range(2))


@_register_fake("normops::_channel_norm_backward")
def _(
    grad_output,
    input,
    mean,
    var,
    weight,
    num_groups,
    over_batch,
    eps,
    input_stats,
    output_mask,
    bias=None,
    residual=None,
    output=None,
    activation=None,
    negative_slope=0.01,
    mask=None,
    varying=0,
):
    def parameter():
        shape = _parameter_shape(input, 1, [input.shape[1]], varying)
        return input.new_empty(shape, dtype=_parameter_dtype(input, weight))

    def grad_input():
        return _dense_like(input)

    return _masked(output_mask, grad_input, parameter, parameter, grad_input)


def _per_channel(input):
    return tuple(input.new_empty([input.shape[1]], dtype=torch.float64) for _ in range(2))


@_register_fake("normops::_channel_moments")
def _(input, mask=None):
    return _per_channel(input)


@_register_fake("normops::_merge_moments")
def _(count, mean, var):
    return _per_channel(mean)


@_register_fake("normops::_channel_grad_sums")
def _(grad_output, input, mean, var, eps, mask=None):
    return _per_channel(input)


@_register_fake("normops::_channel_grad_apply")
def _(grad_output, input, mean, var, weight, sum_dy, sum_dy_xhat, count, eps, mask=None):
    return _dense_like(input)


@_register_fake("normops::_update_running_stats")
@_register_fake("normops::_update_running_stats.counted")
def _(running_mean, running_var, mean, var, momentum, count):
    return None
