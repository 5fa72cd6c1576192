#include "kernel_info.h"

#include <cmath>
#include <cstring>

namespace tetris {
namespace {

// Larger sizes are mistakes, and keeping below leaves room to compute with them.
constexpr int64_t kMaxBlockSize = 1 << 16;

template <class Get>
std::string read_name(const ort::Api& api, Get get) {
  size_t size = 0;
  check(api, get(nullptr, &size));
  std::string name(size, '\0');
  check(api, get(name.data(), &size));
  return name.c_str();  // without the terminating zero
}

const char* name_of(ort::ElementType type) {
  switch (type) {
    case ort::kInt64: return "int64";
    case ort::kFloat16: return "float16";
    case ort::kBFloat16: return "bfloat16";
    default: return "float";
  }
}

float from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float magnitude = exponent == 31  ? (fraction == 0 ? std::numeric_limits<float>::infinity() : std::nanf(""))
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return (half & 0x8000U) != 0 ? -magnitude : magnitude;
}

}  // namespace

void check(const ort::Api& api, ort::Status* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw std::runtime_error(message);
}

std::string to_string(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return text + "]";
}

std::vector<int64_t> tensor_shape(const ort::Api& api, const ort::Value* value) {
  ort::TensorTypeAndShapeInfo* info = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  ort::Status* status = api.GetDimensionsCount(info, &rank);
  std::vector<int64_t> shape(rank);
  if (status == nullptr) status = api.GetDimensions(info, shape.data(), rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(api, status);
  return shape;
}

const char* input_name(size_t input) {
  static constexpr const char* kNames[kInputCount] = {"X",          "blocks",      "block_index",
                                                      "input_perm", "output_perm", "bias", "addend"};
  return kNames[input];
}

ort::ElementType input_type(size_t input, ort::ElementType element) {
  return input == kBlockIndex || input == kInputPerm || input == kOutputPerm ? ort::kInt64 : element;
}

NodeReader::NodeReader(const ort::Api& api, const ort::KernelInfo* info, const char* op, ort::ElementType element)
    : api_(api), info_(info), element_(element) {
  const std::string name = read_name(
      api, [&](char* out, size_t* size) { return api.KernelInfo_GetNodeName(info, out, size); });
  if (!name.empty()) {
    where_ = std::string(op) + " node '" + name + "'";
  } else {
    where_ = std::string(op) + " node with output '" + read_name(api, [&](char* out, size_t* size) {
               return api.KernelInfo_GetOutputName(info, 0, out, size);
             }) + "'";
  }
}

void NodeReader::fail(const std::string& what) const { throw std::invalid_argument(where_ + ": " + what); }

void NodeReader::fail_input(size_t input, const std::string& what) const {
  fail(std::string("input '") + input_name(input) + "' " + what);
}

bool NodeReader::has_ints(const char* name) const {
  size_t size = 0;
  ort::Status* status = api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size);
  if (status != nullptr) api_.ReleaseStatus(status);
  return status == nullptr;
}

std::vector<int64_t> NodeReader::input_shape(size_t input) const {
  ort::TypeInfo* type = nullptr;
  check(api_, api_.KernelInfo_GetInputTypeInfo(info_, input, &type));
  std::vector<int64_t> shape;
  const auto read = [&] {
    const ort::TensorTypeAndShapeInfo* tensor = nullptr;  // belongs to `type`
    check(api_, api_.CastTypeInfoToTensorInfo(type, &tensor));
    size_t rank = 0;
    if (tensor == nullptr) return;
    check(api_, api_.GetDimensionsCount(tensor, &rank));
    shape.resize(rank);
    check(api_, api_.GetDimensions(tensor, shape.data(), rank));
  };
  try {
    read();
  } catch (...) {
    api_.ReleaseTypeInfo(type);
    throw;
  }
  api_.ReleaseTypeInfo(type);
  return shape;
}

std::vector<int64_t> NodeReader::ints(const char* name) const {
  if (!has_ints(name)) fail(std::string("attribute '") + name + "' (a list of integers) is missing");
  size_t size = 0;
  check(api_, api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size));
  std::vector<int64_t> values(size);
  if (size > 0) check(api_, api_.KernelInfoGetAttributeArray_int64(info_, name, values.data(), &size));
  return values;
}

std::vector<int64_t> NodeReader::sizes(const char* name, size_t count, int64_t least, int64_t otherwise) const {
  if (!has_ints(name)) return std::vector<int64_t>(count, otherwise);
  std::vector<int64_t> values = ints(name);
  bool good = values.size() == count;
  for (const int64_t value : values) good = good && value >= least && value <= kMaxSize;
  if (!good) {
    fail(std::string("attribute ") + name + " is " + to_string(values) + ", expected " + std::to_string(count) +
         " values of at least " + std::to_string(least));
  }
  return values;
}

int64_t NodeReader::integer(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  ort::Status* status = api_.KernelInfoGetAttribute_int64(info_, name, &value);
  if (status == nullptr) return value;
  api_.ReleaseStatus(status);
  return otherwise;
}

float NodeReader::number(const char* name, float otherwise) const {
  float value = 0;
  ort::Status* status = api_.KernelInfoGetAttribute_float(info_, name, &value);
  if (status == nullptr) return value;
  api_.ReleaseStatus(status);
  return otherwise;
}

std::string NodeReader::text(const char* name, const char* otherwise) const {
  size_t size = 0;
  ort::Status* status = api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size);
  if (status != nullptr) {
    api_.ReleaseStatus(status);
    return otherwise;
  }
  return read_name(api_, [&](char* out, size_t* room) {
    return api_.KernelInfoGetAttribute_string(info_, name, out, room);
  });
}

Precision NodeReader::precision() const {
  const std::string name = text("precision", "float32");
  if (name == "float32") return Precision::kFloat32;
  if (name == "bfloat16") return Precision::kBFloat16;
  if (name == "int8") return Precision::kInt8;
  fail("attribute precision is '" + name + "', expected float32, bfloat16 or int8");
}

std::optional<Range> NodeReader::input_range() const {
  size_t size = 0;
  ort::Status* status = api_.KernelInfoGetAttributeArray_float(info_, "input_range", nullptr, &size);
  if (status != nullptr) {
    api_.ReleaseStatus(status);
    return std::nullopt;
  }
  if (size != 2) fail("attribute input_range has " + std::to_string(size) + " values, expected [least, largest]");
  float ends[2];
  check(api_, api_.KernelInfoGetAttributeArray_float(info_, "input_range", ends, &size));
  if (!std::isfinite(ends[0]) || !std::isfinite(ends[1]) || ends[0] > ends[1]) {
    fail("attribute input_range is [" + std::to_string(ends[0]) + ", " + std::to_string(ends[1]) +
         "], expected two finite numbers, the least first");
  }
  Range range;  // holds 0
  range.add({ends[0], ends[1]});
  return range;
}

Activation NodeReader::activation() const {
  const float infinity = std::numeric_limits<float>::infinity();
  const Activation range{number("activation_min", -infinity), number("activation_max", infinity)};
  if (std::isnan(range.low) || std::isnan(range.high)) fail("attribute activation_min or activation_max is NaN");
  if (range.low > range.high) fail("attribute activation_min is greater than activation_max");
  return range;
}

NodeReader::Constant NodeReader::constant(size_t input) const {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  ort::Status* status = api_.KernelInfoGetConstantInput_tensor(info_, input, &is_constant, &value);
  if (status != nullptr) {
    api_.ReleaseStatus(status);
    is_constant = 0;
  }
  if (is_constant == 0 || value == nullptr) {
    fail_input(input, "must be a constant initializer: the kernel packs it once, when the session is created");
  }
  Constant constant{tensor_shape(api_, value), nullptr};
  ort::TensorTypeAndShapeInfo* info = nullptr;
  check(api_, api_.GetTensorTypeAndShape(value, &info));
  ort::ElementType type = ort::kUndefined;
  status = api_.GetTensorElementType(info, &type);
  api_.ReleaseTensorTypeAndShapeInfo(info);
  check(api_, status);
  if (type != input_type(input, element_)) {
    fail_input(input, std::string("must have element type ") + name_of(input_type(input, element_)));
  }
  const ort::MemoryInfo* memory = nullptr;
  check(api_, api_.GetTensorMemoryInfo(value, &memory));
  ort::DeviceType device = ort::kCpuDevice;
  api_.MemoryInfoGetDeviceType(memory, &device);
  if (device != ort::kCpuDevice) fail_input(input, "is not in the CPU's memory: onnxruntime should have kept it there");
  void* data = nullptr;
  check(api_, api_.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
  constant.data = data;
  return constant;
}

// The values as float32: where they are, or converted.
const float* NodeReader::floats(const Constant& constant, std::vector<float>* converted) const {
  if (element_ == ort::kFloat) return static_cast<const float*>(constant.data);
  int64_t count = 1;
  for (const int64_t size : constant.shape) count = checked_product(count, size);
  converted->resize(static_cast<size_t>(count));
  const auto* values = static_cast<const uint16_t*>(constant.data);
  for (size_t i = 0; i < converted->size(); ++i) {
    if (element_ == ort::kFloat16) {
      (*converted)[i] = from_half(values[i]);
    } else {
      const uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
      std::memcpy(&(*converted)[i], &bits, sizeof(bits));
    }
  }
  return converted->data();
}

const int64_t* NodeReader::permutation(size_t input, int64_t size, const char* of) const {
  const Constant tensor = constant(input);
  if (tensor.shape != std::vector<int64_t>{size}) {
    fail_input(input, "has shape " + to_string(tensor.shape) + ", expected [" + std::to_string(size) + "]: one entry for each " +
                          of + " channel");
  }
  const auto* perm = static_cast<const int64_t*>(tensor.data);
  std::vector<bool> seen(static_cast<size_t>(size), false);
  for (int64_t i = 0; i < size; ++i) {
    if (perm[i] < 0 || perm[i] >= size || seen[static_cast<size_t>(perm[i])]) {
      fail_input(input, "is not a permutation: entry " + std::to_string(i) + " is " + std::to_string(perm[i]) +
                            (perm[i] < 0 || perm[i] >= size ? ", outside 0.." + std::to_string(size - 1) : ", a second time"));
    }
    seen[static_cast<size_t>(perm[i])] = true;
  }
  return perm;
}

BlockSparseWeight NodeReader::weight(const std::vector<int64_t>& shape) const {
  size_t count = 0;
  check(api_, api_.KernelInfo_GetInputCount(info_, &count));
  if (count < kBias) fail("has " + std::to_string(count) + " inputs, expected at least 5");

  const std::vector<int64_t> block_size = ints("block_size");
  if (block_size.size() != 2) {
    fail("attribute block_size is " + to_string(block_size) + ", expected [block rows, block columns]");
  }
  for (const int64_t size : block_size) {
    if (size < 1 || size > kMaxBlockSize) {
      fail("attribute block_size is " + to_string(block_size) + ", expected values from 1 to " +
           std::to_string(kMaxBlockSize));
    }
  }

  BlockSparseWeight weight{};
  weight.outputs = shape[0];
  weight.inputs = shape[1];
  weight.block_outputs = block_size[0];
  weight.block_inputs = block_size[1];
  weight.taps = 1;
  for (size_t d = 2; d < shape.size(); ++d) weight.taps *= shape[d];

  const Constant blocks = constant(kBlocks);
  std::vector<int64_t> expected{blocks.shape.empty() ? 0 : blocks.shape[0], block_size[0], block_size[1]};
  expected.insert(expected.end(), shape.begin() + 2, shape.end());
  if (blocks.shape.empty() || blocks.shape != expected) {
    fail_input(kBlocks, "has shape " + to_string(blocks.shape) + ", but attributes block_size and weight_shape say " +
                            to_string(expected));
  }
  weight.block_count = blocks.shape[0];
  weight.blocks = floats(blocks, &blocks_);

  weight.input_perm = permutation(kInputPerm, weight.inputs, "input");
  weight.output_perm = permutation(kOutputPerm, weight.outputs, "output");

  const Constant index = constant(kBlockIndex);
  if (index.shape != std::vector<int64_t>{weight.block_count, 2}) {
    fail_input(kBlockIndex, "has shape " + to_string(index.shape) + ", expected " +
                                to_string({weight.block_count, 2}) + ": a (row, column) for each kept block");
  }
  weight.block_index = static_cast<const int64_t*>(index.data);
  const int64_t rows = weight.block_rows();
  const int64_t columns = (weight.inputs + weight.block_inputs - 1) / weight.block_inputs;
  for (int64_t b = 0; b < weight.block_count; ++b) {
    const int64_t row = weight.block_index[2 * b], column = weight.block_index[2 * b + 1];
    const std::string entry =
        "entry " + std::to_string(b) + " is (" + std::to_string(row) + ", " + std::to_string(column) + ")";
    if (row < 0 || row >= rows || column < 0 || column >= columns) {
      fail_input(kBlockIndex, entry + ", outside the grid of " + std::to_string(rows) + " x " +
                                  std::to_string(columns) + " blocks");
    }
    if (b == 0) continue;
    const int64_t last_row = weight.block_index[2 * b - 2], last_column = weight.block_index[2 * b - 1];
    if (row == last_row && column == last_column) fail_input(kBlockIndex, entry + ", a second time");
    if (row < last_row || (row == last_row && column < last_column)) {
      fail_input(kBlockIndex, entry + ", after a later one: sort by row, then column");
    }
  }

  const bool has_bias = count > kBias && !read_name(api_, [&](char* out, size_t* size) {
                                            return api_.KernelInfo_GetInputName(info_, kBias, out, size);
                                          }).empty();
  if (has_bias) {
    const Constant bias = constant(kBias);
    if (bias.shape != std::vector<int64_t>{weight.outputs}) {
      fail_input(kBias, "has shape " + to_string(bias.shape) + ", expected [" + std::to_string(weight.outputs) + "]");
    }
    weight.bias = floats(bias, &bias_);
  }
  return weight;
}

void SessionThreads::run(void (*function)(void* data, size_t index), size_t total, void* data) const {
  if (total == 1) return function(data, 0);
  check(api_, api_.KernelContext_ParallelFor(context_, function, total, 0, data));
}

const void* input_data(const ort::Api& api, ort::KernelContext* context, size_t index, std::vector<int64_t>* shape) {
  const ort::Value* value = nullptr;
  check(api, api.KernelContext_GetInput(context, index, &value));
  if (value == nullptr) throw std::invalid_argument("input is missing");
  *shape = tensor_shape(api, value);
  void* data = nullptr;
  check(api, api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
  return data;
}

void* output_data(const ort::Api& api, ort::KernelContext* context, const std::vector<int64_t>& shape) {
  ort::Value* value = nullptr;
  check(api, api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &value));
  void* data = nullptr;
  check(api, api.GetTensorMutableData(value, &data));
  return data;
}

}  // namespace tetris
