// Coverage-guided fuzzing of what the ops make of a node: every check at creation, shape inference, and a run.
//
// Stands in for onnxruntime: a table of the functions that the ops use (ort_abi.h), over a node that is made from the
// fuzzer's bytes. It begins as a good node and is then edited: attributes, shapes, indices, types, missing inputs.
//
//   clang++-19 -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined ... (tests/fuzz/run_fuzz_ops.sh)
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"

using namespace tetris;

extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base);

namespace {

struct Tensor {
  int type = ort::kFloat;
  std::vector<int64_t> shape;
  std::vector<float> floats;
  std::vector<int64_t> integers;
  bool constant = false, missing = false, known = true;
  void* data() { return type == ort::kInt64 ? static_cast<void*>(integers.data()) : floats.data(); }
};

// Stands for OrtKernelInfo, OrtKernelContext and OrtShapeInferContext alike.
struct Node {
  std::map<std::string, std::vector<int64_t>> ints;
  std::map<std::string, int64_t> integers;
  std::map<std::string, std::vector<float>> floats;
  std::map<std::string, std::string> strings;
  std::vector<Tensor> inputs;
  Tensor output;
};

struct Info {  // OrtTensorTypeAndShapeInfo
  int type = ort::kUndefined;
  std::vector<int64_t> dims;
  std::vector<std::string> names;
};
struct Message {  // OrtStatus
  std::string text;
};

std::vector<const ort::CustomOp*> ops;
// More than this an onnxruntime would not have memory for either.
constexpr int64_t kMostElements = 1 << 18;

ort::Status* error(const std::string& text) { return reinterpret_cast<ort::Status*>(new Message{text}); }
Node& node(const void* info) { return *static_cast<Node*>(const_cast<void*>(info)); }
Tensor& tensor(const void* value) { return *static_cast<Tensor*>(const_cast<void*>(value)); }

int64_t product(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) {
    if (size < 0 || (size > 0 && count > kMostElements / size)) return -1;
    count *= size;
  }
  return count;
}

void copy_text(const std::string& text, char* out, size_t* size) {
  if (out != nullptr) std::memcpy(out, text.c_str(), std::min(*size, text.size() + 1));
  *size = text.size() + 1;
}

template <class T>
ort::Status* copy_values(const std::map<std::string, std::vector<T>>& attributes, const char* name, T* out, size_t* size) {
  const auto found = attributes.find(name);
  if (found == attributes.end()) return error("no such attribute");
  if (out != nullptr) {
    if (*size < found->second.size()) return error("too little room");
    std::copy(found->second.begin(), found->second.end(), out);
  }
  *size = found->second.size();
  return nullptr;
}

// The functions, by slot.
using ort::Status;
Status* create_status(int, const char* text) { return error(text); }
const char* status_text(const Status* status) { return reinterpret_cast<const Message*>(status)->text.c_str(); }
void release_status(Status* status) { delete reinterpret_cast<Message*>(status); }
Status* create_domain(const char*, void** out) {
  static int domain;
  *out = &domain;
  return nullptr;
}
Status* add_op(void*, const ort::CustomOp* op) {
  ops.push_back(op);
  return nullptr;
}
Status* add_domain(void*, void*) { return nullptr; }
Status* tensor_data(void* value, void** out) {
  *out = tensor(value).data();
  return nullptr;
}
Status* tensor_info(const void* value, Info** out) {
  *out = new Info{tensor(value).type, tensor(value).shape, {}};
  return nullptr;
}
Status* create_info(Info** out) {
  *out = new Info;
  return nullptr;
}
void release_info(Info* info) { delete info; }
Status* set_type(Info* info, int type) {
  info->type = type;
  return nullptr;
}
Status* set_dimensions(Info* info, const int64_t* dims, size_t count) {
  info->dims.assign(dims, dims + count);
  return nullptr;
}
Status* get_type(const Info* info, int* out) {
  *out = info->type;
  return nullptr;
}
Status* dimension_count(const Info* info, size_t* out) {
  *out = info->dims.size();
  return nullptr;
}
Status* get_dimensions(const Info* info, int64_t* out, size_t count) {
  if (count > info->dims.size()) std::abort();
  std::copy_n(info->dims.begin(), count, out);
  return nullptr;
}
Status* get_names(const Info* info, const char** out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = i % 2 == 0 && i < info->dims.size() ? "N" : "";
  return nullptr;
}
Status* set_names(Info* info, const char** names, size_t count) {
  info->names.assign(names, names + count);
  return nullptr;
}
// A type is the tensor itself.
Status* input_type_info(const void* info, size_t index, const Tensor** out) {
  if (index >= node(info).inputs.size()) return error("no such input");
  *out = &node(info).inputs[index];
  return nullptr;
}
thread_local Info input_info;
Status* cast_type(const Tensor* type, const Info** out) {
  input_info = {type->type, type->shape, {}};
  *out = type->known ? &input_info : nullptr;
  return nullptr;
}
void release_type(void*) {}
Status* attribute_float(const void* info, const char* name, float* out) {
  const auto found = node(info).floats.find(name);
  if (found == node(info).floats.end() || found->second.size() != 1) return error("no such attribute");
  *out = found->second[0];
  return nullptr;
}
Status* attribute_int(const void* info, const char* name, int64_t* out) {
  const auto found = node(info).integers.find(name);
  if (found == node(info).integers.end()) return error("no such attribute");
  *out = found->second;
  return nullptr;
}
Status* attribute_text(const void* info, const char* name, char* out, size_t* size) {
  const auto found = node(info).strings.find(name);
  if (found == node(info).strings.end()) return error("no such attribute");
  copy_text(found->second, out, size);
  return nullptr;
}
Status* attribute_ints(const void* info, const char* name, int64_t* out, size_t* size) {
  return copy_values(node(info).ints, name, out, size);
}
Status* attribute_floats(const void* info, const char* name, float* out, size_t* size) {
  return copy_values(node(info).floats, name, out, size);
}
Status* get_input(const void* context, size_t index, const void** out) {
  *out = index < node(context).inputs.size() && !node(context).inputs[index].missing ? &node(context).inputs[index] : nullptr;
  return nullptr;
}
Status* get_output(void* context, size_t, const int64_t* dims, size_t rank, void** out) {
  Tensor& output = node(context).output;
  output.shape.assign(dims, dims + rank);
  const int64_t count = product(output.shape);
  if (count < 0) return error("out of memory");
  output.floats.assign(static_cast<size_t>(count), 0.0F);
  *out = &output;
  return nullptr;
}
Status* memory_info(const void*, const void** out) {
  *out = &ops;
  return nullptr;
}
void device_type(const void*, int* out) { *out = ort::kCpuDevice; }
Status* input_count(const void* info, size_t* out) {
  *out = node(info).inputs.size();
  return nullptr;
}
Status* input_name(const void* info, size_t index, char* out, size_t* size) {
  if (index >= node(info).inputs.size()) return error("no such input");
  copy_text(node(info).inputs[index].missing ? "" : "input", out, size);
  return nullptr;
}
Status* output_name(const void*, size_t, char* out, size_t* size) {
  copy_text("y", out, size);
  return nullptr;
}
Status* node_name(const void*, char* out, size_t* size) {
  copy_text("node", out, size);
  return nullptr;
}
Status* constant_input(const void* info, size_t index, int* is_constant, const void** out) {
  if (index >= node(info).inputs.size()) return error("no such input");
  Tensor& input = node(info).inputs[index];
  *is_constant = input.constant && !input.missing ? 1 : 0;
  *out = *is_constant != 0 ? &input : nullptr;
  return nullptr;
}
Status* inferred_input(const void* context, size_t index, Info** out) {
  if (index >= node(context).inputs.size() || node(context).inputs[index].missing) return error("no such input");
  input_info = {node(context).inputs[index].type, node(context).inputs[index].shape, {}};
  *out = &input_info;
  return nullptr;
}
Status* inferred_attribute(const void* context, const char* name, const void** out) {
  const auto found = node(context).ints.find(name);
  if (found == node(context).ints.end()) return error("no such attribute");
  *out = &found->second;
  return nullptr;
}
Status* read_attribute(const void* attribute, int, void* data, size_t bytes, size_t* out) {
  const auto& values = *static_cast<const std::vector<int64_t>*>(attribute);
  *out = values.size() * sizeof(int64_t);
  if (*out > bytes) return error("too little room");
  if (!values.empty()) std::memcpy(data, values.data(), *out);
  return nullptr;
}
Status* set_inferred(void*, size_t, const Info* info) {
  if (info->names.size() != info->dims.size()) std::abort();
  return nullptr;
}
Status* parallel_for(const void*, void (*function)(void*, size_t), size_t total, size_t, void* data) {
  for (size_t i = total; i > 0; --i) function(data, i - 1);
  return nullptr;
}
[[noreturn]] void unexpected() {
  std::fprintf(stderr, "a function of onnxruntime that this does not stand in for\n");
  std::abort();
}

const void* table[300];
const void* api_table(uint32_t) { return table; }
const char* version_text() { return "1.18.0"; }

template <class Function>
void slot(size_t number, Function function) {
  table[number] = reinterpret_cast<const void*>(function);
}

bool register_ops() {
  std::fill(std::begin(table), std::end(table), reinterpret_cast<const void*>(unexpected));
  slot(0, create_status), slot(2, status_text), slot(26, create_domain), slot(27, add_op), slot(28, add_domain);
  slot(51, tensor_data), slot(55, cast_type), slot(57, create_info), slot(58, set_type), slot(59, set_dimensions);
  slot(60, get_type), slot(61, dimension_count), slot(62, get_dimensions), slot(63, get_names), slot(65, tensor_info);
  slot(85, attribute_float), slot(86, attribute_int), slot(87, attribute_text), slot(90, get_input), slot(91, get_output);
  slot(93, release_status), slot(98, release_type), slot(99, release_info), slot(162, attribute_floats);
  slot(163, attribute_ints), slot(194, memory_info), slot(225, device_type), slot(230, input_count);
  slot(232, input_name), slot(233, output_name), slot(234, input_type_info), slot(244, node_name);
  slot(249, constant_input), slot(268, inferred_input), slot(269, inferred_attribute), slot(270, set_inferred);
  slot(271, set_names), slot(272, read_attribute), slot(274, parallel_for);
  const ort::ApiBase base{api_table, version_text};
  if (RegisterCustomOps(nullptr, &base) != nullptr) std::abort();
  ops.erase(std::remove_if(ops.begin(), ops.end(),
                           [](const ort::CustomOp* op) {
                             return std::strcmp(op->GetExecutionProviderType(op), "CPUExecutionProvider") != 0;
                           }),
            ops.end());
  return true;
}

// Values

int64_t any_integer(FuzzedDataProvider& data) {
  static constexpr int64_t kValues[] = {0,       1,         -1,           2,         3,         8,         255,      65536, 1 << 20,
                                        INT32_MAX, INT32_MIN, 1LL << 31, 1LL << 32, 1LL << 61, 1LL << 62, INT64_MAX, INT64_MIN};
  return data.ConsumeBool() ? data.PickValueInArray(kValues) : data.ConsumeIntegralInRange<int64_t>(-4, 40);
}

Tensor make(int type, std::vector<int64_t> shape) {
  Tensor made;
  made.type = type;
  made.shape = std::move(shape);
  made.constant = true;
  const auto count = static_cast<size_t>(std::max<int64_t>(product(made.shape), 0));
  if (type == ort::kInt64) {
    made.integers.resize(count);
  } else {
    made.floats.assign(count, 0.5F);
  }
  return made;
}

Tensor permutation(FuzzedDataProvider& data, int64_t size) {
  Tensor made = make(ort::kInt64, {size});
  for (int64_t i = 0; i < size; ++i) made.integers[static_cast<size_t>(i)] = i;
  if (size > 1 && data.ConsumeBool()) std::swap(made.integers.front(), made.integers.back());
  return made;
}

Node good_node(FuzzedDataProvider& data, const char* op) {
  Node made;
  const bool pool = std::strcmp(op, "ChannelsLastMaxPool") == 0;
  const bool conv = std::strstr(op, "Conv") != nullptr;
  const size_t rank = pool ? 2 : conv ? (std::strstr(op, "MaxPool") != nullptr ? 2 : data.ConsumeIntegralInRange<size_t>(1, 3)) : 0;
  const int64_t outputs = data.ConsumeIntegralInRange<int64_t>(1, 40), inputs = data.ConsumeIntegralInRange<int64_t>(1, 20);
  std::vector<int64_t> weight{outputs, inputs}, kernel, strides, dilations, pads;
  Tensor x = make(ort::kFloat, {});
  const bool input_last = conv && data.ConsumeBool(), output_last = conv && data.ConsumeBool();
  x.shape = {data.ConsumeIntegralInRange<int64_t>(0, 3)};
  if (!pool && !input_last) x.shape.push_back(inputs);
  for (size_t d = 0; d < rank; ++d) {
    kernel.push_back(data.ConsumeIntegralInRange<int64_t>(1, 4));
    strides.push_back(data.ConsumeIntegralInRange<int64_t>(1, 3));
    dilations.push_back(pool ? 1 : data.ConsumeIntegralInRange<int64_t>(1, 2));
    weight.push_back(kernel.back());
    x.shape.push_back(data.ConsumeIntegralInRange<int64_t>(1, 14));
  }
  for (size_t d = 0; d < 2 * rank; ++d) pads.push_back(data.ConsumeIntegralInRange<int64_t>(0, kernel[d % rank] - 1));
  if (pool || input_last) x.shape.push_back(inputs);
  x = make(ort::kFloat, x.shape);
  x.constant = false;
  x.known = data.ConsumeBool();
  made.inputs.push_back(x);
  if (rank > 0) {
    made.ints["kernel_shape"] = kernel;
    made.ints["strides"] = strides;
    made.ints["pads"] = pads;
    if (!pool) made.ints["dilations"] = dilations;
  }
  if (pool) return made;

  const int64_t rows = data.ConsumeIntegralInRange<int64_t>(1, 17), columns = data.ConsumeIntegralInRange<int64_t>(1, 17);
  const int64_t grid_rows = (outputs + rows - 1) / rows, grid_columns = (inputs + columns - 1) / columns;
  made.ints["weight_shape"] = weight;
  made.ints["block_size"] = {rows, columns};
  std::vector<int64_t> kept;
  for (int64_t b = 0; b < grid_rows * grid_columns; ++b) {
    if (data.ConsumeBool()) kept.insert(kept.end(), {b / grid_columns, b % grid_columns});
  }
  const auto count = static_cast<int64_t>(kept.size() / 2);
  std::vector<int64_t> blocks{count, rows, columns};
  blocks.insert(blocks.end(), kernel.begin(), kernel.end());
  made.inputs.push_back(make(ort::kFloat, blocks));
  made.inputs.push_back(make(ort::kInt64, {count, 2}));
  made.inputs.back().integers = kept;
  made.inputs.push_back(permutation(data, inputs));
  made.inputs.push_back(permutation(data, outputs));
  made.inputs.push_back(make(ort::kFloat, {outputs}));
  if (!conv) {
    made.strings["precision"] = data.PickValueInArray({"float32", "bfloat16", "int8"});
    return made;
  }
  made.integers["group"] = 1;
  made.strings["precision"] = data.PickValueInArray({"float32", "float32", "bfloat16", "int8"});
  if (std::strstr(op, "MaxPool") != nullptr) made.ints["pool_shape"] = {2, 2};
  std::vector<int64_t> first{0, static_cast<int64_t>(rank) + 1}, last{0};
  for (size_t d = 1; d <= rank; ++d) {
    first.push_back(static_cast<int64_t>(d));
    last.push_back(static_cast<int64_t>(d) + 1);
  }
  last.push_back(1);
  if (input_last) made.ints["input_transpose"] = first;
  if (output_last) made.ints["output_transpose"] = last;
  if (std::strstr(op, "Add") != nullptr) {
    std::vector<int64_t> sizes{x.shape[0]}, spatial;
    for (size_t d = 0; d < rank; ++d) {
      const int64_t in = x.shape[(input_last ? 1 : 2) + d];
      spatial.push_back(std::max<int64_t>((in + pads[d] + pads[rank + d] - (kernel[d] - 1) * dilations[d] - 1) / strides[d] + 1, 0));
    }
    if (!output_last) sizes.push_back(outputs);
    sizes.insert(sizes.end(), spatial.begin(), spatial.end());
    if (output_last) sizes.push_back(outputs);
    made.inputs.push_back(make(ort::kFloat, sizes));
    made.inputs.back().constant = false;
  }
  return made;
}

void edit(FuzzedDataProvider& data, Node& made) {
  switch (data.ConsumeIntegralInRange(0, 9)) {
    case 0: {  // an entry of a list
      auto at = made.ints.begin();
      if (made.ints.empty()) return;
      std::advance(at, data.ConsumeIntegralInRange<size_t>(0, made.ints.size() - 1));
      if (!at->second.empty()) at->second[data.ConsumeIntegralInRange<size_t>(0, at->second.size() - 1)] = any_integer(data);
      return;
    }
    case 1: {  // its length
      auto at = made.ints.begin();
      if (made.ints.empty()) return;
      std::advance(at, data.ConsumeIntegralInRange<size_t>(0, made.ints.size() - 1));
      at->second.resize(data.ConsumeIntegralInRange<size_t>(0, 20), any_integer(data));
      return;
    }
    case 2:
      if (!made.ints.empty()) made.ints.erase(std::next(made.ints.begin(), data.ConsumeIntegralInRange<long>(0, static_cast<long>(made.ints.size()) - 1)));
      return;
    case 3: made.integers["group"] = any_integer(data); return;
    case 4: {
      const char* name = data.PickValueInArray({"activation_min", "activation_max", "input_range"});
      made.floats[name] = {data.ConsumeFloatingPoint<float>()};
      if (data.ConsumeBool()) made.floats[name].push_back(data.ConsumeFloatingPoint<float>());
      return;
    }
    case 5: made.strings["precision"] = data.ConsumeRandomLengthString(12); return;
    case 6: {  // an entry of a constant
      Tensor& input = made.inputs[data.ConsumeIntegralInRange<size_t>(0, made.inputs.size() - 1)];
      if (!input.integers.empty()) input.integers[data.ConsumeIntegralInRange<size_t>(0, input.integers.size() - 1)] = any_integer(data);
      if (!input.floats.empty()) input.floats[data.ConsumeIntegralInRange<size_t>(0, input.floats.size() - 1)] = data.ConsumeFloatingPoint<float>();
      return;
    }
    case 7: {  // the shape of an input, with as many values
      Tensor& input = made.inputs[data.ConsumeIntegralInRange<size_t>(0, made.inputs.size() - 1)];
      std::vector<int64_t> shape = input.shape;
      if (data.ConsumeBool() || shape.empty()) {
        shape.resize(data.ConsumeIntegralInRange<size_t>(0, 6), data.ConsumeIntegralInRange<int64_t>(0, 20));
      } else {
        shape[data.ConsumeIntegralInRange<size_t>(0, shape.size() - 1)] = any_integer(data);
      }
      const bool constant = input.constant, known = input.known;
      if (product(shape) < 0 && constant) return;  // there is no such constant
      input = make(input.type, shape);
      input.constant = constant, input.known = known;
      return;
    }
    case 8: {
      Tensor& input = made.inputs[data.ConsumeIntegralInRange<size_t>(0, made.inputs.size() - 1)];
      input.constant = data.ConsumeBool(), input.missing = data.ConsumeBool();
      return;
    }
    default: made.inputs.resize(data.ConsumeIntegralInRange<size_t>(1, 8), make(ort::kFloat, {1}));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  static const bool registered = register_ops();
  (void)registered;
  FuzzedDataProvider data(bytes, size);
  const ort::CustomOp* op = ops[data.ConsumeIntegralInRange<size_t>(0, ops.size() - 1)];
  Node made = good_node(data, op->GetName(op));
  for (int edits = data.ConsumeIntegralInRange(0, 3); edits > 0; --edits) edit(data, made);
  // What onnxruntime itself makes sure of before it asks for anything.
  if (made.inputs[0].missing || product(made.inputs[0].shape) < 0) made.inputs[0].constant = true;

  release_status(op->InferOutputShapeFn(op, reinterpret_cast<ort::ShapeInferContext*>(&made)));
  void* kernel = nullptr;
  Status* status = op->CreateKernelV2(op, table, reinterpret_cast<const ort::KernelInfo*>(&made), &kernel);
  if (status != nullptr) {
    if (*status_text(status) == '\0') std::abort();
    release_status(status);
    return 0;
  }
  if (!made.inputs[0].missing && product(made.inputs[0].shape) >= 0) {
    release_status(op->KernelComputeV2(kernel, reinterpret_cast<ort::KernelContext*>(&made)));
  }
  op->KernelDestroy(kernel);
  return 0;
}
