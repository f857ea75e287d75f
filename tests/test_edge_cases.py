"""Sizes and values at the limits."""

import pytest
import torch
from cases import CASES, each, each_case, each_channel_case, each_dtype, each_row_case
from comparison import check, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, each_memory_format, in_order

import normops.functional as F

# Sizes.


@pytest.mark.parametrize("shape", [(0, 6, 5, 7), (0, 6, 1, 1)], ids=str)
@each_case
def test_empty_batch(case, shape, device):
    sample = case.sample(case.enough(shape), device=device)
    results = sample.results(grad=torch.empty_like(sample.input))
    assert results["output"].shape == results["grad_input"].shape == sample.input.shape
    for name, parameter in sample.parameters.items():
        assert torch.equal(results[f"grad_{name}"], torch.zeros_like(parameter))


@each_channel_case
def test_no_positions(case, device):
    sample = case.sample((4, 6, 0), device=device)
    results = sample.results(grad=torch.empty(4, 6, 0, device=device))
    assert results["output"].shape == (4, 6, 0)
    assert torch.equal(results["grad_weight"], torch.zeros_like(sample.parameters["weight"]))


@each_row_case
def test_empty_rows(case, device):
    sample = case.sample((4, 6, 5, 0), device=device)
    assert sample.results(grad=torch.empty_like(sample.input))["output"].shape == (4, 6, 5, 0)


def test_no_channels(device):
    x = torch.empty(4, 0, 5, device=device)
    none = torch.empty(0, device=device)
    for output in (F.batch_norm(x, none, none), F.batch_norm(x, None, None, training=True), F.instance_norm(x)):
        assert output.shape == x.shape


@pytest.mark.parametrize("parameters", ["absent", "given"])
@pytest.mark.parametrize("statistics", [None, 0, 3])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_of_nothing(training, statistics, parameters, device):
    """Torch takes one dimension without elements with any statistics or none, and moves none of them."""
    running = [None, None] if statistics is None else [torch.full((statistics,), 7.0, device=device) for _ in range(2)]
    results = []
    for function in (torch.nn.functional.batch_norm, F.batch_norm):
        names = ["weight", "bias"] if parameters == "given" else []
        leaves = {name: torch.ones(3, dtype=torch.float64, device=device, requires_grad=True) for name in names}
        x = torch.empty(0, dtype=torch.float16, device=device, requires_grad=True)
        output = function(x, *running, **leaves, training=training)
        assert output is not x and output.dtype == torch.float16
        results.append([output, *torch.autograd.grad(output.sum(), [x, *leaves.values()])])
    torch.testing.assert_close(*results)
    assert all(statistic is None or statistic.eq(7).all() for statistic in running)


@pytest.mark.parametrize("shape", [(1, 6, 5, 7), (4, 1, 5, 7), (4, 6, 1, 1), (4, 6, 5, 1), (1, 1, 1, 1)], ids=str)
@each_memory_format
@each_case
def test_ones(case, memory_format, shape, device):
    sample = case.sample(case.enough(shape), device=device)
    check(sample.with_input(sample.input.detach().contiguous(memory_format=memory_format)))


@each_dtype
@each_case
def test_widths(case, dtype, device):
    """Rows, positions and channels of any length up to some vectors: every remainder of every vector width, of 32
    elements at most, with none, one and some vectors before it."""
    for size in (*range(1, 67), 95, 96, 97, *range(126, 131)):
        check(case.sample(case.enough((3, 2, 1, size)), dtype, device=device))
        if not case.row_dims:
            sample = case.sample((2, size, 1, 3), dtype, device=device)
            check(sample.with_input(sample.input.detach().contiguous(memory_format=torch.channels_last)))


@pytest.mark.real_device
@each_memory_format
@each_channel_case
def test_many_channels(case, memory_format, device):
    """Lines are walked in blocks of 2048 channels, each with coefficients of its own."""
    sample = case.sample(case.enough((3, 4100, 2, 2)), device=device)
    own_means = sample.input.detach() + torch.arange(4100.0, device=device).view(-1, 1, 1) % 7
    check(sample.with_input(own_means.contiguous(memory_format=memory_format)))


@pytest.mark.parametrize("size", [4095, 4096, 4097, 10000])
@each_case
def test_chunks(case, size, device):
    """Sums over a long line are taken in chunks of 4096."""
    check(case.sample((2, 3, 1, size), device=device))


@pytest.mark.parametrize("length", [24, 136, 520, 1032, 4104, 8200, 16384, 16385, 24584, 32776, 40001, 66000])
@each_dtype
@each_row_case
def test_long_rows(case, dtype, length, device):
    """On CUDA a row goes to some lanes, a warp, a block (with sums in shared memory), a cluster, or to many blocks."""
    check(case.sample((3, 1, 1, length), dtype, device=device))


@each([case for case in CASES if case.name == "layer_norm_1d"])
def test_many_long_rows(case, device):
    """On CUDA a block takes some of them."""
    check(case.sample((131, 1, 1, 4101), device=device))


@pytest.mark.parametrize("positions", [4096, 12296, 16392, 32776])
@each_dtype
@each_channel_case
def test_long_lines(case, dtype, positions, device):
    """On CUDA a slab goes to one block, or through three stages."""
    check(case.sample((1, 6, positions), dtype, device=device))


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("batch_norm_training", (3, 32, 24000), torch.float32),
        ("instance_norm", (1, 4, 90004), torch.float32),
        ("instance_norm", (1, 5, 200008), torch.bfloat16),
        ("group_norm_3", (1, 12, 40004), torch.float32),
        ("group_norm_3", (1, 33, 6152), torch.float32),
    ],
    ids=str,
)
def test_larger_slabs(name, shape, dtype, device):
    """On CUDA a slab goes to a cluster, its lines cut anywhere; in the backward of several channels, between them."""
    case = next(case for case in CASES if case.name == name)
    check(case.sample(shape, dtype, device=device))


@pytest.mark.parametrize("positions", [32767, 32768, 32769, 70000])
@each_channel_case
def test_contiguous_segments(case, positions, device):
    """The positions of a channel are cut into segments of 32768, and the segments merged."""
    check(case.sample((2, 3, positions), device=device))


@pytest.mark.parametrize(
    "shape",
    [(1, 6, 15, 17), (1, 6, 16, 16), (1, 6, 257, 1), (3, 6, 30, 31), (2, 512, 6, 6), (2, 513, 6, 6), (2, 1500, 5, 7)],
    ids=str,
)
@each_channel_case
def test_channels_last_segments(case, shape, device):
    """Segments of 64 to 256 positions, more where channels are few, and blocks of 512 channels."""
    sample = case.sample(shape, device=device)
    check(sample.with_input(sample.input.detach().contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("shape", [(9, 70, 7, 7), (33, 3, 2, 2), (8, 5, 16, 16), (300, 4, 3, 3), (8, 1, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "layout", ["contiguous", "misaligned", "sliced samples", "expanded samples", "sliced channels"]
)
@each([case for case in CASES if case.over_batch])
def test_small_planes(case, layout, shape, device):
    """Of many samples: each plane is taken for a wide channel of a channels_last line."""
    sample = case.sample(shape, device=device)
    check(sample.with_input(LAYOUTS[layout](sample.input.detach())))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (9, 16, 7, 7)),
        (torch.bfloat16, (41, 4, 14, 14)),
        (torch.bfloat16, (100, 8, 7, 7)),
        (torch.float16, (12, 8, 9, 9)),
        (torch.float16, (8, 8, 16, 15)),
        (torch.float32, (33, 8, 5, 5)),
        (torch.float32, (8, 8, 15, 15)),
        (torch.float64, (20, 4, 3, 3)),
    ],
    ids=str,
)
@each([case for case in CASES if case.over_batch])
def test_small_planes_side_by_side(case, dtype, shape, device):
    """On CUDA a block holds as many channels as are whole vectors together."""
    check(case.sample(shape, dtype, device=device))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 255, 257, 1031, 20000])
@each_row_case
def test_blocks_of_rows(case, rows, device):
    """Gradients of parameters are summed in blocks of rows."""
    check(case.sample((rows, 1, 3, 5), device=device))


@pytest.mark.parametrize(
    ("names", "shape", "first"),
    [
        pytest.param(["layer_norm_1d", "rms_norm_1d"], (1, 1, 100 * 4096), (..., slice(4096)), id="chunks of rows"),
        pytest.param(["layer_norm_1d", "rms_norm_1d"], (40 * 256, 1, 4), slice(256), id="blocks of rows"),
        pytest.param(["instance_norm"], (1, 2, 16 * 2048), (..., slice(2048)), id="chunks of lines"),
        pytest.param(["instance_norm", "group_norm_1"], (40, 2, 64), 0, id="samples"),
        pytest.param(["batch_norm_training"], (40, 2, 300), 0, id="segments"),
        pytest.param(["batch_norm_training"], (64, 70, 16, 16), 0, id="segments of channels_last"),
    ],
)
def test_totals_in_double(names, shape, first):
    """What has been summed in float goes on in double, to the end.

    After a first part with elements of one size, and squares, those of the others come to less than half of the total's
    last digit in float: they would all be lost, and are some ten of its digits together. Equal elements are summed
    without a rounding, so the tolerance has none for sums.
    """
    small = 15 * 2.0**-16  # whose square is 0.88 of half a digit of one
    grad = torch.full(shape, small**2)
    x = torch.full(shape, small)
    grad[first] = x[first] = 1
    x[..., ::2] *= -1
    if len(shape) == 4:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    for case in CASES:
        if case.name in names:
            sample = case.sample(shape).with_input(x)
            sample.fixed["eps"] = 1e-12
            check(sample, grad, allowed=tolerance(torch.float32, torch.float32, terms=0))


@pytest.mark.parametrize("samples", [2, 255, 1000])
@each([case for case in CASES if case.op != "instance_norm" and case.row_dims != 2])
def test_matrices(case, samples, device):
    """An input without positions, as behind a linear layer."""
    check(case.sample((samples, 12), device=device))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    case=st.sampled_from(CASES),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.integers(2, 40)),
    dims=st.permutations(range(4)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_shape_in_any_order(case, shape, dims, dtype):
    sample = case.sample(shape, dtype)
    check(sample.with_input(in_order(sample.input.detach(), dims)))


# Values.


@each_memory_format
@pytest.mark.parametrize("where", [slice(16), slice(None, None, 32)], ids=["beginning", "every quarter"])
@each_case
def test_unlike_the_others(case, where, memory_format, device):
    """A variance starts from a guess at the mean: of the first elements, of four of a short row, or of some lines.

    Here it is far off.
    """
    sample = case.sample((2, 3, 40, 128), device=device)
    far = sample.input.detach() + 1e4
    far[..., where] = 0
    far[..., ::32, :] = 0
    check(sample.with_input(far.contiguous(memory_format=memory_format)))


@each_memory_format
@each_channel_case
def test_unlike_the_others_in_step(case, memory_format, device):
    """All lines that the guess is made of are, as they come at regular distances; so wide that none are joined."""
    sample = case.sample((1, 1200, 8, 8), torch.bfloat16, device=device)
    far = sample.input.detach() + 1e4
    far[..., ::8] = 0
    check(sample.with_input(far.contiguous(memory_format=memory_format)))


@each([case for case in CASES if case.over_batch])
def test_unlike_the_others_in_small_planes(case, device):
    """The four elements that the guess is made of, of few samples with small planes."""
    sample = case.sample((9, 6, 7, 7), device=device)
    far = sample.input.detach() + 1e4
    for quarter in range(4):
        far[quarter * 9 // 4, :].flatten(1)[:, quarter * 49 // 4] = 0
    check(sample.with_input(far))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.14159, 1e4])
@each_memory_format
@each_case
def test_zero_variance(case, memory_format, value, device):
    """Rows of equal elements: rstd is 1 / sqrt(eps), and nothing of the input is left in the output."""
    sample = case.sample(device=device)
    constant = torch.full_like(sample.input, value).contiguous(memory_format=memory_format)
    if case.op == "rms_norm" and value == 0:
        sample.fixed["eps"] = 1e-5
    check(sample.with_input(constant))


@pytest.mark.parametrize("mean", [1e4, -1e4])
@each_memory_format
@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (2, 6, 64, 80)], ids=str)
@each_case
def test_large_mean(case, shape, memory_format, mean, device):
    """Ten thousand times the deviation: nothing is lost to cancellation."""
    sample = case.sample(shape, device=device)
    large = (torch.randn(shape, device=device) + mean).contiguous(memory_format=memory_format)
    if case.given_stats:
        sample.fixed["running_mean"] += mean
    check(sample.with_input(large), allowed=1e-5)


@each_row_case
def test_large_mean_of_long_rows(case, device):
    """Which on CUDA have kernels of their own."""
    sample = case.sample((3, 1, 1, 16385), device=device)
    check(sample.with_input(sample.input.detach() + 1e4), allowed=1e-5)


@pytest.mark.parametrize("mean", [1e4, 1e6])
@each_case
def test_large_mean_of_each_channel(case, mean, device):
    """Channels far from each other, each with a deviation of one."""
    sample = case.sample((4, 6, 9, 10), device=device)
    offsets = mean * torch.arange(1, 7, device=device).view(1, 6, 1, 1)
    check(sample.with_input(sample.input.detach() + offsets))


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1e8, 1e16])
@each_case
def test_scales(case, scale, device):
    """Squares of the input stay within the range of float32."""
    sample = case.sample(device=device)
    check(sample.with_input(sample.input.detach() * scale), backward=scale < 1e10)


def assert_nan_where_torch_has_it(sample, grad):
    ours, theirs = sample.results(grad=grad), sample.results(torch.nn.functional, grad)
    torch.testing.assert_close(*({name: t.isnan() for name, t in results.items()} for results in (ours, theirs)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@each_memory_format
@each_case
def test_input_not_finite(case, memory_format, value, device):
    sample = case.sample(device=device)
    x = sample.input.detach().contiguous(memory_format=memory_format)
    x[1, 2, 3, 4] = value
    assert_nan_where_torch_has_it(sample.with_input(x), torch.randn_like(x))


@each_case
def test_gradient_not_finite(case, device):
    sample = case.sample(device=device)
    grad = torch.randn_like(sample.input)
    grad[1, 2, 3, 4] = float("nan")
    assert_nan_where_torch_has_it(sample, grad)
