"""torch.compile(model, backend="normops"): what is fused, what is left, and that the numbers are those of the model."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from models import IMAGE, MODELS, scattered
from torch import nn
from torch._inductor import metrics

import normops
from normops import backend, registry

X = (4, 6, 8, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    backend.register()
    normops.fusion_report(clear=True)
    yield
    torch._dynamo.reset()


def results(model, x, grad=None):
    """Output, gradients and buffers after a step, by name."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.ones_like(y).cumsum(-1) if grad is None else grad)
    named = {"output": y.detach(), "grad_input": x.grad}
    named |= {f"grad_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return named | {name: b.clone() for name, b in model.named_buffers()}


def compared(model, x, **options):
    """The report of a compiled copy, whose numbers are those of the model."""
    model = scattered(model)
    other = copy.deepcopy(model)
    expected = results(model, x)
    got = results(torch.compile(other, backend="normops", **options), x)
    got = {re.sub("_orig_mod.", "", name): value for name, value in got.items()}
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-3, atol=2e-3, msg=lambda m, name=name: name + m)
    return normops.fusion_report(clear=True)


def whats(report):
    return [fusion.what for fusion in report]


class Net(nn.Module):
    """A function of an image and of layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv():
    return nn.Conv2d(6, 6, 3, padding=1, bias=False)


NORMS = {
    "batch_norm": lambda: nn.BatchNorm2d(6),
    "instance_norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "group_norm": lambda: nn.GroupNorm(2, 6),
    "layer_norm": lambda: nn.LayerNorm(8),
    "rms_norm": lambda: nn.RMSNorm(8),
}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda **options: nn.LeakyReLU(0.2, **options),
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
}
each_norm = pytest.mark.parametrize("norm", NORMS)


# what is fused


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_norm
def test_norm_activation(norm, activation, inplace):
    model = nn.Sequential(NORMS[norm](), ACTIVATIONS[activation](inplace=inplace))
    assert whats(compared(model, torch.randn(X))) == [f"{norm} + {activation}"]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    report = compared(nn.Sequential(nn.LayerNorm(8), nn.GELU(approximate)), torch.randn(X))
    assert whats(report) == ["layer_norm + gelu" + ("_tanh" if approximate == "tanh" else "")]


FUNCTIONAL = {
    "TF.relu": lambda z: TF.relu(z),
    "TF.relu in place": lambda z: TF.relu(z, inplace=True),
    "TF.relu_": lambda z: TF.relu_(z),
    "torch.relu": lambda z: torch.relu(z),
    "torch.relu_": lambda z: torch.relu_(z),
    "method": lambda z: z.relu(),
    "method in place": lambda z: z.relu_(),
}


@pytest.mark.parametrize("how", FUNCTIONAL)
def test_functional_forms(how):
    model = Net(lambda self, x: FUNCTIONAL[how](self.norm(x)), norm=nn.BatchNorm2d(6))
    assert whats(compared(model, torch.randn(X))) == ["batch_norm + relu"]


def iadd(a, b):
    a += b
    return a


SUMS = {
    "+": lambda a, b: a + b,
    "+ reversed": lambda a, b: b + a,
    "+=": iadd,
    "torch.add": lambda a, b: torch.add(a, b),
    "add": lambda a, b: a.add(b),
    "add_": lambda a, b: a.add_(b),
}


@pytest.mark.parametrize("how", SUMS)
@each_norm
def test_norm_add_activation(norm, how):
    model = Net(lambda self, x: torch.relu(SUMS[how](self.norm(self.conv(x)), x)), norm=NORMS[norm](), conv=conv())
    assert whats(compared(model, torch.randn(X))) == [f"{norm} + add + relu"]


def test_norm_add():
    """Without an activation, and whatever uses the sum."""
    model = Net(lambda self, x: (y := self.norm(self.conv(x)) + x) * torch.relu(y), norm=nn.BatchNorm2d(6), conv=conv())
    assert whats(compared(model, torch.randn(X))) == ["batch_norm + add"]


def test_sum_with_itself():
    """Which is no residual."""
    model = Net(lambda self, x: torch.relu((y := self.norm(x)) + y), norm=nn.BatchNorm2d(6))
    assert whats(compared(model, torch.randn(X))) == ["batch_norm"]


def test_sum_with_a_factor():
    model = Net(lambda self, x: torch.add(self.norm(x), x, alpha=2), norm=nn.BatchNorm2d(6))
    assert whats(compared(model, torch.randn(X))) == ["batch_norm"]


def test_residual_after_the_norm():
    """A residual that is computed later: a convolution, and, as in a ResNet, another norm."""
    model = Net(lambda self, x: TF.relu(self.norm(x) + self.conv(x)), norm=nn.BatchNorm2d(6), conv=conv())
    assert whats(compared(model, torch.randn(X))) == ["batch_norm + add + relu"]

    def block(self, x):
        out = self.norm(self.conv(x))
        out += self.other(self.down(x))
        return self.relu(out)

    model = Net(block, norm=nn.BatchNorm2d(6), other=nn.BatchNorm2d(6), conv=conv(), down=conv(), relu=nn.ReLU(True))
    # The sum is written into the output of the first norm, which is no one else's.
    assert whats(compared(model, torch.randn(X))) == ["batch_norm", "batch_norm + add + relu"]


@pytest.mark.parametrize("used", [False, True], ids=["norm", "both"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_add_norm(norm, used):
    def forward(self, x):
        total = self.conv(x) + x
        return total.sin() * self.norm(total) if used else self.norm(total)

    assert whats(compared(Net(forward, norm=NORMS[norm](), conv=conv()), torch.randn(X))) == [f"add + {norm}"]


def test_shared_activation():
    model = Net(
        lambda self, x: self.relu(self.b(self.relu(self.a(x)))),
        a=nn.BatchNorm2d(6),
        b=nn.GroupNorm(2, 6),
        relu=nn.ReLU(inplace=True),
    )
    assert whats(compared(model, torch.randn(X))) == ["batch_norm + relu", "group_norm + relu"]


def test_shared_norm():
    """Running statistics move in the order of the calls."""
    model = Net(lambda self, x: torch.relu(self.norm(torch.relu(self.norm(x)) + 3)), norm=nn.BatchNorm2d(6))
    assert whats(compared(model, torch.randn(X))) == ["batch_norm + relu"] * 2


@pytest.mark.parametrize("converted", [False, True], ids=["torch", "converted"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, training, converted):
    model = MODELS[name]().train(training)
    expected = {
        "resnet": ["batch_norm + add + relu"] * 2 + ["batch_norm + relu"] * 3,
        "vision transformer": ["add + layer_norm"] * 3 + ["add + rms_norm"] + ["layer_norm"],
        "unet": ["group_norm + silu", "instance_norm + silu"],
    }
    report = compared(normops.convert(model) if converted else model, torch.randn(IMAGE))
    assert sorted(whats(report)) == sorted(expected[name])


class OwnRMSNorm(nn.Module):
    """As language models write it."""

    def __init__(self, width, offset):
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = nn.Parameter(torch.rand(width)), 1e-6, offset

    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.offset:
            return (x * (1.0 + self.weight.float())).type_as(hidden_states)
        return self.weight * x.to(hidden_states.dtype)


class Centered(OwnRMSNorm):
    """Not what its name says."""

    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True)) + 1


@pytest.mark.parametrize("offset", [False, True], ids=["weight", "1 + weight"])
def test_lookalikes(offset):
    before = list(registry._entries)
    try:
        for cls in (OwnRMSNorm, Centered):
            name = f"{cls.__module__}.{cls.__qualname__}*"
            normops.register_conversion(
                name, lambda module, x: normops.functional.rms_norm(x, (8,), module.weight, 1e-6)
            )
        model = Net(lambda self, x: self.norm(self.conv(x) + x), norm=OwnRMSNorm(8, offset), conv=conv())
        assert whats(compared(model, torch.randn(X))) == ["add + rms_norm"]
        model = Net(lambda self, x: self.norm(self.conv(x) + x), norm=Centered(8, offset), conv=conv())
        assert whats(compared(model, torch.randn(X))) == []
    finally:
        registry._entries[:] = before


# what is left


def left(model, x, what, why, fused=()):
    report = compared(model, x)
    assert whats(report) == list(fused)
    assert any(one.what == what and why in one.why for one in report.left), report.left


def test_several_users():
    model = Net(lambda self, x: torch.relu(y := self.norm(x)) + y, norm=nn.BatchNorm2d(6))
    left(model, torch.randn(X), "batch_norm + relu", "the output of the norm has 2 users", ["batch_norm"])


def test_broadcast_sum():
    model = Net(lambda self, x: torch.relu(self.norm(x) + x[:1]), norm=nn.BatchNorm2d(6))
    left(model, torch.randn(X), "batch_norm + add", "shapes not known to be equal", ["batch_norm"])


@pytest.mark.parametrize("first", [True, False])
def test_broadcast_sum_before_the_norm(first):
    """Whichever of the two is broadcast."""

    def forward(self, x):
        few = torch.relu(x[:1])
        return self.norm(few + x if first else x + few)

    left(Net(forward, norm=nn.LayerNorm(X[-1])), torch.randn(X), "add + layer_norm", "shapes not known", ["layer_norm"])


def test_promoted_sum():
    model = Net(lambda self, x: torch.relu(self.norm(x) + x.double()).float(), norm=nn.BatchNorm2d(6))
    left(model, torch.randn(X), "batch_norm + add", "dtypes torch.float32 and torch.float64", ["batch_norm"])


def test_sum_written_into_the_other():
    def forward(self, x):
        y = self.conv(x)
        z = y.sin()
        w = z * 2
        z += self.norm(y)
        return torch.relu(z) + w

    model = Net(forward, norm=nn.BatchNorm2d(6), conv=conv())
    left(model, torch.randn(X), "batch_norm + add", "others see", ["batch_norm"])


def test_sum_written_into_what_others_see():
    def forward(self, x):
        y = self.conv(x)
        z = y.view(X)
        z += x
        return self.norm(z) * y

    left(
        Net(forward, norm=nn.LayerNorm(8), conv=conv()),
        torch.randn(X),
        "add + layer_norm",
        "others see",
        ["layer_norm"],
    )


def test_written_in_between():
    """The norm would be computed where the residual is there, and by then its input is another."""

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        with torch.no_grad():
            y.mul_(2)
        return torch.relu(z + self.conv(x))

    model = Net(forward, norm=nn.BatchNorm2d(6), conv=conv()).eval()
    compiled = torch.compile(model, backend="normops")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x := torch.randn(X)), model(x), rtol=1e-4, atol=1e-4)
    assert "batch_norm + add + relu" not in whats(normops.fusion_report())


def test_sum_changed_in_between():
    def forward(self, x):
        y = self.conv(x) + x
        y.mul_(2)
        return self.norm(y)

    left(
        Net(forward, norm=nn.LayerNorm(8), conv=conv()),
        torch.randn(X),
        "add + layer_norm",
        "writes between",
        ["layer_norm"],
    )


@pytest.mark.parametrize("other", [nn.ELU(0.5), nn.Hardtanh(), nn.Tanh()], ids=str)
def test_other_activations(other):
    assert whats(compared(nn.Sequential(nn.BatchNorm2d(6), other), torch.randn(X))) == ["batch_norm"]


def test_integers_are_left_to_fail():
    model = nn.LayerNorm(8)
    with pytest.raises(RuntimeError):
        torch.compile(model, backend="normops")(torch.ones(X, dtype=torch.long))


# the rest of the graph


def test_graph_breaks():
    def forward(self, x):
        y = self.a(x)
        torch._dynamo.graph_break()
        y = torch.relu(y)
        return torch.relu(self.b(y))

    report = compared(Net(forward, a=nn.BatchNorm2d(6), b=nn.BatchNorm2d(6)), torch.randn(X))
    assert report.graphs == 2 and whats(report) == ["batch_norm", "batch_norm + relu"]


def test_dynamic_shapes():
    model = Net(lambda self, x: torch.relu(self.norm(self.conv(x)) + x), norm=nn.BatchNorm2d(6), conv=conv())
    compiled = torch.compile(model, backend="normops", dynamic=True)
    for size in (8, 5, 11):
        x = torch.randn(size, 6, size, size)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    report = normops.fusion_report()
    assert report.graphs == 1 and whats(report) == ["batch_norm + add + relu"]


def test_autocast():
    model = Net(lambda self, x: torch.relu(self.norm(self.conv(x))), norm=nn.BatchNorm2d(6), conv=conv()).eval()
    compiled = torch.compile(model, backend="normops")
    x = torch.randn(X)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = compiled(x), model(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    assert whats(normops.fusion_report()) == ["batch_norm + relu"]


def test_hooks_and_checkpointing():
    """(Of a BatchNorm that counts its batches, torch's own eager backend cannot run a checkpoint twice.)"""
    model = nn.Sequential(conv(), nn.GroupNorm(2, 6), nn.ReLU())
    seen = []
    model[0].weight.register_hook(lambda grad: seen.append(grad.shape))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    assert whats(compared(Net(forward, body=model), torch.randn(X))) == ["group_norm + relu"]
    assert seen


@pytest.mark.parametrize(
    "then", ["aot_eager", "eager", lambda graph_module, inputs: graph_module], ids=["aot_eager", "eager", "callable"]
)
def test_then(then):
    report = compared(nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU()), torch.randn(X), options={"then": then})
    assert whats(report) == ["group_norm + silu"]


def test_then_inductor():
    """It compiles what is left between the calls that took over what was around them."""
    metrics.reset()

    def forward(self, x):
        for norm in self.norms:
            x = torch.relu(norm(x) + x).sin()
        return x

    model = Net(forward, norms=nn.ModuleList(make() for make in NORMS.values()))
    report = compared(model, torch.randn(X), options={"then": "inductor"})
    assert whats(report) == [f"{norm} + add + relu" for norm in NORMS]
    assert metrics.generated_kernel_count > 0


def test_unknown_option():
    with pytest.raises(Exception, match="backend normops: expected no options but 'then', got 'than'"):
        torch.compile(nn.LayerNorm(8), backend="normops", options={"than": "inductor"})(torch.randn(X))


def test_report():
    model = nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()) for _ in range(6)), nn.LayerNorm(8))
    report = compared(model, torch.randn(X))
    assert repr(report).splitlines() == [
        "1 graph: 6 fusions, 1 norms alone, 0 left",
        "  6 x fused  batch_norm + relu: 0.0, 1.0, 2.0, ..., 5.0",
        "  1 x fused  layer_norm: 6",
    ]
    assert len(report) == 7 and [fusion.where for fusion in report][-1] == "6"
    assert len(normops.fusion_report()) == 0  # it was cleared


def test_entry_point():
    """By which torch finds the backend of an installed package without an import of it."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    module, name = re.search(r'entry-points.torch_dynamo_backends\]\nnormops = "(.+):(.+)"', text).groups()
    assert getattr(importlib.import_module(module), name) is backend.backend
