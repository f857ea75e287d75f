// Launches the row engine: chooses how many threads share a row and how much each of them holds. What no block and no
// cluster can hold is sent to long_row.cu.

#include "row.h"

#include <type_traits>

#include "channel.h"
#include "long_row.h"
#include "row_backward.cuh"
#include "row_forward.cuh"

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

  // The fewest that let a warp, of at least `lanes(items)`, hold the row; where none do, the fewest from kManyItems on
  // that let a block, of at most `threads(items)` threads; and where not even those do, the most, and more threads than
  // there can be.
  template <typename F, typename G>
  static Shape spread(int64_t vectors, const F& threads, const G& lanes) {
    constexpr int kTooMany = 16;
    Shape shape{0, 0};
    [[maybe_unused]] const auto by_warp = [&](int items) {
      int team = lanes(items);
      while (team < kWarp && team * items < vectors) team *= 2;
      shape = {items, team};
      return items < kTooMany && team * items >= vectors;
    };
    [[maybe_unused]] const auto by_block = [&](int items) {
      shape = {items, int(std::min<int64_t>(INT32_MAX, ceil_div(ceil_div(vectors, items), kWarp) * kWarp))};
      return items >= std::min(kManyItems, kMost) && shape.threads <= threads(items);
    };
    static_cast<void>((by_warp(kItems) || ...) || (by_block(kItems) || ...));
    return shape;
  }
  template <typename F>
  static void with(int items, const F& f) {
    ((items == kItems ? f(std::integral_constant<int, kItems>{}) : void()), ...);
  }
};

// What fits in registers: in the forward x; in the backward x, dy, weight and the sums for dweight and dbias, or, with
// those sums in shared memory, up to twice as much of the others. Element by element less fits, as each takes a
// register.
template <typename T, bool kTakesVectors, bool kWithExtras>
struct Ladder {
  static constexpr bool kExtras = kWithExtras, kClusters = kTakesVectors;
  static constexpr int kSize = kTakesVectors ? kFullVector<T> : 1;
  // With extras there are fewer kernels, and none with sums in shared memory.
  using Forward =
      std::conditional_t<kTakesVectors, std::conditional_t<kExtras, Items<2, 8>, Items<1, 2, 4, 8, 16>>,
                         std::conditional_t<sizeof(T) == 8, std::conditional_t<kExtras, Items<8>, Items<4, 8>>,
                                            std::conditional_t<kExtras, Items<12>, Items<4, 12>>>>;
  using Backward = std::conditional_t<
      kTakesVectors,
      std::conditional_t<kExtras, std::conditional_t<sizeof(T) == 4, Items<4>, Items<2>>,
                         std::conditional_t<sizeof(T) == 2, Items<1, 2>, Items<1, 2, 4>>>,
      std::conditional_t<sizeof(T) == 8, Items<4>, std::conditional_t<kExtras, Items<8>, Items<4, 8>>>>;
  using BackwardShared =
      std::conditional_t<kTakesVectors && !kExtras, std::conditional_t<sizeof(T) == 2, Items<4>, Items<6>>, Items<>>;
};

static_assert(Ladder<c10::Half, true, false>::Backward::kMost == backward_many(2, 8) &&
              Ladder<float, true, false>::Backward::kMost == backward_many(4, 4) &&
              Ladder<double, true, false>::Backward::kMost == backward_many(8, 2) &&
              Ladder<float, false, false>::Backward::kMost == backward_many(4, 1) &&
              Ladder<double, false, false>::Backward::kMost == backward_many(8, 1));

template <typename T, typename Args, typename F>
void with_ladder(const Args& args, const F& f) {
  const auto with = [&](auto vectors) {
    args.extras ? f(Ladder<T, vectors.value, true>{}) : f(Ladder<T, vectors.value, false>{});
  };
  args.vectors ? with(std::true_type{}) : with(std::false_type{});
}

// A row takes vectors if its length is made of them and it starts on a boundary, wherever in the batch it lies.
template <typename T>
bool on_boundary(const void* data, int64_t rows, int64_t length, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && length % kFullVector<T> == 0 &&
         (rows <= 1 || stride % kFullVector<T> == 0);
}

template <template <typename> typename Args, typename T>
bool extras_on_boundary(const Args<T>& a) {
  const RowExtras<T>& e = a.extras;
  return on_boundary<T>(e.other.data, a.rows, a.length, e.other.stride) &&
         on_boundary<T>(e.grad_sum.data, a.rows, a.length, e.grad_sum.stride) &&
         on_boundary<T>(e.made, a.rows, a.length, a.length);
}

// Blocks of a cluster that are enough for rows that a block cannot hold, and the elements of each one's part; or 0.
struct Clusters {
  int blocks = 0, part = 0, threads = 0;

  Clusters() = default;
  Clusters(const Device& device, int64_t vectors, int size, int items, int most_threads) {
    constexpr int kPortable = 8;
    const int64_t most = int64_t(items) * most_threads;
    if (!device.clusters || vectors > kPortable * most) return;
    blocks = 2;
    while (blocks * most < vectors) blocks *= 2;
    const int64_t of_block = ceil_div(vectors, blocks);
    part = int(of_block) * size;
    threads = int(ceil_div(ceil_div(of_block, items), kWarp) * kWarp);
  }
};

struct ForwardShape {
  Shape shape;
  Clusters clusters;

  template <typename L>
  ForwardShape(L, const Device& device, int64_t length) {
    // Parameters of so many vectors are read again for each row that a block has: the first-level cache does not keep
    // them. Two rows at a time need them once.
    constexpr int64_t kManyVectors = 4096;
    const auto most = [](int items) { return forward_threads(L::kSize, items, L::kExtras); };
    const int64_t vectors = ceil_div(length, L::kSize);
    shape = L::Forward::spread(vectors, most, [](int) { return 1; });
    if (!L::kClusters) return;
    if (!L::kExtras && vectors >= kManyVectors) {
      clusters = Clusters(device, vectors, L::kSize, kManyItems, most(kManyItems));
      if (clusters.blocks > 0) shape.items = kManyItems;
    }
    if (clusters.blocks == 0 && !fits_block<L>()) {
      clusters = Clusters(device, vectors, L::kSize, shape.items, most(shape.items));
    }
  }
  template <typename L>
  bool fits_block() const {
    return shape.threads <= forward_threads(L::kSize, shape.items, L::kExtras);
  }
};

// The type of the parameters as a value: that of the elements, or that of the arithmetic.
template <typename T, typename F>
void with_parameter_type(const RowParameters& parameters, const F& f) {
  if (parameters.as_elements) {
    f(T{});
  } else {
    f(Acc<T>{});
  }
}

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// Sums for dweight and, behind them, dbias, as far as they are wanted, of so many blocks.
template <typename A>
void column_sums_of_pairs(const A* sums, int64_t blocks, int64_t length, AnyOutput dweight, AnyOutput dbias,
                          void* stream) {
  column_sums(sums, sums + (dweight ? length : 0), blocks, (bool(dweight) + bool(dbias)) * length, length, dweight,
              dbias, stream);
}

// Of a team: negative for a whole block.
int team_log2(int threads) {
  if (threads > kWarp) return -1;
  int log2 = 0;
  while (1 << log2 < threads) ++log2;
  return log2;
}

// Bytes of the sums for dweight and dbias of a row in shared memory, and of what the kernel needs beside them.
template <typename T>
size_t sums_bytes(int64_t length) {
  return 2 * size_t(length) * sizeof(Acc<T>);
}

// How the backward is launched: by the shape, and by whether the device has clusters.
template <typename T>
struct BackwardShape {
  Shape shape;
  RowPlace place = RowPlace::kBlock;
  bool fits = true;
  int part = 0;
  LaunchConfig config{};
  int64_t rows_per_block;

  BackwardShape(const Device& device, const RowBackward<T>& a) {
    with_ladder<T>(a, [&](auto ladder) {
      using L = decltype(ladder);
      const int64_t vectors = ceil_div(a.length, L::kSize);
      const auto threads = [](int) { return kBackwardThreads; };
      const auto lanes = [](int items) { return backward_rows(L::kSize, items, RowPlace::kBlock, L::kExtras); };
      shape = L::Backward::spread(vectors, threads, lanes);
      Clusters clusters;
      size_t bytes = 0;
      if (shape.threads > kBackwardThreads) {
        if (L::kClusters) clusters = Clusters(device, vectors, L::kSize, shape.items, kBackwardThreads);
        if (clusters.blocks > 0) {
          place = RowPlace::kCluster;
          part = clusters.part;
          shape.threads = clusters.threads;
        } else {
          place = RowPlace::kBlockAndShared;
          shape = L::BackwardShared::spread(vectors, threads, lanes);
          bytes = sums_bytes<T>(a.length);
          fits = L::BackwardShared::kMost > 0 && shape.threads <= kBackwardThreads &&
                 bytes + Device::kStaticBytes <= size_t(device.shared_bytes);
          if (!fits) return;
        }
      }
      const int block = shape.threads <= kWarp && part == 0 ? kTeamsThreads : shape.threads;
      const int teams = block / shape.threads;
      if (teams > 1) bytes = teams * a.length * sizeof(Acc<T>);
      // A turn takes this many rows; what a block adds to the sums, which is written and read again, is worth several,
      // and more of them where fewer blocks are threads enough.
      const int64_t turn = teams * backward_rows(L::kSize, shape.items, place, L::kExtras);
      const unsigned cluster = place == RowPlace::kCluster ? clusters.blocks : 1;
      const int64_t wanted = std::min<int64_t>(kMostWanted, kWantedThreads / (int64_t(block) * cluster));
      const int64_t fewest = std::clamp<int64_t>(a.rows / kFewBlocks, 1, kFewestRows);
      rows_per_block = std::clamp<int64_t>(ceil_div(a.rows, wanted), fewest, kMostRows);
      rows_per_block = std::max(rows_per_block, std::min(ceil_div(a.rows, kMostBlocks), kLongestSum * teams));
      rows_per_block = ceil_div(rows_per_block, turn) * turn;
      config = {grid_of(blocks(a) * cluster), dim3(unsigned(block)), bytes, cluster};
    });
  }
  int64_t blocks(const RowBackward<T>& a) const { return ceil_div(a.rows, rows_per_block); }
  int64_t partials(const RowBackward<T>& a) const { return blocks(a) * (bool(a.dweight) + bool(a.dbias)) * a.length; }

 private:
  static constexpr int kTeamsThreads = 256;
  static constexpr int64_t kWantedThreads = 65536, kMostWanted = 512, kMostBlocks = 1024, kFewBlocks = 32;
  static constexpr int64_t kFewestRows = 4, kMostRows = 64, kLongestSum = 256;
};

}  // namespace

template <typename T>
bool row_takes_vectors(const RowForward<T>& a) {
  return on_boundary<T>(a.x.data, a.rows, a.length, a.x.stride) && on_boundary<T>(a.y, a.rows, a.length, a.length) &&
         extras_on_boundary(a);
}

template <typename T>
bool row_takes_vectors(const RowBackward<T>& a) {
  return on_boundary<T>(a.x.data, a.rows, a.length, a.x.stride) &&
         on_boundary<T>(a.dy.data, a.rows, a.length, a.dy.stride) && on_boundary<T>(a.dx, a.rows, a.length, a.length) &&
         extras_on_boundary(a);
}

template <typename T>
bool row_fits(int device, const RowForward<T>& a) {
  bool fits = false;
  with_ladder<T>(a, [&](auto ladder) {
    using L = decltype(ladder);
    const ForwardShape launched(ladder, Device::get(device), a.length);
    fits = launched.fits_block<L>() || launched.clusters.blocks > 0;
  });
  return fits;
}

template <typename T>
bool row_fits(int device, const RowBackward<T>& a) {
  return BackwardShape<T>(Device::get(device), a).fits;
}

template <typename T>
size_t row_forward_scratch(int device, const RowForward<T>& a) {
  return row_fits(device, a) ? 0 : long_row_forward_scratch(a);
}

template <typename T>
void row_forward(int device, const RowForward<T>& a, void* memory, void* stream) {
  if (!row_fits(device, a)) return long_row_forward(a, memory, stream);
  constexpr int kThreads = 128;
  with_ladder<T>(a, [&](auto ladder) {
    using L = decltype(ladder);
    const ForwardShape launched(ladder, Device::get(device), a.length);
    with_parameter_type<T>(a.parameters, [&](auto type) {
      using W = decltype(type);
      const auto run = [&](auto kernel, const LaunchConfig& config, int team, int part) {
        check(launch(kernel, config, static_cast<cudaStream_t>(stream), a, team_log2(team), part), "row_forward");
      };
      if constexpr (L::kClusters) {
        if (const Clusters& c = launched.clusters; c.blocks > 0) {
          const auto run_cluster = [&](auto items) {
            constexpr int kItems = items.value;
            const int64_t turns = ceil_div(a.rows, forward_rows(L::kSize, kItems, !L::kExtras));
            const LaunchConfig config{grid_of(turns * c.blocks), dim3(c.threads), 0, unsigned(c.blocks)};
            run(row_forward_kernel<T, W, L::kSize, kItems, true, L::kExtras>, config, kMostThreads, c.part);
          };
          if (launched.shape.items == kManyItems) return run_cluster(std::integral_constant<int, kManyItems>{});
          return run_cluster(std::integral_constant<int, L::Forward::kMost>{});
        }
      }
      const Shape shape = launched.shape;
      const int block = shape.threads <= kWarp ? kThreads : shape.threads;
      const int64_t rows = block / shape.threads * forward_rows(L::kSize, shape.items, false);
      const LaunchConfig config{grid_of(ceil_div(a.rows, rows)), dim3(block)};
      L::Forward::with(shape.items, [&](auto items) {
        run(row_forward_kernel<T, W, L::kSize, items.value, false, L::kExtras>, config, shape.threads, 0);
      });
    });
  });
}

template <typename T>
size_t row_backward_scratch(int device, const RowBackward<T>& a) {
  const BackwardShape<T> launched(Device::get(device), a);
  return launched.fits ? launched.partials(a) * sizeof(Acc<T>) : long_row_backward_scratch(a);
}

template <typename T>
void row_backward(int device, const RowBackward<T>& a, void* memory, void* stream) {
  using A = Acc<T>;
  const BackwardShape<T> launched(Device::get(device), a);
  if (!launched.fits) return long_row_backward(a, memory, stream);
  A* const sums = static_cast<A*>(memory);
  const auto run = [&](auto kernel) {
    allow_shared<kernel.value>(Device::get(device), launched.config.shared_bytes);
    const int team = launched.place == RowPlace::kCluster ? kMostThreads : launched.shape.threads;
    check(launch(kernel.value, launched.config, static_cast<cudaStream_t>(stream), a, team_log2(team), launched.part,
                 launched.rows_per_block, sums),
          "row_backward");
  };
  with_ladder<T>(a, [&](auto ladder) {
    using L = decltype(ladder);
    with_parameter_type<T>(a.parameters, [&](auto type) {
      using W = decltype(type);
      switch (launched.place) {
        case RowPlace::kCluster:
          if constexpr (L::kClusters) {
            run(Constant<row_backward_kernel<T, W, L::kSize, L::Backward::kMost, RowPlace::kCluster, L::kExtras>>{});
          }
          break;
        case RowPlace::kBlockAndShared:
          L::BackwardShared::with(launched.shape.items, [&](auto items) {
            run(Constant<row_backward_kernel<T, W, L::kSize, items.value, RowPlace::kBlockAndShared, L::kExtras>>{});
          });
          break;
        case RowPlace::kBlock:
          L::Backward::with(launched.shape.items, [&](auto items) {
            run(Constant<row_backward_kernel<T, W, L::kSize, items.value, RowPlace::kBlock, L::kExtras>>{});
          });
      }
    });
  });
  column_sums_of_pairs(sums, launched.blocks(a), a.length, a.dweight, a.dbias, stream);
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
