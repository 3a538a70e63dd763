// Matrix products on register tiles: kRows rows × two vectors of columns.
#pragma once

#include "vec.h"

namespace mtl {

constexpr int kRows = kRegisters == 32 ? 12 : 6;  // 24 (12) accumulators, two columns and a broadcast fit
constexpr int kPanel = 2 * kLanes;                // columns of a panel

// [ROWS, K] @ [K, kPanel] -> [ROWS, kPanel]; a[r·row + k·column], b [K, ldb], c [ROWS, ldc].
template <int ROWS>
inline __attribute__((always_inline)) void product_rows(
    const float* a, int64_t row, int64_t column, const float* b, int64_t ldb, int64_t K, float* c, int64_t ldc) {
  Vec sums[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = Vec{};
  for (int64_t k = 0; k < K; ++k) {
    const Vec left = load(b + k * ldb), right = load(b + k * ldb + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Vec x = broadcast(a[r * row + k * column]);
      sums[r][0] = sums[r][0] + x * left;
      sums[r][1] = sums[r][1] + x * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    store(c + r * ldc, sums[r][0]);
    store(c + r * ldc + kLanes, sums[r][1]);
  }
}

// The same for `rows` <= kRows rows. Fewer rows are computed in steps of four (two), so that few kernels exist.
template <int COLUMN_OF_A_IS_ONE>
inline void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t K, int rows, float* c,
                    int64_t ldc) {
  const int64_t row = COLUMN_OF_A_IS_ONE ? lda : 1, column = COLUMN_OF_A_IS_ONE ? 1 : lda;
  switch (rows) {
    case 12: if constexpr (kRows >= 12) { product_rows<12>(a, row, column, b, ldb, K, c, ldc); return; } break;
    case 8: if constexpr (kRows >= 8) { product_rows<8>(a, row, column, b, ldb, K, c, ldc); return; } break;
    case 6: product_rows<6>(a, row, column, b, ldb, K, c, ldc); return;
    case 4: product_rows<4>(a, row, column, b, ldb, K, c, ldc); return;
    default: break;
  }
  int r = 0;
  for (; r + 4 <= rows; r += 4) product_rows<4>(a + r * row, row, column, b, ldb, K, c + r * ldc, ldc);
  for (; r < rows; ++r) product_rows<1>(a + r * row, row, column, b, ldb, K, c + r * ldc, ldc);
}

}  // namespace mtl
