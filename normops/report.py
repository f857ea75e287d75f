"""Which layers of a model run on normops, which do not, and why."""

import dataclasses
from collections.abc import Iterator

import torch

__all__ = ["Layer", "Summary"]

_NAMES_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Layer:
    """A normalization layer of a model.

    Attributes:
        name: where it is in the model, as in ``named_modules``; empty for the model itself.
        cls: its class.
        why_left: why it does not run on normops; empty if it does.
    """

    name: str
    cls: type[torch.nn.Module]
    why_left: str = ""

    @property
    def class_name(self) -> str:
        """The name of the class as it is imported."""
        for package in ("normops", "torch.nn"):
            if self.cls.__module__.startswith(f"{package}."):
                return f"{package}.{self.cls.__qualname__}"
        return f"{self.cls.__module__}.{self.cls.__qualname__}"


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """The normalization layers of a model, in the order of ``named_modules``: what :func:`normops.summary` returns.

    Iterates over them, and prints as a table with one line for all layers of the same class and fate.
    """

    model: str
    layers: tuple[Layer, ...]

    @property
    def converted(self) -> tuple[Layer, ...]:
        """Those that run on normops."""
        return tuple(layer for layer in self.layers if not layer.why_left)

    @property
    def left(self) -> tuple[Layer, ...]:
        """Those that do not; each says why."""
        return tuple(layer for layer in self.layers if layer.why_left)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        lines = [f"{self.model}: {len(self.converted)} of {len(self)} normalization layers run on normops"]
        groups: dict[tuple[str, str], list[str]] = {}
        for layer in (*self.converted, *self.left):
            groups.setdefault((layer.class_name, layer.why_left), []).append(layer.name or "the model itself")
        for (class_name, why_left), names in groups.items():
            shown = names if len(names) <= _NAMES_SHOWN else [*names[: _NAMES_SHOWN - 1], "...", names[-1]]
            fate, reason = ("left", f" ({why_left})") if why_left else ("converted", "")
            lines.append(f"  {fate:9}  {len(names)} x {class_name}: {', '.join(shown)}{reason}")
        return "\n".join(lines)
