// BlockSparseGemm as onnxruntime sees it: attributes, checks, errors. The arithmetic is in cpu/gemm.h.
#pragma once

#include <memory>
#include <string>

#include "cpu/gemm.h"
#include "kernel_info.h"
#include "shape_inference.h"

namespace tetris {

class BlockSparseGemm {
 public:
  static constexpr const char* kName = "BlockSparseGemm";

  BlockSparseGemm(const ort::Api& api, const ort::KernelInfo* info);
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference);

 private:
  const ort::Api& api_;
  std::string where_;
  std::unique_ptr<GemmKernel> kernel_;
};

}  // namespace tetris
