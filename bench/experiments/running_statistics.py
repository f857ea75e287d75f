"""e: running statistics on their way to those of the data, and what it costs to evaluate before they are there."""

import copy

import torch
from torch import Tensor, nn

import normops
from bench.experiments.study import STYLES, Experiment, Finding, Scale, finding, legend, median, panels, percents, plain
from bench.experiments.training import accuracy, batches, digits_data, train
from bench.tables import make_table

MOMENTA: dict[str, float | None] = {"0.1": 0.1, "0.01": 0.01, "None": None}
SHOWN, BATCH = 600, 50  # batches that a layer is shown
EARLY = 25  # steps: a momentum of 0.01 has then brought a running mean a fifth of the way
STEPS, EVERY, WIDTH, LEARNING_RATE = 300, 25, 16, 0.1
BATCH_STATISTICS = "statistics of the batch"


def _errors(layer: nn.BatchNorm1d, mean: Tensor, var: Tensor) -> tuple[float, float]:
    """Of the running mean, in standard deviations, and of the running standard deviation, relative: root mean squares
    over the channels."""
    std = var.sqrt()
    off = ((layer.running_mean - mean) / std).square().mean().sqrt().item()
    return off, (layer.running_var.sqrt() / std - 1).square().mean().sqrt().item()


def approach(seed: int, shown: int) -> dict[str, dict[str, list[float]]]:
    """Layers that are shown batches of the 64 pixels of the digits, and do nothing else."""
    data = digits_data()
    pixels = data.images.flatten(1)
    pixels = pixels[:, pixels.std(0) > 0.05]  # a pixel that is always white has no statistics
    var, mean = torch.var_mean(pixels, dim=0)
    found = {}
    for name, momentum in MOMENTA.items():
        layer, order = normops.BatchNorm1d(pixels.shape[1], momentum=momentum), batches(len(pixels), BATCH, seed)
        errors = []
        with torch.no_grad():
            for _ in range(shown):
                layer(pixels[next(order)])
                errors.append(_errors(layer, mean, var))
        found[name] = {"mean": [error[0] for error in errors], "std": [error[1] for error in errors]}
    return found


def network(momentum: float | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, stride in ((1, 1), (WIDTH, 2), (WIDTH, 1)):
        convolution = nn.Conv2d(inputs, WIDTH, 3, stride, padding=1, bias=False)
        layers += [convolution, normops.BatchNorm2d(WIDTH, momentum=momentum), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def of_the_batch(model: nn.Module) -> nn.Module:
    """The same network, evaluated with the statistics of what it is given."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = layer.running_var = None
    return model


def trained(momentum: float | None, seed: int, steps: int) -> tuple[dict[str, list], tuple[float, float]]:
    """The course of the accuracy with running statistics, and that after `EARLY` steps: with them, and without."""
    data = digits_data()
    torch.manual_seed(seed)
    model, order = network(momentum), batches(len(data.images), BATCH, seed)
    test = (data.test_images,), data.test_labels
    early: list[tuple[float, float]] = []

    def batch(step: int):
        if step == min(EARLY, steps) + 1 or (step == steps and not early):
            early.append((accuracy(model, *test), accuracy(of_the_batch(model), *test)))
        index = next(order)
        return (data.images[index],), data.labels[index]

    curve = train(model, steps, batch, test, learning_rate=LEARNING_RATE, every=EVERY)
    return {"steps": curve.steps, "accuracy": curve.accuracy}, early[0]


def run(scale: Scale, tick) -> dict:
    shown, steps = scale(SHOWN, 10), scale(STEPS, 2)
    found: dict[str, dict] = {
        name: {"mean": [], "std": [], "early": [], "early_batch": [], "final": []} for name in MOMENTA
    }
    for seed in scale.seeds:
        for name, errors in approach(seed, shown).items():
            found[name]["mean"].append(errors["mean"][-1])
            found[name]["std"].append(errors["std"][-1])
            if seed == scale.seeds[0]:
                kept = sorted({round(shown ** (i / 59)) for i in range(60)})
                found[name]["course"] = {
                    "batches": kept,
                    **{what: [float(f"{values[i - 1]:.4g}") for i in kept] for what, values in errors.items()},
                }
        for name, momentum in MOMENTA.items():
            curve, (early, early_batch) = trained(momentum, seed, steps)
            found[name]["early"].append(early)
            found[name]["early_batch"].append(early_batch)
            found[name]["final"].append(curve["accuracy"][-1])
            if seed == scale.seeds[0]:
                found[name]["curve"] = curve
            tick()
    return {"seeds": list(scale.seeds), "shown": shown, "momenta": found}


def table(data: dict):
    caption = (
        f"errors after {data['shown']} batches of {BATCH}, of the mean in standard deviations, of the deviation itself "
        f"relative (root mean squares over channels); accuracy after {EARLY} steps of training, with running "
        f"statistics and with those of the images that are evaluated, and at the end; median of {len(data['seeds'])} "
        "seeds (least to most)"
    )
    columns = ["mean off by", "std off by", f"at step {EARLY}", "of the batch", "at the end"]
    made = make_table("", "momentum", *columns, caption=caption)
    for name, found in data["momenta"].items():
        made.add_row(
            name,
            f"{median(found['mean']):.4f}",
            f"{median(found['std']):.4f}",
            *(percents(found[what]) for what in ("early", "early_batch", "final")),
        )
    return made


def figure(data: dict):
    made, axes = panels(3, "Running statistics", size=(3.2, 3.4))
    titles = ["running mean: error in std", "running std: relative error", "accuracy in evaluation, first seed"]
    for panel, title in zip(axes, titles, strict=True):
        plain(panel, title, f"batches of {BATCH}", "")
    for style, (name, found) in zip(STYLES, data["momenta"].items(), strict=False):
        course = found["course"]
        for panel, what in zip(axes, ("mean", "std"), strict=False):
            panel.loglog(course["batches"], course[what], **style, markersize=3, markevery=5, label=f"momentum {name}")
        axes[2].plot(*found["curve"].values(), **style, markersize=4, label=f"momentum {name}")
    for panel in axes:
        legend(panel)
    return made


def findings(data: dict) -> list[Finding]:
    found = data["momenta"]
    means = {name: one["mean"] for name, one in found.items()}
    order = list(zip(means["0.1"], means["0.01"], means["None"], strict=True))
    cost = {
        name: [batch - running for batch, running in zip(one["early_batch"], one["early"], strict=True)]
        for name, one in found.items()
    }
    end = {name: one["final"] for name, one in found.items()}
    texts = {name: ", ".join(f"{100 * median(one):+.1f} ({key})" for key, one in cost.items()) for name in found}["0.1"]
    return [
        finding(
            "Of data that stay the same, a smaller momentum ends closer to the mean, and None, the average of all "
            "batches, closest.",
            [none < small < large for large, small, none in order],
            f"After {data['shown']} batches the running mean was off by "
            + ", ".join(f"{median(values):.4f} standard deviations (momentum {name})" for name, values in means.items())
            + ".",
        ),
        finding(
            "Early in training, evaluation with a momentum of 0.01 costs more accuracy than with 0.1.",
            [small > large for small, large in zip(cost["0.01"], cost["0.1"], strict=True)],
            f"After {EARLY} steps the statistics of the evaluated images gave more points of accuracy than the running "
            f"ones by {texts}.",
        ),
        finding(
            "At the end of training the choice of the momentum is within one point of accuracy.",
            [max(values) - min(values) <= 0.01 for values in zip(*end.values(), strict=True)],
            "At the end accuracy was "
            + ", ".join(f"{percents(values)} ({name})" for name, values in end.items())
            + ".",
        ),
    ]


EXPERIMENT = Experiment(
    "e",
    "running_statistics",
    "Running statistics in training and evaluation",
    f"BatchNorm layers with momenta of 0.1, 0.01 and None that are shown batches of {BATCH} images of digits, and "
    "networks of three convolutions trained with them.",
    30,
    lambda scale: len(MOMENTA) * len(scale.seeds),
    run,
    figure,
    table,
    findings,
)
