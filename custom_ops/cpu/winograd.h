// Block-sparse Winograd convolution on the CPU: 3x3, stride 1, F(2x2, 3x3) and F(4x4, 3x3).
//
// A tile of M x M outputs needs N x N inputs, N = M + 2. With the transforms A (M x N), G (N x 3), B (N x N) of Winograd's
// algorithm (Toom-Cook with N - 1 points and infinity; Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016),
//   Y = A [sum over the input channels c of (G g_c G^T) o (B d_c B^T)] A^T,   o: product of the elements,
// which is N^2 multiplications for a channel and a tile instead of 9 M^2: 2.25 times fewer for M = 2, 4 times for M = 4.
// G works on one filter alone: a pruned block is zero before it and after it, so only kept blocks are multiplied.
//
// Rounding: the largest error relative to the largest output is some 1e-6 for M = 2 and up to 5e-6 for M = 4, where the
// direct kernel has up to 3e-6. The points 0, +-1/sqrt(2), +-sqrt(2) keep it there: the usual 0, +-1, +-2 have four times
// the error. NaN and infinity spread to the whole tile.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "conv.h"

namespace tetris {

class WinogradConv {
 public:
  // Whether the convolution is of the kind.
  static bool applies(const ConvAttributes& attributes, const Spatial& input);

  // The algorithm that should take the least time for a convolution that this one applies to, if the direct one is
  // `direct_speed` times as fast as that of `conv`.
  static ConvAlgorithm choose(const ConvKernel& conv, int64_t batch, const Spatial& input, double direct_speed = 1);

  // With tiles of `size` x `size` outputs; 2 or 4. `conv` must have its packed weight, which is transformed here, and
  // must outlive this object.
  WinogradConv(const ConvKernel& conv, int size);
  ~WinogradConv();

  // As ConvKernel::run, for sizes that it applies to.
  void run(const float* x, const float* addend, int64_t batch, const Spatial& input, float* y,
           const ThreadPool& pool) const;

 private:
  struct Plan;
  struct Work;
  // Output rows whose products are kept until they are transformed: some groups of a block row.
  struct Bundle {
    size_t block_row, group_begin, group_end;
    int64_t weight;  // offset into weight_
  };

  int64_t work_of(size_t bundle) const;
  std::shared_ptr<const Plan> plan_for(int64_t batch, const Spatial& input, bool for_pair) const;
  std::shared_ptr<const Plan> make_plan(int64_t batch, const Spatial& input, bool for_pair) const;

  const ConvKernel& conv_;
  int size_;
  std::vector<int64_t> used_;  // input channels that any block row reads, in the order of the blocks
  std::vector<int64_t> slot_;  // position in used_ of each packed column's channel
  std::vector<Bundle> bundles_;
  std::vector<size_t> heaviest_first_;  // bundles by decreasing work
  Buffer weight_;                       // [bundle][element of the tile][row group][packed column][row]
  mutable std::mutex plans_mutex_;
  mutable std::vector<std::shared_ptr<const Plan>> plans_;  // of the latest input sizes
};

}  // namespace tetris
