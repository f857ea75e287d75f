"""Runs Python with a sanitizer's library loaded before anything else."""

import functools
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from emulator.build import CXX, HERE

OPTIONS = {"plain": {}, "asan": {"ASAN_OPTIONS": "detect_leaks=0"}, "tsan": {"TSAN_OPTIONS": "exitcode=66"}}


def _runtime(name):
    """The path of a library that comes with the compiler, or None."""
    command = [*shlex.split(CXX), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else None


@functools.cache
def _fixed_addresses():
    """The command for them, if it may be used here."""
    command = ["setarch", "-R"]
    allowed = shutil.which(command[0]) and not subprocess.run([*command, "true"], capture_output=True).returncode
    return command if allowed else []


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
    command = [sys.executable, *arguments]
    if variant != "plain":
        if not (library := _runtime(f"lib{variant}.so")):
            pytest.skip(f"{CXX} has no lib{variant}")
        command = ["env", f"LD_PRELOAD={library} {_runtime('libstdc++.so.6')}", *command]
    if variant == "tsan":  # that of older compilers does not start where addresses are drawn from too wide a range
        command = [*_fixed_addresses(), *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
