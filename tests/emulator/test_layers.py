"""The layers on emulated kernels: what does not follow from running their tests on the device ``emulated``."""

import pytest
import torch
from cases import CASES, SHAPE, each_case

from emulator import backend
from emulator.build import HERE
from emulator.sanitizers import run_python

pytestmark = pytest.mark.skipif(not backend.exists(), reason="there are no CUDA kernels")


def outputs(case):
    torch.manual_seed(0)
    sample = case.sample((5, 6, 9, 10))
    return sample.results(grad=torch.randn_like(sample.input))


@each_case
def test_the_order_of_threads_changes_nothing(case):
    with backend.entered():
        try:
            results = []
            for seed in (0, 1, 2, 3):
                backend.library().seed(seed)
                results.append(outputs(case))
        finally:
            backend.library().seed()
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_the_backend_comes_and_goes(capfd):
    def launches():
        return sum(launches.launches for launches in backend.library().report())

    x, counts = torch.randn(SHAPE), []
    for _ in range(2):
        with backend.entered():
            CASES[0].sample().with_input(x).run()
        counts.append(launches())
        CASES[0].sample().with_input(x).run()
        assert launches() == counts[-1], "outside, nothing is emulated"
    assert counts[0] < counts[1]
    assert "verrid" not in capfd.readouterr().err, "no warning of kernels that take the place of others"


def run_tests(files, selection, variant="plain", **environment):
    """Runs the layers' tests on the device ``emulated``, in a process of their own."""
    paths = [str(HERE.parent / f"test_{name}.py") for name in files]
    arguments = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", f"emulated and ({selection})", *paths]
    done = run_python(variant, *arguments, NORMOPS_EMULATOR_VARIANT=variant, **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-10000:]
    assert "CUDA kernels" in done.stdout and "Sanitizer" not in done.stdout + done.stderr


# Each layer forward and backward, contiguous and channels_last: ThreadSanitizer takes 0.3 ms a thread.
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_find_nothing(variant):
    run_tests(["backward", "dtypes"], "input-weight-bias or (test_channels_last and bfloat16)", variant)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86"])
def test_older_architectures(architecture):
    """There a block has less shared memory, and there are no clusters."""
    selection = "input-weight-bias or test_chunks or test_channels_last_segments or (test_long_rows and bfloat16)"
    run_tests(["backward", "edge_cases"], selection, NORMOPS_EMULATOR_ARCH=architecture)
