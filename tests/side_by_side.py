"""``python tests/side_by_side.py [SECONDS]``: one training with torch's layers, with those of normops, and fused.

All see the same images, with fresh noise, and begin with the same weights. Any two trainings in float32 drift apart,
however right both are, as training amplifies the differences of their roundings. How far is found out by controls:
torch's layers again, whose weights are moved by one rounding, up or down at random, after every step. That is more than
what roundings within a layer can do to them: these reach the weights through a gradient and a learning rate. The layers
of normops may drift three times as far from torch's as any two of torch's have drifted from each other up to then, and
as far as a loss is rounded. That this tells right from wrong is shown by a training whose eps is a tenth too large,
which has to leave that band.

Prints a table of windows of steps; the status is 1 if losses did not stay together, or those of the wrong one did.
"""

import copy
import itertools
import sys
import time

import torch
from torch.nn import functional as F

import normops
from bench.digits import BATCH, NETWORKS, Trainee, digits

CONTROLS = 3
BAND = 3.0
LONGEST = 256  # steps of a window, which double up to here: the first steps differ by roundings alone
NOISE = 0.5  # of images with standard deviation 1: no two batches are the same, and the loss stays away from zero


def spoil(model):
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps *= 1.1
    return model


@torch.no_grad()
def nudge(model, generator):
    """Moves every weight by one unit in its last place, or leaves it."""
    for parameter in model.parameters():
        up = torch.randint(-1, 2, parameter.shape, generator=generator)
        parameter.copy_(torch.nextafter(parameter, parameter + up))


def trainees(network):
    make_model, make_optimizer = NETWORKS[network]
    torch.manual_seed(0)
    model = make_model()
    models = {
        "torch": copy.deepcopy(model),
        "converted": normops.convert(copy.deepcopy(model)),
        "fused": normops.convert(copy.deepcopy(model), fuse=True),
        "wrong": spoil(copy.deepcopy(model)),
        **{f"control {i}": copy.deepcopy(model) for i in range(CONTROLS)},
    }
    return {name: Trainee(model, make_optimizer) for name, model in models.items()}


class Drift:
    """How far apart the losses of a window are, and whether that is within the band so far."""

    def __init__(self):
        self.band, self.left = 0.0, set()

    def add(self, window, losses):
        """``losses`` are means over the window, by the name of the trainee."""
        alike = [loss for name, loss in losses.items() if name == "torch" or name.startswith("control")]
        drifts = [abs(a - b) for a, b in itertools.combinations(alike, 2)]
        self.band = max(self.band, BAND * max(*drifts, torch.finfo(torch.float32).eps * losses["torch"]))
        apart = {name: abs(losses[name] - losses["torch"]) for name in ("converted", "fused", "wrong")}
        self.left |= {name for name, value in apart.items() if value > self.band}
        columns = [window, f"{losses['torch']:.5f}", *(f"{value:.1e}" for value in (*apart.values(), self.band))]
        print(f"| {' | '.join(columns)} |", flush=True)


@torch.no_grad()
def evaluation_loss(model, images, labels):
    loss = F.cross_entropy(model.eval()(images), labels, label_smoothing=0.1).item()
    model.train()
    return loss


def side_by_side(network, seconds):
    """The names of those whose losses left the band."""
    (images, labels), test = digits("cpu")
    by_name, drift = trainees(network), Drift()
    generators = {name: torch.Generator().manual_seed(i) for i, name in enumerate(by_name)}
    data = torch.Generator().manual_seed(0)
    print(f"\n| {network}, steps | torch's loss | converted | fused | wrong | band |\n|---|---|---|---|---|---|")
    end, begin, length = time.monotonic() + seconds, 0, 1
    while time.monotonic() < end:
        for _ in range(length):
            batch = torch.randint(len(images), (BATCH,), generator=data)
            noisy = images[batch] + NOISE * torch.randn(BATCH, 1, 8, 8, generator=data)
            for name, trainee in by_name.items():
                trainee.step(noisy, labels[batch])
                if name.startswith("control"):
                    nudge(trainee.model, generators[name])
        means = {name: sum(trainee.losses[begin:]) / length for name, trainee in by_name.items()}
        drift.add(f"{begin + 1} to {begin + length}", means)
        begin, length = begin + length, min(2 * length, LONGEST)
    drift.add("evaluation", {name: evaluation_loss(trainee.model, *test) for name, trainee in by_name.items()})
    correct = ", ".join(f"{name} {trainee.correct(*test)}" for name, trainee in by_name.items())
    print(f"\n{network}: {begin} steps; of {len(test[1])} images recognised: {correct}", flush=True)
    return drift.left


def main(seconds):
    torch.set_num_threads(1)  # the layers are small, and a second thread would wait for whatever else runs
    left = {network: side_by_side(network, seconds / len(NETWORKS)) for network in NETWORKS}
    for network, names in left.items():
        print(f"{network}: out of the band: {', '.join(sorted(names)) or 'none'}")
    return any(names != {"wrong"} for names in left.values())


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 600))
