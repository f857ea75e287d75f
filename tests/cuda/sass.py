"""What the machine code of a kernel says of its speed, read from ``cuobjdump -sass`` without a card.

Nothing is run: instructions are taken in the order they are listed in, so a loop counts once and a branch as if it were
taken both ways, but for ``path`` and ``loop``. The figures compare a kernel with itself, and with what memory needs to
be kept busy.
"""

import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

# blocks: of those threads that the kernel is compiled for, what a multiprocessor holds (65,536 registers; its shared
# memory is not counted).
# flight: global loads that are under way at once, at most. waits: how often a thread waits for one, given that all that
# were under way arrive with it.
# wide, narrow: global loads and stores of 16 bytes, and of less.
# instructions: all of them. path: those of one way through the kernel, on which no branch skips anything but what leads
# to a routine of the compiler; loop: those of them in the longest loop that loads 16 bytes.
# divisions: of 64-bit integers. fp64: double arithmetic, and conversions from and to it.
FIELDS = ["blocks", "flight", "waits", "wide", "narrow", "instructions", "path", "loop", "divisions", "fp64"]

REGISTERS, THREADS = 65536, {"80": 2048, "86": 1536, "89": 1536, "90": 2048, "100": 2048, "120": 1536}
KERNEL, LINE = re.compile(r"Function : (\S+)"), re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.+?)\s*;")
# Of global memory: what is said to be, and what is not but 16 bytes, which nobody reads from other blocks of a cluster.
LOADS, STORES = ("LDG", "LD.E.128"), ("STG", "ST.E.128")
REGISTER = re.compile(r"\bR(\d+)\b(\.64)?")


def cuobjdump():
    """The path of the tool: of the toolkit, or out of Triton's wheel; None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if found := shutil.which(
        "cuobjdump", path=os.pathsep.join([*(f"{h}/bin" for h in homes if h), os.environ["PATH"]])
    ):
        return found
    try:
        import triton
    except ImportError:
        return None
    found = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(found) if found.exists() else None


def _operation(instruction):
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def _width(operation):
    return 4 if ".128" in operation else 2 if ".64" in operation else 1


def _registers(text, double):
    """The registers that are named; those that come in pairs with their second."""
    found = set()
    for number, pair in REGISTER.findall(text):
        found |= {int(number), int(number) + 1} if pair or double else {int(number)}
    return found


def loads(instructions):
    """(most under way, waits): a load is under way until a register it writes is read or written."""
    most, waits, under_way, arrived = 0, 0, [], -1
    for number, instruction in enumerate(instructions):
        operation = _operation(instruction)
        operands = instruction.partition(operation)[2]
        target, _, sources = operands.partition(",")
        if operation.startswith("ST"):
            target, sources = "", operands
        read = _registers(sources, double=operation.startswith(("DADD", "DMUL", "DFMA", "DSETP", "F2F.F32.F64")))
        if operation.startswith("ST") and (data := REGISTER.findall(operands)):
            read |= {int(data[-1][0]) + i for i in range(_width(operation))}
        written = {first + i for first in _registers(target, False) for i in range(_width(operation))}
        needed = [issued for issued, registers in under_way if registers & (read | written)]
        if needed and needed[-1] > arrived:
            waits, arrived = waits + 1, number
        under_way = [(issued, registers) for issued, registers in under_way if issued not in needed]
        if operation.startswith(LOADS) and written:
            under_way.append((number, written))
            most = max(most, len(under_way))
    return most, waits


def _target(instruction, places):
    """Where a branch goes, as the number of an instruction; None for other instructions."""
    match = re.search(r"\bBRA(?:\.\w+)* (?:!?U?P\d, )?0x([0-9a-f]+)", instruction)
    return places.get(int(match[1], 16)) if match else None


def path(listed):
    """Numbers of the instructions of one way through."""
    places = {address: number for number, (address, _) in enumerate(listed)}
    number, way = 0, []
    while number < len(listed):
        instruction = listed[number][1]
        way.append(number)
        target = _target(instruction, places)
        conditional = instruction.startswith("@") or re.search(r"\bBRA\S* !?UP\d, ", instruction)
        if _operation(instruction).startswith("EXIT") and not conditional:
            break
        number += 1
        if target is not None and target >= number:
            behind = [_operation(other) for _, other in listed[number : min(target, number + 8)]]
            if not conditional or any(operation.startswith("CALL") for operation in behind):
                number = target
    return way


def longest_loop(listed):
    """The first and the last number of the longest stretch that is repeated and loads 16 bytes, or None."""
    places, longest = {address: number for number, (address, _) in enumerate(listed)}, None
    for number, (_, instruction) in enumerate(listed):
        target = _target(instruction, places)
        if target is None or target >= number or (longest and number - target <= longest[1] - longest[0]):
            continue
        if any(re.search(r"\bLDG?\.\S*128", other) for _, other in listed[target:number]):
            longest = target, number
    return longest


def figures(listed):
    instructions = [instruction for _, instruction in listed if not instruction.startswith("NOP")]
    way, loop = path(listed), longest_loop(listed)
    operations = list(map(_operation, instructions))
    memory = [operation for operation in operations if operation.startswith((*LOADS, *STORES))]
    wide = sum(".128" in operation for operation in memory)
    double = ("DADD", "DMUL", "DFMA", "DSETP", "MUFU.RCP64H", "MUFU.RSQ64H")
    flight, waits = loads(instructions)
    return {
        "flight": flight,
        "waits": waits,
        "wide": wide,
        "narrow": len(memory) - wide,
        "instructions": len(operations),
        "path": len(way),
        "loop": sum(loop[0] <= number <= loop[1] for number in way) if loop else 0,
        # A routine of the compiler that begins by converting the divisor.
        "divisions": sum(operation.startswith("I2F.U64.RP") for operation in operations),
        "fp64": sum(
            operation.startswith(double) or (operation.startswith(("F2F", "I2F", "F2I")) and "F64" in operation)
            for operation in operations
        ),
    }


def threads_of(cubin):
    """Kernel -> the most threads of a block that it is compiled for, from the attributes in an ELF file."""
    data = cubin.read_bytes()
    (offset,), (entry, count, names) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HHH", data, 58)
    sections = [struct.unpack_from("<IIQQQQ", data, offset + i * entry) for i in range(count)]
    strings = sections[names][4]
    threads = {}
    for name, _, _, _, begin, size in sections:
        section = data[strings + name : data.index(b"\0", strings + name)].decode()
        if not section.startswith(".nv.info."):
            continue
        at = begin
        while at < begin + size:
            form, attribute, length = struct.unpack_from("<BBH", data, at)
            at += 4
            if form == 4:  # a value of so many bytes; otherwise it is in the place of the length
                if attribute == 5:
                    x, y, z = struct.unpack_from("<III", data, at)
                    threads[section.removeprefix(".nv.info.")] = x * y * z
                at += length
    return threads


def read(tool, path):
    """Of an object or cubin, by (mangled kernel, architecture): all figures but ``blocks``; the threads of a block."""
    with tempfile.TemporaryDirectory() as folder:
        cubins = [path]
        if path.suffix != ".cubin":
            subprocess.run([tool, "-xelf", "all", path.resolve()], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            cubins = sorted(Path(folder).glob("*.cubin"))
        found, threads = {}, {}
        for cubin in cubins:
            listing = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
            arch = re.search(r"code for sm_(\w+)", listing)[1]
            kernels, instructions = {}, None
            for line in listing.splitlines():
                if match := KERNEL.search(line):
                    instructions = kernels.setdefault(match[1], [])
                elif instructions is not None and (match := LINE.search(line)):
                    instructions.append((int(match[1], 16), match[2]))
            found |= {(name, arch): figures(listed) for name, listed in kernels.items()}
            threads |= {(name, arch): count for name, count in threads_of(cubin).items()}
    return found, threads


def blocks(arch, threads, registers):
    """Blocks that a multiprocessor has registers and threads for; a warp's registers are given out by 256."""
    warps = (threads + 31) // 32
    by_registers = REGISTERS // ((max(registers, 1) + 7) // 8 * 8 * 32) // 4 * 4 // warps
    return min(by_registers, THREADS.get(arch, 2048) // (warps * 32), 32)
