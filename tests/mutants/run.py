"""Plants faults in a copy of the tree, one at a time, and says which test caught each.

    python -m tests.mutants                     all
    python -m tests.mutants stale_count ...     those named
    python -m tests.mutants 5 3f2a              five, drawn by a seed such as the hash of a commit

The tests that are to catch them run first without any fault: one that fails then would catch everything.
The copy is ``build/mutants/tree``, or that of ``--folder``; it is brought up to date at the start and kept, with what
was compiled. Only what a fault touches is compiled again: kernels and operators for this machine's instruction set, the
emulated CUDA kernels by the tests that run them. The library has to be built (``make dev``) in this tree, whose copy
serves for faults that are not in it.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from . import ROOT, Fault, all_faults

BUILD = [sys.executable, "setup.py", "--quiet", "egg_info", "build_ext", "--inplace"]
# The native set alone, and files that call torch as they come: most of a fault's time is the compiler's.
FOR_BUILD = {"NORMOPS_INSTRUCTION_SETS": "native", "NORMOPS_CUDA": "0", "CXXFLAGS": "-O0"}
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-rfE"]
SECONDS = 300  # for the named tests, and for those of the area; a fault may be that something never ends

# What else is tried: all that could catch a fault in a file whose path begins so, without what takes minutes.
_CORE = "test_forward.py test_backward.py test_dtypes.py test_edge_cases.py test_channel_norms.py test_sums.py "
_CORE += "test_running_stats.py test_extremes.py test_masks.py test_fusion.py test_gradients.py test_func.py "
_CORE += "test_memory_efficient.py test_varying_parameters.py test_layer_norm_2d.py test_accelerate.py test_errors.py "
AREAS = {
    "csrc/cuda/": _CORE + "-k emulated",
    "csrc/": _CORE + "test_layouts.py test_parallel.py test_autocast.py test_identities.py -k 'not emulated'",
    "normops/": "test_modules.py test_lazy.py test_conversion.py test_registry.py test_nested.py test_errors.py "
    "test_tracing.py test_fusion.py test_masks.py test_masks_compiled.py test_backend.py test_compile.py "
    "test_distributed.py test_distributed_training.py "
    "test_accelerate.py test_func.py -k 'not emulated'",
    "bench/": "test_bench.py test_bench_accuracy.py test_bench_models.py test_bench_gpu.py test_page.py "
    "test_experiments.py",
}


@dataclasses.dataclass
class Outcome:
    name: str
    kind: str
    path: str
    caught: str  # the test, or nothing
    build_seconds: float
    test_seconds: float
    error: str = ""  # why the fault was not tried

    @property
    def seconds(self) -> float:
        return self.build_seconds + self.test_seconds


class Tree:
    """A copy of this tree to plant faults in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pristine = [path.relative_to(ROOT) for path in (ROOT / "normops").glob("_C*.so")]
        if not self.pristine:
            raise SystemExit("mutants: the library is not built: make dev")
        self._update()

    def _update(self) -> None:
        """Writes only what differs, so that what was compiled of the rest is still good."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        files = {Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()}
        for path in self.folder.rglob("*"):
            own = path.relative_to(self.folder)
            if own.parts[0] != "build" and path.is_file() and own not in files and path.suffix != ".so":
                path.unlink()
        for path in files:
            self.restore(path)

    def restore(self, path: Path) -> None:
        source, target = ROOT / path, self.folder / path
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def run(self, command: list[str], seconds: float | None = None, **environment: str):
        """The finished process; None if it was ended after so many seconds."""
        environment = {**os.environ, **environment, "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("PYTHONPATH", None)
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # tests have processes of their own
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            output = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        return None if output is None else (process.returncode, output)

    def build(self, fault: Fault) -> None:
        """Has the library be that of the tree with the fault in it.

        Raises:
            RuntimeError: the compiler took the fault for one.
        """
        if not fault.path.startswith("csrc/") or fault.path.startswith("csrc/cuda/"):
            for library in self.pristine:
                self.restore(library)
            return
        status, output = self.run(BUILD, **FOR_BUILD)
        if status:
            raise RuntimeError(f"{fault.name} does not compile:\n{output[-3000:]}")

    def try_out(self, fault: Fault, named: bool = False) -> Outcome:
        """What became of the fault, whose own tests pass without it; so those of the area are asked to, afterwards."""
        start = built = time.monotonic()
        caught = error = ""
        fault.plant(self.folder)
        try:
            self.build(fault)
            built = time.monotonic()
            caught = self.catch(fault.tests)
            if not caught and not named:
                caught = self.catch(next(tests for path, tests in AREAS.items() if fault.path.startswith(path)))
                self.restore(Path(fault.path))
                if "::" in caught and self.run_without_faults([f"tests/{caught}"]):
                    error = f"{caught} fails without it as well"
        except RuntimeError as reason:
            error = str(reason)
        finally:
            self.restore(Path(fault.path))
        caught = "" if error else caught
        return Outcome(fault.name, fault.kind, fault.path, caught, built - start, time.monotonic() - built, error)

    def run_without_faults(self, arguments: list[str]) -> str:
        """The first test that fails in the tree as it is, with the library of this one, or nothing."""
        for library in self.pristine:
            self.restore(library)
        return self.failure(arguments, None)

    def catch(self, tests: str) -> str:
        """The test that fails, or nothing."""
        files, expression = parse(tests)
        return self.failure(
            [*(f"tests/{file}" for file in files), *(("-k", expression) if expression else ())], SECONDS
        )

    def failure(self, arguments: list[str], seconds: float | None) -> str:
        """
        Raises:
            RuntimeError: there are no such tests.
        """
        finished = self.run([*PYTEST, *arguments], seconds)
        if finished is None:
            return f"no end of {arguments[0]}"
        status, output = finished
        if found := re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", output, re.MULTILINE):
            return found[1]
        if status < 0 or status > 5:
            return f"{arguments[0]}, which crashed"
        if status > 1:
            raise RuntimeError(f"no tests were run by {' '.join(arguments)}:\n{output[-2000:]}")
        return ""


def parse(tests: str) -> tuple[list[str], str]:
    """The files and the expression of ``-k`` in what a fault says of its tests."""
    files, _, expression = tests.partition(" -k ")
    return files.split(), expression.strip("'")


def union(faults: list[Fault]) -> list[str]:
    """Arguments of one pytest for the tests of all these faults: the name of a file is a keyword of what is in it."""
    selected = [parse(fault.tests) for fault in faults]
    alternatives = {f"({file} and ({words}))" if words else file for files, words in selected for file in files}
    return [
        *sorted({f"tests/{file}" for files, _ in selected for file in files}),
        "-k",
        " or ".join(sorted(alternatives)),
    ]


def select(faults: list[Fault], words: list[str]) -> list[Fault]:
    """
    Raises:
        SystemExit: a name is not known.
    """
    if not words:
        return faults
    if len(words) == 2 and words[0].isdigit():
        drawn = random.Random(words[1]).sample(sorted(fault.name for fault in faults), min(int(words[0]), len(faults)))
        words = drawn
    if unknown := set(words) - {fault.name for fault in faults}:
        raise SystemExit(f"mutants: expected names of faults, got {', '.join(sorted(unknown))}")
    return [fault for fault in faults if fault.name in words]


def table(outcomes: list[Outcome]) -> str:
    """Of every fault, in Markdown."""
    lines = ["| fault | kind | in | caught by | build, s | tests, s |", "|---|---|---|---|---|---|"]
    for found in outcomes:
        caught = f"`{found.caught}`" if found.caught else "**not tried**" if found.error else "**nothing**"
        figures = f"{found.build_seconds:.0f} | {found.test_seconds:.0f}"
        lines.append(f"| {found.name} | {found.kind} | {found.path} | {caught} | {figures} |")
    return "\n".join(lines)


def summary(outcomes: list[Outcome]) -> str:
    survivors = [found.name for found in outcomes if not found.caught and not found.error]
    errors = [found.name for found in outcomes if found.error]
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(found.kind for found in outcomes).items()))
    text = f"{len(outcomes)} faults ({kinds}): {sum(bool(found.caught) for found in outcomes)} caught, "
    text += f"median {statistics.median(found.seconds for found in outcomes):.0f} s"
    text += f"\nSurvivors: {' '.join(survivors)}" if survivors else ""
    return text + (f"\nNot tried: {' '.join(errors)}" if errors else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("mutants", nargs="*", help="names, or a number and a seed; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants", help="where the copy is kept")
    parser.add_argument("--named", action="store_true", help="run the tests that faults name, and no others")
    parser.add_argument("--python", action="store_true", help="of Python code alone, for which nothing is compiled")
    parser.add_argument("--list", action="store_true", help="list the faults and plant none")
    arguments = parser.parse_args()
    known = [fault for fault in all_faults() if not (arguments.python and fault.path.startswith("csrc/"))]
    chosen = select(known, arguments.mutants)
    if arguments.list:
        print("\n".join(f"{fault.name:32}{fault.kind:24}{fault.path}" for fault in chosen))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so the tests under way end as well
    tree = Tree(arguments.folder.resolve() / "tree")
    record = arguments.folder / "outcomes.json"  # of all runs so far, for those that were interrupted
    earlier = json.loads(record.read_text()) if record.exists() else {}
    start = time.monotonic()
    if failed := tree.run_without_faults(union(chosen)):
        raise SystemExit(f"mutants: without any fault there is a failure already: {failed}")
    print(f"without faults all tests pass ({time.monotonic() - start:.0f} s)", flush=True)
    outcomes = []
    for fault in chosen:
        found = tree.try_out(fault, arguments.named)
        outcomes.append(found)
        result = f"ERROR: {found.error}" if found.error else found.caught or "SURVIVES"
        print(f"{found.name}: {result} ({found.seconds:.0f} s)", flush=True)
        earlier[found.name] = dataclasses.asdict(found)
        record.write_text(json.dumps(earlier, indent=1) + "\n")
    print(f"\n{table(outcomes)}\n\n{summary(outcomes)}")
    return any(not found.caught for found in outcomes)
