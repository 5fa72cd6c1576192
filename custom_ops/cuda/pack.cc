#include "pack.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace tetris::cuda {
namespace {

// The division of one side of the weight, of `size` channels in blocks of `block`, into groups of at most `tile`. Inside
// a group, where the order is free, channels are in the order that the tensor has them in (`perm`): neighboring threads
// then load and store values that lie as near to each other as can be.
struct Division {
  std::vector<int64_t> first, count;           // channels of each group, in reordered order
  std::vector<int64_t> group_begin, group_end;  // groups of each block
  std::vector<int64_t> place;                    // of each reordered channel in its group
  std::vector<int32_t> channels;                 // the tensor's channel of each place in the groups; -1 for padding

  Division(int64_t size, int64_t block, int64_t tile, const int64_t* perm) {
    const int64_t blocks = (size + block - 1) / block;
    const int64_t together = std::max<int64_t>(1, tile / block);  // blocks in a group
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * block, end = std::min(size, begin + block);
      if (b % together != 0) {
        count.back() += end - begin;
        group_begin.push_back(static_cast<int64_t>(first.size()) - 1);
      } else {
        group_begin.push_back(static_cast<int64_t>(first.size()));
        for (int64_t c = begin; c < end; c += tile) {
          first.push_back(c);
          count.push_back(std::min(tile, end - c));
        }
      }
      group_end.push_back(static_cast<int64_t>(first.size()));
    }
    channels.assign(static_cast<size_t>(groups() * tile), -1);
    place.resize(static_cast<size_t>(size));
    std::vector<int64_t> sorted;
    for (int64_t g = 0; g < groups(); ++g) {
      sorted.resize(static_cast<size_t>(count[g]));
      std::iota(sorted.begin(), sorted.end(), first[g]);
      std::sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return perm[a] < perm[b]; });
      for (int64_t i = 0; i < count[g]; ++i) {
        place[sorted[i]] = i;
        channels[g * tile + i] = static_cast<int32_t>(perm[sorted[i]]);
      }
    }
  }
  int64_t groups() const { return static_cast<int64_t>(first.size()); }
};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The upper bits of a float, rounded to nearest, ties to even where `dropped` bits go.
uint32_t round_bits(uint32_t bits, int dropped) {
  if ((bits & 0x7f800000U) == 0x7f800000U) return bits;
  const uint32_t half = (1U << (dropped - 1)) - 1;
  return (bits + half + ((bits >> dropped) & 1U)) & ~((1U << dropped) - 1);
}

uint16_t to_half(float value) {
  const uint32_t bits = bits_of(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000U);
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return sign | 0x7e00U;   // NaN
  if (magnitude >= 0x477ff000U) return sign | 0x7c00U;  // rounds to infinity
  if (magnitude >= 0x38800000U) {                       // normal
    return sign | static_cast<uint16_t>((round_bits(magnitude, 13) - 0x38000000U) >> 13);
  }
  float scaled;  // subnormal: a multiple of 2^-24, which adding a large number rounds to
  std::memcpy(&scaled, &magnitude, sizeof(scaled));
  return sign | static_cast<uint16_t>(bits_of(scaled + 0.5F) - bits_of(0.5F));
}

void store(unsigned char* values, int64_t at, float value, Type type) {
  switch (type) {
    case Type::f16: {
      const uint16_t half = to_half(value);
      std::memcpy(values + 2 * at, &half, 2);
      break;
    }
    case Type::bf16: {
      uint32_t bits = round_bits(bits_of(value), 16);
      if ((bits & 0x7fffffffU) > 0x7f800000U) bits |= 0x400000U;  // a NaN whose mark lies in the part that is cut off
      const auto upper = static_cast<uint16_t>(bits >> 16);
      std::memcpy(values + 2 * at, &upper, 2);
      break;
    }
    case Type::tf32: {
      const uint32_t bits = round_bits(bits_of(value), 13);
      std::memcpy(values + 4 * at, &bits, 4);
      break;
    }
    case Type::f32:
      std::memcpy(values + 4 * at, &value, 4);
      break;
  }
}

}  // namespace

int64_t PackedWeight::most_tiles() const {
  int64_t most = 0;
  for (int64_t r = 0; r < rows; ++r) most = std::max<int64_t>(most, tile_begin[r + 1] - tile_begin[r]);
  return most;
}

bool PackedWeight::input_in_order() const {
  for (size_t i = 0; i < input_channel.size(); ++i) {
    if (input_channel[i] != static_cast<int32_t>(i)) return false;
  }
  return true;
}

PackedWeight pack(const BlockSparseWeight& weight, Type type) {
  if (weight.outputs > INT32_MAX / 256 || weight.inputs > INT32_MAX / 256) {
    throw std::overflow_error("too many channels for the CUDA kernels");
  }
  // Tiles of 64 columns exist for 16-bit types only, with 64 rows and more; full float32 has tiles of 32 rows, which
  // larger packed rows are made of.
  const bool tall = weight.block_outputs % 64 == 0 && (item_size(type) == 4 || weight.block_inputs % 64 == 0);
  PackedWeight packed{};
  packed.bm = !tall ? 32 : weight.block_outputs % 128 == 0 ? 128 : 64;
  packed.bk = tall && item_size(type) == 2 ? 64 : 32;
  const Division out(weight.outputs, weight.block_outputs, packed.bm, weight.output_perm);
  const Division in(weight.inputs, weight.block_inputs, packed.bk, weight.input_perm);
  packed.rows = out.groups();
  packed.output_channel = out.channels;
  packed.input_channel = in.channels;
  packed.bias.assign(packed.output_channel.size(), 0.0F);
  for (size_t i = 0; i < packed.bias.size(); ++i) {
    if (weight.bias != nullptr && packed.output_channel[i] >= 0) packed.bias[i] = weight.bias[packed.output_channel[i]];
  }

  // Which tiles are kept, sorted by row, then column.
  std::vector<std::vector<int64_t>> columns(static_cast<size_t>(packed.rows));
  for (int64_t b = 0; b < weight.block_count; ++b) {
    const int64_t row = weight.block_index[2 * b], column = weight.block_index[2 * b + 1];
    for (int64_t r = out.group_begin[row]; r < out.group_end[row]; ++r) {
      for (int64_t c = in.group_begin[column]; c < in.group_end[column]; ++c) columns[r].push_back(c);
    }
  }
  packed.tile_begin.push_back(0);
  int64_t count = 0;
  for (std::vector<int64_t>& row : columns) {
    std::sort(row.begin(), row.end());
    row.erase(std::unique(row.begin(), row.end()), row.end());
    for (const int64_t c : row) packed.channel_tile.push_back(static_cast<int32_t>(c));
    count += static_cast<int64_t>(row.size());
    if (count > INT32_MAX / 2) throw std::overflow_error("too many blocks for the CUDA kernels");
    packed.tile_begin.push_back(static_cast<int32_t>(count));
  }
  packed.channel_tile.push_back(0);
  packed.row_order.resize(static_cast<size_t>(packed.rows));
  std::iota(packed.row_order.begin(), packed.row_order.end(), 0);
  std::stable_sort(packed.row_order.begin(), packed.row_order.end(),
                   [&](int32_t a, int32_t b) { return columns[a].size() > columns[b].size(); });

  const int64_t tile_values = checked_product(weight.taps, packed.bm * packed.bk);
  // A row's offsets into its weights are 32-bit.
  if (checked_product(packed.most_tiles() + 1, tile_values) > INT32_MAX) {
    throw std::overflow_error("a row of blocks is too large for the CUDA kernels");
  }
  packed.values.assign(static_cast<size_t>(checked_product(count, tile_values)) * item_size(type), 0);
  for (int64_t b = 0; b < weight.block_count; ++b) {
    const int64_t row = weight.block_index[2 * b], column = weight.block_index[2 * b + 1];
    for (int64_t r = out.group_begin[row]; r < out.group_end[row]; ++r) {
      for (int64_t c = in.group_begin[column]; c < in.group_end[column]; ++c) {
        const auto found = std::lower_bound(columns[r].begin(), columns[r].end(), c);
        const int64_t tile = packed.tile_begin[r] + (found - columns[r].begin());
        // The part of the block inside this tile, in reordered channels.
        const int64_t row_begin = std::max(out.first[r], row * weight.block_outputs);
        const int64_t row_end = std::min(out.first[r] + out.count[r], row * weight.block_outputs + weight.rows_of(row));
        const int64_t column_begin = std::max(in.first[c], column * weight.block_inputs);
        const int64_t column_end =
            std::min(in.first[c] + in.count[c], column * weight.block_inputs + weight.columns_of(column));
        for (int64_t m = row_begin; m < row_end; ++m) {
          for (int64_t k = column_begin; k < column_end; ++k) {
            const float* taps = weight.at(b, m - row * weight.block_outputs, k - column * weight.block_inputs);
            for (int64_t t = 0; t < weight.taps; ++t) {
              const int64_t at = ((tile * weight.taps + t) * packed.bm + out.place[m]) * packed.bk + in.place[k];
              store(packed.values.data(), at, taps[t], type);
            }
          }
        }
      }
    }
  }
  return packed;
}

}  // namespace tetris::cuda
