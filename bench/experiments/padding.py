"""c: sequences of very different lengths, padded to one: what padding does to BatchNorm, and what a mask mends."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normops
from bench.experiments.study import STYLES, Experiment, Finding, Scale, finding, legend, median, panels, percents, plain
from bench.experiments.training import Curve, digits_data, train
from bench.tables import make_table

LONGEST, ROWS, PIXELS = 10, 8, 8  # images in a sequence, rows in an image, pixels in a row
STEPS, BATCH, TEST, EVERY = 160, 32, 500, 40
MORE = 3  # times the length, for the training with more padding
WIDTH, LEARNING_RATE = 48, 0.05
MASKED = "BatchNorm with a mask"


def has_mask() -> bool:
    return "mask" in inspect.signature(normops.functional.batch_norm).parameters


def layers() -> list[str]:
    return ["none", "LayerNorm", "BatchNorm", *([MASKED] if has_mask() else [])]


@dataclass
class Sequences:
    """Images of the same digit by different hands, row after row; the rest of the longest is zeros."""

    rows: Tensor  # (N, LONGEST * ROWS, PIXELS)
    valid: Tensor  # (N, LONGEST * ROWS), True where there is a row
    labels: Tensor

    def padded(self, times: int) -> "Sequences":
        """With as many times the length, all of it padding."""
        more = (times - 1) * self.rows.shape[1]
        rows, valid = nn.functional.pad(self.rows, (0, 0, 0, more)), nn.functional.pad(self.valid, (0, more))
        return Sequences(rows, valid, self.labels)


def draw(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Sequences:
    """Lengths are spread evenly on a logarithmic scale: most sequences are short, and padded many times over."""
    wanted = torch.randint(10, (count,), generator=generator)
    numbers = (LONGEST ** torch.rand(count, generator=generator)).round().long()
    rows = torch.zeros(count, LONGEST * ROWS, PIXELS)
    for sequence, (label, number) in enumerate(zip(wanted.tolist(), numbers.tolist(), strict=True)):
        of_label = (labels == label).nonzero().flatten()
        chosen = of_label[torch.randint(len(of_label), (number,), generator=generator)]
        # Noise, or one image would tell as much as twelve.
        noise = 1.5 * torch.randn(number, 1, ROWS, PIXELS, generator=generator)
        rows[sequence, : number * ROWS] = (images[chosen] + noise).reshape(-1, PIXELS)
    valid = torch.arange(LONGEST * ROWS) < ROWS * numbers[:, None]
    return Sequences(rows, valid, wanted)


class Network(nn.Module):
    """Two convolutions along the sequence, each with a norm, and the mean over what is no padding."""

    def __init__(self, layer: str):
        super().__init__()
        self.layer = layer
        self.convolutions = nn.ModuleList(nn.Conv1d(inputs, WIDTH, 5, padding=2) for inputs in (PIXELS, WIDTH))
        make = {"none": nn.Identity, "LayerNorm": lambda: normops.LayerNorm(WIDTH)}
        self.norms = nn.ModuleList(make.get(layer, lambda: normops.BatchNorm1d(WIDTH))() for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, rows: Tensor, valid: Tensor) -> Tensor:
        x = rows.transpose(1, 2)
        mask = valid[:, None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(x * mask)
            if self.layer == "LayerNorm":
                x = norm(x.transpose(1, 2)).transpose(1, 2)
            elif self.layer == MASKED:
                x = norm(x, mask=valid)
            else:
                x = norm(x)
            x = torch.relu(x)
        return self.head((x * mask).sum(dim=2) / mask.sum(dim=2))


@torch.no_grad()
def shift(model: Network, test: Sequences) -> dict[str, float]:
    """How far the statistics of the first norm's input are, with padding, from those of what is no padding: mean in
    standard deviations, and ratio of the standard deviations. Medians over the channels."""
    x = model.convolutions[0]((test.rows * test.valid[..., None]).transpose(1, 2)).transpose(1, 2)
    whole, real = x.reshape(-1, WIDTH), x[test.valid]
    distance = (whole.mean(0) - real.mean(0)).abs() / real.std(0)
    return {"mean": distance.median().item(), "std": (whole.std(0) / real.std(0)).median().item()}


@torch.no_grad()
def evaluate(model: Network, test: Sequences) -> tuple[float, float]:
    """Loss and accuracy."""
    logits = model.eval()(test.rows, test.valid)
    loss = nn.functional.cross_entropy(logits, test.labels).item()
    return loss, (logits.argmax(dim=1) == test.labels).double().mean().item()


def trained(layer: str, seed: int, steps: int, test: Sequences, times: int = 1) -> tuple[Network, Curve]:
    """The same sequences for every layer, in batches that are so many times as long as the longest."""
    data = digits_data()
    torch.manual_seed(seed)
    model, generator = Network(layer), torch.Generator().manual_seed(seed)

    def batch(_):
        drawn = draw(data.images, data.labels, BATCH, generator).padded(times)
        return (drawn.rows, drawn.valid), drawn.labels

    known = (test.rows, test.valid), test.labels
    return model, train(model, steps, batch, known, learning_rate=LEARNING_RATE, every=EVERY)


def run(scale: Scale, tick) -> dict:
    data, steps = digits_data(), scale(STEPS)
    test = draw(data.test_images, data.test_labels, TEST, torch.Generator().manual_seed(1000))
    found: dict[str, dict] = {}
    for layer in layers():
        rows: dict[str, list] = {name: [] for name in ("loss", "accuracy", "more", "shift")}
        for seed in scale.seeds:
            model, curve = trained(layer, seed, steps, test)
            loss, accuracy = evaluate(model, test)
            rows["loss"].append(loss)
            rows["accuracy"].append(accuracy)
            rows["shift"].append(shift(model, test))
            if seed == scale.seeds[0]:
                rows["curve"] = {"steps": curve.steps, "accuracy": [round(value, 4) for value in curve.accuracy]}
            if "BatchNorm" in layer:  # to the others padding is nothing
                rows["more"].append(evaluate(trained(layer, seed, steps, test, MORE)[0], test)[1])
            tick()
        found[layer] = rows
    return {"seeds": list(scale.seeds), "padding": 1 - test.valid.double().mean().item(), "layers": found}


def table(data: dict):
    caption = (
        f"on sequences not trained on, {100 * data['padding']:.0f}% of them padding; median of {len(data['seeds'])} "
        f"seeds (least to most). More padding: trained with {MORE} times the length. Statistics: those of the first "
        "norm's input with its padding, beside those without"
    )
    columns = ["loss", "accuracy", "more padding", "mean off by", "std times"]
    made = make_table("", "layer", *columns, caption=caption)
    for layer, found in data["layers"].items():
        made.add_row(
            layer,
            f"{median(found['loss']):.3f}",
            percents(found["accuracy"]),
            percents(found["more"]) if found["more"] else "",
            f"{median(one['mean'] for one in found['shift']):.2f} std",
            f"{median(one['std'] for one in found['shift']):.2f}",
        )
    return made


def figure(data: dict):
    made, (left, right) = panels(2, "Padded sequences", columns=2, size=(4.6, 3.9))
    plain(left, "accuracy during training, first seed", f"steps of {BATCH} sequences", "accuracy")
    plain(right, f"after training, and with {MORE} times the length", "", "accuracy", "y")
    for number, (style, (layer, found)) in enumerate(zip(STYLES, data["layers"].items(), strict=False)):
        left.plot(*found["curve"].values(), **style, markersize=4, linewidth=1.5, label=layer)
        for offset, name, hatch in ((-0.2, "accuracy", ""), (0.2, "more", "////")):
            if not found[name]:
                continue
            bar = {"color": style["color"], "edgecolor": "white", "hatch": hatch}
            right.bar(number + offset, median(found[name]), 0.36, **bar)
            right.plot([number + offset] * 2, [min(found[name]), max(found[name])], color="#3c4650", linewidth=1)
    right.set_xticks(range(len(data["layers"])), [name.replace(" with ", "\nwith ") for name in data["layers"]])
    right.set_ylim(max(0.0, right.get_ylim()[0]), 1)
    right.text(0.02, 0.97, "hatched: trained with more padding", transform=right.transAxes, fontsize=8, va="top")
    legend(left, loc="lower right")
    return made


def findings(data: dict) -> list[Finding]:
    found = data["layers"]
    plain_bn = found["BatchNorm"]
    off = [one["mean"] for one in plain_bn["shift"]]
    squeezed = [one["std"] for one in plain_bn["shift"]]
    made = [
        finding(
            "Padding moves BatchNorm's statistics: the mean by more than a tenth of a standard deviation, or the "
            "standard deviation by more than a tenth.",
            [one > 0.1 or abs(other - 1) > 0.1 for one, other in zip(off, squeezed, strict=True)],
            f"With {100 * data['padding']:.0f}% padding the mean that BatchNorm sees was off by {median(off):.2f} "
            f"standard deviations (median of the channels), and the standard deviation {median(squeezed):.2f} times "
            "that of the data.",
        )
    ]
    if MASKED in found:
        masked = found[MASKED]
        pairs = list(zip(masked["accuracy"], plain_bn["accuracy"], strict=True))
        made += [
            finding(
                "BatchNorm with a mask is more accurate than BatchNorm without.",
                [one > other for one, other in pairs],
                f"BatchNorm reached {percents(plain_bn['accuracy'])} and, with a mask, {percents(masked['accuracy'])}; "
                f"LayerNorm {percents(found['LayerNorm']['accuracy'])}, no norm {percents(found['none']['accuracy'])}.",
            ),
            finding(
                f"With {MORE} times the length, all of it padding, BatchNorm loses accuracy, more than a mask lets it.",
                [
                    a - b > abs(d - c)
                    for a, b, c, d in zip(
                        plain_bn["accuracy"], plain_bn["more"], masked["accuracy"], masked["more"], strict=True
                    )
                ],
                f"Padded to {MORE} times the length BatchNorm came to {percents(plain_bn['more'])} instead of "
                f"{percents(plain_bn['accuracy'])}, and with a mask to {percents(masked['more'])} instead of "
                f"{percents(masked['accuracy'])}.",
            ),
        ]
    else:
        made += [
            finding(
                "LayerNorm, which looks at no padding, is more accurate than BatchNorm.",
                [a > b for a, b in zip(found["LayerNorm"]["accuracy"], plain_bn["accuracy"], strict=True)],
                f"BatchNorm reached {percents(plain_bn['accuracy'])}, LayerNorm "
                f"{percents(found['LayerNorm']['accuracy'])}, no norm {percents(found['none']['accuracy'])}.",
            ),
            finding(
                f"With {MORE} times the length, all of it padding, BatchNorm trains worse.",
                [b < a - 0.005 for a, b in zip(plain_bn["accuracy"], plain_bn["more"], strict=True)],
                f"Padded to {MORE} times the length BatchNorm came to {percents(plain_bn['more'])} instead of "
                f"{percents(plain_bn['accuracy'])}.",
            ),
        ]
    return made


EXPERIMENT = Experiment(
    "c",
    "padding",
    "Padded sequences of very different lengths",
    f"Sequences of 1 to {LONGEST} noisy images of one digit by different hands, a row of pixels at each position, "
    "padded with zeros to the longest; two convolutions along the sequence, and the mean over what is no padding.",
    60,
    lambda scale: len(layers()) * len(scale.seeds),
    run,
    figure,
    table,
    findings,
)
