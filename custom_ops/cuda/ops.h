// The ops on the CUDA execution provider, as onnxruntime sees them.
#pragma once

#include <memory>
#include <string>

#include "../block_sparse_conv.h"
#include "../block_sparse_gemm.h"
#include "../channels_last_max_pool.h"
#include "pool_kernel.h"
#include "sparse_kernel.h"

namespace tetris::cuda {

// BlockSparseConv, or with `Add` BlockSparseConvAdd.
template <bool Add>
class ConvOp {
 public:
  static constexpr const char* kName = Add ? "BlockSparseConvAdd" : "BlockSparseConv";
  static constexpr size_t kInputs = (Add ? kAddend : kBias) + 1;

  ConvOp(const ort::Api& api, const ort::KernelInfo* info, ort::ElementType element);
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference) { ConvNode::infer_shape(inference); }

 private:
  ConvOp(const ort::Api& api, const ort::KernelInfo* info, const NodeReader& node, ort::ElementType element);

  const ort::Api& api_;
  std::string where_;
  ConvNode node_;
  std::unique_ptr<SparseKernel> kernel_;
};

using BlockSparseConv = ConvOp<false>;
using BlockSparseConvAdd = ConvOp<true>;

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

class ChannelsLastMaxPool {
 public:
  static constexpr const char* kName = tetris::ChannelsLastMaxPool::kName;
  static constexpr size_t kInputs = tetris::ChannelsLastMaxPool::kInputs;

  ChannelsLastMaxPool(const ort::Api& api, const ort::KernelInfo* info, ort::ElementType element);
  void compute(ort::KernelContext* context) const;
  static void infer_shape(const ShapeInference& inference) { MaxPoolNode::infer_shape(inference); }

 private:
  const ort::Api& api_;
  MaxPoolNode node_;
  std::unique_ptr<PoolKernel> kernel_;
};

}  // namespace tetris::cuda
