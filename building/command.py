"""The build_ext command: one ninja for everything, as torch's own has one set of flags, and objects that are kept."""

import os
import re
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils.cpp_extension import BuildExtension, CppExtension

from building.compiler import Compiler
from building.cuda import CudaToolkit
from building.library import compile_library, instruction_sets

ROOT = Path(__file__).resolve().parent.parent


class Build(BuildExtension):
    def build_extensions(self):
        if self.compiler.compiler_type != "unix":
            raise SystemExit("normops is built with g++ or clang; the compiler of Visual Studio has not been tried")
        self.cxx, self.cuda = Compiler(), CudaToolkit.find()
        super().build_extensions()

    def build_extension(self, ext):
        sets = instruction_sets(self.cxx)
        report = {"VERSION": self.distribution.get_version(), "INSTRUCTION_SETS": " ".join(sets)}
        report |= {"CUDA": self.cuda.description()} if self.cuda else {}
        objects = compile_library(
            ROOT / "csrc",
            ROOT / "build" / f"torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}",
            self.cxx,
            sets,
            [*ext.include_dirs, *self.include_dirs],
            [f'-DNORMOPS_{name}="{value}"' for name, value in report.items()],
            self.cuda,
        )
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        runtime = [str(self.cuda.runtime)] if self.cuda else []
        # Addresses of other libraries are looked up at once, and cannot be written over then; stacks hold no code.
        # Names of functions are for debuggers and sanitizers, if CXXFLAGS asks for them.
        strip = [] if re.search(r"(^|\s)-g[^0]", os.environ.get("CXXFLAGS", "") + " ") else ["-s"]
        hardened = ["-Wl,-z,relro,-z,now,-z,noexecstack"] if sys.platform == "linux" else []
        self.compiler.link_shared_object(
            [*objects, *runtime],
            str(path),
            libraries=self.get_libraries(ext),
            library_dirs=[*self.library_dirs, *ext.library_dirs],
            extra_postargs=[*self.cxx.openmp, *strip, *hardened, *(["-ldl", "-lrt", "-lpthread"] if self.cuda else [])],
            target_lang="c++",
        )


EXTENSION = CppExtension("normops._C", [])
