"""Every dtype of the input with every dtype of the parameters."""

import pytest
import torch
from cases import CASES, DTYPES, each, each_case, each_dtype
from comparison import check

each_parameter_dtype = pytest.mark.parametrize("parameter_dtype", DTYPES, ids=lambda dtype: f"parameters={dtype}")


@each_parameter_dtype
@each_dtype
@each_case
def test_equals_reference(case, dtype, parameter_dtype, device):
    """The output and the gradient of the input have the input's dtype; the others, each the dtype of its parameter."""
    check(case.sample(dtype=dtype, parameter_dtype=parameter_dtype, device=device))


@each_dtype
@each_case
def test_channels_last(case, dtype, device):
    sample = case.sample(dtype=dtype, device=device)
    check(sample.with_input(sample.input.detach().contiguous(memory_format=torch.channels_last)))


@each_case
def test_each_parameter_of_its_own_dtype(case, device):
    sample = case.sample(dtype=torch.bfloat16, parameter_dtype=torch.float32, device=device)
    sample.parameters["weight"] = sample.parameters["weight"].detach().half().requires_grad_()
    if "running_var" in sample.fixed and case.given_stats:
        sample.fixed["running_var"] = sample.fixed["running_var"].double()
    check(sample)


@each_dtype
@each_case
def test_same_dtype_as_torch(case, dtype, device):
    sample = case.sample(dtype=dtype, device=device)
    assert sample.run().dtype == sample.run(torch.nn.functional).dtype == dtype


@each_case
def test_autocast(case, device):
    """Under autocast the functions take what they are given: a bfloat16 activation stays one."""
    sample = case.sample(dtype=torch.bfloat16, parameter_dtype=torch.float32, device=device)
    expected = sample.run()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert torch.equal(sample.run(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each([case for case in CASES if not case.given_stats])
def test_statistics_do_not_overflow(case, dtype, device):
    """Sums of 16-bit elements are not taken in 16 bits."""
    sample = case.sample(dtype=dtype, device=device)
    check(sample.with_input((sample.input.detach().float() * 1000 + 20000).to(dtype)), backward=False)
