"""The engines behind torch's own operators, for models that are not to be touched."""

import contextlib
from typing import overload

from normops._ops import _C

__all__ = ["accelerate"]


class _Acceleration(_C.Acceleration, contextlib.ContextDecorator):  # type: ignore[name-defined, misc]
    pass


@overload
def accelerate(enabled: None = None) -> _Acceleration: ...
@overload
def accelerate(enabled: bool) -> None: ...
def accelerate(enabled: bool | None = None) -> _Acceleration | None:
    """Puts the kernels of normops behind torch's own operators, so that unchanged code runs on them.

    For the length of a block, or as the decorator of a function::

        with normops.accelerate():
            train(model)

    or until further notice, with ``normops.accelerate(True)`` and ``normops.accelerate(False)``. Blocks can be nested
    and entered by several threads: torch's kernels are back when the last block has ended and the switch is off. While
    they are not, all threads of the process run on the engines.

    Covered are ``torch.nn.functional``'s ``layer_norm``, ``group_norm``, ``batch_norm``, ``instance_norm`` and
    ``rms_norm``, with everything that calls them (the layers of ``torch.nn`` and their subclasses), and their backward:
    the operators ``aten::native_layer_norm``, ``native_group_norm``, ``native_batch_norm``,
    ``_native_batch_norm_legit``, ``_batch_norm_with_update`` and ``_fused_rms_norm``. They are replaced below autograd,
    so double backward, forward-mode AD, ``torch.func``, ``vmap`` and autocast are torch's own. Left to torch's kernels
    are

    - calls that torch rejects, and empty inputs;
    - ``rms_norm`` of a channels_last input or with a weight of another dtype than the input, which torch composes of
      other operators;
    - what never comes to these operators: compiled code, for which ``torch.compile`` takes them apart first (use
      :func:`normops.convert`), double backward, and the fast path of ``torch.nn.TransformerEncoderLayer`` in
      evaluation.

    The statistics saved for the backward have the dtypes that torch gives them, so a block may end between forward and
    backward. A converted layer keeps them in float64: gradients of data with a mean of many standard deviations, or of
    a model that is in half precision throughout, are here as exact as torch's, not more. instance_norm loses
    channels_last, as in torch.

    Args:
        enabled: turns the switch on or off; without it, a context manager is returned.

    Raises:
        TypeError: ``enabled`` is neither a bool nor ``None``.
    """
    if enabled is None:
        return _Acceleration()
    if not isinstance(enabled, bool):
        raise TypeError(f"expected enabled to be a bool or None, got {type(enabled).__name__}")
    _C.accelerate(enabled)
    return None
