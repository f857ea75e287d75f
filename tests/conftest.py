import os

import pytest
import torch
from devices import DEVICES
from emulator import backend
from ranks import Ranks

from normops._ops import _C, BUILD_INFO

# What was compiled for an earlier version of the library is not looked up: read when the compiler is first imported.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
# What torch warns of once, it warns of every time: or tests would pass only behind another that has used it up.
torch.set_warn_always(True)


def pytest_report_header():
    return f"normops {BUILD_INFO['version']}, torch {torch.__version__}, cpu kernels: {_C.instruction_set()}"


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        real_device = metafunc.definition.get_closest_marker("real_device")
        devices = [name for name in DEVICES if not (real_device and name == "emulated")]
        metafunc.parametrize("device", devices, indirect=True)


def pytest_terminal_summary(terminalreporter):
    if summary := backend.summary():
        terminalreporter.line(summary)


@pytest.fixture
def device(request):
    """Where tensors go. Emulated, that is the CPU, whose operators run the CUDA kernels for the length of the test."""
    if request.param != "emulated":
        yield request.param
        return
    with backend.entered():
        yield "cpu"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads, and back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pools():
    """Processes that are started when they are first needed, and serve all tests."""
    pools = {number: Ranks(number) for number in (2, 3)}
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture(params=[2, 3], ids=lambda number: f"{number} ranks")
def ranks(request, pools):
    return pools[request.param]
