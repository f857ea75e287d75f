"""Mixed precision: under autocast the layers return the dtypes that torch's own return, on the CPU and on CUDA."""

import contextlib
import copy
import itertools

import pytest
import torch
from cases import each_case, each_dtype
from devices import DEVICES
from models import IMAGE, MODELS, pair
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import normops

# What torch's rms_norm says of a float32 weight.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")

HALVES = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("half", HALVES, ids=str)


@contextlib.contextmanager
def autocast(device, dtype):
    """torch.autocast, which turns itself off for a CUDA that is not there; tensors on it can still be thought of."""
    if device == "cpu" or torch.cuda.is_available():
        with torch.autocast(device, dtype=dtype):
            yield
        return
    before = torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, before)
        torch.clear_autocast_cache()


@each_half
@pytest.mark.parametrize("parameters", ["like the input", "float32"])
@each_dtype
@pytest.mark.parametrize("autocast_device", ["cpu", "cuda"])
@each_case
def test_dtypes_under_autocast(case, autocast_device, dtype, parameters, half):
    """Of the output and, where there is such a device, of all gradients."""
    real = autocast_device in DEVICES
    with contextlib.nullcontext() if real else FakeTensorMode(), torch.set_grad_enabled(real):
        parameter_dtype = dtype if parameters == "like the input" else torch.float32
        sample = case.sample(dtype=dtype, parameter_dtype=parameter_dtype, device=autocast_device)
        results = []
        for functions in (nn.functional, normops.functional):
            try:
                with autocast(autocast_device, half):
                    output = sample.run(functions)
            except RuntimeError as error:  # of torch, which cannot mix these
                assert functions is nn.functional and "type" in str(error)
                return
            leaves = [sample.input, *sample.parameters.values()] if real else []
            gradients = torch.autograd.grad(output, leaves, torch.ones_like(output)) if real else []
            results.append([output.dtype, *(gradient.dtype for gradient in gradients)])
        assert results[0] == results[1]


@pytest.mark.parametrize("name", MODELS)
def test_models_under_autocast(name, device):
    """Every module's output has the dtype it has without normops, and the values agree to the precision of bfloat16."""
    models, dtypes, results = pair(MODELS[name], device=device), [], []
    x = torch.randn(IMAGE, device=device)
    for model in models:
        seen = {}
        for path, module in model.named_modules():
            module.register_forward_hook(lambda _m, _i, output, path=path, seen=seen: seen.update({path: output.dtype}))
        with torch.autocast(device, dtype=torch.bfloat16):
            results.append(model(x))
        dtypes.append(seen)
    assert dtypes[0] == dtypes[1]
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_inside_compiled_code(name, device):
    """Autocast entered in the compiled function, with its backward."""
    model = pair(MODELS[name], device=device)[1]

    def step(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(x)

    torch._dynamo.reset()
    x = torch.randn(IMAGE, device=device)
    gradients = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        output = run(x)
        output.float().square().mean().backward()
        gradients.append((output, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_grad_scaler(name, device):
    """A float16 training loop with a scaler: the scales, the skipped steps and the losses are torch's."""
    histories = []
    x, wanted = torch.randn(IMAGE, device=device), torch.randn(1, device=device)
    for model in pair(MODELS[name], device=device):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        # A first scale that overflows, so that steps are skipped.
        scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=3)
        history = []
        for _ in range(14):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=torch.float16):
                loss = (model(x).float() - wanted).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append((scaler.get_scale(), loss.item()))
        histories.append(history)
    theirs, ours = histories
    assert any(later < earlier for (earlier, _), (later, _) in itertools.pairwise(theirs))
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=0.02)
    assert theirs[-1][1] < theirs[0][1] and ours[-1][1] < ours[0][1]


@each_half
@pytest.mark.parametrize("name", MODELS)
def test_half_model_with_float32_norms(name, half, device):
    """The usual way to keep norms exact: parameters and statistics in float32, everything else in half precision."""
    original = pair(MODELS[name], device=device)[0].to(half)
    for module in original.modules():
        if "Norm" in type(module).__name__:
            module.float()
    converted = normops.convert(copy.deepcopy(original))
    x = torch.randn(IMAGE, device=device, dtype=half)
    with torch.autocast(device, enabled=False):
        outputs = []
        for model in (original, converted):
            outputs.append(model(x))
            outputs[-1].float().square().mean().backward()
    assert outputs[0].dtype == outputs[1].dtype == half
    tolerance = 16 * torch.finfo(half).eps
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    for theirs, ours in zip(original.parameters(), converted.parameters(), strict=True):
        assert theirs.grad.dtype == ours.grad.dtype
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.1, atol=0.1 * theirs.grad.abs().max().item())
    for theirs, ours in zip(original.buffers(), converted.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
