"""``python -m normops``: what was built, and what runs here."""

import platform

import torch

from normops._ops import _C, BUILD_INFO


def description() -> dict[str, str]:
    threads = torch.get_num_threads()
    return {
        "normops": BUILD_INFO["version"],
        "torch": f"{torch.__version__} (built against {BUILD_INFO['torch']})",
        "python": platform.python_version(),
        "compiler": BUILD_INFO["compiler"],
        "cpu kernels": f"{_C.instruction_set()} (built: {BUILD_INFO['instruction_sets']})",
        "cpu threads": f"{_C.threads_used(4 * threads)} used of {threads} (OpenMP {BUILD_INFO['openmp']})",
        "cuda kernels": BUILD_INFO["cuda"] or "not built",
    }


def main() -> None:
    for name, value in description().items():
        print(f"{name + ':':14}{value}")


if __name__ == "__main__":
    main()
