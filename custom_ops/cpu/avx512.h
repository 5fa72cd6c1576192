// The vector traits of AVX-512 (see kernel_template.h), for the files that are compiled for it.
#pragma once

#include "avx512_intrinsics.h"
#include "kernels.h"

namespace tetris {
namespace {

void copy_row_end(float* to, const float* from, const RowCopy& copy, int64_t i);

struct Avx512 {
#if defined(__GNUC__)
  // Sums of integers. Not __m512i, which may alias anything: GCC 12 then keeps a copy of each accumulator in memory.
  using IntegerSum = int __attribute__((vector_size(64)));
  using IntegerRowSum = int __attribute__((vector_size(32)));
#else
  using IntegerSum = __m512i;
  using IntegerRowSum = __m256i;
#endif
  using Vec = __m512;
  using Mask = __mmask16;
  using Sum = Vec;
  static constexpr Precision kPrecision = Precision::kFloat32;
  static constexpr int kLanes = 16, kConvRows = 8, kConvVectors = 3, kTailPixels = 4, kGemmSamples = 12, kGemmVectors = 2;
  static constexpr bool kExtraPixel = true;
  static constexpr bool kMasksMultiplication = true;
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float a) { return _mm512_set1_ps(a); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec max_nan(Vec a, Vec b) {
    return _mm512_mask_mov_ps(max(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  static Vec max_pairs(Vec a, Vec b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return max_nan(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
  }
  static Mask expand(uint32_t bits) { return static_cast<Mask>(bits); }
  static Vec load_masked(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
  // Masking the multiplication is free, masking the load costs an extra operation.
  static Vec mask_input(Vec x, Mask, Vec) { return x; }
  static Vec fma_masked(Vec w, Vec x, Vec acc, Mask mask) { return _mm512_mask3_fmadd_ps(w, x, acc, mask); }
  static void store_masked(float* p, Vec a, Mask mask) { _mm512_mask_storeu_ps(p, mask, a); }
  static Vec even(Vec a, Vec b) { return _mm512_permutex2var_ps(a, every_other(0), b); }
  static Vec odd(Vec a, Vec b) { return _mm512_permutex2var_ps(a, every_other(1), b); }
  static Vec zip_low(Vec a, Vec b) { return _mm512_permutex2var_ps(a, zipped(0), b); }
  static Vec zip_high(Vec a, Vec b) { return _mm512_permutex2var_ps(a, zipped(8), b); }
  static Vec select(Mask mask, float x, Vec a) { return _mm512_mask_mov_ps(a, mask, _mm512_set1_ps(x)); }
  static Vec next(Vec a, float x) {
    const __m512i last = _mm512_castps_si512(_mm512_set1_ps(x));
    return _mm512_castsi512_ps(_mm512_alignr_epi32(last, _mm512_castps_si512(a), 1));
  }
  static void load_transposed(const float* from, int64_t stride, Vec (&columns)[kLanes]) {
    // Quarters of vectors come from rows 4 apart, by loads, of which there are two a cycle; shuffles are dearer. What is left
    // is to transpose 4 x 4 numbers within the quarters.
    for (int j = 0; j < 16; j += 4) {
      Vec rows[4];
      for (int i = 0; i < 4; ++i) {
        const float* p = from + i * stride + j;
        rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
        rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x00f0, _mm_loadu_ps(p + 4 * stride));
        rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x0f00, _mm_loadu_ps(p + 8 * stride));
        rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0xf000, _mm_loadu_ps(p + 12 * stride));
      }
      const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
      const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
      const __m512d low_2 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
      const __m512d high_2 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
      columns[j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, low_2));
      columns[j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, low_2));
      columns[j + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, high_2));
      columns[j + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, high_2));
    }
  }
  static void copy_rows(float* to, const float* from, const RowCopy& copy) {
    if (copy.stride > 2) {
      for (int64_t r = 0; r < copy.rows; ++r) {
        copy_row_end(to + r * copy.width, from + r * copy.from_stride, copy, 0);
      }
      return;
    }
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    // Columns of 16 results: the masks are the same for all rows. A masked load touches no masked-out float.
    for (int64_t j = 0; j < copy.width; j += 16) {
      const int64_t begin = copy.stride * (j - copy.before);  // of the first result's input; negative among the zeros
      const int64_t end = copy.stride * (copy.count - 1) + 1;
      const Mask keep = between(0, copy.width - j);
      const Mask low = between(-begin, end - begin), high = between(-begin - 16, end - begin - 16);
      for (int64_t r = 0; r < copy.rows; ++r) {
        const float* p = from + r * copy.from_stride + begin;
        _mm_prefetch(reinterpret_cast<const char*>(p + copy.next), _MM_HINT_T0);
        Vec x = _mm512_maskz_loadu_ps(low, p);
        if (copy.stride == 2) {
          _mm_prefetch(reinterpret_cast<const char*>(p + copy.next + 16), _MM_HINT_T0);
          x = _mm512_permutex2var_ps(x, even, _mm512_maskz_loadu_ps(high, p + 16));
        }
        _mm512_mask_storeu_ps(to + r * copy.width + j, keep, x);
      }
    }
  }

  using RowVec = __m256;
  using RowSum = RowVec;
  static RowVec row_load(const float* p) { return _mm256_loadu_ps(p); }
  static void row_store(float* p, RowVec a) { _mm256_storeu_ps(p, a); }
  static RowVec row_add(RowVec a, RowVec b) { return _mm256_add_ps(a, b); }
  static RowVec row_fma(float a, RowVec b, RowVec c) { return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c); }

  // pack_rows: `pack` makes elements of a vector of each of their channels. Without a channel: zeros.
  template <int Packed, class Pack>
  static void pack_vectors(float* to, const PackedRows& rows, const RowCopy& copy, Pack pack) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const float* next[Packed];
    for (int k = 0; k < Packed; ++k) next[k] = rows.next[k] != nullptr ? rows.next[k] : rows.from[k];
    // Columns of 16 elements: the masks are the same for all rows. A masked load touches no masked-out float.
    for (int64_t j = 0; j < copy.width; j += 16) {
      const int64_t first_input = j - copy.before;  // negative among the zeros
      const int64_t begin = copy.stride * first_input, end = copy.stride * (copy.count - 1) + 1;
      const Mask keep = between(0, copy.width - j);
      const Mask low = between(-begin, end - begin), high = between(-begin - 16, end - begin - 16);
      for (int64_t r = 0; r < copy.rows; ++r) {
        Vec x[Packed];
        for (int k = 0; k < Packed; ++k) {
          x[k] = zero();
          if (rows.from[k] == nullptr) continue;
          const float* row = rows.from[k] + r * copy.from_stride;
          _mm_prefetch(reinterpret_cast<const char*>(next[k] + r * copy.from_stride + begin), _MM_HINT_T0);
          if (copy.stride <= 2) {
            x[k] = _mm512_maskz_loadu_ps(low, row + begin);
            if (copy.stride == 2) {
              x[k] = _mm512_permutex2var_ps(x[k], even, _mm512_maskz_loadu_ps(high, row + begin + 16));
            }
          } else {
            float lanes[16] = {};
            const int64_t last = copy.count - first_input;
            for (int64_t i = first_input < 0 ? -first_input : 0; i < 16 && i < last; ++i) {
              lanes[i] = row[begin + i * copy.stride];
            }
            x[k] = _mm512_loadu_ps(lanes);
          }
        }
        _mm512_mask_storeu_ps(to + r * copy.width + j, keep, pack(x));
      }
    }
  }

  static __m512i every_other(int first) {
    return _mm512_add_epi32(_mm512_set1_epi32(first),
                            _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
  }
  static __m512i zipped(int first) {
    return _mm512_add_epi32(_mm512_set1_epi32(first),
                            _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  }
  // Lanes [begin, end).
  static Mask between(int64_t begin, int64_t end) { return static_cast<Mask>(first(end) & ~first(begin)); }
  static uint32_t first(int64_t count) {
    if (count <= 0) return 0;
    return count >= 16 ? 0xffffU : (1U << count) - 1;
  }
};

}  // namespace
}  // namespace tetris
