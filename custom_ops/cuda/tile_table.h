// The tiles that were fastest on a GPU: what `gpu.py --tune` measured, tiles.csv.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "device.h"

namespace tetris::cuda {

// One line: for a layer of this size on this GPU, take this tile and this many splits.
struct TileChoice {
  int sm;  // compute capability, 10 * major + minor
  Type type;
  int taps, height;              // the kernel's taps (1, 9, or 0: any); rows of the packed weight that one tile holds
  int64_t rows, steps, pixels;   // packed rows; most tiles of a row x taps; output pixels of the batch
  int bm, bn;                    // the tile: output channels, pixels
  int64_t splits;
};

// The library's own table, or that of the file which the environment variable TETRIS_ONNX_CUDA_TILES names, for trying
// out. Throws std::invalid_argument with the line that is wrong.
std::vector<TileChoice> tile_table();

// The choice of `table` for the layer most like this one, or null: rows, steps and pixels may together be off by a factor
// of two. `layer.bm`, `layer.bn` and `layer.splits` are not looked at.
const TileChoice* find_choice(const std::vector<TileChoice>& table, const TileChoice& layer);

}  // namespace tetris::cuda
