"""Builds the C++ library. Everything else about the package is in pyproject.toml."""

import re
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    raise SystemExit(
        "normops is compiled against the PyTorch it will run with: install torch first (pip install torch), "
        "then run pip install --no-build-isolation ."
    ) from None

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from building.compiler import Compiler  # noqa: E402
from building.cuda import CudaToolkit  # noqa: E402
from building.library import compile_library, instruction_sets  # noqa: E402

NAME = "normops._C"
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]

OLDEST_TORCH, NEWEST_TESTED_TORCH = (2, 11), (2, 15)
TORCH = tuple(map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups()))


def requirement():
    """The torch that goes with this package: for the source any that is new enough, for what was compiled the one it
    was compiled with, as torch promises no binary interface across minor versions."""
    if "sdist" in sys.argv:
        return f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
    release = torch.__version__.partition("+")[0]
    return f"torch=={TORCH[0]}.{TORCH[1]}.*" if re.fullmatch(r"[\d.]+", release) else f"torch=={release}"


class Build(BuildExtension):
    """One ninja for everything, as torch's own has one set of flags, and objects that are kept between builds."""

    def build_extensions(self):
        if self.compiler.compiler_type != "unix":
            raise SystemExit("normops is built with g++ or clang; the compiler of Visual Studio has not been tried")
        if TORCH < OLDEST_TORCH:
            raise SystemExit(f"normops needs torch 2.11 or later, and this is {torch.__version__}: install a newer one")
        if TORCH > NEWEST_TESTED_TORCH:
            newest = ".".join(map(str, NEWEST_TESTED_TORCH))
            print(f"normops: torch {torch.__version__} is newer than {newest}, the newest tested", file=sys.stderr)
        self.cxx, self.cuda = Compiler(), CudaToolkit.find()
        super().build_extensions()

    def build_extension(self, ext):
        sets = instruction_sets(self.cxx)
        report = {"VERSION": VERSION, "INSTRUCTION_SETS": " ".join(sets)}
        report |= {"CUDA": self.cuda.description()} if self.cuda else {}
        objects = compile_library(
            ROOT / "csrc",
            ROOT / "build" / f"torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}",
            self.cxx,
            sets,
            [*ext.include_dirs, *self.include_dirs],
            ["-DTORCH_EXTENSION_NAME=_C", *(f'-DNORMOPS_{name}="{value}"' for name, value in report.items())],
            self.cuda,
        )
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        runtime = [str(self.cuda.runtime)] if self.cuda else []
        self.compiler.link_shared_object(
            [*objects, *runtime],
            str(path),
            libraries=self.get_libraries(ext),
            library_dirs=[*self.library_dirs, *ext.library_dirs],
            extra_postargs=[*self.cxx.openmp, "-s", *(["-ldl", "-lrt", "-lpthread"] if self.cuda else [])],
            target_lang="c++",
        )


setup(
    install_requires=[requirement()],
    ext_modules=[CppExtension(NAME, [])],
    cmdclass={"build_ext": Build},
)
