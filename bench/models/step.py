"""One step of a model: timed as a whole, or by what its operators spend, sorted into classes."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bench.models.zoo import PROMPT, Model

FUSED = "norms, activations, adds"  # what a fused call has taken over, together
PARTS = ["norm forward", "norm backward", "activations", "adds", "convolutions and products", "other"]
_ACTIVATIONS = {
    *("relu", "relu_", "clamp_min", "clamp_min_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_"),
    *("silu", "silu_", "gelu", "gelu_", "hardswish", "hardswish_", "elu", "elu_", "mish", "mish_", "sigmoid", "tanh"),
    *("threshold_backward", "hardtanh_backward", "leaky_relu_backward", "silu_backward", "gelu_backward"),
    *("hardswish_backward", "elu_backward", "mish_backward", "sigmoid_backward", "tanh_backward"),
}
_PRODUCTS = ("conv", "addmm", "mm", "bmm", "baddbmm", "linear", "matmul", "mkldnn", "scaled_dot_product", "_scaled_dot")
_NODE = "autograd::engine::evaluate_function: "


class Step:
    """A step of training (forward and backward, without an optimizer) or of inference, on inputs that stay the same."""

    def __init__(self, model: Model, module: nn.Module, inputs: dict, gradient: Tensor | None = None):
        self.module, self.training, self.inputs, self.decodes = module, model.training, dict(inputs), model.decodes
        if model.decodes:
            with torch.no_grad():
                prompt = {"input_ids": torch.zeros(1, PROMPT, dtype=torch.long)}
                self.inputs["past_key_values"] = module(**prompt, use_cache=True).past_key_values
        self.gradient = gradient

    def forward(self) -> Tensor:
        output = self.module(**self.inputs)
        if self.decodes:
            self.inputs["past_key_values"].crop(-1)  # the token that this step has added
        return output if isinstance(output, Tensor) else output[0]

    def __call__(self) -> Tensor:
        with torch.set_grad_enabled(self.training):
            output = self.forward()
            if self.training:
                output.backward(self.gradient)
        return output.detach()

    def reset(self) -> None:
        self.module.zero_grad(set_to_none=True)


def seconds(step: Step) -> float:
    step.reset()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def seconds_by_part(step: Step, norms: list[str]) -> dict[str, float]:
    """The self times of the operators; those called by the modules `norms`, and their gradients, are the norms'."""
    step.reset()
    with _norm_ranges(step.module, norms) as ranges, profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return sort_events((event for event in profiler.events() if event.cpu_parent is None), ranges)


_RANGE = "norm forward"


@contextmanager
def _norm_ranges(module: nn.Module, norms: list[str]) -> Iterator[list[tuple[int, int]]]:
    """Marks calls of these modules for the profiler, and collects the numbers of the autograd nodes that each makes."""
    ranges: list[tuple[int, int]] = []
    calls: list[tuple[record_function, int]] = []
    number = torch._C._autograd._get_sequence_nr

    def before(*_):
        mark = record_function(_RANGE)
        mark.__enter__()
        calls.append((mark, number()))

    def after(*_):
        mark, first = calls.pop()
        ranges.append((first, number()))
        mark.__exit__(None, None, None)

    with ExitStack() as hooks:
        for name in norms:
            layer = module.get_submodule(name)
            for handle in layer.register_forward_pre_hook(before), layer.register_forward_hook(after):
                hooks.callback(handle.remove)
        yield ranges


def sort_events(roots: Iterator[FunctionEvent], ranges: list[tuple[int, int]]) -> dict[str, float]:
    """Seconds of each part."""
    parts = dict.fromkeys(PARTS, 0.0)
    owner = {number: index for index, (first, end) in enumerate(ranges) for number in range(first, end)}
    accumulated = set()  # norms whose first accumulation of a gradient has passed

    def visit(event: FunctionEvent, part: str | None) -> None:
        if event.name == _RANGE:
            for child in event.cpu_children:  # its own time is Python's and the profiler's
                visit(child, "norm forward")
            return
        if event.name.startswith(_NODE) and event.sequence_nr in owner:
            norm = owner[event.sequence_nr]
            for child in event.cpu_children:
                inside = event.name == _NODE + child.name
                if not inside and norm not in accumulated:
                    # Of a residual stream. What a norm of several operators accumulates besides is its own.
                    accumulated.add(norm)
                    visit(child, None)
                else:
                    visit(child, "norm backward")
            part = "norm backward"
        else:
            for child in event.cpu_children:
                visit(child, part)
        parts[part or part_of(event.name)] += event.self_cpu_time_total / 1e6

    for root in roots:
        visit(root, None)
    return parts


def part_of(operator: str) -> str:
    namespace, _, name = operator.rpartition("::")
    if namespace == "normops":
        return "norm backward" if name.rstrip("_").endswith("backward") else "norm forward"
    if namespace != "aten":
        return "other"
    if name in _ACTIVATIONS:
        return "activations"
    if name in ("add", "add_"):
        return "adds"
    return "convolutions and products" if name.lstrip("_").startswith(_PRODUCTS) else "other"


def peak_memory(step: Step) -> int:
    """Bytes of tensors at the highest, beyond those there were before the step."""
    step.reset()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
