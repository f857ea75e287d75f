"""Masks of many kinds, and samples of the channel layers with them."""

import pytest
import torch
from cases import CASES, SHAPE
from fusion_cases import fused

import normops.functional as F


def lengths(shape):
    """Of sequences that are padded behind; one of them is not, and one is nothing else."""
    sizes = [shape[-1], 0, *torch.randint(2, shape[-1] + 1, (shape[0],)).tolist()][: shape[0]]
    return F.length_mask(sizes, shape[-1]).view(shape[0], *[1] * (len(shape) - 3), shape[-1])


def random(shape):
    return torch.rand(shape[0], *shape[2:]) < 0.6


def holes(shape):
    """Long runs with something between them."""
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    mask.view(shape[0], -1)[:, 20:23] = False
    mask[0, ..., 0] = False
    return mask


def common(shape):
    """Broadcast over samples, and over rows of positions."""
    return torch.rand(shape[-1]) < 0.7


MASKS = {"lengths": lengths, "random": random, "holes": holes, "common": common}
each_mask = pytest.mark.parametrize("kind", MASKS)
FEW = ["batch_norm_training", "batch_norm_eval", "instance_norm", "group_norm_3"]
few_cases = pytest.mark.parametrize("case", [case for case in CASES if case.name in FEW], ids=lambda case: case.name)


def masked(case, kind, shape=SHAPE, device="cpu", activation=None, residual=False, **kwargs):
    torch.manual_seed(1)
    sample = fused(case, activation, residual, shape, device=device, **kwargs)
    sample.fixed["mask"] = MASKS[kind](shape).to(device)
    return sample


def positions(sample):
    """The mask in the shape of the input."""
    x = sample.input
    return sample.fixed["mask"].expand(x.shape[0], *x.shape[2:]).unsqueeze(1).expand(x.shape)
