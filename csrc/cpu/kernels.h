#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "../statistics.h"

namespace normops {

// In activation.h, with which few kernels have to do.
struct Activation;
namespace activations {
struct LinearPieces;
}

}  // namespace normops

namespace normops::cpu {

// Contiguous lines of equal length, `stride` elements apart. A line is a row of the row engine; in the channel
// engine it is a channel's positions (contiguous) or a position's channels (channels_last).
template <typename T>
struct Lines {
  T* data;
  int64_t stride;

  T* operator[](int64_t line) const { return data + line * stride; }
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Sums in float are taken over at most this many elements before they go on in double.
constexpr int64_t kChunk = 4096;

// An element of a channel: of its line, or of its run at a position.
struct Place {
  int64_t position, offset;
};

// Which elements of a tile are valid, the same of every channel, where some between them are not: rows of words of the
// size of the arithmetic's numbers, in pack order, with all bits set or none (pack_valid in tiles.h). They are blended
// with what a kernel computes, and nothing branches on them.
struct Valid {
  const void* words;
  int64_t row;               // from one row to the next
  int64_t count;             // valid elements of a channel
  const int32_t* counts;     // in each kChunk elements of a contiguous line, if it has more than those
  std::array<Place, 4> few;  // valid elements from all over the tile
};

// Rows of so many words.
struct WordRows {
  int64_t count, length;
};

// A rectangle of one sample: some channels by some positions of one segment. In a channels_last line `width` neighbours
// belong to one channel.
struct Tile {
  Layout layout;
  int64_t channels;
  int64_t positions;
  int64_t width;
  const Valid* valid = nullptr;  // null: all of it
};

// y = (x - center) * scale + shift, one entry per channel of the tile.
template <typename A>
struct ForwardCoefficients {
  const A* center;
  const A* scale;
  const A* shift;
};

// dx = scale * dy + slope * (x - center) + shift, one entry per channel of the tile.
template <typename A>
struct BackwardCoefficients {
  const A* center;
  const A* scale;
  const A* slope;
  const A* shift;
};

template <typename T>
struct RowForward {
  int64_t length;
  Lines<const T> x;
  Lines<T> y;
  const Acc<T>* weight;  // in pack order, as all parameters of rows; or null
  const Acc<T>* bias;    // or null
  double eps;
  bool centered;  // LayerNorm; RMSNorm does not subtract the mean
  double* mean;   // one per row
  double* rstd;   // one per row
};

template <typename T>
struct RowBackward {
  int64_t length;
  Lines<const T> dy;
  Lines<const T> x;
  Lines<T> dx;           // data null: not wanted
  const Acc<T>* weight;  // or null
  const double* mean;
  const double* rstd;
  bool centered;
  Acc<T>* dweight;  // sums over the rows of one call are added to these two, parts of one array; null: not wanted
  Acc<T>* dbias;
};

// The inner loops, compiled once per instruction set. They are serial and allocate nothing; how the work is
// cut and shared among threads is decided by their callers (row.cpp, regions.h).
template <typename T>
struct Kernels {
  // Parameters of rows are read, and their gradients summed, in whole packs of `pack_size` and in the order in which
  // elements of T sit in registers: memory order or not.
  int64_t pack_size;
  bool memory_order;
  void (*pack_parameter)(const Acc<T>* natural, int64_t length, Acc<T>* packed);
  void (*widen_parameter)(const T* natural, int64_t length, Acc<T>* packed);
  // Adds up, in double and in order, blocks of sums in pack order, `stride` apart.
  void (*sum_blocks)(const Acc<T>* sums, int64_t blocks, int64_t stride, int64_t length, Acc<T>* natural);

  void (*row_forward)(const RowForward<T>&, int64_t begin, int64_t end);
  void (*row_backward)(const RowBackward<T>&, int64_t begin, int64_t end);

  // What is valid of a tile, from flags of its positions (and, where channels are wide, of all of their elements), and
  // how many rows and words that takes.
  WordRows (*valid_rows)(const Tile&);
  void (*pack_valid)(const Tile&, const bool* flags, Acc<T>* words);

  // Stage 1. Per channel of the tile: mean and sum of squared deviations; backward: sum dy and sum dy * (x - center).
  void (*moments)(const Tile&, Lines<const T> x, double* mean, double* m2);
  void (*grad_sums)(const Tile&, Lines<const T> dy, Lines<const T> x, const Acc<T>* center, double* sum_dy,
                    double* sum_dy_x);
  // Stage 3: zero where a tile is not valid.
  void (*apply)(const Tile&, Lines<const T> x, Lines<T> y, const ForwardCoefficients<Acc<T>>&);
  void (*grad_apply)(const Tile&, Lines<const T> dy, Lines<const T> x, Lines<T> dx,
                     const BackwardCoefficients<Acc<T>>&);
  void (*scale)(const Tile&, Lines<const T> dy, Lines<T> dx, const Acc<T>* scale);  // with constant statistics

  // The epilogue (epilogue.cpp), on lines of equal length. The first two only where T is a type of arithmetic, the
  // second two where it is not.
  void (*activate)(const Activation&, Lines<T> z, int64_t lines, int64_t length);  // in place
  void (*differentiate)(const Activation&, Lines<const T> z, Lines<const T> dy, Lines<T> dz, int64_t lines,
                        int64_t length);  // dz = dy * derivative(z)
  void (*widen_lines)(Lines<const T> source, Lines<Acc<T>> target, int64_t lines, int64_t length);
  void (*narrow_lines)(Lines<const Acc<T>> source, Lines<T> target, int64_t lines, int64_t length);
  void (*add_lines)(Lines<const T> source, Lines<Acc<T>> target, int64_t lines, int64_t length);
  // Stage 3 up to the activation; the data of the residual may be null.
  void (*pre_activation)(const Tile&, Lines<const T> x, Lines<const T> residual, Lines<Acc<T>> z,
                         const ForwardCoefficients<Acc<T>>&);
  // The same and the activation in one loop, if that is linear in pieces. And the way back, dz from dy and from what
  // came before the activation, or from its output.
  void (*apply_linear)(const Tile&, Lines<const T> x, Lines<const T> residual, Lines<T> y,
                       const ForwardCoefficients<Acc<T>>&, const activations::LinearPieces&);
  void (*gate)(const Tile&, Lines<const T> dy, Lines<const T> x, Lines<T> dz, const ForwardCoefficients<Acc<T>>&,
               const activations::LinearPieces&);
  void (*gate_by_output)(Lines<const T> dy, Lines<const T> y, Lines<T> dz, int64_t lines, int64_t length,
                         const activations::LinearPieces&);
  void (*sum_lines)(Lines<const T> a, Lines<const T> b, Lines<T> sum, int64_t lines, int64_t length);
};

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<c10::Half> f16;
  Kernels<c10::BFloat16> bf16;

  template <typename T>
  const Kernels<T>& of() const {
    if constexpr (std::is_same_v<T, float>)
      return f32;
    else if constexpr (std::is_same_v<T, double>)
      return f64;
    else if constexpr (std::is_same_v<T, c10::Half>)
      return f16;
    else
      return bf16;
  }
};

// The table for this processor, or for the instruction set that ATEN_CPU_CAPABILITY names.
const KernelTable& kernels();

}  // namespace normops::cpu
