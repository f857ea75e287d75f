#!/usr/bin/env bash
# The driver of the kernels in build/kernels, for libFuzzer, with random calls, or with threads:
# build.sh fuzz|random|threads
#
#   make fuzz-kernels              libFuzzer (clang), AddressSanitizer, UndefinedBehaviorSanitizer; FUZZ_SECONDS=600
#   make sanitize-kernels          the two sanitizers alone (g++)
#   make race-kernels              ThreadSanitizer (g++)
set -euo pipefail
cd "$(dirname "$0")/../.."
kind=$1
python=${PYTHON:-python3}
folder=build/kernels/$kind
mkdir -p "$folder"
read -r include library <<< "$($python -c 'from torch.utils.cpp_extension import include_paths, library_paths
print(include_paths()[0], library_paths()[0])')"
# With NORMOPS_SANITIZED, tails are plain loads and stores; sanitizers do not see those with masks.
flags=(-std=c++20 -O1 -g1 -fno-math-errno -Wno-psabi -mavx2 -mfma -mf16c)
flags+=(-DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -DAT_PER_OPERATOR_HEADERS -DNORMOPS_SANITIZED "-isystem$include")
case $kind in
    fuzz)
        compiler=${CLANG:-clang++}
        flags+=(-fsanitize=fuzzer,address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all)
        ;;
    random)
        compiler=${CXX:-g++}
        flags+=(-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -DNORMOPS_RANDOM)
        ;;
    threads)
        compiler=${CXX:-g++}
        flags+=(-fsanitize=thread -DNORMOPS_RANDOM -DNORMOPS_THREADS)
        ;;
esac
objects=()
for source in csrc/cpu/{row,channel}_{forward,backward}.cpp csrc/cpu/epilogue.cpp tests/kernels/driver.cpp; do
    object=$folder/$(basename "$source" .cpp).o
    objects+=("$object")
    if [ ! -e "$object" ] || [ -n "$(find csrc tests/kernels -newer "$object" -name '*.[ch]*' -print -quit)" ]; then
        $compiler "${flags[@]}" -c "$source" -o "$object"
    fi
done
$compiler "${flags[@]}" "${objects[@]}" -o "$folder/driver" "-L$library" "-Wl,-rpath,$library" -ltorch_cpu -lc10 -lpthread
