// Kernels for AVX512-BF16: an element is two channels, rounded to bfloat16, which one instruction multiplies and adds to
// a float32 sum. Twice the products of AVX-512's. Compiled with flags of its own; see kernels.h.
#include "avx512.h"

namespace tetris {
namespace {

struct V : Avx512 {
  static constexpr Precision kPrecision = Precision::kBFloat16;
  static constexpr int kPacked = 2;
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, pairs(a), pairs(b)); }
  // The input is masked, not the multiplication: GCC takes the masks of that for 8 lanes wide when it spills one to memory.
  static Vec mask_input(Vec x, Mask mask, Vec) { return _mm512_maskz_mov_ps(mask, x); }
  static Vec fma_masked(Vec w, Vec x, Vec acc, Mask) { return fma(w, x, acc); }
  static RowVec row_fma(float a, RowVec b, RowVec c) {
    return _mm256_dpbf16_ps(c, (__m256bh)_mm256_set1_ps(a), (__m256bh)b);
  }

  static auto converter(const Quantization*) {
    // The halves of two vectors, interleaved.
    alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kPairs);
    return [order](const Vec(&x)[kPacked]) {
      return (Vec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
    };
  }
  static void pack_rows(float* to, const PackedRows& rows, const RowCopy& copy) {
    pack_vectors<kPacked>(to, rows, copy, converter(nullptr));
  }

 private:
  static __m512bh pairs(Vec a) { return (__m512bh)a; }
};

}  // namespace
}  // namespace tetris

#include "kernel_template.h"

namespace tetris {

const KernelSet& avx512_bf16_kernels() {
  static constexpr KernelSet kSet = make_kernel_set<V>("avx512_bf16");
  return kSet;
}

}  // namespace tetris
