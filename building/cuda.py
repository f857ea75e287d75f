"""Compiles the CUDA kernels with nvcc. They need no torch, so this works beside any, whether it has CUDA or not."""

import ctypes
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

# Devices the kernels are compiled for where there is no card, as far as the toolkit knows them. Drivers compile the
# intermediate code of the oldest for devices that are not listed, and that of the newest for those to come.
ARCHITECTURES = "8.0+PTX 8.6 9.0 10.0 12.0+PTX"
FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]


def _driver():
    """The major version of CUDA that this machine's driver runs; None where there is no driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000


class CudaToolkit:
    def __init__(self, home, runtime):
        self.home, self.nvcc, self.runtime = home, home / "bin/nvcc", runtime

    @classmethod
    def find(cls):
        """The toolkit where there are to be CUDA kernels: with NORMOPS_CUDA=1, or, without it, where torch has CUDA."""
        wish = os.environ.get("NORMOPS_CUDA")
        if wish == "0" or (wish is None and not torch.version.cuda):
            return None
        nvcc = shutil.which("nvcc")
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).parent.parent]
        for home in [Path(home) for home in (*homes, "/usr/local/cuda") if home]:
            for runtime in home.glob("**/libcudart_static.a") if (home / "bin/nvcc").exists() else ():
                return cls(home, runtime)._checked()
        if wish is None:
            print("normops: torch has CUDA, but there is no CUDA toolkit: building for the CPU alone", file=sys.stderr)
            return None
        raise SystemExit("NORMOPS_CUDA is set, but there is no CUDA toolkit: set CUDA_HOME to the folder with bin/nvcc")

    def _checked(self):
        """A driver that runs torch's CUDA need not run that of another major version."""
        if (driver := _driver()) and driver < int(self.release.split(".")[0]):
            raise SystemExit(
                f"normops: the NVIDIA driver of this machine runs CUDA {driver}, and {self.nvcc} is of CUDA "
                f"{self.release}: set CUDA_HOME to a toolkit of CUDA {driver}, or NORMOPS_CUDA=0 to do without"
            )
        if torch.version.cuda and torch.version.cuda.split(".")[0] != self.release.split(".")[0]:
            raise SystemExit(
                f"normops: torch is built for CUDA {torch.version.cuda}, and {self.nvcc} is of CUDA {self.release}: "
                f"set CUDA_HOME to a toolkit of CUDA {torch.version.cuda}, or NORMOPS_CUDA=0 to do without"
            )
        return self

    @functools.cached_property
    def release(self):
        return re.search("release ([0-9.]+)", self._ask("--version"))[1]

    def _ask(self, *arguments):
        return subprocess.run([self.nvcc, *arguments], capture_output=True, text=True, check=True).stdout

    def architectures(self):
        """[("9.0", ""), ("12.0", "+PTX")]: those of TORCH_CUDA_ARCH_LIST, of the cards in this machine, or all."""
        if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            listed = re.findall(r"(\d+\.\d+[af]?)(\+PTX)?", wanted)
            if not listed:
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as '{ARCHITECTURES}', got {wanted!r}")
            return listed
        if torch.cuda.is_available():
            cards = {torch.cuda.get_device_capability(card) for card in range(torch.cuda.device_count())}
            return [(f"{major}.{minor}", "") for major, minor in sorted(cards)]
        known = self._ask("--list-gpu-arch").split()
        listed = re.findall(r"(\d+\.\d+)(\+PTX)?", ARCHITECTURES)
        return [(arch, ptx) for arch, ptx in listed if f"compute_{arch.replace('.', '')}" in known]

    def description(self):
        return f"CUDA {self.release} for {' '.join(arch + ptx for arch, ptx in self.architectures())}"

    def compile(self, ninja, sources):
        """Has ``ninja`` compile the kernels; the paths of the objects. What ptxas says of each is kept beside it."""
        flags = [*FLAGS, f"--threads={max(1, (os.cpu_count() or 1) // len(sources))}"]
        flags += [f"-isystem={path}" for path in include_paths()]
        for arch, ptx in self.architectures():
            number = arch.replace(".", "")
            codes = [f"sm_{number}", f"compute_{number}"] if ptx else [f"sm_{number}"]
            flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
        command = f"{shlex.quote(str(self.nvcc))} {shlex.join(flags)} -MD -MF $out.d -c $in -o $out"
        ninja.rule("cuda", f"{command} > $out.ptxas 2>&1 || (cat $out.ptxas; false)", "compile $out")
        return [ninja.make(f"cuda/{source.stem}.o", "cuda", source) for source in sources]
