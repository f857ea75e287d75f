"""Times a model with torch's layers, with those of normops, and with torch's again, in turns."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

import normops
from bench.disturbance import collect, settle
from bench.measure import Comparison, largest_errors
from bench.models.copies import copying
from bench.models.step import FUSED, PARTS, Step, peak_memory, seconds, seconds_by_part
from bench.models.zoo import MODELS, Model
from bench.worker import station
from normops.backend import backend

MIN_ROUNDS = 3
WAIT = 30.0  # seconds for the machine to come to rest: beside another process a model may take ten times as long
NORMS = ["norm forward", "norm backward", "norm"]
TOLERANCE = 1e-2  # of outputs, in float32: a deep network amplifies differences of rounding


@dataclass
class ModelTiming:
    model: str
    malloc: str
    training: bool
    rounds: int
    parts: dict[str, Comparison]  # of `PARTS`, "norm" (both passes) and "step"
    null: dict[str, Comparison]  # the same of torch's layers against themselves
    floor: dict[str, Comparison]  # torch's norms against copies of their inputs (copies.py)
    compiled: Comparison | None
    fused: dict[str, Comparison]  # FUSED and "step", with the layers of torch and backend="normops"; empty if it failed
    fusions: int  # of several calls
    peak_bytes: dict[str, int]
    difference: float  # of the outputs
    doubts: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE


def time_model(name: str, malloc: str, how_long: float, compiled: bool) -> ModelTiming:
    model = next(model for model in MODELS if model.name == name)
    settle(station().watch, WAIT)
    torch.manual_seed(0)
    module, inputs = model.make(), model.make_inputs()
    ours = normops.convert(copy.deepcopy(module))
    norms = converted(module, ours)
    modules = {"torch": module, "normops": ours, "torch again": copy.deepcopy(module)}
    steps = make_steps(model, modules, inputs)
    first = {side: step() for side, step in steps.items()}
    difference = largest_errors({"output": first["normops"]}, {"output": first["torch"]})["output"]
    peaks = {side: peak_memory(steps[side]) for side in ("torch", "normops")}
    steps["copies"] = Step(model, copying(module, norms), inputs, steps["torch"].gradient)
    steps["copies"]()
    fused, fusions = fuse_step(model, module, inputs, steps["torch"].gradient)
    if fused is not None:
        steps["fused"] = fused
        peaks["fused"] = peak_memory(fused)
    if compiled:
        steps |= compile_steps(model, modules, inputs)

    def turn(number: int) -> dict[str, float]:
        times = {}
        for side in sorted(steps, reverse=number % 2 == 1):
            if side != "copies":
                times[f"{side}: step"] = seconds(steps[side])
            if side in modules or side == "copies":
                parts = seconds_by_part(steps[side], norms)
                parts["norm"] = parts["norm forward"] + parts["norm backward"]
            elif side == "fused":
                parts = seconds_by_part(steps[side], [])  # its norms are functions of normops
            else:
                continue
            parts[FUSED] = sum(parts[part] for part in ("norm forward", "norm backward", "activations", "adds"))
            times |= {f"{side}: {part}": value for part, value in parts.items()}
        return times

    turn(0)
    rounds = collect(turn, station().watch, how_long, min_rounds=MIN_ROUNDS)

    def compare(theirs: str, ours: str, part: str) -> Comparison:
        return Comparison.of(rounds.times[f"{theirs}: {part}"], rounds.times[f"{ours}: {part}"])

    present = [
        part for part in [*PARTS, "norm", "step"] if min(min(rounds.times[f"{side}: {part}"]) for side in modules) > 0
    ]
    return ModelTiming(
        name,
        malloc,
        model.training,
        len(rounds),
        {part: compare("torch", "normops", part) for part in present},
        {part: compare("torch", "torch again", part) for part in present},
        {part: compare("torch", "copies", part) for part in present if part in NORMS},
        compare("compiled torch", "compiled normops", "step") if compiled else None,
        {part: compare("torch", "fused", part) for part in (FUSED, "step")} if fused is not None else {},
        fusions,
        peaks,
        difference,
        rounds.doubts,
    )


def converted(module: nn.Module, ours: nn.Module) -> list[str]:
    """The names of the layers that `convert` has changed."""
    pairs = zip(module.named_modules(), ours.modules(), strict=True)
    return [name for (name, theirs), mine in pairs if type(theirs) is not type(mine)]


def make_steps(model: Model, modules: dict[str, nn.Module], inputs: dict) -> dict[str, Step]:
    gradient = None
    if model.training:
        probe = Step(model, next(iter(modules.values())), inputs)
        with torch.no_grad():
            gradient = torch.randn_like(probe.forward())
    return {side: Step(model, module, inputs, gradient) for side, module in modules.items()}


def fuse_step(model: Model, module: nn.Module, inputs: dict, gradient) -> tuple[Step | None, int]:
    """A step of a copy under backend="normops", and how many fusions that has found."""
    torch.compiler.reset()
    normops.fusion_report(clear=True)
    try:
        step = Step(model, torch.compile(copy.deepcopy(module), backend=backend), inputs, gradient)
        step(), step()
    except torch._dynamo.exc.TorchDynamoException:  # which does not take every model
        return None, 0
    return step, sum("+" in fusion.what for fusion in normops.fusion_report(clear=True))


def compile_steps(model: Model, modules: dict[str, nn.Module], inputs: dict) -> dict[str, Step]:
    sides = {f"compiled {side}": torch.compile(copy.deepcopy(modules[side])) for side in ("torch", "normops")}
    steps = make_steps(model, sides, inputs)
    for step in steps.values():
        step(), step()
    return steps
