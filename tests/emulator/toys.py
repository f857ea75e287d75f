"""Runs the toy kernels of ``toys.cu``. Without torch, so that sanitizers can be loaded first:

LD_PRELOAD=libasan.so python -m emulator.toys LIBRARY TOY...
"""

import ctypes
import sys

from emulator.library import Library

N = 96  # elements of a row


class Toys(Library):
    def __init__(self, path):
        super().__init__(path)
        self.functions.run_toy.restype = ctypes.c_char_p

    def run(self, name, rows=1, outputs=320, input=None):
        """What the toy makes of 1, 2, 3, ...; raises RuntimeError if the emulator stops it."""
        x = (ctypes.c_float * (rows * N))(*(input or range(1, rows * N + 1)))
        y = (ctypes.c_float * max(outputs, rows * N))()
        error = self.functions.run_toy(name.encode(), x, y, ctypes.c_int64(N))
        if error:
            raise RuntimeError(error.decode())
        return list(y)


if __name__ == "__main__":
    toys = Toys(sys.argv[1])
    for toy in sys.argv[2:]:
        print(toy, toys.run(toy, rows=3 if toy.startswith("center") else 1)[:8])
