// The compiled kernels that the library holds (prebuilt/, from build.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device.h"

namespace tetris::cuda {

struct Image {
  const char* variant;
  const char* function;
  int architecture;  // 80 for sm_80 and so on, 0 for PTX
  int warps, shared;
  size_t offset, size;
};

const std::vector<Image>& images();
const unsigned char* image_data();
// Parameters of a kernel function, with the two that Triton adds.
int parameter_count(const std::string& function);

}  // namespace tetris::cuda
