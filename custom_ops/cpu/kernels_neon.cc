// Kernels for 64-bit ARM (NEON): 32 registers of 4 floats.
#include <arm_neon.h>

#include "kernels.h"

namespace tetris {
namespace {

void copy_row_end(float* to, const float* from, const RowCopy& copy, int64_t i);

struct V {
  using Vec = float32x4_t;
  using Mask = uint32x4_t;
  using Sum = Vec;
  static constexpr Precision kPrecision = Precision::kFloat32;
  static constexpr int kLanes = 4, kConvRows = 8, kConvVectors = 3, kTailPixels = 0, kGemmSamples = 6, kGemmVectors = 4;
  static constexpr bool kExtraPixel = false;
  static constexpr bool kMasksMultiplication = false;
  static Vec zero() { return vdupq_n_f32(0.0F); }
  static Vec set1(float a) { return vdupq_n_f32(a); }
  static Vec load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vec a) { vst1q_f32(p, a); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  // vmaxq and vminq return NaN when either argument is NaN, which is what clipping needs.
  static Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }
  static Vec min(Vec a, Vec b) { return vminq_f32(a, b); }
  static Vec max_nan(Vec a, Vec b) { return max(a, b); }
  static Vec max_pairs(Vec a, Vec b) { return vpmaxq_f32(a, b); }
  static Mask expand(uint32_t bits) {
    const uint32_t lane_bits[4] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits), vld1q_u32(lane_bits));
  }
  static Vec load_masked(const float* p, Mask mask) {
    uint32_t on[4];
    vst1q_u32(on, mask);
    float lanes[4];
    for (int i = 0; i < 4; ++i) lanes[i] = on[i] != 0 ? p[i] : 0.0F;
    return vld1q_f32(lanes);
  }
  static Vec mask_input(Vec x, Mask mask, Vec) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), mask)); }
  static Vec fma_masked(Vec w, Vec x, Vec acc, Mask) { return fma(w, x, acc); }
  static void store_masked(float* p, Vec a, Mask mask) {
    uint32_t on[4];
    vst1q_u32(on, mask);
    float lanes[4];
    vst1q_f32(lanes, a);
    for (int i = 0; i < 4; ++i) {
      if (on[i] != 0) p[i] = lanes[i];
    }
  }
  static Vec even(Vec a, Vec b) { return vuzp1q_f32(a, b); }
  static Vec odd(Vec a, Vec b) { return vuzp2q_f32(a, b); }
  static Vec zip_low(Vec a, Vec b) { return vzip1q_f32(a, b); }
  static Vec zip_high(Vec a, Vec b) { return vzip2q_f32(a, b); }
  static Vec select(Mask mask, float x, Vec a) { return vbslq_f32(mask, vdupq_n_f32(x), a); }
  static Vec next(Vec a, float x) { return vextq_f32(a, vdupq_n_f32(x), 1); }
  static void load_transposed(const float* from, int64_t stride, Vec (&columns)[kLanes]) {
    const float32x4x2_t upper = vtrnq_f32(load(from), load(from + stride));
    const float32x4x2_t lower = vtrnq_f32(load(from + 2 * stride), load(from + 3 * stride));
    columns[0] = vcombine_f32(vget_low_f32(upper.val[0]), vget_low_f32(lower.val[0]));
    columns[1] = vcombine_f32(vget_low_f32(upper.val[1]), vget_low_f32(lower.val[1]));
    columns[2] = vcombine_f32(vget_high_f32(upper.val[0]), vget_high_f32(lower.val[0]));
    columns[3] = vcombine_f32(vget_high_f32(upper.val[1]), vget_high_f32(lower.val[1]));
  }
  static void copy_rows(float* to, const float* from, const RowCopy& copy) {
    for (int64_t r = 0; r < copy.rows; ++r, to += copy.width, from += copy.from_stride) {
      float* out = to + copy.before;
      int64_t i = 0;
      if (copy.stride == 1) {
        for (; i + 4 <= copy.count; i += 4) store(out + i, load(from + i));
      } else if (copy.stride == 2) {
        // 4 results come from 8 floats, the last of which may lie beyond the end.
        for (; i + 5 <= copy.count; i += 4) store(out + i, vld2q_f32(from + 2 * i).val[0]);
      }
      copy_row_end(to, from, copy, i);
    }
  }
};

}  // namespace
}  // namespace tetris

#include "kernel_template.h"

namespace tetris {

const KernelSet& neon_kernels() {
  static constexpr KernelSet kSet = make_kernel_set<V>("neon");
  return kSet;
}

}  // namespace tetris
