"""Nested tensors: each sequence as if it were alone, or all of them as if they were one."""

import pytest
import torch
import torch.nn.functional as TF

import normops
import normops.functional as F

LENGTHS = [5, 1, 9, 3]
TWO_AT_LEAST = [5, 2, 9, 3]  # one value has no variance
CHANNELS = 6


def sequences(dtype=torch.float32, device="cpu", lengths=LENGTHS):
    """(N, j, C), and what it is made of."""
    torch.manual_seed(0)
    parts = [(2 * torch.randn(length, CHANNELS, device=device) + 1).to(dtype) for length in lengths]
    leaves = [part.clone().requires_grad_() for part in parts]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    return nested, leaves


def compare(nested, leaves, ours, theirs, *, tolerance=1e-5):
    """Outputs and gradients of nested input and of its parts."""
    y, expected = ours(nested), theirs(leaves)
    assert y.is_nested and y.dtype == nested.dtype
    parts = y.transpose(1, 2).unbind() if y._ragged_idx == 2 else y.unbind()
    for part, other in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=tolerance, atol=tolerance)
    torch.autograd.backward([part.square().sum() for part in parts])
    torch.autograd.backward([other.square().sum() for other in expected])
    for grad, leaf in zip(nested.grad.unbind(), leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_rows(op, dtype, device):
    nested, leaves = sequences(dtype, device)
    weight = torch.randn(CHANNELS, device=device, dtype=dtype)
    compare(
        nested,
        leaves,
        lambda x: getattr(F, op)(x, (CHANNELS,), weight, activation="gelu"),
        lambda parts: [TF.gelu(getattr(TF, op)(part, (CHANNELS,), weight)) for part in parts],
    )


@pytest.mark.real_device
def test_sum_of_rows(device):
    nested, _ = sequences(device=device)
    y, total = F.add_layer_norm(nested, nested, (CHANNELS,))
    for part, summed, x in zip(y.unbind(), total.unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(summed, 2 * x)
        torch.testing.assert_close(part, TF.layer_norm(2 * x, (CHANNELS,)))


@pytest.mark.real_device
def test_batch_norm(device):
    nested, leaves = sequences(device=device)
    weight, bias = torch.randn(2, CHANNELS, device=device)
    running = [[torch.zeros(CHANNELS, device=device), torch.ones(CHANNELS, device=device)] for _ in range(2)]
    compare(
        nested,
        leaves,
        lambda x: F.batch_norm(x.transpose(1, 2), *running[0], weight, bias, training=True),
        lambda parts: TF.batch_norm(torch.cat(parts), *running[1], weight, bias, training=True).split(LENGTHS),
    )
    torch.testing.assert_close(*running)


@pytest.mark.real_device
@pytest.mark.parametrize("name, args", [("instance_norm", ()), ("group_norm", (2,)), ("group_norm", (1,))], ids=str)
def test_statistics_of_samples(name, args, device):
    lengths = TWO_AT_LEAST if name == "instance_norm" else LENGTHS
    nested, leaves = sequences(device=device, lengths=lengths)
    weight, bias = torch.randn(2, CHANNELS, device=device)
    compare(
        nested,
        leaves,
        lambda x: getattr(F, name)(x.transpose(1, 2), *args, weight=weight, bias=bias),
        lambda parts: [getattr(TF, name)(p.T.unsqueeze(0), *args, weight=weight, bias=bias)[0].T for p in parts],
    )


@pytest.mark.real_device
@pytest.mark.parametrize("op", ["channel_layer_norm", "channel_rms_norm"])
def test_statistics_of_positions(op, device):
    nested, leaves = sequences(device=device)
    weight = torch.randn(CHANNELS, device=device)
    theirs = getattr(TF, op.removeprefix("channel_"))
    compare(
        nested,
        leaves,
        lambda x: getattr(F, op)(x.transpose(1, 2), weight, eps=1e-5),
        lambda parts: [theirs(part, (CHANNELS,), weight, eps=1e-5) for part in parts],
    )


@pytest.mark.real_device
@pytest.mark.parametrize("name", ["batch_norm", "group_norm"])
def test_parameters_of_samples(name, device):
    nested, leaves = sequences(device=device)
    weight, bias = torch.randn(2, len(LENGTHS), CHANNELS, device=device)
    args = (None, None, weight, bias, True) if name == "batch_norm" else (2, weight, bias)

    def separately(parts):
        if name == "batch_norm":
            parts = TF.batch_norm(torch.cat(parts), None, None, training=True).split(LENGTHS)
        else:
            parts = [TF.group_norm(part.T.unsqueeze(0), 2)[0].T for part in parts]
        return [part * w + b for part, w, b in zip(parts, weight, bias, strict=True)]

    compare(nested, leaves, lambda x: getattr(F, name)(x.transpose(1, 2), *args), separately)


@pytest.mark.real_device
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(
    "op, args", [("group_norm", (3,)), ("instance_norm", ()), ("channel_layer_norm", ())], ids=lambda value: str(value)
)
def test_ragged_images(op, args, dim, device):
    """(N, C, j, W) and (N, C, H, j)."""
    heights = [3, 1, 2]
    values = torch.randn(CHANNELS, sum(heights), 4, device=device).transpose(1, dim - 1).contiguous()
    offsets = torch.tensor([0, 3, 4, 6], device=device)
    y = getattr(F, op)(torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=dim), *args)
    for part, x in zip(y.values().split(heights, dim - 1), values.split(heights, dim - 1), strict=True):
        torch.testing.assert_close(part, getattr(F, op)(x.unsqueeze(0), *args)[0])


@pytest.mark.real_device
def test_residual(device):
    nested, leaves = sequences(device=device)
    x = nested.detach().transpose(1, 2)
    y = F.batch_norm(x, None, None, training=True, residual=x, activation="relu")
    whole = torch.cat([leaf.detach() for leaf in leaves])
    expected = (TF.batch_norm(whole, None, None, training=True) + whole).relu().split(LENGTHS)
    for part, other in zip(y.transpose(1, 2).unbind(), expected, strict=True):
        torch.testing.assert_close(part, other)


@pytest.mark.real_device
def test_modules(device):
    nested, leaves = sequences(device=device)
    layer = normops.LayerNorm(CHANNELS, device=device)
    compare(nested, leaves, layer, lambda parts: [TF.layer_norm(part, (CHANNELS,)) for part in parts])
    norm = normops.BatchNorm1d(CHANNELS, device=device)
    y = norm(nested.detach().transpose(1, 2)).transpose(1, 2)
    expected = TF.batch_norm(torch.cat([leaf.detach() for leaf in leaves]), None, None, training=True)
    torch.testing.assert_close(y.values(), expected)
    assert norm.running_mean.any()


@pytest.mark.real_device
@pytest.mark.parametrize(
    "op", ["layer_norm", "rms_norm", "batch_norm", "instance_norm", "group_norm", "channel_layer_norm"]
)
def test_compile(op, device):
    torch._dynamo.reset()
    arguments = {"batch_norm": (None, None, None, None, True), "group_norm": (2,)}

    def function(x):
        if op in ("layer_norm", "rms_norm"):
            return getattr(F, op)(x, (CHANNELS,))
        return getattr(F, op)(x.transpose(1, 2), *arguments.get(op, ())).transpose(1, 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        nested, _ = sequences(device=device, lengths=TWO_AT_LEAST)
        y = run(nested)
        y.values().square().sum().backward()
        results.append((y.values().detach(), nested.grad.values()))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_errors():
    nested, _ = sequences()
    nested = nested.detach()
    ragged_twice = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 5)])
    with pytest.raises(
        ValueError, match=r"layer_norm: expected a nested tensor of layout torch.jagged, with one ragged"
    ):
        F.layer_norm(ragged_twice, (3,))
    with pytest.raises(
        ValueError, match=r"layer_norm: expected the ragged dimension .* before .* got dimension 1 of 3"
    ):
        F.layer_norm(nested, (9, CHANNELS))
    options_of_all = {
        F.batch_norm: {"running_mean": None, "running_var": None, "training": True},
        F.instance_norm: {},
        F.group_norm: {"num_groups": 2},
    }
    for op, options in options_of_all.items():
        with pytest.raises(ValueError, match=r"ragged dimension is behind the channels, got .*: transpose it"):
            op(nested, **options)
        with pytest.raises(ValueError, match="expected no mask with a nested tensor"):
            op(nested.transpose(1, 2), mask=torch.ones(4, 9, dtype=torch.bool), **options)
        with pytest.raises(ValueError, match=r"expected residual to be nested as input is .*, got"):
            op(nested.transpose(1, 2), residual=torch.ones(4, CHANNELS, 9), **options)
    with pytest.raises(RuntimeError, match=r"group_norm: expected num_groups .* got 4 groups"):
        F.group_norm(nested.transpose(1, 2), 4)
