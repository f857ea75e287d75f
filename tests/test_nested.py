"""Nested tensors: each sequence as if it were alone, or all of them as if they were one."""

import pytest
import torch
import torch.nn.functional as TF

import normops
import normops.functional as F

LENGTHS = [5, 1, 9, 3]
CHANNELS = 6


def sequences(dtype=torch.float32, device="cpu"):
    """(N, j, C), and what it is made of."""
    torch.manual_seed(0)
    parts = [(2 * torch.randn(length, CHANNELS, device=device) + 1).to(dtype) for length in LENGTHS]
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
def test_instance_norm(device):
    LENGTHS[1] = 2  # one value has no variance
    try:
        nested, leaves = sequences(device=device)
        weight, bias = torch.randn(2, CHANNELS, device=device)
        compare(
            nested,
            leaves,
            lambda x: F.instance_norm(x.transpose(1, 2), weight=weight, bias=bias),
            lambda parts: [TF.instance_norm(p.T.unsqueeze(0), weight=weight, bias=bias)[0].T for p in parts],
        )
    finally:
        LENGTHS[1] = 1


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
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "batch_norm"])
def test_compile(op, device):
    torch._dynamo.reset()

    def function(x):
        if op == "batch_norm":
            return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)
        return getattr(F, op)(x, (CHANNELS,))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        nested, _ = sequences(device=device)
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
    for op in (F.batch_norm, F.instance_norm):
        options = {"running_mean": None, "running_var": None, "training": True} if op is F.batch_norm else {}
        with pytest.raises(ValueError, match=r"ragged dimension is behind the channels, got .*: transpose it"):
            op(nested, **options)
        with pytest.raises(ValueError, match="expected no mask with a nested tensor"):
            op(nested.transpose(1, 2), mask=torch.ones(4, 9, dtype=torch.bool), **options)
        with pytest.raises(ValueError, match=r"expected residual to be nested as input is .*, got"):
            op(nested.transpose(1, 2), residual=torch.ones(4, CHANNELS, 9), **options)
    with pytest.raises(NotImplementedError, match=r"group_norm: expected input with strided layout, got torch.jagged"):
        F.group_norm(nested.transpose(1, 2), 2)
