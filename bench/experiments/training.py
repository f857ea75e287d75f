"""The one training loop of the experiments, and the images that they train on."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.digits import digits

TRAIN_IMAGES = 1000  # the other 797 are to test with: one of them is an eighth of a percent


@dataclass
class Data:
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits_data() -> Data:
    (images, labels), (test_images, test_labels) = digits("cpu", TRAIN_IMAGES)
    return Data(images, labels, test_images, test_labels)


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches without end: an epoch after the other, each in another order, all batches of one size."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for batch in torch.randperm(count, generator=generator).split(size):
            if len(batch) == size:
                yield batch


@dataclass
class Curve:
    """What a training has shown."""

    steps: list[int] = field(default_factory=list)  # after which the accuracy was taken
    accuracy: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of all steps
    diverged: bool = False

    def reached(self, accuracy: float) -> int | None:
        return next((step for step, value in zip(self.steps, self.accuracy, strict=True) if value >= accuracy), None)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: tuple[Tensor, ...], labels: Tensor) -> float:
    """In evaluation; the model is back in training afterwards."""
    model.eval()
    correct = (model(*inputs).argmax(dim=1) == labels).double().mean().item()
    model.train()
    return correct


def train(
    model: nn.Module,
    steps: int,
    batch: Callable[[int], tuple[tuple[Tensor, ...], Tensor]],
    test: tuple[tuple[Tensor, ...], Tensor],
    *,
    learning_rate: float,
    momentum: float = 0.9,
    every: int = 0,
    after_backward: Callable[[int], None] = lambda step: None,
) -> Curve:
    """SGD on the cross entropy. ``batch(step)`` gives the inputs of the model and the labels; the accuracy is taken
    every so many steps and at the end. A loss that is not finite any more ends the training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    curve = Curve()
    model.train()
    for step in range(1, steps + 1):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(*inputs), labels)
        if not math.isfinite(loss.item()):
            curve.diverged = True
            break
        loss.backward()
        after_backward(step)
        optimizer.step()
        curve.losses.append(loss.item())
        if every and step % every == 0 and step != steps:
            curve.steps.append(step)
            curve.accuracy.append(accuracy(model, *test))
    curve.steps.append(len(curve.losses))
    curve.accuracy.append(accuracy(model, *test))
    return curve
