"""The regimes that calls are timed in: what the caches hold before a call, and where malloc gets its output from.

A regime of malloc belongs to a process (:mod:`bench.worker`); caches are a matter of what is done before each call.
"""

import ctypes
from dataclasses import dataclass

import torch

from bench.machine import MIB, last_level_cache, processors

CACHES = {
    "cold": "before each call a buffer of up to 64 MiB is rewritten, as other layers of a model would",
    "warm": "calls follow each other, so that what fits in a cache is there",
}
MALLOCS = {
    "default": "glibc's defaults: blocks above 32 MiB are mapped anew by each call, whose time includes clearing them",
    "recycled": "freed memory is kept, so an output lies in memory used before, as with an allocator that caches",
}
_MALLOC_LARGEST_THRESHOLD = 32 << 20
# What a model moves between two of its norms, or a little more. A last-level cache that many machines share may hold
# hundreds of mebibytes: what empties it of the tensors empties it of the code too, which no model does.
_BETWEEN_CALLS = 64 * MIB


@dataclass(frozen=True)
class Regime:
    caches: str
    malloc: str

    @property
    def name(self) -> str:
        return f"{self.caches} caches, {self.malloc} malloc"

    @property
    def slug(self) -> str:
        return f"{self.caches}_{self.malloc}"


HEADLINE = Regime("cold", "default")  # of a model


def set_malloc(malloc: str) -> None:
    """For the whole process, once: glibc has no way back.

    Raises:
        RuntimeError: malloc is not glibc's, and cannot be told to recycle.
    """
    if malloc == "recycled" and not _recycle_memory():
        raise RuntimeError("only glibc's malloc can be told to recycle: choose --malloc default")
    if malloc == "default":
        # glibc maps blocks above a threshold that rises, up to this size, with each such block that is freed. A process
        # that has run for a while has freed one.
        torch.empty(_MALLOC_LARGEST_THRESHOLD - (1 << 16), dtype=torch.uint8)


def can_recycle() -> bool:
    return _mallopt() is not None


def _mallopt():
    try:
        return getattr(ctypes.CDLL(None), "mallopt", None)
    except (OSError, TypeError):  # no such thing as the libraries of the process
        return None


def _recycle_memory() -> bool:
    # M_MMAP_THRESHOLD alone would not do: glibc caps it at 32 MiB.
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt = _mallopt()
    return mallopt is not None and mallopt(m_mmap_max, 0) == 1 and mallopt(m_trim_threshold, -1) == 1


class Flush:
    """Fills the caches of a device with something else."""

    def __init__(self, device: str):
        if device == "cuda":
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        else:
            size = min(2 * last_level_cache(processors()), _BETWEEN_CALLS)
        self._buffer = torch.zeros(size // 4, device=device)

    def __call__(self) -> None:
        # Read and written by all threads. A mere fill may go past the caches.
        self._buffer.add_(1)
