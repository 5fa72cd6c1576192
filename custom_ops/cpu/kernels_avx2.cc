// Kernels for AVX2 and FMA: 16 registers of 8 floats. Compiled with flags of its own; see kernels.h.
#include <immintrin.h>

#include "kernels.h"

namespace tetris {
namespace {

void gather_one_by_one(float* to, const float* from, int64_t count, int64_t stride);

struct V {
  using Vec = __m256;
  using Mask = __m256i;
  static constexpr int kLanes = 8, kConvRows = 4, kConvVectors = 3, kGemmSamples = 3, kGemmVectors = 4;
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set1(float a) { return _mm256_set1_ps(a); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Mask expand(uint32_t bits) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit), lane_bit);
  }
  static Vec load_masked(const float* p, Mask mask) { return _mm256_maskload_ps(p, mask); }
  static Vec mask_input(Vec x, Mask mask) { return _mm256_and_ps(x, _mm256_castsi256_ps(mask)); }
  static Vec fma_masked(Vec w, Vec x, Vec acc, Mask) { return fma(w, x, acc); }
  static void gather(float* to, const float* from, int64_t count, int64_t stride) {
    int64_t i = 0;
    if (stride == 1) {
      for (; i + 8 <= count; i += 8) store(to + i, load(from + i));
    } else if (stride == 2) {
      // 8 results come from 16 floats, the last of which may lie beyond the end.
      for (; i + 9 <= count; i += 8) {
        const __m256 even = _mm256_shuffle_ps(load(from + 2 * i), load(from + 2 * i + 8), _MM_SHUFFLE(2, 0, 2, 0));
        store(to + i, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), _MM_SHUFFLE(3, 1, 2, 0))));
      }
    }
    gather_one_by_one(to + i, from + i * stride, count - i, stride);
  }
};

}  // namespace
}  // namespace tetris

#include "kernel_template.h"

namespace tetris {

const KernelSet& avx2_kernels() {
  static constexpr KernelSet kSet = make_kernel_set("avx2");
  return kSet;
}

}  // namespace tetris
