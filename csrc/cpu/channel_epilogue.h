#pragma once

// The last stage of the channel engine with what follows the layer: a residual that is added, an activation. A tile is
// taken in pieces that stay in the nearest cache, through the engine's own kernels and those of epilogue.cpp
// one after the other, so memory is read and written once. In 16-bit types all of that is done in float, between a
// first loop that widens and a last one that narrows: nothing is rounded on the way.

#include <algorithm>
#include <memory>
#include <type_traits>

#include "../activation.h"
#include "kernels.h"

namespace normops::cpu {

// Elements of a piece; and the fewest lines of a channels_last tile, where every sum takes a pass over the channels.
constexpr int64_t kPieceElements = 2048, kPieceLines = 32;

struct Piece {
  Tile tile;
  int64_t channel, position;  // where it begins

  int64_t lines() const { return tile.layout == Layout::kContiguous ? tile.channels : tile.positions; }
  int64_t length() const { return tile.layout == Layout::kContiguous ? tile.positions : tile.channels * tile.width; }

  template <typename T>
  Lines<T> of(const Lines<T>& whole) const {
    if (whole.data == nullptr) return {};
    return {tile.layout == Layout::kContiguous ? whole[channel] + position : whole[position], whole.stride};
  }
  template <typename A>
  ForwardCoefficients<A> of(const ForwardCoefficients<A>& k) const {
    return {k.center + channel, k.scale + channel, k.shift + channel};
  }
  template <typename T>
  Lines<T> in(T* memory) const {
    return {memory, length()};
  }
};

// Sums are cut where pieces are, so their positions are a matter of the shape alone: how many channels a tile of wide
// ones has depends on the threads and the cache.
template <typename F>
void for_pieces(const Tile& tile, const F& f) {
  const bool contiguous = tile.layout == Layout::kContiguous;
  const int64_t lines =
      tile.width > 1 ? kPieceLines : std::max(kPieceLines, kPieceElements / std::max<int64_t>(1, tile.channels));
  const int64_t positions = std::min(tile.positions, contiguous ? kPieceElements : lines);
  const int64_t channels =
      contiguous ? std::max<int64_t>(1, kPieceElements / std::max<int64_t>(1, positions)) : tile.channels;
  for (int64_t c = 0; c < tile.channels; c += channels) {
    for (int64_t p = 0; p < tile.positions; p += positions) {
      f(Piece{{tile.layout, std::min(channels, tile.channels - c), std::min(positions, tile.positions - p), tile.width},
              c,
              p});
    }
  }
}

// Memory for the intermediate values of a piece of any tile with so many channels.
template <typename A>
std::unique_ptr<A[]> piece_memory(int64_t channels, int64_t width) {
  return std::unique_ptr<A[]>(new A[std::max(kPieceElements, kPieceLines * channels * width)]);
}

template <typename T>
Lines<const T> read_only(const Lines<T>& lines) {
  return {lines.data, lines.stride};
}

// y = activation((x - center) * scale + shift + residual)
template <typename T>
void apply_epilogue(const Tile& tile, Lines<const T> x, Lines<T> y, const ForwardCoefficients<Acc<T>>& k,
                    const Activation& activation, Lines<const T> residual) {
  using A = Acc<T>;
  const Kernels<T>& kernel = kernels().of<T>();
  if (const auto pieces = linear_pieces(activation)) {
    kernel.apply_linear(tile, x, residual, y, k, *pieces);
    return;
  }
  constexpr bool kWide = std::is_same_v<T, A>;
  const auto memory = kWide ? nullptr : piece_memory<A>(tile.channels, tile.width);
  for_pieces(tile, [&](const Piece& piece) {
    const int64_t lines = piece.lines(), length = piece.length();
    Lines<A> z{};
    if constexpr (kWide)
      z = piece.of(y);
    else
      z = piece.in(memory.get());
    kernel.pre_activation(piece.tile, piece.of(x), piece.of(residual), z, piece.of(k));
    kernels().of<A>().activate(activation, z, lines, length);
    if constexpr (!kWide) kernel.narrow_lines(read_only(z), piece.of(y), lines, length);
  });
}

// The way back through the epilogue: makes dz, the gradient before the activation, and takes its sums while it is in
// cache. dz goes where a result will be, that of the residual or dx, and is rounded to its type; nowhere if neither is
// wanted. The sums are of values that are not rounded; relu rounds none, and of leaky_relu's slope * dy the sums are of
// rounded ones.
template <typename T>
struct EpilogueGradient {
  using A = Acc<T>;

  Tile tile;
  Lines<const T> dy, x;
  ForwardCoefficients<A> k;  // to make anew what the activation was applied to
  Activation activation;
  Lines<const T> residual, output;  // the latter, where its data is not null, in place of x and the former
  Lines<T> dz;

  // Sums of dz and of dz * (x - center) per channel, if wanted.
  void run(double* sum_dz, double* sum_dz_x) const {
    if (sum_dz) {
      std::fill_n(sum_dz, tile.channels, 0.0);
      std::fill_n(sum_dz_x, tile.channels, 0.0);
    }
    const auto pieces = linear_pieces(activation);
    if (pieces && (output.data || !residual.data))
      gated(*pieces, sum_dz, sum_dz_x);
    else
      in_steps(sum_dz, sum_dz_x);
  }

 private:
  static const Kernels<T>& kernel() { return kernels().of<T>(); }
  static const Kernels<A>& wide() { return kernels().of<A>(); }

  // One loop for dz and the plain kernel for its sums.
  void gated(const activations::LinearPieces& pieces, double* sum_dz, double* sum_dz_x) const {
    const auto part = sums_memory(sum_dz);
    const auto memory = dz.data ? nullptr : piece_memory<T>(tile.channels, tile.width);
    for_pieces(tile, [&](const Piece& piece) {
      const Lines<T> to = dz.data ? piece.of(dz) : piece.in(memory.get());
      if (output.data)
        kernel().gate_by_output(piece.of(dy), piece.of(output), to, piece.lines(), piece.length(), pieces);
      else
        kernel().gate(piece.tile, piece.of(dy), piece.of(x), to, piece.of(k), pieces);
      if (!sum_dz) return;
      take_sums(piece, read_only(to), piece.of(x), part.get());
      add(piece, part.get(), sum_dz, sum_dz_x);
    });
  }

  // Step by step, in the type of the arithmetic.
  void in_steps(double* sum_dz, double* sum_dz_x) const {
    constexpr bool kWide = std::is_same_v<T, A>;
    const auto part = sums_memory(sum_dz);
    const auto memory = piece_memory<A>(tile.channels, tile.width);
    const auto more_memory = kWide ? nullptr : piece_memory<A>(tile.channels, tile.width);
    for_pieces(tile, [&](const Piece& piece) {
      const int64_t lines = piece.lines(), length = piece.length();
      const Lines<A> z = piece.in(memory.get());
      if (!output.data) kernel().pre_activation(piece.tile, piece.of(x), piece.of(residual), z, piece.of(k));
      if constexpr (kWide) {
        const Lines<T> to = dz.data ? piece.of(dz) : z;
        kernel().differentiate(activation, output.data ? piece.of(output) : read_only(z), piece.of(dy), to, lines,
                               length);
        if (sum_dz) take_sums(piece, read_only(to), piece.of(x), part.get());
      } else {
        const Lines<A> gradient = piece.in(more_memory.get());
        if (output.data) kernel().widen_lines(piece.of(output), z, lines, length);
        kernel().widen_lines(piece.of(dy), gradient, lines, length);
        wide().differentiate(activation, read_only(z), read_only(gradient), gradient, lines, length);
        if (dz.data) kernel().narrow_lines(read_only(gradient), piece.of(dz), lines, length);
        if (sum_dz) {
          kernel().widen_lines(piece.of(x), z, lines, length);
          take_sums(piece, read_only(gradient), read_only(z), part.get());
        }
      }
      if (sum_dz) add(piece, part.get(), sum_dz, sum_dz_x);
    });
  }

  // In the type of T or in that of the arithmetic.
  template <typename E>
  void take_sums(const Piece& piece, Lines<const E> gradient, Lines<const E> input, double* sums) const {
    kernels().of<E>().grad_sums(piece.tile, gradient, input, k.center + piece.channel, sums, sums + tile.channels);
  }

  std::unique_ptr<double[]> sums_memory(const double* wanted) const {
    return std::unique_ptr<double[]>(wanted ? new double[2 * tile.channels] : nullptr);
  }

  void add(const Piece& piece, const double* part, double* sum_dz, double* sum_dz_x) const {
    for (int64_t c = 0; c < piece.tile.channels; ++c) {
      sum_dz[piece.channel + c] += part[c];
      sum_dz_x[piece.channel + c] += part[tile.channels + c];
    }
  }
};

}  // namespace normops::cpu
