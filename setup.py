"""Builds the C++ library. Everything else about the package is in pyproject.toml."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError:
    raise SystemExit(
        "normops is compiled against the PyTorch it will run with: install torch first (pip install torch), "
        "then run pip install --no-build-isolation ."
    ) from None

ROOT = Path(__file__).parent
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
KERNELS = ["csrc/cpu/channel_kernels.cpp", "csrc/cpu/row_kernels.cpp"]

# g++ 12 takes the undefined lanes of AVX-512 intrinsics for a mistake.
KERNEL_FLAGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# Devices the CUDA kernels are compiled for, as far as the toolkit knows them; TORCH_CUDA_ARCH_LIST overrides.
ARCHITECTURES = "8.0 8.6 9.0 10.0 12.0+PTX"
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]


def cuda_toolkit():
    """Its folder, where CUDA kernels are to be built: NORMOPS_CUDA=1 or 0, or as torch was; otherwise None."""
    wanted = os.environ.get("NORMOPS_CUDA", "1" if torch.version.cuda else "0") != "0"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), Path(nvcc).parent.parent, "/usr/local/cuda"]
    found = [Path(home) for home in homes if home and (Path(home) / "bin/nvcc").exists() and list(cudart(home))]
    if wanted and not found and "NORMOPS_CUDA" in os.environ:
        raise SystemExit("NORMOPS_CUDA=1, but there is no CUDA toolkit: set CUDA_HOME to the folder with bin/nvcc")
    return found[0] if wanted and found else None


def cudart(home):
    return (path for lib in ("lib64", "lib", "targets/*/lib") for path in Path(home).glob(f"{lib}/libcudart_static.a"))


def cuda_architectures(home):
    known = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    listed = re.findall(r"(\d+\.\d+[af]?)(\+PTX)?", wanted or ARCHITECTURES)
    return [(arch, ptx) for arch, ptx in listed if wanted or f"compute_{arch.replace('.', '')}" in known.split()]


def cuda_objects(home, folder):
    """Compiles csrc/cuda/*.cu with ninja, which keeps what has not changed."""
    flags = [*CUDA_FLAGS, f"--threads={max(1, (os.cpu_count() or 1) // 4)}"]
    flags += [f"-isystem={path}" for path in include_paths()]
    for arch, ptx in cuda_architectures(home):
        number = arch.replace(".", "")
        flags += [f"-gencode=arch=compute_{number},code={code}_{number}" for code in ("sm", "compute")[: 1 + bool(ptx)]]
    command = f"{home / 'bin/nvcc'} {shlex.join(flags)} -MD -MF $out.d -c $in -o $out > $out.ptxas 2>&1 || (cat $out.ptxas; false)"
    rules = [f"rule cuda\n  command = {command}\n  depfile = $out.d\n  deps = gcc\n"]
    objects = [folder.resolve() / Path(source).with_suffix(".o").name for source in csrc("*.cu")]
    rules += [f"build {out}: cuda {ROOT / source}\n" for out, source in zip(objects, csrc("*.cu"), strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("".join(rules))
    ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    subprocess.run([*ninja, "-C", str(folder)], check=True)
    return [str(path) for path in objects]


class Build(BuildExtension):
    """Compiles the kernels for every instruction set, and keeps objects between builds."""

    def finalize_options(self):
        # Editable installs would build in a temporary directory, from scratch each time.
        self.build_temp = self.build_temp or str(ROOT / "build" / f"torch-{torch.__version__}")
        super().finalize_options()

    def build_extension(self, ext):
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=f"{self.build_temp}/{name}",
                include_dirs=ext.include_dirs,
                extra_postargs=[*FLAGS, *KERNEL_FLAGS, *flags, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"],
                depends=ext.depends,
            )
        if CUDA:
            ext.extra_objects += cuda_objects(CUDA, Path(self.build_temp) / "cuda")
            ext.extra_objects.append(str(next(cudart(CUDA))))
        super().build_extension(ext)


def csrc(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


CUDA = cuda_toolkit()
DEFINES = [("NORMOPS_VERSION", f'"{VERSION}"'), ("NORMOPS_INSTRUCTION_SETS", f'"{" ".join(INSTRUCTION_SETS)}"')]
DEFINES += [("NORMOPS_X86", None)] if X86 else []
if CUDA:
    toolkit = subprocess.run([CUDA / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    architectures = " ".join(arch + ptx for arch, ptx in cuda_architectures(CUDA))
    DEFINES.append(("NORMOPS_CUDA", f'"CUDA {re.search("release ([0-9.]+)", toolkit)[1]} for {architectures}"'))

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
