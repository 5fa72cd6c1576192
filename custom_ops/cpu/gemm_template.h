// The kernels of a matrix product, once, for any vector type; see kernel_template.h, which includes this.
//
// A few samples: vectors run over the output channels. A weight vector is loaded once for all samples, an input value is
// broadcast. One sample reads X as it is.
// Many samples (a strip): vectors run over the samples, as those of a convolution over pixels. Rows of X become columns of
// a panel, in vectors of samples, and sums become rows of Y again: both by transposing squares of kLanes x kLanes in
// registers. On either side of the square a permutation of the channels is an address of a whole vector, and costs
// nothing; scattering single numbers, as the first way does, takes longer than computing them where the product is short.
#pragma once

#include "kernels.h"

namespace tetris {
namespace {

// How far ahead of their use the packed weights are fetched: in floats, and by strips in elements (the packed weights are
// padded by more).
constexpr int64_t kGemmPrefetch = 1024;
constexpr int64_t kStripPrefetch = 32;

// What the sums of sample s and the outputs from `first` on start with, and the numbers that they stand for.
template <class Traits>
TETRIS_INLINE typename Traits::Sum gemm_start(const GemmTile& tile, int s, int first) {
  if constexpr (Traits::kPrecision == Precision::kInt8) {
    return Traits::sum_start(tile.row_sum + first, tile.quantized[s].zero_point);
  } else {
    return Traits::load(tile.bias + first);
  }
}

template <class Traits>
TETRIS_INLINE typename Traits::Vec gemm_finish(const GemmTile& tile, int s, int first, typename Traits::Sum sum) {
  if constexpr (Traits::kPrecision == Precision::kInt8) {
    const auto scale = Traits::mul(Traits::set1(tile.quantized[s].scale), Traits::load(tile.row_scale + first));
    return Traits::to_float(sum, scale, Traits::load(tile.bias + first));
  } else {
    return sum;
  }
}

template <int Samples, int Vectors>
void gemm_tile_impl(const GemmTile& tile) {
  using Vec = typename V::Vec;
  constexpr int kWidth = Vectors * V::kLanes;
  // A single sample has too few accumulators to hide the latency of an addition: four channels at a time.
  constexpr int kUnroll = Samples == 1 ? 4 : 1;
  typename V::Sum acc[kUnroll][Samples][Vectors];
  TETRIS_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    TETRIS_UNROLL
    for (int s = 0; s < Samples; ++s) {
      TETRIS_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        acc[u][s][v] = u == 0 ? gemm_start<V>(tile, s, v * V::kLanes) : typename V::Sum{};
      }
    }
  }
  const float* w = tile.weight;
  const int64_t x_stride = Samples == 1 ? 1 : tile.x_stride;
  TETRIS_NO_UNROLL
  for (int64_t run = 0; run < tile.run_count; ++run) {
    const float* x = tile.x + tile.runs[run].begin * x_stride;
    const int64_t count = tile.runs[run].count;
    int64_t i = 0;
    TETRIS_NO_UNROLL
    for (; i + kUnroll <= count; i += kUnroll) {
      TETRIS_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        Vec weight[Vectors];
        TETRIS_UNROLL
        for (int v = 0; v < Vectors; ++v) {
          if (v * V::kLanes % 16 == 0) TETRIS_PREFETCH_L1(w + kGemmPrefetch + u * kWidth + v * V::kLanes);
          weight[v] = V::load(w + u * kWidth + v * V::kLanes);
        }
        TETRIS_UNROLL
        for (int s = 0; s < Samples; ++s) {
          const Vec in = V::set1(x[u * x_stride + s]);
          TETRIS_UNROLL
          for (int v = 0; v < Vectors; ++v) acc[u][s][v] = V::fma(weight[v], in, acc[u][s][v]);
        }
      }
      x += kUnroll * x_stride;
      w += kUnroll * kWidth;
    }
    if constexpr (kUnroll > 1) {
      TETRIS_NO_UNROLL
      for (; i < count; ++i) {
        TETRIS_UNROLL
        for (int v = 0; v < Vectors; ++v) acc[0][0][v] = V::fma(V::load(w + v * V::kLanes), V::set1(*x), acc[0][0][v]);
        x += 1;
        w += kWidth;
      }
    }
  }
  const Vec low = V::set1(tile.low), high = V::set1(tile.high);
  TETRIS_UNROLL
  for (int s = 0; s < Samples; ++s) {
    float out[kWidth];
    TETRIS_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      typename V::Sum sum = acc[0][s][v];
      TETRIS_UNROLL
      for (int u = 1; u < kUnroll; ++u) sum = V::add(sum, acc[u][s][v]);
      V::store(out + v * V::kLanes, clip(gemm_finish<V>(tile, s, v * V::kLanes, sum), low, high));
    }
    float* y = tile.y + s * tile.sample_stride;
    if (tile.contiguous) {
      y += tile.row_index[0];
      for (int o = 0; o < tile.valid_rows; ++o) y[o] = out[o];
    } else {
      TETRIS_NO_UNROLL
      for (int o = 0; o < tile.valid_rows; ++o) y[tile.row_index[o]] = out[o];
    }
  }
}

// Calls the kernel for tile.samples, found by counting down from the largest.
template <int Samples>
void gemm_tile_samples(const GemmTile& tile) {
  if constexpr (Samples > 1) {
    if (tile.samples != Samples) return gemm_tile_samples<Samples - 1>(tile);
  }
  if (tile.vectors == V::kGemmVectors) return gemm_tile_impl<Samples, V::kGemmVectors>(tile);
  gemm_tile_impl<Samples, 1>(tile);
}

void gemm_tile(const GemmTile& tile) { gemm_tile_samples<V::kGemmSamples>(tile); }

// What the sums of a strip's row r and its samples from `first` on start with, and the numbers that they stand for.
template <class Traits>
TETRIS_INLINE typename Traits::Sum strip_start(const GemmStrip& strip, int r, int first) {
  if constexpr (Traits::kPrecision == Precision::kInt8) {
    return Traits::sum_start(strip.zero_point + first, strip.row_sum[r]);
  } else {
    return Traits::set1(strip.bias[r]);
  }
}

template <class Traits>
TETRIS_INLINE typename Traits::Vec strip_finish(const GemmStrip& strip, int r, int first, typename Traits::Sum sum) {
  if constexpr (Traits::kPrecision == Precision::kInt8) {
    const auto scale = Traits::mul(Traits::set1(strip.row_scale[r]), Traits::load(strip.x_scale + first));
    return Traits::to_float(sum, scale, Traits::set1(strip.bias[r]));
  } else {
    return sum;
  }
}

template <int Rows, int Vectors>
void gemm_strip_impl(const GemmStrip& strip) {
  using Vec = typename V::Vec;
  constexpr int kWidth = Vectors * V::kLanes;
  typename V::Sum acc[Rows][Vectors];
  TETRIS_UNROLL
  for (int r = 0; r < Rows; ++r) {
    TETRIS_UNROLL
    for (int v = 0; v < Vectors; ++v) acc[r][v] = strip_start<V>(strip, r, v * V::kLanes);
  }
  const float* w = strip.weight;
  const int64_t weight_stride = strip.weight_stride;
  TETRIS_NO_UNROLL
  for (int64_t run = 0; run < strip.run_count; ++run) {
    const float* x = strip.x + strip.runs[run].begin * kWidth;
    TETRIS_UNROLL_TWICE
    for (int64_t i = 0; i < strip.runs[run].count; ++i, x += kWidth, w += weight_stride) {
      TETRIS_PREFETCH_L1(w + kStripPrefetch * weight_stride);
      Vec in[Vectors];
      TETRIS_UNROLL
      for (int v = 0; v < Vectors; ++v) in[v] = V::load(x + v * V::kLanes);
      TETRIS_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const Vec weight = V::set1(w[r]);
        TETRIS_UNROLL
        for (int v = 0; v < Vectors; ++v) acc[r][v] = V::fma(weight, in[v], acc[r][v]);
      }
    }
  }
  const Vec low = V::set1(strip.low), high = V::set1(strip.high);
  TETRIS_UNROLL
  for (int r = 0; r < Rows; ++r) {
    if (r >= strip.valid_rows) continue;
    float* y = strip.y + strip.row_index[r] * kWidth;
    TETRIS_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      V::store(y + v * V::kLanes, clip(strip_finish<V>(strip, r, v * V::kLanes, acc[r][v]), low, high));
    }
  }
}

template <int Rows>
void gemm_strip_vectors(const GemmStrip& strip) {
  if (strip.vectors == 3) return gemm_strip_impl<Rows, 3>(strip);
  if (strip.vectors == 2) return gemm_strip_impl<Rows, 2>(strip);
  gemm_strip_impl<Rows, 1>(strip);
}

// A template only so that rows which an instruction set's panels are always wide enough for are not compiled twice.
template <class Traits>
void gemm_strip(const GemmStrip& strip) {
  static_assert(Traits::kConvVectors == 3, "a strip has up to 3 vectors");
  if constexpr (Traits::kLanes < Traits::kConvRows) {
    if (strip.rows < Traits::kConvRows) return gemm_strip_vectors<Traits::kLanes>(strip);
  }
  gemm_strip_vectors<Traits::kConvRows>(strip);
}

// The lanes i < count.
TETRIS_INLINE typename V::Mask first_lanes(int64_t count) {
  return V::expand(count < V::kLanes ? (1U << count) - 1 : ~0U);
}

// Copies the upper left corner of a square, kLanes wide; the rest is zeros. On its own: unrolled into what it is for, with
// every row a case apart, it would displace that from the registers.
TETRIS_NO_INLINE void copy_corner(const float* from, int64_t stride, int64_t rows, int64_t columns, float* square) {
  TETRIS_NO_UNROLL
  for (int64_t r = 0; r < V::kLanes; ++r, square += V::kLanes) {
    V::store(square, r < rows ? V::load_masked(from + r * stride, first_lanes(columns)) : V::zero());
  }
}

template <class Traits>
void pack_strip(const StripPack& pack) {
  constexpr int64_t kLanes = Traits::kLanes;
  constexpr bool kConverts = Traits::kPrecision != Precision::kFloat32;
  float* to = kConverts ? pack.channels : pack.to;
  const int64_t pitch = kConverts ? kLanes : pack.pitch;
  typename Traits::Vec columns[kLanes];
  float square[kLanes * kLanes];
  for (int64_t j = 0; j < pack.inputs; j += kLanes) {
    const int64_t left = pack.inputs - j;
    if (left >= kLanes && pack.samples == kLanes) {
      Traits::load_transposed(pack.from + j, pack.inputs, columns);
      TETRIS_UNROLL
      for (int64_t i = 0; i < kLanes; ++i) V::store(to + pack.position[j + i] * pitch, columns[i]);
    } else {
      copy_corner(pack.from + j, pack.inputs, pack.samples, left, square);
      Traits::load_transposed(square, kLanes, columns);
      for (int64_t i = 0; i < kLanes && i < left; ++i) V::store(to + pack.position[j + i] * pitch, columns[i]);
    }
  }
  if constexpr (kConverts) {
    typename Traits::Vec values[Traits::kPacked];
    const auto convert = Traits::converter(pack.quantized);
    for (int64_t e = 0; e < pack.elements; ++e) {
      TETRIS_UNROLL
      for (int k = 0; k < Traits::kPacked; ++k) values[k] = V::load(to + (e * Traits::kPacked + k) * kLanes);
      V::store(pack.to + e * pack.pitch, convert(values));
    }
  }
}

void unpack_strip(const StripUnpack& unpack) {
  constexpr int64_t kLanes = V::kLanes;
  typename V::Vec rows[kLanes];
  float square[kLanes * kLanes];
  for (int64_t j = 0; j < unpack.outputs; j += kLanes) {
    const int64_t left = unpack.outputs - j;
    const float* from = unpack.from + j * unpack.pitch;
    float* to = unpack.to + j;
    if (left >= kLanes && unpack.samples == kLanes) {
      V::load_transposed(from, unpack.pitch, rows);
      TETRIS_UNROLL
      for (int64_t s = 0; s < kLanes; ++s) V::store(to + s * unpack.outputs, rows[s]);
    } else {
      copy_corner(from, unpack.pitch, left, unpack.samples, square);
      V::load_transposed(square, kLanes, rows);
      for (int64_t s = 0; s < unpack.samples; ++s) V::store_masked(to + s * unpack.outputs, rows[s], first_lanes(left));
    }
  }
}

}  // namespace
}  // namespace tetris
