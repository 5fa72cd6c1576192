// ChannelsLastMaxPool: ONNX MaxPool over [N, H, W, C], for runs of convolutions whose values are channels-last.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "kernel_info.h"
#include "shape_inference.h"

namespace tetris {

// What a node says about the pooling: read and checked once, the same for every kind of kernel.
class MaxPoolNode {
 public:
  explicit MaxPoolNode(const NodeReader& node);

  struct Window {
    std::array<int64_t, 2> kernel, strides, pads_begin, pads_end;
  };
  const Window& window() const { return window_; }
  const std::string& where() const { return where_; }
  // Checks an input's shape; the output's.
  std::vector<int64_t> output_shape(const std::vector<int64_t>& input_shape) const;

  static void infer_shape(const ShapeInference& inference);

 private:
  std::string where_;
  Window window_;
};

class ChannelsLastMaxPool {
 public:
  static constexpr const char* kName = "ChannelsLastMaxPool";
  static constexpr size_t kInputs = 1;

  ChannelsLastMaxPool(const ort::Api& api, const ort::KernelInfo* info);
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference) { MaxPoolNode::infer_shape(inference); }

 private:
  const ort::Api& api_;
  MaxPoolNode node_;
};

}  // namespace tetris
