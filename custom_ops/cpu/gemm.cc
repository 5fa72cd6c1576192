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
// Vectors of samples in a strip, and lanes of a vector, at most.
constexpr int64_t kStripVectors = 3;
constexpr int64_t kMostLanes = 16;
// Sums that a strip has to add to at a time, at least: each addition waits for the one before.
constexpr int64_t kLeastSums = 8;

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
  position_.resize(static_cast<size_t>(inputs_));
  const int64_t channels_per_block = elements_per_block_ * kernels.packed;
  for (int64_t i = 0; i < inputs_; ++i) {
    const int64_t position = i / block_inputs_ * channels_per_block + i % block_inputs_;
    position_[static_cast<size_t>(weight.input_perm[i])] = position;
  }
  for (int64_t position = 0; position < elements_ * kernels.packed; ++position) {
    const int64_t in_block = position % channels_per_block;
    const bool there = in_block < block_inputs_ && position / channels_per_block * block_inputs_ + in_block < inputs_;
    if (!there) empty_positions_.push_back(position);
  }

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

// Packs the elements [begin, end) of a sample.
void GemmKernel::pack(const float* x, const Quantization* quantized, int64_t begin, int64_t end, float* to) const {
  const int64_t packed = kernels_.packed;
  if (packed == 1) {
    for (int64_t e = begin; e < end; ++e) *to++ = x[input_perm_.empty() ? e : input_perm_[static_cast<size_t>(e)]];
    return;
  }
  float values[kPackPart * kMostPacked];
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
    PackedRows rows{};
    for (int64_t k = 0; k < packed; ++k) rows.from[k] = values + k;
    if (quantized != nullptr) rows.quantized = *quantized;
    kernels_.pack_rows(to + part - begin, rows, {1, count, 0, count, 0, packed, 0});
  }
}

// Packs up to a vector of samples, as columns. `channels` is space for other precisions than float32; `quantized` is that
// of all lanes.
void GemmKernel::pack_columns(const float* x, int64_t samples, const Quantization* quantized, float* channels, float* to,
                              int64_t pitch) const {
  for (const int64_t position : empty_positions_) {
    std::fill_n(channels + position * kernels_.lanes, kernels_.lanes, 0.0F);
  }
  kernels_.pack_strip({x, static_cast<int>(samples), inputs_, position_.data(), to, pitch, channels, elements_, quantized});
}

GemmTile GemmKernel::tile_of(const BlockRow& block_row, const Panel& panel) const {
  GemmTile tile{};
  tile.runs = runs_.data() + block_row.run_begin;
  tile.run_count = static_cast<int64_t>(block_row.run_end - block_row.run_begin);
  tile.weight = weight_.data() + panel.weight;
  tile.bias = terms_.bias.data() + panel.bias;
  tile.sample_stride = outputs_;
  tile.row_index = output_perm_.data() + panel.row;
  tile.contiguous = panel.contiguous;
  tile.valid_rows = panel.valid_rows;
  tile.vectors = panel.vectors;
  tile.low = activation_.low;
  tile.high = activation_.high;
  if (kernels_.precision == Precision::kInt8) {
    tile.row_scale = terms_.scale.data() + panel.bias;
    tile.row_sum = terms_.sum.data() + panel.bias;
  }
  return tile;
}

// One round of sample tiles: pack them, [element][sample] each, the samples filled up to whole vectors ([sample][element]
// for TileKernels), then multiply.
struct GemmKernel::Work {
  const GemmKernel& kernel;
  const float* x;
  float* y;
  bool uses_tiles;
  int64_t samples, tiles, tiles_per_item;
  float* packed;  // or null: one sample, read in place
  float* channels;          // of each tile: what StripPack needs
  Quantization* quantized;  // of each sample (kInt8), and as many as a vector has after them
  int64_t survey_items = 0;  // samples of which it has to be found
  int64_t groups = 1, prepare_items = 0, compute_items = 0;

  // Of a packed tile. One that is read or packed as it is has no gaps.
  int64_t pitch() const { return in_columns() ? ceil_div(kernel.kernels_.gemm_samples, lanes()) * lanes() : 1; }
  int64_t lanes() const { return kernel.kernels_.lanes; }
  bool in_columns() const { return !uses_tiles && samples > 1; }
  int64_t first_sample(int64_t tile) const {
    return uses_tiles ? std::min(samples, tile * kSamplesOfTiles) : samples * tile / tiles;
  }
  int64_t group_of(int64_t) const { return 0; }
  int64_t first_item(int64_t t, int64_t shares) const { return first_of_share(compute_items, t, shares); }
  void enter(int64_t) const {}

  void survey(int64_t sample) {
    quantized[sample] = kernel.quantize(x + sample * kernel.inputs_);
  }
  void finish_survey() {}

  void prepare(int64_t, int64_t item) {
    const int64_t tile = item % tiles, first = first_sample(tile), count = first_sample(tile + 1) - first;
    if (in_columns()) {
      float* space = channels + tile * kernel.elements_ * kernel.kernels_.packed * lanes();
      for (int64_t s = 0; s < count; s += lanes()) {
        kernel.pack_columns(x + (first + s) * kernel.inputs_, std::min(lanes(), count - s),
                            quantized == nullptr ? nullptr : quantized + first + s, space,
                            packed + tile * kernel.elements_ * pitch() + s, pitch());
      }
      return;
    }
    const int64_t begin = item / tiles * kPackElements, end = std::min(begin + kPackElements, kernel.elements_);
    for (int64_t s = first; s < first + count; ++s) {
      kernel.pack(x + s * kernel.inputs_, quantized == nullptr ? nullptr : quantized + s, begin, end,
                  packed + s * kernel.elements_ + begin);
    }
  }

  void compute(int64_t item) {
    const int64_t rows = static_cast<int64_t>(kernel.block_rows_.size());
    const BlockRow& block_row = kernel.block_rows_[kernel.heaviest_first_[static_cast<size_t>(item % rows)]];
    const int64_t begin = item / rows * tiles_per_item, end = std::min(begin + tiles_per_item, tiles);
    const TilesInUse tiles_in_use(uses_tiles ? kernel.kernels_.tiles : nullptr, kernel.shape_);
    for (size_t p = block_row.panel_begin; p < block_row.panel_end; ++p) {
      GemmTile call = kernel.tile_of(block_row, kernel.panels_[p]);
      call.x_stride = uses_tiles ? kernel.elements_ : pitch();
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = first_sample(tile);
        call.x = packed == nullptr ? x : packed + (in_columns() ? tile * pitch() : first) * kernel.elements_;
        call.y = y + first * kernel.outputs_;
        if (quantized != nullptr) call.quantized = quantized + first;
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

// Many samples: an item is a strip, all outputs of up to three vectors of samples, in memory of the thread that takes it.
// The last one also has the rest of the samples, a few, while a block row's weights are near.
struct GemmKernel::Strips {
  const GemmKernel& kernel;
  const float* x;
  int64_t samples;
  float* y;
  Division division;
  int64_t survey_items = 0, groups = 1, prepare_items = 0, compute_items = 0;

  int64_t group_of(int64_t) const { return 0; }
  int64_t first_item(int64_t t, int64_t shares) const { return first_of_share(compute_items, t, shares); }
  void enter(int64_t) const {}
  void survey(int64_t) {}
  void finish_survey() {}
  void prepare(int64_t, int64_t) {}

  struct Samples {
    int64_t first, count;
    float* panel;  // packed
    int64_t pitch;
    Quantization quantized[kStripVectors * kMostLanes];
  };

  void pack(Samples& part, float* channels) const {
    const int64_t lanes = kernel.kernels_.lanes;
    std::fill(std::begin(part.quantized), std::end(part.quantized), Quantization{1.0F, 1.0F, 0});
    for (int64_t s = 0; s < part.count; s += lanes) {
      const float* from = x + (part.first + s) * kernel.inputs_;
      const int64_t count = std::min(lanes, part.count - s);
      if (kernel.kernels_.precision == Precision::kInt8) {
        for (int64_t k = 0; k < count; ++k) part.quantized[s + k] = kernel.quantize(from + k * kernel.inputs_);
      }
      kernel.pack_columns(from, count, part.quantized + s, channels, part.panel + s, part.pitch);
    }
  }

  void compute(int64_t item) const {
    const KernelSet& kernels = kernel.kernels_;
    const int64_t lanes = kernels.lanes, elements = kernel.elements_;
    const int64_t begin = first_of_share(division.vectors, item, compute_items);
    const int64_t end = first_of_share(division.vectors, item + 1, compute_items);
    Samples strip{}, rest{};
    strip.first = begin * lanes;
    strip.pitch = (end - begin) * lanes;
    strip.count = std::min(strip.pitch, samples - strip.first);
    rest.first = samples - division.rest;
    rest.pitch = lanes;
    rest.count = item + 1 == compute_items ? division.rest : 0;
    const int64_t sizes[] = {checked_product(elements, strip.pitch), checked_product(kernel.outputs_, strip.pitch),
                             checked_product(elements, rest.count == 0 ? 0 : rest.pitch),
                             kernels.packed == 1 ? 0 : checked_product(elements, kernels.packed * lanes)};
    strip.panel = thread_scratch<Strips>(static_cast<size_t>(std::accumulate(sizes, sizes + 4, int64_t{0})));
    float* const sums = strip.panel + sizes[0];
    rest.panel = sums + sizes[1];
    float* const channels = rest.panel + sizes[2];
    pack(strip, channels);
    if (rest.count > 0) pack(rest, channels);

    float x_scale[kStripVectors * kMostLanes];
    int32_t zero_point[kStripVectors * kMostLanes];
    for (int64_t s = 0; s < strip.pitch; ++s) {
      x_scale[s] = strip.quantized[s].scale;
      zero_point[s] = strip.quantized[s].zero_point;
    }
    for (const BlockRow& block_row : kernel.block_rows_) {
      for (size_t p = block_row.panel_begin; p < block_row.panel_end; ++p) {
        GemmTile few = kernel.tile_of(block_row, kernel.panels_[p]);
        const int width = few.vectors * kernels.lanes;
        for (int row = 0; row < few.valid_rows; row += kernels.strip_rows) {
          GemmStrip call{};
          call.x = strip.panel;
          call.runs = few.runs;
          call.run_count = few.run_count;
          call.weight = few.weight + row;
          call.weight_stride = width;
          call.bias = few.bias + row;
          call.y = sums;
          call.row_index = few.row_index + row;
          call.valid_rows = few.valid_rows - row;
          call.rows = std::min(kernels.strip_rows, width);
          call.vectors = static_cast<int>(end - begin);
          call.low = few.low;
          call.high = few.high;
          if (few.row_scale != nullptr) {
            call.row_scale = few.row_scale + row;
            call.row_sum = few.row_sum + row;
            call.x_scale = x_scale;
            call.zero_point = zero_point;
          }
          kernels.gemm_strip(call);
        }
        if (rest.count > 0) {
          few.x = rest.panel;
          few.x_stride = rest.pitch;
          few.y = y + rest.first * kernel.outputs_;
          few.samples = static_cast<int>(rest.count);
          few.quantized = rest.quantized;
          kernels.gemm_tile(few);
        }
      }
    }
    for (int64_t s = 0; s < strip.count; s += lanes) {
      kernels.unpack_strip({sums + s, strip.pitch, static_cast<int>(std::min(lanes, strip.count - s)), kernel.outputs_,
                            y + (strip.first + s) * kernel.outputs_});
    }
  }
};

Quantization GemmKernel::quantize(const float* sample) const {
  if (input_quantization_) return *input_quantization_;
  Range range;
  kernels_.find_range(sample, inputs_, &range.low, &range.high);
  return quantization_of(range);
}

GemmKernel::Division GemmKernel::divide(int64_t samples) const {
  if (kernels_.tiles != nullptr || samples <= kernels_.gemm_samples) return {0, samples};
  const int64_t rest = samples % kernels_.lanes, vectors = samples / kernels_.lanes;
  if (rest > kernels_.gemm_samples) return {vectors + 1, 0};
  // A single sample is added up in another order, which would make its result depend on how many others there are: one is
  // computed twice instead.
  return {vectors, rest == 1 ? 2 : rest};
}

void GemmKernel::run(const float* x, int64_t samples, float* y, const ThreadPool& pool) const {
  const int64_t rows = static_cast<int64_t>(block_rows_.size());
  if (samples == 0 || rows == 0) return;
  const int64_t threads = threads_.count();
  const Division division = divide(samples);
  // With fewer strips than threads, the block rows are divided among them instead.
  const int64_t most_strips = division.vectors / ceil_div(kLeastSums, kernels_.strip_rows);
  if (most_strips >= threads) {
    Strips strips{*this, x, samples, y, division};
    strips.compute_items = std::min(most_strips, ceil_div(ceil_div(division.vectors, kStripVectors), threads) * threads);
    threads_.saw(run_work(pool, strips, threads));
    return;
  }
  const int64_t largest = std::max<int64_t>(
      kernels_.gemm_samples, kRoundBytes / (std::max<int64_t>(elements_, 1) * static_cast<int64_t>(sizeof(float))));
  std::vector<Quantization> quantized;
  if (kernels_.precision == Precision::kInt8) {
    quantized.assign(static_cast<size_t>(samples + kernels_.lanes), input_quantization_.value_or(Quantization{}));
  }
  for (int64_t done = 0; done < samples;) {
    const int64_t count = std::min(largest, samples - done);
    const bool tiles = uses_tiles(count);
    const int64_t at_a_time = tiles ? kSamplesOfTiles : kernels_.gemm_samples;
    Work work{*this,   x + done * inputs_, y + done * outputs_, tiles, count, ceil_div(count, at_a_time), 1,
              nullptr, nullptr, quantized.empty() ? nullptr : quantized.data() + done};
    if (work.in_columns()) {
      const int64_t size = checked_product(work.tiles * work.pitch(), elements_);
      const int64_t channels = kernels_.packed == 1 ? 0 : checked_product(work.tiles * work.lanes() * kernels_.packed, elements_);
      work.packed = thread_scratch<GemmKernel>(static_cast<size_t>(size + channels));
      work.channels = work.packed + size;
      work.prepare_items = work.tiles;
    } else if (tiles || !input_perm_.empty() || kernels_.packed > 1) {
      const int64_t rows_read = tiles ? ceil_div(count, kTileSize) * kTileSize : count;
      work.packed = thread_scratch<GemmKernel>(static_cast<size_t>(checked_product(rows_read, elements_)));
      work.prepare_items = work.tiles * ceil_div(elements_, kPackElements);
    }
    if (!quantized.empty() && !input_quantization_) work.survey_items = count;
    const int64_t items = threads * kItemsPerThread;
    work.tiles_per_item = std::clamp<int64_t>(work.tiles * rows / items, 1, kTilesPerItem);
    work.compute_items = rows * ceil_div(work.tiles, work.tiles_per_item);
    threads_.saw(run_work(pool, work, threads));
    done += count;
  }
}

}  // namespace tetris
