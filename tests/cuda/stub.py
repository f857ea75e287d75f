"""The operators on CUDA's side, from torch down to the launch, for CPU tensors and with a runtime that starts nothing.

Launchers are the objects that nvcc has made (``make cuda``), so what is timed is what a card's host would do but for
the launch itself and the allocator of device memory. Outputs are left as they were allocated.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from emulator.backend import SHARED  # noqa: E402
from emulator.build import CXX, _torch_flags  # noqa: E402

FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-DNDEBUG", "-DAT_PER_OPERATOR_HEADERS", "-Wl,--no-undefined"]


def objects():
    """What nvcc made of the launchers in the latest build; nothing where there was none."""
    folders = sorted((ROOT / "build").glob("torch-*/cuda"), key=lambda folder: folder.stat().st_mtime)
    return sorted(folders[-1].glob("*.o")) if folders else []


def cuda_headers():
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "include/cuda_runtime_api.h").exists():
            return Path(home) / "include"
    return None


def possible():
    return bool(objects() and cuda_headers())


@functools.cache
def library():
    """Compiled if anything it is made of is newer."""
    cuda = ROOT / "csrc/cuda"
    glue = sorted(path for path in cuda.glob("*.cpp") if path.name != "register.cpp")
    sources = [*glue, *SHARED, ROOT / "tests/emulator/backend.cpp"]
    sources.append(Path(__file__).with_name("runtime.cpp"))
    target = ROOT / "build/stub.so"
    made_of = [*objects(), *sources, *cuda.glob("*.h"), *(ROOT / "csrc").glob("*.h")]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in made_of):
        includes, libraries = _torch_flags()
        command = [*CXX.split(), *FLAGS, *includes, f"-isystem{cuda_headers()}", *map(str, sources)]
        command += [*map(str, objects()), "-o", str(target), *libraries, "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.normops_stub_report.restype = ctypes.c_char_p
    return loaded


@contextlib.contextmanager
def entered():
    """Within, operators of normops on CPU tensors launch the CUDA kernels, which does nothing."""
    functions = library()
    functions.normops_emulated_enter()
    try:
        yield
    finally:
        functions.normops_emulated_leave()


def launched(call):
    """[(kernel's mangled name, launches, blocks)] of a call."""
    library().normops_stub_clear()
    call()
    lines = library().normops_stub_report().decode().splitlines()
    return [(name, int(count), int(blocks)) for count, blocks, name in (line.split(" ", 2) for line in lines)]
