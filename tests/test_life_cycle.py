"""Threads, processes and interruptions: whatever happens in the middle of a call, the next one is right."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import CASES
from ranks import same_on_all_ranks
from threads import run_together

import normops
from normops._ops import _C

ROOT = Path(__file__).parent.parent
TORCH = torch.nn.functional
SHAPE = (8, 6, 40, 20)  # more than a thread's worth, so that calls are shared among threads


def samples(shape=SHAPE):
    """One call of each kind, its output's gradient, and what it results in."""
    for case in CASES:
        sample = case.sample(shape)
        grad = torch.randn(shape)
        yield sample, grad, sample.results(grad=grad)


def right(calls):
    return all(
        torch.equal(result, expected[name])
        for sample, grad, expected in calls
        for name, result in sample.results(grad=grad).items()
    )


def on_engines():
    with torch.profiler.profile() as profile:
        TORCH.layer_norm(torch.ones(2, 5), (5,))
    return any(event.name.startswith("normops::") for event in profile.events())


def run(code, *arguments, **environment):
    """Runs Python code in a process of its own, which has 60 seconds, with more in its environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.real_device
def test_threads_of_everything(threads):
    """Forward and backward of everything, while other threads switch acceleration and the number of threads."""
    calls = list(samples())
    plain = [sample.results(TORCH, grad=grad) for sample, grad, _ in calls]

    def ours():
        assert right(calls)

    def theirs():
        for (sample, grad, _), expected in zip(calls, plain, strict=True):
            for name, result in sample.results(TORCH, grad=grad).items():
                torch.testing.assert_close(result, expected[name], rtol=1e-3, atol=1e-3)

    def switch():
        with normops.accelerate():
            theirs()
        normops.accelerate(True)
        normops.accelerate(False)

    def resize():
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            ours()

    run_together(2, ours, ours, theirs, switch, switch, resize)
    assert not on_engines() and right(calls)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_after_use_by_threads(threads):
    """A child of a process in which several threads have computed does so as well, forward and backward."""
    threads(2)
    calls = list(samples((4, 6, 20, 20)))
    workers = [threading.Thread(target=right, args=(calls,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if (child := os.fork()) == 0:
        signal.alarm(30)  # kills it, should it wait for what is not there any more
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)  # as DataLoader's workers do: threads do not survive a fork
            normops.accelerate(True)
            os._exit(0 if right(calls) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert right(calls)


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ZeroDivisionError("told to the test")


def test_exception_in_a_backward():
    """Of a node between two layers: the first has no gradient, and the next backward is that of a new model."""
    torch.manual_seed(1)
    layers = [normops.BatchNorm2d(6), normops.GroupNorm(2, 6, activation="silu", memory_efficient=False)]
    x = torch.randn(4, 6, 5, 5, requires_grad=True)

    def gradients(between=lambda y: y):
        for leaf in (x, *layers[0].parameters(), *layers[1].parameters()):
            leaf.grad = None
        layers[1](between(layers[0](x))).square().sum().backward()
        return [leaf.grad.clone() for leaf in (x, *layers[0].parameters(), *layers[1].parameters())]

    expected = gradients()
    with pytest.raises(ZeroDivisionError):
        gradients(_Failing.apply)
    assert x.grad is None and layers[0].weight.grad is None and layers[1].weight.grad is not None
    assert all(map(torch.equal, gradients(), expected))


@contextlib.contextmanager
def alarms(handler):
    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupt(signum, frame):
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
@pytest.mark.filterwarnings("ignore:(?s).*KeyboardInterrupt:pytest.PytestUnraisableExceptionWarning")
def test_keyboard_interrupt():
    """Anywhere in forward, backward and acceleration: results are right afterwards, and the kernels torch's."""
    calls = list(samples((4, 6, 12, 12)))
    interrupted = 0
    with alarms(_interrupt):
        for i in range(300):
            with contextlib.suppress(KeyboardInterrupt):
                # From the length of a switch to that of some calls. Python drops what is raised in a finalizer, with
                # a warning, so once more after a second.
                signal.setitimer(signal.ITIMER_REAL, 3e-4 + 2e-5 * i, 1.0)
                try:
                    while True:
                        with normops.accelerate():
                            calls[i % len(calls)][0].results(TORCH, grad=calls[i % len(calls)][1])
                        right(calls[i % len(calls) :][:1])
                except KeyboardInterrupt:
                    interrupted += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert interrupted > 250
    assert not on_engines() and right(calls)


OUT_OF_MEMORY = """
import resource, torch
torch.set_num_threads(2)
from cases import CASES

def size():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

for case in CASES[::3]:
    failed = 0
    shape = (8, 8, 64, 64)  # 1 MiB
    sample, grad = case.sample(shape), torch.randn(shape)
    expected = sample.results(grad=grad)
    for step in range(1, 7):  # in each allocation, one after the other
        resource.setrlimit(resource.RLIMIT_AS, (size() + step * 2**20 - 2**18, resource.RLIM_INFINITY))
        try:
            sample.results(grad=grad)
        except (RuntimeError, MemoryError) as error:
            assert "memory" in str(error) or isinstance(error, MemoryError), error
            failed += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        results = sample.results(grad=grad)
        assert all(torch.equal(results[name], expected[name]) for name in expected), case.name
    assert failed, case.name
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_out_of_memory():
    """In each allocation of a forward and a backward: an error, and the next call is right."""
    result = run(OUT_OF_MEMORY, PYTHONPATH=f"{ROOT / 'tests'}:{ROOT}", MALLOC_MMAP_THRESHOLD_="65536")
    assert result.returncode == 0 and result.stdout == "done\n", result.stdout + result.stderr


AT_THE_END = """
import normops, os
import torch  # after it, for once
normops.accelerate(True)
layer = normops.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.LayerNorm(5)))
x = torch.randn(2, 4, 3, 5, requires_grad=True)
y = layer(x)
(gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
z = torch.nn.functional.layer_norm(x, (5,))

class Late:
    held = y, gradient, z
    call, ones = torch.ops.normops._row_norm.default, torch.ones(2, 5)

    def __del__(self):
        # Modules are being taken apart; tensors are still there, and operators work.
        right = self.call(self.ones, 1, None, None, 1e-5, True)[0].abs().max().item() == 0
        os.write(1, b"done" if right else b"wrong")

late = Late()
"""


def test_end_of_the_interpreter():
    """Graphs are alive, and a layer is called, while the interpreter ends under acceleration. Imported before torch."""
    result = run(AT_THE_END)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done", "")


TWO_COPIES = """
import sys, torch
sys.path[:0] = [sys.argv[1]]
import normops

def again(*path):
    sys.path[:0] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "normops"]:
        del sys.modules[name]
    import normops
    return normops

assert normops.__file__.startswith(sys.argv[1]) and normops._C.__file__.startswith(sys.argv[1])
other = again()
assert other is not normops and other.LayerNorm(3)(torch.randn(2, 3)).shape == (2, 3)
try:
    again(sys.argv[2])
except ImportError as error:
    print(error)
"""


def test_two_versions_on_the_path(tmp_path):
    """The first is taken, as a whole; the second, in the same process, is an error and not the end of it."""
    copy = tmp_path / "normops"
    shutil.copytree(ROOT / "normops", copy, ignore=shutil.ignore_patterns("__pycache__"))
    result = run(TWO_COPIES, tmp_path, ROOT)
    library = Path(_C.__file__).name
    assert result.stdout == (
        f"another copy of normops ({copy / library}) is in use in this process, not {ROOT / 'normops' / library}\n"
    ), result.stderr
    assert result.returncode == 0


three_ranks = pytest.mark.parametrize("ranks", [3], indirect=True, ids=["3 ranks"])


def network():
    torch.manual_seed(3)
    layers = torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.BatchNorm2d(6)
    return normops.SyncBatchNorm.convert_sync_batchnorm(torch.nn.Sequential(*layers))


def step(model, x):
    loss = model(x).square().mean()
    model.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.data -= 0.1 * parameter.grad


def late(rank, world_size):
    """A rank that does not come: the others end within the limit of their group."""
    import datetime

    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    model = normops.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm2d(6), group)

    y = model(torch.randn(4, 6, 5, 5, requires_grad=True))
    begin = time.monotonic()
    if rank < world_size - 1:
        with pytest.raises(RuntimeError):
            y.sum().backward()
        assert time.monotonic() - begin < 10
    else:
        time.sleep(3)


@three_ranks
def test_rank_that_is_late(ranks):
    ranks.run(late)


def killed(rank, world_size, checkpoint):
    """The last rank dies in the middle of the third step. The others go on from the second, without it."""
    model, group = network(), dist.group.WORLD
    inputs = torch.randn(4, 6, 3, 8, 8)
    for i in range(3):
        if rank == 0 and i == 2:
            torch.save(model.state_dict(), checkpoint)
        x = inputs[i, 2 * rank :][:2]
        if i < 2:
            step(model, x)
            continue
        y = model(x)
        if rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(RuntimeError):
            y.square().mean().backward()
    dist.destroy_process_group(group)
    dist.init_process_group("gloo", init_method=f"file://{checkpoint}.store", rank=rank, world_size=world_size - 1)
    model, alone = network(), network()
    for layers in (model, alone):
        layers.load_state_dict(torch.load(checkpoint))
    share = 6 // (world_size - 1)
    for i in (2, 3):
        step(model, inputs[i, share * rank :][:share])
    # With a rank of its own for each joined batch, the layers are BatchNorms of it.
    own = [dist.new_group([r]) for r in range(world_size - 1)][rank]
    normops.SyncBatchNorm.convert_sync_batchnorm(alone, own)
    alone[1].process_group = alone[3].process_group = own
    for i in (2, 3):
        # The mean over ranks of equal shares' means, times their number, is what `step` descends along.
        loss = (world_size - 1) * alone(inputs[i]).square().mean()
        alone.zero_grad()
        loss.backward()
        for parameter in alone.parameters():
            parameter.data -= 0.1 * parameter.grad
    torch.testing.assert_close(model.state_dict(), alone.state_dict())
    assert all(map(same_on_all_ranks, model.state_dict().values()))


@three_ranks
def test_killed_rank(ranks, tmp_path):
    """The others end with an error, and their next training, of fewer ranks, goes on from a checkpoint."""
    with pytest.raises(AssertionError) as failures:
        ranks.run(killed, tmp_path / "checkpoint")
    assert str(failures.value) == "rank 2: died"
