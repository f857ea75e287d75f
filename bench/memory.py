"""``python -m bench memory``: the highest memory of a training step with torch, with the kernels of normops, with fused
layers, and with layers that do not keep their inputs."""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch
from torch import nn

import normops
from bench.command import finish, make_console
from bench.machine import environment, results_folder
from bench.models.step import Step, peak_memory
from bench.models.zoo import Model, dynunet, resnet50
from bench.tables import environment_table, make_table, write_markdown
from normops import backend

MIB = 2**20


def leaky_resnet50() -> nn.Module:
    """(The configuration's activation is that of the sums of blocks alone.)"""
    model = resnet50()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.LeakyReLU())
    return model


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(8, 3, 160, 160)}


# A leaky_relu can be inverted and a relu cannot.
MODELS = [
    Model("ResNet-50", resnet50, images),
    Model("ResNet-50, leaky_relu", leaky_resnet50, images),
    Model("DynUNet", dynunet, lambda: {"x": torch.randn(1, 1, 64, 64, 64)}),
]
COLUMNS = ["torch", "converted", "fused", "memory_efficient"]


def forms(model: Model) -> dict[str, nn.Module]:
    """The same model four times."""
    backend.register()
    plain = model.make()
    converted = normops.convert(copy.deepcopy(plain))
    efficient = normops.convert(copy.deepcopy(plain), memory_efficient=True)
    return {
        "torch": plain,
        "converted": converted,
        "fused": torch.compile(copy.deepcopy(converted), backend="normops"),
        "memory_efficient": torch.compile(efficient, backend="normops"),
    }


def measure(model: Model) -> dict[str, int]:
    inputs = model.make_inputs()
    peaks = {}
    for name, module in forms(model).items():
        torch._dynamo.reset()
        with torch.no_grad():
            output = module(**inputs)
            output = output if isinstance(output, torch.Tensor) else output[0]
        step = Step(model, module, inputs, torch.randn_like(output))
        step()  # compiles, and allocates what stays
        peaks[name] = peak_memory(step)
    return peaks


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[m.name for m in MODELS], default=[m.name for m in MODELS])
    parser.add_argument("--output", type=Path, default=Path("bench/results/memory"), help="folder for memory.json")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or each profile prints two lines
    console, start = make_console(), time.perf_counter()
    table = make_table("Highest memory of a training step beyond what it began with, MiB", "model", *COLUMNS)
    found = {}
    for model in MODELS:
        if model.name in arguments.models:
            found[model.name] = measure(model)
            table.add_row(model.name, *(f"{found[model.name][name] / MIB:.0f}" for name in COLUMNS))
    console.print(table)
    folder, instead = results_folder(arguments.output)
    if instead:
        console.print(instead)
    (folder / "memory.json").write_text(json.dumps({"environment": environment(), "bytes": found}, indent=1))
    write_markdown(folder / "memory.md", "Memory", [], [environment_table(environment()), table], [])
    return finish(console, folder, start, [], [], doubtful=False)
