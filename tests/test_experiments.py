"""The experiments, in a fraction of their length: figures, tables and sentences come of whatever was measured."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from bench.experiments import EXPERIMENTS, learning_rates, running_statistics, sharing
from bench.experiments import command as experiments_command
from bench.experiments.padding import Network, draw
from bench.experiments.study import Finding, Scale
from bench.experiments.training import Curve, batches, digits_data

TINY = Scale((0,), 0.01)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("key", EXPERIMENTS)
def test_experiment(key, tmp_path):
    """It ticks as often as it says, survives JSON, and says three things of what it found."""
    experiment, ticks = EXPERIMENTS[key], []
    data = json.loads(json.dumps(experiment.run(TINY, lambda: ticks.append(1))))
    assert len(ticks) == experiment.ticks(TINY)
    assert experiment.table(data).row_count > 2
    findings = experiment.findings(data)
    assert len(findings) in (2, 3)
    for one in findings:
        assert 0 <= one.agreed <= one.of and one.of > 0
        assert one.claim.endswith(".") and one.says.endswith(".") and any(map(str.isdigit, one.says)), one
    experiment.figure(data).savefig(tmp_path / "figure.png", dpi=40)


def test_command(tmp_path, capsys):
    assert experiments_command.main(["--only", "f", "--quick", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "experiments.json").read_text())
    kept = results["experiments"]["f"]
    assert (tmp_path / kept["figure"]).stat().st_size > 10_000
    text = (tmp_path / "experiments.md").read_text()
    assert all(one["says"] in text and one["claim"] in text for one in kept["findings"])
    assert kept["figure"] in text and results["environment"]["torch"].split()[0] in text


def test_sets_are_those_of_the_layer():
    """And no experiment f if the layer mixed something up: a norm over the wrong axis is found out."""
    for name, (ours, theirs, statistic) in sharing.LAYERS.items():
        assert sharing.partition(ours()) == sharing._expected(statistic) == sharing.partition(theirs()), name
    ours, _, _ = sharing.LAYERS["InstanceNorm"]
    _, _, statistic = sharing.LAYERS["BatchNorm"]
    assert sharing.partition(ours()) != sharing._expected(statistic)
    assert sharing.partition(lambda x: x.cumsum(0)) is None


def test_sets_that_touch_have_different_greys():
    for name, (ours, _, _) in sharing.LAYERS.items():
        numbers = np.array(sharing.partition(ours())).reshape(sharing.SHAPE)
        greys = sharing._shades(numbers)
        for axis in range(3):
            for one, other in pairwise(np.moveaxis(numbers, axis, 0)):
                for a, b in zip(one.flat, other.flat, strict=True):
                    assert a == b or greys[a] != greys[b], name


class TestOutcomes:
    """Sentences follow the data, whichever way they go."""

    def data(self, baseline, others):
        def variant(steps, best):
            return {"steps": [steps], "maxima": [best], "final": [best], "diverged": [False], "curve": {}}

        names = list(learning_rates.VARIANTS)
        found = {name: variant(*others) for name in names} | {"baseline": variant(*baseline)}
        found["baseline, sigmoid"] = variant(None, 0.1)
        return {"seeds": [0], "goals": [baseline[1]], "variants": found}

    def test_held(self):
        first, _, third = learning_rates.findings(self.data((100, 0.9), (50, 0.95)))
        assert first.verdict == "held" and "after 50 steps, the baseline after 100" in first.says
        assert third.verdict == "held" and "10.0%" in third.says

    def test_did_not_hold(self):
        first, second, third = learning_rates.findings(self.data((100, 0.9), (None, 0.5)))
        assert {one.verdict for one in (first, second, third)} == {"did not hold"}
        assert "after never steps" not in first.says and "never" in first.says

    def test_verdicts(self):
        verdicts = [Finding("", agreed, 3, "").verdict for agreed in range(4)]
        assert verdicts == ["did not hold", "did not hold", "held in 2 of 3", "held"]

    def test_momentum(self):
        def one(mean):
            return {"mean": [mean], "std": [0.1], "early": [0.5], "early_batch": [0.9], "final": [0.9]}

        data = {"seeds": [0], "shown": 5, "momenta": {"0.1": one(0.3), "0.01": one(0.2), "None": one(0.1)}}
        assert running_statistics.findings(data)[0].verdict == "held"
        data["momenta"]["None"] = one(0.4)
        assert running_statistics.findings(data)[0].verdict == "did not hold"


def test_training_that_diverges_ends():
    from bench.experiments.training import train

    model = torch.nn.Linear(2, 3)
    data = (torch.randn(4, 2),), torch.tensor([0, 1, 2, 0])
    curve = train(
        model, 50, lambda step: ((data[0][0] * (1e30 if step == 3 else 1),), data[1]), data, learning_rate=1e9
    )
    assert curve.diverged and 1 <= len(curve.losses) < 50


def test_curve():
    curve = Curve([5, 10, 15], [0.2, 0.8, 0.7])
    assert curve.reached(0.75) == 10 and curve.reached(0.9) is None


def test_batches_are_whole_and_repeatable():
    order, again = batches(10, 4, seed=3), batches(10, 4, seed=3)
    for _ in range(5):
        one = next(order)
        assert len(one) == 4 and torch.equal(one, next(again))


def test_sequences():
    data = digits_data()
    drawn = draw(data.images, data.labels, 20, torch.Generator().manual_seed(0))
    assert not drawn.rows[~drawn.valid].any() and drawn.rows[drawn.valid].abs().sum() > 0
    lengths = drawn.valid.sum(dim=1)
    assert lengths.min() >= 8 and lengths.max() > 3 * lengths.min()
    # A network with LayerNorm takes no notice of padding.
    longer = drawn.padded(2)
    model = Network("LayerNorm").eval()
    torch.testing.assert_close(model(longer.rows, longer.valid), model(drawn.rows, drawn.valid), rtol=1e-4, atol=1e-5)
