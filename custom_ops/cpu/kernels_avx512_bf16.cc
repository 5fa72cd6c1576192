// Kernels for AVX512-BF16: an element is two channels, rounded to bfloat16, which one instruction multiplies and adds to
// a float32 sum. Twice the products of AVX-512's. Compiled with flags of its own; see kernels.h.
#include "avx512.h"

namespace tetris {
namespace {

// Winograd's products are of pairs of 16-bit integers, by AVX512-VNNI, which the processors with AVX512-BF16 have.
struct Int16 : Avx512 {
  using Sum = IntegerSum;
  using RowSum = IntegerRowSum;
  static Sum multiply_integers(Vec w, Vec x, Sum acc) {
    return (Sum)_mm512_dpwssd_epi32((__m512i)acc, _mm512_castps_si512(x), _mm512_castps_si512(w));
  }
  static RowSum multiply_integers(float x, RowVec w, RowSum acc) {
    return (RowSum)_mm256_dpwssd_epi32((__m256i)acc, _mm256_castps_si256(_mm256_set1_ps(x)), _mm256_castps_si256(w));
  }
  static Vec to_float(Sum sum) { return _mm512_cvtepi32_ps((__m512i)sum); }
  static RowVec to_float(RowSum sum) { return _mm256_cvtepi32_ps((__m256i)sum); }
  // 1.5 * 2^23 plus a number of up to 22 bits has that, rounded, in the lowest bits.
  static Vec integer_pairs(Vec a, Vec b, Vec scale) {
    const Vec magic = set1(12582912.0F);
    const __m512i low = _mm512_castps_si512(fma(a, scale, magic)), high = _mm512_castps_si512(fma(b, scale, magic));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi16(_mm512_slli_epi32(high, 16), 0x55555555U, low));
  }
  static Vec max_signed(Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static Vec max_unsigned(Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

struct V : Avx512 {
  using Integers = Int16;
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
