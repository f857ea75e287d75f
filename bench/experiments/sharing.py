"""f: which elements share a statistic, asked of the layers: change one element, and see which outputs move."""

import numpy as np
import torch
from torch import Tensor, nn

import normops
from bench.charts import BACKWARD, NORMOPS
from bench.experiments.study import Experiment, Finding, Scale, finding
from bench.tables import make_table

SHAPE = SAMPLES, CHANNELS, POSITIONS = 3, 6, 4
GROUPS = 3
BUMP = 10.0


def _last(layer: nn.Module):
    """Over the channels of each position: (N, C, S) with the channels last, as rows."""
    return lambda x: layer(x.transpose(1, 2).contiguous()).transpose(1, 2)


# Each with the same layer of torch, where there is one, and with the number of the statistic of element (n, c, s).
LAYERS = {
    "BatchNorm": (
        lambda: normops.BatchNorm1d(CHANNELS, affine=False),
        lambda: nn.BatchNorm1d(CHANNELS, affine=False),
        lambda n, c, s: c,
    ),
    "InstanceNorm": (
        lambda: normops.InstanceNorm1d(CHANNELS),
        lambda: nn.InstanceNorm1d(CHANNELS),
        lambda n, c, s: n * CHANNELS + c,
    ),
    f"GroupNorm, G = {GROUPS}": (
        lambda: normops.GroupNorm(GROUPS, CHANNELS),
        lambda: nn.GroupNorm(GROUPS, CHANNELS),
        lambda n, c, s: n * GROUPS + c // (CHANNELS // GROUPS),
    ),
    "LayerNorm of a sample": (
        lambda: normops.LayerNorm((CHANNELS, POSITIONS)),
        lambda: nn.LayerNorm((CHANNELS, POSITIONS)),
        lambda n, c, s: n,
    ),
    "GroupNorm, G = C": (
        lambda: normops.GroupNorm(CHANNELS, CHANNELS),
        lambda: nn.GroupNorm(CHANNELS, CHANNELS),
        lambda n, c, s: n * CHANNELS + c,
    ),
    "GroupNorm, G = 1": (
        lambda: normops.GroupNorm(1, CHANNELS),
        lambda: nn.GroupNorm(1, CHANNELS),
        lambda n, c, s: n,
    ),
    "LayerNorm of tokens": (
        lambda: _last(normops.LayerNorm(CHANNELS)),
        lambda: _last(nn.LayerNorm(CHANNELS)),
        lambda n, c, s: n * POSITIONS + s,
    ),
    "RMSNorm of tokens": (
        lambda: _last(normops.RMSNorm(CHANNELS)),
        lambda: _last(nn.RMSNorm(CHANNELS)),
        lambda n, c, s: n * POSITIONS + s,
    ),
}
IDENTITIES = {"GroupNorm, G = C": "InstanceNorm", "GroupNorm, G = 1": "LayerNorm of a sample"}


@torch.no_grad()
def partition(layer) -> list[int] | None:
    """The number of the set of each element, in the order of memory: elements are in one set if changing one moves the
    output of the other. None if that makes no sets."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    rows = []
    for index in range(x.numel()):
        bumped = x.clone()
        bumped.view(-1)[index] += BUMP
        rows.append(((layer(bumped) - before).abs() > 1e-6).flatten())
    moves = torch.stack(rows)
    numbers: dict[tuple[int, ...], int] = {}
    sets = [numbers.setdefault(tuple(row.nonzero().flatten().tolist()), len(numbers)) for row in moves]
    same = torch.tensor(sets)
    return sets if torch.equal(moves, same[:, None] == same) else None


def _expected(statistic) -> list[int]:
    numbers: dict[int, int] = {}
    indices = np.ndindex(*SHAPE)
    return [numbers.setdefault(statistic(*index), len(numbers)) for index in indices]


@torch.no_grad()
def _distance(one, other) -> float:
    x: Tensor = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    return (one(x) - other(x)).abs().max().item()


def run(scale: Scale, tick) -> dict:
    found = {}
    for name, (ours, theirs, statistic) in LAYERS.items():
        sets = partition(ours())
        found[name] = {
            "sets": sets,
            "as_in_the_table": sets == _expected(statistic),
            "as_torch": sets == partition(theirs()),
            "from_torch": _distance(ours(), theirs()),
        }
        tick()
    distances = {one: _distance(LAYERS[one][0](), LAYERS[other][0]()) for one, other in IDENTITIES.items()}
    return {"shape": SHAPE, "layers": found, "identities": distances}


def _sets(found: dict) -> tuple[int, int]:
    """How many statistics, and over how many elements each."""
    numbers = found["sets"]
    return len(set(numbers)), len(numbers) // len(set(numbers))


def table(data: dict):
    caption = (
        f"of an input of {SAMPLES} samples, {CHANNELS} channels and {POSITIONS} positions, found by changing each "
        "element; beside torch: the largest difference of the outputs"
    )
    columns = ["statistics", "elements of each", "beside torch"]
    made = make_table("", "layer", *columns, "as in the table", "sets as torch's", caption=caption)
    for name, found in data["layers"].items():
        if found["sets"] is None:
            made.add_row(name, "none", "", f"{found['from_torch']:.0e}", "no", "no")
            continue
        yes = ("yes" if found[what] else "no" for what in ("as_in_the_table", "as_torch"))
        made.add_row(name, *map(str, _sets(found)), f"{found['from_torch']:.0e}", *yes)
    return made


def figure(data: dict):
    from matplotlib.figure import Figure

    names = list(data["layers"])
    made = Figure(figsize=(2.4 * 4, 2.7 * -(-len(names) // 4)), layout="constrained")
    made.suptitle("Which elements share a statistic", fontsize=12, fontweight="bold")
    for number, name in enumerate(names, start=1):
        axes = made.add_subplot(-(-len(names) // 4), 4, number, projection="3d")
        _draw(axes, data["layers"][name]["sets"])
        axes.set_title(name, fontsize=10, y=0.98)
    made.text(
        0.5,
        -0.01,
        "Dark: the elements whose outputs move when the marked corner (first sample, first channel, last position) is "
        "changed.\nThe other sets are in shades of grey, neighbours in different ones.",
        ha="center",
        va="top",
        fontsize=9,
    )
    return made


def _shades(numbers: np.ndarray) -> dict[int, str]:
    """A grey for each set, other than those of the sets that it touches."""
    touches: dict[int, set[int]] = {number: set() for number in numbers.flat}
    for axis in range(numbers.ndim):
        sides = np.moveaxis(numbers, axis, 0)
        for one, other in zip(sides[:-1].flat, sides[1:].flat, strict=True):
            touches[one] |= {other} - {one}
            touches[other] |= {one} - {other}
    shades = ["#f1f3f5", "#c8d0d8", "#9aa6b2", "#dfe4e9"]
    chosen: dict[int, str] = {}
    for number in sorted(touches):
        taken = {chosen.get(other) for other in touches[number]}
        chosen[number] = next(shade for shade in shades if shade not in taken)
    return chosen


def _draw(axes, sets: list[int] | None) -> None:
    """A block of N by C by S cubes: positions go up, channels to the right, samples to the back."""
    blocks = np.ones((CHANNELS, SAMPLES, POSITIONS), dtype=bool)
    numbers = np.zeros(SHAPE, dtype=int) if sets is None else np.array(sets).reshape(SHAPE)
    marked = numbers[0, 0, POSITIONS - 1]
    shades = _shades(numbers)
    colours = np.empty(blocks.shape, dtype=object)
    for n, c, s in np.ndindex(*SHAPE):
        number = numbers[n, c, s]
        colours[c, n, s] = NORMOPS if number == marked else shades[number]
    colours[0, 0, POSITIONS - 1] = BACKWARD
    axes.voxels(blocks, facecolors=colours, edgecolor="#6b7782", linewidth=0.4, shade=False)
    axes.set_box_aspect((CHANNELS, SAMPLES, POSITIONS))
    axes.view_init(elev=24, azim=-60)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_zticks([])
    axes.set_xlabel("C", fontsize=8, labelpad=-12)
    axes.set_ylabel("N", fontsize=8, labelpad=-12)
    axes.text2D(0.02, 0.5, "S", fontsize=8, transform=axes.transAxes)  # the axis itself is on the far side
    for pane in (axes.xaxis, axes.yaxis, axes.zaxis):
        pane.pane.set_visible(False)
        pane.line.set_color("none")


def findings(data: dict) -> list[Finding]:
    layers = data["layers"]
    same = {
        one: layers[one]["sets"] == layers[other]["sets"] and data["identities"][one] < 1e-6
        for one, other in IDENTITIES.items()
    }
    right = [found["as_in_the_table"] for found in layers.values()]
    counts = ", ".join(
        "{} {} of {}".format(name, *_sets(found)) for name, found in layers.items() if found["sets"] is not None
    )
    return [
        finding(
            "Every layer shares its statistics among the elements that the table says.",
            right,
            f"{sum(right)} of {len(right)} layers had the sets of the table; of {np.prod(SHAPE)} elements they made: "
            f"{counts} (number of statistics, elements of each).",
        ),
        finding(
            "GroupNorm with as many groups as channels is InstanceNorm, and with one group LayerNorm of the sample.",
            list(same.values()),
            f"{sum(same.values())} of {len(same)} pairs had the same sets and outputs that are equal but for rounding; "
            + ", ".join(
                f"{one} differed from {IDENTITIES[one]} by {far:.0e}" for one, far in data["identities"].items()
            )
            + ".",
        ),
        finding(
            "Torch's layers share their statistics among the same elements.",
            [found["as_torch"] for found in layers.values()],
            f"{sum(found['as_torch'] for found in layers.values())} of {len(layers)} layers had the same sets as "
            f"torch's, and no output was farther from torch's than "
            f"{max(found['from_torch'] for found in layers.values()):.0e}.",
        ),
    ]


EXPERIMENT = Experiment(
    "f",
    "sharing",
    "Which elements share a statistic",
    "Layers of the library are given one input, and the same with one element changed; outputs that move share a "
    "statistic with that element. The picture shows what moved.",
    5,
    lambda scale: len(LAYERS),
    run,
    figure,
    table,
    findings,
)
