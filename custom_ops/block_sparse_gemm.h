// BlockSparseGemm as onnxruntime sees it: attributes, checks, errors. The arithmetic is in cpu/gemm.h.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "kernel_info.h"
#include "shape_inference.h"

namespace tetris {

// What a node says about the product: read and checked once, the same for every kind of kernel.
class GemmNode {
 public:
  explicit GemmNode(const NodeReader& node);

  const std::vector<int64_t>& weight_shape() const { return weight_shape_; }
  // Checks an input's shape; the number of samples, and the output's shape.
  int64_t samples(const std::vector<int64_t>& input_shape, std::vector<int64_t>* output_shape) const;

  static void infer_shape(const ShapeInference& inference);

 private:
  std::string where_;
  std::vector<int64_t> weight_shape_;
};

class BlockSparseGemm {
 public:
  static constexpr const char* kName = "BlockSparseGemm";
  static constexpr size_t kInputs = kBias + 1;

  BlockSparseGemm(const ort::Api& api, const ort::KernelInfo* info);
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference) { GemmNode::infer_shape(inference); }

 private:
  BlockSparseGemm(const ort::Api& api, const NodeReader& node);

  const ort::Api& api_;
  GemmNode node_;
  std::unique_ptr<GemmKernel> kernel_;
};

}  // namespace tetris
