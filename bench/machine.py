"""The machine that is measured: its name, its caches, and where results can be written."""

import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from normops.__main__ import description

MIB = 1 << 20


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def cpu_model() -> str:
    lines = _text(Path("/proc/cpuinfo")).splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def processors() -> list[int]:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def last_level_cache(cpus: Iterable[int], folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the last-level caches of these processors together: some have one for a few cores each."""
    caches: dict[str, int] = {}
    for cpu in cpus:
        levels = {}
        for index in (folder / f"cpu{cpu}" / "cache").glob("index*"):
            size, level = _text(index / "size").strip(), _text(index / "level").strip()
            if _text(index / "type").strip() != "Instruction" and size.endswith("K") and level:
                levels[int(level)] = _text(index / "shared_cpu_list").strip() or str(cpu), int(size[:-1]) << 10
        if levels:
            shared, size = levels[max(levels)]
            caches[shared] = size
    if caches:
        return sum(caches.values())
    known = [name for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE") if name in os.sysconf_names]
    return next((size for size in map(os.sysconf, known) if size > 0), 32 * MIB)


def commit(folder: Path = Path(__file__).parent) -> str:
    """Of the source that is measured, with a + if it has been changed since; empty where git does not know it."""
    try:
        run = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=folder)
        head = run(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip()
        return head + "+" * bool(run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout)
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, str]:
    cache = last_level_cache(processors())
    known = commit()
    return {
        **description(),
        **({"commit": known} if known else {}),
        "cpu": cpu_model(),
        "last-level cache": f"{cache / MIB:.0f} MiB",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def results_folder(wanted: Path) -> tuple[Path, str]:
    """The folder, made, or a new one elsewhere if that cannot be written to; and what to say about that."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=wanted).close()
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="normops-bench-"))
        return folder, f"{wanted} cannot be written to ({error.strerror}): results go to {folder}"
    return wanted, ""
