"""b: accuracy against batch size, for layers whose statistics depend on the batch and for those whose do not."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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
    plain,
)
from bench.experiments.training import Curve, accuracy, batches, digits_data, train
from bench.tables import make_table

SIZES = [64, 32, 16, 8, 4, 2, 1]
# What a training takes at least. For the images alone, large batches would take too few steps to learn anything.
IMAGES, STEPS = 2400, 200
WIDTH, GROUPS, RANKS = 16, 4, 2
LEARNING_RATE = 0.1  # for batches of 64, and in proportion for smaller ones
SYNC = "SyncBatchNorm, 2 ranks"
LAYERS = {
    "BatchNorm": lambda side: normops.BatchNorm2d(WIDTH),
    "GroupNorm": lambda side: normops.GroupNorm(GROUPS, WIDTH),
    "LayerNorm": lambda side: normops.LayerNorm((WIDTH, side, side)),
    "InstanceNorm": lambda side: normops.InstanceNorm2d(WIDTH, affine=True),
    SYNC: lambda side: normops.SyncBatchNorm(WIDTH),
}


def network(layer: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, stride, side in ((1, 1, 8), (WIDTH, 2, 4), (WIDTH, 1, 4)):
        layers += [nn.Conv2d(inputs, WIDTH, 3, stride, padding=1, bias=False), LAYERS[layer](side), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def _steps(size: int, scale: Scale) -> int:
    return max(scale(STEPS), scale(IMAGES) // size)


def train_alone(layer: str, size: int, seed: int, scale: Scale) -> Curve:
    data = digits_data()
    torch.manual_seed(seed)
    order = batches(len(data.images), size, seed)

    def batch(_):
        index = next(order)
        return (data.images[index],), data.labels[index]

    test = (data.test_images,), data.test_labels
    return train(network(layer), _steps(size, scale), batch, test, learning_rate=LEARNING_RATE * size / SIZES[0])


def _train_part(rank: int, store: str, tasks: list[tuple[int, int]], scale: Scale, output: str) -> None:
    """A rank: trains on its half of every batch, and adds its gradients to those of the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    data, found = digits_data(), {}
    test = (data.test_images,), data.test_labels
    for size, seed in tasks:
        torch.manual_seed(seed)
        model = network(SYNC)
        order = batches(len(data.images), size, seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE * size / SIZES[0], momentum=0.9)
        for _ in range(_steps(size, scale)):
            # Of a batch of one image the second rank has none: it takes part all the same.
            index = next(order).tensor_split(RANKS)[rank]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.images[index]), data.labels[index], reduction="sum") / size
            loss.backward()
            gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            dist.all_reduce(gradients)
            for parameter, gradient in zip(
                model.parameters(),
                gradients.split([parameter.numel() for parameter in model.parameters()]),
                strict=True,
            ):
                parameter.grad.copy_(gradient.view_as(parameter))
            optimizer.step()
        found[size, seed] = accuracy(model, *test)
    if rank == 0:
        torch.save(found, output)
    dist.destroy_process_group()


def train_on_ranks(tasks: list[tuple[int, int]], scale: Scale) -> dict[tuple[int, int], float]:
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "found")
        mp.spawn(_train_part, (str(Path(folder) / "store"), tasks, scale, output), nprocs=RANKS)
        return torch.load(output)


def run(scale: Scale, tick) -> dict:
    found = {}
    for layer in LAYERS:
        if layer == SYNC:
            continue
        rows = {}
        for size in SIZES:
            curves = []
            for seed in scale.seeds:
                curves.append(train_alone(layer, size, seed, scale))
                tick()
            rows[size] = {
                "accuracy": [curve.accuracy[-1] for curve in curves],
                "diverged": any(curve.diverged for curve in curves),
            }
        found[layer] = rows
    tasks = [(size, seed) for size in SIZES for seed in scale.seeds]
    joined = train_on_ranks(tasks, scale)
    for _ in tasks:
        tick()
    found[SYNC] = {
        size: {"accuracy": [joined[size, seed] for seed in scale.seeds], "diverged": False} for size in SIZES
    }
    return {
        "seeds": list(scale.seeds),
        "steps": {str(size): _steps(size, scale) for size in SIZES},
        "layers": {layer: {str(size): row for size, row in rows.items()} for layer, rows in found.items()},
    }


def _accuracy(data: dict, layer: str, size: int) -> list[float]:
    return data["layers"][layer][str(size)]["accuracy"]


def table(data: dict):
    caption = (
        f"accuracy on images not trained on, in percent; median of {len(data['seeds'])} seeds; batch size of "
        "SyncBatchNorm: of both ranks together"
    )
    made = make_table("", "layer", *map(str, SIZES), caption=caption)
    made.add_row("steps", *map(str, data["steps"].values()))
    for layer in data["layers"]:
        made.add_row(layer, *(f"{100 * median(_accuracy(data, layer, size)):.1f}" for size in SIZES))
    return made


def figure(data: dict):
    made, (axes,) = panels(1, "Accuracy against batch size", size=(7.6, 4.4))
    plain(axes, "median, and least to most of the seeds", "images in a batch", "accuracy")
    for style, layer in zip(STYLES, data["layers"], strict=False):
        values = [_accuracy(data, layer, size) for size in SIZES]
        middles = [median(value) for value in values]
        # SyncBatchNorm lies on BatchNorm, which is drawn first, and wider.
        axes.plot(SIZES, middles, **style, markersize=5, linewidth=5 if layer == "BatchNorm" else 1.5, label=layer)
        axes.fill_between(
            SIZES, [min(value) for value in values], [max(value) for value in values], color=style["color"], alpha=0.12
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, map(str, SIZES))
    axes.invert_xaxis()
    legend_below(made, axes)
    return made


def findings(data: dict) -> list[Finding]:
    smallest, largest = SIZES[-2], SIZES[1]  # of one image there is no batch to speak of

    def drop(layer: str) -> list[float]:
        pairs = zip(_accuracy(data, layer, largest), _accuracy(data, layer, smallest), strict=True)
        return [a - b for a, b in pairs]

    others = [layer for layer in data["layers"] if layer not in ("BatchNorm", SYNC)]
    worse = [batch > max(drop(layer)[number] for layer in others) for number, batch in enumerate(drop("BatchNorm"))]
    drops = ", ".join(f"{layer} {100 * median(drop(layer)):+.1f}" for layer in others)
    one = {layer: median(_accuracy(data, layer, 1)) for layer in data["layers"]}
    alone = [
        min(_accuracy(data, layer, 1)[number] for layer in others) > value
        for number, value in enumerate(_accuracy(data, "BatchNorm", 1))
    ]
    sync, joined, halves = [], [], []
    for size in SIZES[:-1]:
        rows = zip(
            _accuracy(data, SYNC, size),
            _accuracy(data, "BatchNorm", size),
            _accuracy(data, "BatchNorm", size // 2),
            strict=True,
        )
        for ours, whole, half in rows:
            sync.append(abs(ours - whole) <= abs(ours - half))
            joined.append(abs(ours - whole))
            halves.append(abs(ours - half))
    return [
        finding(
            f"From batches of {largest} images to batches of {smallest}, BatchNorm loses more accuracy than the layers "
            "that do not look at the batch.",
            worse,
            f"From batches of {largest} to {smallest} images BatchNorm lost {100 * median(drop('BatchNorm')):+.1f} "
            f"points of accuracy (a minus is a gain); {drops}.",
        ),
        finding(
            "With one image in a batch every other layer does better than BatchNorm.",
            alone,
            "With single images "
            + ", ".join(f"{layer} reached {percent(value)}" for layer, value in one.items())
            + ".",
        ),
        finding(
            "SyncBatchNorm over two ranks with half a batch each does what BatchNorm does with the whole batch.",
            sync,
            f"SyncBatchNorm's accuracy was {100 * median(joined):.1f} points (median over sizes and seeds) from that "
            f"of BatchNorm with the whole batch, and {100 * median(halves):.1f} from that with half of it.",
        ),
    ]


EXPERIMENT = Experiment(
    "b",
    "batch_size",
    "Accuracy against batch size",
    f"Three convolutions on 8x8 images of digits; at least {IMAGES} images and {STEPS} steps, learning rate in "
    "proportion to the batch, after the experiments of Wu and He (2018); SyncBatchNorm in two processes with half of "
    "each batch.",
    450,
    lambda scale: len(LAYERS) * len(SIZES) * len(scale.seeds),
    run,
    figure,
    table,
    findings,
)
