// BlockSparseConv as onnxruntime sees it: attributes, checks, errors. The arithmetic is in cpu/conv.h.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "kernel_info.h"
#include "shape_inference.h"

namespace tetris {

// What a node says about the convolution: read and checked once, the same for every kind of kernel.
class ConvNode {
 public:
  explicit ConvNode(const NodeReader& node);

  const std::vector<int64_t>& weight_shape() const { return weight_shape_; }
  const ConvAttributes& attributes() const { return attributes_; }
  size_t spatial_rank() const { return weight_shape_.size() - 2; }
  // Checks an input's shape; the sizes of its spatial dimensions, and of the output's.
  struct Sizes {
    Spatial input, output;
    std::vector<int64_t> output_shape;
  };
  Sizes sizes(const std::vector<int64_t>& input_shape) const;

  static void infer_shape(const ShapeInference& inference);

 private:
  std::string where_;
  std::vector<int64_t> weight_shape_;
  ConvAttributes attributes_;
};

class BlockSparseConv {
 public:
  static constexpr const char* kName = "BlockSparseConv";

  BlockSparseConv(const ort::Api& api, const ort::KernelInfo* info);
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference) { ConvNode::infer_shape(inference); }

 private:
  BlockSparseConv(const ort::Api& api, const NodeReader& node);

  const ort::Api& api_;
  ConvNode node_;
  std::unique_ptr<ConvKernel> kernel_;
};

}  // namespace tetris
