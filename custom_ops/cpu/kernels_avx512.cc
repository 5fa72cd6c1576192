// Kernels for AVX-512: 32 registers of 16 floats. Compiled with flags of its own; see kernels.h.
#if defined(__GNUC__) && !defined(__clang__)
// The intrinsics' own "undefined" values look uninitialized to GCC 12 (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "kernels.h"

namespace tetris {
namespace {

void gather_one_by_one(float* to, const float* from, int64_t count, int64_t stride);

struct V {
  using Vec = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16, kConvRows = 8, kConvVectors = 3, kGemmSamples = 12, kGemmVectors = 2;
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float a) { return _mm512_set1_ps(a); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Mask expand(uint32_t bits) { return static_cast<Mask>(bits); }
  static Vec load_masked(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
  // Masking the multiplication is free, masking the load costs an extra operation.
  static Vec mask_input(Vec x, Mask) { return x; }
  static Vec fma_masked(Vec w, Vec x, Vec acc, Mask mask) { return _mm512_mask3_fmadd_ps(w, x, acc, mask); }
  static void gather(float* to, const float* from, int64_t count, int64_t stride) {
    if (stride > 2) return gather_one_by_one(to, from, count, stride);
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t left = count - i;
      const Mask keep = first(left);
      if (stride == 1) {
        _mm512_mask_storeu_ps(to + i, keep, _mm512_maskz_loadu_ps(keep, from + i));
      } else {
        const float* p = from + 2 * i;
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const Vec a = _mm512_maskz_loadu_ps(first(2 * left - 1), p);
        const Vec b = _mm512_maskz_loadu_ps(first(2 * left - 17), p + 16);
        _mm512_mask_storeu_ps(to + i, keep, _mm512_permutex2var_ps(a, even, b));
      }
    }
  }

 private:
  static Mask first(int64_t count) {
    if (count <= 0) return 0;
    return count >= 16 ? static_cast<Mask>(0xffff) : static_cast<Mask>((1U << count) - 1);
  }
};

}  // namespace
}  // namespace tetris

#include "kernel_template.h"

namespace tetris {

const KernelSet& avx512_kernels() {
  static constexpr KernelSet kSet = make_kernel_set("avx512");
  return kSet;
}

}  // namespace tetris
