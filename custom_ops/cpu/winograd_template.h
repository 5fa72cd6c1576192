// Winograd's transforms, once, for any vector type; included by kernel_template.h. See winograd.h for the mathematics.
//
// The vector traits V have, beside what kernel_template.h lists: sub, mul, store_masked(p, a, mask), even(a, b) and
// odd(a, b) (every other lane of the two vectors in a row), zip_low(a, b) and zip_high(a, b) (the two halves of a0, b0, a1,
// b1, ...), next(a, x) (the lanes of `a` from the second on, then the number x), select(mask, x, a) (the number x in the lanes of
// the mask, `a` elsewhere). V is a template parameter here, so that
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

// Where the inputs of a run's tiles lie in a channel, and what of them is inside the map.
template <class V, int N>
struct WinogradRows {
  const float* source[N];  // of column 0 of the run; null for rows outside
  int64_t begin, end;      // columns inside

  template <class Strip>
  TETRIS_INLINE WinogradRows(const Strip& in, const WinogradRun& run, const float* x)
      : begin(-run.column), end(in.width - run.column) {
    TETRIS_UNROLL
    for (int i = 0; i < N; ++i) {
      const int64_t row = run.row + i;
      source[i] = row >= 0 && row < in.height ? x + run.image * in.image_stride + row * in.width + run.column : nullptr;
    }
  }

  // The vectors of the rows' columns from c on. What lies outside the map is zero.
  TETRIS_INLINE void load(int64_t c, typename V::Vec (&d)[N]) const {
    if (begin <= c && c + V::kLanes <= end) {
      TETRIS_UNROLL
      for (int i = 0; i < N; ++i) d[i] = source[i] == nullptr ? V::zero() : V::load(source[i] + c);
    } else {
      const typename V::Mask mask = V::expand(first_bits<V>(end - c) & ~first_bits<V>(begin - c));
      TETRIS_UNROLL
      for (int i = 0; i < N; ++i) d[i] = source[i] == nullptr ? V::zero() : V::load_masked(source[i] + c, mask);
    }
  }

  // Fetches the first `count` columns of `fetched` rows of another channel, `distance` away, which is read next.
  TETRIS_INLINE void fetch(int64_t distance, int fetched, int64_t count) const {
    TETRIS_UNROLL
    for (int i = 0; i < N; ++i) {
      if (i >= fetched || source[i] == nullptr) continue;
      TETRIS_NO_UNROLL
      for (int64_t c = begin > 0 ? begin : 0; c < count; c += 16) TETRIS_PREFETCH_L1(source[i] + distance + c);
    }
  }
};

template <class V, int M>
constexpr int64_t kRunColumns = (M * kTileVectors<V> + 2) * V::kLanes;  // that a run's tiles read, at most

// The transform down the columns of a strip's runs, as they lie in memory: rows[i][M * t] is the first column of tile t, the
// next tile's are M further. The last tile of a run has two more than that, which are in ends[i][run]. Lanes without a tile
// get what is there, or zero.
template <class V, int M>
struct WinogradColumns {
  static constexpr int N = M + 2;
  alignas(64) float rows[N][kRunColumns<V, M>];
  float ends[N][kTileVectors<V> * V::kLanes][2];

  TETRIS_INLINE void transform(const WinogradInput& in, int channel, int64_t vectors) {
    using Vec = typename V::Vec;
    TETRIS_NO_UNROLL
    for (int64_t r = 0; r < in.run_count; ++r) {
      const WinogradRun& run = in.runs[r];
      const WinogradRows<V, N> from(in, run, in.x[channel]);
      from.fetch(in.next[channel] - in.x[channel], M, M * run.tiles);
      float* to = &rows[0][M * run.begin];
      const int64_t columns = r + 1 < in.run_count ? M * run.tiles : M * (vectors * V::kLanes - run.begin);
      TETRIS_NO_UNROLL
      for (int64_t c = 0; c < columns + 2; c += V::kLanes) {
        Vec d[N], t[N];
        from.load(c, d);
        Winograd<V, M>::input(d, t);
        TETRIS_UNROLL
        for (int i = 0; i < N; ++i) V::store(to + i * kRunColumns<V, M> + c, t[i]);
      }
      TETRIS_UNROLL
      for (int i = 0; i < N; ++i) {
        ends[i][r][0] = rows[i][M * (run.begin + run.tiles)];
        ends[i][r][1] = rows[i][M * (run.begin + run.tiles) + 1];
      }
    }
  }

  // And along row i: t[j], element j of the tiles of vector v, among which are the last ones of the runs [begin, end).
  TETRIS_INLINE void transform_row(const WinogradInput& in, int i, int64_t v, int64_t begin, int64_t end,
                                   typename V::Vec (&t)[N]) const {
    typename V::Vec phase[M], d[N];
    const float* from = &rows[i][M * V::kLanes * v];
    deinterleave<V>(from, phase);
    TETRIS_UNROLL
    for (int j = 0; j < M; ++j) d[j] = phase[j];
    d[M] = V::next(phase[0], from[M * V::kLanes]);
    d[M + 1] = V::next(phase[1], from[M * V::kLanes + 1]);
    TETRIS_NO_UNROLL
    for (int64_t r = begin; r < end; ++r) {
      const typename V::Mask last = V::expand(1U << (in.runs[r].begin + in.runs[r].tiles - 1 - v * V::kLanes));
      d[M] = V::select(last, ends[i][r][0], d[M]);
      d[M + 1] = V::select(last, ends[i][r][1], d[M + 1]);
    }
    Winograd<V, M>::input(d, t);
  }
};

// Packed: how many channels share the elements: 1, or 2 as integers.
template <class V, int M, int Packed>
void winograd_input_impl(const WinogradInput& in) {
  using Vec = typename V::Vec;
  constexpr int N = M + 2;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t plane = in.plane, pitch = in.pitch;
  const bool pair = in.x[1] != nullptr;
  const WinogradRun& last = in.runs[in.run_count - 1];
  const int64_t vectors = (last.begin + last.tiles + kLanes - 1) / kLanes;
  WinogradColumns<V, M> columns[Packed];
  TETRIS_NO_UNROLL
  for (int p = 0; p < Packed; ++p) {
    if (p == 0 || pair) columns[p].transform(in, p, vectors);
  }
  int64_t begin = 0, end = 0;  // runs whose last tile is in the vector
  TETRIS_NO_UNROLL
  for (int64_t v = 0; v < vectors; ++v, begin = end) {
    while (end < in.run_count && in.runs[end].begin + in.runs[end].tiles <= (v + 1) * kLanes) ++end;
    const Vec tile_scale = Packed == 2 ? V::load(in.tile_scale + v * kLanes) : V::zero();
    float* to = in.v + v * kLanes;
    TETRIS_UNROLL
    for (int i = 0; i < N; ++i) {
      Vec t[Packed][N];
      columns[0].transform_row(in, i, v, begin, end, t[0]);
      if constexpr (Packed == 2) {
        if (pair) {
          columns[1].transform_row(in, i, v, begin, end, t[1]);
        } else {
          TETRIS_UNROLL
          for (int j = 0; j < N; ++j) t[1][j] = V::zero();
        }
      }
      TETRIS_UNROLL
      for (int j = 0; j < N; ++j, to += plane) {
        if constexpr (Packed == 2) {
          const Vec scale = V::mul(V::set1(in.scale[i * N + j]), tile_scale);
          V::store(to, V::integer_pairs(t[0][j], t[1][j], scale));
        } else {
          V::store(to, t[0][j]);
        }
        // The next channel's, which another thread may have read last.
        TETRIS_PREFETCH_STORE(to + pitch);
      }
    }
  }
}

// The largest of each tile's columns, of the tiles of the vector that begins at `from`.
template <class V, int M, class Largest>
TETRIS_INLINE typename V::Vec winograd_window(const float* from, Largest largest) {
  typename V::Vec d[M];
  deinterleave<V>(from, d);
  typename V::Vec most = largest(V::next(d[0], from[M * V::kLanes]), V::next(d[1], from[M * V::kLanes + 1]));
  TETRIS_UNROLL
  for (int j = 0; j < M; ++j) most = largest(most, d[j]);
  return most;
}

// See WinogradRange. Of numbers as integers, the largest, signed, is the largest positive one, and the largest, unsigned,
// the negative one farthest from zero; NaN and infinity are beyond all others either way.
template <class V, int M>
void winograd_range_impl(const WinogradRange& in) {
  using Vec = typename V::Vec;
  constexpr int N = M + 2;
  constexpr int64_t kLanes = V::kLanes;
  alignas(64) float low[kRunColumns<V, M>], high[kRunColumns<V, M>];
  TETRIS_NO_UNROLL
  for (int64_t r = 0; r < in.run_count; ++r) {
    const WinogradRun& run = in.runs[r];
    const int64_t vectors = (run.tiles + kLanes - 1) / kLanes, columns = M * vectors * kLanes + 2;
    TETRIS_NO_UNROLL
    for (int64_t c = 0; c < columns; c += kLanes) {
      V::store(low + c, V::set1(-0.0F));
      V::store(high + c, V::zero());
    }
    TETRIS_NO_UNROLL
    for (int64_t k = 0; k < in.channel_count; ++k) {
      const int64_t plane = in.height * in.width;
      const WinogradRows<V, N> from(in, run, in.x + in.channels[k] * plane);
      if (k + 1 < in.channel_count) from.fetch((in.channels[k + 1] - in.channels[k]) * plane, N, M * run.tiles);
      TETRIS_NO_UNROLL
      for (int64_t c = 0; c < columns; c += kLanes) {
        Vec d[N], least = V::load(low + c), most = V::load(high + c);
        from.load(c, d);
        TETRIS_UNROLL
        for (int i = 0; i < N; ++i) {
          least = V::max_unsigned(least, d[i]);
          most = V::max_signed(most, d[i]);
        }
        V::store(low + c, least);
        V::store(high + c, most);
      }
    }
    TETRIS_NO_UNROLL
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t c = M * v * kLanes, tile = run.begin + v * kLanes;
      V::store(in.low + tile, winograd_window<V, M>(low + c, V::max_unsigned));
      V::store(in.high + tile, winograd_window<V, M>(high + c, V::max_signed));
    }
  }
}

// See WinogradProduct.
template <class V, int Rows, int Vectors, bool Extra>
void winograd_product_impl(const WinogradProduct& product) {
  typename V::Sum acc[Rows][Vectors] = {};
  typename V::RowSum extra{};
  const float* w = product.weight;
  TETRIS_UNROLL_TWICE
  for (int64_t i = 0; i < product.channels; ++i, w += Rows) {
    const float* x = product.x + product.channel_offset[i];
    TETRIS_PREFETCH_L2(w + kConvPrefetch);
    typename V::Vec in[Vectors];
    TETRIS_UNROLL
    for (int v = 0; v < Vectors; ++v) in[v] = V::load(x + v * V::kLanes);
    TETRIS_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const typename V::Vec weight = V::set1(w[r]);
      TETRIS_UNROLL
      for (int v = 0; v < Vectors; ++v) acc[r][v] = V::multiply_integers(weight, in[v], acc[r][v]);
    }
    if constexpr (Extra) extra = V::multiply_integers(x[Vectors * V::kLanes], V::row_load(w), extra);
  }
  typename V::Vec scale[Vectors];
  TETRIS_UNROLL
  for (int v = 0; v < Vectors; ++v) {
    scale[v] = V::mul(V::set1(product.scale), V::load(product.tile_scale + v * V::kLanes));
  }
  TETRIS_UNROLL
  for (int r = 0; r < Rows; ++r) {
    float* m = product.m + r * product.row_stride;
    TETRIS_UNROLL
    for (int v = 0; v < Vectors; ++v) V::store(m + v * V::kLanes, V::mul(scale[v], V::to_float(acc[r][v])));
  }
  if constexpr (Extra) {
    float sums[V::kConvRows];
    V::row_store(sums, V::to_float(extra));
    constexpr int64_t kLast = Vectors * V::kLanes;
    TETRIS_UNROLL
    for (int r = 0; r < Rows; ++r) {
      product.m[r * product.row_stride + kLast] = sums[r] * (product.scale * product.tile_scale[kLast]);
    }
  }
}

template <class V, int Rows>
void winograd_product_rows(const WinogradProduct& product) {
  switch (product.vectors) {
    case 1:
      return product.extra ? winograd_product_impl<V, Rows, 1, true>(product)
                           : winograd_product_impl<V, Rows, 1, false>(product);
    case 2:
      return product.extra ? winograd_product_impl<V, Rows, 2, true>(product)
                           : winograd_product_impl<V, Rows, 2, false>(product);
    default:
      return product.extra ? winograd_product_impl<V, Rows, 3, true>(product)
                           : winograd_product_impl<V, Rows, 3, false>(product);
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
  const Vec scale = V::set1(out.scale), bias = V::set1(out.bias), low = V::set1(out.low), high = V::set1(out.high);
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
        Vec sum = V::fma(scale, V::load(from + c), bias);
        if (addend != nullptr) sum = V::add(sum, V::load_masked(addend + c, mask));
        V::store_masked(to + c, clip(sum, low, high), mask);
      }
    }
  }
}

template <class V, int Packed>
void winograd_input(const WinogradInput& in) {
  in.tile == 2 ? winograd_input_impl<V, 2, Packed>(in) : winograd_input_impl<V, 4, Packed>(in);
}

template <class V>
void winograd_range(const WinogradRange& in) {
  in.tile == 2 ? winograd_range_impl<V, 2>(in) : winograd_range_impl<V, 4>(in);
}

template <class V>
void winograd_product(const WinogradProduct& product) {
  static_assert(V::kConvRows == 8 && V::kConvVectors == 3, "the sizes below");
  switch (product.rows) {
    case 8:
      return winograd_product_rows<V, 8>(product);
    case 4:
      return winograd_product_rows<V, 4>(product);
    case 2:
      return winograd_product_rows<V, 2>(product);
    default:
      return winograd_product_rows<V, 1>(product);
  }
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
