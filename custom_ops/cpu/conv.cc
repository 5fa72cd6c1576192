#include "conv.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "winograd.h"

namespace tetris {
namespace {

// Input that one strip reads: it stays in the second-level cache while all block rows go over it.
constexpr int64_t kStripBytes = 384 << 10;
// An input up to this size is not cut into strips: it is in the cache often enough.
constexpr int64_t kWholeBytes = 2 << 20;
// The same for panels, of which all block rows read all: they should stay in the second-level cache.
constexpr int64_t kPanelStripBytes = 512 << 10;
constexpr int64_t kWholePanelBytes = 1 << 20;
// Maps up to this many pixels are copied into a row-padded panel, larger ones are read in place: there, the few tiles
// at the upper and the lower edge, which need a mask for each tap, weigh less than the copy.
constexpr int64_t kPanelPixels = 28 * 28;
// Work items that every thread should find, so that a late one costs little.
constexpr int64_t kItemsPerThread = 16;
// Strips that each thread should find where it makes the panels of its own.
constexpr int64_t kStagesPerThread = 2;
// While a channel (or those of an element) is copied into a panel, one is fetched that comes so many floats later, and at
// most so many channels: of small maps not the next one, as a line may take 200 ns from another core.
constexpr int64_t kFetchedAhead = 1024, kMostAhead = 16;
constexpr size_t kMaxPlans = 8;
// Floats after the packed weights that prefetches may name.
constexpr size_t kPrefetchPadding = 8192;
// A pooled convolution keeps a band, an even number of rows, of some channels' maps in the cache until it is pooled.
constexpr int64_t kBandPixels = 2048;
// Kept channels times taps whose multiplication takes as long as bringing a line from the cache that the cores share.
constexpr int64_t kLongReduction = 48;
// Kept channels times taps whose multiplication takes as long as storing the results.
constexpr int64_t kStoring = 5;
// Floats after the packed bias that a vector of rows may touch (and ignore).
constexpr size_t kBiasPadding = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows are taken 8, 4, 2 or 1 at a time: the largest that the instruction set has registers for, then the smallest
// that holds what is left.
int rows_at_a_time(int64_t left, int max_rows) {
  int rows = max_rows;
  while (rows > 1 && rows / 2 >= left) rows /= 2;
  return rows;
}

int64_t volume(const Spatial& size) { return size[0] * size[1] * size[2]; }

}  // namespace

Spatial conv_output_size(const ConvAttributes& a, const Spatial& input) {
  Spatial output{};
  for (size_t d = 0; d < 3; ++d) {
    const int64_t room =
        input[d] + a.pads_begin[d] + a.pads_end[d] - ((a.kernel[d] - 1) * a.dilations[d] + 1);
    output[d] = room < 0 ? 0 : room / a.strides[d] + 1;
  }
  return output;
}

ConvKernel::ConvKernel(const ConvAttributes& attributes, const BlockSparseWeight& weight, Activation activation,
                       const KernelSet& kernels, Fused fused, ConvAlgorithm algorithm)
    : attributes_(attributes),
      activation_(activation),
      kernels_(kernels),
      fused_(fused),
      inputs_(weight.inputs),
      outputs_(weight.outputs),
      taps_(weight.taps),
      shape_(tile_shape(weight, kernels)),
      output_perm_(weight.output_perm, weight.output_perm + weight.outputs),
      algorithm_(algorithm),
      // Of bytes, four at a time, and of tiles, Winograd's products would never be faster.
      may_transform_(kernels.winograd_input != nullptr && kernels.tiles == nullptr &&
                     WinogradConv::applies(attributes, {1, 1, 1})) {
  const std::vector<int64_t> begins = weight.row_begins();
  // Channels that share an element are neighbors in the reordered order and in the same block, so that all block rows can
  // read the same elements.
  // The elements of a packed column are neighbors everywhere; the last of a block are filled up with zeros.
  const int64_t packed = kernels.packed, column_width = packed * shape_.elements;
  const int64_t per_block = ceil_div(weight.block_inputs, column_width);
  std::vector<int64_t> slot(static_cast<size_t>(ceil_div(inputs_, weight.block_inputs) * per_block), -1);
  int64_t weight_size = 0, bias_size = 0;
  for (int64_t r = 0; r < weight.block_rows(); ++r) {
    BlockRow block_row{};
    block_row.channel_begin = static_cast<int64_t>(column_.size());
    for (int64_t b = begins[static_cast<size_t>(r)]; b < begins[static_cast<size_t>(r) + 1]; ++b) {
      const int64_t column = weight.block_index[2 * b + 1], width = weight.columns_of(column);
      for (int64_t j = 0; j < width; j += column_width) {
        const int64_t packed_column = column * per_block + j / column_width;
        slot[static_cast<size_t>(packed_column)] = 0;
        column_.push_back(packed_column);
      }
    }
    block_row.channel_count = static_cast<int64_t>(column_.size()) - block_row.channel_begin;
    block_row.group_begin = groups_.size();
    for (int64_t row = 0; row < weight.rows_of(r);) {
      const int64_t left = weight.rows_of(r) - row;
      const int rows = kernels.tiles == nullptr ? rows_at_a_time(left, kernels.conv_rows)
                                                : shape_.rows * (left > shape_.rows ? 2 : 1);
      const int valid = static_cast<int>(std::min<int64_t>(left, rows));
      groups_.push_back({r * weight.block_outputs + row, rows, valid, weight_size, bias_size});
      weight_size += checked_product(checked_product(block_row.channel_count, taps_), rows * shape_.elements);
      bias_size += rows;
      row += valid;
    }
    block_row.group_end = groups_.size();
    block_rows_.push_back(block_row);
  }
  // The reordered channel that packed column `i` begins with.
  auto first_channel = [&](size_t i) {
    const int64_t column = static_cast<int64_t>(i) / per_block, within = static_cast<int64_t>(i) % per_block;
    return column * weight.block_inputs + within * column_width;
  };
  std::vector<size_t> order;
  for (size_t i = 0; i < slot.size(); ++i) {
    if (slot[i] == 0) order.push_back(i);
  }
  // In the order of the input's channels, which is how memory is read fastest.
  std::sort(order.begin(), order.end(), [&](size_t i, size_t j) {
    return weight.input_perm[first_channel(i)] < weight.input_perm[first_channel(j)];
  });
  for (const size_t i : order) {
    slot[i] = static_cast<int64_t>(used_.size());
    const int64_t first = first_channel(i), block = first / weight.block_inputs * weight.block_inputs;
    const int64_t end = std::min(block + weight.block_inputs, inputs_);
    for (int64_t j = first; j < first + column_width; j += packed) {
      Source source{};
      source.count = static_cast<int>(std::clamp<int64_t>(end - j, 0, packed));
      for (int k = 0; k < source.count; ++k) source.channel[k] = weight.input_perm[j + k];
      used_.push_back(source);
    }
  }
  for (int64_t& column : column_) column = slot[static_cast<size_t>(column)];

  weight_ = Buffer(static_cast<size_t>(weight_size) + kPrefetchPadding);
  terms_ = RowTerms(static_cast<size_t>(bias_size) + kBiasPadding, kernels.precision);
  const RowScales scales(weight, kernels.precision);
  for (int64_t r = 0; r < weight.block_rows(); ++r) {
    const BlockRow& block_row = block_rows_[static_cast<size_t>(r)];
    for (size_t g = block_row.group_begin; g < block_row.group_end; ++g) {
      const RowGroup& group = groups_[g];
      terms_.set(group.bias, weight, scales, group.row, group.valid_rows);
      const int64_t first = group.row - r * weight.block_outputs;
      float* out = weight_.data() + group.weight;
      for (int64_t b = begins[static_cast<size_t>(r)]; b < begins[static_cast<size_t>(r) + 1]; ++b) {
        const int64_t width = weight.columns_of(weight.block_index[2 * b + 1]);
        const int elements = shape_.elements;
        for (int64_t j = 0; j < ceil_div(width, column_width) * column_width; j += packed) {
          const int64_t element = j / packed % elements;
          for (int k = 0; k < group.rows; ++k) {
            const bool valid = k < group.valid_rows;
            for (int64_t t = 0; t < taps_; ++t) {
              float values[kMostPacked] = {};
              for (int64_t i = 0; valid && i < std::min(packed, width - j); ++i) {
                values[i] = weight.at(b, first + k, j + i)[t];
              }
              const float scale = valid ? scales.scale[static_cast<size_t>(group.row + k)] : 1.0F;
              out[(t * group.rows + k) * elements + element] = pack_weights(kernels.precision, values, scale);
            }
          }
          if (element == elements - 1) out += taps_ * group.rows * elements;
        }
      }
    }
  }
  if (kernels.precision == Precision::kBFloat16 && may_transform_ && algorithm != ConvAlgorithm::kDirect) {
    float32_ = std::make_unique<ConvKernel>(attributes, weight, activation, select_kernels(), fused, algorithm);
  }
}

ConvKernel::~ConvKernel() = default;

// Where everything lies for one input size. The kernel reads its input either in place (`direct`) or from a panel:
// a copy, for a strip of output rows, in which each tap of each output pixel p lies at a constant distance from p:
//   panel[channel][phase][inner tap][row][inner output pixel],
// with a phase for each remainder of the outer position modulo the outer stride. For a kernel three wide, padded by one,
// not every inner tap needs a plane of its own: a shift by one pixel, with the sides masked, gives the same. One plane is
// enough for stride 1, two (of the even and the odd columns) for stride 2.
struct ConvKernel::Plan {
  struct Tile {
    int64_t source, pixel;  // offsets into the source's channel and the output's
    int64_t target;         // where it is stored in its channel: of the output, or of the band
    int vectors, last_lanes;
    TapMode mode;
    size_t masks;
    bool extra;  // see ConvTile
  };
  struct Strip {
    int64_t first_row, rows;  // of the output, along the outer dimension (panels only)
    size_t tile_begin, tile_end;
    size_t band_begin, band_end;  // pooled only
  };
  struct Band {
    int64_t pooled_row, pooled_rows;
    size_t tile_begin, tile_end;
  };
  struct Phase {
    int64_t remainder, offset, extra_rows, rows;
  };
  // What a tap sees along one dimension: output position i is the input's i * stride + offset, inside the input for
  // begin <= i < end.
  struct View {
    int64_t offset, begin, end;
  };
  struct InnerTap {
    View middle, inner;
  };

  Spatial input, output;
  bool for_pair;  // of threads: see LearnedThreads. The tiles are the same, and so are the results
  int64_t input_plane, output_plane;
  int64_t result_plane;  // of Y: smaller than output_plane where it is pooled
  bool pointwise, direct, side_masked;
  // TileKernels have no masks for the sides: rows of the inner dimension have a zero before them in the panel (of which the
  // row before ends with, too) and `pitch` positions in all; the tiles run over all of these. Otherwise 0, and its width.
  int64_t margin, pitch;
  std::vector<Tile> tiles;
  std::vector<uint32_t> masks;
  std::vector<Strip> strips;
  std::vector<int64_t> channel_offset;  // of each packed column
  std::vector<int64_t> tap_offset;
  std::vector<int64_t> row_offset;  // of each reordered row's output channel
  // Pooled only: the bands, how many rows of the map each has, and the distance of the channels in one.
  std::vector<Band> bands;
  int64_t band_rows = 0, band_stride = 0;
  std::vector<int64_t> band_offset;  // of each reordered row in its band
  // Panels only.
  std::vector<Phase> phases;
  std::vector<InnerTap> inner_taps;
  int64_t channel_stride = 0, channel_end = 0, panel_size = 0;
  // The taps of the last pixels of a side-masked strip, sides applied: [channel][tap][tail_width], after the panel.
  std::vector<int64_t> tail_channel_offset, tail_tap_offset;
  int64_t tail_begin = 0, tail_width = 0;
};

// Floats before and after a panel that a vector may touch (and ignore) beyond its ends.
constexpr int64_t kPanelSlack = 64;

std::shared_ptr<const ConvKernel::Plan> ConvKernel::plan_for(const Spatial& input, bool for_pair) const {
  {
    const std::lock_guard<std::mutex> lock(plans_mutex_);
    for (const auto& plan : plans_) {
      if (plan->input == input && plan->for_pair == for_pair) return plan;
    }
  }
  std::shared_ptr<const Plan> plan = make_plan(input, for_pair);
  const std::lock_guard<std::mutex> lock(plans_mutex_);
  if (plans_.size() == kMaxPlans) plans_.erase(plans_.begin());
  plans_.push_back(plan);
  return plan;
}

std::shared_ptr<const ConvKernel::Plan> ConvKernel::make_plan(const Spatial& input, bool for_pair) const {
  auto owner = std::make_shared<Plan>();
  Plan& plan = *owner;
  const ConvAttributes& a = attributes_;
  plan.input = input;
  plan.for_pair = for_pair;
  plan.output = conv_output_size(a, input);
  plan.input_plane = volume(input);
  if (fused_ == Fused::kMaxPool) plan.output[0] -= plan.output[0] % 2;  // an odd last row is not needed
  plan.output_plane = volume(plan.output);
  plan.result_plane = fused_ == Fused::kMaxPool ? plan.output[0] / 2 * (plan.output[2] / 2) : plan.output_plane;
  for (const int64_t channel : output_perm_) plan.row_offset.push_back(channel * plan.result_plane);
  if (plan.result_plane == 0) return owner;
  if (fused_ == Fused::kMaxPool) {
    plan.band_rows = choose_band_rows(plan.output[0], plan.output[2]);
    // Whole cache lines, and not a multiple of 512 bytes, as the panel's channels.
    plan.band_stride = ceil_div(plan.band_rows * plan.output[2], 16) * 16;
    if (plan.band_stride % 128 == 0) plan.band_stride += 16;
    plan.band_offset.resize(output_perm_.size());
    for (const BlockRow& block_row : block_rows_) {
      for (size_t g = block_row.group_begin; g < block_row.group_end; ++g) {
        const int64_t first = static_cast<int64_t>((g - block_row.group_begin) % band_groups()) * kernels_.conv_rows;
        for (int k = 0; k < groups_[g].valid_rows; ++k) {
          plan.band_offset[static_cast<size_t>(groups_[g].row + k)] = (first + k) * plan.band_stride;
        }
      }
    }
  }

  plan.pointwise = taps_ == 1 && a.strides == Spatial{1, 1, 1} && a.pads_begin == Spatial{0, 0, 0} &&
                   a.pads_end == Spatial{0, 0, 0};
  plan.side_masked = a.kernel[1] == 1 && a.strides[1] == 1 && a.pads_begin[1] == 0 && a.pads_end[1] == 0 &&
                     input[1] == 1 && a.kernel[2] == 3 && a.dilations[2] == 1 && a.pads_begin[2] == 1 &&
                     ((a.strides[2] == 1 && a.pads_end[2] == 1) || a.strides[2] == 2);
  plan.margin = kernels_.tiles != nullptr && plan.side_masked ? 1 : 0;
  plan.pitch = plan.output[2] + plan.margin;
  plan.direct = kernels_.precision == Precision::kFloat32 && (plan.pointwise || (plan.side_masked && a.strides[0] == 1 && a.strides[2] == 1 &&
                                   plan.output_plane > kPanelPixels));
  if (plan.direct) {
    read_in_place(plan);
  } else {
    read_from_panel(plan);
  }
  if (kernels_.tiles != nullptr) {
    add_tile_masks(plan);
  } else if (plan.side_masked || plan.direct) {
    add_masks(plan);
  }
  return owner;
}

void ConvKernel::read_in_place(Plan& plan) const {
  const ConvAttributes& a = attributes_;
  for (int64_t i = 0; i < taps_; ++i) {
    const int64_t row = i / a.kernel[2] * a.dilations[0] - a.pads_begin[0];
    plan.tap_offset.push_back(row * plan.output[2] + i % a.kernel[2] - a.pads_begin[2]);
  }
  for (const int64_t c : column_) {
    plan.channel_offset.push_back(used_[static_cast<size_t>(c)].channel[0] * plan.input_plane);
  }
  // An even number of strips: an odd one leaves one of two threads idle at the end.
  const int64_t tile_pixels =
      plan.band_rows > 0 ? plan.band_rows * plan.output[2] : kernels_.conv_vectors * kernels_.lanes;
  const int64_t input_bytes = static_cast<int64_t>(used_.size()) * plan.input_plane * 4;
  const int64_t tiles = ceil_div(plan.output_plane, tile_pixels);
  int64_t strips = input_bytes <= kWholeBytes ? 1 : ceil_div(input_bytes, 2 * kStripBytes) * 2;
  strips = std::min(strips, tiles);
  if (plan.band_rows > 0) strips = ceil_div(tiles, std::max<int64_t>(1, tiles / strips));  // of as many bands each
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t begin = first_of_share(tiles, s, strips) * tile_pixels;
    const int64_t end = std::min(first_of_share(tiles, s + 1, strips) * tile_pixels, plan.output_plane);
    add_strip(plan, 0, 0, begin, end - begin);
  }
}

void ConvKernel::read_from_panel(Plan& plan) const {
  const ConvAttributes& a = attributes_;
  const int64_t width = plan.output[2];
  const int64_t inner = plan.output[1] * plan.pitch;
  auto view = [](int64_t offset, int64_t stride, int64_t size, int64_t input_size) {
    const int64_t begin = offset < 0 ? std::min(size, ceil_div(-offset, stride)) : 0;
    const int64_t room = input_size - offset;  // positions from the first to the input's end
    return Plan::View{offset, begin, std::max(begin, room <= 0 ? 0 : std::min(size, ceil_div(room, stride)))};
  };
  const int64_t planes = plan.side_masked ? a.strides[2] : a.kernel[1] * a.kernel[2];
  for (int64_t i = 0; i < planes; ++i) {
    const int64_t middle = plan.side_masked ? 0 : i / a.kernel[2] * a.dilations[1] - a.pads_begin[1];
    const int64_t column = plan.side_masked ? i : i % a.kernel[2] * a.dilations[2] - a.pads_begin[2];
    plan.inner_taps.push_back({view(middle, a.strides[1], plan.output[1], plan.input[1]),
                               view(column, a.strides[2], width, plan.input[2])});
  }
  const int64_t inner_count = static_cast<int64_t>(plan.inner_taps.size());
  const int64_t stride = a.strides[0];
  for (int64_t k = 0; k < a.kernel[0]; ++k) {
    const int64_t remainder = k * a.dilations[0] % stride, extra = k * a.dilations[0] / stride;
    auto phase = std::find_if(plan.phases.begin(), plan.phases.end(),
                              [&](const Plan::Phase& p) { return p.remainder == remainder; });
    if (phase == plan.phases.end()) phase = plan.phases.insert(phase, {remainder, 0, 0, 0});
    phase->extra_rows = std::max(phase->extra_rows, extra);
  }
  const int64_t row_bytes = checked_product(
      checked_product(static_cast<int64_t>(used_.size()), inner * 4),
      checked_product(inner_count, static_cast<int64_t>(plan.phases.size())));
  const int64_t total_rows = plan.output[0];
  int64_t strips = 1;
  if (row_bytes > 0 && total_rows > kWholePanelBytes / row_bytes) {
    const int64_t rows = std::max<int64_t>(1, kPanelStripBytes / row_bytes);
    strips = std::min(total_rows, ceil_div(total_rows, 2 * rows) * 2);
  }
  int64_t strip_rows = ceil_div(total_rows, strips);
  if (plan.band_rows > 0) strip_rows = strips == 1 ? total_rows : ceil_div(strip_rows, plan.band_rows) * plan.band_rows;
  const int64_t row_pixels = plan.output[1] * width;
  std::vector<int64_t> begins;  // first pixel of each strip
  for (int64_t row = 0; row < total_rows; row += strip_rows) begins.push_back(row * row_pixels);
  if (plan.for_pair && strips == 1 && plan.band_rows == 0 && kernels_.tiles == nullptr &&
      plan.output_plane >= 4 * kernels_.conv_vectors * kernels_.lanes) {
    // Two strips of the same tiles.
    add_tiles(plan, 0, 0, plan.output_plane, true);
    int64_t cut = 0;
    for (const Plan::Tile& tile : plan.tiles) {
      if (std::abs(2 * tile.pixel - plan.output_plane) < std::abs(2 * cut - plan.output_plane)) cut = tile.pixel;
    }
    plan.tiles.clear();
    begins.push_back(cut);
    strip_rows = std::max(ceil_div(cut, row_pixels), total_rows - cut / row_pixels);
  }
  int64_t offset = 0;
  for (Plan::Phase& phase : plan.phases) {
    phase.offset = offset;
    phase.rows = strip_rows + phase.extra_rows;
    offset += checked_product(checked_product(phase.rows, inner), inner_count);
  }
  plan.channel_end = offset;
  offset += plan.margin;
  // Whole cache lines, and not a multiple of 512 bytes: channels must not fight for the same lines of the cache.
  plan.channel_stride = ceil_div(offset, 16) * 16;
  if (plan.channel_stride % 128 == 0) plan.channel_stride += 16;
  plan.tail_begin = checked_product(plan.channel_stride, static_cast<int64_t>(used_.size())) + kPanelSlack;
  if (plan.side_masked && kernels_.tail_pixels > 0) {
    plan.tail_width = kernels_.tail_pixels;
    for (int64_t t = 0; t < taps_; ++t) plan.tail_tap_offset.push_back(t * plan.tail_width);
    for (const int64_t c : column_) {
      plan.tail_channel_offset.push_back(plan.tail_begin + c * taps_ * plan.tail_width);
    }
  }
  plan.panel_size = plan.tail_begin + kPanelSlack +
                    checked_product(static_cast<int64_t>(used_.size()), taps_ * plan.tail_width);
  for (int64_t k = 0; k < a.kernel[0]; ++k) {
    const int64_t remainder = k * a.dilations[0] % stride, extra = k * a.dilations[0] / stride;
    const auto phase = std::find_if(plan.phases.begin(), plan.phases.end(),
                                    [&](const Plan::Phase& p) { return p.remainder == remainder; });
    const int64_t inner_kernel = a.kernel[1] * a.kernel[2];
    for (int64_t i = 0; i < inner_kernel; ++i) {
      // Side-masked taps see columns -1, 0 and 1 of each pixel: with stride 2, planes 1 (of the pixel before), 0, 1.
      const int64_t plane = !plan.side_masked ? i : a.strides[2] == 1 ? 0 : i != 1;
      const int64_t shift = !plan.side_masked ? 0 : a.strides[2] == 1 ? i - 1 : i == 0 ? -1 : 0;
      plan.tap_offset.push_back(phase->offset + (extra + plane * phase->rows) * inner + shift + plan.margin);
    }
  }
  for (const int64_t c : column_) plan.channel_offset.push_back(c * plan.channel_stride);
  for (size_t s = 0; s < begins.size(); ++s) {
    const int64_t begin = begins[s], end = s + 1 < begins.size() ? begins[s + 1] : plan.output_plane;
    add_strip(plan, begin / row_pixels, ceil_div(end, row_pixels) - begin / row_pixels, begin, end - begin);
  }
}

// Adds the strip of `pixels` output pixels that begin at `pixel`, and its tiles.
void ConvKernel::add_strip(Plan& plan, int64_t first_row, int64_t rows, int64_t pixel, int64_t pixels) const {
  const size_t begin = plan.tiles.size(), band_begin = plan.bands.size();
  const int64_t width = plan.output[2];
  const int64_t source = plan.direct ? pixel : pixel - first_row * plan.output[1] * width;
  const int64_t most = plan.band_rows > 0 ? plan.band_rows * width : pixels;
  for (int64_t done = 0; done < pixels; done += most) {
    const int64_t count = std::min(most, pixels - done);
    const size_t first_tile = plan.tiles.size();
    add_tiles(plan, source + done / width * plan.margin + done, pixel + done, count, done + count == pixels);
    if (plan.band_rows > 0) {
      plan.bands.push_back({(pixel + done) / width / 2, count / width / 2, first_tile, plan.tiles.size()});
    }
  }
  plan.strips.push_back({first_row, rows, begin, plan.tiles.size(), band_begin, plan.bands.size()});
}

// Adds the tiles of `pixels` output pixels, the last of a strip or not.
void ConvKernel::add_tiles(Plan& plan, int64_t source, int64_t pixel, int64_t pixels, bool last_of_strip) const {
  const int64_t lanes = kernels_.lanes;
  const int64_t target = plan.band_rows > 0 ? 0 : pixel, width = plan.output[2];
  if (plan.margin > 0) pixels = pixels / width * plan.pitch - plan.margin;
  // How many of the positions before this one are pixels.
  auto pixels_before = [&](int64_t at) {
    return plan.margin > 0 ? at / plan.pitch * width + std::min(at % plan.pitch, width) : at;
  };
  // In place, only a pointwise kernel finds each tap of the last pixels inside the input; the panel has room for the
  // taps of one tail.
  int64_t tail = (plan.direct && !plan.pointwise) || !last_of_strip ? 0 : pixels % lanes;
  if (tail > kernels_.tail_pixels) tail = 0;
  // Of a pointwise kernel, the last tiles take a pixel of the tail each, if they are enough.
  const int64_t full = kernels_.conv_vectors * lanes;
  const bool fits = (pixels - tail) % full == 0 && (pixels - tail) / full >= tail;
  int64_t extras = kernels_.extra_pixel && taps_ == 1 && fits ? tail : 0;
  tail -= extras;
  for (int64_t done = 0; done < pixels - tail;) {
    // Three vectors at a time; four are two and two, as one vector alone keeps the multipliers waiting for loads.
    const int64_t left = ceil_div(pixels - tail - extras - done, lanes);
    const int64_t most = kernels_.conv_vectors;
    const int64_t vectors = left == most + 1 ? ceil_div(left, 2) : std::min(left, most);
    const bool extra = extras > 0 && left <= extras * most;
    const int64_t last = std::min(lanes, pixels - tail - done - (vectors - 1) * lanes);
    const int64_t before = pixels_before(done);
    plan.tiles.push_back({source + done, pixel + before, target + before, static_cast<int>(vectors),
                          static_cast<int>(last), TapMode::kPlain, 0, extra});
    done += vectors * lanes + extra;
    extras -= extra;
  }
  if (tail > 0) {
    const int64_t done = pixels - tail;
    plan.tiles.push_back({source + done, pixel + done, target + done, 0, static_cast<int>(tail), TapMode::kTail, 0, false});
  }
}

// How many rows of a map a band has: an even number whose pixels fill the tiles, of little memory.
int64_t ConvKernel::choose_band_rows(int64_t rows, int64_t width) const {
  // Vectors of `pixels` pixels: the last tile of a band is as long as any if it has one or two.
  const int64_t tile = kernels_.conv_vectors * kernels_.lanes;
  auto cost = [&](int64_t pixels) {
    const int64_t vectors = ceil_div(pixels % tile, kernels_.lanes);
    return pixels / tile * kernels_.conv_vectors + (vectors == 0 ? 0 : (vectors + kernels_.conv_vectors) / 2);
  };
  int64_t best = 2, least = INT64_MAX;
  for (int64_t band = 2; band <= rows && (band == 2 || band * width <= kBandPixels); band += 2) {
    const int64_t all = rows / band * cost(band * width) + cost(rows % band * width);
    if (all < least) best = band, least = all;
  }
  return best;
}

// A tap of an output pixel counts where it lies inside the input, and a lane where its pixel exists.
void ConvKernel::add_masks(Plan& plan) const {
  const ConvAttributes& a = attributes_;
  const int64_t width = plan.output[2], lanes = kernels_.lanes;
  for (Plan::Tile& tile : plan.tiles) {
    if (tile.mode == TapMode::kTail) continue;
    const int64_t count = (tile.vectors - 1) * lanes + tile.last_lanes;
    std::vector<uint32_t> side(static_cast<size_t>(2 * tile.vectors), 0);
    std::vector<uint32_t> every(static_cast<size_t>(taps_ * tile.vectors), 0);
    bool ends = tile.last_lanes < lanes;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t row = (tile.pixel + p) / width, column = (tile.pixel + p) % width;
      const size_t v = static_cast<size_t>(p / lanes), vectors = static_cast<size_t>(tile.vectors);
      const uint32_t bit = 1U << (p % lanes);
      if (plan.side_masked) {
        if (column > 0) side[v] |= bit;
        if (column + 1 < width || a.strides[2] == 2) side[vectors + v] |= bit;
      }
      for (int64_t t = 0; plan.direct && t < taps_; ++t) {
        const int64_t in_row = row + t / a.kernel[2] * a.dilations[0] - a.pads_begin[0];
        const int64_t in_column = column + t % a.kernel[2] - a.pads_begin[2];
        const bool row_inside = plan.pointwise || (in_row >= 0 && in_row < plan.input[0]);
        const bool column_inside = plan.pointwise || (in_column >= 0 && in_column < width);
        if (row_inside && column_inside) every[static_cast<size_t>(t) * vectors + v] |= bit;
        ends = ends || !row_inside;
      }
    }
    if (plan.direct && !plan.pointwise) {
      // The first and the last float that an unmasked tile would load.
      ends = ends || tile.source + plan.tap_offset.front() < 0 ||
             tile.source + tile.vectors * lanes - 1 + plan.tap_offset.back() >= plan.input_plane;
    }
    tile.masks = plan.masks.size();
    if (plan.direct && ends) {
      tile.mode = TapMode::kEveryMasked;
      plan.masks.insert(plan.masks.end(), every.begin(), every.end());
    } else if (plan.side_masked) {
      tile.mode = TapMode::kSideMasked;
      plan.masks.insert(plan.masks.end(), side.begin(), side.end());
    }
  }
}

// The pixels that a tile's vectors hold: their lanes may also be beyond the last one, or between two rows.
void ConvKernel::add_tile_masks(Plan& plan) const {
  for (Plan::Tile& tile : plan.tiles) {
    tile.masks = plan.masks.size();
    for (int v = 0; v < tile.vectors; ++v) {
      const int lanes = v + 1 < tile.vectors ? kernels_.lanes : tile.last_lanes;
      uint32_t mask = 0;
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t at = tile.source + v * kernels_.lanes + lane;
        if (plan.margin == 0 || at % plan.pitch < plan.output[2]) mask |= 1U << lane;
      }
      plan.masks.push_back(mask);
    }
  }
}

// One run, divided into work items. A stage is one strip of one image.
//   panel, many stages: an item is a stage; the thread makes the panel in its own scratch memory;
//   direct, or panel, few stages (all threads make the panels, or each of a pair copies for itself): an item is (stage, some
//   of its tiles, block row).
// Threads take neighboring items. In the order (tiles, block row) each has a part of the map to itself, which it wrote in
// the layer before; in the order (block row, tiles) a part of the weights. What is larger should stay where it is.
struct ConvKernel::Work {
  const ConvKernel& kernel;
  const Plan& plan;
  const float *x, *addend;
  float* y;
  int64_t groups = 1, prepare_items = 0, compute_items = 0;
  int64_t stages = 0;
  int64_t parts = 1, rows = 1;  // items in a stage: parts of its tiles (of its bands, if pooled) by block rows
  bool rows_first = false;      // items are in the order (block row, part)
  float* panels = nullptr;      // of all stages, or null
  bool copies = false;          // each thread makes the panel of the stage that it enters
  bool shared = false;  // several threads work on a stage
  Quantization* quantized = nullptr;  // of each image (kInt8)
  // Where it has to be found, for each image by itself: the ranges of parts of the channels that are read.
  int64_t survey_items = 0, parts_of_image = 1;
  Range* ranges = nullptr;

  void survey(int64_t item) {
    const int64_t used = static_cast<int64_t>(kernel.used_.size());
    const int64_t image = item / parts_of_image, part = item % parts_of_image;
    const int64_t end = first_of_share(used, part + 1, parts_of_image);
    for (int64_t u = first_of_share(used, part, parts_of_image); u < end; ++u) {
      const Source& source = kernel.used_[static_cast<size_t>(u)];
      for (int k = 0; k < source.count; ++k) {
        Range channel;
        const float* values = x + (image * kernel.inputs_ + source.channel[k]) * plan.input_plane;
        kernel.kernels_.find_range(values, plan.input_plane, &channel.low, &channel.high);
        ranges[item].add(channel);
      }
    }
  }
  void finish_survey() {
    for (int64_t first = 0; first < survey_items; first += parts_of_image) {
      Range all;
      for (int64_t part = 0; part < parts_of_image; ++part) all.add(ranges[first + part]);
      quantized[first / parts_of_image] = quantization_of(all);
    }
  }

  int64_t group_of(int64_t item) const { return item / (parts * rows); }
  int64_t first_item(int64_t t, int64_t shares) const {
    // Parts of a map are as good as equal, block rows are not.
    if (stages > 1 || rows == 1 || (parts > 1 && !rows_first)) return first_of_share(compute_items, t, shares);
    const auto weight = [&](int64_t r) {
      return kernel.block_rows_[static_cast<size_t>(r)].channel_count * kernel.taps_ + kStoring;
    };
    return parts * first_of_heap(rows, weight, t, shares);
  }

  void prepare(int64_t stage, int64_t item) {
    const int64_t used = static_cast<int64_t>(kernel.used_.size());
    fill_panel(stage, panels + stage * plan.panel_size, first_of_share(used, item, prepare_items),
               first_of_share(used, item + 1, prepare_items));
  }

  // Of a map of a single tile, each thread is about to read all, of which others wrote a part; and there is no next tile to
  // fetch ahead.
  void enter(int64_t stage) const {
    if (copies) return fill_panel(stage, own_panel(), 0, static_cast<int64_t>(kernel.used_.size()));
    const Plan::Strip& strip = plan.strips[static_cast<size_t>(stage) % plan.strips.size()];
    if (!shared || strip.tile_end - strip.tile_begin > 2 || (!plan.direct && panels == nullptr)) return;
    if (plan.direct) {
      const int64_t image = stage / static_cast<int64_t>(plan.strips.size());
      bring_near(x + image * kernel.inputs_ * plan.input_plane, kernel.inputs_ * plan.input_plane);
    } else {
      bring_near(panels + stage * plan.panel_size, plan.panel_size);
    }
  }

  void compute(int64_t item) {
    const int64_t stage = group_of(item);
    const int64_t part = rows_first ? item % parts : item / rows % parts;
    const Plan::Strip& strip = plan.strips[static_cast<size_t>(stage) % plan.strips.size()];
    const int64_t image = stage / static_cast<int64_t>(plan.strips.size());
    const float* source = x + image * kernel.inputs_ * plan.input_plane;
    if (!plan.direct) {
      float* panel = panels != nullptr ? panels + stage * plan.panel_size : own_panel();
      if (panels == nullptr && !copies) fill_panel(stage, panel, 0, static_cast<int64_t>(kernel.used_.size()));
      source = panel + kPanelSlack;
    }
    const TilesInUse tiles_in_use(kernel.kernels_.tiles, kernel.shape_);
    const bool pooled = plan.band_rows > 0;
    const size_t first = pooled ? strip.band_begin : strip.tile_begin;
    const int64_t count = static_cast<int64_t>((pooled ? strip.band_end : strip.tile_end) - first);
    const int64_t offset = image * kernel.outputs_ * plan.result_plane;
    const size_t begin = first + static_cast<size_t>(first_of_share(count, part, parts));
    const size_t end = first + static_cast<size_t>(first_of_share(count, part + 1, parts));
    const int64_t row = rows == 1 ? 0 : rows_first ? item / parts % rows : item % rows;
    const bool rows_next = !rows_first || parts == 1;  // the next item is of the next block row
    // Of a pair, each begins with other block rows: not both store to the lines between their strips at the same time.
    const int64_t strips = static_cast<int64_t>(plan.strips.size());
    const int64_t all_rows = static_cast<int64_t>(kernel.block_rows_.size());
    const int64_t turn = plan.for_pair && rows == 1 ? stage % strips * all_rows / strips : 0;
    const int64_t row_end = rows == 1 ? all_rows : row + 1;
    for (int64_t i = row; i < row_end; ++i) {
      const int64_t r = (i + turn) % all_rows;
      const BlockRow& block_row = kernel.block_rows_[static_cast<size_t>(r)];
      if (pooled) {
        run_bands(block_row, image, source, y + offset, begin, end);
      } else {
        run_tiles(block_row, block_row.group_begin, block_row.group_end, image, source, y + offset,
                  addend == nullptr ? nullptr : addend + offset, plan.row_offset.data(), begin, end,
                  rows_next ? end : strip.tile_end,
                  rows_next && r + 1 < all_rows ? &block_row + 1 : nullptr);
      }
    }
  }

  float* own_panel() const { return thread_scratch<Work>(static_cast<size_t>(plan.panel_size)); }

  // Bands [begin, end) of a block row's maps: computed into scratch memory, then pooled into `to`.
  void run_bands(const BlockRow& block_row, int64_t image, const float* source, float* to, size_t begin,
                 size_t end) const {
    const int64_t width = plan.output[2];
    const size_t groups = kernel.band_groups();
    const int64_t channels = static_cast<int64_t>(groups) * kernel.kernels_.conv_rows;
    float* band_data = thread_scratch<Plan::Band>(static_cast<size_t>(checked_product(channels, plan.band_stride)));
    for (size_t b = begin; b < end; ++b) {
      const Plan::Band& band = plan.bands[b];
      for (size_t g = block_row.group_begin; g < block_row.group_end; g += groups) {
        const size_t last = std::min(g + groups, block_row.group_end);
        run_tiles(block_row, g, last, image, source, band_data, nullptr, plan.band_offset.data(), band.tile_begin,
                  band.tile_end, band.tile_end, nullptr);
        const int64_t row_end = kernel.groups_[last - 1].row + kernel.groups_[last - 1].valid_rows;
        for (int64_t row = kernel.groups_[g].row; row < row_end; ++row) {
          const size_t r = static_cast<size_t>(row);
          kernel.kernels_.pool_rows({band_data + plan.band_offset[r], width,
                                     to + plan.row_offset[r] + band.pooled_row * (width / 2), band.pooled_rows,
                                     width / 2});
        }
      }
    }
  }

  // Tiles [begin, end) of the groups [group_begin, group_end) of a block row. What follows, to be fetched ahead: the tiles
  // up to tiles_end, then the same ones of the block row `following`, if not null.
  void run_tiles(const BlockRow& block_row, size_t group_begin, size_t group_end, int64_t image, const float* source,
                 float* to, const float* add, const int64_t* row_offset, size_t begin, size_t end, size_t tiles_end,
                 const BlockRow* following) const {
    // Far enough ahead to arrive in time, and no farther: what comes early is gone again.
    const size_t ahead = block_row.channel_count * kernel.taps_ >= kLongReduction ? 1 : group_end - group_begin;
    ConvTile call{};
    call.channels = block_row.channel_count;
    call.taps = kernel.taps_;
    call.low = kernel.activation_.low;
    call.high = kernel.activation_.high;
    if (quantized != nullptr) {
      call.x_scale = quantized[image].scale;
      call.zero_point = quantized[image].zero_point;
    }
    for (size_t i = begin; i < end; ++i) {
      const Plan::Tile& tile = plan.tiles[i];
      const bool packed_tail = tile.mode == TapMode::kTail && plan.tail_width > 0;
      call.x = packed_tail ? source : source + tile.source;
      call.tap_offset = packed_tail ? plan.tail_tap_offset.data() : plan.tap_offset.data();
      call.channel_offset =
          (packed_tail ? plan.tail_channel_offset : plan.channel_offset).data() + block_row.channel_begin;
      call.y = to + tile.target;
      call.addend = add == nullptr ? nullptr : add + tile.target;
      call.vectors = tile.vectors;
      call.last_lanes = tile.last_lanes;
      call.mode = tile.mode;
      call.masks = plan.masks.data() + tile.masks;
      call.distant_taps = static_cast<int>(kernel.attributes_.strides[2]);
      call.extra = tile.extra;
      const bool goes_on = i + 1 < tiles_end;
      const Plan::Tile& next = plan.tiles[goes_on ? i + 1 : begin];
      const BlockRow* next_row = goes_on ? &block_row : following;
      call.next_x = goes_on ? source + next.source : nullptr;
      for (size_t g = group_begin; g < group_end; ++g, call.next_x = nullptr) {
        const RowGroup& group = kernel.groups_[g];
        call.weight = kernel.weight_.data() + group.weight;
        call.bias = kernel.terms_.bias.data() + group.bias;
        if (quantized != nullptr) {
          call.row_scale = kernel.terms_.scale.data() + group.bias;
          call.row_sum = kernel.terms_.sum.data() + group.bias;
        }
        call.row_offset = row_offset + group.row;
        // The rows that are stored `ahead` calls later: of this tile, or of the next one.
        const RowGroup* later = nullptr;
        const Plan::Tile* at = &tile;
        if (g + ahead < group_end) {
          later = &kernel.groups_[g + ahead];
        } else if (next_row != nullptr) {
          const size_t first = goes_on ? group_begin : next_row->group_begin, rest = g + ahead - group_end;
          if (first + rest < (goes_on ? group_end : next_row->group_end)) later = &kernel.groups_[first + rest];
          at = &next;
        }
        const bool fetch = later != nullptr && later->valid_rows >= group.valid_rows;
        call.next_y = fetch ? to + at->target : nullptr;
        if (fetch) call.next_row_offset = row_offset + later->row;
        call.rows = group.rows;
        call.valid_rows = group.valid_rows;
        if (kernel.kernels_.tiles != nullptr) {
          call.element_stride = plan.channel_stride;
          kernel.kernels_.tiles->conv_tile(call, kernel.shape_);
        } else {
          kernel.kernels_.conv_tile(call);
        }
      }
    }
  }

  // Copies the used channels [begin, end) of a stage's input into its panel.
  void fill_panel(int64_t stage, float* panel, int64_t begin, int64_t end) const {
    const Plan::Strip& strip = plan.strips[static_cast<size_t>(stage) % plan.strips.size()];
    const int64_t image = stage / static_cast<int64_t>(plan.strips.size());
    const ConvAttributes& a = kernel.attributes_;
    const int64_t width = plan.output[2], inner = plan.output[1] * plan.pitch;
    const int64_t inner_input = plan.input[1] * plan.input[2];
    const int64_t stride = a.strides[0];
    // Rows that are copied as they are need no loop over rows.
    const bool as_is = (plan.side_masked && a.strides[2] == 1 && plan.margin == 0) ||
                       (inner == inner_input && a.kernel[1] == 1 && a.kernel[2] == 1 && a.strides[1] == 1 &&
                        a.strides[2] == 1 && a.pads_begin[1] == 0 && a.pads_begin[2] == 0);
    // Planes of the even and the odd columns of an input of even width are made in one go.
    const bool split = plan.side_masked && a.strides[2] == 2 && plan.input[2] == 2 * width &&
                       kernel.kernels_.precision == Precision::kFloat32;
    const Plan::Tile& last = plan.tiles[strip.tile_end - 1];
    const bool packed_tail = plan.tail_width > 0 && last.mode == TapMode::kTail;
    bool left_side[kMostTailPixels] = {}, right_side[kMostTailPixels] = {};
    for (int64_t p = 0; packed_tail && p < last.last_lanes; ++p) {
      left_side[p] = (last.pixel + p) % width == 0;
      right_side[p] = (last.pixel + p + 1) % width == 0 && a.strides[2] == 1;
    }
    const int64_t ahead = std::clamp<int64_t>(kFetchedAhead / std::max<int64_t>(1, strip.rows * inner), 1, kMostAhead);
    for (int64_t u = begin; u < end; ++u) {
      PackedRows from = rows_of(image, kernel.used_[static_cast<size_t>(u)]);
      float* to = panel + kPanelSlack + u * plan.channel_stride;
      // Channels are too far from each other for the processor to guess. (Elements that fill up a block have none.)
      if (u + ahead < end) {
        const PackedRows later = rows_of(image, kernel.used_[static_cast<size_t>(u + ahead)]);
        std::copy(std::begin(later.from), std::end(later.from), from.next);
      }
      const int64_t next = from.next[0] != nullptr && from.from[0] != nullptr ? from.next[0] - from.from[0] : 0;
      for (const Plan::Phase& phase : plan.phases) {
        const int64_t rows = strip.rows + phase.extra_rows;
        // Row q of the phase is the input's row first + q * stride.
        const int64_t first = strip.first_row * stride - a.pads_begin[0] + phase.remainder;
        const int64_t row_begin = first < 0 ? std::min(rows, ceil_div(-first, stride)) : 0;
        const int64_t room = plan.input[0] - first;
        const int64_t row_end = std::max(row_begin, room <= 0 ? 0 : std::min(rows, ceil_div(room, stride)));
        if (split && row_end > row_begin) {
          float* even = to + phase.offset;
          float* odd = even + phase.rows * inner;
          for (float* plane : {even, odd}) {
            zero(plane, row_begin * inner, from.quantized);
            zero(plane + row_end * inner, (rows - row_end) * inner, from.quantized);
          }
          kernel.kernels_.split_rows({even + row_begin * inner, odd + row_begin * inner,
                                      from.from[0] + (first + row_begin * stride) * inner_input, row_end - row_begin, width,
                                      stride * inner_input, next});
          continue;
        }
        for (size_t i = 0; i < plan.inner_taps.size(); ++i) {
          float* plane = to + phase.offset + static_cast<int64_t>(i) * phase.rows * inner;
          zero(plane, row_begin * inner, from.quantized);
          zero(plane + row_end * inner, (rows - row_end) * inner, from.quantized);
          if (row_end == row_begin) continue;
          int64_t start = (first + row_begin * stride) * inner_input;  // in the channel
          float* out = plane + row_begin * inner;
          const Plan::InnerTap& tap = plan.inner_taps[i];
          if (as_is && stride == 1) {
            const int64_t count = (row_end - row_begin) * inner;
            copy_rows(out, from, start, {1, count, 0, count, 0, 1, next});
          } else if (as_is && inner == 1) {
            copy_rows(out, from, start, {1, row_end - row_begin, 0, row_end - row_begin, 0, stride, next});
          } else if (plan.input[1] == 1 && plan.output[1] == 1 && tap.middle.begin < tap.middle.end) {
            fill_rows(out, from, start, row_end - row_begin, stride * inner_input, tap.inner, next);
          } else {
            for (int64_t q = row_begin; q < row_end; ++q, start += stride * inner_input, out += inner) {
              const Plan::View& middle = tap.middle;
              zero(out, middle.begin * width, from.quantized);
              fill_rows(out + middle.begin * width, from,
                        start + (middle.begin * a.strides[1] + middle.offset) * plan.input[2],
                        middle.end - middle.begin, a.strides[1] * plan.input[2], tap.inner, next);
              zero(out + middle.end * width, (plan.output[1] - middle.end) * width, from.quantized);
            }
          }
        }
      }
      zero(to + plan.channel_end, plan.margin, from.quantized);
      if (packed_tail) {
        float outside;
        zero(&outside, 1, from.quantized);
        float* tail = panel + kPanelSlack + plan.tail_begin + u * kernel.taps_ * plan.tail_width;
        for (int64_t t = 0; t < kernel.taps_; t += 3) {
          const int64_t* offset = plan.tap_offset.data() + t;
          const float* from_pixel = to + last.source;
          for (int64_t p = 0; p < last.last_lanes; ++p) {
            tail[t * plan.tail_width + p] = left_side[p] ? outside : from_pixel[offset[0] + p];
            tail[(t + 1) * plan.tail_width + p] = from_pixel[offset[1] + p];
            tail[(t + 2) * plan.tail_width + p] = right_side[p] ? outside : from_pixel[offset[2] + p];
          }
        }
      }
    }
  }

  // Rows of the inner dimension as one tap sees them.
  void fill_rows(float* to, const PackedRows& from, int64_t start, int64_t rows, int64_t from_stride,
                 const Plan::View& view, int64_t next) const {
    const int64_t stride = kernel.attributes_.strides[2];
    if (view.begin == view.end) return zero(to, rows * plan.pitch, from.quantized);
    copy_rows(to, from, start + view.begin * stride + view.offset,
              {rows, plan.pitch, view.begin + plan.margin, view.end - view.begin, from_stride, stride, next});
  }

  // The channels of an element in an image.
  PackedRows rows_of(int64_t image, const Source& source) const {
    PackedRows rows{};
    for (int k = 0; k < source.count; ++k) {
      rows.from[k] = x + (image * kernel.inputs_ + source.channel[k]) * plan.input_plane;
    }
    if (quantized != nullptr) rows.quantized = quantized[image];
    return rows;
  }

  // Copies from position `start` of the channels.
  void copy_rows(float* to, const PackedRows& from, int64_t start, const RowCopy& copy) const {
    if (kernel.kernels_.packed == 1) {
      const float* source = from.from[0] + start;
      if (copy.rows == 1 && copy.stride == 1 && copy.count == copy.width) {
        std::memcpy(to, source, static_cast<size_t>(copy.count) * sizeof(float));
      } else {
        kernel.kernels_.copy_rows(to, source, copy);
      }
      return;
    }
    PackedRows moved = from;
    for (int k = 0; k < kMostPacked; ++k) {
      if (moved.from[k] != nullptr) moved.from[k] += start;
      if (moved.next[k] != nullptr) moved.next[k] += start;
    }
    kernel.kernels_.pack_rows(to, moved, copy);
  }

  // Elements of what stands for zero: its byte (kInt8), or zero bits.
  static void zero(float* to, int64_t count, const Quantization& quantized) {
    std::memset(to, quantized.zero_point, static_cast<size_t>(count) * sizeof(float));
  }
};

ConvAlgorithm ConvKernel::algorithm_for(int64_t batch, const Spatial& input) const {
  const bool applies = may_transform_ && WinogradConv::applies(attributes_, input);
  if (algorithm_ == ConvAlgorithm::kDirect || !applies) return ConvAlgorithm::kDirect;
  return algorithm_ == ConvAlgorithm::kAuto ? WinogradConv::choose(*this, batch, input) : algorithm_;
}

const WinogradConv& ConvKernel::winograd(ConvAlgorithm algorithm) const {
  const int size = algorithm == ConvAlgorithm::kWinograd2 ? 2 : 4;
  LazyWinograd& winograd = size == 2 ? winograd2_ : winograd4_;
  const ConvKernel& weights = float32_ == nullptr ? *this : *float32_;
  std::call_once(winograd.once, [&] { winograd.conv = std::make_unique<WinogradConv>(*this, weights, size); });
  return *winograd.conv;
}

void ConvKernel::specialize(int64_t batch, const Spatial& input) {
  const ConvAlgorithm algorithm = algorithm_for(batch, input);
  if (algorithm != ConvAlgorithm::kDirect) {
    winograd(algorithm);
    algorithm_ = algorithm;
    weight_ = Buffer();
  } else if (float32_ != nullptr) {
    algorithm_ = algorithm;
  }
  float32_.reset();
}

void ConvKernel::run(const float* x, const float* addend, int64_t batch, const Spatial& input, float* y,
                     const ThreadPool& pool) const {
  if (batch == 0) return;
  const ConvAlgorithm algorithm = algorithm_for(batch, input);
  if (algorithm == ConvAlgorithm::kWinograd2 || algorithm == ConvAlgorithm::kWinograd4) {
    return winograd(algorithm).run(x, addend, batch, input, y, pool);
  }
  const std::shared_ptr<const Plan> plan = plan_for(input, threads_.pair());
  if (plan->result_plane == 0 || outputs_ == 0) return;
  Work work{*this, *plan, x, addend, y};
  const int64_t threads = threads_.count();
  std::vector<Quantization> quantized;
  std::vector<Range> ranges;
  if (kernels_.precision == Precision::kInt8) {
    quantized.assign(static_cast<size_t>(batch), input_quantization_.value_or(Quantization{}));
    work.quantized = quantized.data();
    if (!input_quantization_) {
      const int64_t used = static_cast<int64_t>(used_.size());
      work.parts_of_image = std::clamp<int64_t>(used, 1, ceil_div(threads * kStagesPerThread, batch));
      work.survey_items = work.parts_of_image * batch;
      ranges.resize(static_cast<size_t>(work.survey_items));
      work.ranges = ranges.data();
    }
  }
  work.stages = batch * static_cast<int64_t>(plan->strips.size());
  work.shared = threads > work.stages;
  const bool enough = work.stages >= std::min(threads * kStagesPerThread, kMaxGroups);
  const bool own_panels = !plan->direct && !used_.empty() && (enough || (plan->for_pair && work.stages % 2 == 0));
  if (!own_panels) {
    const Plan::Strip& strip = plan->strips[0];
    const size_t divisible = plan->band_rows > 0 ? strip.band_end - strip.band_begin : strip.tile_end - strip.tile_begin;
    work.rows = static_cast<int64_t>(block_rows_.size());
    work.parts = std::clamp<int64_t>(ceil_div(threads * kItemsPerThread, work.stages * work.rows), 1,
                                     static_cast<int64_t>(divisible));
    work.rows_first = static_cast<int64_t>(weight_.size()) >
                      static_cast<int64_t>(used_.size()) * plan->input_plane + outputs_ * plan->result_plane;
    // (Of a strided pointwise kernel, the panel is a small part of what is read for it.)
    work.copies = !plan->direct && plan->for_pair &&
                  plan->panel_size >= static_cast<int64_t>(used_.size()) * plan->input_plane;
    if (!plan->direct && !used_.empty() && !work.copies) {
      work.groups = work.stages;
      work.prepare_items =
          std::min<int64_t>(static_cast<int64_t>(used_.size()), ceil_div(threads * kStagesPerThread, work.stages));
      work.panels = thread_scratch<Work>(static_cast<size_t>(checked_product(plan->panel_size, work.stages)));
    }
  }
  work.compute_items = work.stages * work.parts * work.rows;
  threads_.saw(run_work(pool, work, threads));
}

}  // namespace tetris
