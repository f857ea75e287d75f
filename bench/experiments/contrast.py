"""d: contrast and style: what InstanceNorm does not see of an image, and images in each other's statistics."""

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import normops
from bench.experiments.study import STYLES, Experiment, Finding, Scale, finding, legend, median, panels, percent, plain
from bench.experiments.training import accuracy, batches, digits_data, train
from bench.tables import make_table

CONTRASTS = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0]
BRIGHTNESS = 0.3  # of the range of values, added along with the contrast
STEPS, BATCH, WIDTH, LEARNING_RATE = 240, 50, 16, 0.1
PHOTOS = ["china.jpg", "flower.jpg"]
LAYERS = {
    "InstanceNorm": lambda: normops.InstanceNorm2d(WIDTH, affine=True),
    "GroupNorm": lambda: normops.GroupNorm(4, WIDTH),
    "BatchNorm": lambda: normops.BatchNorm2d(WIDTH),
    "none": nn.Identity,
}


def photo(name: str) -> Tensor:
    """(1, 3, H, W), between 0 and 1; every second pixel of the photograph."""
    return torch.tensor(load_sample_image(name)[::2, ::2] / 255, dtype=torch.float32).permute(2, 0, 1)[None]


def changed(image: Tensor, contrast: float) -> Tensor:
    """More or less contrast, and another brightness."""
    return contrast * image + BRIGHTNESS


def invariance() -> dict[str, list[float]]:
    """How far a layer's output on two photographs moves, in its own standard deviations, when the contrast does. The
    layers have no parameters, and no eps to speak of: that alone would depend on the contrast."""
    images = torch.cat([photo(name) for name in PHOTOS])
    layers = {
        "InstanceNorm": normops.InstanceNorm2d(3, eps=1e-12),
        "GroupNorm, one group": normops.GroupNorm(1, 3, eps=1e-12, affine=False),
        "BatchNorm": normops.BatchNorm2d(3, eps=1e-12, affine=False, track_running_stats=False),
        "none": nn.Identity(),
    }
    found = {}
    for name, layer in layers.items():
        before = layer(images)
        found[name] = []
        for contrast in CONTRASTS:
            # The first image alone is changed, as if it had been taken with another exposure.
            after = layer(torch.cat([changed(images[:1], contrast), images[1:]]))
            found[name].append(((after - before).square().mean().sqrt() / before.std()).item())
    return found


def network(layer: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, stride in ((1, 1), (WIDTH, 2), (WIDTH, 1)):
        # The border is repeated: zeros would have a contrast of their own.
        convolution = nn.Conv2d(inputs, WIDTH, 3, stride, padding=1, bias=layer == "none", padding_mode="replicate")
        layers += [convolution, LAYERS[layer](), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def run(scale: Scale, tick) -> dict:
    data = digits_data()
    accuracies: dict[str, list[list[float]]] = {}
    for layer in LAYERS:
        accuracies[layer] = []
        for seed in scale.seeds:
            torch.manual_seed(seed)
            order = batches(len(data.images), BATCH, seed)

            def batch(_, order=order):
                index = next(order)
                return (data.images[index],), data.labels[index]

            model = network(layer)
            test = (data.test_images,), data.test_labels
            train(model, scale(STEPS), batch, test, learning_rate=LEARNING_RATE)
            accuracies[layer].append(
                [accuracy(model, (changed(data.test_images, one),), data.test_labels) for one in CONTRASTS]
            )
            tick()
    return {"seeds": list(scale.seeds), "invariance": invariance(), "accuracy": accuracies}


def table(data: dict):
    caption = (
        f"accuracy in percent on images not trained on, of changed contrast and {BRIGHTNESS:g} brighter, trained on "
        f"unchanged ones; median of {len(data['seeds'])} seeds"
    )
    made = make_table("", "layer", *(f"x{contrast:g}" for contrast in CONTRASTS), caption=caption)
    for layer, found in data["accuracy"].items():
        made.add_row(layer, *(f"{100 * median(values):.1f}" for values in zip(*found, strict=True)))
    return made


def transferred(content: Tensor, style: Tensor) -> Tensor:
    """AdaIN: the content in the style's mean and standard deviation of each channel."""
    std, mean = torch.std_mean(style, dim=(0, 2, 3), correction=0)
    return normops.functional.instance_norm(content, weight=std, bias=mean)


def figure(data: dict):
    made, axes = panels(8, "Contrast and style", columns=2, size=(4.5, 2.6))
    photos = [photo(name) for name in PHOTOS]
    dark, bright = changed(photos[0], 0.25), changed(photos[0], 0.7)
    layer = normops.InstanceNorm2d(3, eps=1e-12)
    shown = [
        ("photograph", photos[0]),
        ("contrast x0.25", dark),
        ("its InstanceNorm", 0.5 + layer(photos[0]) / 5),
        ("InstanceNorm of contrast x0.25", 0.5 + layer(dark) / 5),
        ("another photograph", photos[1]),
        ("the first in its statistics", transferred(bright, photos[1])),
    ]
    for panel, (title, image) in zip(axes, shown, strict=False):
        panel.imshow(image[0].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="bilinear")
        panel.set_title(title, fontsize=9)
        panel.set_axis_off()
    plain(axes[6], "output moved by (of its std)", "contrast of one photograph", "")
    plain(axes[7], "accuracy of networks", "contrast of all images", "")
    for style, (name, values) in zip(STYLES, data["invariance"].items(), strict=False):
        # That of one group lies on InstanceNorm's, which is drawn first, and wider.
        width = 4 if name == "InstanceNorm" else 1.3
        heights = [max(value, 1e-8) for value in values]
        axes[6].plot(CONTRASTS, heights, **style, markersize=1.5 + width, linewidth=width, label=name)
    for style, (name, found) in zip(STYLES, data["accuracy"].items(), strict=False):
        middles = [median(values) for values in zip(*found, strict=True)]
        axes[7].plot(CONTRASTS, middles, **style, markersize=4, linewidth=1.3, label=name)
    axes[6].set_yscale("log")
    for panel in axes[6:]:
        panel.set_xscale("log")
        panel.set_xticks([0.1, 1, 10], ["x0.1", "x1", "x10"])
        legend(panel)
    return made


def findings(data: dict) -> list[Finding]:
    moved = data["invariance"]
    instance, others = moved["InstanceNorm"], [name for name in moved if name != "InstanceNorm"]
    largest = {name: max(values) for name, values in moved.items()}
    unchanged = CONTRASTS.index(1.0)
    drops = {layer: [run[unchanged] - min(run) for run in found] for layer, found in data["accuracy"].items()}
    content, style = (photo(name) for name in PHOTOS)
    made = transferred(content, style)
    errors = [
        ((made.std((2, 3), correction=0) - style.std((2, 3), correction=0)).abs().max()).item(),
        (made.mean((2, 3)) - style.mean((2, 3))).abs().max().item(),
    ]
    return [
        finding(
            "InstanceNorm's output does not change, but for rounding, when an image's contrast and brightness do.",
            [value < 1e-4 for value in instance],
            f"Over contrasts from x{CONTRASTS[0]:g} to x{CONTRASTS[-1]:g} InstanceNorm's output moved by at most "
            f"{largest['InstanceNorm']:.0e} of its standard deviation; "
            + ", ".join(f"{name} by {largest[name]:.1g}" for name in others)
            + ".",
        ),
        finding(
            "A network with InstanceNorm keeps its accuracy on images of another contrast, and one with BatchNorm does "
            "not.",
            [one < 0.02 and other > 0.02 for one, other in zip(drops["InstanceNorm"], drops["BatchNorm"], strict=True)],
            "At the worst contrast accuracy fell by "
            + ", ".join(f"{100 * median(values):.1f} points ({layer})" for layer, values in drops.items())
            + f"; InstanceNorm began at {percent(median(run[unchanged] for run in data['accuracy']['InstanceNorm']))}.",
        ),
        finding(
            "InstanceNorm with another image's statistics as parameters (AdaIN) gives an image those statistics.",
            [error < 1e-3 for error in errors],
            f"The first photograph in the statistics of the second had its channels' standard deviations to within "
            f"{errors[0]:.0e} and their means to within {errors[1]:.0e}, of values between 0 and 1.",
        ),
    ]


EXPERIMENT = Experiment(
    "d",
    "contrast",
    "Contrast and style",
    "Two photographs, one of them in other contrasts and brightnesses; networks of three convolutions trained on 8x8 "
    "images of digits and tested on images of other contrast; and AdaIN (Huang and Belongie, 2017) on pixels.",
    35,
    lambda scale: len(LAYERS) * len(scale.seeds),
    run,
    figure,
    table,
    findings,
)
