#pragma once

// The stages of the channel engine over memory. `center` and the other coefficients hold one entry per row of
// statistics and column; a thread needs those of the columns in one vector, which all its vectors share. Vectors are
// read in batches, computed, and written: the reads of a batch are under way together.

#include "epilogue.cuh"
#include "walk.cuh"

namespace normops::cuda {

// The coefficients of the thread's columns, or a constant.
template <typename W, typename A>
__device__ __forceinline__ void load_coefficients(const W& walk, const A* array, A absent, A (&values)[W::kColumns]) {
  if (walk.active() && array) {
    load_values(array + walk.row * walk.plan.columns + walk.column, values);
  } else {
#pragma unroll
    for (int k = 0; k < W::kColumns; ++k) values[k] = absent;
  }
}

// The places of a batch, and its vectors in a tensor.
template <typename T, int kSize, int kItems>
struct Batch {
  Vector<T, kSize> vectors[kItems];

  template <typename Cursor>
  __device__ __forceinline__ void load(const Place (&places)[kItems], Cursor& cursor) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      vectors[i] = Vector<T, kSize>::load_if(places[i].there, cursor.next(places[i]));
    }
  }
};

template <int kItems, typename W>
__device__ __forceinline__ void find_places(const W& walk, int first, Place (&places)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) places[i] = walk.place(first + i);
}

// A cursor over a tensor that may be absent, and is zero then.
template <typename Cursor>
struct OptionalCursor {
  Cursor cursor;
  bool given;
};
template <typename W, typename T>
__device__ __forceinline__ auto optional_cursor(const W& walk, const ChannelTensor<T>& x) {
  return OptionalCursor<decltype(walk.cursor(x))>{walk.cursor(x), x.data != nullptr};
}

template <typename T, int kSize, int kItems, typename Cursor>
__device__ __forceinline__ void load_batch(const Place (&places)[kItems], Cursor& cursor,
                                           Vector<T, kSize> (&vectors)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    vectors[i] = Vector<T, kSize>::load_if(places[i].there, cursor.next(places[i]));
  }
}
template <typename T, int kSize, int kItems, typename Cursor>
__device__ __forceinline__ void load_batch(const Place (&places)[kItems], OptionalCursor<Cursor>& x,
                                           Vector<T, kSize> (&vectors)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) vectors[i] = Vector<T, kSize>::zero();
  if (x.given) load_batch<T, kSize>(places, x.cursor, vectors);
}

// f(place, its vector in each of the tensors) for the thread's vectors; `loaded()` behind the first reads. All of a
// batch are read before the first is used. kInTurn: from one place in the code (epilogue.cuh).
template <typename T, int kSize, bool kInTurn, typename W, typename Loaded, typename F, typename... Cursors>
__device__ __forceinline__ void each_vector(const W& walk, const Loaded& loaded, const F& f, Cursors&... cursors) {
  constexpr int kTensors = sizeof...(Cursors);
  // Where every element of a vector has coefficients of its own, an epilogue leaves registers for half a batch.
  constexpr int kTogether = kInTurn && kTensors > 2 && W::kColumns > 1 ? kBatch / 2 : kBatch;
#pragma unroll(kInTurn ? 1 : W::kItems)
  for (int first = 0; first < W::kItems; first += kTogether) {
    Place places[kTogether];
    find_places(walk, first, places);
    Vector<T, kSize> vectors[kTensors][kTogether];
    int n = 0;
    (load_batch<T, kSize>(places, cursors, vectors[n++]), ...);
    if (first == 0) loaded();
#pragma unroll(kInTurn ? 1 : kTogether)
    for (int i = 0; i < kTogether; ++i) {
      Vector<T, kSize> here[kTensors];
#pragma unroll
      for (int t = 0; t < kTensors; ++t) here[t] = vectors[t][kInTurn ? 0 : i];
      f(kInTurn ? walk.place(first + i) : places[i], here);
      if constexpr (kInTurn) {
#pragma unroll
        for (int t = 0; t < kTensors; ++t) turn<kTogether>(vectors[t]);
      }
    }
  }
}

// The gradient before the activation. `other`: of the output or the residual.
template <typename T, int kSize, int kColumns>
__device__ __forceinline__ void before_activation(const ChannelEpilogue<T>& epilogue, const Vector<T, kSize>& dy,
                                                  const Vector<T, kSize>& x, const Vector<T, kSize>& other,
                                                  const Acc<T> (&center)[kColumns], const Acc<T> (&scale)[kColumns],
                                                  const Acc<T> (&shift)[kColumns], Acc<T> (&gradient)[kSize]) {
  Acc<T> z[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const int c = k % kColumns;
    z[k] = epilogue.from_output ? other[k] : (x[k] - center[c]) * scale[c] + shift[c] + other[k];
  }
  before_activation<T, kSize>(epilogue.activation, epilogue.negative_slope, dy, z, gradient);
}

template <typename T, Layout kLayout, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kSize > 1 ? 2 : 1)
    moments_kernel(const Plan plan, const ChannelTensor<const T> x, ChunkMoments* partials) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kColumns = W::kColumns;
  NORMOPS_SHARED(A, shared_sums, W::kShared * kColumns);
  NORMOPS_SHARED(A, shared_squares, W::kShared * 2 * kColumns);
  const W walk(plan);

  Place places[W::kItems];
  find_places(walk, 0, places);
  Batch<T, kSize, W::kItems> values;
  auto cursor = walk.cursor(x);
  values.load(places, cursor);
  const A inverse = reciprocal(A(walk.count()));
  A center[kColumns] = {};
  if (plan.centered) {
#pragma unroll
    for (int i = 0; i < W::kItems; ++i) {  // zeros where there is nothing
      A item[kColumns] = {};
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        item[k % kColumns] = k < kColumns ? values.vectors[i][k] : item[k % kColumns] + values.vectors[i][k];
      }
#pragma unroll
      for (int k = 0; k < kColumns; ++k) center[k] += item[k];
    }
    walk.sum(center, shared_sums);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) center[k] *= inverse;
  }
  // Deviations from the rounded mean, whose own mean is what rounding lost.
  A sums[2 * kColumns] = {};
#pragma unroll
  for (int i = 0; i < W::kItems; ++i) {
    if (!places[i].there) continue;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A d = values.vectors[i][k] - center[k % kColumns];
      sums[k % kColumns] += d;
      sums[kColumns + k % kColumns] += d * d;
    }
  }
  walk.totals(sums, shared_squares, center, plan.centered ? shared_sums : nullptr,
              [&](uint32_t column, A deviations, A squares, A sum) {
                const A low = plan.centered ? deviations * inverse : A(0);
                const A mean = kLayout == Layout::kContiguous ? sum : sum * inverse;
                partials[walk.partial(column)] = {double(mean) + low, double(squares - deviations * low)};
              });
}

template <typename T, Layout kLayout, int kSize, bool kEpilogue>
__global__ void __launch_bounds__(kWalkThreads, kSize > 1 ? 2 : 1)
    grad_sums_kernel(const Plan plan, const ChannelTensor<const T> dy, const ChannelTensor<const T> x,
                     const double* mean, ChunkGradients* partials, const EpilogueIf<T, kEpilogue> epilogue) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kColumns = W::kColumns;
  NORMOPS_SHARED(A, shared, W::kShared * 2 * kColumns);
  const W walk(plan);
  auto at_dy = walk.cursor(dy);
  auto at_x = walk.cursor(x);

  A center[kColumns] = {}, sums[2 * kColumns] = {}, scale[kColumns], shift[kColumns];
  const auto loaded = [&] {  // behind the first reads, which need not wait for it
    if (walk.active()) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        center[k] = A(mean[walk.row * plan.groups + plan.by_group.quotient(walk.column + k)]);
      }
    }
    if constexpr (kEpilogue) {
      load_coefficients(walk, epilogue.coefficients.scale, A(1), scale);
      load_coefficients(walk, epilogue.coefficients.shift, A(0), shift);
    }
  };
  const auto add = [&](const Place&, const Vector<T, kSize>* of) {  // zeros where there is nothing
    A grads[kSize];
    if constexpr (kEpilogue) {
      before_activation(epilogue, of[0], of[1], of[2], center, scale, shift, grads);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) grads[k] = of[0][k];
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      sums[k % kColumns] += grads[k];
      sums[kColumns + k % kColumns] += grads[k] * (of[1][k] - center[k % kColumns]);
    }
  };
  if constexpr (kEpilogue) {
    auto at_other = optional_cursor(walk, epilogue.other);
    each_vector<T, kSize, true>(walk, loaded, add, at_dy, at_x, at_other);
  } else {
    each_vector<T, kSize, false>(walk, loaded, add, at_dy, at_x);
  }
  walk.totals(sums, shared, center, static_cast<const A*>(nullptr), [&](uint32_t column, A sum_dy, A sum_dy_x, A) {
    partials[walk.partial(column)] = {double(sum_dy), double(sum_dy_x)};
  });
}

// Blocks of stage 3 that a multiprocessor should hold.
constexpr int last_stage_blocks(int size, bool more) { return size == 1 ? 1 : more ? 2 : 3; }

template <typename T, Layout kLayout, int kSize, bool kEpilogue>
__global__ void __launch_bounds__(kWalkThreads, last_stage_blocks(kSize, kEpilogue))
    apply_kernel(const Plan plan, const ChannelTensor<const T> x, const ChannelTensor<T> y,
                 const Coefficients<Acc<T>> coefficients, const EpilogueIf<T, kEpilogue> epilogue) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kColumns = W::kColumns;
  const W walk(plan, /*reverse=*/true);
  auto at_x = walk.cursor(x);
  auto at_y = walk.cursor(y);

  A center[kColumns], scale[kColumns], shift[kColumns];
  load_coefficients(walk, coefficients.center, A(0), center);
  load_coefficients(walk, coefficients.scale, A(1), scale);
  load_coefficients(walk, coefficients.shift, A(0), shift);
  const auto finish = [&](const Place& place, const Vector<T, kSize>* of) {
    A result[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      result[k] = (of[0][k] - center[k % kColumns]) * scale[k % kColumns] + shift[k % kColumns];
    }
    if constexpr (kEpilogue) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) result[k] += of[1][k];
      activate(epilogue.activation, epilogue.negative_slope, result);
    }
    T* const to = at_y.next(place);
    if (place.there) store_rounded<kSize>(to, result);
  };
  const auto loaded = [] {};
  if constexpr (kEpilogue) {
    auto at_residual = optional_cursor(walk, epilogue.other);
    each_vector<T, kSize, true>(walk, loaded, finish, at_x, at_residual);
  } else {
    each_vector<T, kSize, false>(walk, loaded, finish, at_x);
  }
}

template <typename T, Layout kLayout, int kSize, bool kEpilogue>
__global__ void __launch_bounds__(kWalkThreads, last_stage_blocks(kSize, kEpilogue))
    grad_apply_kernel(const Plan plan, const ChannelTensor<const T> dy, const ChannelTensor<const T> x,
                      const ChannelTensor<T> dx, const Coefficients<Acc<T>> coefficients,
                      const EpilogueIf<T, kEpilogue> epilogue) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kColumns = W::kColumns;
  const W walk(plan, /*reverse=*/true);
  auto at_dy = walk.cursor(dy);
  auto at_x = walk.cursor(x);
  auto at_dx = walk.cursor(dx);

  A center[kColumns], scale[kColumns], slope[kColumns], shift[kColumns];
  load_coefficients(walk, coefficients.center, A(0), center);
  load_coefficients(walk, coefficients.scale, A(1), scale);
  load_coefficients(walk, coefficients.slope, A(0), slope);
  load_coefficients(walk, coefficients.shift, A(0), shift);
  const auto store = [&](const Place& place, const auto& grads, const Vector<T, kSize>& values) {
    A result[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const int c = k % kColumns;
      result[k] = grads[k] * scale[c] + ((values[k] - center[c]) * slope[c] + shift[c]);
    }
    T* const to = at_dx.next(place);
    if (place.there) store_rounded<kSize>(to, result);
  };
  const auto loaded = [] {};
  if constexpr (kEpilogue) {
    auto at_other = optional_cursor(walk, epilogue.other);
    auto at_dresidual = walk.cursor(epilogue.dresidual);
    A forward_shift[kColumns];
    load_coefficients(walk, epilogue.coefficients.shift, A(0), forward_shift);
    const auto finish = [&](const Place& place, const Vector<T, kSize>* of) {
      A grads[kSize];
      before_activation(epilogue, of[0], of[1], of[2], center, scale, forward_shift, grads);
      if (epilogue.dresidual.data) {
        T* const to = at_dresidual.next(place);
        if (place.there) store_rounded<kSize>(to, grads);
      }
      if (dx.data) store(place, grads, of[1]);
    };
    each_vector<T, kSize, true>(walk, loaded, finish, at_dy, at_x, at_other);
  } else {
    each_vector<T, kSize, false>(
        walk, loaded, [&](const Place& place, const Vector<T, kSize>* of) { store(place, of[0], of[1]); }, at_dy, at_x);
  }
}

}  // namespace normops::cuda
