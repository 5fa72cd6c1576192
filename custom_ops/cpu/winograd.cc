#include "winograd.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace tetris {
namespace {

constexpr int64_t kItemsPerThread = 4;
// How much more two halves of a strip may take than the whole, for a pair of threads that need share nothing then.
constexpr double kHalves = 1.4;
constexpr size_t kMaxPlans = 8;
constexpr size_t kPrefetchPadding = 8192;
// Output rows whose products are kept, in the second-level cache, until they are transformed. More rows use an input
// vector more often once it is in the first-level cache.
constexpr int64_t kBundleRows = 32;
// The estimate counts multiplications of vectors and puts the rest in terms of them, as measured on Zen 5: a transform of a
// vector of tiles is kTransform for each of their elements, reading a weight is kRead (from memory that the cores share)
// whatever the number of tiles it is used for. Winograd must win by kMargin: the estimate is not better than that.
constexpr double kTransform = 16, kRead = 1, kMargin = 0.9;
// Of integers, those that find the ranges included; and what direct kernels of bfloat16 take to convert a vector of input.
constexpr double kIntegerTransform = 12, kConvert = 50;

// Integers: what the input is rounded to, at most, and for rows of how many weights. It gets as much of the 31 bits of a sum
// as makes its error, of values that spread as activations do, about that of the weights.
constexpr double kMostSteps = 32700, kFewWeights = 128;
// The sums of integers stay below this.
constexpr double kLargestSum = 2147483647;
// Inputs of less than this, over a tile, count as this: its inverse must be a number.
constexpr float kLeastRange = 1e-30F;
// Lanes after the tiles' ranges that a vector of them may touch.
constexpr int64_t kRangeSlack = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many of `count` tiles (or pixels) are computed without vectors of them: the last few (see TapMode::kTail).
int64_t tail_of(int64_t count, const KernelSet& kernels) {
  const int64_t tail = count % kernels.lanes;
  return tail <= kernels.tail_pixels ? tail : 0;
}

// Of tiles whose products are of integers: one, after whole vectors (WinogradProduct::extra).
int64_t tail_of_tiles(int64_t count, const KernelSet& kernels) {
  if (kernels.winograd_product == nullptr) return tail_of(count, kernels);
  return count > kernels.lanes && count % kernels.lanes == 1 ? 1 : 0;
}

// The time of `count` tiles or pixels, in that of a vector.
double vectors_of(int64_t count, int64_t tail, const KernelSet& kernels) {
  return static_cast<double>(ceil_div(count - tail, kernels.lanes)) +
         (tail == 0 ? 0.0 : static_cast<double>(tail) / kernels.tail_pixels);
}

// G of F(m, 3), the transform of a filter, for the points that the kernels use.
std::vector<std::array<double, 3>> filter_transform(int size) {
  if (size == 2) return {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  // Row of point p: (1, p, p^2) / product of the differences to the other points.
  const double a = std::sqrt(0.5), b = std::sqrt(2.0);
  auto row = [](double p, double divisor) {
    return std::array<double, 3>{1 / divisor, p / divisor, p * p / divisor};
  };
  return {{1, 0, 0}, row(a, -1.5), row(-a, -1.5), row(b, 6), row(-b, 6), {0, 0, 1}};
}

// B of F(m, 3), the transform of an input.
std::vector<std::vector<double>> input_transform(int size) {
  if (size == 2) return {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}};
  const double a = std::sqrt(0.5), b = std::sqrt(2.0);
  return {{1, 0, -2.5, 0, 1, 0},       {0, -2 * a, -2, a, 1, 0},     {0, 2 * a, -2, -a, 1, 0},
          {0, -b / 2, -0.5, b, 1, 0}, {0, b / 2, -0.5, -b, 1, 0}, {0, 1, 0, -2.5, 0, 1}};
}

// The largest magnitude of each transformed element of inputs between 0 and 1.
std::vector<double> element_bounds(int size) {
  std::vector<double> bounds;
  for (const std::vector<double>& down : input_transform(size)) {
    for (const std::vector<double>& across : input_transform(size)) {
      double positive = 0, negative = 0;
      for (const double p : down) {
        for (const double q : across) (p * q > 0 ? positive : negative) += std::abs(p * q);
      }
      bounds.push_back(std::max(positive, negative));
    }
  }
  return bounds;
}

}  // namespace

// Tiles are counted through all images, row by row, and cut into strips, each of which fills the registers once: a strip's
// transformed input, [element of the tile][channel][tile], stays in the cache while all block rows are multiplied with it.
struct WinogradConv::Plan {
  struct Part {
    int64_t begin;  // first tile
    int vectors, pixels;  // pixels: of a tail (see TapMode::kTail), which has no vectors; of integers: after the vectors
  };
  struct Strip {
    int64_t tiles;
    size_t run_begin, run_end, part_begin, part_end;
  };

  int64_t batch;
  Spatial input, output;
  bool for_pair;  // see LearnedThreads; results are the same
  int64_t input_plane, output_plane;
  std::vector<Strip> strips;
  std::vector<WinogradRun> runs;
  std::vector<Part> parts;
  int64_t pitch = 0;                    // floats between channels of the transformed input, rows of the products
  int64_t element_stride = 0;           // floats between the elements of the transformed input
  std::vector<int64_t> channel_offset;  // of each packed column
  std::vector<int64_t> row_offset;      // of each row of a bundle in its products
  std::vector<float> zeros;             // in place of a bias
};

bool WinogradConv::applies(const ConvAttributes& a, const Spatial& input) {
  return a.kernel == Spatial{3, 1, 3} && a.strides == Spatial{1, 1, 1} && a.dilations[0] == 1 && a.dilations[2] == 1 &&
         a.pads_begin[1] == 0 && a.pads_end[1] == 0 && input[1] == 1;
}

ConvAlgorithm WinogradConv::choose(const ConvKernel& conv, int64_t batch, const Spatial& input) {
  const Spatial output = conv_output_size(conv.attributes_, input);
  double weights = 0;  // for one tap
  for (const ConvKernel::BlockRow& row : conv.block_rows_) {
    for (size_t g = row.group_begin; g < row.group_end; ++g) {
      weights += static_cast<double>(row.channel_count) * conv.groups_[g].rows;
    }
  }
  const KernelSet& kernels = conv.kernels_;
  const bool integers = kernels.winograd_product != nullptr;
  const int64_t pixels = output[0] * output[2];
  const double vectors = vectors_of(pixels, tail_of(pixels, kernels), kernels) * static_cast<double>(batch);
  const double convert = integers ? kConvert * static_cast<double>(conv.used_.size()) * vectors : 0;
  double best = kMargin * (9 * weights * (vectors + kRead) + convert);
  ConvAlgorithm choice = ConvAlgorithm::kDirect;
  for (const int64_t size : {2, 4}) {
    const double elements = static_cast<double>((size + 2) * (size + 2));
    const int64_t down = ceil_div(output[0], size), across = ceil_div(output[2], size);
    const int64_t count = batch * down * across;
    const double tiles = vectors_of(count, tail_of_tiles(count, kernels), kernels);
    const double strips = std::ceil(tiles / kernels.conv_vectors);
    const double transforms =
        std::ceil(tiles) * static_cast<double>(static_cast<int64_t>(conv.used_.size()) * kernels.packed + conv.outputs_);
    const double cost = elements * (weights * (tiles + kRead * strips) + (integers ? kIntegerTransform : kTransform) * transforms);
    if (cost < best) {
      best = cost;
      choice = size == 2 ? ConvAlgorithm::kWinograd2 : ConvAlgorithm::kWinograd4;
    }
  }
  return choice;
}

WinogradConv::WinogradConv(const ConvKernel& conv, const ConvKernel& weights, int size) : conv_(conv), size_(size) {
  // Channels in the order of the blocks: those of a kept block then lie one behind the other.
  std::vector<int64_t> position(conv.used_.size(), -1);
  for (const int64_t column : conv.column_) {
    int64_t& p = position[static_cast<size_t>(column)];
    if (p < 0) {
      p = static_cast<int64_t>(used_.size());
      used_.push_back(conv.used_[static_cast<size_t>(column)]);
    }
    slot_.push_back(p);
  }
  int64_t weight_size = 0;
  const size_t most_groups = static_cast<size_t>(std::max<int64_t>(1, kBundleRows / conv.kernels_.conv_rows));
  for (size_t r = 0; r < conv.block_rows_.size(); ++r) {
    const ConvKernel::BlockRow& block_row = conv.block_rows_[r];
    for (size_t g = block_row.group_begin; g < block_row.group_end; g += most_groups) {
      Bundle bundle{r, g, std::min(g + most_groups, block_row.group_end), weight_size};
      for (size_t i = bundle.group_begin; i < bundle.group_end; ++i) {
        weight_size += checked_product(checked_product(block_row.channel_count, elements()), conv.groups_[i].rows);
      }
      bundles_.push_back(bundle);
    }
  }
  heaviest_first_.resize(bundles_.size());
  std::iota(heaviest_first_.begin(), heaviest_first_.end(), size_t{0});
  std::stable_sort(heaviest_first_.begin(), heaviest_first_.end(),
                   [&](size_t a, size_t b) { return work_of(a) > work_of(b); });
  range_begin_.push_back(0);
  for (const ConvKernel::Source& source : used_) {
    for (int k = 0; k < source.count; ++k) range_channels_.push_back(source.channel[k]);
    range_begin_.push_back(static_cast<int64_t>(range_channels_.size()));
  }
  weight_ = Buffer(static_cast<size_t>(weight_size) + kPrefetchPadding);
  if (integers()) choose_scales(weights);
  pack(weights);
}

template <class Element>
void WinogradConv::for_each_filter(const ConvKernel& weights, const Bundle& bundle, size_t group,
                                   Element element) const {
  const std::vector<std::array<double, 3>> transform = filter_transform(size_);
  const ConvKernel::BlockRow& block_row = conv_.block_rows_[bundle.block_row];
  const ConvKernel::RowGroup& rows = weights.groups_[group];
  const float* taps = weights.weight_.data() + rows.weight;
  for (int64_t i = 0; i < block_row.channel_count; ++i) {
    const int count = conv_.used_[static_cast<size_t>(conv_.column_[static_cast<size_t>(block_row.channel_begin + i)])].count;
    for (int k = 0; k < rows.rows; ++k) {
      double values[36][2] = {};
      for (int c = 0; c < count; ++c) {
        for (size_t p = 0; p < transform.size(); ++p) {
          double half[3];
          for (int q = 0; q < 3; ++q) {
            const float* column = taps + (9 * c + q) * rows.rows + k;
            half[q] = transform[p][0] * column[0] + transform[p][1] * column[3 * rows.rows] +
                      transform[p][2] * column[6 * rows.rows];
          }
          for (size_t q = 0; q < transform.size(); ++q) {
            values[p * transform.size() + q][c] =
                transform[q][0] * half[0] + transform[q][1] * half[1] + transform[q][2] * half[2];
          }
        }
      }
      element(i, k, values);
    }
    taps += 9 * count * rows.rows;
  }
}

// The scales are the products of one of the row and one of the element, as near to what each needs as that gets.
void WinogradConv::choose_scales(const ConvKernel& weights) {
  const size_t count = static_cast<size_t>(elements());
  int64_t most = 1;  // weights of a row
  for (const ConvKernel::BlockRow& block_row : weights.block_rows_) most = std::max(most, block_row.channel_count);
  const double steps = kMostSteps * std::min(1.0, std::sqrt(kFewWeights / static_cast<double>(most)));
  // Rounding adds up to a half to each input (and each weight).
  const double room = kLargestSum / (steps + 1) - static_cast<double>(most);
  row_scale_.assign(conv_.terms_.bias.size(), 1.0F);
  std::vector<double> needed(row_scale_.size() * count), sums(count);
  for (const Bundle& bundle : bundles_) {
    for (size_t g = bundle.group_begin; g < bundle.group_end; ++g) {
      std::vector<double> sum(static_cast<size_t>(conv_.groups_[g].rows) * count), largest(sum);
      for_each_filter(weights, bundle, g, [&](int64_t, int k, const double (&values)[36][2]) {
        for (size_t e = 0; e < count; ++e) {
          const size_t at = static_cast<size_t>(k) * count + e;
          for (const double value : values[e]) {
            sum[at] += std::abs(value);
            largest[at] = std::max(largest[at], std::abs(value));
          }
        }
      });
      for (size_t at = 0; at < sum.size(); ++at) {
        const double scale = std::max(sum[at] / room, largest[at] / kMostSteps);
        needed[static_cast<size_t>(conv_.groups_[g].bias) * count + at] = scale;
        if (std::isfinite(scale)) sums[at % count] += scale;
      }
    }
  }
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
  for (const double sum : sums) element_scale_.push_back(sum > 0 ? static_cast<float>(sum / total) : 1.0F);
  for (const double bound : element_bounds(size_)) {
    product_scale_.push_back(static_cast<float>(element_scale_[input_scale_.size()] * bound / steps));
    input_scale_.push_back(static_cast<float>(steps / bound));
  }
  for (size_t r = 0; r < row_scale_.size(); ++r) {
    double scale = 0;
    for (size_t e = 0; e < count; ++e) scale = std::max(scale, needed[r * count + e] / element_scale_[e]);
    // A row without weights has zeros in any scale.
    if (scale > 0) row_scale_[r] = std::max(static_cast<float>(scale), std::numeric_limits<float>::min());
    for (size_t e = 0; e < count; ++e) {
      if (!std::isfinite(needed[r * count + e])) row_scale_[r] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

void WinogradConv::pack(const ConvKernel& weights) {
  for (const Bundle& bundle : bundles_) {
    const int64_t channels = conv_.block_rows_[bundle.block_row].channel_count;
    int64_t bundle_rows = 0, row = 0;
    for (size_t g = bundle.group_begin; g < bundle.group_end; ++g) bundle_rows += conv_.groups_[g].rows;
    for (size_t g = bundle.group_begin; g < bundle.group_end; ++g) {
      const ConvKernel::RowGroup& group = conv_.groups_[g];
      float* out = weight_.data() + bundle.weight + row * channels;
      for_each_filter(weights, bundle, g, [&](int64_t i, int k, const double (&values)[36][2]) {
        for (int64_t e = 0; e < elements(); ++e) {
          float& to = out[e * bundle_rows * channels + i * group.rows + k];
          if (!integers()) {
            to = static_cast<float>(values[e][0]);
            continue;
          }
          const double scale = static_cast<double>(row_scale_[static_cast<size_t>(group.bias + k)]) *
                               element_scale_[static_cast<size_t>(e)];
          uint32_t bits = 0;
          for (int c = 0; c < 2 && !std::isnan(scale); ++c) {
            bits |= (static_cast<uint32_t>(std::lrint(values[e][c] / scale)) & 0xffffU) << (16 * c);
          }
          std::memcpy(&to, &bits, sizeof to);
        }
      });
      row += group.rows;
    }
  }
}

WinogradConv::~WinogradConv() = default;

int64_t WinogradConv::work_of(size_t bundle) const {
  const Bundle& rows = bundles_[bundle];
  return conv_.block_rows_[rows.block_row].channel_count * static_cast<int64_t>(rows.group_end - rows.group_begin);
}

std::shared_ptr<const WinogradConv::Plan> WinogradConv::plan_for(int64_t batch, const Spatial& input,
                                                           bool for_pair) const {
  {
    const std::lock_guard<std::mutex> lock(plans_mutex_);
    for (const auto& plan : plans_) {
      if (plan->batch == batch && plan->input == input && plan->for_pair == for_pair) return plan;
    }
  }
  std::shared_ptr<const Plan> plan = make_plan(batch, input, for_pair);
  const std::lock_guard<std::mutex> lock(plans_mutex_);
  if (plans_.size() == kMaxPlans) plans_.erase(plans_.begin());
  plans_.push_back(plan);
  return plan;
}

std::shared_ptr<const WinogradConv::Plan> WinogradConv::make_plan(int64_t batch, const Spatial& input,
                                                            bool for_pair) const {
  auto owner = std::make_shared<Plan>();
  Plan& plan = *owner;
  plan.batch = batch;
  plan.input = input;
  plan.for_pair = for_pair;
  const int64_t pool = conv_.fused_ == Fused::kMaxPool ? 2 : 1;
  const Spatial output = conv_output_size(conv_.attributes_, input);
  plan.output = {output[0] / pool, 1, output[2] / pool};
  plan.input_plane = input[0] * input[2];
  plan.output_plane = plan.output[0] * plan.output[2];

  const int64_t lanes = conv_.kernels_.lanes, most = conv_.kernels_.conv_vectors;
  const int64_t stored = size_ / pool;  // rows and columns of a tile in the output
  const int64_t down = ceil_div(plan.output[0], stored), across = ceil_div(plan.output[2], stored);
  const int64_t total = checked_product(batch, checked_product(down, across));
  // As few strips as there can be; where they are many, no vectors for a few tiles instead.
  const int64_t fewest = ceil_div(total, most * lanes + (integers() ? 1 : conv_.kernels_.tail_pixels));
  int64_t strips = fewest < machine_threads() * kItemsPerThread ? fewest : ceil_div(total, most * lanes);
  // Or two halves, of the same tail, if that leaves few lanes empty.
  const int64_t whole_tail = integers() ? 0 : tail_of(total, conv_.kernels_);
  const double half = vectors_of(total - total / 2, whole_tail, conv_.kernels_);
  const double whole = vectors_of(total, whole_tail, conv_.kernels_);
  const bool halves = for_pair && strips == 1 && total > 1 && 2 * half <= kHalves * whole;
  if (halves) strips = 2;
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t first = first_of_share(total, i, strips), tiles = first_of_share(total, i + 1, strips) - first;
    Plan::Strip strip{tiles, plan.runs.size(), 0, plan.parts.size(), 0};
    const int64_t tail = !halves ? tail_of_tiles(tiles, conv_.kernels_) : i == 0 ? 0 : whole_tail;
    const int64_t vectors = ceil_div(tiles - tail, lanes);
    if (vectors > 0) plan.parts.push_back({0, static_cast<int>(vectors), integers() ? static_cast<int>(tail) : 0});
    if (tail > 0 && !integers()) plan.parts.push_back({tiles - tail, 0, static_cast<int>(tail)});
    for (int64_t tile = first; tile < first + tiles;) {
      const int64_t image = tile / (down * across), row = tile / across % down, column = tile % across;
      const int64_t count = std::min(across - column, first + tiles - tile);
      plan.runs.push_back({tile - first, count, image, row * size_ - conv_.attributes_.pads_begin[0],
                           column * size_ - conv_.attributes_.pads_begin[2], row * stored, column * stored});
      tile += count;
    }
    strip.run_end = plan.runs.size();
    strip.part_end = plan.parts.size();
    plan.strips.push_back(strip);
    plan.pitch = std::max(plan.pitch, ceil_div(tiles, lanes) * lanes);
  }
  // An odd number of cache lines: the elements of a tile must not fight for the same lines of the cache.
  plan.element_stride = checked_product(static_cast<int64_t>(used_.size()), plan.pitch);
  plan.element_stride = (ceil_div(plan.element_stride, 16) | 1) * 16;
  for (const int64_t slot : slot_) plan.channel_offset.push_back(slot * plan.pitch);
  for (int64_t k = 0; k < std::max<int64_t>(kBundleRows, conv_.kernels_.conv_rows); ++k) {
    plan.row_offset.push_back(k * elements() * plan.pitch);
  }
  plan.zeros.assign(16, 0.0F);
  return owner;
}

// One run, divided into work items.
//   many strips: an item is a strip; the thread transforms its input in its own scratch memory;
//   few strips: all threads transform the input, then an item is (strip, bundle).
struct WinogradConv::Work {
  const WinogradConv& winograd;
  const Plan& plan;
  const float *x, *addend;
  float* y;
  int64_t groups = 1, prepare_items = 0, compute_items = 0;
  float* transformed = nullptr;  // of all strips, or null
  // Where several threads transform integers, they find the ranges first: of parts of the channels of each strip.
  int64_t survey_items = 0, parts = 1;
  float* ranges = nullptr;

  int64_t elements() const { return winograd.elements(); }
  // Of a strip: the transformed input, and of integers the tiles' ranges and their inverses.
  int64_t range_floats() const { return winograd.integers() ? plan.pitch + kRangeSlack : 0; }
  size_t strip_floats() const {
    return static_cast<size_t>(checked_product(plan.element_stride, elements()) + 2 * range_floats());
  }
  const float* range_of(const float* v) const { return v + plan.element_stride * elements(); }

  void survey(int64_t item) {
    const int64_t used = static_cast<int64_t>(winograd.used_.size()), part = item % parts;
    find_range(plan.strips[static_cast<size_t>(item / parts)], ranges + 2 * item * range_floats(),
               first_of_share(used, part, parts), first_of_share(used, part + 1, parts));
  }
  void finish_survey() {
    const int64_t floats = range_floats();
    for (int64_t first = 0; first < survey_items; first += parts) {
      const Plan::Strip& strip = plan.strips[static_cast<size_t>(first / parts)];
      float *low = ranges + 2 * first * floats, *high = low + floats;
      for (int64_t part = 1; part < parts; ++part) {
        const float *other_low = low + 2 * part * floats, *other_high = other_low + floats;
        for (int64_t t = 0; t < strip.tiles; ++t) {
          // A NaN of either stays.
          if (other_low[t] < low[t] || std::isnan(other_low[t])) low[t] = other_low[t];
          if (other_high[t] > high[t] || std::isnan(other_high[t])) high[t] = other_high[t];
        }
      }
      set_ranges(strip, low, high, transformed + static_cast<size_t>(first / parts) * strip_floats());
    }
  }
  void enter(int64_t) const {}
  int64_t group_of(int64_t item) const { return item / static_cast<int64_t>(winograd.bundles_.size()); }
  int64_t first_item(int64_t t, int64_t shares) const {
    if (transformed == nullptr || plan.strips.size() > 1) return first_of_share(compute_items, t, shares);
    const auto weight = [&](int64_t i) { return winograd.work_of(winograd.heaviest_first_[static_cast<size_t>(i)]); };
    return first_of_heap(compute_items, weight, t, shares);
  }

  void prepare(int64_t strip, int64_t item) {
    const int64_t used = static_cast<int64_t>(winograd.used_.size());
    transform_input(plan.strips[static_cast<size_t>(strip)], transformed + static_cast<size_t>(strip) * strip_floats(),
                    first_of_share(used, item, prepare_items), first_of_share(used, item + 1, prepare_items));
  }

  void compute(int64_t item) {
    if (transformed != nullptr) {
      const size_t strip = static_cast<size_t>(group_of(item));
      const size_t bundle = static_cast<size_t>(item) % winograd.bundles_.size();
      return multiply(plan.strips[strip], transformed + strip * strip_floats(),
                      winograd.bundles_[winograd.heaviest_first_[bundle]]);
    }
    const Plan::Strip& strip = plan.strips[static_cast<size_t>(item)];
    const int64_t used = static_cast<int64_t>(winograd.used_.size());
    float* v = thread_scratch<Work>(strip_floats());
    if (winograd.integers()) {
      float* limits = thread_scratch<Plan::Strip>(static_cast<size_t>(2 * range_floats()));
      find_range(strip, limits, 0, used);
      set_ranges(strip, limits, limits + range_floats(), v);
    }
    transform_input(strip, v, 0, used);
    for (const Bundle& bundle : winograd.bundles_) multiply(strip, v, bundle);
  }

  // What the calls for a strip's input have in common.
  template <class Call>
  void set_strip(const Plan::Strip& strip, Call& call) const {
    call.tile = winograd.size_;
    call.height = plan.input[0];
    call.width = plan.input[2];
    call.image_stride = winograd.conv_.inputs_ * plan.input_plane;
    call.runs = plan.runs.data() + strip.run_begin;
    call.run_count = static_cast<int64_t>(strip.run_end - strip.run_begin);
  }

  // The least and the largest inputs of the strip's tiles in the used channels [begin, end).
  void find_range(const Plan::Strip& strip, float* limits, int64_t begin, int64_t end) const {
    WinogradRange call{};
    set_strip(strip, call);
    call.x = x;
    call.channels = winograd.range_channels_.data() + winograd.range_begin_[static_cast<size_t>(begin)];
    call.channel_count =
        winograd.range_begin_[static_cast<size_t>(end)] - winograd.range_begin_[static_cast<size_t>(begin)];
    call.low = limits;
    call.high = limits + range_floats();
    winograd.conv_.kernels_.winograd_range(call);
  }

  // A range that is no number makes the whole tile NaN.
  void set_ranges(const Plan::Strip& strip, const float* low, const float* high, float* v) const {
    float *range = v + plan.element_stride * elements(), *inverse = range + range_floats();
    for (int64_t t = 0; t < plan.pitch; ++t) {
      const float between = t < strip.tiles ? high[t] - low[t] : 1.0F;
      range[t] = (between < kLeastRange ? kLeastRange : between) + (between - between);
      inverse[t] = 1.0F / range[t];
    }
  }

  // The used channels [begin, end) of a strip.
  void transform_input(const Plan::Strip& strip, float* v, int64_t begin, int64_t end) const {
    WinogradInput call{};
    set_strip(strip, call);
    call.plane = plan.element_stride;
    call.pitch = plan.pitch;
    call.scale = winograd.input_scale_.data();
    call.tile_scale = range_of(v) + range_floats();
    for (int64_t u = begin; u < end; ++u) {
      const ConvKernel::Source& source = winograd.used_[static_cast<size_t>(u)];
      const ConvKernel::Source& next = winograd.used_[static_cast<size_t>(u + 1 < end ? u + 1 : u)];
      for (int k = 0; k < 2; ++k) {
        call.x[k] = k < source.count ? x + source.channel[k] * plan.input_plane : nullptr;
        call.next[k] = k < next.count ? x + next.channel[k] * plan.input_plane : call.x[k];
      }
      call.v = v + u * plan.pitch;
      winograd.conv_.kernels_.winograd_input(call);
    }
  }

  // The products of a bundle's rows, [row][element][pitch].
  void multiply_floats(const Plan::Strip& strip, const float* v, const Bundle& bundle, float* products) const {
    const ConvKernel& conv = winograd.conv_;
    const ConvKernel::BlockRow& block_row = conv.block_rows_[bundle.block_row];
    const int64_t tap_offset = 0;
    ConvTile call{};
    call.channel_offset = plan.channel_offset.data() + block_row.channel_begin;
    call.channels = block_row.channel_count;
    call.tap_offset = &tap_offset;
    call.taps = 1;
    call.weight = winograd.weight_.data() + bundle.weight;
    call.bias = plan.zeros.data();
    call.low = -std::numeric_limits<float>::infinity();
    call.high = std::numeric_limits<float>::infinity();
    for (int64_t e = 0; e < elements(); ++e) {
      const int64_t* row_offset = plan.row_offset.data();
      for (size_t g = bundle.group_begin; g < bundle.group_end; ++g) {
        call.rows = conv.groups_[g].rows;
        call.valid_rows = conv.groups_[g].valid_rows;
        call.row_offset = row_offset;
        for (size_t p = strip.part_begin; p < strip.part_end; ++p) {
          const Plan::Part& part = plan.parts[p];
          call.x = v + e * plan.element_stride + part.begin;
          call.y = products + e * plan.pitch + part.begin;
          call.vectors = part.vectors;
          call.mode = part.vectors > 0 ? TapMode::kPlain : TapMode::kTail;
          call.last_lanes = part.vectors > 0 ? conv.kernels_.lanes : part.pixels;
          conv.kernels_.conv_tile(call);
        }
        call.weight += call.rows * call.channels;
        row_offset += call.rows;
      }
    }
  }

  void multiply_integers(const Plan::Strip& strip, const float* v, const Bundle& bundle, float* products) const {
    const ConvKernel& conv = winograd.conv_;
    const ConvKernel::BlockRow& block_row = conv.block_rows_[bundle.block_row];
    const Plan::Part& part = plan.parts[strip.part_begin];
    WinogradProduct call{};
    call.channel_offset = plan.channel_offset.data() + block_row.channel_begin;
    call.channels = block_row.channel_count;
    call.weight = winograd.weight_.data() + bundle.weight;
    call.vectors = part.vectors;
    call.extra = part.pixels > 0;
    call.tile_scale = range_of(v);
    call.row_stride = elements() * plan.pitch;
    for (int64_t e = 0; e < elements(); ++e) {
      call.x = v + e * plan.element_stride;
      call.scale = winograd.product_scale_[static_cast<size_t>(e)];
      call.m = products + e * plan.pitch;
      for (size_t g = bundle.group_begin; g < bundle.group_end; ++g) {
        call.rows = conv.groups_[g].rows;
        conv.kernels_.winograd_product(call);
        call.weight += call.rows * call.channels;
        call.m += call.rows * call.row_stride;
      }
    }
  }

  void multiply(const Plan::Strip& strip, const float* v, const Bundle& bundle) const {
    const ConvKernel& conv = winograd.conv_;
    float* products = thread_scratch<Bundle>(plan.row_offset.size() * static_cast<size_t>(elements() * plan.pitch));
    if (winograd.integers()) {
      multiply_integers(strip, v, bundle, products);
    } else {
      multiply_floats(strip, v, bundle, products);
    }
    WinogradOutput out{};
    out.tile = winograd.size_;
    out.tiles = strip.tiles;
    out.pitch = plan.pitch;
    out.runs = plan.runs.data() + strip.run_begin;
    out.run_count = static_cast<int64_t>(strip.run_end - strip.run_begin);
    out.pooled = conv.fused_ == Fused::kMaxPool;
    out.height = plan.output[0];
    out.width = plan.output[2];
    out.image_stride = conv.outputs_ * plan.output_plane;
    out.low = conv.activation_.low;
    out.high = conv.activation_.high;
    const float* rows = products;
    for (size_t g = bundle.group_begin; g < bundle.group_end; ++g) {
      const ConvKernel::RowGroup& group = conv.groups_[g];
      for (int k = 0; k < group.rows; ++k, rows += elements() * plan.pitch) {
        if (k >= group.valid_rows) continue;
        out.m = rows;
        const int64_t channel = conv.output_perm_[static_cast<size_t>(group.row + k)] * plan.output_plane;
        out.y = y + channel;
        out.addend = addend == nullptr ? nullptr : addend + channel;
        out.scale = winograd.integers() ? winograd.row_scale_[static_cast<size_t>(group.bias + k)] : 1.0F;
        out.bias = conv.terms_.bias.data()[group.bias + k];
        conv.kernels_.winograd_output(out);
      }
    }
  }
};

void WinogradConv::run(const float* x, const float* addend, int64_t batch, const Spatial& input, float* y,
                       const ThreadPool& pool) const {
  const bool pair = conv_.threads_.pair();
  const std::shared_ptr<const Plan> plan = plan_for(batch, input, pair);
  if (plan->output_plane == 0) return;
  Work work{*this, *plan, x, addend, y};
  const int64_t strips = static_cast<int64_t>(plan->strips.size());
  // Twice as many as were seen: strips alone may be no more than those, and one more would find nothing to do.
  const int64_t threads = std::min(machine_threads(), 2 * conv_.threads_.count()), wanted = threads * kItemsPerThread;
  work.compute_items = strips;
  if (strips % (pair ? 2 : threads) != 0 && strips < std::min(wanted, kMaxGroups) && !used_.empty()) {
    work.groups = strips;
    work.prepare_items = std::min<int64_t>(static_cast<int64_t>(used_.size()), ceil_div(wanted, strips));
    work.compute_items = strips * static_cast<int64_t>(bundles_.size());
    work.transformed = thread_scratch<Plan>(work.strip_floats() * static_cast<size_t>(strips));
    if (integers()) {
      work.parts = work.prepare_items;
      work.survey_items = strips * work.parts;
      work.ranges = thread_scratch<Work>(static_cast<size_t>(2 * work.range_floats() * work.survey_items));
    }
  }
  conv_.threads_.saw(run_work(pool, work, conv_.threads_.count()));
}

}  // namespace tetris
