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
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace normops::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("normops: ") + what + ": " + cudaGetErrorString(error));
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
__device__ __forceinline__ T* map_shared(T* pointer, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(pointer, rank);
#else
  return pointer;
#endif
}

#endif  // NORMOPS_EMULATED

// What launchers have to know of the device, asked once.
struct Device {
  int index;
  int multiprocessors;
  int shared_bytes;  // most a block may ask for
  bool clusters;

  // Makes the device current.
  static const Device& use(int index) {
    constexpr int kMost = 64;
    static std::array<Device, kMost> devices;
    static std::array<std::once_flag, kMost> known;
    if (index < 0 || index >= kMost) throw std::runtime_error("normops: no CUDA device " + std::to_string(index));
    check(cudaSetDevice(index), "cudaSetDevice");
    std::call_once(known[index], [&] {
      const auto ask = [&](cudaDeviceAttr attribute) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
        return value;
      };
      devices[index] = {index, ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                        ask(cudaDevAttrComputeCapabilityMajor) >= 9};
    });
    return devices[index];
  }
};

// More than 48 KiB of dynamic shared memory have to be asked for.
template <typename... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  constexpr size_t kUnasked = 48 * 1024;
  if (bytes > kUnasked) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "shared memory");
  }
}

// How many blocks of the kernel a multiprocessor holds. The answer is kept: asking takes longer than launching.
template <typename... Parameters>
int blocks_per_multiprocessor(const Device& device, void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, size_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{device.index, reinterpret_cast<const void*>(kernel), threads, shared_bytes}];
  if (blocks == 0) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), "occupancy");
    blocks = std::max(blocks, 1);
  }
  return blocks;
}

}  // namespace normops::cuda
