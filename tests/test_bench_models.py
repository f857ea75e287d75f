"""The benchmark of models: what the parts of a step are, a whole step, and two runs compared."""

import dataclasses

import pytest
import torch
from torch import nn

for library in "matplotlib", "rich", "sklearn":
    pytest.importorskip(library)

# ruff: noqa: E402
from bench_fakes import Watch

from bench import worker
from bench.models import measure, report, zoo
from bench.models.copies import copying
from bench.models.step import part_of, sort_events


class TestParts:
    """Of a model's step."""

    @dataclasses.dataclass
    class Event:
        name: str
        self_cpu_time_total: float = 1e6
        sequence_nr: int = -1
        cpu_children: list = dataclasses.field(default_factory=list)

    def node(self, name, number, *accumulated):
        inner = self.Event(name, sequence_nr=number, cpu_children=[self.Event(f"aten::{name.lower()}")])
        children = [inner, *accumulated]
        return self.Event(f"autograd::engine::evaluate_function: {name}", 0, number, children)

    def test_norms_are_what_their_layers_call(self):
        layer = self.Event("norm forward", cpu_children=[self.Event("aten::add"), self.Event("aten::relu")])
        parts = sort_events([layer, self.Event("aten::add"), self.Event("aten::relu_")], [])
        assert parts["norm forward"] == 2 and parts["adds"] == parts["activations"] == 1
        assert sum(parts.values()) == 4  # the time of the range itself is the profiler's

    def test_backward_goes_to_the_layer_that_made_the_node(self):
        events = [self.node("MulBackward0", 4), self.node("MulBackward0", 7)]
        parts = sort_events(events, [(3, 5)])
        assert parts["norm backward"] == 2 and parts["other"] == 2

    def test_gradients_of_a_residual_are_adds(self):
        add = self.Event("aten::add_")
        parts = sort_events([self.node("NormBackward0", 1, add)], [(1, 2)])
        assert parts["adds"] == 1 and parts["norm backward"] == 2
        # A norm of two operators that read the input accumulates once for itself.
        parts = sort_events([self.node("PowBackward0", 1, add), self.node("MulBackward0", 2, add)], [(1, 3)])
        assert parts["adds"] == 1 and parts["norm backward"] == 5

    @pytest.mark.parametrize(
        ("operator", "part"),
        [
            ("aten::threshold_backward", "activations"),
            ("aten::add_", "adds"),
            ("aten::addmm", "convolutions and products"),
            ("aten::mkldnn_convolution", "convolutions and products"),
            ("aten::mul", "other"),
            ("normops::batch_norm", "norm forward"),
            ("normops::_channel_norm_backward", "norm backward"),
            ("normops::_channel_norm_backward_", "norm backward"),
        ],
    )
    def test_operators(self, operator, part):
        assert part_of(operator) == part


def test_whole_step_of_a_model(monkeypatch):
    tiny = zoo.Model(
        "tiny",
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: {"input": torch.randn(2, 3, 8, 8)},
    )
    monkeypatch.setattr(measure, "MODELS", [tiny])
    monkeypatch.setattr(worker.station(), "watch", Watch())
    timing = measure.time_model("tiny", "default", 0.0, compiled=False)
    assert timing.agrees and timing.rounds >= measure.MIN_ROUNDS
    assert {"norm forward", "norm backward", "norm", "activations", "step"} <= set(timing.parts)
    assert timing.parts["norm"].torch < timing.parts["step"].torch
    assert {"norm forward", "norm backward", "norm"} == set(timing.floor)
    assert timing.fusions == 1 and {"norms, activations, adds", "step"} == set(timing.fused)
    # The output of each layer but the last, and gradients.
    assert timing.peak_bytes["torch"] >= 3 * 2 * 8 * 6 * 6 * 4


def test_copies_instead_of_norms():
    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(4))
    layers = copying(model, ["1"])
    x = torch.randn(8, 4, requires_grad=True)
    y = layers(x)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    gradient = torch.randn(8, 4)
    y.backward(gradient)
    assert torch.equal(x.grad, gradient)
    assert not torch.equal(model(x), x)  # which has its norm still
    assert list(layers.state_dict()) == list(model.state_dict())  # for models that ask a norm for its weight


def run(norm_speedups, seed=0):
    """As in JSON: of each model the norms are so much faster, to within 3 %, and the step is as torch's."""
    random = torch.Generator().manual_seed(seed)

    def comparison(speedup):
        noise = (0.03 * torch.randn((), generator=random)).exp().item()
        return {"speedup": speedup * noise, "error": 0.01}

    models = [
        {
            "model": f"model {index}",
            "malloc": "default",
            "doubts": [],
            "parts": {"norm": comparison(speedup), "step": comparison(1.0)},
            "null": {"norm": comparison(1.0), "step": comparison(1.0)},
        }
        for index, speedup in enumerate(norm_speedups)
    ]
    return {"environment": {}, "models": models}


class TestChanges:
    speedups = (1.2, 1.5, 2.0, 2.5, 3.0, 1.0, 1.1, 1.9)

    @pytest.mark.parametrize("seed", range(10))
    def test_runs_of_the_same(self, seed):
        found = report.changes(run(self.speedups, 2 * seed + 1), run(self.speedups, 2 * seed + 2))
        assert found.verdict.startswith("No difference") and len(found.cases) == 16

    def test_one_model_slower(self):
        slower = [value / (2 if index == 3 else 1) for index, value in enumerate(self.speedups)]
        found = report.changes(run(self.speedups, 1), run(slower, 2))
        assert [change.of for change in found.cases if change.is_one] == ["model 3 norm, default malloc"]

    def test_doubtful_models_and_missing_parts(self):
        old, new = run(self.speedups, 1), run(self.speedups, 2)
        new["models"][0]["doubts"] = ["why"]
        del old["models"][1]["parts"]["norm"]
        assert len(report.changes(old, new).cases) == 13
        assert "Nothing to compare" in report.changes(old, run([])).verdict
