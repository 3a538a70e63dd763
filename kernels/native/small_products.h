// Products of small row-major matrices that are used once: nothing is packed, any number of rows and columns.
// An element's sum runs in the same order in whatever tile it lies, so results do not depend on how work is split.
#pragma once

#include <initializer_list>

#include "vec_math.h"

namespace mtl {

// Element (i, j) is data[i·row + j·column].
struct Matrix {
  const float* data;
  int64_t row;
  int64_t column = 1;
};

// left [rows, depth] @ right [depth, columns]; right.column is 1.
struct Term {
  Matrix left;
  Matrix right;
  int64_t depth;
};

using Terms = std::initializer_list<Term>;

// Rows of `a` that `dot_products` takes at a time: with four columns their accumulators fit the registers.
constexpr int kDotRows = kRegisters == 32 ? 4 : 2;

namespace detail {

// Accumulators, the vectors of one row of `right` and a broadcast fit the registers.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kRegisters == 32 ? 4 : 2;

// out [ROWS, VECS·kLanes] = start + Σ terms; if PART, only the first `lanes` of the one vector.
template <int ROWS, int VECS, bool PART>
inline __attribute__((always_inline)) void sum_tile(Terms terms, int64_t row, int64_t column, const Matrix& start,
                                                    float* out, int64_t out_row, int lanes) {
  const auto read = [lanes](const float* p) { return PART ? load_part(p, lanes) : load(p); };
  Vec sums[ROWS][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v)
      sums[r][v] = start.data ? read(start.data + (row + r) * start.row + column + v * kLanes) : Vec{};
  for (const Term& term : terms) {
    if (term.depth == 0) continue;  // its matrices may be null
    const float* left = term.left.data + row * term.left.row;
    const float* right = term.right.data + column;
    for (int64_t k = 0; k < term.depth; ++k, left += term.left.column, right += term.right.row) {
      Vec columns[VECS];
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) columns[v] = read(right + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const Vec x = broadcast(left[r * term.left.row]);
#pragma GCC unroll 8
        for (int v = 0; v < VECS; ++v) sums[r][v] = sums[r][v] + x * columns[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) {
      float* p = out + (row + r) * out_row + column + v * kLanes;
      if (PART) store_part(p, sums[r][v], lanes);
      else store(p, sums[r][v]);
    }
}

template <int ROWS>
void sum_rows(Terms terms, int64_t row, int64_t columns, const Matrix& start, float* out, int64_t out_row) {
  if (columns < kLanes) {
    sum_tile<ROWS, 1, true>(terms, row, 0, start, out, out_row, static_cast<int>(columns));
    return;
  }
  int64_t j = 0;
  for (; j + kTileVecs * kLanes <= columns; j += kTileVecs * kLanes)
    sum_tile<ROWS, kTileVecs, false>(terms, row, j, start, out, out_row, kLanes);
  for (; j + kLanes <= columns; j += kLanes) sum_tile<ROWS, 1, false>(terms, row, j, start, out, out_row, kLanes);
  // The last vector overlaps the one before it: the same values once more instead of partial loads.
  if (j < columns) sum_tile<ROWS, 1, false>(terms, row, columns - kLanes, start, out, out_row, kLanes);
}

constexpr int kDotColumns = 4;

// Dot products of ROWS rows of a with COLUMNS rows of b, all of `depth` contiguous floats.
template <int ROWS, int COLUMNS, typename Finish>
inline __attribute__((always_inline)) void dot_tile(const Matrix& a, const Matrix& b, int64_t row, int64_t column,
                                                    int64_t depth, const Finish& finish) {
  const float* left = a.data + row * a.row;
  const float* right = b.data + column * b.row;
  Vec sums[ROWS][kDotColumns] = {};
  const auto add = [&](int64_t k, auto read) {
    Vec x[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) x[r] = read(left + r * a.row + k);
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) {
      const Vec y = read(right + c * b.row + k);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sums[r][c] = sums[r][c] + x[r] * y;
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) add(k, [](const float* p) { return load(p); });
  const int rest = static_cast<int>(depth - k);
  if (rest > 0) add(k, [rest](const float* p) { return load_part(p, rest); });
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const Vec4 dots = lane_sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) finish(row + r, column + c, dots[c]);
  }
}

template <int ROWS, typename Finish>
void dot_rows(const Matrix& a, const Matrix& b, int64_t row, int64_t columns, int64_t depth, const Finish& finish) {
  int64_t j = 0;
  for (; j + kDotColumns <= columns; j += kDotColumns)
    dot_tile<ROWS, kDotColumns>(a, b, row, j, depth, finish);
  for (; j < columns; ++j) dot_tile<ROWS, 1>(a, b, row, j, depth, finish);
}

}  // namespace detail

// out [rows, columns] = start + Σ left @ right over the terms; start.data may be null (zeros). `out` may be
// `start` only if columns is a multiple of kLanes, and is never an operand.
inline void sum_of_products(Terms terms, const Matrix& start, int64_t rows, int64_t columns, float* out,
                            int64_t out_row) {
  int64_t i = 0;
  for (; i + detail::kTileRows <= rows; i += detail::kTileRows)
    detail::sum_rows<detail::kTileRows>(terms, i, columns, start, out, out_row);
  switch (rows - i) {
    case 5: detail::sum_rows<5>(terms, i, columns, start, out, out_row); break;
    case 4: detail::sum_rows<4>(terms, i, columns, start, out, out_row); break;
    case 3: detail::sum_rows<3>(terms, i, columns, start, out, out_row); break;
    case 2: detail::sum_rows<2>(terms, i, columns, start, out, out_row); break;
    case 1: detail::sum_rows<1>(terms, i, columns, start, out, out_row); break;
    default: break;
  }
}

// finish(i, j, ⟨a_i, b_j⟩) for the rows i of a [rows, depth] and j of b [columns, depth]; both column strides are 1.
template <typename Finish>
inline void dot_products(const Matrix& a, const Matrix& b, int64_t rows, int64_t columns, int64_t depth,
                         const Finish& finish) {
  int64_t i = 0;
  for (; i + kDotRows <= rows; i += kDotRows)
    detail::dot_rows<kDotRows>(a, b, i, columns, depth, finish);
  for (; i < rows; ++i) detail::dot_rows<1>(a, b, i, columns, depth, finish);
}

}  // namespace mtl
