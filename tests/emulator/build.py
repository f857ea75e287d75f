"""Compiles kernels with g++ and the emulator into a shared library. Ninja compiles again only what changed."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CXX = os.environ.get("CXX", "g++")

# The emulator answers these itself, so they need no sanitizer's library.
CHECKS = "-fsanitize=alignment,null,bounds"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
DEFINES = ["-DNORMOPS_EMULATED", "-DAT_PER_OPERATOR_HEADERS", f"-I{HERE}"]

# For the emulator, for kernels, for the linker.
VARIANTS = {
    "plain": ([], [], []),
    "ucontext": (["-DNORMOPS_EMULATOR_UCONTEXT"], [], []),
    "asan": (["-DNORMOPS_EMULATOR_ASAN"], ["-fsanitize=address"], ["-fsanitize=address"]),
    # A call for every access, which the emulator counts (traffic.h).
    "counting": (
        [],
        [
            "-fsanitize=kernel-address",
            "--param asan-instrumentation-with-call-threshold=0",
            "--param asan-stack=0",
            "--param asan-globals=0",
        ],
        [],
    ),
    "tsan": (["-DNORMOPS_EMULATOR_TSAN"], ["-fsanitize=thread"], ["-fsanitize=thread"]),
}

RULES = """
rule compile
  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared -Wl,-Bsymbolic -Wl,--no-undefined $in -o $out $flags
"""


def _torch_flags():
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-isystem{path}" for path in include_paths()]
    return includes, [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]


def build(name, kernels, others=(), variant="plain", torch=False):
    """The path of a library made of ``kernels``, ``others`` (host code that is not checked) and the emulator."""
    for_emulator, for_kernels, for_linker = VARIANTS[variant]
    includes, libraries = _torch_flags() if torch else ([], [])
    flags = [*FLAGS, *DEFINES, *includes]
    own = ("device", "emulator", "interface", "messages", "traffic")
    sources = {HERE / f"{name}.cpp": [*flags, *for_emulator] for name in own}
    sources |= {Path(path): [*flags, CHECKS, *for_kernels, "-x c++"] for path in kernels}
    folder = ROOT / "build" / "emulator" / f"{name}-{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    if others:  # as one file, since torch's headers take longer to read than any of them
        together, includes = folder / "others.cpp", "".join(f'#include "{path}"\n' for path in others)
        sources[together] = flags
    library = folder / f"{name}.so"
    rules, objects = [RULES.format(cxx=CXX)], []
    for source, options in sources.items():
        objects.append(folder / f"{source.parent.name}-{source.name}.o")
        rules.append(f"build {objects[-1]}: compile {source}\n  flags = {' '.join(options)}\n")
    link = " ".join([*for_linker, *libraries, "-ldl"])
    rules.append(f"build {library}: link {' '.join(map(str, objects))}\n  flags = {link}\n")

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if others and (not together.exists() or together.read_text() != includes):
            together.write_text(includes)
        (folder / "build.ninja").write_text("\n".join(rules))
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        done = subprocess.run([*ninja, "-C", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building {library} failed:\n{done.stdout}{done.stderr}")
    return library
