#!/usr/bin/env bash
# A second compiler reads the kernels: clang compiles their device code for sm_80, and every warning is an error.
# It looks for two headers that newer toolkits lack or keep elsewhere: an empty one, and the folder of libcu++.
set -euo pipefail
cd "$(dirname "$0")/../.."
clang=${CLANG:-clang++}
cuda=${CUDA_HOME:-/usr/local/cuda}
torch=$("${PYTHON:-python3}" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
touch "$folder/curand_mtgp32_kernel.h"
for source in csrc/cuda/*.cu; do
    "$clang" -x cuda --cuda-device-only --cuda-gpu-arch=sm_80 --cuda-path="$cuda" -std=c++20 -O1 -S -o /dev/null \
        -Wall -Wextra -Werror -Wno-unknown-cuda-version \
        -isystem "$folder" -isystem "$cuda/include/cccl" -isystem "$torch/include" "$source"
    echo "$clang: $source"
done
