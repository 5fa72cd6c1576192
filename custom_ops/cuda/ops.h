// BlockSparseConv and BlockSparseGemm on the CUDA execution provider, as onnxruntime sees them.
#pragma once

#include <memory>
#include <string>

#include "../block_sparse_conv.h"
#include "../block_sparse_gemm.h"
#include "sparse_kernel.h"

namespace tetris::cuda {

class BlockSparseConv {
 public:
  static constexpr const char* kName = tetris::BlockSparseConv::kName;
  static constexpr size_t kInputs = tetris::BlockSparseConv::kInputs;

  BlockSparseConv(const ort::Api& api, const ort::KernelInfo* info, ort::ElementType element);
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference) { ConvNode::infer_shape(inference); }

 private:
  BlockSparseConv(const ort::Api& api, const ort::KernelInfo* info, const NodeReader& node, ort::ElementType element);

  const ort::Api& api_;
  std::string where_;
  ConvNode node_;
  std::unique_ptr<SparseKernel> kernel_;
};

class BlockSparseGemm {
 public:
  static constexpr const char* kName = tetris::BlockSparseGemm::kName;
  static constexpr size_t kInputs = tetris::BlockSparseGemm::kInputs;

  BlockSparseGemm(const ort::Api& api, const ort::KernelInfo* info, ort::ElementType element);
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference) { GemmNode::infer_shape(inference); }

 private:
  BlockSparseGemm(const ort::Api& api, const ort::KernelInfo* info, const NodeReader& node, ort::ElementType element);

  const ort::Api& api_;
  std::string where_;
  GemmNode node_;
  std::unique_ptr<SparseKernel> kernel_;
};

}  // namespace tetris::cuda
