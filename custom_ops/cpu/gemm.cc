#include "gemm.h"

#include <algorithm>
#include <numeric>

namespace tetris {
namespace {

// Packed input of one round of sample tiles, at most.
constexpr int64_t kRoundBytes = 8 << 20;
// Sample tiles that a block row's weights are used for while they are in the cache.
constexpr int64_t kTilesPerItem = 8;
constexpr int64_t kItemsPerThread = 4;
// Samples that TileKernels multiply together.
constexpr int64_t kSamplesOfTiles = 2 * kTileSize;
// Elements that one work item packs, and that are packed at a time.
constexpr int64_t kPackElements = 4096;
constexpr int64_t kPackPart = 256;
// Floats after the packed weights that prefetches may name.
constexpr size_t kPrefetchPadding = 8192;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of so many columns of the weight, in whole chunks.
int64_t elements_of(int64_t columns, int packed, const TileShape& shape) {
  return ceil_div(ceil_div(columns, packed), shape.elements) * shape.elements;
}

}  // namespace

GemmKernel::GemmKernel(const BlockSparseWeight& weight, Activation activation, const KernelSet& kernels)
    : activation_(activation),
      kernels_(kernels),
      inputs_(weight.inputs),
      outputs_(weight.outputs),
      shape_{kTileSize, tile_shape(weight, kernels).elements},
      block_inputs_(weight.block_inputs),
      elements_per_block_(elements_of(block_inputs_, kernels.packed, shape_)),
      elements_(inputs_ / block_inputs_ * elements_per_block_ + elements_of(inputs_ % block_inputs_, kernels.packed, shape_)),
      input_perm_(weight.input_perm, weight.input_perm + weight.inputs),
      output_perm_(weight.output_perm, weight.output_perm + weight.outputs) {
  bool identity = true;
  for (int64_t i = 0; i < inputs_; ++i) identity = identity && weight.input_perm[i] == i;
  if (identity) input_perm_.clear();

  const std::vector<int64_t> begins = weight.row_begins();
  const int64_t lanes = kernels.lanes, widest = lanes * kernels.gemm_vectors;
  int64_t weight_size = 0, bias_size = 0;
  for (int64_t r = 0; r < weight.block_rows(); ++r) {
    BlockRow block_row{};
    block_row.run_begin = runs_.size();
    for (int64_t b = begins[static_cast<size_t>(r)]; b < begins[static_cast<size_t>(r) + 1]; ++b) {
      const int64_t column = weight.block_index[2 * b + 1];
      const int64_t first = column * elements_per_block_;
      const int64_t count = elements_of(weight.columns_of(column), kernels.packed, shape_);
      if (runs_.size() > block_row.run_begin && runs_.back().begin + runs_.back().count == first) {
        runs_.back().count += count;
      } else {
        runs_.push_back({first, count});
      }
      block_row.columns += count;
    }
    block_row.run_end = runs_.size();
    block_row.panel_begin = panels_.size();
    for (int64_t row = 0; row < weight.rows_of(r);) {
      const int64_t left = weight.rows_of(r) - row;
      // A wide panel where it wastes less than narrow ones would.
      const bool wide = left > widest - lanes;
      const int64_t width = wide ? widest : lanes;
      const int64_t valid = std::min(left, width);
      const int64_t first = r * weight.block_outputs + row;
      bool contiguous = true;
      for (int64_t k = 1; k < valid; ++k) {
        contiguous = contiguous && weight.output_perm[first + k] == weight.output_perm[first] + k;
      }
      panels_.push_back({first, wide ? kernels.gemm_vectors : 1, static_cast<int>(valid), contiguous, weight_size,
                         bias_size});
      weight_size += checked_product(block_row.columns, width);
      bias_size += width;
      row += valid;
    }
    block_row.panel_end = panels_.size();
    block_rows_.push_back(block_row);
  }

  weight_ = Buffer(static_cast<size_t>(weight_size) + kPrefetchPadding);
  terms_ = RowTerms(static_cast<size_t>(bias_size), kernels.precision);
  const RowScales scales(weight, kernels.precision);
  for (int64_t r = 0; r < weight.block_rows(); ++r) {
    const BlockRow& block_row = block_rows_[static_cast<size_t>(r)];
    for (size_t p = block_row.panel_begin; p < block_row.panel_end; ++p) {
      const Panel& panel = panels_[p];
      const int64_t width = panel.vectors * lanes;
      terms_.set(panel.bias, weight, scales, panel.row, panel.valid_rows);
      const int64_t first = panel.row - r * weight.block_outputs;
      float* out = weight_.data() + panel.weight;
      for (int64_t b = begins[static_cast<size_t>(r)]; b < begins[static_cast<size_t>(r) + 1]; ++b) {
        const int64_t columns = weight.columns_of(weight.block_index[2 * b + 1]);
        const int64_t packed = kernels.packed, elements = elements_of(columns, kernels.packed, shape_);
        for (int64_t k = 0; k < width; ++k) {
          const bool valid = k < panel.valid_rows;
          const float scale = valid ? scales.scale[static_cast<size_t>(panel.row + k)] : 1.0F;
          for (int64_t j = 0; j < elements * packed; j += packed) {
            float values[kMostPacked] = {};
            for (int64_t i = 0; valid && i < std::min(packed, columns - j); ++i) {
              values[i] = *weight.at(b, first + k, j + i);
            }
            out[j / packed * width + k] = pack_weights(kernels.precision, values, scale);
          }
        }
        out += elements * width;
      }
    }
  }

  heaviest_first_.resize(block_rows_.size());
  std::iota(heaviest_first_.begin(), heaviest_first_.end(), size_t{0});
  std::stable_sort(heaviest_first_.begin(), heaviest_first_.end(),
                   [this](size_t a, size_t b) { return block_rows_[a].columns > block_rows_[b].columns; });
}

// Packs the elements [begin, end) of a sample into to[0], to[stride], ...
void GemmKernel::pack(const float* x, const Quantization* quantized, int64_t begin, int64_t end, int64_t stride,
                      float* to) const {
  const int64_t packed = kernels_.packed;
  float values[kPackPart * kMostPacked], elements[kPackPart];
  for (int64_t part = begin; part < end; part += kPackPart) {
    const int64_t count = std::min(kPackPart, end - part);
    float* value = values;
    for (int64_t e = part; e < part + count; ++e) {
      const int64_t block = e / elements_per_block_, first = e % elements_per_block_ * packed;
      for (int64_t k = first; k < first + packed; ++k) {
        const int64_t j = block * block_inputs_ + k;
        const bool there = k < block_inputs_ && j < inputs_;
        *value++ = !there ? 0.0F : x[input_perm_.empty() ? j : input_perm_[static_cast<size_t>(j)]];
      }
    }
    const float* from = values;
    if (packed > 1) {
      PackedRows rows{};
      for (int64_t k = 0; k < packed; ++k) rows.from[k] = values + k;
      if (quantized != nullptr) rows.quantized = *quantized;
      kernels_.pack_rows(elements, rows, {1, count, 0, count, 0, packed});
      from = elements;
    }
    for (int64_t e = 0; e < count; ++e) to[(part - begin + e) * stride] = from[e];
  }
}

// One round of sample tiles: pack them, [element][sample] each ([sample][element] for TileKernels), then multiply.
struct GemmKernel::Work {
  const GemmKernel& kernel;
  const float* x;
  float* y;
  bool uses_tiles;
  int64_t samples, tiles, tiles_per_item;
  float* packed;  // or null: one sample, read in place
  Quantization* quantized;        // of each sample (kInt8)
  int64_t survey_items = 0;       // samples of which it has to be found
  int64_t groups = 1, prepare_items = 0, compute_items = 0;

  int64_t first_sample(int64_t tile) const {
    return uses_tiles ? std::min(samples, tile * kSamplesOfTiles) : samples * tile / tiles;
  }
  int64_t group_of(int64_t) const { return 0; }

  void survey(int64_t sample) {
    Range range;
    kernel.kernels_.find_range(x + sample * kernel.inputs_, kernel.inputs_, &range.low, &range.high);
    quantized[sample] = quantization_of(range);
  }
  void finish_survey() {}

  void prepare(int64_t, int64_t item) {
    const int64_t tile = item % tiles, first = first_sample(tile), count = first_sample(tile + 1) - first;
    const int64_t begin = item / tiles * kPackElements, end = std::min(begin + kPackElements, kernel.elements_);
    for (int64_t s = 0; s < count; ++s) {
      if (uses_tiles) {
        kernel.pack(x + (first + s) * kernel.inputs_, quantized == nullptr ? nullptr : quantized + first + s, begin, end, 1,
                    packed + (first + s) * kernel.elements_ + begin);
        continue;
      }
      kernel.pack(x + (first + s) * kernel.inputs_, quantized == nullptr ? nullptr : quantized + first + s, begin, end,
                  count, packed + first * kernel.elements_ + begin * count + s);
    }
  }

  void compute(int64_t item) {
    const int64_t rows = static_cast<int64_t>(kernel.block_rows_.size());
    const BlockRow& block_row = kernel.block_rows_[kernel.heaviest_first_[static_cast<size_t>(item % rows)]];
    const int64_t begin = item / rows * tiles_per_item, end = std::min(begin + tiles_per_item, tiles);
    const TilesInUse tiles_in_use(uses_tiles ? kernel.kernels_.tiles : nullptr, kernel.shape_);
    GemmTile call{};
    call.x_stride = kernel.elements_;
    call.runs = kernel.runs_.data() + block_row.run_begin;
    call.run_count = static_cast<int64_t>(block_row.run_end - block_row.run_begin);
    call.sample_stride = kernel.outputs_;
    call.low = kernel.activation_.low;
    call.high = kernel.activation_.high;
    for (size_t p = block_row.panel_begin; p < block_row.panel_end; ++p) {
      const Panel& panel = kernel.panels_[p];
      call.weight = kernel.weight_.data() + panel.weight;
      call.bias = kernel.terms_.bias.data() + panel.bias;
      call.row_index = kernel.output_perm_.data() + panel.row;
      call.contiguous = panel.contiguous;
      call.valid_rows = panel.valid_rows;
      call.vectors = panel.vectors;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = first_sample(tile);
        call.x = packed == nullptr ? x + first * kernel.inputs_ : packed + first * kernel.elements_;
        call.y = y + first * kernel.outputs_;
        if (quantized != nullptr) {
          call.quantized = quantized + first;
          call.row_scale = kernel.terms_.scale.data() + panel.bias;
          call.row_sum = kernel.terms_.sum.data() + panel.bias;
        }
        call.samples = static_cast<int>(first_sample(tile + 1) - first);
        if (uses_tiles) {
          kernel.kernels_.tiles->gemm_tile(call, kernel.shape_);
        } else {
          kernel.kernels_.gemm_tile(call);
        }
      }
    }
  }
};

void GemmKernel::run(const float* x, int64_t samples, float* y, const ThreadPool& pool) const {
  const int64_t rows = static_cast<int64_t>(block_rows_.size());
  if (samples == 0 || rows == 0) return;
  const int64_t largest = std::max<int64_t>(
      kernels_.gemm_samples, kRoundBytes / (std::max<int64_t>(elements_, 1) * static_cast<int64_t>(sizeof(float))));
  std::vector<Quantization> quantized;
  if (kernels_.precision == Precision::kInt8) {
    quantized.assign(static_cast<size_t>(samples), input_quantization_.value_or(Quantization{}));
  }
  for (int64_t done = 0; done < samples;) {
    const int64_t count = std::min(largest, samples - done);
    const bool tiles = uses_tiles(count);
    const int64_t at_a_time = tiles ? kSamplesOfTiles : kernels_.gemm_samples;
    Work work{*this,   x + done * inputs_, y + done * outputs_, tiles, count, ceil_div(count, at_a_time), 1,
              nullptr, quantized.empty() ? nullptr : quantized.data() + done};
    if (count > 1 || !input_perm_.empty() || kernels_.packed > 1) {
      const int64_t rows_read = tiles ? ceil_div(count, kTileSize) * kTileSize : count;
      work.packed = thread_scratch<GemmKernel>(static_cast<size_t>(checked_product(rows_read, elements_)));
      work.prepare_items = work.tiles * ceil_div(elements_, kPackElements);
    }
    if (!quantized.empty() && !input_quantization_) work.survey_items = count;
    const int64_t items = threads_.count() * kItemsPerThread;
    work.tiles_per_item = std::clamp<int64_t>(work.tiles * rows / items, 1, kTilesPerItem);
    work.compute_items = rows * ceil_div(work.tiles, work.tiles_per_item);
    threads_.saw(run_work(pool, work, threads_.count()));
    done += count;
  }
}

}  // namespace tetris
