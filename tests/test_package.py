"""What is installed: version, report, and the symbols of the kernels."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normops
from normops import __main__
from normops._ops import _C, BUILD_INFO

ROOT = Path(__file__).parent.parent
OBJECTS = sorted((ROOT / "build").glob("*/AVX*/*.o"))


def test_version():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert normops.__version__ == BUILD_INFO["version"] == declared


def test_build_info():
    assert BUILD_INFO.keys() == {"version", "torch", "compiler", "instruction_sets", "openmp", "cuda"}
    assert torch.__version__.startswith(BUILD_INFO["torch"])
    assert _C.instruction_set() in BUILD_INFO["instruction_sets"].split()
    assert BUILD_INFO["openmp"] > 200000


def test_report():
    result = subprocess.run([sys.executable, "-m", "normops"], capture_output=True, text=True, check=True)
    for name in __main__.description():
        assert re.search(rf"^{name}: +\S", result.stdout, re.MULTILINE), name


def test_names():
    """Everything that is said to be exported is there, with documentation."""
    for module in (normops, normops.functional, normops.modules):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_without_numpy():
    """Torch warns when it is imported; normops has nothing to add."""
    code = """
import sys, warnings
sys.modules["numpy"] = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
warnings.simplefilter("error")
import normops
normops.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.LayerNorm(3)))(torch.randn(2, 3)).sum().backward()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_tables_of_what_works():
    """Every row of the tables names a test that is there, and has a cell for every layer."""
    page = (ROOT / "docs" / "works.md").read_text()
    tables = [[line for line in block.splitlines() if line.startswith("|")] for block in page.split("\n\n")]
    tables = [table for table in tables if table]
    assert [len(table) > 10 for table in tables] == [True, True]
    for header, _, *rows in tables:
        for row in rows:
            assert row.count("|") == header.count("|"), row
            file, _, name = row.split("|")[-2].strip(" `").partition("::")
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), row


def test_recipe_of_an_activation():
    """CONTRIBUTING names every place where an activation is applied, and none that is not there."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## How to add an activation")[1].split("\n## ")[0]
    steps, places = section.split("Where an activation is applied")
    for path in re.findall(r"`([\w/]+\.(?:h|py))`", steps):
        assert (ROOT / path).exists(), path
    named = re.findall(r"`(\w+)`", places)
    sources = {path: path.read_text() for path in (ROOT / "csrc").rglob("*.*")}
    for name in named:
        assert any(re.search(rf"\b{name}\b", text) for text in sources.values()), name
    applies = re.compile(r"[ .]activate\(|[ .]differentiate\(|\bactivated\(|\bactivation_derivative\(")
    for path, text in sources.items():
        if applies.search(text) and path.name not in ("epilogue.cpp", "kernels.h", "composed.h"):
            assert any(re.search(rf"\b{name}\b", text) for name in named), path


@pytest.mark.skipif(not OBJECTS or not shutil.which("nm"), reason="needs the objects of a build, and nm")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: "-".join(path.with_suffix("").parts[-3:]))
def test_symbols(path):
    """Kernel files share no code: the linker merges weak symbols, and would run AVX-512 on a processor without it."""
    listing = subprocess.run(["nm", "--defined-only", "-C", path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
    assert not [name for kind, name in symbols if kind in "WVu"]
    entries = [name for kind, name in symbols if kind == "T"]
    assert entries
    assert all(re.search(r"::add_\w+\(normops::cpu::KernelTable&\)$", entry) for entry in entries)
