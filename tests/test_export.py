"""set_compile_mode, torch.export, and what is made of an exported program: AOTInductor packages and ONNX."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import SHAPE, each_case, each_dtype
from comparison import largest
from models import IMAGE, MODELS, every_layer, pair
from torch._dynamo.testing import CompileCounterWithBackend

import normops

SMALL = (4, 3, 8, 8)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


class Graphs:
    """A backend of torch.compile that keeps the graphs and runs them as they are."""

    def __init__(self):
        self.targets = []

    def __call__(self, graph_module, _):
        self.targets.append(targets(graph_module.graph))
        return graph_module.forward


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def uses_normops(names):
    return any("normops" in name for name in names)


def test_compile_mode():
    """A call lasts, a block ends, and code is compiled again when the mode is another."""
    graphs = Graphs()
    compiled = torch.compile(normops.LayerNorm(5), backend=graphs, fullgraph=True)
    x = torch.randn(3, 5)
    compiled(x)
    with normops.set_compile_mode("decompose"):
        compiled(x)
        with normops.set_compile_mode("kernel"):
            compiled(x)
        compiled(x)
    compiled(x)
    assert [uses_normops(names) for names in graphs.targets] == [True, False, True]  # all are kept
    torch._dynamo.reset()
    normops.set_compile_mode("decompose")
    try:
        torch.compile(normops.LayerNorm(5), backend=graphs, fullgraph=True)(x)
        assert not uses_normops(graphs.targets[-1])
    finally:
        normops.set_compile_mode("auto")


@pytest.mark.parametrize(
    ("layer", "shape", "in_training", "in_inference"),
    [
        (normops.BatchNorm2d(4), (2, 4, 3, 3), False, False),
        (normops.InstanceNorm2d(4), (2, 4, 3, 3), False, True),
        (normops.GroupNorm(2, 4), (2, 4, 3, 3), False, True),
        (normops.LayerNorm(5), (3, 5), True, True),
        (normops.RMSNorm(5), (3, 5), True, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_auto(layer, shape, in_training, in_inference):
    """By default a compiler sees operators where kernels are faster than what it fuses, and an export sees them all."""
    x = torch.randn(shape)
    for grad, kernel in ((True, in_training), (False, in_inference)):
        graphs = Graphs()
        with torch.set_grad_enabled(grad):
            output = torch.compile(layer, backend=graphs, fullgraph=True)(x)
            torch.testing.assert_close(output, layer(x))
        assert uses_normops(graphs.targets[-1]) == kernel
    program = torch.export.export(layer.eval(), (x,))
    assert uses_normops([str(node.target) for node in program.graph.nodes])


@pytest.mark.parametrize("mode", ["Kernel", None, True])
def test_unknown_compile_mode(mode):
    with pytest.raises(ValueError, match="expected mode to be one of 'auto', 'kernel', 'decompose', got"):
        normops.set_compile_mode(mode)


@pytest.mark.real_device
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float16], ids=str)
@each_dtype
@each_case
def test_decomposed(case, dtype, parameter_dtype, device):
    """The dtypes that torch's own functions refuse to mix can be mixed in this mode too."""
    sample = case.sample(dtype=dtype, parameter_dtype=parameter_dtype, device=device)
    grad = torch.randn_like(sample.input)
    expected = sample.results(grad=grad)
    graphs = Graphs()
    function = torch.compile(getattr(normops.functional, case.op), backend=graphs, fullgraph=True)
    with normops.set_compile_mode("decompose"):
        results = sample.results(SimpleNamespace(**{case.op: function}), grad=grad)
    assert len(graphs.targets) == 1 and not uses_normops(graphs.targets[0])
    for name, result in results.items():
        assert result.dtype == expected[name].dtype
        tolerance = 8 * torch.finfo(result.dtype).eps if result.dtype.itemsize == 2 else 1e-4
        torch.testing.assert_close(result, expected[name], rtol=tolerance, atol=tolerance * largest(expected[name]))


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
@each_dtype
def test_decomposed_statistics(op, dtype):
    """Running statistics move, whatever their dtype; given ones do not."""
    x = torch.randn(SHAPE)
    function = getattr(normops.functional, op)
    for use_input_stats in (True, False):
        flag = {"training" if op == "batch_norm" else "use_input_stats": use_input_stats}
        results = []
        for run in (function, torch.compile(function, backend="eager", fullgraph=True)):
            mean, var = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
            with normops.set_compile_mode("decompose"):
                results.append((run(x, mean, var, **flag), mean, var))
        torch.testing.assert_close(*results)
        assert results[0][1].ne(0).all() == use_input_stats


@pytest.mark.real_device
@pytest.mark.parametrize("mode", ["kernel", "decompose"])
@pytest.mark.parametrize("name", MODELS)
def test_models_compile_whole(name, mode, device):
    """No graph break, one graph for every size of the batch, the same training step."""
    original, converted = pair(MODELS[name], device=device)
    # Torch has kernels for all of its own operators only once they are decomposed.
    counter = CompileCounterWithBackend("aot_eager" if mode == "kernel" else "aot_eager_decomp_partition")
    compiled = torch.compile(converted, backend=counter, fullgraph=True)
    with normops.set_compile_mode(mode):
        for batch in (4, 6, 7):
            x = torch.randn(batch, *IMAGE[1:], device=device)
            torch._dynamo.mark_dynamic(x, 0)
            for model in (original, compiled):
                model.zero_grad()
                model(x).square().mean().backward()
            for ours, theirs in zip(converted.parameters(), original.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    torch.testing.assert_close(converted.state_dict(), original.state_dict())


@pytest.mark.real_device
def test_inductor_fuses_what_is_decomposed(device):
    """A training step in decompose mode through the default compiler."""
    original, converted = pair(every_layer, device=device)
    x = torch.randn(SMALL, device=device)
    grad = torch.randn_like(original(x))
    compiled = torch.compile(converted, fullgraph=True)
    with normops.set_compile_mode("decompose"):
        for model in (original, compiled):
            model(x).backward(grad)
    for ours, theirs in zip(converted.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.real_device
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("mode", ["kernel", "decompose"])
@pytest.mark.parametrize("name", MODELS)
def test_export(name, mode, strict, device):
    """A program for any batch, before and after its operators are taken apart."""
    original, converted = pair(MODELS[name], device=device)
    original, converted = original.eval(), converted.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with normops.set_compile_mode(mode):
        x = torch.randn(IMAGE, device=device)
        program = torch.export.export(converted, (x,), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(7, *IMAGE[1:], device=device)
    for exported in (program, program.run_decompositions()):
        assert uses_normops(targets(exported.graph)) == (mode == "kernel")
        torch.testing.assert_close(exported.module()(x), original(x), rtol=1e-4, atol=1e-5)


def test_exported_program_trains(device):
    """In an exported training step running statistics move as in the model."""
    original, converted = pair(every_layer, device=device)
    x = torch.randn(SMALL, device=device)
    module = torch.export.export(converted, (x,), strict=False).module()
    for model in (original, module):
        model(x).square().sum().backward()
    gradients = ({name: p.grad for name, p in model.named_parameters()} for model in (original, module))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dict(module.named_buffers()), dict(original.named_buffers()))


def run_elsewhere(code, *args):
    """Python code in a process of its own, which imports nothing but what the code says."""
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


LOAD_AND_COMPARE = """
import sys, torch
{imports}
package, expected = sys.argv[1:]
x, y = torch.load(expected)
torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), y, rtol=1e-4, atol=1e-4)
assert ("normops" in sys.modules) == bool("{imports}")
"""


@pytest.mark.real_device
@pytest.mark.parametrize(
    ("mode", "imports"),
    [("kernel", "import normops"), pytest.param("decompose", "", marks=pytest.mark.nightly)],
)
def test_aot_inductor(mode, imports, tmp_path, device):
    """A package runs in a fresh process: with normops imported if it calls the kernels, without it if decomposed."""
    model = pair(every_layer, device=device)[1].eval()
    x = torch.randn(SMALL, device=device)
    with torch.no_grad(), normops.set_compile_mode(mode):
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        other = torch.randn(5, *SMALL[1:], device=device)
        torch.save((other, model(other)), tmp_path / "expected.pt")
    run_elsewhere(LOAD_AND_COMPARE.format(imports=imports), package, tmp_path / "expected.pt")


@pytest.mark.parametrize("way", ["decompose", "revert"])
def test_onnx(way):
    """A converted model is written as ONNX decomposed, or reverted first; the reference evaluator agrees with it."""
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    evaluator = pytest.importorskip("onnx.reference", reason="torch.onnx needs onnx")
    model = pair(every_layer)[1].eval()
    x = torch.randn(SMALL)
    expected = model(x)
    if way == "revert":
        normops.revert(model)
    with normops.set_compile_mode("decompose" if way == "decompose" else "kernel"):
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    (result,) = evaluator.ReferenceEvaluator(program.model_proto).run(
        None, {program.model.graph.inputs[0].name: x.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-4)
