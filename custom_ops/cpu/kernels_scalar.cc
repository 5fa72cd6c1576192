// Kernels without vector instructions: any processor, and the yardstick of the others in the tests.
#include "kernels.h"

namespace tetris {
namespace {

void copy_row_end(float* to, const float* from, const RowCopy& copy, int64_t i);

struct V {
  using Vec = float;
  using Mask = bool;
  using Sum = Vec;
  static constexpr Precision kPrecision = Precision::kFloat32;
  static constexpr int kLanes = 1, kConvRows = 4, kConvVectors = 3, kTailPixels = 0, kGemmSamples = 3, kGemmVectors = 4;
  static constexpr bool kExtraPixel = false;
  static constexpr bool kMasksMultiplication = false;
  static Vec zero() { return 0.0F; }
  static Vec set1(float a) { return a; }
  static Vec load(const float* p) { return *p; }
  static void store(float* p, Vec a) { *p = a; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static Vec max_nan(Vec a, Vec b) { return a > b || a != a ? a : b; }
  static Vec max_pairs(Vec a, Vec b) { return max_nan(a, b); }
  static Mask expand(uint32_t bits) { return (bits & 1U) != 0; }
  static Vec load_masked(const float* p, Mask mask) { return mask ? *p : 0.0F; }
  static Vec mask_input(Vec x, Mask mask, Vec) { return mask ? x : 0.0F; }
  static Vec fma_masked(Vec w, Vec x, Vec acc, Mask) { return fma(w, x, acc); }
  static void store_masked(float* p, Vec a, Mask mask) {
    if (mask) *p = a;
  }
  static Vec even(Vec a, Vec) { return a; }
  static Vec odd(Vec, Vec b) { return b; }
  static Vec zip_low(Vec a, Vec) { return a; }
  static Vec zip_high(Vec, Vec b) { return b; }
  static Vec select(Mask mask, float x, Vec a) { return mask ? x : a; }
  static Vec next(Vec, float x) { return x; }
  static void load_transposed(const float* from, int64_t, Vec (&columns)[kLanes]) { columns[0] = *from; }
  static void copy_rows(float* to, const float* from, const RowCopy& copy) {
    for (int64_t r = 0; r < copy.rows; ++r) {
      copy_row_end(to + r * copy.width, from + r * copy.from_stride, copy, 0);
    }
  }
};

}  // namespace
}  // namespace tetris

#include "kernel_template.h"

namespace tetris {

const KernelSet& scalar_kernels() {
  static constexpr KernelSet kSet = make_kernel_set<V>("scalar");
  return kSet;
}

}  // namespace tetris
