// Max pooling of a channels-last tensor on the GPU.
#pragma once

#include <array>
#include <cstdint>

#include "device.h"

namespace tetris::cuda {

class PoolKernel {
 public:
  using Plane = std::array<int64_t, 2>;  // along (height, width)

  PoolKernel(int device, Type type);

  // Enqueues y[batch][output][channels] from x[batch][input][channels] on the stream. Device pointers.
  void run(DevicePointer x, int64_t batch, const Plane& input, const Plane& output, int64_t channels, const Plane& window,
           const Plane& strides, const Plane& pads, DevicePointer y, StreamHandle* stream) const;

 private:
  Device& device_;
  int item_size_;
  const Kernel& kernel_;
};

}  // namespace tetris::cuda
