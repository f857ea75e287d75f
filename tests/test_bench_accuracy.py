"""The commands of the benchmark that measure errors and memory."""

import itertools
import json
import math
from importlib.util import find_spec

import pytest
import reference
import torch
from torch import nn

for library in "matplotlib", "rich", "sklearn":
    pytest.importorskip(library)

# ruff: noqa: E402
from bench import exact, exactness, memory, mistakes, sweep, verdict
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
    more = ["--layouts", "contiguous", "--sweeps", "constant", "precise", "--no-mistakes", "--output", str(tmp_path)]
    assert exactness.main([*what, *more]) == 0
    written = json.loads((tmp_path / "accuracy.json").read_text())
    assert len(written["errors"]) == 5
    found = [sweep.Found.of(record) for record in written["sweeps"]]
    assert {(one.point.sweep, one.point.function, one.point.dtype) for one in found} == {
        ("constant", "rms_norm", "bfloat16")
    }
    assert {one.point.constant for one in found} > {0.0, 3e38}
    out = " ".join(capsys.readouterr().out.split())
    assert "rms_norm" in out and "normops is nowhere worse than twice torch" in out
    assert "![accuracy.png](accuracy.png)" in (tmp_path / "accuracy.md").read_text()


def test_what_is_too_large_ends_with_a_status(tmp_path, monkeypatch, capsys):
    layer_norm = sweep.F.layer_norm
    monkeypatch.setattr(sweep.F, "layer_norm", lambda *args, **kwargs: layer_norm(*args, **kwargs) * 1.001)
    what = ["--functions", "layer_norm", "--activations", "relu", "--dtypes", "float32", "--no-mistakes"]
    assert exactness.main([*what, "--sweeps", "constant", "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "Worse than twice torch: output of layer_norm 64x512 float32 contiguous, constant 0" in out
    assert "Worse than twice torch: output of Cell(function='layer_norm', activation='relu'" in " ".join(out.split())


def test_too_large():
    def found(normops, torch, floor=1.0):
        point = sweep.Point("mean", 1.0, "layer_norm", (2, 3), "float32")
        return sweep.Found(point, {"dx": normops}, {"dx": torch}, {"dx": floor})

    fine = [found(1, 0), found(2, 1), found(20, 10), found(20, math.inf)]
    assert verdict.worse(fine) == []
    wrong = [found(1.1, 0.1), found(21, 10), found(math.inf, math.inf), found(math.inf, 0)]
    assert len(verdict.worse(wrong)) == 4
    assert [len(verdict.worse([one])) for one in (*fine, *wrong)] == [0] * 4 + [1] * 4
    assert "21, torch's 10, 1 allowed" in verdict.worse([*fine, wrong[1], found(2.1, 1)])[0]  # the worst first


def test_floor():
    """Half a unit of the result, and roundings of the arithmetic, of which sums have more."""
    assert verdict.floor(torch.float32, "dx") == 4.5 * 2**-23
    assert verdict.floor(torch.float32, "dbias") == 12.5 * 2**-23
    assert verdict.floor(torch.bfloat16, "dx") == 2**-8 + 2**-21
    assert verdict.floor(torch.float64, "output") == 4.5 * 2**-52
    point = sweep.Point("mean", 100.0, "layer_norm", (2, 3), "float64", mean=100.0)
    assert sweep.allowed(point, "dx", 1.0) == 104.5 * 2**-52
    point = sweep.Point("denormal", 1e-40, "layer_norm", (2, 3), "float32")
    assert sweep.allowed(point, "dx", 2.0**-140) == 2.0**-9


def point_of(function, **more):
    shape = (5, 12) if function in sweep.ROW_FUNCTIONS else (3, 8, 5)
    return sweep.Point("mean", 1.0, function, shape, "float64", mean=1.0, **more)


@pytest.mark.parametrize("function", sweep.FUNCTIONS)
def test_the_formula_is_that_of_the_reference(function):
    point = point_of(function)
    form = exact.form(function, point.shape, point.groups)
    tensors = sweep._tensors(point, math.prod(form.parameters))
    known = exact.normalize(function, form, {name: exact.numbers(one) for name, one in tensors.items()}, point.eps)
    for name, value in sweep._results(reference, point, tensors).items():
        torch.testing.assert_close(torch.from_numpy(known.values[name].reshape(value.shape)), value)
        assert 0 < known.sizes[name] < 100
    assert exact.error(known.values["output"] + 1e-3, known.values["output"], math.inf) == pytest.approx(1e-3)


@pytest.mark.skipif(not find_spec("mpmath"), reason="needs mpmath, which torch comes with")
@pytest.mark.parametrize("function", sweep.FUNCTIONS)
def test_digits(function):
    """50 of them: what float64 has is a rounding away, and much more than a rounding of theirs."""
    point = point_of(function)
    form = exact.form(function, point.shape, point.groups)
    tensors = sweep._tensors(point, math.prod(form.parameters))
    coarse, fine = (
        exact.normalize(function, form, {name: exact.numbers(one, precise) for name, one in tensors.items()}, point.eps)
        for precise in (False, True)
    )
    for name, values in fine.values.items():
        error = exact.error(exact.numbers(torch.from_numpy(coarse.values[name]), True), values, math.inf)
        assert error < 100 * 2**-52 * fine.sizes[name], name
    assert any(values.flat[0] != float(values.flat[0]) for values in fine.values.values())


def test_what_is_not_a_number_is_an_error():
    import numpy as np

    values = np.array([1.0, 2.0])
    for wrong in (math.nan, math.inf, -math.inf):
        assert exact.error(np.array([1.0, wrong]), values, math.inf) == math.inf
    assert exact.error(np.array([1.0, math.inf]), values, 1.5) == 0.0  # the dtype does not have it
    assert exact.error(np.array([1.5, math.inf]), values, 1.5) == 0.5


def test_points():
    """What is swept, from one end to the other."""
    ends = {}
    for point in sweep.points(sweep.SWEEPS, sweep.FUNCTIONS, exactness.DTYPES, sweep.LAYOUTS):
        here = ends.setdefault((point.sweep, point.dtype), {})
        here.setdefault(point.function, set()).add(point.value)
        assert math.prod(point.shape) <= 2**24
        assert point.function != "group_norm" or point.shape[1] % point.groups == 0
    assert all({0, 1e6} <= values for values in ends["mean", "float32"].values())
    assert all({1e-30, 1, 3e38} <= values for values in ends["size", "bfloat16"].values())
    assert all(2**24 in values for values in ends["length", "float32"].values())
    assert all(10**6 in values for values in ends["rows", "bfloat16"].values())
    for sweep_of, least in (("mean", 7), ("size", 6), ("length", 6), ("denormal", 6), ("constant", 6), ("precise", 7)):
        assert len(ends[sweep_of, "float32"]) >= least
    few = sweep.points(["layout"], ["batch_norm"], ["float32"], ["contiguous"])
    assert [point.layout for point in few] == ["contiguous", "transposed", "positions first", "sliced"]


def test_layouts_are_what_they_are_called():
    x = torch.randn(2, 3, 5, 1)
    strides = {layout: sweep._lay_out(x, layout).stride() for layout in sweep.LAYOUTS}
    assert strides["transposed"] == (15, 1, 3, 1) and strides["sliced"] == (30, 10, 2, 1)
    assert strides["positions first"][0] == 1 and strides["contiguous"] == x.stride()
    assert all(torch.equal(sweep._lay_out(x, layout), x) for layout in sweep.LAYOUTS)


def test_without_mpmath(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    what = ["--functions", "rms_norm", "--activations", "none", "--dtypes", "float32", "--no-mistakes"]
    assert exactness.main([*what, "--sweeps", "precise", "--output", str(tmp_path)]) == 0
    assert "mpmath is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("mistake", mistakes.MISTAKES, ids=lambda mistake: mistake.name)
def test_mistakes(mistake):
    """Normops does not make them; whether torch still does is not for us to say."""
    assert len(mistake.lines.splitlines()) == 3
    assert mistake.error(sweep.F) < 1e-5


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
