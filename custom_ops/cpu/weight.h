// A block-sparse weight as the op receives it, already checked.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace tetris {

// W[output_perm[i], input_perm[j]] = W_reordered[i, j]; the kept blocks of W_reordered, sorted by row, then column.
// The pointers are valid only while a kernel is made from it.
struct BlockSparseWeight {
  int64_t outputs, inputs, taps;
  int64_t block_outputs, block_inputs;
  int64_t block_count;
  const float* blocks;         // [block_count][block_outputs][block_inputs][taps], zero-padded at the edges
  const int64_t* block_index;  // [block_count][2]
  const int64_t* input_perm;   // [inputs]
  const int64_t* output_perm;  // [outputs]
  const float* bias;           // [outputs] in output order, or null

  int64_t block_rows() const { return (outputs + block_outputs - 1) / block_outputs; }
  // Output rows of block row r (the last may be cut off), input columns of block column c.
  int64_t rows_of(int64_t r) const { return smaller(block_outputs, outputs - r * block_outputs); }
  int64_t columns_of(int64_t c) const { return smaller(block_inputs, inputs - c * block_inputs); }
  float bias_of(int64_t row) const { return bias == nullptr ? 0.0F : bias[output_perm[row]]; }
  // Element of kept block b at the row and column inside the block.
  const float* at(int64_t b, int64_t row, int64_t column) const {
    return blocks + ((b * block_outputs + row) * block_inputs + column) * taps;
  }
  // First block of each block row, and the end: [block_rows() + 1].
  std::vector<int64_t> row_begins() const {
    std::vector<int64_t> begins(static_cast<size_t>(block_rows()) + 1, 0);
    for (int64_t b = 0; b < block_count; ++b) ++begins[static_cast<size_t>(block_index[2 * b]) + 1];
    for (size_t r = 1; r < begins.size(); ++r) begins[r] += begins[r - 1];
    return begins;
  }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Product of sizes. Throws std::overflow_error when it does not fit: sizes come from files and from users.
inline int64_t checked_product(int64_t a, int64_t b) {
  constexpr int64_t kMax = INT64_MAX / 64;  // leaves room to turn elements into bytes and to round up
  if (a < 0 || b < 0 || (b != 0 && a > kMax / b)) throw std::overflow_error("the product of the sizes is too large");
  return a * b;
}

// Output values are limited to [low, high].
struct Activation {
  float low, high;
};

}  // namespace tetris
