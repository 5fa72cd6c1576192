// The interface between the op's loops (portable C++) and the inner kernels (one file per instruction set).
//
// Only plain data crosses it, so that a file compiled for an instruction set instantiates nothing that another file
// could link to by accident (an inline function compiled with AVX-512 must never be the one an older processor runs).
#pragma once

#include <cstdint>

namespace tetris {

// How a convolution tile reads its taps.
enum class TapMode : int {
  kPlain,        // every load lies inside the source
  kSideMasked,   // taps in threes; the first and the last of three ignore the lanes beyond the sides of the map
  kEveryMasked,  // each load has a mask of its own: edges of the map, ends of the buffer
  kTail,         // fewer pixels than a vector is worth: vectors run over the output channels instead
};

// One tile of a convolution: `rows` output channels x `vectors` vectors of flattened output pixels.
//   y[r][p] = clip(bias[r] + addend[r][p] + sum over i < channels, t < taps of
//                  weight[i][t][r] * x[channel_offset[i] + tap_offset[t] + p], low, high)
struct ConvTile {
  const float* x;
  const int64_t* channel_offset;
  int64_t channels;
  const int64_t* tap_offset;
  int64_t taps;
  const float* weight;    // [channels][taps][rows]
  const float* bias;      // [rows]
  const uint32_t* masks;  // kSideMasked: [2][vectors] (left, right), kEveryMasked: [taps][vectors]; bit = lane
  float* y;
  const float* addend;        // where y's values find theirs, or null; may be y itself
  const int64_t* row_offset;  // of the output channels, from y and from addend
  int valid_rows;             // rows stored, at most `rows`
  int last_lanes;             // lanes stored of the last vector; kTail: pixels, at most KernelSet::tail_pixels
  int rows;                   // 1, 2, 4 or 8, at most KernelSet::conv_rows
  int vectors;                // 1 to KernelSet::conv_vectors
  TapMode mode;
  int distant_taps;  // kSideMasked: how many of the three lie in cache lines of their own
  float low, high;
};

constexpr int kMostTailPixels = 8;

// Adjacent input channels of a kept part of a block row.
struct Run {
  int64_t begin, count;
};

// One tile of a matrix product: `samples` input vectors x up to `vectors` vectors of output channels.
//   y[s][row_index[o]] = clip(bias[o] + sum over the runs' i of weight[i][o] * x[i][s], low, high)
struct GemmTile {
  const float* x;  // [input channel][samples]
  const Run* runs;
  int64_t run_count;
  const float* weight;  // [kept channel][vectors * lanes]
  const float* bias;    // [vectors * lanes]
  float* y;
  int64_t sample_stride;     // of y
  const int64_t* row_index;  // [valid_rows]
  bool contiguous;           // row_index counts up by one
  int valid_rows;
  int vectors;  // 1 or KernelSet::gemm_vectors
  int samples;  // 1 to KernelSet::gemm_samples
  float low, high;
};

// Copies rows: to[r * width + before + i] = from[r * from_stride + i * stride] for i < count, zeros elsewhere in the
// width; reads nothing else.
struct RowCopy {
  int64_t rows, width, before, count;
  int64_t from_stride, stride;
};

// Largest values of 2 x 2 windows: to[r][j] = max(from[2r][2j], from[2r][2j + 1], from[2r + 1][2j], from[2r + 1][2j + 1]),
// NaN if one of them is. `to` has rows without gaps.
struct PoolRows {
  const float* from;
  int64_t from_width;
  float* to;
  int64_t rows, width;  // of `to`
};

struct KernelSet {
  const char* name;
  int lanes;
  int conv_rows, conv_vectors;
  int tail_pixels;  // 0: no kTail; at most kMostTailPixels
  int gemm_samples, gemm_vectors;
  void (*conv_tile)(const ConvTile& tile);
  void (*gemm_tile)(const GemmTile& tile);
  void (*copy_rows)(float* to, const float* from, const RowCopy& copy);
  void (*pool_rows)(const PoolRows& pool);
};

// The kernels of each instruction set that this library was built with.
const KernelSet& scalar_kernels();
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
const KernelSet& neon_kernels();

// The best kernels for this processor, or those that the environment variable TETRIS_ONNX_ISA names
// (scalar, avx2, avx512, neon). Throws std::invalid_argument when it names something unknown or not supported here.
const KernelSet& select_kernels();

}  // namespace tetris
