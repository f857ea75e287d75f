"""Builds the C++ library. Everything else about the package is in pyproject.toml."""

import platform
import re
import sys
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

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from setup_cuda import CudaToolkit  # noqa: E402

NAME = "normops._C"
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]

# -O3: g++ does not vectorise at -O2. -fopenmp: at::parallel_for is serial without it. No -march=native and no
# -ffast-math: a wheel runs on other machines, and the sums rely on rounding.
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]

# The kernel files are compiled once for each of these; the library picks one when it is loaded.
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"DEFAULT": []}
if X86:
    INSTRUCTION_SETS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512_BF16"] = [*INSTRUCTION_SETS["AVX512"], "-mavx512bf16"]
KERNELS = ["csrc/cpu/channel_kernels.cpp", "csrc/cpu/row_kernels.cpp"]

# A square root that may set errno is no vector instruction. g++ 12 takes undefined lanes of AVX-512 for a mistake.
KERNEL_FLAGS = ["-fno-math-errno", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]

OBJECTS = str(ROOT / "build" / f"torch-{torch.__version__}")


class Build(BuildExtension):
    """Compiles the kernels for every instruction set, and keeps objects between builds."""

    def finalize_options(self):
        # Editable installs would build in a temporary directory, from scratch each time.
        self.build_temp = self.build_temp or OBJECTS
        super().finalize_options()

    def build_extension(self, ext):
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=f"{OBJECTS}/{name}",  # the same with and without CUDA
                include_dirs=ext.include_dirs,
                extra_postargs=[
                    *FLAGS,
                    *KERNEL_FLAGS,
                    *flags,
                    f"-DCPU_CAPABILITY={name}",
                    f"-DCPU_CAPABILITY_{name.partition('_')[0]}",
                ],
                depends=ext.depends,
            )
        if CUDA:
            ext.extra_objects += CUDA.compile([ROOT / path for path in csrc("*.cu")], Path(self.build_temp) / "cuda")
            ext.extra_objects.append(str(CUDA.runtime))
        super().build_extension(ext)


def csrc(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


CUDA = CudaToolkit.find()
DEFINES = [("NORMOPS_VERSION", f'"{VERSION}"'), ("NORMOPS_INSTRUCTION_SETS", f'"{" ".join(INSTRUCTION_SETS)}"')]
DEFINES += [("NORMOPS_X86", None)] if X86 else []
DEFINES += [("NORMOPS_CUDA", f'"{CUDA.description()}"')] if CUDA else []

setup(
    ext_modules=[
        CppExtension(
            NAME,
            [path for path in csrc("*.cpp") if path not in KERNELS and (CUDA or "cuda" not in Path(path).parts)],
            depends=csrc("*.*"),
            define_macros=DEFINES,
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp", "-s", *(["-ldl", "-lrt", "-lpthread"] if CUDA else [])],
        )
    ],
    cmdclass={"build_ext": Build},
)
