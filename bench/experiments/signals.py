"""g: the size of activations and gradients, by layer and step, with and without normalization."""

import math

import torch
from torch import nn

import normops
from bench.experiments.study import Experiment, Finding, Scale, finding, median, panels, percents
from bench.experiments.training import batches, digits_data, train
from bench.tables import make_table

DEPTH, WIDTH = 12, 64
STEPS, BATCH, LEARNING_RATE = 200, 50, 0.02
ALIKE = 10
NORMS = {
    "none": nn.Identity,
    "BatchNorm": lambda: normops.BatchNorm1d(WIDTH),
    "LayerNorm": lambda: normops.LayerNorm(WIDTH),
    "RMSNorm": lambda: normops.RMSNorm(WIDTH),
}


class Network(nn.Module):
    """Linear layers one after the other, as torch initializes them, each with a norm and ReLU behind it."""

    def __init__(self, norm: str):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(64 if i == 0 else WIDTH, WIDTH) for i in range(DEPTH))
        self.norms = nn.ModuleList(NORMS[norm]() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 10)
        self.sizes: list[float] = []

    def forward(self, images):
        x = images.flatten(1)
        self.sizes = []
        for linear, norm in zip(self.linear, self.norms, strict=True):
            x = torch.relu(norm(linear(x)))
            # Of what differs between samples: a constant tells nothing of the image.
            self.sizes.append(x.detach().std(dim=0).square().mean().sqrt().item())
        return self.head(x)

    def gradients(self) -> list[float]:
        """Of the weights of each layer, in proportion to the weights: how far a step moves them."""
        return [(linear.weight.grad.norm() / linear.weight.detach().norm()).item() for linear in self.linear]


def run(scale: Scale, tick) -> dict:
    data = digits_data()
    steps = scale(STEPS, 2)
    kept = sorted({round(1 + (steps - 1) * (i / 39) ** 2) for i in range(40)})
    found: dict[str, dict] = {}
    for norm in NORMS:
        rows: dict[str, list] = {"first": [], "last": [], "accuracy": []}
        for seed in scale.seeds:
            torch.manual_seed(seed)
            model, order = Network(norm), batches(len(data.images), BATCH, seed)

            def batch(_, order=order):
                index = next(order)
                return (data.images[index],), data.labels[index]

            courses: dict[int, tuple[list[float], list[float]]] = {}

            def record(step, model=model, courses=courses):
                if step in kept:
                    courses[step] = list(model.sizes), model.gradients()

            curve = train(
                model,
                steps,
                batch,
                ((data.test_images,), data.test_labels),
                learning_rate=LEARNING_RATE,
                after_backward=record,
            )
            rows["accuracy"].append(curve.accuracy[-1])
            for when, step in (("first", min(courses)), ("last", max(courses))):
                sizes, gradients = courses[step]
                rows[when].append({"activations": sizes, "gradients": gradients})
            if seed == scale.seeds[0]:
                rows["course"] = [
                    {
                        "step": step,
                        "activations": [float(f"{value:.3g}") for value in sizes],
                        "gradients": [float(f"{value:.3g}") for value in gradients],
                    }
                    for step, (sizes, gradients) in sorted(courses.items())
                ]
            tick()
        found[norm] = rows
    return {"seeds": list(scale.seeds), "norms": found}


def _ratios(found: dict, when: str, what: str) -> list[float]:
    """Largest over smallest of the layers, for each seed."""
    return [max(one[what]) / max(min(one[what]), 1e-30) for one in found[when]]


def _times(values: list[float]) -> str:
    middle = median(values)
    return f"{middle:,.0f}" if middle >= 100 else f"{middle:.1f}"


def table(data: dict):
    caption = (
        f"largest over smallest of the {DEPTH} layers: of the activations' standard deviation between samples, and of "
        "the weights' gradient in proportion to the weights; at the first step and at the last; median of "
        f"{len(data['seeds'])} seeds"
    )
    columns = ["activations, first", "last", "gradients, first", "last", "accuracy"]
    made = make_table("", "norm", *columns, caption=caption)
    for name, found in data["norms"].items():
        made.add_row(
            name,
            *(
                _times(_ratios(found, when, what))
                for what in ("activations", "gradients")
                for when in ("first", "last")
            ),
            percents(found["accuracy"]),
        )
    return made


def figure(data: dict):
    import numpy as np

    names = list(data["norms"])
    made, axes = panels(
        2 * len(names),
        f"Activations (above) and gradients (below), by layer and step; {DEPTH} layers",
        columns=len(names),
        size=(2.3, 2.5),
    )
    for row, what in enumerate(("activations", "gradients")):
        grids = {
            name: np.log10(np.maximum([one[what] for one in found["course"]], 1e-12)).T
            for name, found in data["norms"].items()
        }
        # The widest is that without a norm, whose smallest would leave the others one shade.
        low, high = max(-8.0, min(grid.min() for grid in grids.values())), max(grid.max() for grid in grids.values())
        for panel, (name, grid) in zip(axes[row * len(names) :], grids.items(), strict=False):
            steps = [one["step"] for one in data["norms"][name]["course"]]
            edges = [*steps, steps[-1] + 1]
            mesh = panel.pcolormesh(
                edges, np.arange(DEPTH + 1) + 0.5, grid, cmap="cividis", vmin=low, vmax=high, shading="flat"
            )
            panel.set_title(f"{name}: {what}", fontsize=9)
            panel.set_xlabel("step", fontsize=8)
            panel.set_ylabel("layer" if panel is axes[row * len(names)] else "", fontsize=8)
            panel.tick_params(labelsize=7)
        bar = made.colorbar(mesh, ax=axes[row * len(names) : (row + 1) * len(names)], shrink=0.9, pad=0.01)
        bar.set_label("log10 of the size", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return made


def findings(data: dict) -> list[Finding]:
    norms = data["norms"]
    bare = norms["none"]

    def alike(what: str, when: str) -> list[bool]:
        baseline = _ratios(bare, when, what)
        others = [_ratios(found, when, what) for name, found in norms.items() if name != "none"]
        return [
            max(values) < ALIKE < theirs for theirs, values in zip(baseline, zip(*others, strict=True), strict=True)
        ]

    def say(what: str, when: str) -> str:
        return ", ".join(f"{_times(_ratios(found, when, what))} ({name})" for name, found in norms.items())

    vanished = [math.log10(one["activations"][-1] / one["activations"][0]) for one in bare["first"]]
    accuracies = {name: found["accuracy"] for name, found in norms.items()}
    learns = [
        min(values) > 0.5 > theirs
        for theirs, values in zip(
            bare["accuracy"],
            zip(*(accuracies[name] for name in norms if name != "none"), strict=True),
            strict=True,
        )
    ]
    return [
        finding(
            f"At the first step activations of all layers are within a factor of {ALIKE} with every norm, and not "
            "without.",
            alike("activations", "first"),
            f"At the first step the largest activations of a layer were as many times the smallest of another: "
            f"{say('activations', 'first')}; without a norm the last layer's were 10^{median(vanished):.1f} of the "
            "first's.",
        ),
        finding(
            "At the first step gradients, in proportion to the weights, are within that factor, too, but not without.",
            alike("gradients", "first"),
            f"At the first step the ratio of the largest to the smallest gradients of a layer was "
            f"{say('gradients', 'first')}; at the last step {say('gradients', 'last')}.",
        ),
        finding(
            "The deep network learns, and has more than half of the images right, with each of the norms, and not "
            "without.",
            learns,
            f"After {norms['none']['course'][-1]['step']} steps accuracy was "
            + ", ".join(f"{percents(values)} ({name})" for name, values in accuracies.items())
            + ".",
        ),
    ]


EXPERIMENT = Experiment(
    "g",
    "signals",
    "Where normalization acts: activations and gradients by layer",
    f"{DEPTH} linear layers of {WIDTH} with ReLU on images of digits, initialized by torch, with a norm behind each or "
    "none; the size of every layer's activations and gradients during training.",
    30,
    lambda scale: len(NORMS) * len(scale.seeds),
    run,
    figure,
    table,
    findings,
)
