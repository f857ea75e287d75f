"""A library made by ``build``: its settings and what it has counted."""

import contextlib
import ctypes
import dataclasses
import os


def _without_arguments(name):
    """The name of a kernel without template arguments, parameters and result."""
    depth, found = 0, ""
    for character in name.replace("(anonymous namespace)", "{anonymous}"):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            break
        if depth == 0 and character != ">":
            found += character
    return found.split(" ")[-1]


@dataclasses.dataclass
class Launches:
    """What was run of one instantiation of a kernel."""

    launches: int
    blocks: int
    threads: int
    barriers: int
    exchanges: int
    # Counted in the variant "counting" alone. Bytes of global memory that threads ask for; sectors of 32 bytes that the
    # accesses of a warp touch, and different ones of a launch; the most loads of one thread; accesses of warps to
    # shared memory, and the turns that these take more than they would in different banks.
    read: int
    written: int
    sectors_read: int
    sectors_written: int
    distinct_read: int
    distinct_written: int
    chain: int
    shared: int
    conflicts: int
    name: str

    @property
    def kernel(self):
        return _without_arguments(self.name)


class Library:
    def __init__(self, path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.normops_emulator_seed.argtypes = [ctypes.c_uint64]
        self.functions.normops_emulator_device.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self.functions.normops_emulator_dry.argtypes = [ctypes.c_bool]
        self.functions.normops_emulator_sample.argtypes = [ctypes.c_bool]
        self.functions.normops_emulator_report.restype = ctypes.c_char_p
        self.functions.normops_emulator_moved.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self.functions.normops_emulator_moved.restype = ctypes.c_char_p

    def seed(self, seed=None):
        """Sets the order in which threads and blocks run; 0 is that of their numbers, the default that of the start."""
        seed = int(os.environ.get("NORMOPS_EMULATOR_SEED", 1)) if seed is None else seed
        self.functions.normops_emulator_seed(seed)

    def device(self, architecture=None, multiprocessors=3):
        """Sets the device whose limits hold: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120; by default the first one."""
        architecture = architecture or os.environ.get("NORMOPS_EMULATOR_ARCH", "sm_90")
        self.functions.normops_emulator_device(architecture.encode(), multiprocessors)

    def report(self):
        """What was run, instantiation by instantiation."""
        lines = self.functions.normops_emulator_report().decode().splitlines()
        numbers = len(dataclasses.fields(Launches)) - 1
        split = (line.split(" ", numbers) for line in lines)
        return [Launches(*map(int, fields[:numbers]), fields[numbers]) for fields in split]

    def moved(self, tensor):
        """Kernel -> bytes that it read and wrote of a tensor since the last ``clear``; in the variant "counting"."""
        size = tensor.numel() * tensor.element_size()
        found = {}
        for line in self.functions.normops_emulator_moved(tensor.data_ptr(), size).decode().splitlines():
            read, written, name = line.split(" ", 2)
            kernel = _without_arguments(name)
            before = found.get(kernel, (0, 0))
            found[kernel] = (before[0] + int(read), before[1] + int(written))
        return found

    def clear(self):
        """Counts begin at 0 again."""
        self.functions.normops_emulator_clear()

    def dry(self):
        """Within, launches are checked and counted, and nothing is run: outputs are left as they were allocated."""
        return _on(self.functions.normops_emulator_dry)

    def sampled(self):
        """Within, one block (or cluster) of a launch is run, and counted for all: outputs mean nothing."""
        return _on(self.functions.normops_emulator_sample)


@contextlib.contextmanager
def _on(switch):
    switch(True)
    try:
        yield
    finally:
        switch(False)
