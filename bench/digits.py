"""Trains two small networks on real images, each with torch's layers and with those of normops, step by step."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import timer  # waits for the device

import normops
from bench.disturbance import Watch

TRAIN_IMAGES = 1437
TEST_IMAGES = 1797 - TRAIN_IMAGES
BATCH = 64
IMAGES_PER_EPOCH = TRAIN_IMAGES // BATCH * BATCH


class ConvNet(nn.Sequential):
    def __init__(self):
        def block(inputs, outputs, stride):
            return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

        super().__init__(
            *block(1, 32, stride=1),
            *block(32, 64, stride=2),
            *block(64, 64, stride=1),
            *block(64, 128, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


class EncoderBlock(nn.Module):
    # nn.TransformerEncoderLayer would not do: in evaluation its fast path does not call the LayerNorm modules.
    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Sees an 8x8 image as 16 patches of 2x2."""

    def __init__(self, width=64, heads=4, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.positions = nn.Parameter(0.5 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(dim=1))


# Rounding lets any two runs in float32 drift apart, at a pace set by the learning rate and by Adam where it divides one
# rounding error by another. These settings keep the drift small against what a wrong gradient would do.
NETWORKS = {
    "ConvNet": (ConvNet, partial(torch.optim.SGD, lr=3e-3, momentum=0.9, nesterov=True)),
    "Transformer": (Transformer, partial(torch.optim.AdamW, lr=2e-3, eps=1e-5)),
}


class Trainee:
    """A model with its optimizer, and the record of its training."""

    def __init__(self, model: nn.Module, make_optimizer):
        self.model = model
        self.optimizer = make_optimizer(model.parameters())
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = timer()
        self.optimizer.zero_grad()
        # Smoothed labels keep the loss away from zero, where relative differences mean nothing.
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=0.1)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(timer() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def correct(self, images: Tensor, labels: Tensor) -> int:
        return (self.model.eval()(images).argmax(dim=1) == labels).sum().item()


@dataclass
class Run:
    losses: list[float]  # of each step
    epoch_losses: list[float]
    correct: int  # of the images to test with
    step_seconds: float

    @classmethod
    def of(cls, trainee: Trainee, epochs: int, test: tuple[Tensor, Tensor]):
        epoch_losses = torch.tensor(trainee.losses, dtype=torch.float64).view(epochs, -1).mean(dim=1).tolist()
        return cls(trainee.losses, epoch_losses, trainee.correct(*test), statistics.median(trainee.seconds))


@dataclass
class Training:
    network: str
    device: str
    torch: Run
    normops: Run
    speedup: float
    step_difference: float  # the largest, relative, between the losses
    epoch_difference: float
    doubts: list[str] = field(default_factory=list)  # signs that the machine was not left alone


def digits(device: str, train_images: int = TRAIN_IMAGES) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The images, standardized, and their labels: those to train on and those to test with."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor((pixels - pixels.mean()) / pixels.std(), dtype=torch.float32).view(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].to(device), torch.tensor(labels)[order].to(device)
    return (images[:train_images], labels[:train_images]), (images[train_images:], labels[train_images:])


def _largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def train(
    network: str, device: str, epochs: int, seed: int = 0, on_epoch: Callable[[], None] = lambda: None
) -> Training:
    make_model, make_optimizer = NETWORKS[network]
    (images, labels), test = digits(device)
    torch.manual_seed(seed)
    model = make_model().to(device)
    ours = Trainee(normops.convert(copy.deepcopy(model)), make_optimizer)
    theirs = Trainee(model, make_optimizer)
    watch, disturbed = Watch(), []
    for _ in range(epochs):
        watch.begin()
        for batch in torch.randperm(TRAIN_IMAGES)[:IMAGES_PER_EPOCH].to(device).split(BATCH):
            for trainee in (theirs, ours):
                trainee.step(images[batch], labels[batch])
        signs, _ = watch.end()
        disturbed += signs[:1]
        on_epoch()
    ours, theirs = (Run.of(trainee, epochs, test) for trainee in (ours, theirs))
    return Training(
        network,
        device,
        theirs,
        ours,
        theirs.step_seconds / ours.step_seconds,
        _largest_difference(ours.losses, theirs.losses),
        _largest_difference(ours.epoch_losses, theirs.epoch_losses),
        # Medians over all steps bear with a disturbance of a few.
        [f"in {len(disturbed)} of {epochs} epochs {disturbed[0]}"] if len(disturbed) > epochs / 4 else [],
    )
