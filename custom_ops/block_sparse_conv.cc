#include "block_sparse_conv.h"

#include <algorithm>

namespace tetris {
namespace {

// The position of a spatial dimension among (outer, middle, inner): see Spatial.
size_t place(size_t dimension, size_t rank) { return rank == 2 ? 2 * dimension : dimension; }

// The Transposes between [N, C, D1..Dk] and [N, D1..Dk, C], as ONNX writes them.
std::vector<int64_t> to_channels_first(size_t rank) {
  std::vector<int64_t> perm{0, static_cast<int64_t>(rank) + 1};
  for (size_t d = 1; d <= rank; ++d) perm.push_back(static_cast<int64_t>(d));
  return perm;
}
std::vector<int64_t> to_channels_last(size_t rank) {
  std::vector<int64_t> perm{0};
  for (size_t d = 2; d <= rank + 1; ++d) perm.push_back(static_cast<int64_t>(d));
  perm.push_back(1);
  return perm;
}

// A shape [N, D1..Dk, C] as [N, C, D1..Dk], and the other way round.
template <class Shape>
Shape channels_first(const Shape& shape) {
  Shape first{shape[0], shape.back()};
  first.insert(first.end(), shape.begin() + 1, shape.end() - 1);
  return first;
}
template <class Shape>
Shape channels_last(const Shape& shape) {
  Shape last{shape[0]};
  last.insert(last.end(), shape.begin() + 2, shape.end());
  last.push_back(shape[1]);
  return last;
}

// values[batch][rows][columns] as [batch][columns][rows].
std::vector<float> transposed(const float* values, int64_t batch, int64_t rows, int64_t columns) {
  std::vector<float> result(static_cast<size_t>(batch * rows * columns));
  for (int64_t n = 0; n < batch; ++n) {
    const float* from = values + n * rows * columns;
    float* to = result.data() + n * rows * columns;
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < rows; ++r) to[c * rows + r] = from[r * columns + c];
    }
  }
  return result;
}

}  // namespace

ConvNode::ConvNode(const NodeReader& node, bool pooled)
    : where_(node.where()), pooled_(pooled), weight_shape_(node.ints("weight_shape")) {
  const std::vector<int64_t>& shape = weight_shape_;
  if (shape.size() < 3 || shape.size() > 5) {
    node.fail("attribute weight_shape is " + to_string(shape) + ", expected [M, C, K1..Kk] with k = 1, 2 or 3");
  }
  const size_t rank = spatial_rank();
  if (pooled) {
    if (rank != 2) node.fail("attribute weight_shape is " + to_string(shape) + ", expected [M, C, K1, K2]");
    if (node.ints("pool_shape") != std::vector<int64_t>{2, 2}) {
      node.fail("attribute pool_shape is " + to_string(node.ints("pool_shape")) + ", only [2, 2] is supported");
    }
  }

  const std::vector<int64_t> kernel_size(shape.begin() + 2, shape.end());
  int64_t taps = 1;
  for (const int64_t size : kernel_size) {
    if (size < 1 || size > kMaxSize || taps > kMaxSize / size) {
      node.fail("attribute weight_shape is " + to_string(shape) + ", with a kernel size that is not possible");
    }
    taps *= size;
  }
  if (shape[0] < 1 || shape[1] < 1) {
    node.fail("attribute weight_shape is " + to_string(shape) + ", expected at least one channel each way");
  }
  if (node.has_ints("kernel_shape") && node.ints("kernel_shape") != kernel_size) {
    node.fail("attribute kernel_shape is " + to_string(node.ints("kernel_shape")) + ", but weight_shape says " +
              to_string(kernel_size));
  }
  if (const int64_t group = node.integer("group", 1); group != 1) {
    node.fail("attribute group is " + std::to_string(group) + ", only 1 is supported");
  }
  const std::vector<int64_t> strides = node.sizes("strides", rank, 1, 1), dilations = node.sizes("dilations", rank, 1, 1);
  const std::vector<int64_t> pads = node.sizes("pads", 2 * rank, 0, 0);
  attributes_ = {{1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}};
  for (size_t d = 0; d < rank; ++d) {
    const size_t at = place(d, rank);
    attributes_.kernel[at] = kernel_size[d];
    attributes_.strides[at] = strides[d];
    attributes_.dilations[at] = dilations[d];
    attributes_.pads_begin[at] = pads[d];
    attributes_.pads_end[at] = pads[rank + d];
  }

  // Whether the attribute, a Transpose, is `other`, not the identity.
  auto transposed = [&](const char* name, const std::vector<int64_t>& other) {
    if (!node.has_ints(name)) return false;
    const std::vector<int64_t> perm = node.ints(name);
    std::vector<int64_t> identity(rank + 2);
    for (size_t d = 0; d < identity.size(); ++d) identity[d] = static_cast<int64_t>(d);
    if (perm != identity && perm != other) {
      node.fail(std::string("attribute ") + name + " is " + to_string(perm) + ", expected " + to_string(identity) + " or " +
                to_string(other));
    }
    return perm != identity;
  };
  input_last_ = transposed("input_transpose", to_channels_first(rank));
  output_last_ = transposed("output_transpose", to_channels_last(rank));
}

ConvNode::Sizes ConvNode::sizes(const std::vector<int64_t>& input_shape) const {
  const size_t rank = spatial_rank();
  auto fail = [&](const std::string& what) {
    throw std::invalid_argument(where_ + ": input 'X' has shape " + to_string(input_shape) + ", " + what);
  };
  if (input_shape.size() != rank + 2) fail("expected " + std::to_string(rank + 2) + " dimensions");
  const std::vector<int64_t> shape = input_last_ ? channels_first(input_shape) : input_shape;
  if (shape[1] != weight_shape_[1]) fail("expected " + std::to_string(weight_shape_[1]) + " channels");
  Sizes sizes{{1, 1, 1}, {}, {shape[0], weight_shape_[0]}};
  for (size_t d = 0; d < rank; ++d) {
    // (of an empty batch, too: there is no limit to what an empty tensor's sizes say)
    if (shape[2 + d] > kMaxSize) fail("too large");
    sizes.input[place(d, rank)] = shape[2 + d];
  }
  sizes.output = conv_output_size(attributes_, sizes.input);
  int64_t elements = checked_product(shape[0], weight_shape_[0]);
  for (size_t d = 0; d < rank; ++d) {
    const int64_t dimension = sizes.output[place(d, rank)] / (pooled_ ? 2 : 1);
    if (dimension < 1) fail("too small for the kernel: output dimension " + std::to_string(2 + d) + " would be empty");
    elements = checked_product(elements, dimension);
    sizes.output_shape.push_back(dimension);
  }
  if (output_last_) sizes.output_shape = channels_last(sizes.output_shape);
  return sizes;
}

std::optional<Spatial> ConvNode::known_size(const std::vector<int64_t>& input_shape) const {
  if (spatial_rank() != 2 || input_shape.size() != 4) return std::nullopt;
  const std::vector<int64_t> shape = input_last_ ? channels_first(input_shape) : input_shape;
  const Spatial input{shape[2], 1, shape[3]};
  // No more than any memory holds: the file may say anything, and what is made for a size is in proportion to it.
  auto possible = [](const Spatial& size) {
    return size[0] > 0 && size[2] > 0 && size[0] <= kMaxSize && size[2] <= kMaxSize / size[0];
  };
  if (!possible(input) || !possible(conv_output_size(attributes_, input))) return std::nullopt;
  return input;
}

void ConvNode::infer_shape(const ShapeInference& inference, bool pooled) {
  const std::vector<int64_t> weight = inference.ints("weight_shape");
  std::vector<Dimension> input = inference.input_shape(kX);
  if (weight.size() < 3 || weight.size() > 5 || input.size() != weight.size()) return;  // creation reports it
  const size_t rank = weight.size() - 2;
  if (inference.ints("input_transpose") == to_channels_first(rank)) input = channels_first(input);
  auto read = [&](const char* name, size_t count, int64_t otherwise) {
    std::vector<int64_t> values = inference.ints(name);
    if (values.size() != count) values.assign(count, otherwise);
    return values;
  };
  const std::vector<int64_t> strides = read("strides", rank, 1), dilations = read("dilations", rank, 1);
  const std::vector<int64_t> pads = read("pads", 2 * rank, 0);
  std::vector<Dimension> output{input[0], Dimension::of(weight[0])};
  for (size_t d = 0; d < rank; ++d) {
    const int64_t kernel = weight[2 + d];
    for (const int64_t size : {kernel, strides[d], dilations[d]}) {
      if (size < 1 || size > kMaxSize) return;
    }
    for (const int64_t pad : {pads[d], pads[rank + d]}) {
      if (pad < 0 || pad > kMaxSize) return;
    }
    const int64_t grow = pads[d] + pads[rank + d] - ((kernel - 1) * dilations[d] + 1);
    const Dimension& in = input[2 + d];
    if (in.known()) {
      if (in.value > kMaxSize || in.value + grow < 0) return;
      output.push_back(Dimension::of(((in.value + grow) / strides[d] + 1) / (pooled ? 2 : 1)));
    } else if (grow == -1 && strides[d] == 1 && !pooled) {
      output.push_back(in);
    } else {
      output.push_back(Dimension::unknown());
    }
  }
  if (inference.ints("output_transpose") == to_channels_last(rank)) output = channels_last(output);
  inference.set_output_shape(output, kX);
}

template <Fused F>
ConvOp<F>::ConvOp(const ort::Api& api, const NodeReader& node) : api_(api), node_(node, F == Fused::kMaxPool) {
  const Activation activation = node.activation();
  const BlockSparseWeight weight = node.weight(node_.weight_shape());
  const std::optional<Range> range = node.input_range();
  try {
    kernel_ = std::make_unique<ConvKernel>(node_.attributes(), weight, activation,
                                           kernels_for(node.precision(), weight), F, select_conv_algorithm());
    if (range) kernel_->set_input_range(*range);
    const std::vector<int64_t> shape = node.input_shape(kX);
    // A batch of unknown size counts as one image.
    if (const auto size = node_.known_size(shape)) kernel_->specialize(std::clamp<int64_t>(shape[0], 1, kMaxSize), *size);
  } catch (const std::logic_error& error) {
    node.fail(error.what());
  } catch (const std::runtime_error& error) {
    node.fail(error.what());
  }
}

template <Fused F>
void ConvOp<F>::compute(ort::KernelContext* context) const {
  std::vector<int64_t> shape;
  const auto* x = static_cast<const float*>(input_data(api_, context, kX, &shape));
  const ConvNode::Sizes sizes = node_.sizes(shape);
  const float* addend = nullptr;
  if constexpr (F == Fused::kAdd) {
    std::vector<int64_t> addend_shape;
    addend = static_cast<const float*>(input_data(api_, context, kAddend, &addend_shape));
    if (addend_shape != sizes.output_shape) {
      throw std::invalid_argument(node_.where() + ": input 'addend' has shape " + to_string(addend_shape) +
                                  ", expected Y's: " + to_string(sizes.output_shape));
    }
  }
  auto* y = static_cast<float*>(output_data(api_, context, sizes.output_shape));
  if (shape[0] == 0) return;
  const SessionThreads threads(api_, context);
  // The kernels are for NCHW. Channels-last is the layout of models for CUDA: here it has to work, not to be fast.
  const int64_t inputs = node_.weight_shape()[1], outputs = node_.weight_shape()[0];
  std::vector<float> first, addend_first;
  if (node_.input_last()) {
    first = transposed(x, shape[0], sizes.input[0] * sizes.input[1] * sizes.input[2], inputs);
    x = first.data();
  }
  if (!node_.output_last()) return kernel_->run(x, addend, shape[0], sizes.input, y, threads);
  int64_t out = 1;  // positions of Y
  for (size_t d = 1; d + 1 < sizes.output_shape.size(); ++d) out *= sizes.output_shape[d];
  if (addend != nullptr) {
    addend_first = transposed(addend, shape[0], out, outputs);
    addend = addend_first.data();
  }
  std::vector<float> result(static_cast<size_t>(shape[0] * outputs * out));
  kernel_->run(x, addend, shape[0], sizes.input, result.data(), threads);
  const std::vector<float> last = transposed(result.data(), shape[0], outputs, out);
  std::copy(last.begin(), last.end(), y);
}

template class ConvOp<Fused::kNothing>;
template class ConvOp<Fused::kAdd>;
template class ConvOp<Fused::kMaxPool>;

}  // namespace tetris
