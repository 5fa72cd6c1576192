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
//
// Of kernels of bfloat16, the products are of 16-bit integers instead. The transforms of M = 4 make the rounding of their
// results some five times as large in Y, too much for the 8 significant bits of bfloat16; an instruction multiplies as many
// pairs of 16-bit integers (VPDPWSSD), whose sums are exact. With scales x of tile t and w of output row r, for element e,
//   V = round(X_e[c][t] / x_e[t]), U = round(W_e[r][c] / w_e[r]),  Y's element = x_e[t] w_e[r] sum over c of U V.
// Inputs of tile t between `low` and `high` (and 0) in all channels make |X_e| at most b_e (high - low), b_e being the larger
// one of the sums of B d B^T's positive and negative coefficients. That over the number of steps is x_e[t]; w_e[r] is the
// row's sum of |W_e| over 2^31 / steps (a little less): so no sum leaves the 32 bits of its integer, whatever the input.
// The more channels a row has, the fewer steps the input gets, and the fewer the weights.
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

  // The algorithm that should take the least time for a convolution that this one applies to.
  static ConvAlgorithm choose(const ConvKernel& conv, int64_t batch, const Spatial& input);

  // With tiles of `size` x `size` outputs; 2 or 4. `weights` is the same convolution in float32 (`conv` itself, if it is that)
  // and must have its packed weight, which is transformed here. `conv` must outlive this object.
  WinogradConv(const ConvKernel& conv, const ConvKernel& weights, int size);
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

  // The elements of the transformed filters of a group's rows in one packed column: element(k, values of each element and
  // channel of the column). Channels are counted by `weights`.
  template <class Element>
  void for_each_filter(const ConvKernel& weights, const Bundle& bundle, size_t group, Element element) const;
  void choose_scales(const ConvKernel& weights);
  void pack(const ConvKernel& weights);
  bool integers() const { return conv_.kernels_.winograd_product != nullptr; }
  int64_t elements() const { return (size_ + 2) * (size_ + 2); }
  int64_t work_of(size_t bundle) const;
  std::shared_ptr<const Plan> plan_for(int64_t batch, const Spatial& input, bool for_pair) const;
  std::shared_ptr<const Plan> make_plan(int64_t batch, const Spatial& input, bool for_pair) const;

  const ConvKernel& conv_;
  int size_;
  std::vector<ConvKernel::Source> used_;  // input channels that any block row reads, in the order of the blocks
  std::vector<int64_t> slot_;             // position in used_ of each packed column's channels
  std::vector<int64_t> range_channels_, range_begin_;  // the channels of used_, and of each position the first
  std::vector<Bundle> bundles_;
  std::vector<size_t> heaviest_first_;  // bundles by decreasing work
  Buffer weight_;                       // [bundle][element of the tile][row group][packed column][row]
  // Of integers only. w_e[r] is row_scale_[r] * element_scale_[e], rows counted as the bias's.
  std::vector<float> row_scale_, element_scale_;
  std::vector<float> input_scale_;    // of each element: steps / b_e
  std::vector<float> product_scale_;  // element_scale_ / input_scale_
  mutable std::mutex plans_mutex_;
  mutable std::vector<std::shared_ptr<const Plan>> plans_;  // of the latest input sizes
};

}  // namespace tetris
