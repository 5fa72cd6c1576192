// Block-sparse matrix product on the CPU: packing and the division into work items.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "parallel.h"
#include "quantize.h"
#include "weight.h"

namespace tetris {

class GemmKernel {
 public:
  GemmKernel(const BlockSparseWeight& weight, Activation activation, const KernelSet& kernels);

  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }

  // kInt8: the bytes of every input stand for this range; without it each run finds that of each sample.
  void set_input_range(const Range& range) { input_quantization_ = quantization_of(range); }

  // y[samples][outputs] from x[samples][inputs]. May be called from several threads at once.
  void run(const float* x, int64_t samples, float* y, const ThreadPool& pool) const;

 private:
  struct Work;
  struct Strips;
  struct Panel;
  struct BlockRow;
  // How many samples are computed how: vectors of them in strips, the rest as the few of a small product are.
  struct Division {
    int64_t vectors, rest;
  };
  Division divide(int64_t samples) const;
  GemmTile tile_of(const BlockRow& block_row, const Panel& panel) const;
  bool uses_tiles(int64_t samples) const { return kernels_.tiles != nullptr && samples >= kTileSize; }
  Quantization quantize(const float* sample) const;
  void pack(const float* x, const Quantization* quantized, int64_t begin, int64_t end, float* to) const;
  void pack_columns(const float* x, int64_t samples, const Quantization* quantized, float* channels, float* to,
                    int64_t pitch) const;
  // Output rows that one call of the kernel computes together: vectors * lanes of them, padded.
  struct Panel {
    int64_t row;  // first, in reordered order
    int vectors, valid_rows;
    bool contiguous;
    int64_t weight, bias;  // offsets into weight_, terms_
  };
  struct BlockRow {
    size_t run_begin, run_end;      // into runs_
    size_t panel_begin, panel_end;  // into panels_
    int64_t columns;
  };

  Activation activation_;
  const KernelSet& kernels_;
  int64_t inputs_, outputs_;
  TileShape shape_;
  int64_t block_inputs_, elements_per_block_, elements_;  // elements_: of a packed sample
  std::vector<BlockRow> block_rows_;
  std::vector<size_t> heaviest_first_;  // block rows by decreasing work
  std::vector<Run> runs_;
  std::vector<Panel> panels_;
  std::vector<int64_t> input_perm_;  // empty if it is the identity
  std::vector<int64_t> output_perm_;
  std::vector<int64_t> position_;         // of each input among the packed channels
  std::vector<int64_t> empty_positions_;  // that only fill up elements
  Buffer weight_;  // [block row][panel][kept element][row]
  RowTerms terms_;  // [panel][row]
  std::optional<Quantization> input_quantization_;
  mutable LearnedThreads threads_;
};

}  // namespace tetris
