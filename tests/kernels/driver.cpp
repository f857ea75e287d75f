// Calls the kernels of csrc/cpu with shapes, strides and values out of an array of bytes, on blocks of memory that end
// where the operands do. Under libFuzzer the bytes are its own, and AddressSanitizer watches the ends; with
// NORMOPS_RANDOM they are random; with NORMOPS_THREADS, threads share each call as those of the engines do, watched by
// ThreadSanitizer.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/activation.h"
#include "../../csrc/cpu/mask.h"

namespace normops::cpu::CPU_CAPABILITY {
void add_row_forward(KernelTable&);
void add_row_backward(KernelTable&);
void add_channel_forward(KernelTable&);
void add_channel_backward(KernelTable&);
void add_epilogue(KernelTable&);
}  // namespace normops::cpu::CPU_CAPABILITY

namespace normops::cpu {
namespace {

const KernelTable& table() {
  static const KernelTable all = [] {
    KernelTable t{};
    CPU_CAPABILITY::add_row_forward(t);
    CPU_CAPABILITY::add_row_backward(t);
    CPU_CAPABILITY::add_channel_forward(t);
    CPU_CAPABILITY::add_channel_backward(t);
    CPU_CAPABILITY::add_epilogue(t);
    return t;
  }();
  return all;
}

}  // namespace

const KernelTable& kernels() { return table(); }

namespace {

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

// Decisions out of the bytes, zeros when they are used up; and values, of which a call needs too many, made at random
// out of a seed among them.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size)
      : next_(data), end_(data + size), constant_(!flag()), state_(below(1 << 24) << 8) {}

  int64_t below(int64_t limit) {
    uint32_t value = 0;
    for (int i = 0; i < 3; ++i) value = value << 8 | byte();
    return value % limit;
  }
  // Mostly small, now and then large.
  int64_t length(int64_t most) { return byte() % 4 ? 1 + below(std::min<int64_t>(most, 70)) : 1 + below(most); }
  bool flag() { return byte() % 2; }
  double value() {
    if (!constant_) state_ = state_ * 1664525 + 1013904223;
    return (int(state_ >> 24) - 128) / 16.0;
  }

 private:
  uint8_t byte() { return next_ < end_ ? *next_++ : 0; }
  const uint8_t *next_, *end_;
  bool constant_;
  uint32_t state_;
};

// `count` elements behind `offset` others, with nothing behind them: a block of malloc.
template <typename T>
class Block {
 public:
  Block(int64_t count, int64_t offset = 0) : size_(count + offset), offset_(offset), data_(new T[size_]) {}
  template <typename F>
  Block& fill(F f) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = T(f());
    return *this;
  }
  T* get() const { return data_.get() + offset_; }

 private:
  int64_t size_, offset_;
  std::unique_ptr<T[]> data_;
};

// Runs f(begin, end) over [0, items) in a few ranges: one after the other, or on threads of their own.
template <typename F>
void share(int64_t items, int64_t ranges, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < ranges; ++i) {
    const int64_t begin = items * i / ranges, end = items * (i + 1) / ranges;
    if (begin == end) continue;
#ifdef NORMOPS_THREADS
    threads.emplace_back([&f, begin, end] { f(begin, end); });
#else
    f(begin, end);
#endif
  }
  for (std::thread& thread : threads) thread.join();
}

template <typename T>
bool finite(const T* values, int64_t count) {
  return std::all_of(values, values + count, [](T value) { return std::isfinite(double(value)); });
}

// A mask of a tile, through the kernels that know masks: what is not valid is not a number, and comes out as zero.
template <typename T>
void masked(const Geometry& g, const Lines<const T>& x, const Lines<const T>& dy, const Lines<T>& y, Bytes& bytes) {
  using A = Acc<T>;
  const Kernels<T>& kernel = table().of<T>();
  const int64_t elements = g.positions * g.width, sparse = 1 + bytes.below(8);
  const Block<bool> flags(elements);
  for (int64_t i = 0; i < elements; ++i) flags.get()[i] = int64_t(bytes.value() + 8) % 8 < sparse;
  flags.get()[bytes.below(elements)] = true;
  const Mask mask(g, flags.get());
  const MaskWords<T> words(g, &mask);
  const Tile whole{g.layout, g.channels, g.positions, g.width};
  const Span<T> span(whole, &mask, words, 0);
  const Block<T> spoilt((g.layout == Layout::kContiguous ? g.channels : g.positions) * x.stride);
  const Lines<T> in{spoilt.get(), x.stride};
  const auto each = [&](const auto& f) {
    for (int64_t c = 0; c < g.channels; ++c) {
      for (int64_t i = 0; i < elements; ++i) {
        const bool contiguous = g.layout == Layout::kContiguous;
        f(flags.get()[i], contiguous ? c : i / g.width, contiguous ? i : c * g.width + i % g.width);
      }
    }
  };
  each([&](bool valid, int64_t line, int64_t j) { in[line][j] = valid ? x[line][j] : T(std::nan("")); });
  const Lines<const T> own = span.of(Lines<const T>{in.data, in.stride});
  const Block<double> mean(g.channels), m2(g.channels), sum_dy(g.channels), sum_dy_x(g.channels);
  const Block<A> center(g.channels), ones(g.channels);
  kernel.moments(span.tile, own, mean.get(), m2.get());
  expect(finite(m2.get(), g.channels), "a sum of squares with a mask is not finite");
  for (int64_t c = 0; c < g.channels; ++c) {
    center.get()[c] = A(mean.get()[c]);
    ones.get()[c] = 1;
  }
  kernel.grad_sums(span.tile, span.of(dy), own, center.get(), sum_dy.get(), sum_dy_x.get());
  expect(finite(sum_dy_x.get(), g.channels), "a sum with a mask is not finite");
  const auto check = [&] {
    span.clear_around(y);
    each([&](bool valid, int64_t line, int64_t j) {
      const double value = double(y[line][j]);
      expect(valid ? std::isfinite(value) : value == 0, "an output with a mask");
    });
  };
  kernel.apply(span.tile, own, span.of(y), {center.get(), ones.get(), center.get()});
  check();
  kernel.grad_apply(span.tile, own, span.of(dy), span.of(y), {center.get(), ones.get(), ones.get(), center.get()});
  check();
  span.clear_within(y);
  check();
}

template <typename T>
void rows(const Kernels<T>& kernel, Bytes& bytes) {
  using A = Acc<T>;
  const int64_t length = bytes.length(6000), count = bytes.length(20), gap = bytes.below(3), offset = bytes.below(3);
  const bool scaled = bytes.flag(), shifted = bytes.flag(), centered = bytes.flag();
  const bool sums = bytes.flag(), input = bytes.flag() || !sums;
  const int64_t ranges = 1 + bytes.below(4);
  const int64_t stride = length + gap, padded = (length + kernel.pack_size - 1) / kernel.pack_size * kernel.pack_size;
  const auto value = [&] { return bytes.value(); };
  const Block<T> x = std::move(Block<T>((count - 1) * stride + length, offset).fill(value));
  const Block<T> dy = std::move(Block<T>((count - 1) * stride + length, offset).fill(value));
  const Block<T> y(count * length, offset), dx(count * length, offset);
  const Block<A> natural = std::move(Block<A>(length).fill(value));
  const Block<A> weight(padded), bias(padded);
  const Block<T> own = std::move(Block<T>(length, offset).fill(value));
  kernel.pack_parameter(natural.get(), length, weight.get());
  kernel.widen_parameter(own.get(), length, bias.get());
  const Block<double> mean(count), rstd(count);
  const RowForward<T> forward{length,
                              {x.get(), stride},
                              {y.get(), length},
                              scaled ? weight.get() : nullptr,
                              shifted ? bias.get() : nullptr,
                              1e-5,
                              centered,
                              mean.get(),
                              rstd.get()};
  share(count, ranges, [&](int64_t begin, int64_t end) { kernel.row_forward(forward, begin, end); });
  expect(finite(y.get(), count * length) && finite(rstd.get(), count), "a row is not finite");
  double exact = 0;
  for (int64_t i = 0; centered && i < length; ++i) exact += double(x.get()[i]) / double(length);
  // Inputs are below 8, and sums are taken in chains of less than 256 floats.
  expect(!centered || std::abs(exact - mean.get()[0]) < 1e-3, "a mean");

  // Each range has sums of its own, as each block of rows of the engine.
  Block<A> blocks(ranges * 2 * padded);
  blocks.fill([] { return 0; });
  const RowBackward<T> backward{length,
                                {dy.get(), stride},
                                {x.get(), stride},
                                {input ? dx.get() : nullptr, length},
                                scaled ? weight.get() : nullptr,
                                mean.get(),
                                rstd.get(),
                                centered,
                                nullptr,
                                nullptr};
  share(ranges, ranges, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      RowBackward<T> part = backward;
      if (sums) {
        part.dweight = blocks.get() + 2 * i * padded;
        part.dbias = part.dweight + padded;
      }
      kernel.row_backward(part, count * i / ranges, count * (i + 1) / ranges);
    }
  });
  expect(!input || finite(dx.get(), count * length), "a gradient of rows is not finite");
  if (input) {
    RowBackward<T> in_place = backward;
    in_place.dx = {dy.get(), stride};
    kernel.row_backward(in_place, 0, count);
    for (int64_t i = 0; i < count; ++i) {
      expect(std::memcmp(dy.get() + i * stride, dx.get() + i * length, length * sizeof(T)) == 0, "a row in place");
    }
  }
  const Block<A> total(length);
  kernel.sum_blocks(blocks.get(), ranges, 2 * padded, length, total.get());
  expect(finite(total.get(), length), "a gradient of a weight is not finite");
}

template <typename T>
void channels(const Kernels<T>& kernel, Bytes& bytes) {
  using A = Acc<T>;
  const bool last = bytes.flag();
  const int64_t channels = bytes.length(last ? 5000 : 40), positions = bytes.length(last ? 60 : 6000);
  const int64_t width = last && channels < 100 && bytes.flag() ? bytes.length(kWidest) : 1;
  const int64_t lines = last ? positions : channels, length = last ? channels * width : positions;
  // Lines of few channels lie side by side: the engine sees to that.
  const int64_t gap = last && channels <= kNarrowChannels ? 0 : bytes.below(3), stride = length + gap;
  const int64_t elements = (lines - 1) * stride + length, offset = bytes.below(3), ranges = 1 + bytes.below(3);
  const bool plus = bytes.flag();
  const activations::LinearPieces pieces{0, 0, bytes.flag() ? 6 : activations::kInfinity};
  const Activation activation{int(1 + bytes.below(std::tuple_size_v<Activations>))};
  const auto value = [&] { return bytes.value(); };
  const Block<T> x = std::move(Block<T>(elements, offset).fill(value));
  const Block<T> dy = std::move(Block<T>(elements, offset).fill(value));
  const Block<T> y(elements, offset), dx(elements, offset), dz(elements, offset);
  const Block<A> z(lines * length), derivative(lines * length);
  const Layout layout = last ? Layout::kChannelsLast : Layout::kContiguous;
  const Block<double> mean(channels), m2(channels), sum_dy(channels), sum_dy_x(channels);
  const Block<A> center(channels), scale(channels), shift(channels), slope(channels);

  // Threads take channels of planes, and positions of lines.
  const auto tile_of = [&](int64_t begin, int64_t end) {
    return last ? Tile{layout, channels, end - begin, width} : Tile{layout, end - begin, positions, width};
  };
  const auto at = [&](auto* data, int64_t line) {
    return Lines<std::remove_pointer_t<decltype(data)>>{data + line * stride, stride};
  };
  const auto in = [&](const Block<T>& block, int64_t line) { return at(static_cast<const T*>(block.get()), line); };
  const auto own = [&](const auto& array, int64_t line) { return array.get() + (last ? 0 : line); };

  const Tile all = tile_of(0, lines);
  kernel.moments(all, in(x, 0), mean.get(), m2.get());
  for (int64_t c = 0; c < channels; ++c) {
    expect(m2.get()[c] > -1e-3 * double(positions * width), "a negative sum of squares");
    center.get()[c] = A(mean.get()[c]);
    scale.get()[c] = A(1 / std::sqrt(std::abs(m2.get()[c]) / double(positions * width) + 1e-5));
    shift.get()[c] = A(0.5);
    slope.get()[c] = A(-0.25);
  }
  kernel.grad_sums(all, in(dy, 0), in(x, 0), center.get(), sum_dy.get(), sum_dy_x.get());
  expect(finite(sum_dy_x.get(), channels), "a sum is not finite");
  if (bytes.flag()) {
    const Geometry g{1, channels, positions, channels, true, layout, positions, width};
    masked<T>(g, in(x, 0), in(dy, 0), at(y.get(), 0), bytes);
  }
  const Kernels<A>& arithmetic = table().of<A>();
  share(lines, ranges, [&](int64_t begin, int64_t end) {
    const Tile tile = tile_of(begin, end);
    const ForwardCoefficients<A> forward{own(center, begin), own(scale, begin), own(shift, begin)};
    const BackwardCoefficients<A> backward{own(center, begin), own(scale, begin), own(slope, begin), own(shift, begin)};
    const Lines<const T> residual = plus ? in(dy, begin) : Lines<const T>{nullptr, 0};
    const Lines<A> wide{z.get() + begin * length, length};
    kernel.apply(tile, in(x, begin), at(y.get(), begin), forward);
    kernel.grad_apply(tile, in(dy, begin), in(x, begin), at(dx.get(), begin), backward);
    kernel.scale(tile, in(dy, begin), at(dx.get(), begin), own(scale, begin));
    kernel.pre_activation(tile, in(x, begin), residual, wide, forward);
    kernel.apply_linear(tile, in(x, begin), residual, at(y.get(), begin), forward, pieces);
    kernel.gate(tile, in(dy, begin), in(x, begin), at(dz.get(), begin), forward, pieces);
    kernel.gate_by_output(in(dy, begin), in(y, begin), at(dz.get(), begin), end - begin, length, pieces);
    kernel.sum_lines(in(x, begin), in(dy, begin), at(dx.get(), begin), end - begin, length);
    kernel.add_lines(in(x, begin), wide, end - begin, length);
    if constexpr (!std::is_same_v<T, A>) {
      kernel.widen_lines(in(x, begin), wide, end - begin, length);
      kernel.narrow_lines({wide.data, wide.stride}, at(dz.get(), begin), end - begin, length);
    }
    const Lines<A> slopes{derivative.get() + begin * length, length};
    const Lines<const A> before{wide.data, wide.stride};
    arithmetic.differentiate(activation, before, before, slopes, end - begin, length);
    arithmetic.activate(activation, wide, end - begin, length);
  });
  for (int64_t line = 0; line < lines; ++line) {
    expect(finite(y.get() + line * stride, length), "an output is not finite");
    expect(finite(z.get() + line * length, length), "an activation is not finite");
    expect(finite(derivative.get() + line * length, length), "a derivative is not finite");
  }
}

void call(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const int64_t type = bytes.below(4);
  const auto run = [&](const auto& kernel) { bytes.flag() ? rows(kernel, bytes) : channels(kernel, bytes); };
  type == 0 ? run(table().f32) : type == 1 ? run(table().f64) : type == 2 ? run(table().f16) : run(table().bf16);
}

}  // namespace
}  // namespace normops::cpu

#ifdef NORMOPS_RANDOM

int main(int, char** arguments) {
  std::mt19937 random(7);
  const int calls = std::atoi(arguments[1]);
  for (int i = 0; i < calls; ++i) {
    std::vector<uint8_t> bytes(64);
    for (uint8_t& byte : bytes) byte = uint8_t(random());
    normops::cpu::call(bytes.data(), bytes.size());
  }
  std::printf("%d calls\n", calls);
}

#else

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  normops::cpu::call(data, size);
  return 0;
}

#endif
