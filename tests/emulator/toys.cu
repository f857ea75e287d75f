// Small kernels for test_emulator.py: some that are right, and one for each mistake that the emulator is to find.

#include <map>
#include <stdexcept>
#include <string>

#include "emulator.h"

namespace toys {

using normops::cuda::launch;
using normops::cuda::LaunchConfig;

constexpr unsigned kAll = 0xffffffffu;

struct Arguments {
  const float* x;
  float* y;
  int64_t n;
};

// ---- Right ----------------------------------------------------------------------------------------------------------

template <typename T>
__device__ T block_sum(T value) {
  NORMOPS_SHARED(T, sums, 32);
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(kAll, value, delta);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < blockDim.x / 32 ? sums[threadIdx.x] : T(0);
  if (threadIdx.x < 32)
    for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(kAll, value, delta);
  if (threadIdx.x == 0) sums[0] = value;
  __syncthreads();
  value = sums[0];
  __syncthreads();
  return value;
}

// Every row of n elements minus its mean; a block per row, 16 bytes at a time.
template <typename T>
__global__ void __launch_bounds__(256) center(const float* x, float* y, int64_t n) {
  NORMOPS_DYNAMIC_SHARED(float4, row);
  const float4* const in = reinterpret_cast<const float4*>(x + blockIdx.x * n);
  float4* const out = reinterpret_cast<float4*>(y + blockIdx.x * n);
  T sum = 0;
  for (int i = int(threadIdx.x); i < n / 4; i += int(blockDim.x)) {
    const float4 v = row[i] = __ldg(in + i);
    sum += T(v.x) + T(v.y) + T(v.z) + T(v.w);
  }
  const float mean = float(block_sum(sum) / T(n));
  for (int i = int(threadIdx.x); i < n / 4; i += int(blockDim.x))
    out[i] = make_float4(row[i].x - mean, row[i].y - mean, row[i].z - mean, row[i].w - mean);
}

// Reads every other of 64 numbers, and writes them through columns of shared memory that all lie in one bank.
__global__ void every_other(const float* x, float* y) {
  NORMOPS_SHARED(float, column, 32 * 32);
  column[threadIdx.x * 32] = x[2 * threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = column[threadIdx.x * 32];
}

// What every lane gets from each exchange. x: 32 values; y: (10, 32).
__global__ void exchanges(const float* x, float* y) {
  const int lane = int(threadIdx.x);
  const float v = x[lane];
  float* out = y + lane;
  const auto store = [&](double result) {
    *out = float(result);
    out += 32;
  };
  store(__shfl_sync(kAll, v, 5));
  store(__shfl_sync(kAll, double(v), lane + 1, 8));
  store(float(__shfl_up_sync(kAll, int(v), 3)));
  store(__shfl_up_sync(kAll, v, 1, 4));
  store(float(__shfl_down_sync(kAll, static_cast<long long>(v), 2)));
  store(__shfl_down_sync(kAll, v, 2, 16));
  store(__shfl_xor_sync(kAll, v, 17));
  store(float(__shfl_xor_sync(kAll, unsigned(v), 4, 4)));
  store(float(__popc(__ballot_sync(kAll, v > 10))));
  float halves = 0;
  if (lane < 16)
    halves = float(__any_sync(0xffffu, v > 1000)) + 2 * float(__all_sync(0xffffu, v > 0));
  else
    halves = __shfl_xor_sync(0xffff0000u, v, 15);
  store(halves);
}

// A sum over all blocks by the one that comes last. y: the sum; behind it the counter, 0 before and after.
__global__ void last_block(const float* x, float* y, float* partial, unsigned* done, int64_t n) {
  float sum = 0;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  sum = block_sum(sum);
  NORMOPS_SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last[0] = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last[0]) return;
  sum = block_sum(threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.f);
  if (threadIdx.x == 0) y[0] = sum;
}

// A sum over all blocks, for each of them, by a barrier of the grid.
__global__ void whole_grid(const float* x, float* y, float* partial, int64_t n) {
  float sum = 0;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  normops::cuda::grid_sync();
  sum = block_sum(threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.f);
  if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

// The same by way of the shared memory of the other blocks of a cluster.
__global__ void whole_cluster(const float* x, float* y, int64_t n) {
  NORMOPS_SHARED(float, partial, 1);
  float sum = 0;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[0] = sum;
  normops::cuda::cluster_sync();
  sum = 0;
  for (unsigned rank = 0; rank < normops::cuda::cluster_size(); ++rank)
    sum += *normops::cuda::map_shared(&partial[0], rank);
  normops::cuda::cluster_sync();
  if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

// Threads that have returned are not waited for.
__global__ void early_return(float* y) {
  NORMOPS_SHARED(float, values, 64);
  if (threadIdx.x >= 40) return;
  values[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = values[39 - threadIdx.x];
}

// ---- Broken ---------------------------------------------------------------------------------------------------------

__global__ void divergent_barrier(float* y) {
  if (threadIdx.x < 24)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 0;
}

__global__ void barrier_in_one_branch(float* y) {
  if (threadIdx.x % 32 < 8) __syncthreads();
  y[threadIdx.x] = __shfl_xor_sync(kAll, 1.f, 1);
}

__global__ void grid_barrier_left_out(float* y) {
  if (blockIdx.x == 1) return;
  normops::cuda::grid_sync();
  y[0] = 0;
}

__global__ void spins(float* y, unsigned* flag) {
  if (threadIdx.x == 0)
    while (atomicAdd(flag, 0) == 0) y[0] = 1;
}

__global__ void mask_of_returned_lanes(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(kAll, 1.f, 1);
}

__global__ void different_shuffles(float* y) {
  if (threadIdx.x < 16)
    y[threadIdx.x] = __shfl_xor_sync(kAll, 1.f, 1);
  else
    y[threadIdx.x] = __shfl_xor_sync(kAll, 1.f, 2);
}

__global__ void mask_without_caller(float* y) { y[threadIdx.x] = __shfl_xor_sync(0xffu, 1.f, 1); }

__global__ void reads_lane_outside_mask(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 20);
}

__global__ void reads_returned_lane(float* y) {
  if (threadIdx.x >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(kAll, 1.f, 16);
}

__global__ void global_overrun(const float* x, float* y, int64_t n) {
  const int64_t i = threadIdx.x;
  if (i <= n) y[0] += x[i];
}

__global__ void static_overrun(float* y) {
  NORMOPS_SHARED(float, tile, 32);
  float* const pointer = tile;  // through a pointer the length is forgotten
  pointer[threadIdx.x + 1] = 1;
  __syncthreads();
  y[threadIdx.x] = pointer[threadIdx.x];
}

__global__ void static_index(float* y) {
  NORMOPS_SHARED(float, tile, 32);
  tile[threadIdx.x + 1] = 1;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void dynamic_overrun(float* y) {
  NORMOPS_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + 1] = 1;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void register_overrun(float* y, int64_t n) {
  float values[4] = {};
  for (int i = 0; i <= n; ++i) values[i] = float(i);
  y[0] = values[n - 1];
}

__global__ void misaligned_load(const float* x, float* y) {
  reinterpret_cast<uint4*>(y)[0] = reinterpret_cast<const uint4*>(x + 1)[0];
}

__global__ void misaligned_store(const float* x, float* y) {
  reinterpret_cast<uint4*>(y + 2)[0] = reinterpret_cast<const uint4*>(x)[0];
}

__global__ void null_pointer(float* y, const float* absent) { y[0] = absent[threadIdx.x]; }

__global__ void uninitialised(float* y) {
  NORMOPS_SHARED(float, tile, 32);
  if (threadIdx.x % 2) tile[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void uninitialised_dynamic(float* y) {
  NORMOPS_DYNAMIC_SHARED(int, tile);
  y[threadIdx.x] = float(tile[threadIdx.x]);
}

__global__ void missing_barrier(float* y) {
  NORMOPS_SHARED(float, tile, 64);
  tile[threadIdx.x] = float(threadIdx.x);
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

// The second round writes what the first may still be reading.
__global__ void missing_second_barrier(float* y) {
  NORMOPS_SHARED(float, tile, 64);
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = float(round * 100 + int(threadIdx.x));
    __syncthreads();
    y[round * 64 + int(threadIdx.x)] = tile[63 - threadIdx.x];
  }
}

// A shuffle orders no memory: __syncwarp does.
__global__ void shuffle_for_barrier(float* y) {
  NORMOPS_SHARED(float, tile, 32);
  tile[threadIdx.x] = 1;
  __shfl_xor_sync(kAll, 1, 1);
  y[threadIdx.x] = tile[31 - threadIdx.x];
}

__global__ void warp_barrier(float* y) {
  NORMOPS_SHARED(float, tile, 32);
  tile[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  y[threadIdx.x] = tile[31 - threadIdx.x];
}

__global__ void blocks_race(float* y) { y[threadIdx.x] = float(blockIdx.x); }

__global__ void leaves_cluster(float* y) {
  NORMOPS_SHARED(float, tile, 32);
  tile[threadIdx.x] = 1;
  normops::cuda::cluster_sync();
  if (normops::cuda::cluster_rank() == 0) return;
  normops::cuda::cluster_sync();
  y[threadIdx.x] = *normops::cuda::map_shared(&tile[0], 0);
}

__global__ void maps_foreign_memory(float* y) { y[0] = *normops::cuda::map_shared(y, 0); }

__global__ void grid_sync_alone(float*) { normops::cuda::grid_sync(); }

__global__ void much_static_memory(float* y) {
  NORMOPS_SHARED(float, tile, 12289);
  tile[threadIdx.x] = 0;
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void static_and_dynamic(float* y) {
  NORMOPS_SHARED(float, tile, 1024);
  y[threadIdx.x] = tile[threadIdx.x] = 0;
}

__global__ void nothing(float*) {}

// A launch of any shape.
void shaped(dim3 grid, dim3 block, size_t shared_bytes = 0, unsigned cluster = 1, bool cooperative = false) {
  launch(nothing, LaunchConfig{grid, block, shared_bytes, cluster, cooperative}, nullptr, nullptr);
}

void asks_for(int bytes) {
  cudaFuncSetAttribute(static_and_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

LaunchConfig all_at_once(dim3 grid, dim3 block) { return {grid, block, 0, 1, true}; }

#define TOY(name, grid, block, shared) {#name, [](Arguments a) { launch(name, {grid, block, shared}, nullptr, a.y); }}

const std::map<std::string, void (*)(Arguments)> kToys = {
    {"center", [](Arguments a) { launch(center<float>, {3, 64, size_t(a.n) * 4}, nullptr, a.x, a.y, a.n); }},
    {"center_double", [](Arguments a) { launch(center<double>, {3, 64, size_t(a.n) * 4}, nullptr, a.x, a.y, a.n); }},
    {"exchanges", [](Arguments a) { launch(exchanges, {1, 32}, nullptr, a.x, a.y); }},
    {"last_block",
     [](Arguments a) {
       launch(last_block, {7, 128}, nullptr, a.x, a.y, a.y + 8, reinterpret_cast<unsigned*>(a.y + 1), a.n);
     }},
    {"whole_grid", [](Arguments a) { launch(whole_grid, all_at_once(5, 96), nullptr, a.x, a.y, a.y + 8, a.n); }},
    {"whole_cluster", [](Arguments a) { launch(whole_cluster, {4, 64, 0, 4}, nullptr, a.x, a.y, a.n); }},
    TOY(early_return, 1, 64, 0),
    TOY(warp_barrier, 1, 32, 0),

    TOY(divergent_barrier, 2, 64, 0),
    TOY(barrier_in_one_branch, 1, 64, 0),
    {"grid_barrier_left_out", [](Arguments a) { launch(grid_barrier_left_out, all_at_once(3, 32), nullptr, a.y); }},
    {"spins", [](Arguments a) { launch(spins, {1, 32}, nullptr, a.y, reinterpret_cast<unsigned*>(a.y + 8)); }},
    TOY(mask_of_returned_lanes, 1, 32, 0),
    TOY(different_shuffles, 1, 32, 0),
    TOY(mask_without_caller, 1, 32, 0),
    TOY(reads_lane_outside_mask, 1, 32, 0),
    TOY(reads_returned_lane, 1, 32, 0),
    {"global_overrun", [](Arguments a) { launch(global_overrun, {1, 128}, nullptr, a.x, a.y, a.n); }},
    TOY(static_overrun, 1, 32, 0),
    TOY(static_index, 1, 32, 0),
    TOY(dynamic_overrun, 1, 32, 128),
    {"register_overrun", [](Arguments a) { launch(register_overrun, {1, 1}, nullptr, a.y, 4); }},
    {"misaligned_load", [](Arguments a) { launch(misaligned_load, {1, 1}, nullptr, a.x, a.y); }},
    {"misaligned_store", [](Arguments a) { launch(misaligned_store, {1, 1}, nullptr, a.x, a.y); }},
    {"null_pointer", [](Arguments a) { launch(null_pointer, {1, 1}, nullptr, a.y, nullptr); }},
    TOY(uninitialised, 1, 32, 0),
    TOY(uninitialised_dynamic, 1, 32, 128),
    TOY(missing_barrier, 1, 64, 0),
    TOY(missing_second_barrier, 1, 64, 0),
    TOY(shuffle_for_barrier, 1, 32, 0),
    TOY(blocks_race, 2, 32, 0),
    {"leaves_cluster", [](Arguments a) { launch(leaves_cluster, {2, 32, 0, 2}, nullptr, a.y); }},
    TOY(maps_foreign_memory, 1, 1, 0),
    TOY(grid_sync_alone, 1, 1, 0),
    TOY(much_static_memory, 1, 1, 0),
    TOY(static_and_dynamic, 1, 1, 48 << 10),

    {"every_other", [](Arguments a) { launch(every_other, {1, 32}, nullptr, a.x, a.y); }},

    {"many_threads", [](Arguments) { shaped(1, {32, 33}); }},
    {"deep_block", [](Arguments) { shaped(1, {1, 1, 65}); }},
    {"empty_block", [](Arguments) { shaped(1, 0); }},
    {"empty_grid", [](Arguments) { shaped(0, 32); }},
    {"tall_grid", [](Arguments) { shaped({1, 65536}, 32); }},
    {"unasked_shared_memory", [](Arguments) { shaped(1, 32, (48 << 10) + 1); }},
    {"ask_for_164_kib", [](Arguments) { asks_for(164 << 10); }},
    {"ask_for_228_kib", [](Arguments) { asks_for(228 << 10); }},
    {"cluster_of_two", [](Arguments) { shaped(4, 32, 0, 2); }},
    {"cluster_of_nine", [](Arguments) { shaped(9, 32, 0, 9); }},
    {"cluster_that_does_not_divide", [](Arguments) { shaped(5, 32, 0, 2); }},
    {"large_cooperative_grid", [](Arguments) { shaped(7, 1024, 0, 1, true); }},
};

}  // namespace toys

// Runs one; the error's message, or null.
extern "C" const char* run_toy(const char* name, const float* x, float* y, int64_t n) {
  static std::string message;
  try {
    toys::kToys.at(name)({x, y, n});
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
