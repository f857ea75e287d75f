#pragma once

// What kernels and launchers take from CUDA: its runtime and one way to launch, declare shared memory and meet at wide
// barriers. Compiled with NORMOPS_EMULATED, an emulator on the CPU supplies the same names (tests/emulator).

#ifdef NORMOPS_EMULATED
#include "emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

namespace normops::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    const char* const advice = error == cudaErrorNoKernelImageForDevice
                                   ? ": the kernels were not compiled for this card, see python -m normops; "
                                     "TORCH_CUDA_ARCH_LIST sets for which they are"
                                   : "";
    throw std::runtime_error(std::string("normops: ") + what + ": " + cudaGetErrorString(error) + advice);
  }
}

#ifndef NORMOPS_EMULATED

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks, along x
  bool cooperative = false;
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& config, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = config.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  cudaLaunchConfig_t launch{};
  launch.gridDim = config.grid;
  launch.blockDim = config.block;
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = count;
  return cudaLaunchKernelEx(&launch, kernel, std::forward<Arguments>(arguments)...);
}

#define NORMOPS_SHARED(type, name, count) __shared__ type name[count]
// Extern arrays of one name must have one type, so all are bytes.
#define NORMOPS_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)

__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

// Before sm_90 every block is a cluster of its own.
__device__ __forceinline__ unsigned cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().num_blocks();
#else
  return 1;
#endif
}
__device__ __forceinline__ unsigned cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
template <typename T>
__device__ __forceinline__ T* map_shared(T* pointer, [[maybe_unused]] unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(pointer, rank);
#else
  return pointer;
#endif
}

#endif  // NORMOPS_EMULATED

// Has nothing to do but to say what it was compiled for.
template <int = 0>
__global__ void empty_kernel() {}

// What is asked once for each device; in the emulator, where one device becomes another, every time.
template <typename F>
void once_for(std::once_flag& flag, const F& f) {
#ifdef NORMOPS_EMULATED
  static_cast<void>(flag);
  f();
#else
  std::call_once(flag, f);
#endif
}

// What launchers have to know of the device.
struct Device {
  int index;
  int shared_bytes;  // most a block may ask for
  bool clusters;

  static constexpr int kMost = 64;
  static constexpr int kStaticBytes = 4096;  // of shared memory, at most, in kernels that have dynamic memory too

  static Device get(int index) {
    static std::array<Device, kMost> devices;
    static std::array<std::once_flag, kMost> known;
    if (index < 0 || index >= kMost) throw std::runtime_error("normops: no CUDA device " + std::to_string(index));
    once_for(known[index], [&] {
      const auto ask = [&](cudaDeviceAttr attribute) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
        return value;
      };
      // A driver that compiles the code of an older architecture for this device makes no clusters of it.
      cudaFuncAttributes compiled{};
      check(cudaFuncGetAttributes(&compiled, empty_kernel<>), "cudaFuncGetAttributes");
      devices[index] = {index, ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                        ask(cudaDevAttrComputeCapabilityMajor) >= 9 && compiled.ptxVersion >= 90};
    });
    return devices[index];
  }
};

// More than 48 KiB of dynamic shared memory have to be asked for: once for a kernel and device, and the most there can
// be, as another thread may be about to launch the kernel with more than this one.
template <auto kKernel>
void allow_shared(const Device& device, size_t bytes) {
  constexpr size_t kUnasked = 48 * 1024;
  static std::array<std::once_flag, Device::kMost> asked;
  if (bytes <= kUnasked) return;
  once_for(asked[device.index], [&] {
    const int most = device.shared_bytes - Device::kStaticBytes;
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
  });
}

// A grid of so many blocks along x.
inline dim3 grid_of(int64_t blocks) {
  constexpr int64_t kMost = 0x7fffffff;
  if (blocks > kMost) {
    throw std::runtime_error("normops: expected at most 2147483647 blocks of work, got " + std::to_string(blocks) +
                             ": the input has too many rows or planes for one call");
  }
  return dim3(unsigned(blocks));
}

}  // namespace normops::cuda
