// Kernels for AVX-512: 32 registers of 16 floats. Compiled with flags of its own; see kernels.h.
#include "avx512.h"

namespace tetris {
namespace {

using V = Avx512;

}  // namespace
}  // namespace tetris

#include "kernel_template.h"

namespace tetris {

const KernelSet& avx512_kernels() {
  static constexpr KernelSet kSet = make_kernel_set<V>("avx512");
  return kSet;
}

}  // namespace tetris
