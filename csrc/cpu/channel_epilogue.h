#pragma once

// The last stage of the channel engine with what follows the layer: a residual that is added, an activation. A tile is
// taken in pieces that stay in the nearest cache, through the engine's own kernels and those of epilogue.cpp
// one after the other, so memory is read and written once. In 16-bit types all of that is done in float, between a
// first loop that widens and a last one that narrows: nothing is rounded on the way.

#include <algorithm>
#include <memory>
#include <type_traits>

#include "kernels.h"

namespace normops::cpu {

// Elements of a piece; and the fewest lines of a channels_last tile, where every sum takes a pass over the channels.
constexpr int64_t kPieceElements = 4096, kPieceLines = 16;

struct Piece {
  Tile tile;
  int64_t channel, position;  // where it begins

  int64_t lines() const { return tile.layout == Layout::kContiguous ? tile.channels : tile.positions; }
  int64_t length() const { return tile.layout == Layout::kContiguous ? tile.positions : tile.channels * tile.width; }

  template <typename T>
  Lines<T> of(const Lines<T>& whole) const {
    return {tile.layout == Layout::kContiguous ? whole[channel] + position : whole[position], whole.stride};
  }
  template <typename T>
  Lines<T> in(T* memory) const {
    return {memory, length()};
  }
};

template <typename F>
void for_pieces(const Tile& tile, const F& f) {
  const int64_t line = std::max<int64_t>(1, tile.channels * tile.width);
  const bool contiguous = tile.layout == Layout::kContiguous;
  const int64_t positions =
      std::min(tile.positions, contiguous ? kPieceElements : std::max(kPieceLines, kPieceElements / line));
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

// Pieces of the input as the kernels of the arithmetic's type read them: as they lie, or widened into `memory`.
template <typename T>
Lines<const Acc<T>> widened(const Piece& piece, Lines<const T> x, Acc<T>* memory) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return piece.of(x);
  } else {
    kernels().of<T>().widen_lines(piece.of(x), piece.in(memory), piece.lines(), piece.length());
    return read_only(piece.in(memory));
  }
}

// y = activation((x - center) * scale + shift + residual)
template <typename T>
void apply_epilogue(const Tile& tile, Lines<const T> x, Lines<T> y, const ForwardCoefficients<Acc<T>>& k,
                    const Activation& activation, Lines<const T> residual) {
  using A = Acc<T>;
  const Kernels<T>& kernel = kernels().of<T>();
  const Kernels<A>& wide = kernels().of<A>();
  constexpr bool kWide = std::is_same_v<T, A>;
  const auto memory = kWide ? nullptr : piece_memory<A>(tile.channels, tile.width);
  for_pieces(tile, [&](const Piece& piece) {
    const int64_t lines = piece.lines(), length = piece.length();
    Lines<A> z{};
    if constexpr (kWide)
      z = piece.of(y);
    else
      z = piece.in(memory.get());
    wide.apply(piece.tile, widened(piece, x, memory.get()), z,
               {k.center + piece.channel, k.scale + piece.channel, k.shift + piece.channel});
    if (residual.data) kernel.add_lines(piece.of(residual), z, lines, length);
    if (activation) wide.activate(activation, z, lines, length);
    if constexpr (!kWide) kernel.narrow_lines(read_only(z), piece.of(y), lines, length);
  });
}

// The way back through the epilogue: dz, the gradient before the activation, is made anew wherever it is needed, from
// what is there in any case.
template <typename T>
class EpilogueGradient {
  using A = Acc<T>;
  static constexpr bool kWide = std::is_same_v<T, A>;

 public:
  // Of one tile. `output` takes the place of x and residual where its data is not null.
  EpilogueGradient(const Tile& tile, Lines<const T> dy, Lines<const T> x, const ForwardCoefficients<A>& k,
                   const Activation& activation, Lines<const T> residual, Lines<const T> output)
      : tile_(tile),
        dy_(dy),
        x_(x),
        residual_(residual),
        output_(output),
        k_(k),
        activation_(activation),
        dz_(piece_memory<A>(tile.channels, tile.width)),
        wide_x_(kWide ? nullptr : piece_memory<A>(tile.channels, tile.width)) {}

  // Per channel: the sums of dz and of dz * (x - center).
  void sums(double* sum_dz, double* sum_dz_x) const {
    const int64_t channels = tile_.channels;
    const std::unique_ptr<double[]> part(new double[2 * channels]);
    std::fill_n(sum_dz, channels, 0.0);
    std::fill_n(sum_dz_x, channels, 0.0);
    for_pieces(tile_, [&](const Piece& piece) {
      const auto [dz, x] = gradient(piece);
      wide().grad_sums(piece.tile, read_only(dz), x, k_.center + piece.channel, part.get(), part.get() + channels);
      for (int64_t c = 0; c < piece.tile.channels; ++c) {
        sum_dz[piece.channel + c] += part[c];
        sum_dz_x[piece.channel + c] += part[channels + c];
      }
    });
  }

  // dx by the coefficients, without those of x where the statistics are constants; and dz for the residual. Where data
  // is null, it is not wanted.
  void apply(Lines<T> dx, Lines<T> grad_residual, const BackwardCoefficients<A>& k, bool constant) const {
    for_pieces(tile_, [&](const Piece& piece) {
      const int64_t lines = piece.lines(), length = piece.length(), c = piece.channel;
      const auto [dz, x] = gradient(piece);
      if (grad_residual.data) kernel().narrow_lines(read_only(dz), piece.of(grad_residual), lines, length);
      if (dx.data == nullptr) return;
      Lines<A> to = dz;
      if constexpr (kWide) to = piece.of(dx);
      if (constant)
        wide().scale(piece.tile, read_only(dz), to, k.scale + c);
      else
        wide().grad_apply(piece.tile, read_only(dz), x, to, {k.center + c, k.scale + c, k.slope + c, k.shift + c});
      if constexpr (!kWide) kernel().narrow_lines(read_only(dz), piece.of(dx), lines, length);
    });
  }

 private:
  static const Kernels<T>& kernel() { return kernels().of<T>(); }
  static const Kernels<A>& wide() { return kernels().of<A>(); }

  // dz, and x to go with it.
  std::pair<Lines<A>, Lines<const A>> gradient(const Piece& piece) const {
    const int64_t lines = piece.lines(), length = piece.length(), c = piece.channel;
    const Lines<A> dz = piece.in(dz_.get());
    const Lines<const A> x = widened(piece, x_, wide_x_.get());
    if (output_.data) {
      kernel().widen_lines(piece.of(output_), dz, lines, length);
    } else {
      wide().apply(piece.tile, x, dz, {k_.center + c, k_.scale + c, k_.shift + c});
      if (residual_.data) kernel().add_lines(piece.of(residual_), dz, lines, length);
    }
    wide().differentiate(activation_, dz, lines, length);
    kernel().multiply_lines(piece.of(dy_), dz, lines, length);
    return {dz, x};
  }

  Tile tile_;
  Lines<const T> dy_, x_, residual_, output_;
  ForwardCoefficients<A> k_;
  Activation activation_;
  std::unique_ptr<A[]> dz_, wide_x_;
};

}  // namespace normops::cpu
