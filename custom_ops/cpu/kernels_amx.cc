// Kernels for AMX: registers that hold tiles of up to 16 rows of 64 bytes, and instructions that multiply two of them and
// add the 16 x 16 sums to a third: 16 times the products of AVX512-BF16 or 8 times those of AVX512-VNNI (with 1 and 2
// instructions of those in a cycle). Elements are packed as theirs. Compiled with flags of its own; see kernels.h.
//
// Up to four tiles of sums stay in registers for the whole reduction, so that each tile that is loaded is used twice.
// Convolution: weights are the left factor, pixels the right one: a panel's row of pixels is a row of the tile, and the sums
// of an output channel come out side by side, as they are stored in NCHW. Product: samples are the left factor, so that the
// weight is packed as for the vector kernels, which compute what is too small.
#include "avx512_intrinsics.h"
#include "kernels.h"

namespace tetris {
namespace {

constexpr int kTileFloats = kTileSize * kTileSize;

// LDTILECFG's operand.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums; 4 and 5: left factors [rows][elements]; 6 and 7: right factors [elements][16].
void begin(const TileShape& shape) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool left = tile == 4 || tile == 5;
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? shape.rows : shape.elements);
    config.row_bytes[tile] = static_cast<uint16_t>(4 * (left ? shape.elements : kTileSize));
  }
  // GCC does not know that the instruction reads all of it.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void end() { _tile_release(); }

// Adds the product of a left factor, in tile 4 or 5, and a right one, in 6 or 7, to the sums 0 (4 by 6) to 3 (5 by 7).
// The intrinsics take the numbers of registers as they are written.
#define TETRIS_TILE_PRODUCT(name, instruction)       \
  template <int Sum>                                 \
  static void name() {                               \
    if constexpr (Sum == 0) instruction(0, 4, 6);    \
    if constexpr (Sum == 1) instruction(1, 4, 7);    \
    if constexpr (Sum == 2) instruction(2, 5, 6);    \
    if constexpr (Sum == 3) instruction(3, 5, 7);    \
  }

// The products of a precision.
struct BFloat16Tiles {
  static constexpr Precision kPrecision = Precision::kBFloat16;
  using Sums = float;
  TETRIS_TILE_PRODUCT(weight_by_input, _tile_dpbf16ps)
  TETRIS_TILE_PRODUCT(input_by_weight, _tile_dpbf16ps)
};

// Weights are signed bytes, inputs unsigned ones.
struct Int8Tiles {
  static constexpr Precision kPrecision = Precision::kInt8;
  using Sums = int32_t;
  TETRIS_TILE_PRODUCT(weight_by_input, _tile_dpbsud)
  TETRIS_TILE_PRODUCT(input_by_weight, _tile_dpbusd)
};

// The first so many lanes.
__mmask16 first_lanes(int count) { return static_cast<__mmask16>((1U << count) - 1); }

// All tiles of sums: [left][right], each [16][16].
template <int Lefts, int Rights>
inline void store_sums(void* sums) {
  char* to = static_cast<char*>(sums);
  _tile_stored(0, to, 64);
  if constexpr (Rights > 1) _tile_stored(1, to + 4 * kTileFloats, 64);
  if constexpr (Lefts > 1) _tile_stored(2, to + 8 * kTileFloats, 64);
  if constexpr (Lefts > 1 && Rights > 1) _tile_stored(3, to + 12 * kTileFloats, 64);
}

inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

__m512 clip(__m512 x, float low, float high) {
  return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x));  // NaN stays
}

// Stores `rows` rows of sums, of `Vectors` vectors of pixels each, from output channel `first` of the tile on.
template <class Tiles, int Vectors>
void finish_conv(const ConvTile& tile, const typename Tiles::Sums* sums, int first, int rows) {
  for (int r = first; r < first + rows; ++r, sums += kTileSize) {
    float* y = tile.y + tile.row_offset[r];
    const float* addend = tile.addend == nullptr ? nullptr : tile.addend + tile.row_offset[r];
    for (int v = 0; v < Vectors; ++v) {
      __m512 x = _mm512_set1_ps(tile.bias[r]);
      if constexpr (Tiles::kPrecision == Precision::kInt8) {
        const __m512i zero = _mm512_set1_epi32(tile.zero_point * tile.row_sum[r]);
        const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + v * kTileFloats), zero);
        x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(tile.x_scale * tile.row_scale[r]), x);
      } else {
        x = _mm512_add_ps(_mm512_load_ps(sums + v * kTileFloats), x);
      }
      const auto pixels = static_cast<__mmask16>(tile.masks[v]);
      const int count = __builtin_popcount(tile.masks[v]);
      const __mmask16 stored = first_lanes(count);
      if (count < kTileSize) x = _mm512_maskz_compress_ps(pixels, x);
      if (addend != nullptr) {
        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(stored, addend));
        addend += count;
      }
      _mm512_mask_storeu_ps(y, stored, clip(x, tile.low, tile.high));
      y += count;
    }
  }
}

template <class Tiles, int Rows, int Vectors>
void conv_tile_impl(const ConvTile& tile, const TileShape& shape) {
  clear_sums();
  const float* w = tile.weight;
  const int64_t weights = static_cast<int64_t>(shape.rows) * shape.elements;  // of a tile
  for (int64_t i = 0; i < tile.channels; ++i) {
    const float* chunk = tile.x + tile.channel_offset[i];
    for (int64_t t = 0; t < tile.taps; ++t) {
      const float* x = chunk + tile.tap_offset[t];
      _tile_loadd(6, x, 4 * tile.element_stride);
      _tile_loadd(4, w, 4 * shape.elements);
      Tiles::template weight_by_input<0>();
      if constexpr (Vectors > 1) {
        _tile_loadd(7, x + kTileSize, 4 * tile.element_stride);
        Tiles::template weight_by_input<1>();
      }
      if constexpr (Rows > 1) {
        _tile_loadd(5, w + weights, 4 * shape.elements);
        Tiles::template weight_by_input<2>();
        if constexpr (Vectors > 1) Tiles::template weight_by_input<3>();
      }
      w += Rows * weights;
    }
  }
  alignas(64) typename Tiles::Sums sums[4 * kTileFloats];
  store_sums<Rows, Vectors>(sums);
  for (int r = 0; r < tile.valid_rows; r += shape.rows) {
    const int rows = tile.valid_rows - r < shape.rows ? tile.valid_rows - r : shape.rows;
    finish_conv<Tiles, Vectors>(tile, sums + (r == 0 ? 0 : 2 * kTileFloats), r, rows);
  }
}

template <class Tiles>
void conv_tile(const ConvTile& tile, const TileShape& shape) {
  const bool two_rows = tile.rows > shape.rows;
  if (tile.vectors > 1) {
    return two_rows ? conv_tile_impl<Tiles, 2, 2>(tile, shape) : conv_tile_impl<Tiles, 1, 2>(tile, shape);
  }
  two_rows ? conv_tile_impl<Tiles, 2, 1>(tile, shape) : conv_tile_impl<Tiles, 1, 1>(tile, shape);
}

// Stores the sums [samples][16] of one tile: those of the output channels from `first` of the tile on.
template <class Tiles>
void finish_gemm(const GemmTile& tile, const typename Tiles::Sums* sums, int first_sample, int samples, int first) {
  const int left = tile.valid_rows - first, rows = left < kTileSize ? left : kTileSize;
  const __m512 bias = _mm512_loadu_ps(tile.bias + first);
  for (int s = first_sample; s < first_sample + samples; ++s, sums += kTileSize) {
    __m512 x;
    if constexpr (Tiles::kPrecision == Precision::kInt8) {
      const Quantization& quantized = tile.quantized[s];
      const __m512i zero =
          _mm512_mullo_epi32(_mm512_loadu_si512(tile.row_sum + first), _mm512_set1_epi32(quantized.zero_point));
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(quantized.scale), _mm512_loadu_ps(tile.row_scale + first));
      x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums), zero)), scale, bias);
    } else {
      x = _mm512_add_ps(_mm512_load_ps(sums), bias);
    }
    x = clip(x, tile.low, tile.high);
    float* y = tile.y + s * tile.sample_stride;
    if (tile.contiguous) {
      _mm512_mask_storeu_ps(y + tile.row_index[0] + first, first_lanes(rows), x);
    } else {
      alignas(64) float lanes[kTileSize];
      _mm512_store_ps(lanes, x);
      for (int o = 0; o < rows; ++o) y[tile.row_index[first + o]] = lanes[o];
    }
  }
}

template <class Tiles, int Samples, int Vectors>
void gemm_tile_impl(const GemmTile& tile, const TileShape& shape) {
  constexpr int kWidth = Vectors * kTileSize;
  clear_sums();
  const float* w = tile.weight;
  for (int64_t run = 0; run < tile.run_count; ++run) {
    const float* x = tile.x + tile.runs[run].begin;
    for (int64_t i = 0; i < tile.runs[run].count; i += shape.elements) {
      _tile_loadd(6, w, 4 * kWidth);
      _tile_loadd(4, x + i, 4 * tile.x_stride);
      Tiles::template input_by_weight<0>();
      if constexpr (Vectors > 1) {
        _tile_loadd(7, w + kTileSize, 4 * kWidth);
        Tiles::template input_by_weight<1>();
      }
      if constexpr (Samples > 1) {
        _tile_loadd(5, x + kTileSize * tile.x_stride + i, 4 * tile.x_stride);
        Tiles::template input_by_weight<2>();
        if constexpr (Vectors > 1) Tiles::template input_by_weight<3>();
      }
      w += shape.elements * kWidth;
    }
  }
  alignas(64) typename Tiles::Sums sums[4 * kTileFloats];
  store_sums<Samples, Vectors>(sums);
  for (int s = 0; s < tile.samples; s += kTileSize) {
    const int samples = tile.samples - s < kTileSize ? tile.samples - s : kTileSize;
    for (int v = 0; v < Vectors && v * kTileSize < tile.valid_rows; ++v) {
      finish_gemm<Tiles>(tile, sums + (s == 0 ? 0 : 2 * kTileFloats) + v * kTileFloats, s, samples, v * kTileSize);
    }
  }
}

template <class Tiles>
void gemm_tile(const GemmTile& tile, const TileShape& shape) {
  const bool two_tiles = tile.samples > kTileSize;
  if (tile.vectors > 1) {
    return two_tiles ? gemm_tile_impl<Tiles, 2, 2>(tile, shape) : gemm_tile_impl<Tiles, 1, 2>(tile, shape);
  }
  two_tiles ? gemm_tile_impl<Tiles, 2, 1>(tile, shape) : gemm_tile_impl<Tiles, 1, 1>(tile, shape);
}

KernelSet make_amx_set(const KernelSet& vectors, const TileKernels& tiles) {
  KernelSet set = vectors;
  set.name = "amx";
  set.conv_rows = 2 * kTileSize;
  set.conv_vectors = 2;
  set.tail_pixels = 0;
  set.extra_pixel = false;
  set.tiles = &tiles;
  return set;
}

}  // namespace

const KernelSet& amx_bf16_kernels() {
  static const TileKernels tiles{&avx512_bf16_kernels(), begin, end, conv_tile<BFloat16Tiles>, gemm_tile<BFloat16Tiles>};
  static const KernelSet set = make_amx_set(avx512_bf16_kernels(), tiles);
  return set;
}

const KernelSet& amx_int8_kernels() {
  static const TileKernels tiles{&avx512_vnni_kernels(), begin, end, conv_tile<Int8Tiles>, gemm_tile<Int8Tiles>};
  static const KernelSet set = make_amx_set(avx512_vnni_kernels(), tiles);
  return set;
}

}  // namespace tetris
