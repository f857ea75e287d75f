"""Registers, spills and shared memory of every CUDA kernel, as ptxas reported them when they were built.

``python tests/cuda/resources.py build`` compares them with the table beside this file and fails if a kernel
spills more than it says; ``--update`` writes the table anew.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).with_suffix(".txt")
FIELDS = ["registers", "spilled", "stack", "shared"]  # bytes, but for the registers

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def short(name):
    """``void normops::cuda::f<float, (normops::Layout)0, 4>(...)`` without what all have in common."""
    name = re.sub(r"^void |normops::cuda::|c10::", "", name).replace("(normops::Layout)0", "contiguous")
    name = re.sub(r"\(normops::Layout\)1", "channels_last", name)
    return re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)$", "", name).replace(", ", ",")


def resources(logs):
    """(kernel, architecture) -> its fields."""
    found, entry = {}, None
    for line in (line for log in logs for line in log.read_text().splitlines()):
        if match := ENTRY.search(line):
            entry = found.setdefault(match.groups(), dict.fromkeys(FIELDS, 0))
        elif match := FRAME.search(line):
            stack, stores, loads = map(int, match.groups())
            entry |= {"stack": stack, "spilled": stores + loads}
        elif match := USED.search(line):
            entry |= {"registers": int(match[1]), "shared": int(match[2] or 0)}
    names = subprocess.run(
        ["c++filt"], input="\n".join(k for k, _ in found), capture_output=True, text=True, check=True
    )
    demangled = map(short, names.stdout.splitlines())
    return {(name, arch): fields for name, (_, arch), fields in zip(demangled, found, found.values(), strict=True)}


def write(table):
    rows = [("kernel", "sm", *FIELDS)]
    rows += [(*key, *map(str, fields.values())) for key, fields in sorted(table.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    TABLE.write_text("\n".join(lines) + "\n")


def read():
    rows = [line.split() for line in TABLE.read_text().splitlines()[1:]]
    return {(name, arch): dict(zip(FIELDS, map(int, values), strict=True)) for name, arch, *values in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="the folder of all builds: the latest is taken")
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name} anew")
    arguments = parser.parse_args()
    folders = sorted(arguments.build.glob("*/cuda"), key=lambda folder: folder.stat().st_mtime)
    if not folders:
        sys.exit(f"no kernels were built in {arguments.build}")
    found = resources(sorted(folders[-1].glob("*.ptxas")))
    if arguments.update:
        write(found)
    known = read()
    problems = []
    for key, fields in found.items():
        allowed = known.get(key, {}).get("spilled", 0)
        if fields["spilled"] > allowed:
            problems.append(f"{key[0]} for sm_{key[1]} spills {fields['spilled']} bytes, {allowed} in the table")
    spilling = [key for key, fields in found.items() if fields["spilled"]]
    architectures = sorted({arch for _, arch in found}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    kernels, most = len({name for name, _ in found}), max(fields["registers"] for fields in found.values())
    where = ", ".join(f"sm_{arch}" for arch in architectures)
    print(f"{kernels} kernels for {where}: at most {most} registers, {len(spilling)} of {len(found)} spill")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
