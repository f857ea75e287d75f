"""The layers on emulated kernels: what does not follow from running their tests on the device ``emulated``."""

import contextlib

import pytest
import torch
from cases import CASES, SHAPE, each_case
from torch import nn

import normops
from emulator import backend
from emulator.build import HERE
from emulator.sanitizers import run_python

pytestmark = pytest.mark.skipif(not backend.exists(), reason="there are no CUDA kernels")


def outputs(case):
    torch.manual_seed(0)
    sample = case.sample((5, 6, 9, 10))
    return sample.results(grad=torch.randn_like(sample.input))


@each_case
def test_the_order_of_threads_changes_nothing(case):
    with backend.entered():
        try:
            results = []
            for seed in (0, 1, 2, 3):
                backend.library().seed(seed)
                results.append(outputs(case))
        finally:
            backend.library().seed()
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_the_backend_comes_and_goes(capfd):
    def launches():
        return sum(launches.launches for launches in backend.library().report())

    x, counts = torch.randn(SHAPE), []
    for _ in range(2):
        with backend.entered():
            CASES[0].sample().with_input(x).run()
        counts.append(launches())
        CASES[0].sample().with_input(x).run()
        assert launches() == counts[-1], "outside, nothing is emulated"
    assert counts[0] < counts[1]
    assert "verrid" not in capfd.readouterr().err, "no warning of kernels that take the place of others"


LAUNCHES = {
    "layer_norm": (nn.LayerNorm(768), (64, 768), 1, 2),
    "layer_norm_silu": (normops.LayerNorm(768, activation="silu"), (64, 768), 1, 2),
    "rms_norm": (nn.RMSNorm(8192), (4, 8192), 1, 2),
    "layer_norm_long": (nn.LayerNorm(300000), (3, 300000), 3, 3),
    "layer_norm_long_many": (nn.LayerNorm(300000), (129, 300000), 3, 4),
    "batch_norm_slab": (nn.BatchNorm2d(16), (8, 16, 8, 8), 1, 1),
    "batch_norm": (nn.BatchNorm2d(16), (32, 16, 96, 96), 3, 3),
    "batch_norm_cluster": (nn.BatchNorm2d(64), (32, 64, 48, 48), 1, 1),
    "batch_norm_relu": (normops.BatchNorm2d(16, activation="relu"), (32, 16, 64, 64), 3, 4),  # one makes z's scale
    "batch_norm_small_planes": (nn.BatchNorm2d(16), (32, 16, 7, 7), 1, 1),
    "batch_norm_eval": (nn.BatchNorm2d(16).eval(), (32, 16, 64, 64), 2, 3),
    "instance_norm": (nn.InstanceNorm2d(16, track_running_stats=True), (8, 16, 8, 8), 2, 1),
    "group_norm": (nn.GroupNorm(4, 16), (2, 16, 32, 32), 1, 2),
    "group_norm_cluster": (nn.GroupNorm(8, 32), (2, 32, 96, 96), 1, 2),
    "group_norm_silu": (normops.GroupNorm(4, 16, activation="silu"), (2, 16, 32, 32), 1, 2),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    """How many there are in the forward and in the backward, which gives gradients of input, weight and bias."""
    layer, shape, *expected = LAUNCHES[name]
    layer = normops.convert(layer)
    assert count_launches(layer, torch.empty(shape, requires_grad=True)) == expected


def test_launches_of_sums():
    """The sum comes with the norm, and its gradient with the norm's."""
    x, residual, weight = torch.empty(64, 768), torch.empty(64, 768, requires_grad=True), torch.empty(768)
    weight.requires_grad_()

    def layer(x):
        return normops.functional.add_rms_norm(x, residual, (768,), weight, weight_offset=1.0)

    assert count_launches(layer, x.requires_grad_()) == [1, 2]


def count_launches(layer, x):
    library, counts = backend.library(), []
    with backend.entered(), library.dry():
        for step in range(2):
            library.clear()
            if step == 0:
                outputs = layer(x)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            else:
                torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
            counts.append(sum(launches.launches for launches in library.report()))
    return counts


def test_a_sample_counts_for_all():
    """Of each launch one block, or the blocks of one cluster; all of them do the same here."""
    library, counts = backend.library(), []
    for shape in ((64, 256), (2, 81920)):
        for context in (contextlib.nullcontext, library.sampled):
            with backend.entered(), context():
                library.clear()
                normops.functional.layer_norm(torch.randn(shape), shape[-1:])
                counts.append(library.report())
    block, of_blocks, cluster, of_clusters = counts
    assert block == of_blocks and cluster == of_clusters
    assert block[0].blocks > block[0].launches and block[0].barriers + block[0].exchanges > 0


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_are_written_in_the_dtype_of_the_weight(weight_dtype):
    """If the input has it too, and otherwise in that of the arithmetic, from which autograd converts."""
    expected = torch.bfloat16 if weight_dtype == torch.bfloat16 else torch.float32
    x, dy = torch.randn(2, 4, 6, 8, dtype=torch.bfloat16)
    weights = {size: torch.ones(size, dtype=weight_dtype) for size in (6, 8)}
    ops, parameters = torch.ops.normops, [True, True, True, False]  # and no residual
    with backend.entered():
        _, mean, rstd = ops._row_norm(x, 1, weights[8], None, 1e-5, True)
        rows = ops._row_norm_backward(dy, x, 1, mean, rstd, weights[8], 1e-5, True, parameters)[:3]
        _, mean, var = ops._channel_norm(x, None, None, weights[6], None, 2, False, 1e-5)
        channels = ops._channel_norm_backward(dy, x, mean, var, weights[6], 2, False, 1e-5, True, parameters)[:3]
    assert [gradient.dtype for gradient in (*rows, *channels)] == 2 * [torch.bfloat16, expected, expected]


def run_tests(files, selection, variant="plain", **environment):
    """Runs the layers' tests on the device ``emulated``, in a process of their own."""
    paths = [str(HERE.parent / f"test_{name}.py") for name in files]
    arguments = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", f"emulated and ({selection})", *paths]
    done = run_python(variant, *arguments, NORMOPS_EMULATOR_VARIANT=variant, **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-10000:]
    assert "CUDA kernels" in done.stdout and "Sanitizer" not in done.stdout + done.stderr


@pytest.mark.nightly
def test_what_is_moved():
    """The table of bytes in CONTRIBUTING.md, and the record that predictions are made from."""
    done = run_python("plain", "-m", "emulator.traffic_table", NORMOPS_EMULATOR_VARIANT="counting")
    assert done.returncode == 0, done.stderr[-5000:]


# Each layer forward and backward, contiguous and channels_last. Building the kernels for a sanitizer takes minutes; the
# toys are run with both on every commit.
@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_find_nothing(variant):
    run_tests(["backward", "dtypes"], "input-weight-bias or (test_channels_last and bfloat16)", variant)


@pytest.mark.parametrize("architecture", ["sm_80", pytest.param("sm_86", marks=pytest.mark.nightly)])
def test_older_architectures(architecture):
    """There a block has less shared memory, and there are no clusters."""
    selection = "input-weight-bias or test_chunks or test_channels_last_segments or (test_long_rows and bfloat16)"
    run_tests(["backward", "edge_cases"], selection, NORMOPS_EMULATOR_ARCH=architecture)
