// A CUDA runtime that starts nothing: what the launchers, as nvcc compiles them, are linked with to see what they would
// launch, and what that takes of the host's time (stub.py).

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>

namespace {

struct Launched {
  int64_t count = 0;
  uint64_t blocks = 0;
};

std::map<const void*, std::string>& names() {  // of the kernels, by what stands for them on the host
  static std::map<const void*, std::string> names;
  return names;
}

std::map<const void*, Launched> launched;

cudaError_t note(const void* kernel, dim3 grid) {
  Launched& of_kernel = launched[kernel];
  ++of_kernel.count;
  of_kernel.blocks += uint64_t(grid.x) * grid.y * grid.z;
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of a runtime that does nothing"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {  // of an H200
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 232448;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return note(kernel, config->gridDim);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3, void**, size_t, cudaStream_t) {
  return note(kernel, grid);
}

// What nvcc's code calls when it is loaded.

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[kernel] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3, void**, size_t, cudaStream_t) {
  return note(reinterpret_cast<const void*>(kernel), grid);
}

// For stub.py, through ctypes.

void normops_stub_clear() { launched.clear(); }

// A line for every kernel that was launched: launches, blocks, mangled name.
const char* normops_stub_report() {
  static std::string report;
  report.clear();
  for (const auto& [kernel, of_kernel] : launched) {
    report += std::to_string(of_kernel.count) + " " + std::to_string(of_kernel.blocks) + " " + names()[kernel] + "\n";
  }
  return report.c_str();
}

}  // extern "C"
