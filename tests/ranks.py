"""A few processes that are the ranks of a gloo group, kept for many tests, and a time limit so that a hang fails."""

import datetime
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Longer than any test takes, the start of the processes included.
LIMIT = 60.0
# For the others, once a rank has failed: they may be waiting for it.
GRACE = 5.0


def _serve(rank, world_size, path, connection):
    """Runs what comes down the connection, and sends back the traceback or None."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size, timeout=limit)
    while (task := connection.recv()) is not None:
        function, args = task
        torch.manual_seed(0)
        try:
            function(rank, world_size, *args)
            connection.send(None)
        except BaseException:  # pytest's own failures are not Exceptions
            connection.send(traceback.format_exc())


class Ranks:
    """``run(function, *args)`` calls ``function(rank, world_size, *args)`` on every rank."""

    def __init__(self, world_size):
        self.world_size = world_size
        self._processes = []

    def _start(self):
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        pairs = [context.Pipe() for _ in range(self.world_size)]
        self._connections = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(
                target=_serve, args=(rank, self.world_size, Path(self._folder.name) / "store", theirs), daemon=True
            )
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def run(self, function, *args):
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        deadline = time.monotonic() + LIMIT
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        failures = []
        while waiting and (ready := wait(waiting, max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    failure = connection.recv()
                except EOFError:
                    failure = "died"
                if failure is not None:
                    failures.append(f"rank {rank}: {failure}")
                    deadline = min(deadline, time.monotonic() + GRACE)
        failures += [f"rank {rank} did not answer in time" for rank in waiting.values()]
        if failures:
            # What the group would do next is anyone's guess.
            self.stop()
            raise AssertionError("\n".join(failures))

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes = []


# For what does not depend on their number.
two_ranks = pytest.mark.parametrize("ranks", [2], indirect=True, ids=["2 ranks"])
# Samples on each rank: unequal, and none.
BATCHES = {2: [(4, 4), (1, 6), (5, 0)], 3: [(3, 3, 3), (1, 2, 5), (4, 0, 3)]}


def share(tensor, rank, sizes):
    return tensor.split(sizes)[rank].clone()


def summed(tensor):
    total = tensor.to(torch.float64, copy=True)
    dist.all_reduce(total)
    return total


def same_on_all_ranks(tensor):
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return all(torch.equal(other, tensor) for other in gathered)
