// The weight as the GPU kernels take it.
#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/weight.h"
#include "device.h"

namespace tetris::cuda {

// The stored blocks cut, or put together, into tiles of `bm` x `bk`: a packed row is bm output channels (or fewer, filled
// up with zeros), a packed column bk input channels. Blocks larger than a tile become several tiles. As many smaller ones
// as fit share a tile, which is kept if any of them is, with zeros for the others.
struct PackedWeight {
  int bm, bk;
  int64_t rows;                         // packed rows
  std::vector<unsigned char> values;    // [tiles][taps][bm][bk] of the element type
  std::vector<float> bias;              // [rows * bm]
  std::vector<int32_t> tile_begin;      // [rows + 1]
  std::vector<int32_t> channel_tile;    // [tiles + 1]: packed column of each tile; one spare entry
  std::vector<int32_t> row_order;       // [rows]: most tiles first
  std::vector<int32_t> output_channel;  // [rows * bm]: channel of y, -1 for padding
  std::vector<int32_t> input_channel;   // [packed columns * bk]: channel of x, -1 for padding

  int64_t tiles() const { return tile_begin.back(); }
  int64_t most_tiles() const;   // of a row
  bool input_in_order() const;  // whether input_channel is 0, 1, 2, ..
};

// Throws std::overflow_error where an index would not fit.
PackedWeight pack(const BlockSparseWeight& weight, Type type);

}  // namespace tetris::cuda
