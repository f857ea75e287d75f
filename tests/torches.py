"""``make test-torches``: builds the library and runs its tests with several versions of torch, and prints a table.

Each version gets an environment and a copy of the source tree of its own in ``build/torches``, kept for the next time.
The emulated half of the tests is left out, and so are instruction sets other than the best: they know nothing of
torch. CUDA kernels are compiled too if ``NORMOPS_CUDA=1``.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "torches"
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "__pycache__", ".*_cache")


def timed(log, command, **options):
    """(succeeded, seconds, the last line that was printed)"""
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    log.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    lines = done.stdout.strip().splitlines() or [""]
    return done.returncode == 0, time.perf_counter() - start, lines[-1].strip("= ")


def try_torch(version):
    """A row of the table."""
    folder = FOLDER / version
    python, tree = folder / "venv" / "bin" / "python", folder / "normops"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        if not python.exists():
            timed(log, [sys.executable, "-m", "venv", folder / "venv"])
        timed(log, [python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"])
        groups = [f"--group={ROOT}/pyproject.toml:{group}" for group in ("build", "test", "bench", "docs")]
        installed, _, last = timed(log, [python, "-m", "pip", "install", "--quiet", f"torch=={version}", *groups])
        if not installed:
            return version, "", "not installed", last
        # What was built for this version stays, and ninja compiles again what has changed since.
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED, dirs_exist_ok=True)
        environment = {"NORMOPS_CUDA": "0", "OMP_WAIT_POLICY": "passive", **os.environ}
        options = {"cwd": tree, "env": environment}
        built, seconds, last = timed(
            log, [python, "setup.py", "--quiet", "egg_info", "build_ext", "--inplace"], **options
        )
        if not built:
            return version, "", "not built", last
        _, _, exact = timed(log, [python, "-c", "import torch; print(torch.__version__)"])
        _, _, last = timed(
            log,
            [
                python,
                "-m",
                "pytest",
                "-n",
                "auto",
                "--dist",
                "worksteal",
                "-q",
                "-k",
                "not emulated and not other_instruction_sets",
                "--ignore=tests/emulator",
            ],
            **options,
        )
        return version, exact, f"{seconds:.0f} s", re.sub(r" in ([\d.]+)s.*", r", \1 s", last)


def main():
    rows = [("torch", "build", "compiled in", "tests")]
    for version in sys.argv[1:]:
        rows.append(try_torch(version))
        print(*rows[-1], sep=" | ", flush=True)
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    failed = [row for row in rows[1:] if "passed" not in row[-1] or re.search("failed|error", row[-1])]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
