// Launches the row engine: chooses how many threads share a row and how much each of them holds, and sends rows that no
// block can hold through the stages of the channel engine.

#include "row.h"

#include <type_traits>

#include "channel.h"
#include "row_kernels.cuh"
#include "scratch.h"

namespace normops::cuda {
namespace {

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// How a row is spread: `items` vectors for each of `threads` threads.
struct Shape {
  int items;
  int threads;
};

// The numbers of vectors a thread may hold, fewest first.
template <int... kItems>
struct Items {
  static constexpr int kMost = std::max({0, kItems...});

  // The fewest that let a warp hold the row; where none do, the most, and as many warps as that takes.
  static Shape spread(int64_t vectors) {
    Shape shape{0, 0};
    const auto attempt = [&](int items) {
      int threads = 1;
      while (threads < kWarp && threads * items < vectors) threads *= 2;
      shape = {items, threads};
      return threads * items >= vectors;
    };
    if (!(attempt(kItems) || ...)) shape.threads = int(ceil_div(ceil_div(vectors, kMost), kWarp) * kWarp);
    return shape;
  }
  template <typename F>
  static void with(int items, const F& f) {
    ((items == kItems ? f(std::integral_constant<int, kItems>{}) : void()), ...);
  }
};

// What fits in registers: in the forward x; in the backward x, dy, weight and the sums for dweight and dbias, or, with
// those sums in shared memory, up to twice as much of the others. Element by element less fits, as addresses take room.
template <typename T, bool kVectors>
struct Ladder;

template <typename T>
struct Ladder<T, true> {
  static constexpr int kSize = kFullVector<T>;
  using Forward = std::conditional_t<sizeof(T) == 4, Items<2, 4, 8>, Items<2, 4>>;
  using Backward = std::conditional_t<sizeof(T) == 2, Items<2>, Items<2, 4>>;
  using BackwardShared =
      std::conditional_t<sizeof(T) == 2, Items<4>, std::conditional_t<sizeof(T) == 4, Items<8>, Items<6>>>;
};
template <typename T>
struct Ladder<T, false> {
  static constexpr int kSize = 1;
  using Forward = std::conditional_t<sizeof(T) == 8, Items<4, 8>, Items<4, 12>>;
  using Backward = std::conditional_t<sizeof(T) == 8, Items<4>, Items<4, 8>>;
  using BackwardShared = Items<>;
};

template <typename T, typename F>
void with_ladder(bool vectors, const F& f) {
  if (vectors) {
    f(Ladder<T, true>{});
  } else {
    f(Ladder<T, false>{});
  }
}

// A row takes vectors if its length is made of them and it starts on a boundary, wherever in the batch it lies.
template <typename T>
bool on_boundary(const void* data, int64_t rows, int64_t length, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && length % kFullVector<T> == 0 &&
         (rows <= 1 || stride % kFullVector<T> == 0);
}

// The type of the parameters as a value: that of the elements, or that of the arithmetic.
template <typename T, typename F>
void with_parameter_type(const RowParameters& parameters, const F& f) {
  if (parameters.as_elements) {
    f(T{});
  } else {
    f(Acc<T>{});
  }
}

template <typename T>
struct BackwardLaunch {
  void (*kernel)(const RowBackward<T>, int, Acc<T>*) = nullptr;
  LaunchConfig config{};
  int threads = 0;
};

// Bytes of the sums for dweight and dbias of a row in shared memory, and of what the kernel needs beside them.
template <typename T>
size_t sums_bytes(int64_t length) {
  return 2 * size_t(length) * sizeof(Acc<T>);
}
constexpr size_t kReserved = 4 * kWarp * sizeof(double);

template <typename T>
BackwardLaunch<T> backward_launch(const Device& device, const RowBackward<T>& a) {
  constexpr int kThreads = 256;
  BackwardLaunch<T> result;
  with_ladder<T>(a.vectors, [&](auto ladder) {
    using L = decltype(ladder);
    const int64_t vectors = ceil_div(a.length, L::kSize);
    const Shape in_registers = L::Backward::spread(vectors);
    const bool shared = in_registers.threads > kBackwardThreads;
    const Shape shape = shared ? L::BackwardShared::spread(vectors) : in_registers;
    const int block = shape.threads <= kWarp ? kThreads : shape.threads;
    const int slots = block / shape.threads;
    const size_t bytes = shared ? sums_bytes<T>(a.length) : slots > 1 ? slots * a.length * sizeof(Acc<T>) : 0;
    with_parameter_type<T>(a.parameters, [&](auto type) {
      using W = decltype(type);
      const auto choose = [&](auto items, auto kept) {
        result.kernel = row_backward_kernel<T, W, L::kSize, items.value, kept.value>;
      };
      if (shared) {
        L::BackwardShared::with(shape.items, [&](auto items) { choose(items, std::true_type{}); });
      } else {
        L::Backward::with(shape.items, [&](auto items) { choose(items, std::false_type{}); });
      }
    });
    allow_shared(result.kernel, bytes);
    const int64_t most =
        int64_t(device.multiprocessors) * blocks_per_multiprocessor(device, result.kernel, block, bytes);
    result.config = {dim3(unsigned(std::min(ceil_div(a.rows, slots), most))), dim3(block), bytes};
    result.threads = shape.threads;
  });
  return result;
}

// Rows as the channel engine sees them: each is the only channel of its sample; and the matrix of rows with the
// elements of a row as channels.
Geometry rows_as_lines(int64_t rows, int64_t length) {
  return {rows, 1, length, 1, /*over_batch=*/false, Layout::kContiguous, 0};
}
Geometry rows_as_positions(int64_t rows, int64_t length) {
  return {1, length, rows, length, /*over_batch=*/true, Layout::kChannelsLast, 0};
}

template <typename T>
struct LongForward {
  Plan plan;
  ChunkMoments* partials;
  Coefficients<Acc<T>> coefficients{};

  LongForward(const RowForward<T>& a, Scratch& scratch)
      : plan(make_plan(rows_as_lines(a.rows, a.length), sizeof(T), a.vectors)) {
    plan.centered = a.centered;
    partials = scratch.take<ChunkMoments>(plan.partials());
    for (auto* array : {&coefficients.center, &coefficients.scale, &coefficients.shift}) {
      *array = scratch.take<Acc<T>>(a.rows);
    }
  }

  void run(const RowForward<T>& a, void* stream) const {
    using A = Acc<T>;
    const ChannelTensor<const T> x{a.x.data, {a.x.stride, 0, 1}};
    channel_moments(plan, x, partials, stream);
    ForwardMerge<A> merge{};
    merge.partials = partials;
    merge.weight.absent = 1;
    merge.eps = a.eps;
    merge.reciprocal = true;
    merge.mean = a.mean;
    merge.var = a.rstd;
    merge.coefficients = coefficients;
    channel_merge(plan, merge, stream);
    channel_apply(plan, x, ChannelTensor<T>{a.y, {a.length, 0, 1}}, coefficients,
                  static_cast<const A*>(a.parameters.weight), static_cast<const A*>(a.parameters.bias), stream);
  }
};

template <typename T>
struct LongBackward {
  Plan lines, positions;
  ChunkGradients* partials = nullptr;
  Coefficients<Acc<T>> coefficients{};
  Acc<T>* sums = nullptr;

  LongBackward(const RowBackward<T>& a, Scratch& scratch)
      : lines(make_plan(rows_as_lines(a.rows, a.length), sizeof(T), a.vectors)),
        positions(make_plan(rows_as_positions(a.rows, a.length), sizeof(T), a.vectors)) {
    lines.centered = a.centered;
    if (a.dx) {
      partials = scratch.take<ChunkGradients>(lines.partials());
      auto& c = coefficients;
      for (auto* array : {&c.center, &c.scale, &c.slope, &c.shift}) *array = scratch.take<Acc<T>>(a.rows);
    }
    if (a.dweight || a.dbias) sums = scratch.take<Acc<T>>(positions.cut.chunks * 2 * a.length);
  }

  void run(const RowBackward<T>& a, void* stream) const {
    using A = Acc<T>;
    const A* const weight = static_cast<const A*>(a.parameters.weight);
    if (a.dx) {
      channel_grad_sums(lines, ChannelTensor<const T>{a.dy.data, {a.dy.stride, 0, 1}},
                        ChannelTensor<const T>{a.x.data, {a.x.stride, 0, 1}}, a.mean, weight, partials, stream);
      BackwardMerge<A> merge{};
      merge.partials = partials;
      merge.weight.absent = 1;
      merge.mean = a.mean;
      merge.var = a.rstd;
      merge.reciprocal = merge.input_stats = true;
      merge.coefficients = coefficients;
      channel_grad_merge(lines, merge, stream);
    }
    long_row_backward(positions,
                      LongRowBackward<T, A>{{a.dy.data, {0, 1, a.dy.stride}},
                                            {a.x.data, {0, 1, a.x.stride}},
                                            {a.dx, {0, 1, a.length}},
                                            weight,
                                            a.mean,
                                            a.rstd,
                                            coefficients,
                                            sums},
                      stream);
    column_sums(sums, sums + a.length, positions.cut.chunks, 2 * a.length, a.length, static_cast<A*>(a.dweight),
                static_cast<A*>(a.dbias), stream);
  }
};

}  // namespace

template <typename T>
bool row_takes_vectors(const RowForward<T>& a) {
  return on_boundary<T>(a.x.data, a.rows, a.length, a.x.stride) && on_boundary<T>(a.y, a.rows, a.length, a.length);
}

template <typename T>
bool row_takes_vectors(const RowBackward<T>& a) {
  return on_boundary<T>(a.x.data, a.rows, a.length, a.x.stride) &&
         on_boundary<T>(a.dy.data, a.rows, a.length, a.dy.stride) && on_boundary<T>(a.dx, a.rows, a.length, a.length);
}

template <typename T>
bool row_fits(int, const RowForward<T>& a) {
  bool fits = false;
  with_ladder<T>(a.vectors, [&](auto ladder) {
    using L = decltype(ladder);
    fits = a.length <= int64_t(L::Forward::kMost) * L::kSize * kMostThreads;
  });
  return fits;
}

template <typename T>
bool row_fits(int device, const RowBackward<T>& a) {
  bool fits = false;
  with_ladder<T>(a.vectors, [&](auto ladder) {
    using L = decltype(ladder);
    constexpr int64_t kItem = int64_t(L::kSize) * kBackwardThreads;
    fits = a.length <= L::Backward::kMost * kItem ||
           (a.length <= L::BackwardShared::kMost * kItem &&
            sums_bytes<T>(a.length) + kReserved <= size_t(Device::use(device).shared_bytes));
  });
  return fits;
}

template <typename T>
size_t row_forward_scratch(int device, const RowForward<T>& a) {
  Scratch scratch;
  if (!row_fits(device, a)) LongForward<T>(a, scratch);
  return scratch.bytes();
}

template <typename T>
void row_forward(int device_index, const RowForward<T>& a, void* memory, void* stream) {
  if (!row_fits(device_index, a)) {
    Scratch scratch(memory);
    LongForward<T>(a, scratch).run(a, stream);
    return;
  }
  constexpr int kThreads = 128;
  with_ladder<T>(a.vectors, [&](auto ladder) {
    using L = decltype(ladder);
    const Shape shape = L::Forward::spread(ceil_div(a.length, L::kSize));
    const int block = shape.threads <= kWarp ? kThreads : shape.threads;
    const LaunchConfig config{dim3(unsigned(ceil_div(a.rows, block / shape.threads))), dim3(block)};
    with_parameter_type<T>(a.parameters, [&](auto type) {
      L::Forward::with(shape.items, [&](auto items) {
        check(launch(row_forward_kernel<T, decltype(type), L::kSize, items.value>, config,
                     static_cast<cudaStream_t>(stream), a, shape.threads),
              "row_forward");
      });
    });
  });
}

template <typename T>
size_t row_backward_scratch(int device_index, const RowBackward<T>& a) {
  Scratch scratch;
  if (!row_fits(device_index, a)) {
    LongBackward<T>(a, scratch);
  } else if (a.dweight || a.dbias) {
    const auto launch = backward_launch<T>(Device::use(device_index), a);
    scratch.take<Acc<T>>(int64_t(launch.config.grid.x) * 2 * a.length);
  }
  return scratch.bytes();
}

template <typename T>
void row_backward(int device_index, const RowBackward<T>& a, void* memory, void* stream) {
  using A = Acc<T>;
  const Device& device = Device::use(device_index);
  if (!row_fits(device_index, a)) {
    Scratch scratch(memory);
    LongBackward<T>(a, scratch).run(a, stream);
    return;
  }
  const auto [kernel, config, threads] = backward_launch<T>(device, a);
  A* const sums = a.dweight || a.dbias ? static_cast<A*>(memory) : nullptr;
  check(launch(kernel, config, static_cast<cudaStream_t>(stream), a, threads, sums), "row_backward");
  column_sums(sums, sums + a.length, config.grid.x, 2 * a.length, a.length, static_cast<A*>(a.dweight),
              static_cast<A*>(a.dbias), stream);
}

#define NORMOPS_INSTANTIATE(T)                                        \
  template bool row_takes_vectors(const RowForward<T>&);              \
  template bool row_takes_vectors(const RowBackward<T>&);             \
  template bool row_fits(int, const RowForward<T>&);                  \
  template bool row_fits(int, const RowBackward<T>&);                 \
  template size_t row_forward_scratch(int, const RowForward<T>&);     \
  template size_t row_backward_scratch(int, const RowBackward<T>&);   \
  template void row_forward(int, const RowForward<T>&, void*, void*); \
  template void row_backward(int, const RowBackward<T>&, void*, void*);
NORMOPS_INSTANTIATE(float)
NORMOPS_INSTANTIATE(double)
NORMOPS_INSTANTIATE(c10::Half)
NORMOPS_INSTANTIATE(c10::BFloat16)
#undef NORMOPS_INSTANTIATE

}  // namespace normops::cuda
