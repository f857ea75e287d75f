"""What the pages and the README say: their code runs, their links lead somewhere, their lists are complete."""

import ast
import linecache
import re
import subprocess
import sys
import types
import warnings
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import normops
from bench.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    return [text for found, text in BLOCK.findall(path.read_text()) if found == language]


@pytest.mark.parametrize("path", [path for path in TEXTS if blocks(path, "python")], ids=name)
def test_python(path, monkeypatch):
    """The blocks of a page, one after the other, as the lines of a module: compilers look for both."""
    torch._dynamo.reset()
    normops.fusion_report(clear=True)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for number, text in enumerate(blocks(path, "python")):
        file = f"{path.name}, block {number}"
        monkeypatch.setitem(linecache.cache, file, (len(text), None, text.splitlines(keepends=True), file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            exec(compile(text, file, "exec"), module.__dict__)


TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
GROUPS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[dependency-groups]")[1], re.MULTILINE)


@cache
def help_of(*command):
    run = [sys.executable, "-m", "bench", *command, "--help"]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def check_command(line):
    """What would take minutes is looked at instead: the target, the options, the groups are there."""
    words = line.partition("#")[0].split()
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if words[0] == "make":
        assert TARGETS.issuperset(word for word in words[1:] if "=" not in word and re.fullmatch(r"[a-z-]+", word))
    elif words[:2] == ["bash", words[-1]]:
        assert (ROOT / words[1]).exists()
    elif words[:3] == ["python", "-m", "bench"]:
        told = help_of(*[word for word in words[3:4] if word in COMMANDS])
        assert all(word in told for word in words[3:] if word.startswith("--"))
    elif words[:3] == ["python", "-m", "normops"]:
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, check=True)
    else:
        assert words[:2] == ["pip", "install"]
        assert all(group in GROUPS for flag, group in pairwise(words) if flag == "--group")


@pytest.mark.parametrize("path", [path for path in TEXTS if blocks(path, "sh")], ids=name)
def test_shell(path):
    for text in blocks(path, "sh"):
        for line in text.splitlines():
            if line.strip():
                check_command(line)


def test_other_blocks():
    """No code hides from the tests as another language."""
    for path in TEXTS:
        for language, _ in BLOCK.findall(path.read_text()):
            assert language in ("python", "sh"), (name(path), language)


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links(path):
    text = BLOCK.sub("", path.read_text())
    included = re.findall(r"^```{(?:literal)?include} (\S+)$", path.read_text(), re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + included
    for link in links:
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_readme():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_every_name_is_documented():
    """In the pages of the API, by name or as a member of its module."""
    api = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    assert "automodule:: normops.functional\n   :members:" in api
    listed = set(re.findall(r"auto(?:function|class):: normops\.(\w+)", api)) | {"functional", "modules"}
    assert listed == set(normops.__all__)
    assert set(normops.modules.__all__) <= listed


def messages():
    """What the build and the import raise or print: the parts between what is put in."""
    says = {"SystemExit", "ImportError", "print"}
    for path in [ROOT / "setup.py", *(ROOT / "building").glob("*.py"), ROOT / "normops" / "_ops.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            function = getattr(node, "func", None)
            if isinstance(node, ast.Call) and getattr(function, "id", "") in says and node.args:
                parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
                yield [part.value.strip() for part in parts if isinstance(part, ast.Constant)]
    yield re.search(r'echo "(make [^$"]*)\$\(CURDIR\), ([^"]*)"', (ROOT / "Makefile").read_text()).groups()


def test_every_message_of_the_build_has_a_cure():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    section = page.split("## Messages of the build")[1].split("\n## ")[0]
    known = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    said = list(messages())
    assert len(said) > 12
    for parts in said:
        telling = [part for part in parts if len(part) > 16]
        assert any(part in one or one in part for part in telling for one in known), parts
    for one in known:
        assert any(part in one or one in part for parts in said for part in parts if len(part) > 16), one


@pytest.mark.skipif(not find_spec("sphinx") or not find_spec("furo"), reason="needs the dependency group docs")
def test_build(tmp_path):
    """make docs: warnings are errors."""
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "index.html").exists() and (tmp_path / "api" / "functional.html").exists()
