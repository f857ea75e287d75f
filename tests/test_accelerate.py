"""accelerate(): torch's own functions and unconverted models on the kernels of normops, and torch's back afterwards."""

import subprocess
import sys

import pytest
import torch
from cases import SHAPE, each_case, each_dtype, each_with_absent_parameters
from compilers import lie
from layouts import LAYOUTS, each_layout
from models import IMAGE, MODELS
from test_gradients import TRANSFORMS, differentiable
from threads import run_together
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import profile

import normops
from normops import _C

F = torch.nn.functional
ATEN = torch.ops.aten


def kernels(function):
    """The names of the operators of normops that run in a call of ``function``."""
    with profile() as events:
        function()
    return {event.name for event in events.events() if event.name.startswith("normops::")}


def on_engines(function):
    return bool(kernels(function))


def call():
    return F.layer_norm(torch.ones(2, 5), (5,))


def both(function):
    """What ``function`` returns with torch's kernels and with those of normops."""
    plain = function()
    with normops.accelerate():
        return plain, function()


def compare(sample, constant_rows=False):
    """Values, dtypes and strides of output and gradients against those without.

    Each side may be off by what its dtype and torch's sums allow. Where every deviation is 0, what is left is rounding
    errors multiplied by rstd = eps**-0.5 = 316.
    """
    grad = torch.randn_like(sample.input)
    theirs, ours = both(lambda: sample.results(F, grad=grad))
    dtype = sample.input.dtype
    tolerance = {2: 4 * torch.finfo(dtype).eps, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
    for name, result in ours.items():
        expected = theirs[name]
        if sample.case.op != "rms_norm" or name != "grad_input":  # which torch multiplies together, in odd strides
            assert lie(result) == lie(expected), name
        scale = max(expected.abs().max().item(), 316 if constant_rows else 0)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * scale)


@each_dtype
@each_layout
@each_case
def test_functions(case, layout, dtype, device):
    """Outputs and gradients, their dtypes and strides are those of torch's functions."""
    sample = case.sample(dtype=dtype, device=device)
    sample = sample.with_input(LAYOUTS[layout](sample.input.detach()))
    compare(sample, constant_rows=layout in ("expanded positions", "expanded column"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_case
def test_half_precision_with_float32_parameters(case, dtype, device):
    if case.op == "rms_norm":
        pytest.skip("torch warns of these and composes them of other operators")
    sample = case.sample(dtype=dtype, parameter_dtype=torch.float32, device=device)
    compare(sample)


@each_with_absent_parameters
def test_absent_parameters(case, names, device):
    if case.op == "group_norm" and names == ("bias",):
        pytest.skip("torch's own backward fails at it")
    compare(case.sample(device=device, names=names))


@each_case
def test_engines_run(case, device):
    """Forward and backward, and only for as long as asked."""
    sample = case.sample(device=device)
    private = "_row_norm" if case.row_dims else "_channel_norm"
    step = lambda: sample.results(F, grad=torch.ones_like(sample.input))  # noqa: E731
    with normops.accelerate():
        ran = kernels(step)
        assert {f"normops::{private}", f"normops::{private}_tracked"} & ran and f"normops::{private}_backward" in ran
    assert not on_engines(step)


def channels(value=1.0):
    return torch.full((6,), value)


def random(*shape):
    """The same numbers, whatever was imported before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, G = random(*SHAPE), random(*SHAPE).flip(0)
W, B = random(6), random(6).flip(0)
ROW = random(7), random(7).flip(0)
OPERATORS = {
    "native_layer_norm": (X, (7,), *ROW, 1e-5),
    "native_layer_norm plain": (X, (5, 7), None, None, 1e-5),
    "_fused_rms_norm": (X, (7,), ROW[0], None),
    "native_group_norm": (X, W, B, 4, 6, 35, 3, 1e-5),
    "native_batch_norm": (X, W, B, channels(0.0), channels(), True, 0.1, 1e-5),
    "native_batch_norm without statistics": (X, W, B, None, None, True, 0.1, 1e-5),
    "native_batch_norm in evaluation": (X, W, B, channels(0.0), channels(), False, 0.1, 1e-5),
    "_native_batch_norm_legit": (X, W, B, channels(0.0), channels(), True, 0.1, 1e-5),
    "_native_batch_norm_legit in evaluation": (X, W, B, channels(0.0), channels(), False, 0.1, 1e-5),
    "_native_batch_norm_legit.no_stats": (X, W, B, True, 0.1, 1e-5),
    "_native_batch_norm_legit_no_training": (X, W, B, channels(0.0), channels(), 0.1, 1e-5),
    "_native_batch_norm_legit_functional": (X, W, B, channels(0.0), channels(), True, 0.1, 1e-5),
    "_batch_norm_with_update": (X, W, B, channels(0.0), channels(), 0.1, 1e-5),
    "_batch_norm_with_update_functional": (X, W, B, channels(0.0), channels(), 0.1, 1e-5),
    "_batch_norm_no_update": (X, W, B, channels(0.0), channels(), 0.1, 1e-5),
    "native_layer_norm_backward": (G, X, (7,), random(4, 6, 5, 1), random(4, 6, 5, 1).square(), *ROW, [True] * 3),
    "native_group_norm_backward": (G, X, random(4, 3), random(4, 3).square(), W, 4, 6, 35, 3, [True] * 3),
    "native_batch_norm_backward": (G, X, W, None, None, B, W.square(), True, 1e-5, [True, False, True]),
    "native_batch_norm_backward in evaluation": (G, X, W, B, W.square(), None, None, False, 1e-5, [True] * 3),
    "batch_norm_backward": (G, X, W, None, None, B, W.square(), True, 1e-5, [True] * 3, torch.empty(0)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    """Torch's operators return all they return otherwise, saved statistics included, and move running statistics."""
    packet, _, overload = name.split()[0].partition(".")
    op = getattr(getattr(ATEN, packet), overload or "default")

    def run():
        args = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in OPERATORS[name]]
        return [*op(*args), *args]

    theirs, ours = both(run)
    for result, expected in zip(ours, theirs, strict=True):
        if isinstance(expected, torch.Tensor):
            assert lie(result) == lie(expected)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        else:
            assert result == expected
    with normops.accelerate():  # torch's _batch_norm_no_update calls its kernel without the dispatcher
        assert on_engines(run) == (name != "_batch_norm_no_update")


def test_fused_rms_norm_backward():
    """Which torch has no kernel for on the CPU."""
    x, w, g = X.double().requires_grad_(), ROW[0].double().requires_grad_(), G.double()
    with normops.accelerate():
        _, rstd = ATEN._fused_rms_norm(x.detach(), (7,), w.detach(), 1e-3)
        results = ATEN._fused_rms_norm_backward(g, x.detach(), (7,), rstd, w.detach(), [True, True])
        with pytest.raises(NotImplementedError, match="_fused_rms_norm_backward: expected a gradient of"):
            ATEN._fused_rms_norm_backward(g.float(), x.detach(), (7,), rstd, w.detach(), [True, True])
    expected = torch.autograd.grad(F.rms_norm(x, (7,), w, 1e-3), (x, w), g)
    torch.testing.assert_close(results, expected)


@each_case
def test_derivatives(case, device):
    """Double backward, forward mode and batched gradients stay torch's."""
    function, tensors = differentiable(case, device, F)
    with normops.accelerate():
        assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_case
def test_torch_func(case, transform, device):
    function, tensors = differentiable(case, device, F)
    arguments = [tensor.detach() for tensor in tensors]
    try:
        theirs = TRANSFORMS[transform](function, *arguments)
    except Exception as error:  # a limit of torch's own
        with normops.accelerate(), pytest.raises(type(error)):
            TRANSFORMS[transform](function, *arguments)
        return
    with normops.accelerate():
        ours = TRANSFORMS[transform](function, *arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parameters", ["like the input", "float32"])
@each_dtype
@each_case
def test_a_block_between_forward_and_backward(case, dtype, parameters, device):
    """What one side has saved, the other differentiates."""
    if parameters == "float32" and (dtype == torch.float64 or case.op == "rms_norm"):
        pytest.skip("which torch does not mix")
    parameter_dtype = dtype if parameters == "like the input" else torch.float32
    sample = case.sample(dtype=dtype, parameter_dtype=parameter_dtype, device=device)
    grad = torch.randn_like(sample.input)
    leaves = [sample.input, *sample.parameters.values()]
    expected = torch.autograd.grad(sample.run(F), leaves, grad)
    with normops.accelerate():
        output = sample.run(F)
    after = torch.autograd.grad(output, leaves, grad)
    output = sample.run(F)
    with normops.accelerate():
        before = torch.autograd.grad(output, leaves, grad)
    for results in (after, before):
        for result, other in zip(results, expected, strict=True):
            tolerance = {2: 8 * torch.finfo(dtype).eps, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
            torch.testing.assert_close(result, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_case
def test_derivatives_in_half_precision(case, dtype, device):
    """Torch's formulas take the statistics as they are saved, and what they cannot do stays an error."""
    sample = case.sample(dtype=dtype, device=device)

    def derivatives():
        x = sample.input.detach().requires_grad_()
        (grad,) = torch.autograd.grad(sample.with_input(x).run(F).float().square().sum(), x, create_graph=True)
        double = torch.autograd.grad(grad.float().square().sum(), x)
        tangent = torch.func.jvp(lambda x: sample.with_input(x).run(F).float(), (x.detach(),), (x.detach(),))
        return [tensor.dtype for tensor in (grad, *double, *tangent)]

    def attempt():
        try:
            return derivatives()
        except Exception as error:
            return type(error)

    theirs, ours = both(attempt)
    assert ours == theirs


BAD = {
    "mixed dtypes": lambda: F.layer_norm(X, (7,), ROW[0].double()),
    "mixed dtypes of channels": lambda: F.batch_norm(X, None, None, W.double(), B.double(), True),
    "integers": lambda: F.group_norm(X.int(), 3),
    "weight shape": lambda: F.layer_norm(X, (7,), W),
    "normalized shape": lambda: F.layer_norm(X, (6,)),
    "no shape": lambda: F.rms_norm(X, ()),
    "groups": lambda: F.group_norm(X, 4),
    "channels": lambda: F.group_norm(X, 3, ROW[0]),
    "running statistics": lambda: F.batch_norm(X, ROW[0], ROW[1], training=True),
    "no statistics": lambda: F.batch_norm(X, None, None),
    "gradient dtype": lambda: ATEN.native_layer_norm_backward(
        G.double(), X, (7,), torch.ones(4, 6, 5, 1), torch.ones(4, 6, 5, 1), None, None, [True] * 3
    ),
    "device": lambda: F.layer_norm(X, (7,), torch.ones(7, device="meta")),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_calls_fail_as_without(what):
    """They reach torch's kernels, and get torch's errors, to the letter."""

    def message():
        with pytest.raises(Exception) as error:
            BAD[what]()
        return error.type, str(error.value)

    theirs, ours = both(message)
    assert ours == theirs


NOT_COVERED = {
    "complex": lambda: F.rms_norm(torch.ones(2, 3, dtype=torch.complex64), (3,)),
    "empty rows": lambda: F.layer_norm(torch.empty(0, 5), (5,)),
    "empty batch": lambda: F.group_norm(torch.empty(0, 6, 4), 3),
    "one value per channel": lambda: ATEN.native_batch_norm(X[:1, :, 0, 0], None, None, None, None, True, 0.1, 1e-5)[0],
}


@pytest.mark.parametrize("what", NOT_COVERED)
def test_what_is_not_covered(what):
    theirs, ours = both(NOT_COVERED[what])
    assert lie(ours) == lie(theirs)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    with normops.accelerate():
        assert not on_engines(NOT_COVERED[what])


@pytest.mark.parametrize("name", MODELS)
def test_models(name, device):
    """Unconverted models take the training steps they take without, on the kernels of normops."""

    def train():
        torch.manual_seed(0)
        model = MODELS[name]().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(torch.randn(IMAGE, device=device)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, model.state_dict()

    theirs, ours = both(train)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4)
    with normops.accelerate():
        assert on_engines(train)
    assert not on_engines(train)


def test_subclasses(device):
    """What convert leaves alone."""

    class Own(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    layer, x = Own(5).to(device), torch.randn(3, 5, device=device)
    theirs, ours = both(lambda: layer(x))
    torch.testing.assert_close(ours, theirs)
    with normops.accelerate():
        assert on_engines(lambda: layer(x))


def test_means_far_from_zero(device):
    """Torch's GroupNorm loses everything here; behind its operator the statistics hold."""
    x = (torch.randn(4, 6, 8, 8, device=device) + 1e4).contiguous(memory_format=torch.channels_last)
    theirs, ours = both(lambda: F.group_norm(x, 3))
    exact = F.group_norm(x.double(), 3)
    assert (theirs - exact).abs().max() > 1e-3
    assert (ours - exact).abs().max() < 1e-5


def test_under_autocast(device):
    """Which casts above these operators."""
    x, weight = torch.randn(3, 5, device=device), torch.randn(4, 5, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        theirs, ours = both(lambda: F.layer_norm(F.linear(x, weight), (4,)))
    torch.testing.assert_close(ours, theirs)


def test_under_torch_compile(device):
    """torch.compile takes torch's operators apart before they come to a kernel: nothing changes, nothing breaks."""
    layer = torch.nn.Sequential(torch.nn.LayerNorm(5), torch.nn.RMSNorm(5)).to(device)
    x = torch.randn(3, 5, device=device)
    torch._dynamo.reset()
    with normops.accelerate():
        compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
        assert not on_engines(lambda: compiled(x).sum().backward())
        torch.testing.assert_close(compiled(x), layer(x))


# The switch


def test_off_on_import():
    code = """
import torch
name = "aten::native_layer_norm"
before = torch._C._dispatch_dump_table(name)
import normops
assert torch._C._dispatch_dump_table(name) == before
with normops.accelerate():
    assert torch._C._dispatch_dump_table(name) != before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registrations_are_undone():
    names = [f"aten::{name.split()[0]}" for name in OPERATORS]
    tables = lambda: [torch._C._dispatch_dump_table(name) for name in names]  # noqa: E731
    before = tables()
    with normops.accelerate():
        assert tables() != before
    assert tables() == before


def test_backward_of_cudnn():
    """Of a forward under acceleration, after its end; and cuDNN's own, which here is made of other kernels."""
    code = """
import torch
aten, library = torch.ops.aten, torch.library.Library("aten", "IMPL")
taken = []

def forward(input, weight, bias, running_mean, running_var, training, momentum, eps):
    results = aten.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    return *results, torch.zeros(5, dtype=torch.uint8)

def backward(input, grad, weight, running_mean, running_var, mean, rstd, eps, reserve):
    assert reserve.numel() == 5
    taken.append(reserve)
    statistics = running_mean, running_var, mean, rstd
    return aten.native_batch_norm_backward(grad, input, weight, *statistics, True, eps, [True] * 3)

library.impl("cudnn_batch_norm", forward, "CPU")
library.impl("cudnn_batch_norm_backward", backward, "CPU")
import normops
x, weight, bias = torch.randn(4, 6, 5, requires_grad=True), *torch.randn(2, 6).requires_grad_()

def run():
    return aten.cudnn_batch_norm(x, weight, bias, torch.zeros(6), torch.ones(6), True, 0.1, 1e-5)

def gradients(y):
    return torch.autograd.grad(y.square().sum(), (x, weight, bias))

for _ in range(2):
    with normops.accelerate():
        (ours, *_, reserve), within = run(), gradients(run()[0])
        assert reserve.numel() == 0
    theirs, *_, reserve = run()
    assert reserve.numel() == 5 and not taken
    for one, other, third in zip(gradients(ours), gradients(theirs), within):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(third, one)
    assert len(taken) == 1
    taken.clear()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nesting_and_switch():
    with normops.accelerate():
        with normops.accelerate():
            assert on_engines(call)
        assert on_engines(call)
        normops.accelerate(True)
    assert on_engines(call)
    normops.accelerate(True)  # twice is once
    with normops.accelerate():
        normops.accelerate(False)
        assert on_engines(call)
    assert not on_engines(call)
    normops.accelerate(False)
    assert not on_engines(call)


def test_decorator_and_reuse():
    block = normops.accelerate()
    with block, block:
        assert on_engines(call)
    assert block(on_engines)(call)
    assert not on_engines(call)


def test_exceptions_end_a_block():
    with pytest.raises(KeyError), normops.accelerate():
        raise KeyError
    assert not on_engines(call)


@pytest.mark.parametrize("enabled", [1, "on", torch.tensor(True)], ids=str)
def test_wrong_argument(enabled):
    with pytest.raises(TypeError, match="expected enabled to be a bool or None"):
        normops.accelerate(enabled)
    assert not on_engines(call)


def test_more_ends_than_beginnings():
    """Nor does a block end another."""
    with normops.accelerate():
        with pytest.raises(RuntimeError, match="a block of accelerate\\(\\) that was entered"):
            _C.Acceleration().__exit__(None, None, None)
        assert on_engines(call)


def test_block_that_never_ends():
    """As where Ctrl-C comes between __enter__ and the block: Python lets go of it."""
    block = normops.accelerate()
    block.__enter__()
    block.__enter__()
    assert on_engines(call)
    del block
    assert not on_engines(call)


def test_silence():
    """Not a word on the console, where torch warns of kernels that are replaced."""
    code = """
import torch, normops
for _ in range(3):
    with normops.accelerate():
        torch.nn.functional.layer_norm(torch.ones(2, 5), (5,))
"""
    result = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_threads():
    """Blocks begin and end in some threads while others compute forward and backward: every result is right."""
    x = torch.randn(64, 33)
    expected = torch.autograd.functional.vjp(lambda x: F.layer_norm(x, (33,)), x, torch.ones_like(x))

    def compute():
        ours = torch.autograd.functional.vjp(lambda x: F.layer_norm(x, (33,)), x, torch.ones_like(x))
        torch.testing.assert_close(ours, expected)

    def toggle():
        with normops.accelerate(), normops.accelerate():
            compute()

    run_together(1.5, compute, compute, toggle, toggle)
    assert not on_engines(call)
