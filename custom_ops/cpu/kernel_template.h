// The kernels, once, for any vector type.
//
// Included by one .cc file per instruction set, after a struct `V` (the vector traits) in an unnamed namespace:
//   kPrecision, Vec, Mask, kLanes, kConvRows, kConvVectors, kGemmSamples, kGemmVectors,
//   Sum, what fma gives: Vec, or with kInt8 a vector of integers, with sum_set1(i), sum_start(p, i) = -i * p[lane] and
//   to_float(sum, scale, c) = sum * scale + c; mul, set1_bytes(i),
//   load, store, zero, set1, fma(w, x, c) = w * x + c (w: a weight), max, min (both return the second argument if one is
//   NaN),
//   max_nan(a, b) (NaN if one is), max_pairs(a, b) (of the lanes 2i and 2i + 1 of the two vectors in a row, likewise),
//   expand(bits) -> Mask, load_masked(p, mask) (touches no masked-out float, gives 0 there),
//   mask_input(x, mask) and fma_masked(w, x, acc, mask): together acc + w * x in the lanes of the mask, acc elsewhere
//   (an instruction set masks either the input, once per load, or, with kMasksMultiplication, the multiplication),
//   load_transposed(p, stride, v): kLanes vectors, lane i of v[j] = p[i * stride + j];
//   copy_rows(to, from, copy): see RowCopy; kExtraPixel, kTailPixels and, if it is not 0, RowVec, a vector of kConvRows lanes, with
//   row_load, row_store, row_add, row_fma(a, b, c) = a * b + c for a number a; RowSum like Sum.
// With kBFloat16 and kInt8 the "numbers" that are multiplied are elements of several channels (Precision), and
// pack_rows stands for copy_rows, beside converter(quantized), which turns kPacked vectors of a value of each sample into one
// of elements; mask_input gets the element that stands for zeros, as `outside`.
// Everything is in an unnamed namespace and no standard library template is used: see kernels.h.
//
// Convolution: vectors run over flattened output pixels, so NCHW tensors are read and written as they are. A tile's
// accumulators (rows x vectors) live in registers for the whole reduction; each weight is broadcast once and used
// `vectors` times, each input vector is used `rows` times. Bias and clip are in the epilogue: y is written once.
#pragma once

#include "kernels.h"

#if defined(__GNUC__)
#define TETRIS_UNROLL _Pragma("GCC unroll 16")
#define TETRIS_UNROLL_TWICE _Pragma("GCC unroll 2")
#define TETRIS_NO_UNROLL _Pragma("GCC unroll 1")
#define TETRIS_INLINE inline __attribute__((always_inline))
#define TETRIS_NO_INLINE __attribute__((noinline))
#define TETRIS_PREFETCH_L2(p) __builtin_prefetch((p), 0, 2)
#define TETRIS_PREFETCH_L1(p) __builtin_prefetch((p), 0, 3)
#define TETRIS_PREFETCH_STORE(p) __builtin_prefetch((p), 1, 3)
#else
#define TETRIS_UNROLL
#define TETRIS_UNROLL_TWICE
#define TETRIS_NO_UNROLL
#define TETRIS_INLINE inline
#define TETRIS_NO_INLINE
#define TETRIS_PREFETCH_L2(p) ((void)0)
#define TETRIS_PREFETCH_L1(p) ((void)0)
#define TETRIS_PREFETCH_STORE(p) ((void)0)
#endif

namespace tetris {
namespace {

// How far ahead of their use the packed weights are fetched, in floats (the packed weights are padded by more).
constexpr int64_t kConvPrefetch = 2304;

TETRIS_INLINE typename V::Vec clip(typename V::Vec v, typename V::Vec low, typename V::Vec high) {
  return V::min(high, V::max(low, v));
}

// What the sums of row r start with.
template <class Traits>
TETRIS_INLINE typename Traits::Sum conv_start(const ConvTile& tile, int r) {
  if constexpr (Traits::kPrecision == Precision::kInt8) {
    return Traits::sum_set1(-tile.zero_point * tile.row_sum[r]);
  } else {
    return Traits::set1(tile.bias[r]);
  }
}

// The numbers that the sums of row r stand for.
template <class Traits>
TETRIS_INLINE typename Traits::Vec conv_finish(const ConvTile& tile, int r, typename Traits::Sum sum) {
  if constexpr (Traits::kPrecision == Precision::kInt8) {
    return Traits::to_float(sum, Traits::set1(tile.x_scale * tile.row_scale[r]), Traits::set1(tile.bias[r]));
  } else {
    return sum;
  }
}

// The element that stands for zeros.
template <class Traits>
TETRIS_INLINE typename Traits::Vec outside_of(const ConvTile& tile) {
  if constexpr (Traits::kPrecision == Precision::kInt8) {
    return Traits::set1_bytes(tile.zero_point);
  } else {
    return Traits::zero();
  }
}

// One tap of one channel: acc[r][v] += w[r] * row[v], in the lanes of the masks.
template <bool Masked, int Rows, int Vectors>
TETRIS_INLINE void add_tap(typename V::Sum (&acc)[Rows][Vectors], const float* row, const float* w,
                           const typename V::Mask (&mask)[Vectors], typename V::Vec outside) {
  typename V::Vec in[Vectors];
  TETRIS_UNROLL
  for (int v = 0; v < Vectors; ++v) {
    in[v] = V::load(row + v * V::kLanes);
    if constexpr (Masked) in[v] = V::mask_input(in[v], mask[v], outside);
  }
  TETRIS_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const typename V::Vec weight = V::set1(w[r]);
    TETRIS_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      acc[r][v] = Masked ? V::fma_masked(weight, in[v], acc[r][v], mask[v]) : V::fma(weight, in[v], acc[r][v]);
    }
  }
}

// The same for the rows of one pixel in one vector.
template <class Traits>
TETRIS_INLINE typename Traits::RowSum row_start(const ConvTile& tile) {
  if constexpr (Traits::kPrecision == Precision::kInt8) {
    return Traits::row_sum_start(tile.row_sum, tile.zero_point);
  } else {
    return Traits::row_load(tile.bias);
  }
}

// Stores pixel p: the rows' sums.
template <class Traits>
TETRIS_INLINE void store_pixel(const ConvTile& tile, int64_t p, typename Traits::RowSum sum) {
  float out[Traits::kConvRows];
  if constexpr (Traits::kPrecision == Precision::kInt8) {
    const auto scale = Traits::row_times(tile.x_scale, Traits::row_load(tile.row_scale));
    Traits::row_store(out, Traits::row_to_float(sum, scale, Traits::row_load(tile.bias)));
  } else {
    Traits::row_store(out, sum);
  }
  TETRIS_NO_UNROLL
  for (int r = 0; r < tile.valid_rows; ++r) {
    if (tile.addend != nullptr) out[r] += tile.addend[tile.row_offset[r] + p];
    // In this order a NaN stays.
    const float raised = out[r] < tile.low ? tile.low : out[r];
    tile.y[tile.row_offset[r] + p] = raised > tile.high ? tile.high : raised;
  }
}

// The pixel after the vectors (ConvTile::extra): its sums of all rows in one vector; nothing where there is none.
template <class Traits, bool Extra>
struct ExtraPixel {
  typename Traits::RowSum sum;
  TETRIS_INLINE explicit ExtraPixel(const ConvTile& tile) : sum(row_start<Traits>(tile)) {}
  TETRIS_INLINE void add(float x, const float* w) { sum = Traits::row_fma(x, Traits::row_load(w), sum); }
  TETRIS_INLINE void store(ConvTile tile, int64_t pixels) const {
    tile.y += pixels;
    if (tile.addend != nullptr) tile.addend += pixels;
    store_pixel<Traits>(tile, 0, sum);
  }
};
template <class Traits>
struct ExtraPixel<Traits, false> {
  TETRIS_INLINE explicit ExtraPixel(const ConvTile&) {}
  TETRIS_INLINE void add(float, const float*) {}
  TETRIS_INLINE void store(const ConvTile&, int64_t) const {}
};

// Of a pointwise kernel, the channels [begin, end): one loop instead of one in another is shorter and better predicted.
// Rows of X and Y are too far from each other for the processor to guess, so what comes next is brought near. FetchX: the
// next tile's input. FetchY: with each channel, one row that a later tile adds and stores.
template <bool FetchX, bool FetchY, bool Extra, int Rows, int Vectors>
TETRIS_INLINE void add_channels(const ConvTile& tile, typename V::Sum (&acc)[Rows][Vectors], ExtraPixel<V, Extra>& extra,
                                int64_t begin, int64_t end) {
  const typename V::Mask all[Vectors] = {};
  const float* first = tile.x + tile.tap_offset[0];
  const float* w = tile.weight + begin * Rows;
  TETRIS_UNROLL_TWICE
  for (int64_t i = begin; i < end; ++i, w += Rows) {
    const float* row = first + tile.channel_offset[i];
    TETRIS_PREFETCH_L2(w + kConvPrefetch);
    if constexpr (FetchX) {
      const float* next = tile.next_x + tile.channel_offset[i];
      TETRIS_UNROLL
      for (int v = 1; v <= Vectors; ++v) TETRIS_PREFETCH_L1(next + v * V::kLanes - 1);
    }
    if constexpr (FetchY) {
      const float* next = tile.next_y + tile.next_row_offset[i];
      TETRIS_UNROLL
      for (int v = 1; v <= Vectors; ++v) TETRIS_PREFETCH_STORE(next + v * V::kLanes - 1);
    }
    add_tap<false>(acc, row, w, all, V::Vec{});
    extra.add(row[Vectors * V::kLanes], w);
  }
}

// Whether a tile's channels fetch the rows of next_y, or its stores do, all at once, which keeps the next tile's loads
// waiting. Measured: there is nothing to gain without an addend or from long reductions, and short ones are too crowded.
template <int Rows>
TETRIS_INLINE bool early_fetch(const ConvTile& tile) {
  return tile.next_y != nullptr && tile.addend != nullptr && tile.channels >= 4 * Rows && tile.channels < 6 * Rows;
}

template <bool FetchX, bool Extra, int Rows, int Vectors>
TETRIS_INLINE void add_channels(const ConvTile& tile, typename V::Sum (&acc)[Rows][Vectors], ExtraPixel<V, Extra>& extra) {
  int64_t fetched = 0;
  if (early_fetch<Rows>(tile)) {
    fetched = tile.valid_rows;
    add_channels<FetchX, true, Extra>(tile, acc, extra, 0, fetched);
  }
  add_channels<FetchX, false, Extra>(tile, acc, extra, fetched, tile.channels);
}

// Stores a tile's rows, and brings near those of `next_y`, if not null. Whole: all of them, and all lanes; Add: there may
// be an addend (if Whole, there is).
template <bool Whole, bool Add, int Rows, int Vectors>
TETRIS_INLINE void store_rows(const ConvTile& tile, const typename V::Sum (&acc)[Rows][Vectors], const float* next_y) {
  using Vec = typename V::Vec;
  const Vec low = V::set1(tile.low), high = V::set1(tile.high);
  TETRIS_UNROLL
  for (int r = 0; r < Rows; ++r) {
    if (!Whole && r >= tile.valid_rows) continue;
    float* y = tile.y + tile.row_offset[r];
    const float* addend = tile.addend + (Add ? tile.row_offset[r] : 0);
    TETRIS_UNROLL
    for (int v = 0; v < Vectors; ++v, y += V::kLanes, addend += V::kLanes) {
      Vec out = conv_finish<V>(tile, r, acc[r][v]);
      if (Whole || v + 1 < Vectors || tile.last_lanes == V::kLanes) {
        if (Add && (Whole || tile.addend != nullptr)) out = V::add(out, V::load(addend));
        V::store(y, clip(out, low, high));
      } else {
        float lanes[V::kLanes] = {};
        if (tile.addend != nullptr) {
          TETRIS_NO_UNROLL
          for (int lane = 0; lane < tile.last_lanes; ++lane) lanes[lane] = addend[lane];
          out = V::add(out, V::load(lanes));
        }
        V::store(lanes, clip(out, low, high));
        TETRIS_NO_UNROLL
        for (int lane = 0; lane < tile.last_lanes; ++lane) y[lane] = lanes[lane];
      }
    }
    if (next_y != nullptr) {
      const float* next = next_y + tile.next_row_offset[r];
      TETRIS_UNROLL
      for (int v = 1; v <= Vectors; ++v) TETRIS_PREFETCH_STORE(next + v * V::kLanes - 1);
    }
  }
}

template <int Rows, int Vectors, TapMode Mode, bool Extra = false>
void conv_tile_impl(const ConvTile& tile) {
  using Vec = typename V::Vec;
  constexpr int kRowBytes = Vectors * V::kLanes * 4 + 64;  // of input in a tile, not aligned
  typename V::Sum acc[Rows][Vectors];
  TETRIS_UNROLL
  for (int r = 0; r < Rows; ++r) {
    TETRIS_UNROLL
    for (int v = 0; v < Vectors; ++v) acc[r][v] = conv_start<V>(tile, r);
  }
  ExtraPixel<V, Extra> extra(tile);
  const Vec outside = outside_of<V>(tile);
  // Of the taps left of, on and right of the pixel.
  typename V::Mask side[3][Vectors];
  if constexpr (Mode == TapMode::kSideMasked) {
    // The lines that the tile will be stored to; a shorter reduction would wait for them more than it gains.
    TETRIS_NO_UNROLL
    for (int r = 0; r < tile.valid_rows; ++r) {
      TETRIS_UNROLL
      for (int b = 0; b < kRowBytes; b += 64) TETRIS_PREFETCH_STORE(tile.y + tile.row_offset[r] + b / 4);
    }
    TETRIS_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      side[0][v] = V::expand(tile.masks[v]);
      side[1][v] = V::expand(~0U);
      side[2][v] = V::expand(tile.masks[Vectors + v]);
    }
  }
  const float* w = tile.weight;
  const int64_t* tap_offset = tile.tap_offset;
  const int64_t taps = tile.taps;
  int64_t i = 0;
  const float* next_y = tile.next_y;
  if constexpr (Mode == TapMode::kPlain) {
    if (taps == 1) {
      if (early_fetch<Rows>(tile)) next_y = nullptr;
      if (tile.next_x == nullptr) {
        add_channels<false, Extra>(tile, acc, extra);
      } else {
        add_channels<true, Extra>(tile, acc, extra);
      }
      i = tile.channels;
    }
  }
  TETRIS_NO_UNROLL
  for (; i < tile.channels; ++i) {
    const float* x = tile.x + tile.channel_offset[i];
    if constexpr (Mode == TapMode::kSideMasked) {
      // The rows of the next channel are too far away for the processor to guess.
      const float* next = tile.x + tile.channel_offset[i + 1 < tile.channels ? i + 1 : i];
      TETRIS_NO_UNROLL
      for (int64_t t = 0; t < taps; t += 3) {
        TETRIS_NO_UNROLL
        for (int k = 0; k < tile.distant_taps; ++k) {
          TETRIS_UNROLL
          for (int b = 0; b < kRowBytes; b += 64) TETRIS_PREFETCH_L1(next + tap_offset[t + k] + b / 4);
        }
        TETRIS_PREFETCH_L2(w + kConvPrefetch);
        TETRIS_PREFETCH_L2(w + kConvPrefetch + 16);
        if constexpr (V::kMasksMultiplication) {
          add_tap<true>(acc, x + tap_offset[t], w, side[0], outside);
          add_tap<false>(acc, x + tap_offset[t + 1], w + Rows, side[1], outside);
          add_tap<true>(acc, x + tap_offset[t + 2], w + 2 * Rows, side[2], outside);
        } else {
          // One body for the three taps: three would not fit into 16 registers.
          TETRIS_NO_UNROLL
          for (int k = 0; k < 3; ++k) add_tap<true>(acc, x + tap_offset[t + k], w + k * Rows, side[k], outside);
        }
        w += 3 * Rows;
      }
    } else {
      TETRIS_NO_UNROLL
      for (int64_t t = 0; t < taps; ++t, w += Rows) {
        const float* row = x + tap_offset[t];
        TETRIS_PREFETCH_L2(w + kConvPrefetch);
        if constexpr (Mode == TapMode::kPlain) {
          add_tap<false>(acc, row, w, side[0], outside);
        } else {
          Vec in[Vectors];
          TETRIS_UNROLL
          for (int v = 0; v < Vectors; ++v) {
            in[v] = V::load_masked(row + v * V::kLanes, V::expand(tile.masks[t * Vectors + v]));
          }
          TETRIS_UNROLL
          for (int r = 0; r < Rows; ++r) {
            const Vec weight = V::set1(w[r]);
            TETRIS_UNROLL
            for (int v = 0; v < Vectors; ++v) acc[r][v] = V::fma(weight, in[v], acc[r][v]);
          }
        }
      }
    }
  }
  if (tile.valid_rows == Rows && tile.last_lanes == V::kLanes) {
    if (tile.addend == nullptr) {
      store_rows<true, false>(tile, acc, next_y);
    } else {
      store_rows<true, true>(tile, acc, next_y);
    }
  } else {
    store_rows<false, true>(tile, acc, next_y);
  }
  extra.store(tile, Vectors * V::kLanes);
}

// The last few pixels, where a vector of pixels would be mostly empty: vectors of output channels, a broadcast input.
template <class Traits, int Pixels>
void conv_tail_impl(const ConvTile& tile) {
  using RowVec = typename Traits::RowVec;
  constexpr int kUnroll = 4;  // sums that do not wait for each other
  typename Traits::RowSum acc[kUnroll][Pixels];
  TETRIS_UNROLL
  for (int p = 0; p < Pixels; ++p) {
    acc[0][p] = row_start<Traits>(tile);
    TETRIS_UNROLL
    for (int u = 1; u < kUnroll; ++u) acc[u][p] = typename Traits::RowSum{};
  }
  const float* w = tile.weight;
  const int64_t* tap_offset = tile.tap_offset;
  int64_t i = 0;
  if (tile.taps == 1) {
    TETRIS_NO_UNROLL
    for (; i + kUnroll <= tile.channels; i += kUnroll) {
      TETRIS_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        const float* x = tile.x + tile.channel_offset[i + u] + tap_offset[0];
        const RowVec weight = Traits::row_load(w);
        TETRIS_UNROLL
        for (int p = 0; p < Pixels; ++p) acc[u][p] = Traits::row_fma(x[p], weight, acc[u][p]);
        w += tile.rows;
      }
    }
  }
  TETRIS_NO_UNROLL
  for (; i < tile.channels; ++i) {
    const float* x = tile.x + tile.channel_offset[i];
    int64_t t = 0;
    TETRIS_NO_UNROLL
    for (; t + kUnroll <= tile.taps; t += kUnroll) {
      TETRIS_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        const RowVec weight = Traits::row_load(w);
        TETRIS_UNROLL
        for (int p = 0; p < Pixels; ++p) acc[u][p] = Traits::row_fma(x[tap_offset[t + u] + p], weight, acc[u][p]);
        w += tile.rows;
      }
    }
    TETRIS_NO_UNROLL
    for (; t < tile.taps; ++t) {
      const RowVec weight = Traits::row_load(w);
      TETRIS_UNROLL
      for (int p = 0; p < Pixels; ++p) acc[0][p] = Traits::row_fma(x[tap_offset[t] + p], weight, acc[0][p]);
      w += tile.rows;
    }
  }
  TETRIS_UNROLL
  for (int p = 0; p < Pixels; ++p) {
    store_pixel<Traits>(
        tile, p, Traits::row_add(Traits::row_add(acc[0][p], acc[1][p]), Traits::row_add(acc[2][p], acc[3][p])));
  }
}

template <class Traits, int Pixels>
void conv_tail(const ConvTile& tile) {
  if constexpr (Pixels > 1) {
    if (tile.last_lanes != Pixels) return conv_tail<Traits, Pixels - 1>(tile);
  }
  conv_tail_impl<Traits, Pixels>(tile);
}

template <int Rows, int Vectors>
void conv_tile_mode(const ConvTile& tile) {
  switch (tile.mode) {
    case TapMode::kPlain:
      return conv_tile_impl<Rows, Vectors, TapMode::kPlain>(tile);
    case TapMode::kSideMasked:
      return conv_tile_impl<Rows, Vectors, TapMode::kSideMasked>(tile);
    case TapMode::kEveryMasked:
      return conv_tile_impl<Rows, Vectors, TapMode::kEveryMasked>(tile);
    case TapMode::kTail:
      return;  // has no vectors of pixels: conv_tail_impl
  }
}

template <int Rows>
void conv_tile_vectors(const ConvTile& tile) {
  if constexpr (V::kConvVectors >= 3) {
    if (tile.vectors == 3) return conv_tile_mode<Rows, 3>(tile);
  }
  if constexpr (V::kConvVectors >= 2) {
    if (tile.vectors == 2) return conv_tile_mode<Rows, 2>(tile);
  }
  conv_tile_mode<Rows, 1>(tile);
}

// A template only so that what an instruction set does not have is not compiled.
template <class Traits>
void conv_tile(const ConvTile& tile) {
  if constexpr (Traits::kExtraPixel) {
    if (tile.extra) {
      if (tile.rows == Traits::kConvRows) {
        return conv_tile_impl<Traits::kConvRows, Traits::kConvVectors, TapMode::kPlain, true>(tile);
      }
      // Fewer rows: the pixel by itself.
      ConvTile part = tile;
      part.extra = false;
      conv_tile<Traits>(part);
      constexpr int kPixels = Traits::kConvVectors * Traits::kLanes;
      part.x += kPixels;
      part.y += kPixels;
      if (part.addend != nullptr) part.addend += kPixels;
      part.last_lanes = 1;
      return conv_tail_impl<Traits, 1>(part);
    }
  }
  if constexpr (Traits::kTailPixels > 0) {
    if (tile.mode == TapMode::kTail) return conv_tail<Traits, Traits::kTailPixels>(tile);
  }
  if constexpr (Traits::kConvRows >= 8) {
    if (tile.rows == 8) return conv_tile_vectors<8>(tile);
  }
  if (tile.rows == 4) return conv_tile_vectors<4>(tile);
  if (tile.rows == 2) return conv_tile_vectors<2>(tile);
  conv_tile_vectors<1>(tile);
}

}  // namespace
}  // namespace tetris

#include "gemm_template.h"
#include "winograd_template.h"

namespace tetris {
namespace {

// The lanes of one row that `V` leaves over, from position `i` of the copied ones on, and the zeros around them.
void copy_row_end(float* to, const float* from, const RowCopy& copy, int64_t i) {
  for (; i < copy.count; ++i) to[copy.before + i] = from[i * copy.stride];
  for (int64_t j = 0; j < copy.before; ++j) to[j] = 0.0F;
  for (int64_t j = copy.before + copy.count; j < copy.width; ++j) to[j] = 0.0F;
}

// A template only because the other precisions' traits have not all that it needs.
template <class Traits>
void split_rows(const RowSplit& split) {
  constexpr int64_t kLanes = Traits::kLanes;
  // Rows are read and written in whole vectors, what is beyond their end is the next rows' business: not of the last rows.
  const int64_t beyond = 2 * ((split.width + kLanes - 1) / kLanes * kLanes - split.width);
  const int64_t whole = split.rows - (beyond + 2 * split.width - 1) / (2 * split.width);
  for (int64_t r = 0; r < split.rows; ++r) {
    const float* from = split.from + r * split.from_stride;
    float *even = split.even + r * split.width, *odd = split.odd + r * split.width;
    const int64_t vectors = r < whole ? split.width : split.width - split.width % kLanes;
    int64_t i = 0;
    for (; i < vectors; i += kLanes) {
      TETRIS_PREFETCH_L1(from + 2 * i + split.next);
      TETRIS_PREFETCH_L1(from + 2 * i + kLanes + split.next);
      const auto low = Traits::load(from + 2 * i), high = Traits::load(from + 2 * i + kLanes);
      Traits::store(even + i, Traits::even(low, high));
      Traits::store(odd + i, Traits::odd(low, high));
    }
    for (; i < split.width; ++i) {
      even[i] = from[2 * i];
      odd[i] = from[2 * i + 1];
    }
  }
}

void pool_rows(const PoolRows& pool) {
  for (int64_t r = 0; r < pool.rows; ++r) {
    const float* upper = pool.from + 2 * r * pool.from_width;
    const float* lower = upper + pool.from_width;
    float* to = pool.to + r * pool.width;
    int64_t j = 0;
    for (; j + V::kLanes <= pool.width; j += V::kLanes) {
      const auto first = V::max_nan(V::load(upper + 2 * j), V::load(lower + 2 * j));
      const auto second = V::max_nan(V::load(upper + 2 * j + V::kLanes), V::load(lower + 2 * j + V::kLanes));
      V::store(to + j, V::max_pairs(first, second));
    }
    if (j == pool.width) continue;
    // The rest, which in a narrow map is all.
    const int left = static_cast<int>(2 * (pool.width - j));  // of the input
    const auto low = V::expand(left < V::kLanes ? (1U << left) - 1 : ~0U);
    const auto high = V::expand(left > V::kLanes ? (1U << (left - V::kLanes)) - 1 : 0U);
    const float *above = upper + 2 * j, *below = lower + 2 * j;
    const auto first = V::max_nan(V::load_masked(above, low), V::load_masked(below, low));
    const auto second =
        V::max_nan(V::load_masked(above + V::kLanes, high), V::load_masked(below + V::kLanes, high));
    float lanes[V::kLanes];
    V::store(lanes, V::max_pairs(first, second));
    for (int lane = 0; j < pool.width; ++j, ++lane) to[j] = lanes[lane];
  }
}

template <class Traits>
constexpr KernelSet make_kernel_set(const char* name) {
  KernelSet set{};
  set.name = name;
  set.precision = Traits::kPrecision;
  set.packed = 1;
  set.lanes = Traits::kLanes;
  set.conv_rows = Traits::kConvRows;
  set.conv_vectors = Traits::kConvVectors;
  set.tail_pixels = Traits::kTailPixels;
  set.extra_pixel = Traits::kExtraPixel;
  set.gemm_samples = Traits::kGemmSamples;
  set.gemm_vectors = Traits::kGemmVectors;
  set.strip_rows = Traits::kConvRows;
  set.conv_tile = conv_tile<Traits>;
  set.gemm_tile = gemm_tile;
  set.gemm_strip = gemm_strip<Traits>;
  set.pack_strip = pack_strip<Traits>;
  set.unpack_strip = unpack_strip;
  set.pool_rows = pool_rows;
  if constexpr (Traits::kPrecision == Precision::kFloat32) {
    set.copy_rows = Traits::copy_rows;
    set.split_rows = split_rows<Traits>;
    set.winograd_input = winograd_input<Traits, 1>;
    set.winograd_output = winograd_output<Traits>;
  } else {
    set.packed = Traits::kPacked;
    set.pack_rows = Traits::pack_rows;
    if constexpr (Traits::kPrecision == Precision::kBFloat16) {
      using Integers = typename Traits::Integers;
      set.winograd_input = winograd_input<Integers, 2>;
      set.winograd_output = winograd_output<Integers>;
      set.winograd_range = winograd_range<Integers>;
      set.winograd_product = winograd_product<Integers>;
    }
    if constexpr (Traits::kPrecision == Precision::kInt8) set.find_range = Traits::find_range;
  }
  return set;
}

}  // namespace
}  // namespace tetris
