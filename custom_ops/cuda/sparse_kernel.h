// Block-sparse convolution and matrix product on the GPU: the weight in device memory, the choice of tile, the launches.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "../cpu/weight.h"
#include "device.h"
#include "pack.h"
#include "tile_table.h"

namespace tetris::cuda {

// Sizes along (depth, height, width); what a tensor lacks of them is 1.
using Size = std::array<int64_t, 3>;

struct Window {
  Size kernel{1, 1, 1}, strides{1, 1, 1}, dilations{1, 1, 1}, pads_begin{0, 0, 0};
  // Whether depth is something that the input has. The fast 3 x 3 kernel leaves it out.
  bool has_depth = false;
};

// Whether the channels are the last dimension of x and of y. They are for a matrix product.
struct ChannelsLast {
  bool input = false, output = false;
};

class SparseKernel {
 public:
  SparseKernel(int device, Type type, const Window& window, const BlockSparseWeight& weight, Activation activation,
               ChannelsLast last);

  // What the table of measured tiles knows this layer by, for as many output pixels of a batch.
  TileChoice describe(int64_t pixels) const;

  // The same with what is chosen for it.
  TileChoice choose(int64_t pixels) const;

  // Enqueues y[batch][outputs][output] from x[batch][inputs][input] on the stream, or with the channels last.
  // `addend`, if not 0, is added before the activation; it is like y and may be y. Device pointers. May be called from
  // several threads at once.
  void run(DevicePointer x, int64_t batch, const Size& input, const Size& output, DevicePointer addend, DevicePointer y,
           StreamHandle* stream) const;

 private:
  // How one call is divided: the tile, and over how many programs each sum is split.
  struct Plan {
    const Tile* tile;
    const Kernel* kernel;
    int64_t splits;
  };
  struct Candidate {
    const Tile* tile;
    const Kernel* kernel;
  };
  double microseconds(const Tile& tile, int64_t splits, int64_t pixels) const;
  // `must_split`: through sum_splits, even if there is one split only.
  Plan plan(int64_t pixels, bool must_split) const;

  Device& device_;
  std::shared_ptr<void> user_;
  Type type_;
  Window window_;
  Activation activation_;
  ChannelsLast last_;
  int64_t inputs_, outputs_, taps_;
  // Of the packed weight, which itself is in device memory only.
  int bm_, bk_;
  int64_t rows_, channels_, most_tiles_;
  double mean_tiles_;  // of a row
  bool in_order_;
  std::unique_ptr<Device::Memory> memory_;
  DevicePointer values_, bias_, tile_begin_, channel_tile_, row_order_, output_channel_, input_channel_;
  std::vector<Candidate> whole_, split_;  // smallest tiles first
  const Kernel* channels_last_;
  const Kernel* sum_splits_;
  int kernel_taps_;                  // 1, 9, or 0: any
  std::vector<TileChoice> choices_;  // measured
  int64_t forced_bm_ = 0, forced_bn_ = 0, forced_splits_ = 0;  // TETRIS_ONNX_CUDA_TILE
};

}  // namespace tetris::cuda
