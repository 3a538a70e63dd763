// Sums over the lanes of a vector and the exponential of a softmax.
#pragma once

#include "vec.h"

namespace mtl {

typedef float Vec4 __attribute__((vector_size(4 * sizeof(float))));
typedef int32_t VecInt4 __attribute__((vector_size(4 * sizeof(float))));

// Lanes I of the eight of a and b.
template <int... I>
inline Vec4 pick(Vec4 a, Vec4 b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, VecInt4{I...});
#endif
}

// Four sums, each of every fourth lane: the vector's halves are added until four lanes are left.
inline Vec4 fold(Vec v) {
#if defined(__AVX512F__)
  typedef float Vec8 __attribute__((vector_size(8 * sizeof(float))));
  Vec8 half[2];
  __builtin_memcpy(half, &v, sizeof v);
  half[0] = half[0] + half[1];
  Vec4 quarter[2];
  __builtin_memcpy(quarter, half, sizeof half[0]);
  return quarter[0] + quarter[1];
#elif defined(__AVX2__)
  Vec4 half[2];
  __builtin_memcpy(half, &v, sizeof v);
  return half[0] + half[1];
#else
  return v;
#endif
}

// The lanes' sum of each of four vectors; one alone costs as much as four.
inline Vec4 lane_sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 x = fold(a), y = fold(b), z = fold(c), w = fold(d);
  const Vec4 xy = pick<0, 4, 1, 5>(x, y) + pick<2, 6, 3, 7>(x, y);
  const Vec4 zw = pick<0, 4, 1, 5>(z, w) + pick<2, 6, 3, 7>(z, w);
  return pick<0, 1, 4, 5>(xy, zw) + pick<2, 3, 6, 7>(xy, zw);
}

inline Vec larger(Vec a, Vec b) { return select(a > b, a, b); }

// e^x for x <= 0 to 2 ulp; NaN stays NaN. Below -80 it is e^-80 = 2e-35: nothing beside the 1 of a softmax's
// largest term, and no denormal number comes of it.
inline Vec exp_of_nonpositive(Vec x) {
  x = select(x < broadcast(-80.0f), broadcast(-80.0f), x);
  // x = k·ln 2 + r; adding 1.5·2^23 rounds to the integer k and leaves it in the low bits.
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = x * 1.44269504f + magic;
  const Vec k = shifted - magic;
  // ln 2 in two parts, the first so short that k times it is exact.
  const Vec r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  // Minimax polynomial of e^r for |r| <= ln(2)/2 (Cephes).
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Times 2^k: k added to the exponent's bits.
  const VecInt scaled = reinterpret_cast<VecInt>(p) + (reinterpret_cast<VecInt>(shifted) << 23);
  return reinterpret_cast<Vec>(scaled);
}

}  // namespace mtl
