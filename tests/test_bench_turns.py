"""One case of the benchmark: what is called in which order, when the clock runs, and what is compared with what."""

import pytest

for library in "matplotlib", "rich", "sklearn":
    pytest.importorskip(library)

# ruff: noqa: E402
from bench_fakes import Clock, Watch
from torch.autograd.profiler import profile

import normops
from bench import fused, worker
from bench.cases import LAYOUTS, Case
from bench.disturbance import Rounds
from bench.measure import How, Passes, cold_turns, flushed, time_case, warm_turns
from bench.regimes import HEADLINE, Regime


class TestTurns:
    def test_order_alternates(self):
        called = []
        calls = {name: flushed(lambda name=name: called.append(name)) for name in "abc"}
        turn = cold_turns(calls, lambda: called.append("flush"))
        assert set(turn(0)) == set(turn(1)) == set("abc")
        assert "".join(called).replace("flush", "-") == "-a-b-c-c-b-a"

    @pytest.mark.parametrize("regime", ["cold", "warm"])
    def test_times_belong_to_their_calls(self, regime, monkeypatch):
        clock = Clock()
        monkeypatch.setattr("bench.measure.timer", clock)
        calls = {"short": lambda: clock.sleep(1.0), "long": lambda: clock.sleep(3.0)}
        cold = {name: flushed(call) for name, call in calls.items()}
        turn = warm_turns(calls) if regime == "warm" else cold_turns(cold, lambda: clock.sleep(100.0))
        for number in range(2):
            assert turn(number) == {"short": 1.0, "long": 3.0}

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_backward_in_a_network(self, layout):
        """Torch's layer makes a new gradient, that of normops writes it over what was handed to it."""
        case = Case("batch_norm", (2, 32, 5, 5), "float32", layout, "cpu")
        for layer, in_place in (case.make_layer(), False), (normops.convert(case.make_layer()), True):
            passes = Passes(layer, *case.make_data())
            with profile() as events:
                passes.backward_in_a_network(lambda: None)
            names = [event.name for event in events.function_events]
            assert ("normops::_channel_norm_backward_" in names) == in_place

    def test_clock_of_a_backward_in_a_network(self, monkeypatch):
        """It runs from when the gradient has been made and caches are emptied, until all is done."""
        clock, order = Clock(), []
        monkeypatch.setattr("bench.measure.timer", clock)

        def tell(what, seconds):
            order.append(what)
            clock.sleep(seconds)

        case = Case("add_layer_norm", (3, 32), "float32", "contiguous", "cpu")
        passes = Passes(case.make_layer(), *case.make_data())
        for product in passes._above[1:]:
            product.grad_fn.register_hook(lambda *_: tell("made", 10.0))
        for output in passes.output:
            output.grad_fn.register_hook(lambda *_: tell("done", 1.0))
        for _ in range(2):
            assert passes.backward_in_a_network(lambda: tell("flush", 100.0)) == 2.0
            assert order == ["made", "made", "flush", "done", "done"]
            order.clear()

    @pytest.mark.parametrize("null", [False, True])
    def test_case(self, null, monkeypatch):
        monkeypatch.setattr(worker.station(), "watch", Watch())
        case = Case("layer_norm", (16, 32), "float32", "contiguous", "cpu")
        regimes = [HEADLINE, Regime("warm", "default")]
        timings = time_case(case, regimes, How(seconds=0.0, rounds=2), null)
        assert [one.regime for one in timings] == regimes
        assert all(one.rounds == 2 and one.agrees for one in timings)

    @pytest.mark.parametrize(
        ("layer", "against"), [*((layer, "eager") for layer in fused.LAYERS), ("batch_norm_relu", "parts")]
    )
    def test_fused_case(self, layer, against, monkeypatch):
        monkeypatch.setattr(worker.station(), "watch", Watch())
        shape = (3, 32) if layer.startswith("add_") else (2, 32, 5, 5)
        case = Case(layer, shape, "float32", "contiguous", "cpu")
        (timing,) = time_case(case, [HEADLINE], How(against, seconds=0.0, rounds=2))
        assert timing.agrees and timing.rounds == 2


COPIES = {
    "layer_norm": (1, 1.5),
    "batch_norm_relu": (1, 1.5),
    "batch_norm_add_relu": (1.5, 2.5),
    "add_rms_norm": (2, 2),
}


@pytest.mark.parametrize("layer", COPIES)
def test_ratios_and_floors_of_a_case(layer, monkeypatch):
    """What is compared with what, where the times are known: torch with normops, and both with copies of the input."""
    shape = (2, 32, 5, 5) if layer.startswith("batch") else (3, 32)
    case = Case(layer, shape, "float32", "contiguous", "cpu")
    x, dy = case.make_data()
    seconds = {
        "torch forward": 6.0,
        "normops forward": 3.0,
        "floor": 2.0,
        "torch backward": 24.0,
        "normops backward": 8.0,
    }
    called = {}

    def turns(calls, flush):
        called.update(calls)
        return lambda number: {}

    monkeypatch.setattr(Case, "make_data", lambda case: (x, dy))
    monkeypatch.setattr("bench.measure.cold_turns", turns)
    monkeypatch.setattr("bench.measure.collect", lambda *_: Rounds({name: [one] * 3 for name, one in seconds.items()}))
    (timing,) = time_case(case, [HEADLINE], How())
    assert called.keys() == seconds.keys()
    assert (timing.forward.speedup, timing.backward.speedup) == (2, 3)
    assert (timing.forward.floor, timing.backward.floor) == tuple(2 * copies for copies in COPIES[layer])
