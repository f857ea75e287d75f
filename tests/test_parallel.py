"""Threads, processes and instruction sets."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import each_case
from comparison import check

import normops
from normops._ops import _C, BUILD_INFO

TESTS = Path(__file__).parent
# From least to best. Torch has no name for the last, which is taken unless another is asked for.
CAPABILITIES = {"DEFAULT": "default", "AVX2": "avx2", "AVX512": "avx512", "AVX512_BF16": None}
ORDER = list(CAPABILITIES)


def environment(name):
    """For a process that is to use the kernels of one instruction set."""
    others = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    return others if CAPABILITIES[name] is None else {**others, "ATEN_CPU_CAPABILITY": CAPABILITIES[name]}


def best_instruction_set():
    """What the processor has. Torch would believe ATEN_CPU_CAPABILITY, and crash, if it named more than that."""
    command = [sys.executable, "-c", "from normops._ops import _C; print(_C.instruction_set())"]
    best = subprocess.run(command, env=environment("AVX512_BF16"), capture_output=True, text=True, check=True)
    return best.stdout.strip()


@pytest.mark.skipif(torch.get_num_threads() == 1, reason="torch has one thread")
def test_threads_share_the_work():
    assert _C.threads_used(8) > 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_are_those_of_torch(count, threads):
    """An OpenMP runtime of our own beside torch's would have as many threads as there are cores."""
    threads(count)
    assert _C.threads_used(4 * count) == count


def test_little_work_is_not_shared():
    assert _C.threads_used(1) == 1


@each_case
def test_large_input_on_many_threads(case, threads):
    threads(4)
    check(case.sample((8, 12, 60, 70)))


@each_case
def test_large_output(case):
    """The pages of 32 MiB and more are asked for first."""
    check(case.sample((2, 4, 1024, 1040)), backward=False)


def test_instruction_set_in_use():
    capability = torch.backends.cpu.get_cpu_capability()
    assert _C.instruction_set().removesuffix("_BF16") == (capability if capability in ORDER else "DEFAULT")


@pytest.mark.parametrize("name", [n for n in BUILD_INFO["instruction_sets"].split() if n != _C.instruction_set()])
def test_other_instruction_sets(name):
    """The kernels not in use here pass the tests of numbers, sizes and dtypes in a process of their own."""
    if ORDER.index(name) > ORDER.index(best_instruction_set()):
        pytest.skip(f"the processor lacks {name}")
    files = [TESTS / f"test_{what}.py" for what in ("forward", "backward", "dtypes", "edge_cases")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "not emulated", *files],
        # One thread: sharing work is the same code for all, and has its own tests.
        env={**environment(name), "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert f"cpu kernels: {name}\n" in result.stdout
    assert result.returncode == 0, result.stdout[-3000:]


class _Normalized(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return normops.functional.layer_norm(torch.arange(400_000.0).view(100, -1) * i, (4000,))


def test_fork_after_use():
    """Workers of a DataLoader start as forks of a process whose threads have worked."""
    dataset = _Normalized()
    expected = torch.stack([dataset[i] for i in range(len(dataset))])
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=len(dataset), num_workers=1, multiprocessing_context="fork", timeout=60
    )
    assert torch.equal(next(iter(loader)), expected)


def test_calls_from_python_threads():
    """The functions hold no state: calls may overlap."""
    x = torch.randn(8, 6, 50, 60)
    expected = normops.functional.group_norm(x, 3)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: normops.functional.group_norm(x, 3), range(16))
        assert all(torch.equal(result, expected) for result in results)
