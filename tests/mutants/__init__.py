"""Small faults that the tests have to catch: a survivor is a missing test. ``make mutants`` plants them one at a time.

The faults are declared in ``cpu.py``, ``glue.py``, ``cuda.py``, ``python.py`` and ``benchmark.py``; ``run.py`` plants
and reports.
"""

import dataclasses
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Fault:
    """``original``, which occurs once in the file, becomes ``planted``.

    ``tests`` are arguments of pytest below ``tests/``, the first to be tried; then come those of the file's area. They
    name what is meant to catch the fault, and save the time of finding it."""

    name: str
    kind: str
    path: str
    original: str
    planted: str
    tests: str

    def plant(self, root: Path) -> None:
        """Writes the file with the fault.

        Raises:
            ValueError: the original does not occur exactly once, or the fault changes nothing.
        """
        path = root / self.path
        text = path.read_text()
        if (found := text.count(self.original)) != 1 or self.planted == self.original:
            raise ValueError(f"{self.name}: expected its original once in {self.path}, found it {found} times")
        path.write_text(text.replace(self.original, self.planted))


def all_faults() -> list[Fault]:
    """By file, so that one compiles what the one before has changed."""
    from . import benchmark, cpu, cuda, glue, python

    faults = [fault for module in (cpu, glue, cuda, python, benchmark) for fault in module.FAULTS]
    names = {fault.name for fault in faults}
    if len(names) != len(faults):
        raise ValueError("two faults have the same name")
    return sorted(faults, key=lambda fault: fault.path)
