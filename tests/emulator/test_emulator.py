"""The emulator on toy kernels: those that are right give the right values, and each mistake is found and named."""

import math
import re

import pytest

from emulator.build import HERE, build
from emulator.sanitizers import run_python
from emulator.toys import N, Toys

SOURCE = HERE / "toys.cu"
RIGHT = [
    "center",
    "center_double",
    "exchanges",
    "last_block",
    "whole_grid",
    "whole_cluster",
    "early_return",
    "warp_barrier",
    "mask_of_returned_lanes",
]


@pytest.fixture(scope="module", params=["plain", "ucontext"])
def library(request):
    return Toys(build("toys", [SOURCE], variant=request.param))


@pytest.fixture
def toys(library):
    """On an sm_90 and in the order of the start, which a test may change for itself."""
    library.device("sm_90")
    yield library
    library.seed()
    library.device()


def line_of(code, nth=0):
    """Where ``code`` is in the source, as messages have it."""
    lines = [number for number, line in enumerate(SOURCE.read_text().splitlines(), 1) if code in line]
    return f"toys.cu:{lines[nth]}"


def line_in(toy, code):
    """The same for the first line with ``code`` in a kernel."""
    text = SOURCE.read_text()
    start = text.index(code, text.index(f"__global__ void {toy}("))
    return f"toys.cu:{text.count(chr(10), 0, start) + 1}"


def message(toys, toy):
    with pytest.raises(RuntimeError) as error:
        toys.run(toy)
    return str(error.value)


# ---- Kernels that are right ----


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("toy", ["center", "center_double"])
def test_barriers_and_shared_memory(toys, toy, seed):
    toys.seed(seed)
    assert toys.run(toy, rows=3)[: 3 * N] == [i - (N - 1) / 2 for i in range(N)] * 3


def test_exchanges(toys):
    # The rules are those of CUDA's programming guide; lane i brings i + 1.
    lanes = range(32)
    expected = [
        [6 for _ in lanes],
        [(i & -8 | (i + 1) % 8) + 1 for i in lanes],
        [(i - 3 if i >= 3 else i) + 1 for i in lanes],
        [(i - 1 if i % 4 >= 1 else i) + 1 for i in lanes],
        [(i + 2 if i + 2 < 32 else i) + 1 for i in lanes],
        [(i + 2 if i % 16 + 2 < 16 else i) + 1 for i in lanes],
        [(i ^ 17) + 1 for i in lanes],
        [(i - 4 if i & 4 else i) + 1 for i in lanes],  # a later group cannot be read, an earlier one can
        [22 for _ in lanes],
        [2 if i < 16 else (i ^ 15) + 1 for i in lanes],
    ]
    result = toys.run("exchanges")
    assert [result[32 * row : 32 * row + 32] for row in range(len(expected))] == expected


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("toy, copies", [("last_block", 1), ("whole_grid", 5), ("whole_cluster", 4)])
def test_blocks_together_in_any_order(toys, toy, copies, seed):
    toys.seed(seed)
    result = toys.run(toy)
    assert result[:copies] == [N * (N + 1) / 2] * copies
    assert toy != "last_block" or result[1] == 0, "the counter is back at 0"


def test_returned_threads_are_not_waited_for(toys):
    # As the programming guide has it since compute capability 7.0, for blocks and for warps.
    assert toys.run("early_return")[:40] == list(range(39, -1, -1))
    assert toys.run("mask_of_returned_lanes")[:16] == [1] * 16


def test_report(toys):
    toys.run("center", rows=3)
    before = {launches.name: launches for launches in toys.report()}
    toys.run("center", rows=3)
    toys.run("center_double", rows=3)
    after = {launches.name: launches for launches in toys.report()}
    name = "void toys::center<float>(float const*, float*, long)"
    assert after[name].kernel == "toys::center"
    assert after[name].launches == before[name].launches + 1
    assert after[name].blocks == before[name].blocks + 3
    assert after[name].threads == before[name].threads + 3 * 64
    assert after[name].barriers == before[name].barriers + 3 * 3
    assert after[name].exchanges == before[name].exchanges + 3 * (2 * 5 + 5)
    assert {launches.kernel for launches in after.values() if "center" in launches.name} == {"toys::center"}
    assert "void toys::center<double>(float const*, float*, long)" in after


def test_a_dry_launch_runs_nothing(toys):
    toys.clear()
    with toys.dry():
        assert not any(toys.run("center", rows=3))
        assert "has 232448" in message(toys, "ask_for_228_kib")
    (counts,) = toys.report()
    assert (counts.launches, counts.blocks, counts.threads, counts.barriers) == (1, 3, 3 * 64, 0)


def test_traffic():
    """One of two numbers out of whole sectors; a column of shared memory, of which a bank gives one word at a time."""
    toys = Toys(build("toys", [SOURCE], variant="counting"))
    assert toys.run("every_other")[:32] == list(range(1, 64, 2))
    counts = {launches.kernel: launches for launches in toys.report()}["toys::every_other"]
    assert (counts.read, counts.written) == (4 * 32, 4 * 32)
    assert counts.sectors_read == counts.distinct_read and counts.sectors_read in (8, 9)  # as x lies in memory
    assert counts.sectors_written in (4, 5)
    assert counts.chain == 1
    assert (counts.shared, counts.conflicts) == (2, 2 * 31)


# ---- Barriers ----


def test_divergent_barrier(toys):
    toys.seed(0)
    assert message(toys, "divergent_barrier") == (
        "emulated CUDA: threads wait at different barriers in toys::divergent_barrier(float*), "
        f"launched at {line_of('TOY(divergent_barrier')}\n"
        "  block (0, 0, 0):\n"
        f"    threads 0-23 wait in __syncthreads at {line_in('divergent_barrier', '__syncthreads')}\n"
        f"    threads 24-63 wait in __syncthreads at {line_in('divergent_barrier', 'else')[:-3]}"
        f"{int(line_in('divergent_barrier', 'else')[-3:]) + 1}"
    )


def test_deadlock(toys):
    text = message(toys, "barrier_in_one_branch")
    assert text.startswith("emulated CUDA: deadlock in toys::barrier_in_one_branch(float*)")
    barrier = line_in("barrier_in_one_branch", "__syncthreads")
    exchange = line_in("barrier_in_one_branch", "__shfl")
    assert f"threads 0-7, 32-39 wait in __syncthreads at {barrier}" in text
    assert f"threads 8-31, 40-63 wait in __shfl_xor_sync at {exchange}, mask 0xffffffff" in text
    assert toys.run("early_return")[0] == 39, "the next launch is none the worse"


def test_deadlock_of_a_grid(toys):
    text = message(toys, "grid_barrier_left_out")
    where = line_in("grid_barrier_left_out", "grid_sync")
    assert f"block (0, 0, 0):\n    threads 0-31 wait in grid_sync at {where}" in text
    assert "block (1, 0, 0)" not in text, "that one has returned"
    assert "block (2, 0, 0)" in text


def test_endless_loop(toys):
    assert "threads spin and none gets on in toys::spins" in message(toys, "spins")


def test_grid_barrier_needs_a_cooperative_launch(toys):
    assert "in a grid that is not cooperative" in message(toys, "grid_sync_alone")


# ---- Warps ----


def test_shuffles_that_do_not_meet(toys):
    text = message(toys, "different_shuffles")
    assert "deadlock" in text
    assert f"threads 0-15 wait in __shfl_xor_sync at {line_in('different_shuffles', '1.f, 1')}" in text
    assert f"threads 16-31 wait in __shfl_xor_sync at {line_in('different_shuffles', '1.f, 2')}" in text


@pytest.mark.parametrize(
    "toy, what",
    [
        ("mask_without_caller", "mask 0xff lacks the caller"),
        ("reads_lane_outside_mask", "reads lane 20, which is not in mask 0xffff"),
        ("reads_returned_lane", "reads lane 16, which has returned or never was"),
    ],
)
def test_masks(toys, toy, what):
    text = message(toys, toy)
    assert what in text and line_in(toy, "__shfl") in text and re.search(r"thread \(\d+, 0, 0\)", text)


# ---- Memory ----


@pytest.mark.parametrize("toy", ["misaligned_load", "misaligned_store"])
def test_misaligned_vectors(toys, toy):
    text = message(toys, toy)
    assert f"at {line_in(toy, 'reinterpret_cast')}" in text
    assert re.search(r"misaligned access to '(const )?struct uint4'.* is not a multiple of 16", text)


def test_null_pointer(toys):
    assert f"null pointer to 'const float' at {line_in('null_pointer', 'y[0]')}" in message(toys, "null_pointer")


@pytest.mark.parametrize(
    "toy, index, array", [("static_index", 32, "float [32]"), ("register_overrun", 4, "float [4]")]
)
def test_index_outside_of_an_array(toys, toy, index, array):
    assert f"index {index} is outside of '{array}' at toys.cu" in message(toys, toy)


@pytest.mark.parametrize("toy, array", [("static_overrun", "tile"), ("dynamic_overrun", "dynamic shared memory")])
def test_writes_beyond_shared_memory(toys, toy, array):
    assert f"written outside of {array} (128 bytes) in toys::{toy}" in message(toys, toy)


def test_uninitialised_shared_memory(toys):
    result = toys.run("uninitialised")[:32]
    assert result[1::2] == [1] * 16
    assert all(math.isnan(value) for value in result[::2])
    assert toys.run("uninitialised_dynamic")[:32] == [-1] * 32, "integers have all bits set"


def test_memory_of_a_block_that_has_returned(toys):
    text = message(toys, "leaves_cluster")
    assert f"map_shared at {line_in('leaves_cluster', 'map_shared')}: the block of rank 0 has returned" in text


def test_memory_that_is_not_shared(toys):
    assert "the pointer is not into shared memory of this block" in message(toys, "maps_foreign_memory")


# ---- Order ----


@pytest.mark.parametrize("toy, right", [("missing_barrier", range(63, -1, -1)), ("missing_second_barrier", None)])
def test_missing_barrier_shows_in_every_order(toys, toy, right):
    right = list(right or [*range(63, -1, -1), *range(163, 99, -1)])
    results = []
    for seed in range(1, 20):
        toys.seed(seed)
        results.append(toys.run(toy)[: len(right)])
        assert results[-1] != right
    assert len({str(result) for result in results}) == len(results), "every seed gives an order of its own"


def test_seed_from_the_environment():
    def output(seed):
        return run_toys("plain", "missing_barrier", NORMOPS_EMULATOR_SEED=str(seed)).stdout

    assert output(5) == output(5) != output(6)


# ---- Limits ----


@pytest.mark.parametrize(
    "toy, what",
    [
        ("many_threads", "the number of threads per block is 1056, sm_90 takes 1 to 1024"),
        ("deep_block", "blockDim.z is 65, sm_90 takes 1 to 64"),
        ("empty_block", "blockDim.x is 0, sm_90 takes 1 to 1024"),
        ("empty_grid", "gridDim.x is 0, sm_90 takes 1 to 2147483647"),
        ("tall_grid", "gridDim.y is 65536, sm_90 takes 1 to 65535"),
        ("unasked_shared_memory", "49153 bytes of dynamic shared memory, the kernel may use 49152"),
        ("much_static_memory", f"tile at {line_of('12289')}, the limit is 49152"),
        ("static_and_dynamic", "53248 bytes of shared memory, static and dynamic"),
        ("cluster_of_nine", "the cluster's size is 9, sm_90 takes 1 to 8"),
        ("cluster_that_does_not_divide", "gridDim.x is 5, not a multiple of the cluster's size, 2"),
        ("large_cooperative_grid", "the number of blocks of a cooperative grid is 7, sm_90 takes 1 to 6"),
    ],
)
def test_limits_of_a_launch(toys, toy, what):
    text = message(toys, toy)
    assert what in text and re.search(r"launched at toys\.cu:\d+", text)


def test_limits_of_the_architecture(toys):
    toys.device("sm_80")
    assert "asks for 167936 bytes of shared memory, sm_80 has 166912" in message(toys, "ask_for_164_kib")
    assert "the cluster's size is 2, sm_80 takes 1 to 1" in message(toys, "cluster_of_two")
    toys.device("sm_90")
    toys.run("ask_for_164_kib")
    toys.run("cluster_of_two")
    assert "asks for 233472 bytes of shared memory, sm_90 has 232448" in message(toys, "ask_for_228_kib")


# ---- Sanitizers, in a process of their own ----


def run_toys(variant, *toys, **environment):
    path = build("toys", [SOURCE], variant=variant)
    return run_python(variant, "-m", "emulator.toys", str(path), *toys, **environment)


def test_address_sanitizer_finds_nothing_in_what_is_right():
    done = run_toys("asan", *RIGHT)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("\n") == len(RIGHT)


@pytest.mark.parametrize(
    "toy, what, code",
    [
        ("global_overrun", "READ of size 4", "x[i]"),
        ("static_overrun", "WRITE of size 4", "= 1"),
        ("dynamic_overrun", "WRITE of size 4", "= 1"),
    ],
)
def test_address_sanitizer(toy, what, code):
    done = run_toys("asan", toy)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and what in done.stderr
    assert re.search(rf"#0 .* in toys::{toy}\(.*{line_in(toy, code)}", done.stderr), done.stderr


def test_errors_pass_through_address_sanitizer():
    done = run_toys("asan", "divergent_barrier")
    assert "RuntimeError: emulated CUDA: threads wait at different barriers" in done.stderr
    assert "AddressSanitizer" not in done.stderr


def test_thread_sanitizer_finds_nothing_in_what_is_right():
    done = run_toys("tsan", *RIGHT)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("\n") == len(RIGHT)


@pytest.mark.parametrize(
    "toy, code",
    [
        ("missing_barrier", "tile[63"),
        ("missing_second_barrier", "tile[63"),
        ("shuffle_for_barrier", "tile[31"),
        ("blocks_race", "y["),
    ],
)
def test_thread_sanitizer(toy, code):
    done = run_toys("tsan", toy)
    assert done.returncode == 66
    assert "ThreadSanitizer: data race" in done.stderr
    assert re.search(rf"#0 toys::{toy}\(.*{line_in(toy, code)}", done.stderr), done.stderr
