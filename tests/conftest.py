import pytest
import torch

from normops._ops import _C, BUILD_INFO

DEVICES = ["cpu"]
if BUILD_INFO["cuda"] and torch.cuda.is_available():
    DEVICES.append("cuda")


def pytest_report_header():
    return f"normops {BUILD_INFO['version']}, torch {torch.__version__}, cpu kernels: {_C.instruction_set()}"


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads, and back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
