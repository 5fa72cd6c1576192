// Kernels for AVX512-VNNI: an element is four channels of a byte each, which one instruction multiplies and adds to a
// 32-bit sum. Four times the products of AVX-512's. Compiled with flags of its own; see kernels.h.
#include "avx512.h"

namespace tetris {
namespace {

struct V : Avx512 {
  static constexpr Precision kPrecision = Precision::kInt8;
  static constexpr int kPacked = 4;
  using Sum = IntegerSum;
  using RowSum = IntegerRowSum;
  // w: signed bytes, x: unsigned ones.
  static Sum fma(Vec w, Vec x, Sum acc) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)acc, _mm512_castps_si512(x), _mm512_castps_si512(w));
  }
  // What is outside stands for zero, which is not the byte zero: so the input is masked, not the multiplication.
  static Vec mask_input(Vec x, Mask mask, Vec outside) { return _mm512_mask_mov_ps(outside, mask, x); }
  static Sum fma_masked(Vec w, Vec x, Sum acc, Mask) { return fma(w, x, acc); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec set1_bytes(int a) { return _mm512_castsi512_ps(_mm512_set1_epi8(static_cast<char>(a))); }
  static Sum sum_set1(int a) { return (Sum)_mm512_set1_epi32(a); }
  static Sum sum_start(const int32_t* p, int a) {
    return (Sum)_mm512_mullo_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(-a));
  }
  using Avx512::add;
  static Sum add(Sum a, Sum b) { return (Sum)_mm512_add_epi32((__m512i)a, (__m512i)b); }
  static Vec to_float(Sum sum, Vec scale, Vec c) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sum), scale, c);
  }
  static RowSum row_fma(float x, RowVec w, RowSum acc) {
    const __m256i input = _mm256_castps_si256(_mm256_set1_ps(x));
    return (RowSum)_mm256_dpbusd_epi32((__m256i)acc, input, _mm256_castps_si256(w));
  }
  static RowSum row_sum_start(const int32_t* p, int a) {
    const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (RowSum)_mm256_mullo_epi32(sums, _mm256_set1_epi32(-a));
  }
  static RowSum row_add(RowSum a, RowSum b) { return (RowSum)_mm256_add_epi32((__m256i)a, (__m256i)b); }
  static RowVec row_times(float a, RowVec b) { return _mm256_mul_ps(_mm256_set1_ps(a), b); }
  static RowVec row_to_float(RowSum sum, RowVec scale, RowVec c) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps((__m256i)sum), scale, c);
  }

  // Vectors of four channels to one of bytes: the numbers, what to multiply them by, their zero points.
  static Vec bytes(const Vec (&x)[kPacked], Vec inverse, __m512i zero_point) {
    // Limited before the conversion, for which a number may be too large. In this order a NaN becomes a number.
    const Vec low = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_setzero_si512(), zero_point));
    const Vec high = _mm512_add_ps(low, set1(255.0F));
    auto byte = [&](Vec v) {
      const Vec scaled = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(v, inverse), low), high);
      return _mm512_add_epi32(_mm512_cvtps_epi32(scaled), zero_point);
    };
    const __m512i lower = _mm512_or_si512(byte(x[0]), _mm512_slli_epi32(byte(x[1]), 8));
    const __m512i upper = _mm512_or_si512(byte(x[2]), _mm512_slli_epi32(byte(x[3]), 8));
    return _mm512_castsi512_ps(_mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
  }
  // Every lane is a sample, with its own quantization.
  static auto converter(const Quantization* quantized) {
    float inverses[16];
    int32_t zero_points[16];
    for (int s = 0; s < 16; ++s) {
      inverses[s] = quantized[s].inverse;
      zero_points[s] = quantized[s].zero_point;
    }
    const Vec inverse = load(inverses);
    const __m512i zero_point = _mm512_loadu_si512(zero_points);
    return [=](const Vec(&x)[kPacked]) { return bytes(x, inverse, zero_point); };
  }
  static void pack_rows(float* to, const PackedRows& rows, const RowCopy& copy) {
    const Vec inverse = _mm512_set1_ps(rows.quantized.inverse);
    const __m512i zero_point = _mm512_set1_epi32(rows.quantized.zero_point);
    pack_vectors<kPacked>(to, rows, copy, [=](const Vec(&x)[kPacked]) { return bytes(x, inverse, zero_point); });
  }

  static void find_range(const float* x, int64_t count, float* low, float* high) {
    Vec least = zero(), most = zero();
    Mask nan = 0;
    for (int64_t i = 0; i < count; i += 16) {
      const Vec values = _mm512_maskz_loadu_ps(between(0, count - i), x + i);
      least = _mm512_min_ps(least, values);
      most = _mm512_max_ps(most, values);
      nan |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    }
    *low = nan != 0 ? __builtin_nanf("") : _mm512_reduce_min_ps(least);
    *high = nan != 0 ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
  }
};

}  // namespace
}  // namespace tetris

#include "kernel_template.h"

namespace tetris {

const KernelSet& avx512_vnni_kernels() {
  static constexpr KernelSet kSet = make_kernel_set<V>("avx512_vnni");
  return kSet;
}

}  // namespace tetris
