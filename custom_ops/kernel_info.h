// Reading a node's attributes and constant inputs from onnxruntime, with errors that name the node and the input.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/quantize.h"
#include "cpu/weight.h"
#include "ort_abi.h"

namespace tetris {

// Throws std::runtime_error with onnxruntime's message if `status` is an error; releases it.
void check(const ort::Api& api, ort::Status* status);

// Runs `function` for onnxruntime, which knows no exceptions: one that is thrown becomes an error status.
template <class Function>
ort::Status* guarded(const ort::Api& api, Function function) noexcept {
  try {
    function();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ort::kFail, "ai.tetris op library: out of memory");
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kInvalidArgument, error.what());
  } catch (...) {
    return api.CreateStatus(ort::kFail, "ai.tetris op library: unknown error");
  }
}

std::string to_string(const std::vector<int64_t>& dims);  // "[1, 2, 3]"

std::vector<int64_t> tensor_shape(const ort::Api& api, const ort::Value* value);

// The inputs of the ops, in order, by the names that the specification (README.md) gives them. The last is one of
// BlockSparseConvAdd only.
enum Input : size_t { kX, kBlocks, kBlockIndex, kInputPerm, kOutputPerm, kBias, kAddend, kInputCount };
const char* input_name(size_t input);
ort::ElementType input_type(size_t input, ort::ElementType element);

// Kernel sizes, strides, dilations and pads beyond this are mistakes; below, no product of two overflows.
constexpr int64_t kMaxSize = INT32_MAX;

// One node, as a kernel sees it when it is created.
class NodeReader {
 public:
  // `element`: what the node's tensors hold.
  NodeReader(const ort::Api& api, const ort::KernelInfo* info, const char* op,
             ort::ElementType element = ort::kFloat);

  const std::string& where() const { return where_; }  // "BlockSparseConv node 'conv1'"
  [[noreturn]] void fail(const std::string& what) const;
  [[noreturn]] void fail_input(size_t input, const std::string& what) const;

  bool has_ints(const char* name) const;
  std::vector<int64_t> ints(const char* name) const;  // an error if missing
  // `count` values from `least` to kMaxSize; `otherwise`, so often, if missing.
  std::vector<int64_t> sizes(const char* name, size_t count, int64_t least, int64_t otherwise) const;
  int64_t integer(const char* name, int64_t otherwise) const;
  float number(const char* name, float otherwise) const;

  std::string text(const char* name, const char* otherwise) const;

  // Shape of an input as far as the model says it; -1: unknown. Empty where not even the rank is known.
  std::vector<int64_t> input_shape(size_t input) const;

  // Attributes activation_min and activation_max.
  Activation activation() const;
  Precision precision() const;
  // Attribute input_range: what the bytes of X stand for (kInt8), if the model says it.
  std::optional<Range> input_range() const;

  // Reads and checks everything that describes the weight; `shape` is attribute weight_shape: [outputs, inputs, ...].
  // It points to what this object and onnxruntime hold.
  BlockSparseWeight weight(const std::vector<int64_t>& shape) const;

 private:
  struct Constant {
    std::vector<int64_t> shape;
    const void* data;
  };
  Constant constant(size_t input) const;
  const float* floats(const Constant& constant, std::vector<float>* converted) const;
  const int64_t* permutation(size_t input, int64_t size, const char* of) const;

  const ort::Api& api_;
  const ort::KernelInfo* info_;
  std::string where_;
  ort::ElementType element_;
  mutable std::vector<float> blocks_, bias_;  // as float32 where the node has another type
};

// The threads that onnxruntime runs the session with.
class SessionThreads final : public ThreadPool {
 public:
  SessionThreads(const ort::Api& api, const ort::KernelContext* context) : api_(api), context_(context) {}
  void run(void (*function)(void* data, size_t index), size_t total, void* data) const override;

 private:
  const ort::Api& api_;
  const ort::KernelContext* context_;
};

const void* input_data(const ort::Api& api, ort::KernelContext* context, size_t index, std::vector<int64_t>* shape);
void* output_data(const ort::Api& api, ort::KernelContext* context, const std::vector<int64_t>& shape);

}  // namespace tetris
