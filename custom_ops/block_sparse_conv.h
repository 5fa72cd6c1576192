// BlockSparseConv as onnxruntime sees it: attributes, checks, errors. The arithmetic is in cpu/conv.h.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "kernel_info.h"
#include "shape_inference.h"

namespace tetris {

class BlockSparseConv {
 public:
  static constexpr const char* kName = "BlockSparseConv";

  BlockSparseConv(const ort::Api& api, const ort::KernelInfo* info);
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference);

 private:
  const ort::Api& api_;
  std::string where_;
  size_t spatial_rank_;
  ConvAttributes attributes_;
  std::unique_ptr<ConvKernel> kernel_;
};

}  // namespace tetris
