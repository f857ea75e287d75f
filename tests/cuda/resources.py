"""Registers, spills and shared memory of every CUDA kernel, and what its machine code says of its speed (sass.py).

``python tests/cuda/resources.py build`` compares them with the table beside this file and fails, naming the kernel, if
one got worse, or is not as good as all have to be; ``--update`` writes anew what the table has of the architectures
that were compiled.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import sass

TABLE = Path(__file__).with_suffix(".txt")
TRAFFIC = TABLE.with_name("traffic.txt")  # which tests/emulator/traffic_table.py writes
FIELDS = ["registers", "spilled", "stack", "shared"]  # bytes, but for the registers
READ = ["80", "90", "100"]  # architectures whose machine code is read

# What is worse: less or more of it, and by which factor before it counts.
LESS = {"blocks": 1, "flight": 1}
MORE = {"spilled": 1, "waits": 1, "narrow": 1, "divisions": 1, "fp64": 1, "instructions": 1.05}

# What is asked of all kernels that move vectors: loads under way, fewer of which leave memory idle; and, of a warp,
# instructions for a vector, more of which take longer than its bytes.
FLIGHT, FLIGHT_OF_ROWS, INSTRUCTIONS = 4, 8, 90
ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def short(name):
    """``void normops::cuda::f<float, (normops::Layout)0, 4>(...)`` without what all have in common."""
    name = re.sub(r"^void |normops::cuda::|c10::", "", name).replace("(normops::Layout)0", "contiguous")
    name = re.sub(r"\(normops::Layout\)1", "channels_last", name)
    for number, place in enumerate(("block", "shared", "cluster")):
        name = name.replace(f"(RowPlace){number}", place)
    return re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)$", "", name).replace(", ", ",")


def passes():
    """Kernel -> (reads, writes, reads of what a kernel before it has read), in sizes of the input; without merges."""
    _, *lines = TRAFFIC.read_text().splitlines()
    found = {name: tuple(map(float, figures)) for name, *figures in map(str.split, lines)}
    return {name: figures for name, figures in found.items() if figures[0]}


def parts(name):
    """The kernel, and its template arguments."""
    kernel, _, rest = name.partition("_kernel")
    return kernel, rest.strip("<>").split(",")


def vector_size(kernel, arguments):
    """Elements of its vectors."""
    return int(arguments[1 if kernel.startswith(("slab", "long", "wide")) else 2])


def vectors_of_thread(kernel, arguments):
    """Vectors of each tensor that the listed instructions handle: an unrolled loop over memory."""
    if kernel.startswith(("slab", "wide")):
        return int(arguments[2])
    if kernel.startswith("row"):
        if kernel == "row_forward" and arguments[3:6] == ["8", "true", "false"]:  # of two rows
            return 16
        several = {"row_forward": 8, "row_backward": 4}[kernel]  # in short rows, of several
        return max(int(arguments[3]), several if arguments[2] != "1" else 0)
    return 16


def fused(kernel, arguments):
    """Whether it is a variant with an epilogue, whose vectors take turns in a loop."""
    return arguments[3 if kernel.startswith("slab") else -1] == "true"


def shortcomings(found):
    """Where kernels are not what all have to be, a sentence for each."""
    tensors = passes()
    for (name, arch), fields in found.items():
        kernel, arguments = parts(name)
        most = {"spilled": 0, "divisions": 0}
        least = {}
        if kernel in tensors and vector_size(kernel, arguments) > 1:
            least["flight"] = FLIGHT_OF_ROWS if kernel.startswith(("row", "moments")) else FLIGHT
            vectors = vectors_of_thread(kernel, arguments)
            if kernel in ("moments", "apply", "long_row_forward"):
                most["path"] = INSTRUCTIONS * vectors
            if not fused(kernel, arguments):  # as many as vectors: none of them is taken in parts
                least["wide"] = int(sum(tensors[kernel][:2])) * vectors
        for field, limit in most.items():
            if fields.get(field, 0) > limit:
                yield f"{name} for sm_{arch}: {field} {fields[field]}, {limit} at most"
        for field, limit in least.items():
            if fields.get(field, limit) < limit:
                yield f"{name} for sm_{arch}: {field} {fields[field]}, {limit} at least"


def resources(logs):
    """(mangled kernel, architecture) -> its fields, as ptxas reported them."""
    found, entry = {}, None
    for line in (line for log in logs for line in log.read_text().splitlines()):
        if match := ENTRY.search(line):
            entry = found.setdefault(match.groups(), dict.fromkeys(FIELDS, 0))
        elif match := FRAME.search(line):
            stack, stores, loads = map(int, match.groups())
            entry |= {"stack": stack, "spilled": stores + loads}
        elif match := USED.search(line):
            entry |= {"registers": int(match[1]), "shared": int(match[2] or 0)}
    return found


def add_machine_code(found, tool, objects):
    for path in objects:
        figures, threads = sass.read(tool, path)
        for key, of_kernel in figures.items():
            if key in found and key[1] in READ:
                blocks = sass.blocks(key[1], threads.get(key, 1024), found[key]["registers"])
                found[key] |= {"blocks": blocks, **of_kernel}


def readable(found):
    names = subprocess.run(
        ["c++filt"], input="\n".join(k for k, _ in found), capture_output=True, text=True, check=True
    )
    demangled = map(short, names.stdout.splitlines())
    return {(name, arch): fields for name, (_, arch), fields in zip(demangled, found, found.values(), strict=True)}


def write(table, path):
    fields = [*FIELDS, *sass.FIELDS]
    rows = [("kernel", "sm", *fields)]
    rows += [(*key, *(str(values.get(field, "-")) for field in fields)) for key, values in sorted(table.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    path.write_text("\n".join(lines) + "\n")


def read():
    head, *rows = (line.split() for line in TABLE.read_text().splitlines())
    return {
        (name, arch): {field: int(value) for field, value in zip(head[2:], values, strict=True) if value != "-"}
        for name, arch, *values in rows
    }


def problems(found, known):
    """What got worse, a sentence for each."""
    for key, fields in found.items():
        before = known.get(key, {"spilled": 0, "divisions": 0})
        for field, factor in (LESS | MORE).items():
            if field not in fields or field not in before:
                continue
            now, then = fields[field], before[field]
            if now < then if field in LESS else now > then * factor:
                yield f"{key[0]} for sm_{key[1]}: {field} {now}, {then} in the table"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="the folder of all builds: the latest is taken")
    parser.add_argument("--update", action="store_true", help=f"write their rows of {TABLE.name} anew")
    arguments = parser.parse_args()
    folders = sorted(arguments.build.glob("*/cuda"), key=lambda folder: folder.stat().st_mtime)
    if not folders:
        sys.exit(f"no kernels were built in {arguments.build}")
    found = resources(sorted(folders[-1].glob("*.ptxas")))
    if tool := sass.cuobjdump():
        add_machine_code(found, tool, sorted(folders[-1].glob("*.o")))
    else:
        print("cuobjdump, which comes with CUDA's toolkit and with Triton, is missing: machine code is not read")
    found = readable(found)
    compiled = {arch for _, arch in found}
    if arguments.update:
        others = {key: fields for key, fields in read().items() if key[1] not in compiled}
        write(others | found, TABLE)
    worse, short_of = list(problems(found, read())), list(shortcomings(found))
    spilling = [key for key, fields in found.items() if fields["spilled"]]
    architectures = sorted(compiled, key=lambda arch: int(re.sub(r"\D", "", arch)))
    kernels, most = len({name for name, _ in found}), max(fields["registers"] for fields in found.values())
    where = ", ".join(f"sm_{arch}" for arch in architectures)
    print(f"{kernels} kernels for {where}: at most {most} registers, {len(spilling)} of {len(found)} spill")
    if worse:
        worse.append(f"if that is as it should be: {Path(__file__).name} --update")
    if worse or short_of:
        sys.exit("\n".join([*short_of, *worse]))


if __name__ == "__main__":
    main()
