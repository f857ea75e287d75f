#!/usr/bin/env bash
# Builds normops for aarch64 and tests it under qemu, on a Debian machine of another kind:
#
#     apt-get install debootstrap g++-aarch64-linux-gnu qemu-user-static
#     bash tests/ports/aarch64.sh [arguments of pytest]
#
# Run as root, as debootstrap wants to be. Everything goes to build/aarch64 (7 GB: torch's wheel needs CUDA's libraries).
# An emulated Python runs setup.py, so that whatever that asks about the machine is true; the compiler and ninja, which
# it starts, are this machine's own and run at full speed.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}          # of this machine, with pip and ninja
TORCH=${TORCH:-torch==2.13.0}
RELEASE=${RELEASE:-bookworm}       # of Debian, with the Python below; not older than this machine's
VERSION=${VERSION:-3.11}
ROOT=$PWD/build/aarch64/root       # what a Debian for aarch64 has under /
SITE=$PWD/build/aarch64/$TORCH     # Python packages for aarch64
MORE="numpy pytest hypothesis expecttest setuptools"
[ $# -gt 0 ] || set -- tests/test_forward.py tests/test_backward.py tests/test_layouts.py tests/test_dtypes.py

if [ ! -x "$ROOT/usr/bin/python$VERSION" ]; then
    debootstrap --arch=arm64 --variant=minbase --download-only --include="python$VERSION-dev" "$RELEASE" "$ROOT.debs"
    mkdir -p "$ROOT"
    for package in "$ROOT.debs"/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$ROOT"
    done
    rm -r "$ROOT.debs"
    mkdir "$ROOT/include"  # for the compiler: Debian's Python.h asks for <aarch64-linux-gnu/...>
    ln -s ../usr/include/aarch64-linux-gnu "$ROOT/include"
fi

# What libraries of torch read to know the processor, and would find this machine's: that of a Neoverse N1.
CORE=sys/devices/system/cpu/cpu0/regs/identification
mkdir -p "$ROOT/proc" "$ROOT/$CORE"
echo 0x00000000413fd0c1 > "$ROOT/$CORE/midr_el1"
for core in $(seq 0 $(($(nproc) - 1))); do
    printf '%s\t: %s\n' processor "$core" Features "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimddp" \
        "CPU implementer" 0x41 "CPU architecture" 8 "CPU variant" 0x3 "CPU part" 0xd0c "CPU revision" 1
    echo
done > "$ROOT/proc/cpuinfo"

if [ ! -d "$SITE" ]; then
    # shellcheck disable=SC2046,SC2086
    "$PYTHON" -m pip install --quiet --target "$SITE.part" --only-binary=:all: --python-version "$VERSION" \
        --platform manylinux2014_aarch64 $(printf -- '--platform manylinux_2_%s_aarch64 ' $(seq 17 28)) "$TORCH" $MORE
    mv "$SITE.part" "$SITE"
fi

PATH=$(dirname "$(command -v "$PYTHON")"):$PATH  # where ninja is
export PYTHONPATH=$SITE QEMU_CPU=neoverse-n1 QEMU_LD_PREFIX=$ROOT PYTHONNOUSERSITE=1
emulated=(qemu-aarch64-static "$ROOT/usr/bin/python$VERSION")

CPATH=$ROOT/usr/include/python$VERSION:$ROOT/include CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ NORMOPS_CUDA=0 \
    "${emulated[@]}" setup.py build_ext --inplace
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "${emulated[@]}" -m normops
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "${emulated[@]}" -m pytest -q -p no:cacheprovider -k "not emulated" "$@"
