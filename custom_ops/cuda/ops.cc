#include "ops.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace tetris::cuda {
namespace {

// The CUDA device that onnxruntime runs the node on.
int device_of(const ort::Api& api, const ort::KernelInfo* info) {
  ort::Allocator* allocator = nullptr;
  check(api, api.KernelInfoGetAllocator(info, ort::kDefaultMemory, &allocator));
  const ort::MemoryInfo* memory = nullptr;
  int device = 0;
  ort::Status* status = api.AllocatorGetInfo(allocator, &memory);
  if (status == nullptr) status = api.MemoryInfoGetId(memory, &device);
  api.ReleaseAllocator(allocator);
  check(api, status);
  return device;
}

Type type_of(ort::ElementType element) {
  if (element == ort::kFloat16) return Type::f16;
  if (element == ort::kBFloat16) return Type::bf16;
  const char* tf32 = std::getenv("TETRIS_ONNX_TF32");
  if (tf32 == nullptr || *tf32 == '\0' || std::strcmp(tf32, "1") == 0) return Type::tf32;
  if (std::strcmp(tf32, "0") == 0) return Type::f32;
  throw std::invalid_argument("TETRIS_ONNX_TF32 is '" + std::string(tf32) +
                              "', expected 1 (fast, the default) or 0 (full float32)");
}

StreamHandle* stream_of(const ort::Api& api, const ort::KernelContext* context) {
  void* stream = nullptr;
  check(api, api.KernelContext_GetGPUComputeStream(context, &stream));
  return static_cast<StreamHandle*>(stream);
}

// (outer, middle, inner) as (depth, height, width): 1-D is a width, 2-D a height and a width.
Size depth_first(const Spatial& spatial, size_t rank) {
  if (rank == 1) return {spatial[1], spatial[2], spatial[0]};
  if (rank == 2) return {spatial[1], spatial[0], spatial[2]};
  return {spatial[0], spatial[1], spatial[2]};
}

Window window_of(const ConvNode& node) {
  const size_t rank = node.spatial_rank();
  const ConvAttributes& attributes = node.attributes();
  return {depth_first(attributes.kernel, rank), depth_first(attributes.strides, rank),
          depth_first(attributes.dilations, rank), depth_first(attributes.pads_begin, rank), rank == 3};
}

// Runs `function`, whose errors do not know the node.
template <class Function>
void naming(const std::string& where, Function function) {
  try {
    function();
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    throw std::runtime_error(where + ": " + error.what());
  }
}

}  // namespace

template <bool Add>
ConvOp<Add>::ConvOp(const ort::Api& api, const ort::KernelInfo* info, ort::ElementType element)
    : ConvOp(api, info, NodeReader(api, info, kName, element), element) {}

template <bool Add>
ConvOp<Add>::ConvOp(const ort::Api& api, const ort::KernelInfo* info, const NodeReader& node, ort::ElementType element)
    : api_(api), where_(node.where()), node_(node) {
  const Activation activation = node.activation();
  const BlockSparseWeight weight = node.weight(node_.weight_shape());
  naming(where_, [&] {
    kernel_ = std::make_unique<SparseKernel>(device_of(api, info), type_of(element), window_of(node_), weight, activation,
                                             ChannelsLast{node_.input_last(), node_.output_last()});
  });
}

template <bool Add>
void ConvOp<Add>::compute(ort::KernelContext* context) const {
  std::vector<int64_t> shape;
  const void* x = input_data(api_, context, kX, &shape);
  const ConvNode::Sizes sizes = node_.sizes(shape);
  const void* addend = nullptr;
  if constexpr (Add) {
    std::vector<int64_t> addend_shape;
    addend = input_data(api_, context, kAddend, &addend_shape);
    if (addend_shape != sizes.output_shape) {
      throw std::invalid_argument(where_ + ": input 'addend' has shape " + to_string(addend_shape) + ", expected Y's: " +
                                  to_string(sizes.output_shape));
    }
  }
  void* y = output_data(api_, context, sizes.output_shape);
  naming(where_, [&] {
    kernel_->run(reinterpret_cast<DevicePointer>(x), shape[0], depth_first(sizes.input, node_.spatial_rank()),
                 depth_first(sizes.output, node_.spatial_rank()), reinterpret_cast<DevicePointer>(addend),
                 reinterpret_cast<DevicePointer>(y), stream_of(api_, context));
  });
}

template class ConvOp<false>;
template class ConvOp<true>;

BlockSparseGemm::BlockSparseGemm(const ort::Api& api, const ort::KernelInfo* info, ort::ElementType element)
    : BlockSparseGemm(api, info, NodeReader(api, info, kName, element), element) {}

BlockSparseGemm::BlockSparseGemm(const ort::Api& api, const ort::KernelInfo* info, const NodeReader& node,
                                 ort::ElementType element)
    : api_(api), where_(node.where()), node_(node) {
  const Activation activation = node.activation();
  const BlockSparseWeight weight = node.weight(node_.weight_shape());
  naming(where_, [&] {
    kernel_ =
        std::make_unique<SparseKernel>(device_of(api, info), type_of(element), Window{}, weight, activation,
                                             ChannelsLast{true, true});
  });
}

void BlockSparseGemm::compute(ort::KernelContext* context) const {
  std::vector<int64_t> input_shape, output_shape;
  const void* x = input_data(api_, context, kX, &input_shape);
  const int64_t samples = node_.samples(input_shape, &output_shape);
  void* y = output_data(api_, context, output_shape);
  naming(where_, [&] {
    kernel_->run(reinterpret_cast<DevicePointer>(x), samples, {1, 1, 1}, {1, 1, 1}, 0,
                 reinterpret_cast<DevicePointer>(y), stream_of(api_, context));
  });
}

ChannelsLastMaxPool::ChannelsLastMaxPool(const ort::Api& api, const ort::KernelInfo* info, ort::ElementType element)
    : api_(api), node_(NodeReader(api, info, kName, element)) {
  naming(node_.where(), [&] { kernel_ = std::make_unique<PoolKernel>(device_of(api, info), type_of(element)); });
}

void ChannelsLastMaxPool::compute(ort::KernelContext* context) const {
  std::vector<int64_t> shape;
  const void* x = input_data(api_, context, kX, &shape);
  const std::vector<int64_t> out = node_.output_shape(shape);
  void* y = output_data(api_, context, out);
  const MaxPoolNode::Window& window = node_.window();
  naming(node_.where(), [&] {
    kernel_->run(reinterpret_cast<DevicePointer>(x), shape[0], {shape[1], shape[2]}, {out[1], out[2]}, shape[3], window.kernel,
                 window.strides, window.pads_begin, reinterpret_cast<DevicePointer>(y), stream_of(api_, context));
  });
}

}  // namespace tetris::cuda
