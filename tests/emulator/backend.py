"""The emulated kernels behind normops' operators, for CPU tensors: what tests know as the device ``emulated``."""

import contextlib
import functools
import os

from emulator.build import ROOT, build
from emulator.library import Library

CUDA = ROOT / "csrc" / "cuda"
# What the glue between operators and kernels uses of the rest of the library.
SHARED = [ROOT / "csrc" / name for name in ("checks.cpp", "tensors.cpp", "autograd/composition.cpp")]


def exists():
    """Whether there are CUDA kernels to emulate."""
    return any(CUDA.glob("*.cu"))


@functools.cache
def library():
    """Compiled at first use, with a sanitizer if NORMOPS_EMULATOR_VARIANT says so."""
    variant = os.environ.get("NORMOPS_EMULATOR_VARIANT", "plain")
    glue = sorted(path for path in CUDA.glob("*.cpp") if path.name != "register.cpp")  # which is for CUDA tensors
    others = [*glue, *SHARED, ROOT / "tests" / "emulator" / "backend.cpp"]
    return Library(build("backend", sorted(CUDA.glob("*.cu")), others, variant, torch=True))


@contextlib.contextmanager
def entered():
    """Within, operators of normops on CPU tensors run the CUDA kernels."""
    functions = library().functions
    functions.normops_emulated_enter()
    try:
        yield
    finally:
        functions.normops_emulated_leave()


def summary():
    """What was run, in one sentence; None if nothing was."""
    if not library.cache_info().currsize or not (ran := library().report()):
        return None

    def total(field):
        return f"{sum(getattr(launches, field) for launches in ran):,}"

    return (
        f"{len({launches.kernel for launches in ran})} CUDA kernels in {len(ran)} instantiations were emulated: "
        f"{total('launches')} launches, {total('blocks')} blocks, {total('threads')} threads, "
        f"{total('barriers')} barriers, {total('exchanges')} exchanges within warps"
    )
