"""What people do with modules besides training them: folding, parametrizing, saving, sharing, profiling, capturing."""

import contextlib
import copy
import io
import multiprocessing

import pytest
import torch
from cases import MODULES, each_module
from models import IMAGE, MODELS, Residual, every_layer, pair
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import normops

each_model = pytest.mark.parametrize("name", MODELS)


def through_a_file(thing, **options):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


# Folding a BatchNorm into the layer before it


@pytest.mark.parametrize(
    ("make", "fold", "shape"),
    [
        pytest.param(lambda: [nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)], fuse_conv_bn_eval, (2, 3, 9), id="Conv1d"),
        pytest.param(
            lambda: [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)], fuse_conv_bn_eval, (2, 3, 9, 9), id="Conv2d"
        ),
        pytest.param(lambda: [nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6)], fuse_conv_bn_eval, (2, 3, 5, 5, 5), id="Conv3d"),
        pytest.param(lambda: [nn.Linear(3, 6), nn.BatchNorm1d(6)], fuse_linear_bn_eval, (4, 3), id="Linear"),
    ],
)
def test_fuse_eval(make, fold, shape):
    _, model = pair(lambda: nn.Sequential(*make()))
    model.eval()
    x = torch.randn(shape)
    folded = fold(model[0], model[1])
    assert type(folded) is type(model[0])
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def foldable():
    """A converted block in evaluation, whose two pairs of layers can be folded, and what it computes."""
    model = pair(lambda: Residual(4))[1].eval()
    x = torch.randn(2, 4, 5, 5)
    return model, x, model(x)


def test_ao_fuse_modules():
    """torch.ao looks layers up by their exact class: it is told of ours, or the model is reverted first."""
    pairs = [["body.0", "body.1"], ["body.3", "body.4"]]
    model, x, expected = foldable()
    known = {(nn.Conv2d, normops.BatchNorm2d): torch.ao.quantization.fuser_method_mappings.fuse_conv_bn}
    config = {"additional_fuser_method_mapping": known}
    for folded in (
        torch.ao.quantization.fuse_modules(model, pairs, fuse_custom_config_dict=config),
        torch.ao.quantization.fuse_modules(normops.revert(model), pairs),
    ):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)


def test_fx_fuse():
    """torch.fx's optimizer knows exact classes and no others: revert, then fold."""
    model, x, expected = foldable()
    folded = fuse(normops.revert(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["kernel", "decompose"])
def test_folding_a_traced_model(mode):
    """In a traced graph the layers are modules of their own, so a pass that asks isinstance folds them."""
    model, x, expected = foldable()
    traced = torch.fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            conv = node.args[0]
            traced.add_submodule(conv.target, fuse_conv_bn_eval(modules[conv.target], modules[node.target]))
            node.replace_all_uses_with(conv)
            traced.graph.erase_node(node)
    traced.recompile()
    with normops.set_compile_mode(mode):
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)


# Changing modules from outside


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


@pytest.mark.parametrize("converted_first", [False, True])
@pytest.mark.parametrize("case", [case for case in MODULES if case.make(nn, device="meta").weight is not None], ids=str)
def test_parametrize(case, converted_first, device):
    """A parametrized layer is a subclass that torch makes up: convert leaves it alone, and converts it before."""
    results = []
    x = torch.randn(case.shape, device=device)
    for convert in (lambda module: module, normops.convert):
        layer = case.make(nn).to(device)
        if converted_first:
            layer = convert(layer)
        parametrize.register_parametrization(layer, "weight", Exponential())
        layer = convert(layer)
        namespace = normops if converted_first and convert is normops.convert else nn
        assert parametrize.type_before_parametrizations(layer) is getattr(namespace, case.name)
        output = layer(x)
        output.square().sum().backward()
        results.append((output, layer.parametrizations.weight.original.grad))
        parametrize.remove_parametrizations(layer, "weight")
        torch.testing.assert_close(layer(x), output, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
@each_model
def test_weight_and_spectral_norm(name, wrap, device):
    """Of the other layers of a model, before and after its conversion."""
    results = []
    x = torch.randn(IMAGE, device=device)
    original, converted = pair(MODELS[name], device=device)
    wrapped_first = copy.deepcopy(original)
    for model in (original, converted, wrapped_first):
        torch.manual_seed(0)
        for module in list(model.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                wrap(module)
        if model is wrapped_first:
            normops.convert(model)
        results.append(model.eval()(x))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_prune():
    """The older kind of hook that replaces a parameter by an attribute."""
    results = []
    for namespace in (nn, normops):
        torch.manual_seed(0)
        layer = namespace.GroupNorm(2, 6)
        prune.random_unstructured(layer, "weight", 0.5)
        results.append(layer(torch.randn(2, 6, 4)))
    torch.testing.assert_close(*results)


@each_model
def test_hooks(name, device):
    """Every hook is called as often, in the same order and with the same values as without conversion."""
    histories = []
    x = torch.randn(IMAGE, device=device)
    for model in pair(MODELS[name], device=device):
        history = []
        for path, module in model.named_modules():

            def record(kind, path=path, history=history):
                def hook(*args):
                    values = args[-1][0] if isinstance(args[-1], tuple) else args[-1]
                    history.append((f"{kind} {path}", values.detach().clone()))

                return hook

            module.register_forward_pre_hook(record("before"))
            module.register_forward_hook(record("after"))
            module.register_full_backward_hook(record("gradient"))
        model(x.clone().requires_grad_()).square().sum().backward()
        histories.append(history)
    for (theirs, value), (ours, other) in zip(*histories, strict=True):
        assert ours == theirs
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-4)


@each_module
def test_meta_then_to_empty(case, device):
    """Made on the meta device, given memory, then values: as large models are loaded."""
    source = case.make(normops).to(device)
    for tensor in (*source.parameters(), *source.buffers()):
        tensor.data = torch.rand_like(tensor, dtype=torch.float32).to(tensor.dtype)
    layer = case.make(normops, device="meta")
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    layer = layer.to_empty(device=device)
    layer.load_state_dict(source.state_dict())
    assigned = case.make(normops, device="meta")
    assigned.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(case.shape, device=device)
    for other in (layer, assigned):
        assert torch.equal(other.eval()(x), source.eval()(x))


@each_model
def test_converted_on_meta(name):
    """A model converted before it has any memory."""
    original, _ = pair(MODELS[name])
    with torch.device("meta"):
        model = normops.convert(MODELS[name]())
    model.load_state_dict(original.state_dict(), assign=True)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(model(x), original(x))


# Copies


@each_model
def test_deepcopy_and_whole_module_files(name, device):
    """Copies are converted like their originals, compute the same, and share nothing with them."""
    model = pair(MODELS[name], device=device)[1].eval()
    x = torch.randn(IMAGE, device=device)
    expected = model(x)
    for other in (copy.deepcopy(model), through_a_file(model, weights_only=False)):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(other(x), expected)
        for parameter in other.parameters():
            parameter.data.zero_()
    assert torch.equal(model(x), expected)


@each_model
def test_state_goes_both_ways(name):
    """Files of a state know nothing of normops: between converted and unconverted models, weights_only."""
    original, converted = pair(MODELS[name])
    for source, target in ((original, converted), (converted, original)):
        for parameter in source.parameters():
            parameter.data.uniform_()
        target.load_state_dict(through_a_file(source.state_dict(), weights_only=True))
        torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


@each_model
def test_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    original, converted = pair(MODELS[name])
    safetensors.save_model(converted, tmp_path / "model.safetensors")
    for parameter in original.parameters():
        parameter.data.zero_()
    safetensors.load_model(original, tmp_path / "model.safetensors")
    torch.testing.assert_close(original.state_dict(), converted.state_dict(), rtol=0, atol=0)


@each_model
def test_averaged_models(name):
    """torch.optim.swa_utils finds the BatchNorms by their class."""
    batches = [torch.randn(IMAGE) for _ in range(3)]
    states = []
    for model in pair(MODELS[name]):
        averaged = torch.optim.swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        torch.optim.swa_utils.update_bn(batches, averaged)
        states.append(averaged.state_dict())
    torch.testing.assert_close(*states)


# Autograd's own devices


@each_model
def test_saved_tensor_hooks(name, device):
    """What is kept for the backward can be moved away in between, as torch.autograd.graph.save_on_cpu does."""
    model = pair(MODELS[name], device=device)[1]
    x = torch.randn(IMAGE, device=device)
    gradients = []
    for hooks in (
        contextlib.nullcontext,
        lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.set_detect_anomaly(True),
    ):
        model.zero_grad()
        with hooks():
            model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


@each_model
def test_inference_mode(name, device):
    original, converted = pair(MODELS[name], device=device)
    x = torch.randn(IMAGE, device=device)
    with torch.inference_mode():
        output = converted.eval()(x)
        assert output.is_inference()
    torch.testing.assert_close(output.clone(), original.eval()(x))


# Measuring


@each_model
def test_flop_counter(name, device):
    """Norms count for nothing, in torch as here; what is around them is counted as ever."""
    counts = []
    for model in pair(MODELS[name], device=device):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(IMAGE, device=device)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_profiler(device):
    """Forward and backward appear under their names, with shapes, in the profiler's table and trace."""
    model = pair(every_layer, device=device)[1]
    with torch.profiler.profile(record_shapes=True) as profile:
        output = model(torch.randn(4, 3, 8, 8, device=device))
        for add in (normops.functional.add_layer_norm, normops.functional.add_rms_norm):
            output = add(output, output, output.shape[-1:])[0]
        for norm in (normops.functional.channel_layer_norm, normops.functional.channel_rms_norm):
            output = norm(output)
        output.sum().backward()
    events = [event for event in profile.events() if event.name.startswith("normops::")]
    shapes = {event.name.rstrip("_"): event.input_shapes for event in events}  # what is in place has one at the end
    public = {f"normops::{op}" for op in normops.functional.__all__ if op != "length_mask"}
    private = {f"normops::_{engine}_norm{step}" for engine in ("row", "channel") for step in ("", "_backward")}
    assert public | private <= shapes.keys()
    assert shapes["normops::batch_norm"][0] == [4, 6, 6, 6]
    assert all(name in profile.key_averages().table() for name in ("normops::batch_norm", "normops::layer_norm"))


# Other processes


def compute(layer, x):
    """In a worker: the module and the input lie in shared memory, the output goes there."""
    with torch.no_grad():
        return layer(x)


def serve(layer, x, y):
    torch.set_num_threads(1)  # as DataLoader's workers do: threads do not survive a fork
    y.copy_(compute(layer, x))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shared_memory(method):
    """A worker runs a module that its parent has shared, and copies the result into shared memory."""
    layer = normops.convert(every_layer()).eval()
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, 6, 6, 6).share_memory_()
    expected = compute(layer, x)
    worker = torch.multiprocessing.get_context(method).Process(target=serve, args=(layer.share_memory(), x, y))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert torch.equal(y, expected)


class Normalized(torch.utils.data.Dataset):
    def __init__(self):
        self.layer = normops.convert(every_layer()).eval()
        self.data = torch.randn(8, 3, 90, 8)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.layer(self.data[i : i + 1])[0].detach()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_data_loader_forks_after_use(threads):
    """Workers do not wait for threads that the engines had in the parent."""
    threads(4)
    dataset = Normalized()
    expected = dataset.layer(dataset.data)  # starts the threads
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    torch.testing.assert_close(torch.cat(list(loader)), expected)
    assert torch.equal(dataset.layer(dataset.data), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_module
def test_cuda_graphs(case):
    """A captured training step, replayed on other values, computes what it computes without capture."""
    layer, other = case.make(normops).cuda(), case.make(normops).cuda()
    other.load_state_dict(layer.state_dict())
    if layer.__dict__.get("momentum", 0.1) is None:
        pytest.skip("the cumulative average reads a counter on the host, in torch as here")
    x = torch.randn(case.shape, device="cuda")
    graphed = torch.cuda.make_graphed_callables(layer, (x.requires_grad_(),))
    other.load_state_dict(layer.state_dict())
    values = torch.randn(case.shape, device="cuda")
    results = []
    for run in (graphed, other):
        y = values.clone().requires_grad_()
        output = run(y)
        output.square().sum().backward()
        results.append((output.detach().clone(), y.grad.clone()))
    torch.testing.assert_close(*results)


def test_every_kind_of_layer_is_in_a_model():
    kinds = {type(module).__name__ for make in (*MODELS.values(), every_layer) for module in make().modules()}
    assert {case.name.rstrip("123d") for case in MODULES} <= {name.rstrip("123d") for name in kinds}
