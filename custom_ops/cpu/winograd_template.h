// Winograd's transforms, once, for any vector type; included by kernel_template.h. See winograd.h for the mathematics.
//
// The vector traits V have, beside what kernel_template.h lists: sub, mul, store_masked(p, a, mask), even(a, b) and
// odd(a, b) (every other lane of the two vectors in a row), zip_low(a, b) and zip_high(a, b) (the two halves of a0, b0, a1,
// b1, ...), next(a, x) (the lanes of `a` from the second on, then the number x). V is a template parameter here, so that
// nothing is compiled for vector traits of other precisions.
#pragma once

#include "kernels.h"

namespace tetris {
namespace {

// The one-dimensional transforms of F(M, 3).
template <class V, int M>
struct Winograd;

template <class V>
struct Winograd<V, 2> {  // points 0, 1, -1, infinity
  using Vec = typename V::Vec;
  static TETRIS_INLINE void input(const Vec (&d)[4], Vec (&t)[4]) {
    t[0] = V::sub(d[0], d[2]);
    t[1] = V::add(d[1], d[2]);
    t[2] = V::sub(d[2], d[1]);
    t[3] = V::sub(d[3], d[1]);
  }
  static TETRIS_INLINE void output(const Vec (&m)[4], Vec (&y)[2]) {
    y[0] = V::add(m[0], V::add(m[1], m[2]));
    y[1] = V::add(m[3], V::sub(m[1], m[2]));
  }
};

template <class V>
struct Winograd<V, 4> {  // points 0, a, -a, b, -b, infinity with a = 1/sqrt(2), b = sqrt(2)
  using Vec = typename V::Vec;
  static constexpr float kA = 0.70710678F, kB = 1.41421356F;
  static TETRIS_INLINE void input(const Vec (&d)[6], Vec (&t)[6]) {
    const Vec a = V::set1(kA), b = V::set1(kB), two = V::set1(-2.0F), half = V::set1(-0.5F), both = V::set1(-2.5F);
    const Vec even_a = V::fma(two, d[2], d[4]), odd_a = V::fma(two, d[1], d[3]);
    const Vec even_b = V::fma(half, d[2], d[4]), odd_b = V::fma(half, d[1], d[3]);
    t[0] = V::fma(both, d[2], V::add(d[0], d[4]));
    t[1] = V::fma(a, odd_a, even_a);
    t[2] = V::fma(V::set1(-kA), odd_a, even_a);
    t[3] = V::fma(b, odd_b, even_b);
    t[4] = V::fma(V::set1(-kB), odd_b, even_b);
    t[5] = V::fma(both, d[3], V::add(d[1], d[5]));
  }
  static TETRIS_INLINE void output(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec sum_a = V::add(m[1], m[2]), sum_b = V::add(m[3], m[4]);
    const Vec odd_a = V::mul(V::set1(kA), V::sub(m[1], m[2])), odd_b = V::mul(V::set1(kB), V::sub(m[3], m[4]));
    const Vec half = V::set1(0.5F), two = V::set1(2.0F);
    y[0] = V::add(m[0], V::add(sum_a, sum_b));
    y[1] = V::add(odd_a, odd_b);
    y[2] = V::fma(half, sum_a, V::mul(two, sum_b));
    y[3] = V::fma(half, odd_a, V::fma(two, odd_b, m[5]));
  }
};

template <class V>
TETRIS_INLINE uint32_t first_bits(int64_t count) {
  return count <= 0 ? 0 : count >= V::kLanes ? ~0U : (1U << count) - 1;
}

template <class V>
TETRIS_INLINE typename V::Mask first_lanes(int64_t count) {
  return V::expand(first_bits<V>(count));
}

// d[j] = p[j], p[j + M], p[j + 2 M], ...
template <class V>
TETRIS_INLINE void deinterleave(const float* p, typename V::Vec (&d)[2]) {
  const typename V::Vec a = V::load(p), b = V::load(p + V::kLanes);
  d[0] = V::even(a, b);
  d[1] = V::odd(a, b);
}

template <class V>
TETRIS_INLINE void deinterleave(const float* p, typename V::Vec (&d)[4]) {
  typename V::Vec low[2], high[2];
  deinterleave<V>(p, low);
  deinterleave<V>(p + 2 * V::kLanes, high);
  d[0] = V::even(low[0], high[0]);
  d[1] = V::even(low[1], high[1]);
  d[2] = V::odd(low[0], high[0]);
  d[3] = V::odd(low[1], high[1]);
}

// The inverse.
template <class V>
TETRIS_INLINE void interleave(float* p, const typename V::Vec (&y)[1]) { V::store(p, y[0]); }

template <class V>
TETRIS_INLINE void interleave(float* p, typename V::Vec a, typename V::Vec b) {
  V::store(p, V::zip_low(a, b));
  V::store(p + V::kLanes, V::zip_high(a, b));
}

template <class V>
TETRIS_INLINE void interleave(float* p, const typename V::Vec (&y)[2]) { interleave<V>(p, y[0], y[1]); }

template <class V>
TETRIS_INLINE void interleave(float* p, const typename V::Vec (&y)[4]) {
  interleave<V>(p, V::zip_low(y[0], y[2]), V::zip_low(y[1], y[3]));
  interleave<V>(p + 2 * V::kLanes, V::zip_high(y[0], y[2]), V::zip_high(y[1], y[3]));
}

template <class V>
constexpr int64_t kTileVectors = V::kConvVectors + (V::kTailPixels > 0);  // of a strip, at most

template <class V, int M>
void winograd_input_impl(const WinogradInput& in) {
  using Vec = typename V::Vec;
  constexpr int N = M + 2;
  constexpr int64_t kLanes = V::kLanes, kColumns = (M * kTileVectors<V> + 2) * kLanes;
  alignas(64) float rows[N][kColumns];
  TETRIS_NO_UNROLL
  for (int64_t r = 0; r < in.run_count; ++r) {
    const WinogradRun& run = in.runs[r];
    // Down the columns, as they lie in memory: rows[i][c] of the run's column c. What lies outside the map is zero, also
    // for the lanes without a tile. Stored just as it will be loaded below, so that no load waits for the stores before.
    const int64_t vectors = (run.tiles + kLanes - 1) / kLanes;
    const int64_t begin = -run.column, end = in.width - run.column;
    const float* source[N];
    TETRIS_UNROLL
    for (int i = 0; i < N; ++i) {
      const int64_t row = run.row + i;
      const bool inside = row >= 0 && row < in.height;
      const int64_t offset = run.image * in.image_stride + row * in.width + run.column;
      source[i] = inside ? in.x + offset : nullptr;
      if (!inside || i >= M) continue;
      TETRIS_NO_UNROLL
      for (int64_t c = begin > 0 ? begin : 0; c < M * run.tiles; c += 16) TETRIS_PREFETCH_L1(in.next + offset + c);
    }
    TETRIS_NO_UNROLL
    for (int64_t c = 0; c < M * vectors * kLanes + 2; c += kLanes) {
      Vec d[N], t[N];
      if (begin <= c && c + kLanes <= end) {
        TETRIS_UNROLL
        for (int i = 0; i < N; ++i) d[i] = source[i] == nullptr ? V::zero() : V::load(source[i] + c);
      } else {
        const typename V::Mask mask = V::expand(first_bits<V>(end - c) & ~first_bits<V>(begin - c));
        TETRIS_UNROLL
        for (int i = 0; i < N; ++i) d[i] = source[i] == nullptr ? V::zero() : V::load_masked(source[i] + c, mask);
      }
      Winograd<V, M>::input(d, t);
      TETRIS_UNROLL
      for (int i = 0; i < N; ++i) V::store(&rows[i][c], t[i]);
    }
    // Along the rows.
    TETRIS_NO_UNROLL
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t tile = run.begin + v * kLanes;
      const typename V::Mask mask = first_lanes<V>(in.pitch - tile);
      float* out = in.v + tile;
      TETRIS_UNROLL
      for (int i = 0; i < N; ++i) {
        const float* from = &rows[i][M * v * kLanes];
        Vec phase[M], d[N], t[N];
        deinterleave<V>(from, phase);
        TETRIS_UNROLL
        for (int j = 0; j < M; ++j) d[j] = phase[j];
        d[M] = V::next(phase[0], from[M * kLanes]);
        d[M + 1] = V::next(phase[1], from[M * kLanes + 1]);
        Winograd<V, M>::input(d, t);
        TETRIS_UNROLL
        for (int j = 0; j < N; ++j) {
          float* to = out + (i * N + j) * in.plane;
          V::store_masked(to, t[j], mask);
          // The next channel's, which another thread may have read last.
          TETRIS_PREFETCH_STORE(to + in.pitch);
        }
      }
    }
  }
}

template <class V, int M, bool Pooled>
void winograd_output_impl(const WinogradOutput& out) {
  using Vec = typename V::Vec;
  constexpr int N = M + 2, kStored = Pooled ? M / 2 : M;  // rows and columns of a tile in y
  constexpr int64_t kLanes = V::kLanes;
  float rows[kStored][kStored * kTileVectors<V> * kLanes + kLanes];  // and what a vector reads beyond a run's end
  // What is stored at the end.
  TETRIS_NO_UNROLL
  for (int64_t r = 0; r < out.run_count; ++r) {
    const WinogradRun& run = out.runs[r];
    const int64_t bottom = out.height - run.out_row < kStored ? out.height - run.out_row : kStored;
    float* to = out.y + run.image * out.image_stride + run.out_row * out.width + run.out_column;
    TETRIS_NO_UNROLL
    for (int64_t i = 0; i < bottom; ++i, to += out.width) {
      TETRIS_NO_UNROLL
      for (int64_t c = 0; c < kStored * run.tiles; c += 16) TETRIS_PREFETCH_STORE(to + c);
    }
  }
  TETRIS_NO_UNROLL
  for (int64_t tile = 0; tile < out.tiles; tile += kLanes) {
    const float* from = out.m + tile;
    Vec half[M][N];
    TETRIS_UNROLL
    for (int j = 0; j < N; ++j) {
      Vec m[N], y[M];
      TETRIS_UNROLL
      for (int i = 0; i < N; ++i) m[i] = V::load(from + (i * N + j) * out.pitch);
      Winograd<V, M>::output(m, y);
      TETRIS_UNROLL
      for (int i = 0; i < M; ++i) half[i][j] = y[i];
    }
    TETRIS_UNROLL
    for (int i = 0; i < kStored; ++i) {
      Vec y[M];
      if constexpr (Pooled) {
        Vec below[M], largest[kStored];
        Winograd<V, M>::output(half[2 * i], y);
        Winograd<V, M>::output(half[2 * i + 1], below);
        TETRIS_UNROLL
        for (int j = 0; j < kStored; ++j) {
          largest[j] = V::max_nan(V::max_nan(y[2 * j], y[2 * j + 1]), V::max_nan(below[2 * j], below[2 * j + 1]));
        }
        interleave<V>(&rows[i][kStored * tile], largest);
      } else {
        Winograd<V, M>::output(half[i], y);
        interleave<V>(&rows[i][kStored * tile], y);
      }
    }
  }
  const Vec bias = V::set1(out.bias), low = V::set1(out.low), high = V::set1(out.high);
  TETRIS_NO_UNROLL
  for (int64_t r = 0; r < out.run_count; ++r) {
    const WinogradRun& run = out.runs[r];
    const int64_t room = out.width - run.out_column, bottom = out.height - run.out_row;
    const int64_t width = kStored * run.tiles < room ? kStored * run.tiles : room;
    const int64_t height = kStored < bottom ? kStored : bottom;
    TETRIS_NO_UNROLL
    for (int64_t i = 0; i < height; ++i) {
      const float* from = &rows[i][kStored * run.begin];
      const int64_t offset = run.image * out.image_stride + (run.out_row + i) * out.width + run.out_column;
      float* to = out.y + offset;
      const float* addend = out.addend == nullptr ? nullptr : out.addend + offset;
      TETRIS_NO_UNROLL
      for (int64_t c = 0; c < width; c += kLanes) {
        const typename V::Mask mask = first_lanes<V>(width - c);
        Vec sum = V::add(V::load(from + c), bias);
        if (addend != nullptr) sum = V::add(sum, V::load_masked(addend + c, mask));
        V::store_masked(to + c, clip(sum, low, high), mask);
      }
    }
  }
}

template <class V>
void winograd_input(const WinogradInput& in) {
  in.tile == 2 ? winograd_input_impl<V, 2>(in) : winograd_input_impl<V, 4>(in);
}

template <class V>
void winograd_output(const WinogradOutput& out) {
  if (out.pooled) {
    out.tile == 2 ? winograd_output_impl<V, 2, true>(out) : winograd_output_impl<V, 4, true>(out);
  } else {
    out.tile == 2 ? winograd_output_impl<V, 2, false>(out) : winograd_output_impl<V, 4, false>(out);
  }
}

}  // namespace
}  // namespace tetris
