// How weights and inputs are rounded to the precisions other than float32, how channels share an element and elements a
// tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "weight.h"

namespace tetris {

// To the nearest bfloat16, ties to even, as the upper half of a float; NaN stays NaN.
inline uint32_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return (bits >> 16) | 0x40U;
  return (bits + 0x7fffU + (bits >> 16 & 1U)) >> 16;
}

// The numbers between which others and 0 lie; NaN where one of them is.
struct Range {
  float low = 0.0F, high = 0.0F;

  void add(const Range& other) {
    if (other.low < low || std::isnan(other.low)) low = other.low;
    if (other.high > high || std::isnan(other.high)) high = other.high;
  }
};

// The bytes 0 to 255 for the numbers of a range; a NaN scale where it is not finite.
inline Quantization quantization_of(const Range& range) {
  const float scale = range.high / 255.0F - range.low / 255.0F;
  if (!std::isfinite(scale)) return {std::numeric_limits<float>::quiet_NaN(), 0.0F, 0};
  // Numbers so small that the scale's inverse is none are all zeros.
  if (scale < std::numeric_limits<float>::min()) return {1.0F, 1.0F, 0};
  return {scale, 1.0F / scale, static_cast<int32_t>(std::lrint(-range.low / scale))};
}

// The scale of a row of weights whose largest magnitude is `most`: -127 to 127 stand for -most to most.
inline float weight_scale(float most) {
  if (!std::isfinite(most)) return std::numeric_limits<float>::quiet_NaN();
  const float scale = most / 127.0F;
  return scale < std::numeric_limits<float>::min() ? 1.0F : scale;
}

// A weight of the row as a byte.
inline int32_t quantize_weight(float value, float scale) {
  return std::isnan(scale) ? 0 : static_cast<int32_t>(std::lrint(value / scale));
}

// The largest part, at most kTileSize, of which `count` is made up most evenly.
inline int even_part(int64_t count) {
  const int64_t parts = (count + kTileSize - 1) / kTileSize;
  return static_cast<int>((count + parts - 1) / parts);
}

// How a weight is cut into tiles; a single row and element without TileKernels.
inline TileShape tile_shape(const BlockSparseWeight& weight, const KernelSet& kernels) {
  if (kernels.tiles == nullptr) return {1, 1};
  const int64_t inputs = std::min(weight.block_inputs, weight.inputs);
  return {even_part(std::min(weight.block_outputs, weight.outputs)),
          even_part((inputs + kernels.packed - 1) / kernels.packed)};
}

// The 32-bit element of the weights w[0..packed) of a row; `scale` is the row's (kInt8).
inline float pack_weights(Precision precision, const float* w, float scale) {
  uint32_t bits = 0;
  if (precision == Precision::kBFloat16) {
    bits = to_bfloat16(w[0]) | to_bfloat16(w[1]) << 16;
  } else if (precision == Precision::kInt8) {
    for (int k = 0; k < 4; ++k) bits |= (static_cast<uint32_t>(quantize_weight(w[k], scale)) & 0xffU) << (8 * k);
  } else {
    return w[0];
  }
  float element;
  std::memcpy(&element, &bits, sizeof element);
  return element;
}

// Each row's scale and the sum of its bytes, by reordered row. In other precisions than kInt8 the scales are 1.
struct RowScales {
  std::vector<float> scale;
  std::vector<int32_t> sum;

  RowScales(const BlockSparseWeight& weight, Precision precision)
      : scale(static_cast<size_t>(weight.outputs), 1.0F), sum(static_cast<size_t>(weight.outputs), 0) {
    if (precision != Precision::kInt8) return;
    std::fill(scale.begin(), scale.end(), 0.0F);
    auto for_each = [&](auto function) {
      for (int64_t b = 0; b < weight.block_count; ++b) {
        const int64_t r = weight.block_index[2 * b], columns = weight.columns_of(weight.block_index[2 * b + 1]);
        for (int64_t i = 0; i < weight.rows_of(r); ++i) {
          const size_t row = static_cast<size_t>(r * weight.block_outputs + i);
          const float* values = weight.at(b, i, 0);  // of the row's columns and taps, one after the other
          for (int64_t j = 0; j < columns * weight.taps; ++j) function(row, values[j]);
        }
      }
    };
    for_each([this](size_t row, float value) {
      const float magnitude = std::abs(value);
      if (!(magnitude <= scale[row])) scale[row] = std::isnan(scale[row]) ? scale[row] : magnitude;
    });
    for (float& s : scale) s = weight_scale(s);
    for_each([this](size_t row, float value) { sum[row] += quantize_weight(value, scale[row]); });
  }
};

// What the rows of a packed weight have beside their weights. Rows that only fill up have zeros.
struct RowTerms {
  Buffer bias, scale;  // scale and sum: kInt8 only
  std::vector<int32_t> sum;

  RowTerms() = default;
  RowTerms(size_t count, Precision precision) : bias(count) {
    std::fill_n(bias.data(), count, 0.0F);
    if (precision != Precision::kInt8) return;
    scale = Buffer(count);
    std::fill_n(scale.data(), count, 0.0F);
    sum.assign(count, 0);
  }

  // The packed rows from `to` on are the weight's from `row` on.
  void set(int64_t to, const BlockSparseWeight& weight, const RowScales& scales, int64_t row, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      bias.data()[to + k] = weight.bias_of(row + k);
      if (sum.empty()) continue;
      scale.data()[to + k] = scales.scale[static_cast<size_t>(row + k)];
      sum[static_cast<size_t>(to + k)] = scales.sum[static_cast<size_t>(row + k)];
    }
  }
};

// A product of tiles takes as long whatever its depth is: less than this, in elements, and vectors are as fast.
constexpr int kLeastTileElements = 4;

// Tile registers of the calling thread, as long as this lives; nothing where `kernels` is null.
class TilesInUse {
 public:
  TilesInUse(const TileKernels* kernels, const TileShape& shape) : kernels_(kernels) {
    if (kernels_ != nullptr) kernels_->begin(shape);
  }
  ~TilesInUse() {
    if (kernels_ != nullptr) kernels_->end();
  }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;

 private:
  const TileKernels* kernels_;
};

// The kernels for a layer: of the precision, or of float32 where the processor has none of it or the sums of so many
// products of bytes could overflow.
inline const KernelSet& kernels_for(Precision precision, const BlockSparseWeight& weight) {
  const int64_t products = checked_product(weight.inputs, weight.taps);
  if (precision == Precision::kInt8 && products > INT32_MAX / (255 * 127)) precision = Precision::kFloat32;
  const KernelSet& kernels = select_kernels(precision);
  const bool narrow = kernels.tiles != nullptr && tile_shape(weight, kernels).elements < kLeastTileElements;
  return narrow ? *kernels.tiles->vectors : kernels;
}

}  // namespace tetris
