"""What is to be made of what, written down for ninja, which makes what is out of date on all cores."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def _escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Ninja:
    """The build.ninja of ``folder``: rules, which are commands, and what is made by them."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self._lines = []

    def rule(self, name, command, description):
        """``command``, for the shell, makes $out of $in and leaves the names of the headers it read in $out.d."""
        self._lines += [f"rule {name}", f"  command = {command}", f"  description = {description}"]
        self._lines += ["  depfile = $out.d", "  deps = gcc"]

    def make(self, target, rule, source, needs=(), **variables):
        """Has ``rule`` make ``target``, a path below the folder, of ``source``, when ``needs`` are there.

        ``variables`` are what the rule's command calls $name. Returns the path of the target."""
        line = f"build {_escape(target)}: {rule} {_escape(source)}"
        if needs:
            line += f" | {' '.join(map(_escape, needs))}"
        self._lines += [line, *(f"  {name} = {value}" for name, value in variables.items())]
        return str(self.folder / target)

    def run(self):
        """Makes everything; what the compilers complain of is shown, and their failure is the end of the build."""
        write(self.folder / "build.ninja", "\n".join(self._lines) + "\n")
        # Always the same one, if it can be: another version would start from scratch.
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []  # as for all extensions of torch
        environment = {"NINJA_STATUS": "normops: %f of %t, %e s: ", **os.environ}
        if subprocess.run([*ninja, "-C", str(self.folder), *jobs], env=environment).returncode:
            raise SystemExit("normops was not built: the compiler's message is above")


def write(path, text):
    """A file with this text, untouched if it has it already: what is made of it is then still good."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
