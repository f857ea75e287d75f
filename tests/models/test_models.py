"""Models of other libraries compute the same when they are converted, and are themselves when they are reverted.

Run by ``make test-models``.
"""

import collections
import contextlib
import copy
import time
import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _library in ("transformers", "diffusers", "monai"):
        pytest.importorskip(_library)
    from zoo import MODELS

from zoo_table import TABLE

import normops
from normops import registry

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 10


def tensors_of(output):
    """All floating tensors of whatever a model returns."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    if hasattr(output, "__iter__"):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []


def call(model, inputs):
    torch.manual_seed(0)  # the same dropout
    dtype = next(model.parameters()).dtype
    inputs = {name: x.to(dtype) if tensors_of(x) else x for name, x in inputs.items()}
    return tensors_of(model(**inputs))


def loss_of(outputs):
    """Depends on every element, and on no two alike."""
    torch.manual_seed(1)
    return sum((tensor * torch.randn(tensor.shape)).sum() / tensor.numel() ** 0.5 for tensor in outputs)


def outputs_and_gradients(model, inputs):
    outputs = call(model, inputs)
    model.zero_grad()
    loss_of(outputs).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [t.detach().double() for t in outputs], [t.clone().double() for t in gradients]


def trained(model, inputs):
    """The losses of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(call(model, inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def size(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def distance(ours, theirs):
    """Relative to the size of all together: single ones may be zero but for rounding."""
    return size([a - b for a, b in zip(ours, theirs, strict=True)]) / size(theirs)


def converted_layers(before, model):
    """Class names of the layers whose class has changed, and of the norms whose class has not, with the reason."""
    changed, left = collections.Counter(), {}
    for old, module in zip(before, model.modules(), strict=True):
        if type(module) is not old:
            changed[old.__name__] += 1
        elif old.__name__.endswith(("Norm", "NormGated", "GRN")) and not old.__name__.startswith("_"):
            left[old.__name__] = registry.why_left(module)
    return dict(changed), left


def milliseconds(inputs, *runs):
    """Of a training step of each model in its context, the best of rounds in turn."""
    best = [float("inf")] * len(runs)
    for _ in range(5):
        for i, (model, context) in enumerate(runs):
            model.zero_grad()
            with context():
                start = time.perf_counter()
                loss_of(call(model, inputs)).backward()
                best[i] = min(best[i], 1000 * (time.perf_counter() - start))
    return best


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_model(case):
    torch.manual_seed(0)
    original = case.build().train()
    # Zeros and ones, as weights and biases begin, would hide much.
    for parameter in original.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    torch.manual_seed(0)
    inputs = case.inputs()
    model = copy.deepcopy(original)

    classes = [type(module) for module in model.modules()]
    names, objects = list(model.state_dict()), [*model.parameters(), *model.buffers()]
    normops.convert(model)
    changed, left = converted_layers(classes, model)
    assert changed == case.converted
    assert left == case.left
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(objects, [*model.parameters(), *model.buffers()], strict=True))

    # In float32 neither is right: the converted model has to be as near to the model in float64 as the original is.
    # Rounding errors of two orders of the same operations are as good as independent, so either may happen to be the
    # luckier one: by a factor of 3, and a millionth (8 units of float32) where the original is exact.
    exact, accelerated = copy.deepcopy(original).double(), copy.deepcopy(original)
    results = [outputs_and_gradients(m, inputs) for m in (model, original, exact)]
    with normops.accelerate():
        results.append(outputs_and_gradients(accelerated, inputs))
    differences = []
    for ours, theirs, right, unconverted in zip(*results, strict=True):
        for found in (ours, unconverted):
            assert distance(found, right) <= 3 * distance(theirs, right) + 1e-6
            differences.append(distance(found, theirs))
    errors = [distance(results[i][1], results[2][1]) for i in (1, 0)]
    # Every gradient by itself, as a part of the whole.
    whole = size(results[2][1])
    for (name, _), ours, theirs, right in zip(model.named_parameters(), *(r[1] for r in results[:3]), strict=True):
        error, other = (ours - right).norm().item(), (theirs - right).norm().item()
        assert error <= 6 * other + 1e-6 * max(whole, right.norm().item()), name
    for ours, theirs in zip(model.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)

    # Torch's own kernels are back where the context ends.
    same_as_before = call(copy.deepcopy(original), inputs)
    assert all(map(torch.equal, [t.double() for t in same_as_before], results[1][0]))

    plain = contextlib.nullcontext
    times = milliseconds(inputs, (original, plain), (model, plain), (original, normops.accelerate), (original, plain))

    # Training, in float64 where the original computes in it: ten steps magnify nothing but roundings. The distance is
    # relative to the way the parameters have come.
    if case.float64:
        original, model = original.double(), normops.convert(copy.deepcopy(original).double())
        allowed = 1e-9
    else:
        allowed = 1e-4
    assert converted_layers(classes, model)[0] == case.converted
    start = [p.detach().double().clone() for p in model.parameters()]
    losses = [trained(m, inputs) for m in (model, original)]
    torch.testing.assert_close(*losses, rtol=allowed, atol=allowed * losses[1].abs().max().item())
    ways = [[p.detach().double() - q for p, q in zip(m.parameters(), start, strict=True)] for m in (model, original)]
    apart = distance(*ways)
    assert apart <= allowed

    normops.revert(model)
    assert [type(module) for module in model.modules()] == classes
    model.load_state_dict(original.state_dict())
    for ours, theirs in zip(call(model.eval(), inputs), call(original.eval(), inputs), strict=True):
        assert torch.equal(ours, theirs)

    TABLE.append(
        (
            case.name,
            ", ".join(f"{count} {name}" for name, count in changed.items()),
            ", ".join(left) or "-",
            *(f"{value:.0e}" for value in (differences[0], differences[2], apart, *errors)),
            f"{max(differences[1], differences[3]):.0e}",
            *(f"{ms:.1f}" for ms in times),
        )
    )
