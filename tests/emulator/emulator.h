#pragma once

// CUDA's vocabulary for an ordinary C++20 compiler: kernels that include this header run on the CPU, one fiber per
// CUDA thread. CONTRIBUTING.md says what is checked; emulator.cpp does it.

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// __shared__ is missing on purpose: NORMOPS_SHARED and NORMOPS_DYNAMIC_SHARED can be poisoned and guarded.

// ---- Vector types, aligned as CUDA aligns them ----------------------------------------------------------------------

#define NORMOPS_VECTOR_TYPES(name, type)                                                      \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                           \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  constexpr name##2 make_##name##2(type x, type y) { return {x, y}; }                         \
  constexpr name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }              \
  constexpr name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

NORMOPS_VECTOR_TYPES(char, signed char)
NORMOPS_VECTOR_TYPES(uchar, unsigned char)
NORMOPS_VECTOR_TYPES(short, short)
NORMOPS_VECTOR_TYPES(ushort, unsigned short)
NORMOPS_VECTOR_TYPES(int, int)
NORMOPS_VECTOR_TYPES(uint, unsigned)
NORMOPS_VECTOR_TYPES(longlong, long long)
NORMOPS_VECTOR_TYPES(ulonglong, unsigned long long)
NORMOPS_VECTOR_TYPES(float, float)
NORMOPS_VECTOR_TYPES(double, double)
#undef NORMOPS_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// ---- The runtime, as far as launchers need it -----------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImageForDevice = 209 };
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 15,
};

namespace normops::cuda {

// What `launch` takes besides the kernel and its arguments. `where` fills itself in and appears in messages.
struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks, along x
  bool cooperative = false;
  std::source_location where = std::source_location::current();
};

}  // namespace normops::cuda

namespace normops::emulator {

using Where = std::source_location;

// Who waits for whom. A warp's exchange (shuffle, ballot) does not order memory, __syncwarp does.
enum class Scope { kExchange, kWarp, kBlock, kCluster, kGrid };
constexpr int kBallot = -1;

// Ends the launch: the message, with kernel, block and thread, is thrown from `launch`.
[[noreturn]] void fail(const std::string& message);
void run(const void* kernel, const cuda::LaunchConfig& config, void (*body)(void*), void* arguments);

// Waits for the others of the scope. For a block, the result is how many predicates were not 0.
uint64_t barrier(Scope scope, const char* name, uint64_t predicate, const Where& where);
// Waits for the lanes in `mask`; the result is the value of lane `source`, or (kBallot) which lanes' values are not 0.
uint64_t warp_meeting(Scope scope, const char* name, unsigned mask, uint64_t value, int source, const Where& where);
unsigned lane();
// Lets other threads run; without it a thread that waits for another in a loop would wait for ever.
void yield();

// Shared memory of the running block, the same for every thread that comes with the same `declaration`.
void* shared(const char* declaration, const char* name, size_t bytes, size_t alignment, const Where& where);
void* dynamic_shared();
void* map_shared(const void* pointer, unsigned rank, const Where& where);
unsigned cluster_size();

int attribute(cudaDeviceAttr attribute);
void set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
int blocks_per_multiprocessor(int threads, size_t shared_bytes);

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, const Where& where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "shuffles take arithmetic types of up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_meeting(Scope::kExchange, name, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline uint64_t ballot(const char* name, unsigned mask, bool predicate, const Where& where) {
  return warp_meeting(Scope::kExchange, name, mask, predicate, kBallot, where);
}

}  // namespace normops::emulator

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // `launch` throws
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t = nullptr) {
  return std::memset(memory, value, bytes), cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  return *value = normops::emulator::attribute(attribute), cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return normops::emulator::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value), cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  using normops::emulator::attribute;
  attributes->ptxVersion =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, size_t shared_bytes) {
  return *blocks = normops::emulator::blocks_per_multiprocessor(threads, shared_bytes), cudaSuccess;
}

// ---- Barriers and warps ---------------------------------------------------------------------------------------------

#define NORMOPS_WHERE normops::emulator::Where where = normops::emulator::Where::current()

inline void __syncthreads(NORMOPS_WHERE) {
  normops::emulator::barrier(normops::emulator::Scope::kBlock, "__syncthreads", 0, where);
}
inline int __syncthreads_count(int predicate, NORMOPS_WHERE) {
  using namespace normops::emulator;
  return int(barrier(Scope::kBlock, "__syncthreads_count", predicate != 0, where));
}
inline int __syncthreads_or(int predicate, NORMOPS_WHERE) {
  using namespace normops::emulator;
  return barrier(Scope::kBlock, "__syncthreads_or", predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, NORMOPS_WHERE) {
  using namespace normops::emulator;
  return barrier(Scope::kBlock, "__syncthreads_and", predicate == 0, where) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, NORMOPS_WHERE) {
  using namespace normops::emulator;
  warp_meeting(Scope::kWarp, "__syncwarp", mask, 0, kBallot, where);
}

// Lanes are grouped by `width`; a lane whose source would lie beyond its group gets its own value back.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, NORMOPS_WHERE) {
  const int lane = int(normops::emulator::lane());
  return normops::emulator::shuffle("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)), where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, NORMOPS_WHERE) {
  const int lane = int(normops::emulator::lane()), source = lane - int(delta), first = lane & -width;
  return normops::emulator::shuffle("__shfl_up_sync", mask, value, source < first ? lane : source, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, NORMOPS_WHERE) {
  const int lane = int(normops::emulator::lane()), source = lane + int(delta), last = lane | (width - 1);
  return normops::emulator::shuffle("__shfl_down_sync", mask, value, source > last ? lane : source, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, NORMOPS_WHERE) {
  const int lane = int(normops::emulator::lane()), source = lane ^ lane_mask, last = lane | (width - 1);
  return normops::emulator::shuffle("__shfl_xor_sync", mask, value, source > last ? lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, NORMOPS_WHERE) {
  return unsigned(normops::emulator::ballot("__ballot_sync", mask, predicate != 0, where));
}
inline int __any_sync(unsigned mask, int predicate, NORMOPS_WHERE) {
  return normops::emulator::ballot("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, NORMOPS_WHERE) {
  return normops::emulator::ballot("__all_sync", mask, predicate == 0, where) == 0;
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

// A static array of the block; `count` is a constant expression.
#define NORMOPS_SHARED(type, name, count)                                                                 \
  static const char normops_shared_##name = 0;                                                            \
  auto& name = *static_cast<std::type_identity_t<type>(*)[count]>(                                        \
      normops::emulator::shared(&normops_shared_##name, #name, sizeof(std::type_identity_t<type>[count]), \
                                alignof(type), normops::emulator::Where::current()))
#define NORMOPS_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(normops::emulator::dynamic_shared())

// The loads and stores with a cache hint are plain ones.
#define NORMOPS_LOAD(name)   \
  template <typename T>      \
  T name(const T* pointer) { \
    return *pointer;         \
  }
#define NORMOPS_STORE(name)                              \
  template <typename T>                                  \
  void name(T* pointer, std::type_identity_t<T> value) { \
    *pointer = value;                                    \
  }
NORMOPS_LOAD(__ldg)
NORMOPS_LOAD(__ldca)
NORMOPS_LOAD(__ldcg)
NORMOPS_LOAD(__ldcs)
NORMOPS_LOAD(__ldlu)
NORMOPS_LOAD(__ldcv)
NORMOPS_STORE(__stwb)
NORMOPS_STORE(__stcg)
NORMOPS_STORE(__stcs)
NORMOPS_STORE(__stwt)
#undef NORMOPS_LOAD
#undef NORMOPS_STORE

// One thread runs at a time: only the compiler must be kept from moving accesses.
inline void __threadfence() { std::atomic_signal_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }

// Integer atomics only: sums of floats by atomics would depend on the order. Each lets other threads run first.
#define NORMOPS_ATOMIC(name, operation)                            \
  template <typename T>                                            \
    requires std::is_integral_v<T>                                 \
  T name(T* pointer, std::type_identity_t<T> value) {              \
    normops::emulator::yield();                                    \
    return __atomic_##operation(pointer, value, __ATOMIC_ACQ_REL); \
  }
NORMOPS_ATOMIC(atomicAdd, fetch_add)
NORMOPS_ATOMIC(atomicSub, fetch_sub)
NORMOPS_ATOMIC(atomicOr, fetch_or)
NORMOPS_ATOMIC(atomicAnd, fetch_and)
NORMOPS_ATOMIC(atomicExch, exchange_n)
#undef NORMOPS_ATOMIC

template <typename T>
  requires std::is_integral_v<T>
T atomicCAS(T* pointer, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  normops::emulator::yield();
  __atomic_compare_exchange_n(pointer, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

// Counts up to `limit`, then begins at 0 again.
inline unsigned atomicInc(unsigned* pointer, unsigned limit) {
  for (;;) {
    const unsigned old = *pointer;
    if (atomicCAS(pointer, old, old >= limit ? 0 : old + 1) == old) return old;
  }
}

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float __expf(float x) { return std::exp(x); }
inline float __int2float_rn(int x) { return float(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

#define NORMOPS_MIN_MAX(type)                                  \
  constexpr type min(type a, type b) { return b < a ? b : a; } \
  constexpr type max(type a, type b) { return a < b ? b : a; }
NORMOPS_MIN_MAX(int)
NORMOPS_MIN_MAX(unsigned)
NORMOPS_MIN_MAX(long)
NORMOPS_MIN_MAX(unsigned long)
NORMOPS_MIN_MAX(long long)
NORMOPS_MIN_MAX(unsigned long long)
#undef NORMOPS_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// ---- Launching, and what is wider than a block ----------------------------------------------------------------------

namespace normops::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& config, cudaStream_t, Arguments&&... arguments) {
  static_assert(!(std::is_reference_v<Parameters> || ...), "kernels take their parameters by value");
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  auto body = [&] { std::apply(kernel, parameters); };
  emulator::run(
      reinterpret_cast<const void*>(kernel), config,
      [](void* body_pointer) { (*static_cast<decltype(body)*>(body_pointer))(); }, &body);
  return cudaSuccess;
}

inline void grid_sync(NORMOPS_WHERE) { emulator::barrier(emulator::Scope::kGrid, "grid_sync", 0, where); }
inline void cluster_sync(NORMOPS_WHERE) { emulator::barrier(emulator::Scope::kCluster, "cluster_sync", 0, where); }
inline unsigned cluster_size() { return emulator::cluster_size(); }
inline unsigned cluster_rank() { return blockIdx.x % cluster_size(); }

// What `pointer`, into shared memory of this block, is in the block of that rank in the cluster.
template <typename T>
T* map_shared(T* pointer, unsigned rank, NORMOPS_WHERE) {
  return static_cast<T*>(emulator::map_shared(pointer, rank, where));
}

}  // namespace normops::cuda

#undef NORMOPS_WHERE
