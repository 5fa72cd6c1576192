#include "block_sparse_gemm.h"

namespace tetris {

GemmNode::GemmNode(const NodeReader& node) : where_(node.where()), weight_shape_(node.ints("weight_shape")) {
  if (weight_shape_.size() != 2 || weight_shape_[0] < 1 || weight_shape_[1] < 1) {
    node.fail("attribute weight_shape is " + to_string(weight_shape_) + ", expected [M, K]");
  }
}

int64_t GemmNode::samples(const std::vector<int64_t>& input_shape, std::vector<int64_t>* output_shape) const {
  if (input_shape.empty() || input_shape.back() != weight_shape_[1]) {
    throw std::invalid_argument(where_ + ": input 'X' has shape " + to_string(input_shape) + ", expected " +
                                std::to_string(weight_shape_[1]) + " values along the last dimension");
  }
  int64_t samples = 1;
  for (size_t d = 0; d + 1 < input_shape.size(); ++d) samples = checked_product(samples, input_shape[d]);
  checked_product(samples, weight_shape_[0]);
  *output_shape = input_shape;
  output_shape->back() = weight_shape_[0];
  return samples;
}

void GemmNode::infer_shape(const ShapeInference& inference) {
  const std::vector<int64_t> weight = inference.ints("weight_shape");
  std::vector<Dimension> shape = inference.input_shape(kX);
  if (weight.size() != 2 || weight[0] < 1 || shape.empty()) return;  // creation reports it
  shape.back() = Dimension::of(weight[0]);
  inference.set_output_shape(shape, kX);
}

BlockSparseGemm::BlockSparseGemm(const ort::Api& api, const ort::KernelInfo* info)
    : BlockSparseGemm(api, NodeReader(api, info, kName)) {}

BlockSparseGemm::BlockSparseGemm(const ort::Api& api, const NodeReader& node) : api_(api), node_(node) {
  const Activation activation = node.activation();
  const BlockSparseWeight weight = node.weight(node_.weight_shape());
  const std::optional<Range> range = node.input_range();
  try {
    kernel_ = std::make_unique<GemmKernel>(weight, activation, kernels_for(node.precision(), weight));
    if (range) kernel_->set_input_range(*range);
  } catch (const std::logic_error& error) {
    node.fail(error.what());
  } catch (const std::runtime_error& error) {
    node.fail(error.what());
  }
}

void BlockSparseGemm::compute(ort::KernelContext* context) const {
  std::vector<int64_t> input_shape, output_shape;
  const auto* x = static_cast<const float*>(input_data(api_, context, kX, &input_shape));
  const int64_t samples = node_.samples(input_shape, &output_shape);
  auto* y = static_cast<float*>(output_data(api_, context, output_shape));
  kernel_->run(x, samples, y, SessionThreads(api_, context));
}

}  // namespace tetris
