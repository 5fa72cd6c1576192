#include "sparse_kernel.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "signatures.h"

namespace tetris::cuda {
namespace {

constexpr int64_t kInt32 = INT32_MAX;
// Values of a tensor that one launch may see: its offsets are 32-bit. The tests set it lower.
#if !defined(TETRIS_CUDA_MAX_VALUES)
#define TETRIS_CUDA_MAX_VALUES INT32_MAX
#endif
constexpr int64_t kMaxValues = TETRIS_CUDA_MAX_VALUES;
constexpr int64_t kChannelTile = 32, kPixelTile = 64;  // of channels_last
constexpr int64_t kSumRows = 32, kSumPixels = 16;      // of sum_splits
constexpr int64_t kSplits[] = {2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32};

// What `microseconds` reckons with, for one multiprocessor of an H100: kilobytes a microsecond from the L2 cache and from
// L1 and shared memory, millions of multiplications and additions a microsecond by type; what a program takes before its
// first product and after its last, what sum_splits takes to start, the least time of a step. From data sheets and
// published measurements; what is measured here goes into tiles.csv, which goes before it. tetris_onnx/timing/cuda_cost.py
// predicts with the same numbers (tests/custom_ops/cuda/test_choice.py).
constexpr double kL2 = 42, kL1 = 225, kFill = 1.5, kSum = 2.0, kStep = 0.1;
constexpr double kMultiplications[] = {3.75, 3.75, 1.875, 0.22};  // f16, bf16, tf32, f32
constexpr double kReuse = 0.6;  // of the pixels that several taps read, the share that L1 still holds

const char* name_of(Type type) {
  switch (type) {
    case Type::f16: return "f16";
    case Type::bf16: return "bf16";
    case Type::tf32: return "tf32";
    default: return "f32";
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t volume(const Size& size) { return checked_product(checked_product(size[0], size[1]), size[2]); }
int32_t narrow(int64_t value) {
  if (value < -kInt32 || value > kInt32) throw std::invalid_argument("a size is too large for the CUDA kernels");
  return static_cast<int32_t>(value);
}

}  // namespace

SparseKernel::SparseKernel(int device, Type type, const Window& window, const BlockSparseWeight& weight,
                           Activation activation, ChannelsLast last)
    : device_(Device::get(device)),
      user_(device_.user()),
      type_(type),
      window_(window),
      activation_(activation),
      last_(last),
      inputs_(weight.inputs),
      outputs_(weight.outputs),
      taps_(weight.taps) {
  const PackedWeight packed = pack(weight, type);
  bm_ = packed.bm;
  bk_ = packed.bk;
  rows_ = packed.rows;
  channels_ = static_cast<int64_t>(packed.input_channel.size());
  most_tiles_ = packed.most_tiles();
  mean_tiles_ = static_cast<double>(packed.tile_begin.back()) / static_cast<double>(packed.rows);
  in_order_ = packed.input_in_order() && channels_ == inputs_;

  std::vector<unsigned char> data;
  std::vector<size_t> places;
  auto add = [&](const auto& values) {
    data.resize((data.size() + 255) / 256 * 256);
    places.push_back(data.size());
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    data.insert(data.end(), bytes, bytes + values.size() * sizeof(values[0]));
  };
  add(packed.values);
  add(packed.bias);
  add(packed.tile_begin);
  add(packed.channel_tile);
  add(packed.row_order);
  add(packed.output_channel);
  add(packed.input_channel);
  memory_ = device_.upload(data);
  DevicePointer* const pointers[] = {&values_,    &bias_,           &tile_begin_,   &channel_tile_,
                                     &row_order_, &output_channel_, &input_channel_};
  for (size_t i = 0; i < places.size(); ++i) *pointers[i] = memory_->pointer() + places[i];

  const Size square{1, 3, 3}, point{1, 1, 1};
  kernel_taps_ = type == Type::f32                              ? 0
                 : window.kernel == point                       ? 1
                 : window.kernel == square && !window.has_depth ? 9
                                                                : 0;
  choices_ = tile_table();
  const Layout layout = last.output ? Layout::nhwc : Layout::nchw;
  for (const Tile& tile : tiles()) {
    if (tile.type != type || tile.taps != kernel_taps_ || tile.bk != bk_ || bm_ % tile.bm != 0) continue;
    if (tile.bm < 64 && bm_ >= 64 && type != Type::f32) continue;  // too low for wgmma
    if (tile.layout == layout) whole_.push_back({&tile, &device_.kernel(tile.variant)});
    if (tile.layout == Layout::split) split_.push_back({&tile, &device_.kernel(tile.variant)});
  }
  if (whole_.empty()) throw std::runtime_error("the op library holds no CUDA kernel for this layer: rebuild it");
  for (std::vector<Candidate>* list : {&whole_, &split_}) {
    std::stable_sort(list->begin(), list->end(), [](const Candidate& a, const Candidate& b) {
      return a.tile->bm * a.tile->bn < b.tile->bm * b.tile->bn;
    });
  }
  const std::string elements = type == Type::tf32 ? "tf32" : item_size(type) == 2 ? "i16" : "i32";
  channels_last_ = &device_.kernel("channels_last_" + elements + (last.input ? "_nhwc" : "_nchw"));
  sum_splits_ = &device_.kernel(std::string("sum_splits_") + (type == Type::tf32 ? "f32" : name_of(type)) +
                                (last.output ? "_nhwc" : "_nchw"));

  if (const char* forced = std::getenv("TETRIS_ONNX_CUDA_TILE"); forced != nullptr && *forced != '\0') {
    long long bm = 0, bn = 0, splits = 0;
    char rest = 0;
    if (std::sscanf(forced, "%lldx%lldx%lld%c", &bm, &bn, &splits, &rest) != 3 || bm < 0 || bn < 0 || splits < 0 ||
        splits > 1024) {
      throw std::invalid_argument("TETRIS_ONNX_CUDA_TILE is '" + std::string(forced) +
                                  "', expected ROWSxPIXELSxSPLITS, with 0 for what is to be chosen");
    }
    forced_bm_ = bm;
    forced_bn_ = bn;
    forced_splits_ = splits;
  }
}

TileChoice SparseKernel::describe(int64_t pixels) const {
  return {device_.capability(), type_, kernel_taps_, bm_, rows_, std::max<int64_t>(most_tiles_ * taps_, 1), pixels, 0, 0, 0};
}

TileChoice SparseKernel::choose(int64_t pixels) const {
  const Plan plan = this->plan(pixels, false);
  TileChoice choice = describe(pixels);
  choice.bm = plan.tile->bm;
  choice.bn = plan.tile->bn;
  choice.splits = plan.splits;
  return choice;
}

// The time of a launch: each program goes through its steps, one tile of weights and of pixels each, at the pace of what
// is slowest: the L2 cache, L1 and shared memory, or the tensor cores. Taps but the first find most of their pixels in L1.
double SparseKernel::microseconds(const Tile& tile, int64_t splits, int64_t pixels) const {
  const double item = item_size(type_), weights = 1e-3 * tile.bm * tile.bk * item, x = 1e-3 * tile.bn * tile.bk * item;
  const double uses = kernel_taps_ == 1 ? 1.0
                                        : kReuse * static_cast<double>(taps_) /
                                              static_cast<double>(window_.strides[0] * window_.strides[1] * window_.strides[2]);
  const double l2 = weights + x / std::max(uses, 1.0);
  const double l1 = 2 * weights + (kernel_taps_ == 1 ? 2 : 3) * x;
  const double multiplications = 1e-6 * tile.bm * tile.bn * tile.bk / kMultiplications[static_cast<int>(type_)];
  const double step = std::max({l2 / kL2, l1 / kL1, multiplications, kStep});
  const int64_t programs = ceil_div(pixels, tile.bn) * rows_ * (bm_ / tile.bm) * splits;
  const auto rounds = static_cast<double>(ceil_div(programs, device_.multiprocessors()));
  const double steps = std::max(1.0, mean_tiles_ * static_cast<double>(taps_) / static_cast<double>(splits));
  const double alone = kFill + rounds * steps * step;
  if (tile.layout != Layout::split) return alone;
  const double partial = 1e-3 * 2 * sizeof(float) * static_cast<double>(splits * rows_ * bm_) * static_cast<double>(pixels);
  return alone + kSum + partial / (kL2 * device_.multiprocessors());
}

// What was measured for a layer like this one; else what is reckoned to be the fastest.
SparseKernel::Plan SparseKernel::plan(int64_t pixels, bool must_split) const {
  int64_t bm = forced_bm_, bn = forced_bn_, splits = forced_splits_;
  if (bm == 0 && bn == 0 && splits == 0) {
    const TileChoice* choice = find_choice(choices_, describe(pixels));
    const std::vector<Candidate>& among = choice != nullptr && choice->splits > 1 ? split_ : whole_;
    const bool compiled = std::any_of(among.begin(), among.end(), [&](const Candidate& candidate) {
      return choice != nullptr && candidate.tile->bm == choice->bm && candidate.tile->bn == choice->bn;
    });
    if (compiled) {
      bm = choice->bm;
      bn = choice->bn;
      splits = choice->splits;
    }
  }
  const int64_t steps = std::max<int64_t>(most_tiles_ * taps_, 1);
  const int64_t room = kMaxValues / checked_product(rows_ * bm_, pixels);  // partial sums have 32-bit offsets too
  Plan best{nullptr, nullptr, 1};
  double least = 0;
  auto consider = [&](const Candidate& candidate, int64_t count) {
    const double time = microseconds(*candidate.tile, count, pixels);
    if (best.tile == nullptr || time < least) {
      best = {candidate.tile, candidate.kernel, count};
      least = time;
    }
  };
  auto search = [&](int64_t rows, int64_t columns, int64_t parts) {
    auto allowed = [&](const Tile& tile) {
      return (rows == 0 || tile.bm == rows) && (columns == 0 || tile.bn == columns);
    };
    if (!must_split && parts <= 1) {
      for (const Candidate& candidate : whole_) {
        if (allowed(*candidate.tile)) consider(candidate, 1);
      }
    }
    for (const Candidate& candidate : split_) {
      if (!allowed(*candidate.tile)) continue;
      if (must_split && parts <= 1) consider(candidate, 1);
      if (parts > 1 && std::min({parts, steps, room}) > 1) consider(candidate, std::min({parts, steps, room}));
      for (const int64_t count : kSplits) {
        if (parts == 0 && count <= std::min(steps, room)) consider(candidate, count);
      }
    }
  };
  search(bm, bn, splits);
  if (best.tile == nullptr) search(0, 0, 0);  // a forced choice that this layer has not
  return best;
}

void SparseKernel::run(DevicePointer x, int64_t batch, const Size& input, const Size& output, DevicePointer addend,
                       DevicePointer y, StreamHandle* stream) const {
  const int64_t in_volume = volume(input), out_volume = volume(output);
  if (batch == 0 || in_volume == 0 || out_volume == 0) return;
  // A convolution that writes NCHW has no room for the addend's addresses: sum_splits adds it.
  const bool must_split = addend != 0 && !last_.output;
  // A larger batch is cut.
  int64_t image = std::max({checked_product(channels_, in_volume), checked_product(inputs_, in_volume),
                            checked_product(outputs_, out_volume)});
  if (must_split) image = std::max(image, checked_product(rows_ * bm_, out_volume));
  if (image > kMaxValues) throw std::invalid_argument("one image has too many values for the CUDA kernels (2^31)");
  const int64_t chunk = std::min(batch, kMaxValues / image);
  for (size_t d = 0; d < 3; ++d) {
    narrow(checked_product(output[d], window_.strides[d]) + checked_product(window_.kernel[d], window_.dilations[d]));
  }
  const int64_t item = item_size(type_);
  const Plan plan = this->plan(chunk * out_volume, must_split);
  const Tile& tile = *plan.tile;
  const int64_t parts = bm_ / tile.bm;

  // An input that already is what the kernel reads is read where it is.
  const bool direct = in_order_ && (last_.input || in_volume == 1) && x % 16 == 0;
  const size_t packed_bytes = direct ? 0 : static_cast<size_t>(chunk * in_volume * channels_ * item + 255) / 256 * 256;
  const bool split = tile.layout == Layout::split;
  const size_t partial_bytes =
      split ? static_cast<size_t>(plan.splits * rows_ * bm_ * chunk * out_volume) * sizeof(float) : 0;
  const Device::Scope scope(device_);
  const Device::Workspace workspace = device_.workspace(stream, packed_bytes + partial_bytes);
  const DevicePointer partial = workspace.pointer + packed_bytes;

  for (int64_t first = 0; first < batch; first += chunk) {
    const int64_t images = std::min(chunk, batch - first);
    const int64_t in_pixels = images * in_volume, out_pixels = images * out_volume;
    DevicePointer source = x + static_cast<DevicePointer>(first * inputs_ * in_volume * item);
    const auto done = static_cast<DevicePointer>(first * outputs_ * out_volume * item);
    const DevicePointer target = y + done, added = addend == 0 ? 0 : addend + done;
    if (!direct) {
      channels_last_->launch<k_channels_last>(ceil_div(in_pixels, kPixelTile), channels_ / kChannelTile, 1, stream, source,
                                              workspace.pointer, input_channel_, narrow(inputs_), narrow(in_volume),
                                              narrow(in_pixels), narrow(channels_));
      source = workspace.pointer;
    }
    plan.kernel->launch<k_block_sparse_conv>(
        ceil_div(out_pixels, tile.bn), rows_ * parts, plan.splits, stream, source, values_, bias_,
        split ? partial : target, added, tile_begin_, channel_tile_, row_order_, output_channel_, narrow(channels_),
        narrow(input[0]), narrow(input[1]), narrow(input[2]), narrow(outputs_), narrow(output[0]), narrow(output[1]),
        narrow(output[2]), narrow(out_pixels), narrow(window_.strides[0]), narrow(window_.strides[1]),
        narrow(window_.strides[2]), narrow(window_.pads_begin[0]), narrow(window_.pads_begin[1]),
        narrow(window_.pads_begin[2]), narrow(window_.dilations[0]), narrow(window_.dilations[1]),
        narrow(window_.dilations[2]), narrow(taps_), narrow(window_.kernel[1]), narrow(window_.kernel[2]),
        narrow(int64_t{bm_} * bk_), narrow(parts), narrow(plan.splits), int32_t{added != 0}, activation_.low,
        activation_.high);
    if (split) {
      sum_splits_->launch<k_sum_splits>(
          ceil_div(out_pixels, kSumPixels), rows_ * bm_ / kSumRows, 1, stream, partial, bias_, target, added, output_channel_,
          narrow(rows_ * bm_), narrow(outputs_), narrow(out_volume), narrow(out_pixels), narrow(plan.splits), int32_t{added != 0}, activation_.low, activation_.high);
    }
  }
}

}  // namespace tetris::cuda
