// Shape inference through onnxruntime's interface: sizes that are not known keep their names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace tetris {

// One dimension: a size, or the name of one ("N").
struct Dimension {
  int64_t value;
  std::string name;

  static Dimension of(int64_t value) { return {value, ""}; }
  // A size that nothing is known about: a name that no other dimension has, as equal names promise equal sizes.
  static Dimension unknown();
  bool known() const { return value >= 0; }
};

class ShapeInference {
 public:
  ShapeInference(const ort::Api& api, ort::ShapeInferContext* context) : api_(api), context_(context) {}

  std::vector<int64_t> ints(const char* name) const;           // empty if missing
  std::vector<Dimension> input_shape(size_t input) const;      // empty if unknown
  // The output has the element type of the input `like`.
  void set_output_shape(const std::vector<Dimension>& shape, size_t like) const;

 private:
  const ort::Api& api_;
  ort::ShapeInferContext* context_;
};

}  // namespace tetris
