// Kernels for AVX2 and FMA: 16 registers of 8 floats. Compiled with flags of its own; see kernels.h.
#include <immintrin.h>

#include "kernels.h"

namespace tetris {
namespace {

void copy_row_end(float* to, const float* from, const RowCopy& copy, int64_t i);

struct V {
  using Vec = __m256;
  using Mask = __m256i;
  using Sum = Vec;
  static constexpr Precision kPrecision = Precision::kFloat32;
  static constexpr int kLanes = 8, kConvRows = 4, kConvVectors = 3, kTailPixels = 2, kGemmSamples = 6, kGemmVectors = 2;
  static constexpr bool kExtraPixel = false;
  static constexpr bool kMasksMultiplication = false;
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set1(float a) { return _mm256_set1_ps(a); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Vec max_nan(Vec a, Vec b) { return _mm256_blendv_ps(max(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
  static Vec max_pairs(Vec a, Vec b) {
    const __m256 larger =
        max_nan(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)), _mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(larger), _MM_SHUFFLE(3, 1, 2, 0)));
  }
  static Mask expand(uint32_t bits) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit), lane_bit);
  }
  static Vec load_masked(const float* p, Mask mask) { return _mm256_maskload_ps(p, mask); }
  static Vec mask_input(Vec x, Mask mask, Vec) { return _mm256_and_ps(x, _mm256_castsi256_ps(mask)); }
  static Vec fma_masked(Vec w, Vec x, Vec acc, Mask) { return fma(w, x, acc); }
  static void store_masked(float* p, Vec a, Mask mask) { _mm256_maskstore_ps(p, mask, a); }
  static Vec even(Vec a, Vec b) { return unshuffle(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0))); }
  static Vec odd(Vec a, Vec b) { return unshuffle(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1))); }
  static Vec zip_low(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  static Vec zip_high(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }
  static Vec select(Mask mask, float x, Vec a) {
    return _mm256_blendv_ps(a, _mm256_set1_ps(x), _mm256_castsi256_ps(mask));
  }
  static Vec next(Vec a, float x) {
    const Vec rotated = _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0));
    return _mm256_blend_ps(rotated, set1(x), 0x80);
  }
  static void load_transposed(const float* from, int64_t stride, Vec (&columns)[kLanes]) {
    // Halves of vectors come from rows 4 apart, by loads; 4 x 4 numbers are transposed within them.
    for (int j = 0; j < 8; j += 4) {
      Vec rows[4];
      for (int i = 0; i < 4; ++i) {
        const float* p = from + i * stride + j;
        rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
      }
      const __m256d low = _mm256_castps_pd(_mm256_unpacklo_ps(rows[0], rows[1]));
      const __m256d high = _mm256_castps_pd(_mm256_unpackhi_ps(rows[0], rows[1]));
      const __m256d low_2 = _mm256_castps_pd(_mm256_unpacklo_ps(rows[2], rows[3]));
      const __m256d high_2 = _mm256_castps_pd(_mm256_unpackhi_ps(rows[2], rows[3]));
      columns[j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, low_2));
      columns[j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, low_2));
      columns[j + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high, high_2));
      columns[j + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high, high_2));
    }
  }
  static void copy_rows(float* to, const float* from, const RowCopy& copy) {
    for (int64_t r = 0; r < copy.rows; ++r, to += copy.width, from += copy.from_stride) {
      float* out = to + copy.before;
      int64_t i = 0;
      if (copy.stride == 1) {
        for (; i + 8 <= copy.count; i += 8) store(out + i, load(from + i));
      } else if (copy.stride == 2) {
        // 8 results come from 16 floats, the last of which may lie beyond the end.
        for (; i + 9 <= copy.count; i += 8) {
          store(out + i, even(load(from + 2 * i), load(from + 2 * i + 8)));
        }
      }
      copy_row_end(to, from, copy, i);
    }
  }

  // What a shuffle does within the halves of two vectors, put in order.
  static Vec unshuffle(Vec a) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), _MM_SHUFFLE(3, 1, 2, 0)));
  }

  using RowVec = __m128;
  using RowSum = RowVec;
  static RowVec row_load(const float* p) { return _mm_loadu_ps(p); }
  static void row_store(float* p, RowVec a) { _mm_storeu_ps(p, a); }
  static RowVec row_add(RowVec a, RowVec b) { return _mm_add_ps(a, b); }
  static RowVec row_fma(float a, RowVec b, RowVec c) { return _mm_fmadd_ps(_mm_set1_ps(a), b, c); }
};

}  // namespace
}  // namespace tetris

#include "kernel_template.h"

namespace tetris {

const KernelSet& avx2_kernels() {
  static constexpr KernelSet kSet = make_kernel_set<V>("avx2");
  return kSet;
}

}  // namespace tetris
