#include "shape_inference.h"

#include <atomic>

#include "kernel_info.h"

namespace tetris {

Dimension Dimension::unknown() {
  static std::atomic<uint64_t> count{0};
  return {-1, "ai.tetris_unknown_" + std::to_string(count.fetch_add(1))};
}

std::vector<int64_t> ShapeInference::ints(const char* name) const {
  constexpr size_t kMost = 16;
  const ort::OpAttr* attribute = nullptr;
  std::vector<int64_t> values(kMost);
  size_t bytes = 0;
  ort::Status* status = api_.ShapeInferContext_GetAttribute(context_, name, &attribute);
  if (status == nullptr && attribute != nullptr) {
    status = api_.ReadOpAttr(attribute, ort::kAttrInts, values.data(), kMost * sizeof(int64_t), &bytes);
  }
  if (status != nullptr) {
    api_.ReleaseStatus(status);
    bytes = 0;
  }
  values.resize(bytes / sizeof(int64_t));
  return values;
}

std::vector<Dimension> ShapeInference::input_shape(size_t input) const {
  ort::TensorTypeAndShapeInfo* info = nullptr;  // belongs to the context
  ort::Status* status = api_.ShapeInferContext_GetInputTypeShape(context_, input, &info);
  if (status != nullptr || info == nullptr) {
    if (status != nullptr) api_.ReleaseStatus(status);
    return {};
  }
  size_t rank = 0;
  check(api_, api_.GetDimensionsCount(info, &rank));
  std::vector<int64_t> values(rank);
  std::vector<const char*> names(rank, nullptr);
  if (rank > 0) {
    check(api_, api_.GetDimensions(info, values.data(), rank));
    check(api_, api_.GetSymbolicDimensions(info, names.data(), rank));
  }
  std::vector<Dimension> shape;
  for (size_t d = 0; d < rank; ++d) {
    if (values[d] >= 0) {
      shape.push_back(Dimension::of(values[d]));
    } else if (names[d] != nullptr && *names[d] != '\0') {
      shape.push_back({-1, names[d]});
    } else {
      shape.push_back(Dimension::unknown());
    }
  }
  return shape;
}

void ShapeInference::set_output_shape(const std::vector<Dimension>& shape, size_t like) const {
  ort::TensorTypeAndShapeInfo* input = nullptr;  // belongs to the context
  check(api_, api_.ShapeInferContext_GetInputTypeShape(context_, like, &input));
  ort::ElementType type = ort::kUndefined;
  check(api_, api_.GetTensorElementType(input, &type));
  std::vector<int64_t> values;
  std::vector<const char*> names;
  for (const Dimension& dimension : shape) {
    values.push_back(dimension.value);
    names.push_back(dimension.name.c_str());
  }
  ort::TensorTypeAndShapeInfo* info = nullptr;
  check(api_, api_.CreateTensorTypeAndShapeInfo(&info));
  ort::Status* status = api_.SetTensorElementType(info, type);
  if (status == nullptr) status = api_.SetDimensions(info, values.data(), values.size());
  if (status == nullptr) status = api_.SetSymbolicDimensions(info, names.data(), names.size());
  if (status == nullptr) status = api_.ShapeInferContext_SetOutputTypeShape(context_, 0, info);
  api_.ReleaseTensorTypeAndShapeInfo(info);
  check(api_, status);
}

}  // namespace tetris
