"""How the sources in csrc become objects: what is compiled together, and with which flags."""

import os
import shlex

import torch

from building.compiler import STANDARD
from building.ninja import Ninja, write

# No -march=native and no -ffast-math: a wheel runs on other machines, and the sums rely on rounding. A header of torch
# for each operator, as that of all of them takes longer to read than most files to compile. What is no kernel checks
# and dispatches: with -O2 calls take as long, and compiling them takes a quarter longer.
FLAGS = ["-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-DNDEBUG"]
FLAGS += ["-DAT_PER_OPERATOR_HEADERS"]

# A square root that may set errno is no vector instruction. g++ 12 takes undefined lanes of AVX-512 for a mistake.
KERNEL_FLAGS = ["-O3", "-fno-math-errno"]
PLAIN_FLAGS = ["-O1"]  # the set without vectors, where there is one with them: to compare with, not for speed
KERNEL_FLAGS_GCC = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Compiled once for each instruction set: what is compiled together, the longest first.
CHANNEL = ["channel_backward", "channel_forward", "epilogue"]
UNITS = {"channel": CHANNEL, **{kernel: [kernel] for kernel in CHANNEL}, "row": ["row_forward", "row_backward"]}
KERNELS = [f"cpu/{kernel}.cpp" for kernel in (*CHANNEL, *UNITS["row"])]
PYTHON = ("module.cpp", "python_calls.cpp")  # whose header wants to be the first

_AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]
X86 = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": _AVX512,
    "AVX512_BF16": [*_AVX512, "-mavx512bf16"],  # the bfloat16 kernels alone; beside AVX512
}


def instruction_sets(compiler):
    """The sets to compile the kernels for, with their flags; the library picks one when it is loaded.

    NORMOPS_INSTRUCTION_SETS names some of them, or is "native": the one that torch takes on this machine."""
    known = X86 if compiler.is_x86 else {"DEFAULT": []}
    wanted = os.environ.get("NORMOPS_INSTRUCTION_SETS", "").upper().split() or list(known)
    if wanted == ["NATIVE"]:
        capability = torch.backends.cpu.get_cpu_capability()
        wanted = [name for name in known if name.startswith(capability)] or ["DEFAULT"]
    if "AVX512_BF16" in wanted:
        wanted.append("AVX512")  # which has everything but bfloat16
    if not set(wanted) <= set(known):
        raise SystemExit(f"NORMOPS_INSTRUCTION_SETS: expected some of {' '.join(known)}, got {' '.join(wanted)}")
    return {name: flags for name, flags in known.items() if name in wanted}


def compile_library(csrc, folder, compiler, sets, include_dirs, defines, cuda):
    """Compiles what is out of date; the paths of all objects. ``defines`` is what module.cpp reports."""
    ninja = Ninja(folder)
    environment = shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CXXFLAGS", ""))
    # g++ collects its garbage less often: a twentieth of the time, and still below 1.5 GB.
    patience = [] if compiler.is_clang else ["--param=ggc-min-expand=100", "--param=ggc-min-heapsize=393216"]
    common = [
        STANDARD,
        *patience,
        *compiler.openmp,
        *FLAGS,
        *(f"-isystem{path}" for path in include_dirs),
        *environment,
    ]
    command = shlex.join([*compiler.command, *common]).replace("$", "$$")
    ninja.rule("cxx", f"{command} $flags -MD -MF $out.d -c $in -o $out", "$what")

    def compile_one(target, source, *flags):
        return ninja.make(target, "cxx", source, flags=shlex.join(flags).replace("$", "$$"), what=f"compile {target}")

    objects = []  # the longest first
    about = [*defines, *(f"-DNORMOPS_BUILT_{name}" for name in sets)]
    for unit, sources in _units(csrc, cuda is not None).items():
        together = _together(folder / f"{unit}.cpp", sources)
        objects.append(compile_one(f"{unit}.o", together, *about))
    kernel_flags = KERNEL_FLAGS + ([] if compiler.is_clang else KERNEL_FLAGS_GCC)
    for unit, name in _kernel_units(sets, compiler):
        which = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name.partition('_')[0]}"]
        plain = PLAIN_FLAGS if _is_plain(name, compiler) else []
        source = _together(folder / f"{unit}.cpp", [csrc / f"cpu/{kernel}.cpp" for kernel in UNITS[unit]])
        objects.append(compile_one(f"{name}/{unit}.o", source, *kernel_flags, *plain, *sets[name], *which))
    if cuda:
        objects += cuda.compile(ninja, sorted(csrc.glob("cuda/*.cu")))
    ninja.run()
    return objects


def _units(csrc, cuda):
    """Files that call torch are compiled together, as its headers take longer to read than the files: those that need
    autograd's or Python's, which include each other's, and the others."""
    units = {"autograd": [], "operators": []}
    for source in sorted(csrc.rglob("*.cpp"), key=lambda path: (path.name not in PYTHON, path)):
        path = source.relative_to(csrc)
        if str(path) in KERNELS or (path.parts[0] == "cuda" and not cuda):
            continue
        units["autograd" if path.parts[0] == "autograd" or path.name in PYTHON else "operators"].append(source)
    return units


def _is_plain(name, compiler):
    return compiler.is_x86 and name == "DEFAULT"


def _kernel_units(sets, compiler):
    """(unit, set). All of an engine, where few kernels, or plain ones, take no longer than the headers they read."""
    whole = {name for name in sets if _is_plain(name, compiler) or name == "AVX512_BF16"}
    return [(unit, name) for unit in UNITS for name in sets if unit == "row" or (unit == "channel") == (name in whole)]


def _together(path, sources):
    """A file that is all of these."""
    write(path, "".join(f'#include "{source}"\n' for source in sources))
    return path
