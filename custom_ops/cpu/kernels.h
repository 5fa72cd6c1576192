// The interface between the op's loops (portable C++) and the inner kernels (one file per instruction set).
//
// Only plain data crosses it, so that a file compiled for an instruction set instantiates nothing that another file
// could link to by accident (an inline function compiled with AVX-512 must never be the one an older processor runs).
#pragma once

#include <cstdint>

namespace tetris {

// What the products are computed in. Sums, bias, activation and all tensors are float32.
//   kFloat32;
//   kBFloat16: weights and inputs are rounded to bfloat16 (to the nearest, ties to even);
//   kInt8: weights are signed bytes, symmetric, with a scale for each output channel; inputs are unsigned bytes with a scale
//     and a zero point; the sums are exact integers.
// Vectors of 32-bit elements hold one, two or four input channels each, which one instruction multiplies and adds up:
// everything but the arithmetic is the same for all three.
enum class Precision : int { kFloat32, kBFloat16, kInt8 };
constexpr int kMostPacked = 4;

// How bytes stand for numbers (kInt8): x = scale * (byte - zero_point).
struct Quantization {
  float scale, inverse;  // inverse: 1 / scale
  int32_t zero_point;
};

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
// The elements of x and weight are those of the kernel's precision: an i is one, two or four input channels.
// kInt8: the sum s of the bytes' products stands for x_scale * row_scale[r] * (s - zero_point * row_sum[r]).
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
  // What later tiles will use, to be fetched ahead: the pixels at next_x, of the same channels (kPlain of one tap only; null:
  // nothing), and as many rows of y and of the addend, which are in the same place (null: nothing).
  const float* next_x;
  const float* next_y;
  const int64_t* next_row_offset;
  bool extra;  // kPlain, one tap, KernelSet::conv_vectors vectors, no lanes cut off: one more pixel after the vectors
  float low, high;
  const float* row_scale;  // kInt8 only, as the next three; [rows]
  const int32_t* row_sum;  // [rows], of the weight's bytes
  float x_scale;
  int32_t zero_point;
  int64_t element_stride;  // TileKernels only
};

constexpr int kMostTailPixels = 8;

// Adjacent input channels of a kept part of a block row.
struct Run {
  int64_t begin, count;
};

// One tile of a matrix product: `samples` input vectors x up to `vectors` vectors of output channels.
//   y[s][row_index[o]] = clip(bias[o] + sum over the runs' i of weight[i][o] * x[i][s], low, high)
// Elements and kInt8 as in ConvTile.
struct GemmTile {
  const float* x;  // [input channel][x_stride]
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
  const float* row_scale;         // kInt8 only, as the next two; [vectors * lanes]
  const int32_t* row_sum;         // [vectors * lanes]
  const Quantization* quantized;  // [samples]
  int64_t x_stride;               // at least `samples`; of a single sample 1
};

// A strip of a matrix product with many samples: `rows` output channels x `vectors` vectors of samples.
//   y[row_index[r]][s] = clip(bias[r] + sum over the runs' i of weight[i][r] * x[i][s], low, high)
// Elements and kInt8 as in ConvTile, but that each sample has a scale and a zero point.
struct GemmStrip {
  const float* x;  // [input channel][vectors * lanes]
  const Run* runs;
  int64_t run_count;
  const float* weight;  // [kept channel][weight_stride]
  int64_t weight_stride;
  const float* bias;  // [rows]
  float* y;           // [output channel][vectors * lanes]
  const int64_t* row_index;
  int valid_rows;
  int rows;     // KernelSet::strip_rows; of a panel that is narrower: its width
  int vectors;  // 1 to 3
  float low, high;
  const float* row_scale;     // kInt8 only, as the next three; [rows]
  const int32_t* row_sum;     // [rows]
  const float* x_scale;       // [vectors * lanes]
  const int32_t* zero_point;  // [vectors * lanes]
};

// Turns rows of X, one a sample and at most a vector of them, into columns: to[position[c]][s] = from[s][c]; lanes without
// a sample get zeros. The other precisions round and pack the channels, of which the ones that no c is at have to be set.
struct StripPack {
  const float* from;  // [samples][inputs]
  int samples;
  int64_t inputs;
  const int64_t* position;
  float* to;  // [element][pitch]
  int64_t pitch;
  float* channels;                // of the other precisions only, as the rest: [elements * packed][lanes]
  int64_t elements;
  const Quantization* quantized;  // kInt8; [samples]
};

// And columns into rows: to[s][c] = from[c][s].
struct StripUnpack {
  const float* from;  // [outputs][pitch]
  int64_t pitch;
  int samples;
  int64_t outputs;
  float* to;  // [samples][outputs]
};

// Copies rows: to[r * width + before + i] = from[r * from_stride + i * stride] for i < count, zeros elsewhere in the
// width; reads nothing else. What lies `next` floats from what is read may be fetched ahead.
struct RowCopy {
  int64_t rows, width, before, count;
  int64_t from_stride, stride;
  int64_t next;
};

// Copies rows of 2 * width numbers, parted: even[r * width + i] = from[r * from_stride + 2 * i], and the same of
// odd from 2 * i + 1. Rows lie at least 2 * width apart.
struct RowSplit {
  float *even, *odd;
  const float* from;
  int64_t rows, width, from_stride;
  int64_t next;  // as RowCopy's
};

// Largest values of 2 x 2 windows: to[r][j] = max(from[2r][2j], from[2r][2j + 1], from[2r + 1][2j], from[2r + 1][2j + 1]),
// NaN if one of them is. `to` has rows without gaps.
struct PoolRows {
  const float* from;
  int64_t from_width;
  float* to;
  int64_t rows, width;  // of `to`
};

// Source rows of the channels that share an element: channel k's is at `from[k]`, null for one that is not there (of a
// block of odd width; its weights are zero).
struct PackedRows {
  const float* from[kMostPacked];
  const float* next[kMostPacked];  // where a later element has it, which may be fetched ahead; null for nowhere
  Quantization quantized;  // kInt8 only
};

// Part of a row of Winograd tiles: `tiles` adjacent ones of an image, numbered from `begin` on.
struct WinogradRun {
  int64_t begin, tiles, image;
  int64_t row, column;          // of the first input of the first tile; outside the map where there is padding
  int64_t out_row, out_column;  // of its first output
};

// Transforms one channel of a strip of tiles: v[(i * n + j) * plane + t] = element (i, j) of tile t, n = tile + 2. Writes
// up to `pitch` elements of each plane. kBFloat16: two channels, element e of tile t times scale[e] * tile_scale[t] rounded
// to 16-bit integers, of which a 32-bit element of v holds those of both (winograd.h says why these are not of bfloat16).
struct WinogradInput {
  int tile;            // outputs of a tile each way: 2 or 4
  const float* x[2];     // the channel of image 0; the second: of kBFloat16, null for one that is not there
  const float* next[2];  // of the channel that will be transformed next: fetched ahead
  int64_t height, width, image_stride;
  const WinogradRun* runs;
  int64_t run_count;
  float* v;
  int64_t plane, pitch;
  const float* scale;       // kBFloat16 only, as the next
  const float* tile_scale;  // [pitch]
};

// The range of a strip's tiles in some channels: low[t] and high[t] are the least and the largest value of tile t's inputs
// in channels[0..count) of its image, and 0; NaN or infinite (either or both) where one of them is. Writes whole vectors.
struct WinogradRange {
  int tile;
  const float* x;  // channel 0 of image 0
  int64_t height, width, image_stride;
  const WinogradRun* runs;
  int64_t run_count;
  const int64_t* channels;
  int64_t channel_count;
  float *low, *high;
};

// The products of one element of a strip's tiles, of 16-bit integers, for some output rows:
//   m[r * row_stride + t] = scale * tile_scale[t] * sum over i < channels of weight[i][r] . x[channel_offset[i] + t],
// where the dot is that of two pairs of integers. The sums are exact: they fit into 32 bits, or wrap and fit in the end.
struct WinogradProduct {
  const float* x;
  const int64_t* channel_offset;
  int64_t channels;
  const float* weight;  // [channels][rows], and as many numbers after it as a vector of rows may touch
  int rows;             // as in ConvTile
  int vectors;          // of tiles, 1 to KernelSet::conv_vectors
  bool extra;           // one more tile after them
  float scale;
  const float* tile_scale;
  float* m;
  int64_t row_stride;
};

// Transforms one channel of a strip's products back: y = clip(transformed m * scale + bias + addend, low, high), m laid out
// as v above with planes of `pitch` and scale > 0. Pooled, there is no addend and y is the largest value of each 2 x 2 window of that, NaN if
// one is; the runs' outputs and height and width are those of y then.
struct WinogradOutput {
  int tile;
  const float* m;
  int64_t pitch, tiles;
  const WinogradRun* runs;
  int64_t run_count;
  bool pooled;
  const float* addend;  // the channel of image 0, or null
  float* y;             // likewise
  int64_t height, width, image_stride;
  float scale, bias, low, high;
};

// Rows of a tile register, and 32-bit elements of one of its rows, at most.
constexpr int kTileSize = 16;

// Shape of the tiles that are multiplied: each product adds up `elements` elements for `rows` rows.
struct TileShape {
  int rows, elements;
};

struct KernelSet;

// Kernels of an instruction set that multiplies whole tiles (AMX). A block's elements are taken `elements` at a time, a chunk.
struct TileKernels {
  const KernelSet* vectors;  // for products that are too small for tiles
  // Gives the calling thread tile registers, until `end`. Nothing else may use them in between.
  void (*begin)(const TileShape& shape);
  void (*end)();
  // As KernelSet::conv_tile, for up to 2 x 2 tiles: `vectors` of kTileSize pixels, `rows` a multiple of shape.rows.
  // Element e of chunk i is at channel_offset[i] + e * element_stride; weight: [chunk][tap][rows][elements]. Stored are, one
  // after the other, the pixels of which masks[vector] has a bit. Other fields that tell of masks and pixels are not used.
  void (*conv_tile)(const ConvTile& tile, const TileShape& shape);
  // As KernelSet::gemm_tile, for up to 2 kTileSize samples. x: [samples][x_stride], of which the rows of whole tiles are read.
  // The weight, and what a run counts, are elements: whole chunks of them.
  void (*gemm_tile)(const GemmTile& tile, const TileShape& shape);
};

struct KernelSet {
  const char* name;
  Precision precision;
  int packed;  // input channels in a 32-bit element: 1, 2 (kBFloat16) or 4 (kInt8)
  int lanes;
  int conv_rows, conv_vectors;
  int tail_pixels;   // 0: no kTail; at most kMostTailPixels
  bool extra_pixel;  // whether there is ConvTile::extra
  int gemm_samples, gemm_vectors;
  int strip_rows;  // strips have up to 3 vectors
  void (*conv_tile)(const ConvTile& tile);
  void (*gemm_tile)(const GemmTile& tile);
  void (*gemm_strip)(const GemmStrip& strip);
  void (*pack_strip)(const StripPack& pack);
  void (*unpack_strip)(const StripUnpack& unpack);
  void (*copy_rows)(float* to, const float* from, const RowCopy& copy);  // kFloat32 only
  void (*split_rows)(const RowSplit& split);                                 // likewise
  // As copy_rows, for the other precisions: rounds and packs; what is outside is the element that stands for zeros.
  void (*pack_rows)(float* to, const PackedRows& rows, const RowCopy& copy);
  // kInt8 only: the least and the largest of `count` numbers, and 0; NaN if one of them is.
  void (*find_range)(const float* x, int64_t count, float* low, float* high);
  void (*pool_rows)(const PoolRows& pool);
  // kFloat32 and kBFloat16 only.
  void (*winograd_input)(const WinogradInput& input);
  void (*winograd_output)(const WinogradOutput& output);
  // kBFloat16 only; in kFloat32, the products are those of conv_tile.
  void (*winograd_range)(const WinogradRange& range);
  void (*winograd_product)(const WinogradProduct& product);
  const TileKernels* tiles;  // or null. With them: lanes is kTileSize, conv_rows and conv_vectors tell of conv_tile's
};

// The kernels of each instruction set that this library was built with.
const KernelSet& scalar_kernels();
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
const KernelSet& avx512_bf16_kernels();
const KernelSet& avx512_vnni_kernels();
const KernelSet& amx_bf16_kernels();
const KernelSet& amx_int8_kernels();
const KernelSet& neon_kernels();

// The best kernels of the precision for this processor, or of float32 where it has none of that precision. The environment
// variable TETRIS_ONNX_ISA names the best to use (scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx; scalar, neon). Throws
// std::invalid_argument when it names something unknown or not supported here.
const KernelSet& select_kernels(Precision precision = Precision::kFloat32);

// How a convolution is computed. Winograd's (winograd.h) are for 3x3 kernels of stride 1, in tiles of 2x2 or 4x4 outputs;
// others are computed directly whatever is asked for.
enum class ConvAlgorithm { kAuto, kDirect, kWinograd2, kWinograd4 };

// What the environment variable TETRIS_ONNX_CONV names (auto, direct, winograd2, winograd4). Throws std::invalid_argument
// when it names something else.
ConvAlgorithm select_conv_algorithm();

}  // namespace tetris
