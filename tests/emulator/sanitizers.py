"""Runs Python with a sanitizer's library loaded before anything else."""

import os
import subprocess
import sys

import pytest

from emulator.build import CXX, HERE

OPTIONS = {"plain": {}, "asan": {"ASAN_OPTIONS": "detect_leaks=0"}, "tsan": {"TSAN_OPTIONS": "exitcode=66"}}


def _runtime(name):
    """The path of a library that comes with the compiler, or None."""
    path = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else None


def run_python(variant, *arguments, **environment):
    """Runs Python in a process of its own; ``variant`` as in ``build``."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)]),
        # Without Python's own allocator every array is a block of malloc, which sanitizers guard.
        "PYTHONMALLOC": "malloc",
        # ThreadSanitizer cannot see how OpenMP's threads, which it did not compile, wait for each other.
        "OMP_NUM_THREADS": "1",
        **OPTIONS[variant],
        **environment,
    }
    if variant != "plain":
        if not (library := _runtime(f"lib{variant}.so")):
            pytest.skip(f"{CXX} has no lib{variant}")
        environment["LD_PRELOAD"] = f"{library} {_runtime('libstdc++.so.6')}"
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)
