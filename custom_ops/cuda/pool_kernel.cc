#include "pool_kernel.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../cpu/weight.h"
#include "signatures.h"

namespace tetris::cuda {
namespace {

constexpr int64_t kChannelTile = 64, kPixelTile = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char* variant(Type type) {
  switch (type) {
    case Type::f16: return "max_pool_f16_nhwc";
    case Type::bf16: return "max_pool_bf16_nhwc";
    default: return "max_pool_f32_nhwc";
  }
}

}  // namespace

PoolKernel::PoolKernel(int device, Type type)
    : device_(Device::get(device)), item_size_(item_size(type)), kernel_(device_.kernel(variant(type))) {}

void PoolKernel::run(DevicePointer x, int64_t batch, const Plane& input, const Plane& output, int64_t channels,
                     const Plane& window, const Plane& strides, const Plane& pads, DevicePointer y,
                     StreamHandle* stream) const {
  const int64_t in = checked_product(checked_product(input[0], input[1]), channels);
  const int64_t out = checked_product(checked_product(output[0], output[1]), channels);
  if (batch == 0 || in == 0 || out == 0) return;
  if (std::max(in, out) > INT32_MAX) throw std::invalid_argument("one image has too many values for the CUDA kernels (2^31)");
  const int64_t taps = checked_product(window[0], window[1]);
  // The positions of a window's values, in 32 bits.
  for (size_t d = 0; d < 2; ++d) {
    if (checked_product(output[d], strides[d]) > INT32_MAX - window[d] || taps > INT32_MAX) {
      throw std::invalid_argument("a window is too large for the CUDA kernels");
    }
  }
  const int64_t chunk = std::min(batch, INT32_MAX / std::max(in, out));  // a larger batch is cut
  auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  const Device::Scope scope(device_);
  for (int64_t first = 0; first < batch; first += chunk) {
    const int64_t images = std::min(chunk, batch - first), pixels = images * output[0] * output[1];
    kernel_.launch<k_max_pool>(ceil_div(pixels, kPixelTile), ceil_div(channels, kChannelTile), 1, stream,
                               x + static_cast<DevicePointer>(first * in * item_size_),
                               y + static_cast<DevicePointer>(first * out * item_size_), narrow(channels), narrow(input[0]),
                               narrow(input[1]), narrow(output[0]), narrow(output[1]), narrow(pixels), narrow(window[0]),
                               narrow(window[1]), narrow(strides[0]), narrow(strides[1]), narrow(pads[0]), narrow(pads[1]));
  }
}

}  // namespace tetris::cuda
