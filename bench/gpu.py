"""``python -m bench.gpu``: the layers on an NVIDIA card, beside torch and the libraries that are installed.

Each pass is captured in a CUDA graph, so that gaps between kernels, which the host makes, are not charged to them, and
replayed between CUDA events with a second-level cache full of something else; its host time is taken by a clock.
Results are written after every case, so that a run that is cut short leaves what it had.
"""

import argparse
import copy
import json
import shutil
import statistics
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch._functorch.config
from torch import nn

import normops
from bench.cases import Case
from bench.measure import Passes
from normops.__main__ import description

# (passes over the tensor forward, backward): x and y; x, dy and dx. In evaluation the backward need not read x, but for
# the gradients of weight and bias.
TRAFFIC = (2, 3)
DEVICE = "cuda"  # where it is rehearsed without a card, another (tests/test_bench_gpu.py)
REPETITIONS = 30
ROWS = [(1 << 25) // length for length in (128, 256, 1024, 4096, 8192, 16384)]


def cases():
    """The most telling first."""
    wide = [(rows, (1 << 25) // rows) for rows in ROWS]
    images = [(32, 64, 56, 56), (64, 64, 112, 112), (32, 512, 7, 7), (32, 256, 14, 14), (64, 128, 28, 28)]
    groups = [(8, 256, 64, 64), (2, 1280, 16, 16), (2, 320, 64, 64), (16, 320, 64, 64)]
    transformers = [(16384, 768), (8192, 5120), (512, 65536)]
    few = [(1, 4096), (16, 8192), (32, 1024), (256, 4096)]
    rows = [*wide, *transformers, *few, (64, 1000000), (4096, 1000)]
    for dtype in ("bfloat16", "float32", "float16"):
        for layer in ("rms_norm", "layer_norm") if dtype != "float16" else ():
            yield from (Case(layer, shape, dtype, "contiguous", DEVICE) for shape in rows)
        for layout in ("contiguous", "channels_last"):  # of which torch sends float32 and float16 to cuDNN
            yield from (Case("batch_norm", shape, dtype, layout, DEVICE) for shape in images)
            if dtype == "float16":
                continue
            yield from (Case("group_norm", shape, dtype, layout, DEVICE) for shape in groups)
            yield Case("instance_norm", (8, 64, 128, 128), dtype, layout, DEVICE)
            yield Case("batch_norm_eval", (32, 64, 56, 56), dtype, layout, DEVICE)


def rivals(case, layer):
    """Other implementations that can be imported: name -> a module with the parameters of ``layer``."""
    found = {"torch": layer, "compile": torch.compile(copy.deepcopy(layer), dynamic=False)}
    if case.layer not in ("layer_norm", "rms_norm"):
        return found
    rms, width = case.layer == "rms_norm", case.shape[-1]
    makers = {
        "quack": lambda: __import__("quack", fromlist=["QuackRMSNorm"]).QuackRMSNorm(width) if rms else None,
        "apex": lambda: getattr(
            __import__("apex.normalization", fromlist=["x"]), "FusedRMSNorm" if rms else "FusedLayerNorm"
        )(width),
        "liger": lambda: getattr(
            __import__("liger_kernel.transformers", fromlist=["x"]), "LigerRMSNorm" if rms else "LigerLayerNorm"
        )(width),
    }
    for name, make in makers.items():
        try:
            module = make()
        except Exception:
            continue
        if module is not None:
            found[name] = module.to(DEVICE, layer.weight.dtype)
    return found


class Stopwatch:
    def __init__(self):
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.zeros(2 * cache // 4, dtype=torch.int32, device=DEVICE)
        self.stream = torch.cuda.Stream()

    def replay(self, call):
        """What replays a graph of ``call``, and whether there is one: some rivals cannot be captured."""
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                call()
        except Exception:
            torch.cuda.synchronize()
            return call, False
        return graph.replay, True

    def device_seconds(self, call):
        """The median over calls that each find the cache full of something else; and whether a graph was replayed."""
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            call, captured = self.replay(call)
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPETITIONS)
            ]
            for start, end in events:
                self.flush.amax()  # read, so that nothing is left to be written back meanwhile
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3, captured

    def host_seconds(self, call):
        """What a call takes until it returns, the card's queue never being full."""
        times = []
        for _ in range(REPETITIONS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def copy_bandwidth(stopwatch):
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / stopwatch.device_seconds(lambda: target.copy_(source))[0]


def rms_backend():
    """The kernels behind torch's RMSNorm here: its own, or ones that it took from elsewhere."""
    x, layer = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16), nn.RMSNorm(4096).to(DEVICE, torch.bfloat16)
    layer(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(x)
        torch.cuda.synchronize()
    return ", ".join(sorted({event.key[:60] for event in profile.key_averages()})) or "unknown"


def measure(case, stopwatch, bandwidth):
    layer = case.make_layer()
    x, dy = case.make_data()
    implementations = {"normops": normops.convert(copy.deepcopy(layer)), **rivals(case, layer)}
    result = {"case": case.name, "megabytes": x.numel() * x.element_size() / 1e6, "implementations": {}}
    for name, module in implementations.items():
        try:
            with torch.cuda.stream(stopwatch.stream):  # a backward pass runs on the stream of the forward
                passes = Passes(module, x, dy)
            row = {}
            for what, call, traffic in zip(
                ("forward", "backward"), (passes.forward, passes.backward), TRAFFIC, strict=True
            ):
                seconds, captured = stopwatch.device_seconds(call)
                rate = traffic * x.numel() * x.element_size() / seconds
                row[what] = {
                    "us": 1e6 * seconds,
                    "graph": captured,
                    "host_us": 1e6 * stopwatch.host_seconds(call),
                    "gb_s": rate / 1e9,
                    "share_of_copy": rate / bandwidth,
                }
            result["implementations"][name] = row
        except Exception as error:  # a rival that cannot do this case
            result["implementations"][name] = {"error": f"{type(error).__name__}: {str(error)[:100]}"}
    return result


def table(results):
    lines = ["| case | pass | " + " | ".join(["normops µs", "GB/s", "of copy", "host µs", "others µs"]) + " |"]
    lines.append("|---|---|---|---|---|---|---|")
    for result in results:
        ours = result["implementations"]["normops"]
        for what in ("forward", "backward"):
            if "error" in ours:
                lines.append(f"| {result['case']} | {what} | {ours['error']} | | | | |")
                continue
            others = ", ".join(
                f"{name} {row[what]['us']:.1f}" if what in row else f"{name} failed"
                for name, row in result["implementations"].items()
                if name != "normops"
            )
            row = ours[what]
            figures = f"{row['us']:.1f} | {row['gb_s']:.0f} | {row['share_of_copy']:.0%} | {row['host_us']:.1f}"
            lines.append(f"| {result['case']} | {what} | {figures} | {others} |")
    return "\n".join(lines) + "\n"


def means(results):
    lines = []
    for rival in ("torch", "compile", "quack", "apex", "liger"):
        for what in ("forward", "backward"):
            ratios = [
                rows[rival][what]["us"] / rows["normops"][what]["us"]
                for rows in (result["implementations"] for result in results)
                if what in rows.get(rival, {}) and what in rows["normops"]
            ]
            if ratios:
                mean, least = statistics.geometric_mean(ratios), min(ratios)
                lines.append(f"{rival} / normops {what}: {mean:.2f} over {len(ratios)} cases, least {least:.2f}")
    return lines


def run_hottest():
    """Both passes of what takes the most time in models, with every kind of kernel among them."""
    shapes = {
        ("layer_norm", "contiguous"): [(8192, 4096), (16384, 768), (2048, 16384)],
        ("rms_norm", "contiguous"): [(8192, 4096)],
        ("batch_norm", "contiguous"): [(64, 64, 112, 112), (32, 64, 56, 56)],
        ("batch_norm", "channels_last"): [(64, 64, 112, 112)],
        ("group_norm", "contiguous"): [(8, 256, 64, 64)],
    }
    for (layer, layout), of_layer in shapes.items():
        for shape in of_layer:
            case = Case(layer, shape, "bfloat16", layout, DEVICE)
            passes = Passes(normops.convert(case.make_layer()), *case.make_data())
            passes.forward()
            passes.backward()
    torch.cuda.synchronize()
    return 0


def driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench/results/latest-gpu"))
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after this long (default: 240)")
    parser.add_argument(
        "--hottest", action="store_true", help="run a few passes once and measure nothing, for a profiler"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    torch._functorch.config.donated_buffer = False  # or a compiled backward pass could run but once
    if arguments.hottest:
        return run_hottest()
    start = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stopwatch = Stopwatch()
    bandwidth = copy_bandwidth(stopwatch)
    environment = {
        **description(),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "copy": f"{bandwidth / 1e9:.0f} GB/s, reading and writing",
        "torch's RMSNorm": rms_backend(),
    }
    for name, value in environment.items():
        print(f"{name + ':':18}{value}", flush=True)

    planned, results = list(cases()), []
    for case in planned:
        if time.monotonic() - start > arguments.seconds:
            break
        torch.compiler.reset()
        results.append(measure(case, stopwatch, bandwidth))
        record = {"environment": environment, "planned": len(planned), "results": results}
        (arguments.output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"{len(results)} of {len(planned)} cases in {time.monotonic() - start:.0f} s", *means(results)]
    facts = "".join(f"- {name}: {value}\n" for name, value in environment.items())
    summary = "\n".join(f"- {line}" for line in lines)
    (arguments.output / "gpu.md").write_text(f"# normops on a GPU\n\n{facts}\n{summary}\n\n{table(results)}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
