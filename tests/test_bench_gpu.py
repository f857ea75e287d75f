"""What is meant for a machine with a card, rehearsed without one: nothing that is timed here means anything."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from emulator import backend
from emulator.library import Launches

from bench import gpu, gpu_model
from bench.cases import Case

pytestmark = pytest.mark.skipif(not backend.exists(), reason="there are no CUDA kernels")

CASES = [
    Case("layer_norm", (64, 128), "bfloat16", "contiguous", "cpu"),
    Case("rms_norm", (64, 128), "float32", "contiguous", "cpu"),
    Case("batch_norm", (4, 8, 16, 16), "float16", "channels_last", "cpu"),
    Case("group_norm", (2, 64, 8, 8), "bfloat16", "contiguous", "cpu"),
]


class Event:
    def __init__(self, enable_timing):
        self.time = None

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


class Stream:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class Graph(Stream):
    """Replays by calling again, as what it has captured was run too."""

    def replay(self):
        pass


@pytest.fixture
def card(monkeypatch):
    """Torch as it is with a card, as far as the benchmark asks, and the emulator's launchers behind the operators."""
    events = torch.profiler.ProfilerActivity
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: "Card of Cardboard",
        "get_device_capability": lambda: (9, 0),
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=1 << 16),
        "Stream": Stream,
        "stream": lambda stream: stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda graph, stream: graph,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(events, "CUDA", events.CPU, raising=False)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "REPETITIONS", 3)
    monkeypatch.setattr(gpu, "cases", lambda: iter(CASES))
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda stopwatch: 1e12)
    # The compiler has a test of its own, and takes long.
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    with backend.entered(), backend.library().dry():
        yield


def test_benchmark(card, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path)])
    assert gpu.main() == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["environment"]["gpu"] == "Card of Cardboard" and record["planned"] == len(CASES)
    assert [result["case"] for result in record["results"]] == [case.name for case in CASES]
    for result in record["results"]:
        assert {"normops", "torch"} <= set(result["implementations"])
        for name in ("normops", "torch"):
            for what in ("forward", "backward"):
                row = result["implementations"][name][what]
                assert row["graph"] and row["us"] > 0 and row["host_us"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert "torch / normops forward" in text and all(case.name in text for case in CASES)
    assert f"{len(CASES)} of {len(CASES)} cases" in capsys.readouterr().out


def test_figures(card):
    """Of a call of known length: what it moves in a second, and how much that is of what a copy moves."""
    stopwatch = SimpleNamespace(
        stream=Stream(), device_seconds=lambda call: (1e-3, True), host_seconds=lambda call: 2e-6
    )
    result = gpu.measure(CASES[0], stopwatch, bandwidth=1e8)
    tensor = 64 * 128 * 2  # bytes
    for what, moved in (("forward", 2 * tensor), ("backward", 3 * tensor)):
        row = result["implementations"]["normops"][what]
        assert (row["us"], row["host_us"]) == (pytest.approx(1e3), pytest.approx(2))
        assert row["gb_s"] == pytest.approx(moved / 1e-3 / 1e9)
        assert row["share_of_copy"] == pytest.approx(moved / 1e-3 / 1e8)


def test_means():
    """Above one, normops is faster."""
    slow, fast = ({what: {"us": us} for what in ("forward", "backward")} for us in (8.0, 2.0))
    assert gpu.means([{"implementations": {"torch": slow, "normops": fast}}] * 2) == [
        f"torch / normops {what}: 4.00 over 2 cases, least 4.00" for what in ("forward", "backward")
    ]


def test_benchmark_that_is_cut_short(card, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path), "--seconds", "0"])
    assert gpu.main() == 0
    assert f"0 of {len(CASES)} cases" in (tmp_path / "gpu.md").read_text()


def test_hottest(card, monkeypatch):
    ran = []
    monkeypatch.setattr(
        gpu, "Passes", lambda layer, x, dy: SimpleNamespace(forward=lambda: ran.append(x), backward=int)
    )
    monkeypatch.setattr(Case, "make_data", lambda case: (case.shape, None))
    assert gpu.run_hottest() == 0
    assert (8192, 4096) in ran and len(ran) == 8


def launches(name, blocks, threads=256, **counted):
    """One launch, of so many blocks of so many threads."""
    fields = dict.fromkeys(Launches.__dataclass_fields__, 0) | {"launches": 1, "blocks": blocks, "name": name}
    return Launches(**(fields | {"threads": blocks * threads} | counted))


CARD = gpu_model.Card("", "sm_90", "90", 100, 1e9, 1e12, 1e-6, 4e6, 4e12, 1e5)
MERGE = "void normops::cuda::merge_kernel<float>(int)"
ROWS = "void normops::cuda::row_forward_kernel<float, float, 4, 1, false, false>(int)"
MOMENTS = "void normops::cuda::moments_kernel<float, (normops::Layout)0, 4>(int)"
TABLE = {
    ("moments_kernel<float,contiguous,4>", "90"): {"registers": 64, "flight": 16, "path": 320, "loop": 0},
    ("merge_kernel<float>", "90"): {"registers": 64, "flight": 4, "path": 100, "loop": 0},
    ("row_forward_kernel<float,float,4,1,false,false>", "90"): {"registers": 64, "flight": 8, "path": 8, "loop": 0},
}


def seconds(of, card=CARD, **more):
    found = gpu_model.predict_kernel(card, of, TABLE, **{"tensor_bytes": 1e9, "element_size": 4, "warm": False} | more)
    return found.seconds - gpu_model.SECONDS_PER_LAUNCH, found.limit


def test_a_prediction_is_what_takes_longest():
    """Bytes at the bandwidth, trips to memory at its latency, instructions at the rate of a clock."""
    sectors = int(1e9 / gpu_model.SECTOR)
    # 1 GB at 1e12 bytes a second; four blocks are on a multiprocessor at once, each for one trip.
    assert seconds(launches(MOMENTS, 400, distinct_read=sectors, chain=16)) == (
        pytest.approx(1e-3, rel=0.05),
        "bandwidth",
    )
    # Ten blocks in the place of one, ten trips each.
    latency = seconds(launches(MOMENTS, 4000, distinct_read=1, chain=160), tensor_bytes=1e6)
    assert latency == (pytest.approx(1e-4, rel=0.01), "latency")
    # 20 instructions for each of 2.5e8 / 4 vectors, 32 at a time, on one multiprocessor
    instructions = 20 * 2.5e8 / 4 / 32 / (gpu_model.INSTRUCTIONS_PER_CLOCK * 1e9)
    assert seconds(launches(MOMENTS, 1, distinct_read=sectors)) == (
        pytest.approx(instructions, rel=0.01),
        "instructions",
    )


def test_a_merge_is_trips_to_memory():
    """What it reads has just been written, and lies in the cache, as far as half of that holds it."""
    assert seconds(launches(MERGE, 16, chain=40)) == (pytest.approx(1e-5, rel=0.01), "latency")
    merge = launches(MERGE, 16, distinct_read=int(4e9 / 32))
    near, _ = seconds(merge, dataclasses.replace(CARD, cache=1e10))
    far, _ = seconds(merge)
    assert (near, far) == (pytest.approx(1e-3, rel=0.01), pytest.approx(4e-3, rel=0.01))


def test_parameters_of_rows_are_cached():
    """They are as long as a row here; ten blocks come to each multiprocessor, and the first of them reads them."""
    rows = launches(ROWS, 1000, distinct_read=int(2e9 / 32))
    kept, _ = seconds(rows, dataclasses.replace(CARD, first_cache=5e6))
    lost, _ = seconds(rows, dataclasses.replace(CARD, first_cache=3e6))
    assert (kept, lost) == (pytest.approx(1.025e-3, rel=0.01), pytest.approx(1.25e-3, rel=0.01))


def test_what_is_launched_alike_is_counted_once(monkeypatch):
    """Compute capabilities 9.0 and 10.0 have clusters and as much shared memory; longer rows are launched otherwise on
    8.0."""
    monkeypatch.setenv("NORMOPS_EMULATOR_VARIANT", "plain")
    gpu_model.launches_of.cache_clear()
    for shape, counts in (((4, 64), 1), ((2, 81920), 2)):
        gpu_model.COUNTED.clear()
        case = Case("layer_norm", shape, "bfloat16", "contiguous", "cpu")
        passes = [gpu_model.launches_of(case, architecture) for architecture in ("sm_80", "sm_90", "sm_100")]
        assert len(gpu_model.COUNTED) == counts and passes[1] == passes[2]


def test_summary():
    def row(megabytes, ratio, **more):
        named = {"card": "A", "case": "c", "pass": "p", "limit": "l"}
        return named | {"input": 1e6 * megabytes, "bytes": 2, "moved": 2, "over_floor": ratio} | more

    rows = [
        row(64, 1.4),
        row(64, 1.6, case="worst", moved=3),
        row(8, 2.4),
        row(8, 2.6),
        row(1, 9.0),
        row(8, 1.0, card="B"),
    ]
    head = "| card | input | passes | as asked | others, that read twice | worst |\n|---|---|---|---|---|---|\n"
    assert gpu_model.summary(rows) == head + (
        "| A | above 32 MB | 2 | 1 (1.5 times the floor) | 1, 1 | worst p: 1.60 (l) |\n"
        "| A | 4 to 32 MB | 2 | 1 (2.5 times the floor) | 1, 0 | c p: 2.60 (l) |\n"
        "| B | 4 to 32 MB | 1 | 1 (2.5 times the floor) | 0, 0 | c p: 1.00 (l) |"
    )


@pytest.fixture
def steps(card, tmp_path, monkeypatch):
    """``make gpu`` with commands that are only written down; what a test says of a command is how it ends."""
    specification = importlib.util.spec_from_file_location("make_gpu", backend.ROOT / "tests/cuda/gpu.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module.shutil, "which", lambda tool: f"/bin/{tool.split('/')[-1]}")
    module.commands, module.ends = [], {}

    def run(command, stdout, timeout, **_):
        line = " ".join(map(str, command))
        module.commands.append(line)
        stdout.write("the last line\n")
        for part, end in module.ends.items():
            if part in line:
                if end is None:
                    raise subprocess.TimeoutExpired(command, timeout)
                return SimpleNamespace(returncode=end)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)
    return module


def summary(tmp_path):
    (found,) = tmp_path.glob("bench/results/*-card-of-cardboard/summary.txt")
    return found.read_text()


def test_make_gpu(steps, tmp_path):
    assert steps.main() == 0
    ran = " | ".join(steps.commands)
    for part in ("setup.py", "pytest", "memcheck", "racecheck", "ncu", "bench.gpu --output"):
        assert part in ran
    assert "benchmark: passed" in summary(tmp_path)


def test_make_gpu_when_things_fail(steps, tmp_path):
    """Tests that fail and a sanitizer that takes too long do not keep the benchmark from being run."""
    steps.ends = {"racecheck": None, "tests -k cuda": 1, "ncu": 3}
    assert steps.main() == 1
    text = summary(tmp_path)
    assert "tests: failed (1)" in text and "racecheck: cut short" in text and "benchmark: passed" in text


def test_make_gpu_without_a_build(steps, tmp_path):
    steps.ends = {"setup.py": 1}
    assert steps.main() == 1
    assert len(steps.commands) == 1 and "build: failed (1)" in summary(tmp_path)
