"""Processes that measure: one for each regime of malloc, which cannot be changed once chosen."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from multiprocessing import get_context

import torch

from bench.disturbance import Watch
from bench.regimes import Flush, set_malloc


class Station:
    """What measurements in this process share."""

    def __init__(self):
        self.watch = Watch()
        self._flushes: dict[str, Flush] = {}

    def flush(self, device: str) -> Flush:
        if device not in self._flushes:
            self._flushes[device] = Flush(device)
        return self._flushes[device]


_station: Station | None = None


def station() -> Station:
    global _station
    if _station is None:
        _station = Station()
    return _station


def _prepare(malloc: str, threads: int) -> None:
    set_malloc(malloc)
    torch.set_num_threads(threads)
    torch.manual_seed(0)


class Worker:
    """A process with one regime of malloc, which runs one function at a time and sleeps in between."""

    def __init__(self, malloc: str, threads: int):
        self.malloc, self._threads = malloc, threads

    @cached_property
    def _executor(self) -> ProcessPoolExecutor:
        arguments = self.malloc, self._threads
        return ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=arguments)

    def run(self, function: Callable, *arguments):
        """`function(*arguments)`, which have to be picklable, in the process.

        Raises:
            RuntimeError: the process has died, most likely because memory ran out.
        """
        try:
            return self._executor.submit(function, *arguments).result()
        except BrokenProcessPool:
            del self._executor  # the next call starts a new process
            raise RuntimeError(f"the process with {self.malloc} malloc has died (out of memory?)") from None

    def close(self) -> None:
        if "_executor" in self.__dict__:
            self._executor.shutdown()
