"""The C++ compiler and what it says of itself, asked before anything is compiled."""

import os
import re
import shlex
import subprocess
import sys

GCC, CLANG = 12, 14  # the oldest that compile the library
STANDARD = "-std=c++20"


class Compiler:
    """``$CXX``, or ``c++``."""

    def __init__(self):
        self.command = shlex.split(os.environ.get("CXX") or "c++")
        self.name = shlex.join(self.command)
        self._macros = self._macros_with()
        clang, gcc = (int(self._macros.get(name, 0)) for name in ("__clang_major__", "__GNUC__"))
        self.version = f"clang {clang}" if clang else f"g++ {gcc}"
        if (clang or gcc) < (CLANG if clang else GCC):
            raise SystemExit(
                f"normops needs g++ {GCC} or clang {CLANG}, or later, and {self.name} is {self.version}: "
                "set CXX to a newer compiler"
            )
        if "_OPENMP" not in self._macros_with(*self.openmp) and not (clang and sys.platform == "linux"):
            raise SystemExit(
                f"normops needs OpenMP, which {self.name} ({self.version}) does not have: install it for this "
                "compiler, or set CXX to another"
            )

    def _macros_with(self, *flags):
        """The macros that the compiler defines by itself, which tell its version, its target and its OpenMP."""
        try:
            preprocessor = subprocess.run(
                [*self.command, STANDARD, *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
            )
        except OSError:
            raise SystemExit(
                f"normops needs a C++ compiler, and there is no {self.name}: install g++ {GCC} or later, or set CXX"
            ) from None
        if preprocessor.returncode:
            raise SystemExit(
                f"normops needs a compiler for C++20 and OpenMP (g++ {GCC} or clang {CLANG}, or later); {self.name} "
                f"says: {preprocessor.stderr.strip()[:200]}"
            )
        return dict(re.findall(r"^#define (\w+) (.*)$", preprocessor.stdout, re.MULTILINE))

    @property
    def openmp(self):
        """The flags. Under clang on Linux they name torch's own runtime (csrc/cpu/parallel.h); not tried on macOS."""
        if not self.is_clang:
            return ["-fopenmp"]
        return ["-fopenmp=libgomp"] if sys.platform == "linux" else ["-Xpreprocessor", "-fopenmp"]

    @property
    def is_x86(self):
        return "__x86_64__" in self._macros

    @property
    def is_clang(self):
        return "__clang_major__" in self._macros
