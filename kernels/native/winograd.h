// Winograd's minimal filtering F(M×M, R×R) on vectors of channels: the matrices and the four transforms.
//
//   y = Aᵀ[(G w Gᵀ) ⊙ (Bᵀ x B)]A      x: T×T patch, w: R×R taps, y: M×M outputs, T = M + R − 1 points
//
// Points come in pairs ±p: the rows of a pair share the products of their even and of their odd columns.
// R = 1 is the degenerate case where every matrix is the identity: a plain matrix product on tiles of pixels.
#pragma once

#include "vec.h"

namespace mtl {

template <int M, int R>
struct Matrices;

template <>
struct Matrices<2, 3> {
  static constexpr float bt[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}};
  static constexpr float g[4][3] = {{1, 0, 0}, {.5f, .5f, .5f}, {.5f, -.5f, .5f}, {0, 0, 1}};
  static constexpr float at[2][4] = {{1, 1, 1, 0}, {0, 1, -1, 1}};
};

template <>
struct Matrices<4, 3> {
  static constexpr float bt[6][6] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                     {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
  static constexpr float g[6][3] = {{1 / 4.f, 0, 0},
                                    {-1 / 6.f, -1 / 6.f, -1 / 6.f},
                                    {-1 / 6.f, 1 / 6.f, -1 / 6.f},
                                    {1 / 24.f, 1 / 12.f, 1 / 6.f},
                                    {1 / 24.f, -1 / 12.f, 1 / 6.f},
                                    {0, 0, 1}};
  static constexpr float at[4][6] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
};

template <>
struct Matrices<6, 3> {
  static constexpr float bt[8][8] = {
      {1, 0, -5.25f, 0, 5.25f, 0, -1, 0},         {0, 1, 1, -4.25f, -4.25f, 1, 1, 0},
      {0, -1, 1, 4.25f, -4.25f, -1, 1, 0},        {0, .5f, .25f, -2.5f, -1.25f, 2, 1, 0},
      {0, -.5f, .25f, 2.5f, -1.25f, -2, 1, 0},    {0, 2, 4, -2.5f, -5, .5f, 1, 0},
      {0, -2, 4, 2.5f, -5, -.5f, 1, 0},           {0, -1, 0, 5.25f, 0, -5.25f, 0, 1}};
  static constexpr float g[8][3] = {{1, 0, 0},
                                    {-2 / 9.f, -2 / 9.f, -2 / 9.f},
                                    {-2 / 9.f, 2 / 9.f, -2 / 9.f},
                                    {1 / 90.f, 1 / 45.f, 2 / 45.f},
                                    {1 / 90.f, -1 / 45.f, 2 / 45.f},
                                    {32 / 45.f, 16 / 45.f, 8 / 45.f},
                                    {32 / 45.f, -16 / 45.f, 8 / 45.f},
                                    {0, 0, 1}};
  static constexpr float at[6][8] = {{1, 1, 1, 1, 1, 1, 1, 0},
                                     {0, 1, -1, 2, -2, .5f, -.5f, 0},
                                     {0, 1, 1, 4, 4, .25f, .25f, 0},
                                     {0, 1, -1, 8, -8, .125f, -.125f, 0},
                                     {0, 1, 1, 16, 16, .0625f, .0625f, 0},
                                     {0, 1, -1, 32, -32, .03125f, -.03125f, 1}};
};

// Σ_j row[j]·in[j] over the columns first, first + step, …: all of them or those of one parity.
template <int C>
inline __attribute__((always_inline)) Vec dot(const float (&row)[C], const Vec* in, int first, int step) {
  Vec total{};
  bool empty = true;
  MTL_UNROLL for (int j = first; j < C; j += step) {
    const float c = row[j];
    if (c == 0) continue;
    const Vec term = c == 1 ? in[j] : c == -1 ? -in[j] : broadcast(c) * in[j];
    total = empty ? term : total + term;
    empty = false;
  }
  return total;
}

// out [P] = matrix [P, C] · in [C], the rows between the first and the last being pairs ±p.
template <int P, int C>
inline __attribute__((always_inline)) void apply(const float (&matrix)[P][C], const Vec* in, Vec* out) {
  out[0] = dot(matrix[0], in, 0, 1);
  MTL_UNROLL for (int p = 1; p + 1 < P; p += 2) {
    const Vec even = dot(matrix[p], in, 0, 2), odd = dot(matrix[p], in, 1, 2);
    out[p] = even + odd;
    out[p + 1] = even - odd;
  }
  out[P - 1] = dot(matrix[P - 1], in, 0, 1);
}

// matrix [P, C] · in · matrixᵀ, in(i, j) [C, C] -> out(i, j, value) [P, P]; columns first.
template <int P, int C, class In, class Out>
inline __attribute__((always_inline)) void apply_on_both_sides(
    const float (&matrix)[P][C], const In& in, const Out& out) {
  Vec half[P][C];
  MTL_UNROLL for (int j = 0; j < C; ++j) {
    Vec column[C], applied[P];
    MTL_UNROLL for (int i = 0; i < C; ++i) column[i] = in(i, j);
    apply(matrix, column, applied);
    MTL_UNROLL for (int i = 0; i < P; ++i) half[i][j] = applied[i];
  }
  MTL_UNROLL for (int i = 0; i < P; ++i) {
    Vec row[P];
    apply(matrix, half[i], row);
    MTL_UNROLL for (int j = 0; j < P; ++j) out(i, j, row[j]);
  }
}

// out [C] = matrixᵀ · in [P], of the same kind of matrix.
template <int P, int C>
inline __attribute__((always_inline)) void apply_transposed(
    const float (&matrix)[P][C], const Vec* in, Vec* out) {
  Vec sums[P], differences[P];
  MTL_UNROLL for (int p = 1; p + 1 < P; p += 2) {
    sums[p] = in[p] + in[p + 1];
    differences[p] = in[p] - in[p + 1];
  }
  MTL_UNROLL for (int c = 0; c < C; ++c) {
    Vec total{};
    MTL_UNROLL for (int p = 1; p + 1 < P; p += 2) {
      if (matrix[p][c] != 0) total = total + broadcast(matrix[p][c]) * (c % 2 ? differences[p] : sums[p]);
    }
    if (matrix[0][c] != 0) total = total + broadcast(matrix[0][c]) * in[0];
    if (matrix[P - 1][c] != 0) total = total + broadcast(matrix[P - 1][c]) * in[P - 1];
    out[c] = total;
  }
}

// Aᵀ as stored is [M, T]; its transpose has one row a point.
template <int M, int T>
struct Transposed {
  float a[T][M];
  constexpr explicit Transposed(const float (&at)[M][T]) : a() {
    for (int t = 0; t < T; ++t)
      for (int m = 0; m < M; ++m) a[t][m] = at[m][t];
  }
};

template <int M, int R>
struct Winograd {
  static constexpr int kTile = M, kTaps = R, kPatch = M + R - 1;
  static constexpr int kPoints = kPatch * kPatch;   // products a tile
  static constexpr int kFilterPoints = kPoints;     // distinct transformed taps
  static constexpr Transposed<M, kPatch> kA{Matrices<M, R>::at};

  // Bᵀ d B, d(i, j) -> out(i, j, point), [T, T] both.
  template <class In, class Out>
  static inline __attribute__((always_inline)) void input(const In& d, const Out& out) {
    apply_on_both_sides(Matrices<M, R>::bt, d, out);
  }

  // G w Gᵀ: [R, R] → [T, T].
  static inline __attribute__((always_inline)) void filter(const Vec (&w)[R][R], Vec (&u)[kPatch][kPatch]) {
    Vec half[R][kPatch];
    MTL_UNROLL for (int i = 0; i < R; ++i) apply(Matrices<M, R>::g, w[i], half[i]);
    MTL_UNROLL for (int j = 0; j < kPatch; ++j) {
      Vec in[R], out[kPatch];
      MTL_UNROLL for (int i = 0; i < R; ++i) in[i] = half[i][j];
      apply(Matrices<M, R>::g, in, out);
      MTL_UNROLL for (int i = 0; i < kPatch; ++i) u[i][j] = out[i];
    }
  }

  // Gᵀ du G, the transpose of `filter`: [T, T] → [R, R].
  static inline __attribute__((always_inline)) void filter_gradient(
      const Vec (&du)[kPatch][kPatch], Vec (&dw)[R][R]) {
    Vec half[kPatch][R];
    MTL_UNROLL for (int i = 0; i < kPatch; ++i) apply_transposed(Matrices<M, R>::g, du[i], half[i]);
    MTL_UNROLL for (int j = 0; j < R; ++j) {
      Vec in[kPatch], out[R];
      MTL_UNROLL for (int i = 0; i < kPatch; ++i) in[i] = half[i][j];
      apply_transposed(Matrices<M, R>::g, in, out);
      MTL_UNROLL for (int i = 0; i < R; ++i) dw[i][j] = out[i];
    }
  }

  // Aᵀ m A, m(i, j) [T, T] → y [M, M].
  template <class In>
  static inline __attribute__((always_inline)) void output(const In& m, Vec (&y)[M][M]) {
    Vec half[M][kPatch];
    MTL_UNROLL for (int j = 0; j < kPatch; ++j) {
      Vec in[kPatch], out[M];
      MTL_UNROLL for (int i = 0; i < kPatch; ++i) in[i] = m(i, j);
      apply_transposed(kA.a, in, out);
      MTL_UNROLL for (int i = 0; i < M; ++i) half[i][j] = out[i];
    }
    MTL_UNROLL for (int i = 0; i < M; ++i) apply_transposed(kA.a, half[i], y[i]);
  }

  // A dy Aᵀ, the transpose of `output`: dy(i, j) [M, M] -> out(i, j, point) [T, T].
  template <class In, class Out>
  static inline __attribute__((always_inline)) void output_gradient(const In& dy, const Out& out) {
    apply_on_both_sides(kA.a, dy, out);
  }
};

// 1×1 taps: pixels pass through, every point multiplies by the same weight.
template <int M>
struct Winograd<M, 1> {
  static constexpr int kTile = M, kTaps = 1, kPatch = M, kPoints = M * M, kFilterPoints = 1;

  template <class In, class Out>
  static inline __attribute__((always_inline)) void input(const In& d, const Out& out) {
    MTL_UNROLL for (int i = 0; i < M; ++i)
      MTL_UNROLL for (int j = 0; j < M; ++j) out(i, j, d(i, j));
  }
  template <class In>
  static inline __attribute__((always_inline)) void output(const In& m, Vec (&y)[M][M]) {
    MTL_UNROLL for (int i = 0; i < M; ++i)
      MTL_UNROLL for (int j = 0; j < M; ++j) y[i][j] = m(i, j);
  }
  template <class In, class Out>
  static inline __attribute__((always_inline)) void output_gradient(const In& dy, const Out& out) {
    input(dy, out);
  }
};

}  // namespace mtl
