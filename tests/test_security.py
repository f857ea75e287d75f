"""What the library does not do: run code that it is given, start programs, open files; and what it is packed as."""

import ast
import builtins
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from cases import MODULES, each_module

import normops
from normops._ops import _C, BUILD_INFO

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "normops").rglob("*.py"))
LIBRARY = Path(_C.__file__)

# Of the standard library. Nothing in these opens a file, a connection or a process, or runs what it is given.
MODULES_USED = {
    *("collections", "contextlib", "copy", "dataclasses", "fnmatch", "functools", "importlib", "inspect", "itertools"),
    *("operator", "platform", "re", "sys", "types", "typing", "warnings"),
}
BUILTINS_AVOIDED = {"eval", "exec", "compile", "open", "__import__", "breakpoint"}
METHODS_AVOIDED = {"load", "loads", "load_library", "load_inline", "load_state_dict_from_url", "save", "dump", "dumps"}
METHODS_AVOIDED |= {"system", "popen", "write_text", "write_bytes", "import_module", "find_class", "hub"}


def _imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def _calls_avoided(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in BUILTINS_AVOIDED and hasattr(builtins, node.id):
            yield node.id
        elif isinstance(node, ast.Attribute) and node.attr in METHODS_AVOIDED:
            yield node.attr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path):
    tree = ast.parse(path.read_text())
    assert {name.partition(".")[0] for name in _imported(tree)} <= MODULES_USED | {"torch", "normops"}
    assert not list(_calls_avoided(tree))


def test_what_the_scan_finds():
    tree = ast.parse("import pickle\nfrom os import path\neval('1')\ntorch.load(f)\nre.compile('a')")
    assert list(_imported(tree)) == ["pickle", "os"]
    assert set(_calls_avoided(tree)) == {"eval", "load"}


WORK = """
import sys
import torch, normops
import torch._dynamo, torch.fx.experimental.symbolic_shapes

events = []
WATCHED = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir",
           "shutil.", "socket.", "pickle.", "marshal.load", "urllib.", "ctypes.dlopen", "tempfile.")
def note(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append((event, arguments[0]))
    elif event.startswith(WATCHED):
        events.append((event, arguments))
sys.addaudithook(note)

def model():
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.LayerNorm(5))

x = torch.randn(2, 3, 4, 5)
normops.convert(model(), fuse=True, verbose=False)(x).sum().backward()
normops.revert(normops.convert(model()))(x)
normops.SyncBatchNorm.convert_sync_batchnorm(model())(x)
print(normops.summary(normops.convert(model())), file=sys.stderr)
with normops.accelerate():
    model()(x).sum().backward()
found = list(events)
torch.compile(model(), backend="normops")(x).sum().backward()
print(found)
"""


def test_nothing_is_written(tmp_path):
    """Converting, reverting, accelerating and the backend open nothing for writing and start nothing."""
    places = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")}
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WORK]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stdout + result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _spoil(state):
    """State dicts that do not fit, by what is wrong."""
    if not state:
        return {"unexpected": {"more": torch.ones(1)}}
    name = next(iter(state))
    rest = {key: value for key, value in state.items() if key != name}
    return {
        "shape": {**rest, name: torch.ones(state[name].numel() + 1)},
        "dimensions": {**rest, name: state[name].unsqueeze(0)},
        "scalar": {**rest, name: torch.tensor(1.0)},
        "complex": {**rest, name: state[name].to(torch.complex64)},
        "integers": {**rest, name: state[name].to(torch.int32)},
        "meta": {**rest, name: state[name].to("meta")},
        "sparse": {**rest, name: state[name].to_sparse()},
        "no tensor": {**rest, name: [1.0]},
        "missing": rest,
        "unexpected": {**state, "more": torch.ones(1)},
        "other key": {**rest, name + "s": state[name]},
    }


def _outcome(function):
    """What it raises and says; None: nothing."""
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.filterwarnings("ignore:.*non-meta parameter:UserWarning", "ignore:Casting complex:UserWarning")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@each_module
def test_state_dict_that_does_not_fit(case, strict):
    """Raises, or takes, what torch's layer does, with the same words and the same state left behind."""
    state = case.make(torch.nn).state_dict()
    raised = 0
    for what, spoiled in _spoil(state).items():
        layers = [case.make(namespace) for namespace in (normops, torch.nn)]
        ours, theirs = (_outcome(lambda layer=layer, s=spoiled: layer.load_state_dict(s, strict)) for layer in layers)
        assert ours == theirs, what
        raised += ours is not None
        torch.testing.assert_close(*(layer.state_dict() for layer in layers), rtol=0, atol=0)
    assert raised >= (4 if state else strict)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1], ids=["empty", "a byte", "100 bytes", "half", "all but a byte"])
def test_truncated_file(kept):
    """Of a state dict, and of a whole layer: what reads them is torch, and says so."""
    case = next(case for case in MODULES if case.name == "BatchNorm2d")
    ours, theirs = (_file(case.make(namespace).state_dict()) for namespace in (normops, torch.nn))
    part = slice(int(kept * len(theirs)) if isinstance(kept, float) else kept)
    raised = [_outcome(lambda file=file: torch.load(io.BytesIO(file[part]))) for file in (ours, theirs)]
    assert raised[0] is not None and raised[0] == raised[1]


needs_readelf = pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")


def _readelf(*options):
    command = ["readelf", "--wide", *options, LIBRARY]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}).stdout


@needs_readelf
def test_memory_of_the_library():
    """No stack that runs as code, no segment that is written and runs, and tables of addresses that cannot be written
    once the library is loaded."""
    segments = re.findall(r"^ +(\w+) +(?:0x\w+ +){5}([R ][W ][E ]) ", _readelf("--segments"), re.MULTILINE)
    assert ("GNU_STACK", "RW ") in segments and "GNU_RELRO" in dict(segments)
    assert not [segment for segment in segments if "W" in segment[1] and "E" in segment[1]]
    assert re.search(r"\(FLAGS\).*BIND_NOW|\(BIND_NOW\)", _readelf("--dynamic"))


@needs_readelf
def test_what_is_linked():
    """Torch, the runtimes of C and C++, and the OpenMP that torch has too: by name, with no paths to look in."""
    dynamic = _readelf("--dynamic")
    libraries = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    torch_libraries = {"libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"}
    runtimes = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0", "libgomp.so.1"}
    cuda = {"libc10_cuda.so", "libtorch_cuda.so", "libdl.so.2", "librt.so.1"} if BUILD_INFO["cuda"] else set()
    # Their names end in the version of the processor or of the sanitizer.
    others = {name for name in libraries if re.match(r"ld-linux-|lib(asan|tsan|ubsan)\.so", name)}
    assert libraries - others <= torch_libraries | runtimes | cuda
    assert {"libc10.so", "libtorch_cpu.so"} <= libraries
    assert not re.search(r"\((RPATH|RUNPATH|TEXTREL)\)", dynamic)


@needs_readelf
def test_what_is_called():
    """No function that opens a file or a connection, or starts a process."""
    called = set(re.findall(r" UND (\w+)(?:@| |$)", _readelf("--dyn-syms"), re.MULTILINE))
    assert len(called) > 100 and "getenv" in called
    calls = r"f?open(at)?(64)?|creat|system|popen|exec[vlpe]+|posix_spawnp?|v?fork|socket|connect|dlm?open|mkdir"
    assert not [name for name in called if re.fullmatch(rf"(__)?({calls})", name)]
    assert not [name for name in called if "basic_filebuf" in name or "basic_ofstream" in name]


needs_repository = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="compares with what git tracks"
)


def _tracked(*folders):
    """What git tracks, and what it would be asked to."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {path for path in listing.splitlines() if (ROOT / path).exists()}


def _handed_on():
    return {path for path in _tracked() if not re.match(r"\.(git|ci/)", path)}


@needs_repository
def test_sdist(tmp_path):
    """The source archive has what the repository has, without what is only for the repository itself."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    listed = (tmp_path / "normops.egg-info" / "SOURCES.txt").read_text().splitlines()
    packed = {path for path in listed if not Path(path).is_absolute() and "egg-info" not in path}
    assert packed == _handed_on()


@needs_repository
@pytest.mark.nightly
def test_archives(tmp_path):
    """The archive and the wheel as they are handed out, file by file."""
    build = (  # which write to sys.argv
        "import sys; from setuptools.build_meta import *; to = sys.argv[1]; build_sdist(to); build_wheel(to)"
    )
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=ROOT, check=True)
    (archive,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(archive) as file:
        entries = file.getmembers()
    assert all(entry.isfile() or entry.isdir() for entry in entries)
    top = archive.name.removesuffix(".tar.gz") + "/"
    packed = {entry.name.removeprefix(top) for entry in entries if entry.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {path for path in packed if path.startswith("normops.egg-info/")}
    assert packed - made == _handed_on()

    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    info = f"normops-{normops.__version__}.dist-info/"
    about = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt", "licenses/LICENSE"}
    assert names == _tracked("normops") | {f"normops/{LIBRARY.name}"} | {info + name for name in about}
