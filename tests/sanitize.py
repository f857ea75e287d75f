"""``make sanitize``: the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests of numbers,
layouts and dtypes. Arguments are files and options for pytest, in the place of all of these.

The copy of the source tree in ``build/sanitize`` is kept, and compiled again where it has changed. Any finding ends the
run. The instruction set is AVX2, with plain loads and stores for tails: the sanitizers do not see those with masks.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "sanitize"
COPIED = ["building", "csrc", "normops", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
NOT_COPIED = shutil.ignore_patterns("*.so", "__pycache__")
# Of -fsanitize=undefined all but vptr, which would ask for type information that torch's libraries do not give away.
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -DNORMOPS_SANITIZED "
FLAGS += "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
# With -O3, each file of kernels would take minutes to compile.
SETUP = "import runpy; from building import library; library.KERNEL_FLAGS[0] = '-O1'; runpy.run_path('setup.py')"
TESTS = ["forward", "backward", "layouts", "dtypes", "edge_cases", "fusion", "masks", "full_masks", "channel_norms"]
TESTS += ["layer_norm_2d", "sums", "extremes", "running_stats", "memory_efficient", "varying_parameters", "errors"]
TESTS += ["accelerate"]
# What runs other processes, measures memory or waits for a clock is not about the kernels; compilers take minutes here.
DESELECTED = "not emulated and not compile and not backend and not twice and not warning"


def environment():
    command = shlex.split(os.environ.get("CXX", "c++"))

    def runtime(name):
        return subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()

    return {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        # Python keeps what it has until the end. Torch asks for more memory than there is in some tests.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:strict_string_checks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        # Every array is a block of malloc, which has red zones around it.
        "PYTHONMALLOC": "malloc",
        "ATEN_CPU_CAPABILITY": "avx2",
    }


def copy():
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.rmtree(TREE / "tests", ignore_errors=True) if name == "tests" else None
            shutil.copytree(ROOT / name, TREE / name, ignore=NOT_COPIED, dirs_exist_ok=True)
        else:
            shutil.copy2(ROOT / name, TREE / name)


def build():
    flags = {"CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} {FLAGS}", "LDFLAGS": FLAGS}
    sets = {"NORMOPS_INSTRUCTION_SETS": "avx2", "NORMOPS_CUDA": "0"}
    command = [sys.executable, "-c", SETUP, "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=TREE, env={**os.environ, **flags, **sets}, check=True)


def main():
    TREE.mkdir(parents=True, exist_ok=True)
    copy()
    build()
    arguments = sys.argv[1:] or [f"tests/test_{name}.py" for name in TESTS]
    # What a sanitizer writes as it ends the process would be lost with the file that pytest captures.
    options = ["-q", "--capture=sys", "-p", "no:cacheprovider", "-k", DESELECTED]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(command, cwd=TREE, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
