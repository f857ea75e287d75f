"""Builds the C++ library. Everything else about the package is in pyproject.toml."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import __version__ as SETUPTOOLS
from setuptools import setup

if int(SETUPTOOLS.split(".")[0]) < 77:  # which cannot read pyproject.toml, and says so at length
    raise SystemExit(
        f"normops needs setuptools 77 or later, and this is {SETUPTOOLS}: pip install --upgrade setuptools"
    )

OLDEST_TORCH, NEWEST_TESTED_TORCH = "2.11", "2.15"

# What only describes the package is asked for first, and need not wait until torch is imported.
building = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"} & set(sys.argv)
describing = {"egg_info", "dist_info", "sdist"} & set(sys.argv) and not building


def installed_torch():
    try:
        return version("torch").partition("+")[0]
    except PackageNotFoundError:
        raise SystemExit(
            "normops is compiled against the PyTorch it will run with: install torch first (pip install torch), "
            "then run pip install --no-build-isolation ."
        ) from None


def minor(release):
    return tuple(map(int, release.split(".")[:2]))


def requirement():
    """The torch that goes with this package: for the source any that is new enough, for what was compiled the one it
    was compiled with, as torch promises no binary interface across minor versions."""
    if "sdist" in sys.argv:
        return f"torch>={OLDEST_TORCH}"
    release = installed_torch()
    return f"torch=={'.'.join(release.split('.')[:2])}.*" if re.fullmatch(r"[\d.]+", release) else f"torch=={release}"


def build():
    release = installed_torch()
    if minor(release) < minor(OLDEST_TORCH):
        raise SystemExit(f"normops needs torch {OLDEST_TORCH} or later, and this is {release}: install a newer one")
    if minor(release) > minor(NEWEST_TESTED_TORCH):
        print(f"normops: torch {release} is newer than {NEWEST_TESTED_TORCH}, the newest tested", file=sys.stderr)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from building.command import EXTENSION, Build

    return {"ext_modules": [EXTENSION], "cmdclass": {"build_ext": Build}}


setup(install_requires=[requirement()], **({} if describing else build()))
