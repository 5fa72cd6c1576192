#include "block_sparse_gemm.h"

namespace tetris {

BlockSparseGemm::BlockSparseGemm(const ort::Api& api, const ort::KernelInfo* info) : api_(api) {
  const NodeReader node(api, info, kName);
  where_ = node.where();
  const std::vector<int64_t> shape = node.ints("weight_shape");
  if (shape.size() != 2 || shape[0] < 1 || shape[1] < 1) {
    node.fail("attribute weight_shape is " + to_string(shape) + ", expected [M, K]");
  }
  const Activation activation = node.activation();
  const BlockSparseWeight weight = node.weight(shape);
  try {
    kernel_ = std::make_unique<GemmKernel>(weight, activation, select_kernels());
  } catch (const std::logic_error& error) {
    node.fail(error.what());
  } catch (const std::runtime_error& error) {
    node.fail(error.what());
  }
}

void BlockSparseGemm::compute(ort::KernelContext* context) const {
  std::vector<int64_t> shape;
  const float* x = input_data(api_, context, kX, &shape);
  if (shape.empty() || shape.back() != kernel_->inputs()) {
    throw std::invalid_argument(where_ + ": input 'X' has shape " + to_string(shape) + ", expected " +
                                std::to_string(kernel_->inputs()) + " values along the last dimension");
  }
  int64_t samples = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) samples = checked_product(samples, shape[d]);
  checked_product(samples, kernel_->outputs());
  shape.back() = kernel_->outputs();
  float* y = output_data(api_, context, shape);
  kernel_->run(x, samples, y, SessionThreads(api_, context));
}

void BlockSparseGemm::infer_shape(const ShapeInference& inference) {
  const std::vector<int64_t> weight = inference.ints("weight_shape");
  std::vector<Dimension> shape = inference.input_shape(kX);
  if (weight.size() != 2 || weight[0] < 1 || shape.empty()) return;  // creation reports it
  shape.back() = Dimension::of(weight[0]);
  inference.set_output_shape(shape);
}

}  // namespace tetris
