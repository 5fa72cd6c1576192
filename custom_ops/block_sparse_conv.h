// BlockSparseConv, BlockSparseConvAdd and BlockSparseConvMaxPool as onnxruntime sees them: attributes, checks, errors. The
// arithmetic is in cpu/conv.h.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "kernel_info.h"
#include "shape_inference.h"

namespace tetris {

// What a node says about the convolution: read and checked once, the same for every kind of kernel.
class ConvNode {
 public:
  // `pooled`: the convolution is followed by a MaxPool, of attribute pool_shape.
  explicit ConvNode(const NodeReader& node, bool pooled = false);

  const std::string& where() const { return where_; }
  const std::vector<int64_t>& weight_shape() const { return weight_shape_; }
  const ConvAttributes& attributes() const { return attributes_; }
  size_t spatial_rank() const { return weight_shape_.size() - 2; }
  // Whether X and Y are channels-last: [N, D1..Dk, C] and [N, O1..Ok, M] (attributes input_transpose, output_transpose).
  bool input_last() const { return input_last_; }
  bool output_last() const { return output_last_; }
  // Checks an input's shape; the sizes of its spatial dimensions, and of the convolution's output; the shape of Y.
  struct Sizes {
    Spatial input, output;
    std::vector<int64_t> output_shape;
  };
  Sizes sizes(const std::vector<int64_t>& input_shape) const;
  // The size of the maps of a 2-D convolution, if the shape (-1: unknown) tells it.
  std::optional<Spatial> known_size(const std::vector<int64_t>& input_shape) const;

  static void infer_shape(const ShapeInference& inference, bool pooled = false);

 private:
  std::string where_;
  bool pooled_;
  std::vector<int64_t> weight_shape_;
  ConvAttributes attributes_;
  bool input_last_ = false, output_last_ = false;
};

// The ops of a convolution on the CPU: alone, and with what follows it.
template <Fused F>
class ConvOp {
 public:
  static constexpr const char* kName = F == Fused::kAdd       ? "BlockSparseConvAdd"
                                       : F == Fused::kMaxPool ? "BlockSparseConvMaxPool"
                                                              : "BlockSparseConv";
  static constexpr size_t kInputs = (F == Fused::kAdd ? kAddend : kBias) + 1;

  ConvOp(const ort::Api& api, const ort::KernelInfo* info) : ConvOp(api, NodeReader(api, info, kName)) {}
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference) { ConvNode::infer_shape(inference, F == Fused::kMaxPool); }

 private:
  ConvOp(const ort::Api& api, const NodeReader& node);

  const ort::Api& api_;
  ConvNode node_;
  std::unique_ptr<ConvKernel> kernel_;
};

using BlockSparseConv = ConvOp<Fused::kNothing>;
using BlockSparseConvAdd = ConvOp<Fused::kAdd>;
using BlockSparseConvMaxPool = ConvOp<Fused::kMaxPool>;

}  // namespace tetris
