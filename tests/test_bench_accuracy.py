"""The commands of the benchmark that measure errors and memory."""

import itertools
import json

import pytest
import torch
from torch import nn

for library in "matplotlib", "rich", "sklearn":
    pytest.importorskip(library)

# ruff: noqa: E402
from bench import exactness, memory
from bench.models.zoo import Model
from normops import _activations


def test_cells():
    """Every combination, but for functions that add first: they have no activation, and always a residual."""
    activations = [None, "relu"]
    found = list(
        exactness.cells(["group_norm", "add_rms_norm"], activations, ["float32"], ["contiguous"], [0.0], [1.0])
    )
    assert [(c.function, c.activation, c.residual) for c in found] == [
        *(("group_norm", activation, residual) for activation in activations for residual in (False, True)),
        ("add_rms_norm", None, True),
    ]


@pytest.mark.parametrize("name", exactness.FUNCTIONS)
def test_errors_are_those_of_rounding(name):
    """Of the right size, and none of normops far above torch's; float64 has next to none."""
    for dtype, unit in (("float32", 2**-23), ("float64", 2**-52)):
        cell = exactness.Cell(name, None, name.startswith("add_"), dtype, "contiguous")
        errors = exactness.measure(cell)
        assert errors.normops.keys() == errors.torch.keys()
        for who in (errors.normops, errors.torch):
            assert all(error < 50 * unit for error in who.values()), errors


def test_a_wrong_result_shows(monkeypatch):
    cell = exactness.Cell("group_norm", "silu", True, "float32", "channels_last")
    assert max(exactness.measure(cell).normops.values()) < 1e-5
    group_norm = exactness.F.group_norm
    monkeypatch.setattr(exactness.F, "group_norm", lambda *args, **kwargs: group_norm(*args, **kwargs) * 1.001)
    errors = exactness.measure(cell)
    assert min(errors.normops.values()) > 1e-4 and max(errors.torch.values()) < 1e-5


def test_accuracy_command(tmp_path, capsys):
    what = ["--functions", "rms_norm", "add_rms_norm", "--activations", "none", "gelu", "--dtypes", "bfloat16"]
    assert exactness.main([*what, "--layouts", "contiguous", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "accuracy.json").read_text())
    assert len(written["errors"]) == 5
    assert "rms_norm" in capsys.readouterr().out


def test_all_activations_are_measured():
    options = exactness.parser().parse_args([])
    assert options.activations == ["none", *_activations.FUNCTIONS]


def test_memory_of_four_forms():
    """Of two layers with an activation behind them, which convolutions follow."""

    def build():
        layers = ((nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.LeakyReLU(0.1)) for _ in range(3))
        return nn.Sequential(*itertools.chain.from_iterable(layers))

    peaks = memory.measure(Model("small", build, lambda: {"input": torch.randn(4, 16, 32, 32)}))
    assert list(peaks) == memory.COLUMNS
    assert peaks["memory_efficient"] < peaks["fused"] < peaks["torch"]
