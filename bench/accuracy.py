"""The errors of normops and of torch, both against torch in float64."""

import copy
from dataclasses import dataclass

import torch

import normops
from bench.cases import Case
from bench.measure import Passes, largest_errors, reference_results


@dataclass
class Accuracy:
    case: Case
    normops: dict[str, float]
    torch: dict[str, float]


def measure_accuracy(case: Case) -> Accuracy:
    layer = case.make_layer()
    x, dy = case.make_data()
    references = reference_results(layer, x, dy, torch.float64)
    ours = Passes(normops.convert(copy.deepcopy(layer)), x, dy).results()
    theirs = Passes(layer, x, dy).results()
    return Accuracy(case, largest_errors(ours, references), largest_errors(theirs, references))
