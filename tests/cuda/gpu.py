"""``make gpu``: everything that needs a card, in 9 minutes: build for it, tests on it, the sanitizer, the benchmark.

The output of each step and, after each step, a summary are in bench/results/DATE-CARD.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
SECONDS = 530
# A few of each kernel: the sanitizer makes them a hundred times slower.
SELECTION = [
    "tests/test_forward.py",
    "tests/test_backward.py",
    "-k",
    "cuda and (training or group_norm_3 or layer_norm_1d)",
]


class Steps:
    def __init__(self, folder):
        self.folder, self.start, self.lines, self.failed = folder, time.monotonic(), [], False
        folder.mkdir(parents=True, exist_ok=True)

    def left(self):
        return SECONDS - (time.monotonic() - self.start)

    def run(self, name, command, limit, environment=None, needed=True):
        """Runs a step within its limit and what is left of the time; returns whether it succeeded."""
        limit = min(limit, self.left())
        print(f"{name}: at most {limit:.0f} s ...", flush=True)
        begin, log = time.monotonic(), self.folder / f"{name}.log"
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=max(1, limit),
                    env={**os.environ, **(environment or {})},
                ).returncode
                result = "passed" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                code, result = 1, "cut short"
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        self.say(f"{name}: {result} in {time.monotonic() - begin:.0f} s; {' '.join(last)[:160]}")
        self.failed |= code != 0 and needed
        return code == 0

    def say(self, line):
        self.lines.append(line)
        print(line, flush=True)
        (self.folder / "summary.txt").write_text("\n".join(self.lines) + "\n")


def main():
    if not torch.cuda.is_available():
        sys.exit(
            "make gpu needs an NVIDIA card and a torch built for CUDA: "
            f"torch {torch.__version__} finds no CUDA device. (make cuda compiles the kernels without one.)"
        )
    card = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    steps = Steps(ROOT / "bench" / "results" / f"{date.today()}-{slug}")
    steps.say(f"{card}, compute capability {major}.{minor}, torch {torch.__version__}")

    python = sys.executable
    build = {"NORMOPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    if not steps.run("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 180, build):
        return 1
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    steps.run("tests", [*pytest, "tests", "-k", "cuda"], 150)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
            steps.run(tool, [*command, *pytest, *SELECTION], 50, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        else:
            steps.say(f"{tool}: compute-sanitizer is not installed")
    if ncu := shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu"):
        metrics = "dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active"
        sections = ["--section", "SpeedOfLight", "--section", "Occupancy", "--section", "WarpStateStats"]
        command = [ncu, "--metrics", metrics, *sections, "--launch-count", "40", "--kernel-name", "regex:.*_kernel"]
        steps.run("ncu", [*command, python, "-m", "bench.gpu", "--hottest"], 60, needed=False)
    else:
        steps.say("ncu: not installed")
    seconds = steps.left() - 30
    benchmark = [python, "-m", "bench.gpu", "--output", str(steps.folder), "--seconds", f"{seconds:.0f}"]
    steps.run("benchmark", benchmark, steps.left())
    print(f"{time.monotonic() - steps.start:.0f} seconds; all of it is in {steps.folder.relative_to(ROOT)}")
    return int(steps.failed)


if __name__ == "__main__":
    sys.exit(main())
