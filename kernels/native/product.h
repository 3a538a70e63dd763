// Matrix products on register tiles: up to kRows rows × one or two vectors of columns.
#pragma once

#include <algorithm>

#include "vec.h"

namespace mtl {

constexpr int kRows = kRegisters == 32 ? 12 : 6;  // 24 (12) accumulators, two columns and a broadcast fit
constexpr int kPanel = 2 * kLanes;                // columns of a panel

// The left matrix lies by rows, a[r·lda + k], or transposed, a[k·lda + r].
enum class Left { kRows, kTransposed };

// Channels that lie together for a product that sums over tiles: at least a line.
constexpr int64_t kStrip = kPanel > kLine ? kPanel : kLine;

// Lines that are read from far away after a product, fetched beside it: one every few steps, more at once would stop its
// own loads.
struct Ahead {
  const float* data = nullptr;
  int64_t lines = 0;
};

constexpr int kStepsALine = 2;

// The left matrix [rows, K], the right one b [K, ldb].
struct Factors {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb, K;
  Ahead ahead = {};
};

// What is done with a product's vectors: kept in c [rows, ldc].
struct Kept {
  float* c;
  int64_t ldc;
  void operator()(int row, int column, Vec product) const { store(c + row * ldc + column, product); }
};

// [ROWS, K] @ [K, VECTORS·kLanes], from row `r0` on, to `finish(row, column, vector)`.
template <Left LEFT, int ROWS, int VECTORS, class Finish>
inline __attribute__((always_inline)) void product_rows(const Factors& f, int r0, const Finish& finish) {
  const int64_t row = LEFT == Left::kRows ? f.lda : 1, column = LEFT == Left::kRows ? 1 : f.lda;
  const float* a = f.a + r0 * row;
  Vec sums[ROWS][VECTORS];
  MTL_UNROLL for (int r = 0; r < ROWS; ++r)
    MTL_UNROLL for (int v = 0; v < VECTORS; ++v) sums[r][v] = Vec{};
  const auto step = [&](int64_t k) MTL_INLINED {
    Vec columns[VECTORS];
    MTL_UNROLL for (int v = 0; v < VECTORS; ++v) columns[v] = load(f.b + k * f.ldb + v * kLanes);
    MTL_UNROLL for (int r = 0; r < ROWS; ++r) {
      const Vec x = broadcast(a[r * row + k * column]);
      MTL_UNROLL for (int v = 0; v < VECTORS; ++v) sums[r][v] = sums[r][v] + x * columns[v];
    }
  };
  const int64_t n_lines = std::min(f.ahead.lines, f.K / kStepsALine);
  for (int64_t line = 0; line < n_lines; ++line) {
    __builtin_prefetch(f.ahead.data + line * kLine, 0, 2);
    MTL_UNROLL for (int i = 0; i < kStepsALine; ++i) step(line * kStepsALine + i);
  }
  for (int64_t k = n_lines * kStepsALine; k < f.K; ++k) step(k);
  MTL_UNROLL for (int r = 0; r < ROWS; ++r)
    MTL_UNROLL for (int v = 0; v < VECTORS; ++v) finish(r0 + r, v * kLanes, sums[r][v]);
}

// The same for rows <= kRows: a whole tile at once, less in a few parts, so that few kernels exist.
template <Left LEFT, int VECTORS, class Finish>
inline void product_columns(const Factors& f, int rows, const Finish& finish) {
  if (rows == kRows) return product_rows<LEFT, kRows, VECTORS>(f, 0, finish);
  int r = 0;
  if constexpr (kRows > 8) {
    if (rows >= 8) product_rows<LEFT, 8, VECTORS>(f, 0, finish), r = 8;
    if (rows - r >= 6) product_rows<LEFT, 6, VECTORS>(f, r, finish), r += 6;
  }
  if (rows - r >= 4) product_rows<LEFT, 4, VECTORS>(f, r, finish), r += 4;
  if (rows - r >= 2) product_rows<LEFT, 2, VECTORS>(f, r, finish), r += 2;
  if (rows > r) product_rows<LEFT, 1, VECTORS>(f, r, finish);
}

// A panel, or only its first vector where `columns` ends there.
template <Left LEFT, class Finish>
inline void product(const Factors& f, int rows, int64_t columns, const Finish& finish) {
  if (columns <= kLanes) {
    product_columns<LEFT, 1>(f, rows, finish);
  } else {
    product_columns<LEFT, 2>(f, rows, finish);
  }
}

}  // namespace mtl
