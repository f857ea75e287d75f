"""Every program in examples/ runs, and is short."""

import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest
import torch

import normops

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
RANKED = {"sync_batch_norm.py", "fsdp2.py"}
NEEDS = {"hugging_face.py": "transformers"}
HAS_MASK = "mask" in signature(normops.functional.batch_norm).parameters


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs a program in a folder of its own; returns what it prints."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def started(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return started


def test_length():
    for path in (ROOT / "examples").iterdir():
        if path.is_file():
            assert len(path.read_text().splitlines()) < 60, path.name


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in RANKED and "aot" not in name])
def test_runs(name, start):
    if name in NEEDS and not find_spec(NEEDS[name]):
        pytest.skip(f"needs {NEEDS[name]}")
    if name == "padded_sequences.py" and not HAS_MASK:
        pytest.skip("needs mask=")
    assert start(sys.executable, ROOT / "examples" / name)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("name", sorted(RANKED))
def test_runs_on_two_ranks(name, start):
    def on_two_ranks():
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        return start(*run, "--master-port", str(free_port()), ROOT / "examples" / name)

    try:
        printed = on_two_ranks()
    except AssertionError as failed:
        # destroy_process_group does not join gloo's threads while a cache of torch holds the group. One that lets go
        # of a tensor of Python only when the interpreter is ending (it had no processor before) ends the process.
        if "terminate called without an active exception" not in str(failed):
            raise
        printed = on_two_ranks()
    assert "rank 0" in printed and "rank 1" in printed


@pytest.mark.nightly
def test_ahead_of_time(start, tmp_path):
    """The package runs in Python and, where there is a compiler, in a C++ program that knows nothing of normops."""
    package = tmp_path / "model.pt2"
    printed = start(sys.executable, ROOT / "examples" / "aot_inductor.py", package)
    first = [float(value) for value in printed.partition("[")[2].rpartition("]")[0].split(",")]
    if not shutil.which("g++"):
        return
    flags = start(sys.executable, ROOT / "examples" / "aot_inductor_flags.py").split()
    program = tmp_path / "program"
    start("g++", "-std=c++20", "-O0", ROOT / "examples" / "aot_inductor.cpp", *flags, "-o", program)
    row = start(program, package).splitlines()[0]
    torch.testing.assert_close(
        torch.tensor([float(value) for value in row.split()]), torch.tensor(first), rtol=1e-3, atol=1e-3
    )
