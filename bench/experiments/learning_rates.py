"""a: BatchNorm's paper in small: how many steps, at which learning rates, with which activation."""

import torch
from torch import nn

import normops
from bench.experiments.study import (
    STYLES,
    Experiment,
    Finding,
    Scale,
    finding,
    legend_below,
    median,
    panels,
    percent,
    percents,
    plain,
)
from bench.experiments.training import Curve, batches, digits_data, train
from bench.tables import make_table

LEARNING_RATE = 0.01
STEPS, EVERY, BATCH = 360, 10, 50
WIDTH, DEPTH = 24, 6

# Norm, multiple of the learning rate, activation. The baseline at five times its rate is not in the paper: it shows
# whether the rate was merely too small for it.
VARIANTS = {
    "baseline": (None, 1, nn.ReLU),
    "baseline x5": (None, 5, nn.ReLU),
    "BatchNorm": (normops.BatchNorm2d, 1, nn.ReLU),
    "BatchNorm (torch's)": (nn.BatchNorm2d, 1, nn.ReLU),
    "BatchNorm x5": (normops.BatchNorm2d, 5, nn.ReLU),
    "BatchNorm x30": (normops.BatchNorm2d, 30, nn.ReLU),
    "BatchNorm x5, sigmoid": (normops.BatchNorm2d, 5, nn.Sigmoid),
    "baseline, sigmoid": (None, 1, nn.Sigmoid),
}


def network(norm, activation) -> nn.Sequential:
    """Convolutions one after the other, two of them with a stride."""
    layers: list[nn.Module] = []
    for number in range(DEPTH):
        inputs, stride = (1 if number == 0 else WIDTH), (2 if number in (2, 4) else 1)
        convolution = nn.Conv2d(inputs, WIDTH, 3, stride, padding=1, bias=norm is None)
        # As is usual for such networks: with torch's own initialization the baseline hardly begins to learn.
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers.append(convolution)
        layers += [norm(WIDTH)] if norm else []
        layers.append(activation())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def run(scale: Scale, tick) -> dict:
    data = digits_data()
    curves: dict[str, list[Curve]] = {name: [] for name in VARIANTS}
    for name, (norm, multiple, activation) in VARIANTS.items():
        for seed in scale.seeds:
            torch.manual_seed(seed)
            order = batches(len(data.images), BATCH, seed)

            def batch(_, order=order):
                index = next(order)
                return (data.images[index],), data.labels[index]

            curves[name].append(
                train(
                    network(norm, activation),
                    scale(STEPS, EVERY),
                    batch,
                    ((data.test_images,), data.test_labels),
                    learning_rate=multiple * LEARNING_RATE,
                    every=EVERY,
                )
            )
            tick()
    goals = [max(curve.accuracy) for curve in curves["baseline"]]
    return {
        "seeds": list(scale.seeds),
        "goals": goals,
        "variants": {
            name: {
                "steps": [curve.reached(goal) for curve, goal in zip(found, goals, strict=True)],
                "maxima": [max(curve.accuracy) for curve in found],
                "final": [curve.accuracy[-1] for curve in found],
                "diverged": [curve.diverged for curve in found],
                "curve": {"steps": found[0].steps, "accuracy": [round(value, 4) for value in found[0].accuracy]},
            }
            for name, found in curves.items()
        },
    }


def _steps(values: list[int | None]) -> str:
    missing = sum(value is None for value in values)
    known = sorted(value for value in values if value is not None)
    if not known:
        return "never"
    text = f"{median(known):.0f}" + (f" ({known[0]} to {known[-1]})" if len(known) > 1 else "")
    return text + (f", never in {missing} of {len(values)}" if missing else "")


def _after(values: list[int | None]) -> str:
    text = _steps(values)
    return text if text == "never" else f"after {text} steps"


def table(data: dict):
    caption = (
        f"median over {len(data['seeds'])} seeds (least to most). Steps: of {BATCH} images, until the accuracy on "
        "images not trained on is the highest that the baseline reached with the same seed"
    )
    made = make_table("", "variant", "steps to the baseline's best", "highest accuracy", "at the end", caption=caption)
    for name, found in data["variants"].items():
        end = percents(found["final"]) + (" diverged" if any(found["diverged"]) else "")
        made.add_row(name, _steps(found["steps"]), percents(found["maxima"]), end)
    return made


def figure(data: dict):
    made, (axes,) = panels(1, "BatchNorm, learning rates and activations", size=(8, 4.6))
    plain(axes, "accuracy on images not trained on, first seed", f"steps of {BATCH} images", "accuracy")
    for style, (name, found) in zip(STYLES, data["variants"].items(), strict=True):
        width = 4.5 if name == "BatchNorm" else 1.4  # torch's lies on it
        axes.plot(*found["curve"].values(), **style, markersize=4, markevery=6, linewidth=width, label=name)
    axes.axhline(data["goals"][0], color="#3c4650", linewidth=0.8, label="the baseline's best")
    legend_below(made, axes)
    return made


def findings(data: dict) -> list[Finding]:
    variants = data["variants"]

    def sooner(one: str, other: str) -> list[bool]:
        pairs = zip(variants[one]["steps"], variants[other]["steps"], strict=True)
        return [a is not None and (b is None or a < b) for a, b in pairs]

    at_same = sooner("BatchNorm", "baseline")
    faster = sooner("BatchNorm x5", "BatchNorm")
    control = sooner("baseline x5", "baseline")
    sigmoid, plain_sigmoid = variants["BatchNorm x5, sigmoid"]["maxima"], variants["baseline, sigmoid"]["maxima"]
    trains = [a > 0.8 and b < 0.8 for a, b in zip(sigmoid, plain_sigmoid, strict=True)]
    of = len(data["seeds"])
    best = max(variants, key=lambda name: median(variants[name]["maxima"]))
    return [
        finding(
            "With BatchNorm, at the same learning rate, the baseline's best accuracy is reached in fewer steps.",
            at_same,
            f"At the same learning rate BatchNorm reached the baseline's best accuracy "
            f"({percent(median(data['goals']))}) {_after(variants['BatchNorm']['steps'])}, the baseline "
            f"{_after(variants['baseline']['steps'])}.",
        ),
        finding(
            "BatchNorm bears larger learning rates, and gains by them.",
            faster,
            f"At five times the rate BatchNorm was there {_after(variants['BatchNorm x5']['steps'])}, at thirty times "
            f"{_after(variants['BatchNorm x30']['steps'])}, and the baseline itself, at five times the rate, "
            f"{_after(variants['baseline x5']['steps'])} (sooner than at its own in {sum(control)} of {of} seeds); the "
            f"highest accuracy was that of {best}, {percent(median(variants[best]['maxima']))}.",
        ),
        finding(
            "BatchNorm makes a network of sigmoids trainable that is not without it.",
            trains,
            f"With sigmoids, BatchNorm at five times the rate reached {percents(sigmoid)}, and the baseline "
            f"{percents(plain_sigmoid)}.",
        ),
    ]


EXPERIMENT = Experiment(
    "a",
    "learning_rates",
    "BatchNorm, learning rates and activations",
    f"A network of {DEPTH} convolutions on 8x8 images of digits ({STEPS} steps of {BATCH}), with and without BatchNorm "
    "behind each convolution, after the experiments of Ioffe and Szegedy (2015).",
    90,
    lambda scale: len(VARIANTS) * len(scale.seeds),
    run,
    figure,
    table,
    findings,
)
