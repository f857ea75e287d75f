#include "device.h"

#include <algorithm>

namespace normops::emulator {
namespace {

void require_between(const char* what, uint64_t value, uint64_t most) {
  require(value >= 1 && value <= most, std::string(what) + " is " + std::to_string(value) + ", " +
                                           settings().device->name + " takes 1 to " + std::to_string(most));
}

}  // namespace

int attribute(cudaDeviceAttr attribute) {
  const Architecture& device = *settings().device;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return kThreadsPerBlock;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return kSharedUnasked;
    case cudaDevAttrWarpSize:
      return warpSize;
    case cudaDevAttrMultiProcessorCount:
      return settings().multiprocessors;
    case cudaDevAttrL2CacheSize:
      return 1 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return device.threads_per_multiprocessor;
    case cudaDevAttrComputeCapabilityMajor:
      return device.major;
    case cudaDevAttrComputeCapabilityMinor:
      return device.minor;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return device.shared_per_multiprocessor;
    case cudaDevAttrCooperativeLaunch:
      return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return device.shared_per_block;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return kSharedReserved;
  }
  fail("cudaDeviceGetAttribute: no attribute " + std::to_string(attribute));
}

void set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const Architecture& device = *settings().device;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    require(value >= 0 && value <= device.shared_per_block, "cudaFuncSetAttribute asks for " + std::to_string(value) +
                                                                " bytes of shared memory, " + device.name + " has " +
                                                                std::to_string(device.shared_per_block));
  kernels()[kernel].attributes[attribute] = value;
}

// As far as threads and shared memory go: of registers nothing is known.
int blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  const Architecture& device = *settings().device;
  const int whole_warps = (threads + warpSize - 1) / warpSize * warpSize;
  const int by_memory = device.shared_per_multiprocessor / (int(shared_bytes) + kSharedReserved);
  return std::min({device.threads_per_multiprocessor / whole_warps, by_memory, device.blocks_per_multiprocessor});
}

void check_limits(const cuda::LaunchConfig& config, const Kernel& kernel) {
  const Architecture& device = *settings().device;
  require_between("blockDim.x", config.block.x, 1024);
  require_between("blockDim.y", config.block.y, 1024);
  require_between("blockDim.z", config.block.z, 64);
  require_between("the number of threads per block", volume(config.block), kThreadsPerBlock);
  require_between("gridDim.x", config.grid.x, (1u << 31) - 1);
  require_between("gridDim.y", config.grid.y, 65535);
  require_between("gridDim.z", config.grid.z, 65535);
  const std::string asks = std::to_string(config.shared_bytes) + " bytes of dynamic shared memory, ";
  require(config.shared_bytes <= size_t(device.shared_per_block),
          asks + device.name + " has " + std::to_string(device.shared_per_block));
  const int allowed = kernel.attribute(cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedUnasked);
  require(config.shared_bytes <= size_t(allowed),
          asks + "the kernel may use " + std::to_string(allowed) + " (cudaFuncAttributeMaxDynamicSharedMemorySize)");
  const bool wide = kernel.attribute(cudaFuncAttributeNonPortableClusterSizeAllowed, 0);
  require_between("the cluster's size", config.cluster,
                  wide ? device.cluster : std::min(device.cluster, kPortableCluster));
  require(config.grid.x % config.cluster == 0, "gridDim.x is " + std::to_string(config.grid.x) +
                                                   ", not a multiple of the cluster's size, " +
                                                   std::to_string(config.cluster));
  if (config.cooperative)
    require_between("the number of blocks of a cooperative grid", volume(config.grid),
                    uint64_t(settings().multiprocessors) *
                        blocks_per_multiprocessor(int(volume(config.block)), config.shared_bytes));
}

void check_static_memory(size_t static_bytes, const cuda::LaunchConfig& config, const Kernel& kernel,
                         const std::string& array) {
  require(static_bytes <= size_t(kSharedUnasked), std::to_string(static_bytes) +
                                                      " bytes of static shared memory with " + array +
                                                      ", the limit is " + std::to_string(kSharedUnasked));
  const size_t total = static_bytes + config.shared_bytes;
  const bool asked = kernel.attributes.contains(cudaFuncAttributeMaxDynamicSharedMemorySize);
  const size_t limit = size_t(asked ? settings().device->shared_per_block : kSharedUnasked);
  require(total <= limit, std::to_string(total) + " bytes of shared memory, static and dynamic, with " + array +
                              ", the limit is " + std::to_string(limit));
}

}  // namespace normops::emulator
