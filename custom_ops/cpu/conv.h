// Block-sparse convolution on the CPU: packing, the plan for an input size, the division into work items.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "parallel.h"
#include "quantize.h"
#include "weight.h"

namespace tetris {

// Spatial sizes as (outer, middle, inner): 1-D is (length, 1, 1), 2-D is (height, 1, width). The outer dimension is the
// one that strips are cut along.
using Spatial = std::array<int64_t, 3>;

struct ConvAttributes {
  Spatial kernel, strides, dilations, pads_begin, pads_end;
};

// Output size along each dimension; not positive where the input is too small.
Spatial conv_output_size(const ConvAttributes& attributes, const Spatial& input);

// What follows the convolution in the same pass over the output:
//   Y = clip(conv(X, W) + bias + addend), or Y = max over 2 x 2 windows, one beside the other, of clip(conv(X, W) + bias).
// A pooled output's odd last row and column are dropped; the middle dimension is not there. Nothing of the map before the
// pooling gets into memory: the threads keep a few rows of it at a time.
enum class Fused { kNothing, kAdd, kMaxPool };

class WinogradConv;

class ConvKernel {
 public:
  ConvKernel(const ConvAttributes& attributes, const BlockSparseWeight& weight, Activation activation,
             const KernelSet& kernels, Fused fused = Fused::kNothing,
             ConvAlgorithm algorithm = ConvAlgorithm::kAuto);
  ~ConvKernel();

  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }

  // What computes an input of this size: the one asked for where it applies, by default the one estimated to be fastest.
  ConvAlgorithm algorithm_for(int64_t batch, const Spatial& input) const;

  // For a kernel that will see inputs of one size only: where Winograd's algorithm is the one for it, the weight is
  // transformed now and only that form is kept. Otherwise the transformed weight is made when an input first needs it and
  // both are kept. run() takes any size all the same. Not while another thread uses the kernel.
  void specialize(int64_t batch, const Spatial& input);

  // kInt8: the bytes of every input stand for this range; without it each run finds that of its input.
  void set_input_range(const Range& range) { input_quantization_ = quantization_of(range); }

  // y[batch][outputs][output size] from x[batch][inputs][input] and, for kAdd, addend, of the size of y, which may be in
  // the same place. May be called from several threads at once.
  void run(const float* x, const float* addend, int64_t batch, const Spatial& input, float* y,
           const ThreadPool& pool) const;

 private:
  friend class WinogradConv;
  struct Plan;
  struct Work;
  // Input channels that share an element: one, or up to as many as the precision packs.
  struct Source {
    int64_t channel[kMostPacked];
    int count;
  };
  // Output rows that one call of the kernel computes together.
  struct RowGroup {
    int64_t row;  // first, in reordered order
    int rows, valid_rows;
    int64_t weight, bias;  // offsets into weight_, terms_
  };
  struct BlockRow {
    int64_t channel_begin, channel_count;  // into column_, of packed columns
    size_t group_begin, group_end;         // into groups_
  };

  const WinogradConv& winograd(ConvAlgorithm algorithm) const;
  std::shared_ptr<const Plan> plan_for(const Spatial& input, bool for_pair) const;
  std::shared_ptr<const Plan> make_plan(const Spatial& input, bool for_pair) const;
  void read_in_place(Plan& plan) const;
  void read_from_panel(Plan& plan) const;
  void add_strip(Plan& plan, int64_t first_row, int64_t rows, int64_t pixel, int64_t pixels) const;
  void add_tiles(Plan& plan, int64_t source, int64_t pixel, int64_t pixels, bool last_of_strip) const;
  // Row groups whose maps are in a band together.
  size_t band_groups() const { return kernels_.tiles != nullptr ? 1 : 4; }
  int64_t choose_band_rows(int64_t rows, int64_t width) const;
  void add_masks(Plan& plan) const;
  void add_tile_masks(Plan& plan) const;

  ConvAttributes attributes_;
  Activation activation_;
  const KernelSet& kernels_;
  Fused fused_;
  int64_t inputs_, outputs_, taps_;
  std::vector<BlockRow> block_rows_;
  std::vector<RowGroup> groups_;
  TileShape shape_;                   // a packed column is shape_.elements elements, one without TileKernels
  std::vector<int64_t> column_;       // position in used_ of each packed column's first element
  std::vector<Source> used_;          // what any block row reads
  std::vector<int64_t> output_perm_;  // output channel of each reordered row
  Buffer weight_;                     // [block row][row group][packed column][tap][row][element]
  RowTerms terms_;                    // [row group][row]
  std::optional<Quantization> input_quantization_;
  ConvAlgorithm algorithm_;
  bool may_transform_;  // whether these kernels have Winograd's algorithm for a convolution of this kind
  // Made when an input first needs them: the size is known only then.
  struct LazyWinograd {
    std::once_flag once;
    std::unique_ptr<WinogradConv> conv;
  };
  mutable LazyWinograd winograd2_, winograd4_;
  // kBFloat16 only: the same in float32, of which the weights are transformed where Winograd's algorithm may be faster.
  std::unique_ptr<ConvKernel> float32_;
  mutable LearnedThreads threads_;
  mutable std::mutex plans_mutex_;
  mutable std::vector<std::shared_ptr<const Plan>> plans_;  // of the latest input sizes
};

}  // namespace tetris
