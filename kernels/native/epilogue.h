// What follows a convolution: + shift → [act] → + residual → [act] → 2×2 max-pool, and what backward must know.
//
// A code a value of the output, one byte: bits 0–1 the place of the maximum in its window (2·row + column),
// bit 2 whether the activation's input was positive there.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "tiles.h"

namespace mtl {

enum class Activation : int64_t { kNone = 0, kBeforeResidual = 1, kAfterResidual = 2 };

constexpr int kPositive = 4;

struct Epilogue {
  const float* shift = nullptr;     // [O]
  const float* residual = nullptr;  // [N, H', W', O]
  Activation activation = Activation::kNone;
  float slope = 0;
  bool pool = false;
  bool streams = false;  // the output, see `streams` in vec.h
};

typedef uint8_t Codes __attribute__((vector_size(kLanes)));

#if defined(__AVX512F__)
// The forms without a mask make GCC 12 warn of a value that is never used.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

// Between one byte and one lane a code. GCC converts vectors of so unlike widths element by element.
inline VecInt widen(Codes bytes) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecInt>(_mm512_maskz_cvtepu8_epi32(kAllLanes, reinterpret_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
  const __m128i whole = _mm_cvtsi64_si128(reinterpret_cast<int64_t>(bytes));
  return reinterpret_cast<VecInt>(_mm256_cvtepu8_epi32(whole));
#else
  return __builtin_convertvector(bytes, VecInt);
#endif
}

inline Codes narrow(VecInt codes) {
#if defined(__AVX512F__)
  return reinterpret_cast<Codes>(_mm512_maskz_cvtepi32_epi8(kAllLanes, reinterpret_cast<__m512i>(codes)));
#elif defined(__AVX2__)
  const __m256i lanes = reinterpret_cast<__m256i>(codes);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  return reinterpret_cast<Codes>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#else
  return __builtin_convertvector(codes, Codes);
#endif
}

inline void store_codes(uint8_t* p, VecInt codes, int n) {
  const Codes bytes = narrow(codes);
  if (n == kLanes) {
    __builtin_memcpy(p, &bytes, kLanes);
  } else {
    __builtin_memcpy(p, &bytes, n);
  }
}

inline VecInt load_codes(const uint8_t* p, int n) {
  Codes bytes{};
  if (n == kLanes) {
    __builtin_memcpy(&bytes, p, kLanes);
  } else {
    __builtin_memcpy(&bytes, p, n);
  }
  return widen(bytes);
}

// Leaky ReLU; slope 0 is exact also for −∞, and NaN stays NaN.
inline Vec activate(Vec z, float slope) {
  return select(z <= 0, slope == 0 ? Vec{} : broadcast(slope) * z, z);
}

// Extent of a tile that is cut off by the map's edge or has less than a vector of channels; and of a whole one, whose
// constants let the compiler keep the tile in registers.
struct PartTile {
  int rows, columns, lanes;
};

template <int M>
struct WholeTile {
  static constexpr int rows = M, columns = M, lanes = kLanes;
};

// LINES: `out` is [M, M, kPanel] of this tile alone, see `stream_lines`.
template <int M, bool LINES, class Extent>
inline __attribute__((always_inline)) void finish_extent(
    const Epilogue& e, const Geometry& g, const TileGrid::Place& at, int64_t o, const Extent extent, Vec (&y)[M][M],
    float* out, uint8_t* codes) {
  const int64_t h = g.out_h(), w = g.out_w();
  const Vec shift = e.shift ? load_part(e.shift + o, extent.lanes) : Vec{};
  const float* residual = e.residual ? e.residual + ((at.image * h + at.top) * w + at.left) * g.n_out + o : nullptr;
  VecInt positive[M][M];
  MTL_UNROLL for (int i = 0; i < extent.rows; ++i) {
    MTL_UNROLL for (int j = 0; j < extent.columns; ++j) {
      Vec z = y[i][j] + shift;
      positive[i][j] = z > 0;
      if (e.activation == Activation::kBeforeResidual) z = activate(z, e.slope);
      if (residual) z = z + load_part(residual + (i * w + j) * g.n_out, extent.lanes);
      if (e.activation == Activation::kAfterResidual) {
        positive[i][j] = z > 0;
        z = activate(z, e.slope);
      }
      y[i][j] = z;
    }
  }
  const int step = e.pool ? 2 : 1;
  const int64_t corner = ((at.image * (h / step) + at.top / step) * (w / step) + at.left / step) * g.n_out + o;
  const auto put_value = [&](int i, int j, Vec value, VecInt code) {
    const int64_t pixel = corner + (i * (w / step) + j) * g.n_out;
    if constexpr (LINES) {
      store(out + (i * M + j) * kPanel, value);
    } else {
      put(out + pixel, value, extent.lanes, e.streams);
    }
    if (codes) store_codes(codes + pixel, code, extent.lanes);
  };
  if (!e.pool) {
    MTL_UNROLL for (int i = 0; i < extent.rows; ++i) {
      MTL_UNROLL for (int j = 0; j < extent.columns; ++j) put_value(i, j, y[i][j], positive[i][j] & kPositive);
    }
    return;
  }
  MTL_UNROLL for (int i = 0; i + 1 < extent.rows; i += 2) {
    MTL_UNROLL for (int j = 0; j + 1 < extent.columns; j += 2) {
      Vec best = y[i][j];
      VecInt code = positive[i][j] & kPositive;
      MTL_UNROLL for (int place = 1; place < 4; ++place) {
        const Vec value = y[i + place / 2][j + place % 2];
        const VecInt better = (value > best) | (value != value);  // the first maximum wins, NaN goes through
        best = select(better, value, best);
        code = better ? (positive[i + place / 2][j + place % 2] & kPositive) | place : code;
      }
      put_value(i / 2, j / 2, best, code);
    }
  }
}

// Few tiles are cut off: their code stays out of the way of the others'.
template <int M, bool LINES>
__attribute__((noinline)) void finish_part(const Epilogue& e, const Geometry& g, const TileGrid::Place& at, int64_t o,
                                           PartTile extent, Vec (&y)[M][M], float* out, uint8_t* codes) {
  finish_extent<M, LINES>(e, g, at, o, extent, y, out, codes);
}

// One tile's values y [M, M] of the channels o..o+lanes, to `out` (and `codes` unless null).
template <int M, bool LINES = false>
inline __attribute__((always_inline)) void finish_tile(
    const Epilogue& e, const Geometry& g, const TileGrid::Place& at, int64_t o, int lanes, Vec (&y)[M][M], float* out,
    uint8_t* codes) {
  const int rows = static_cast<int>(std::min<int64_t>(M, g.out_h() - at.top));
  const int columns = static_cast<int>(std::min<int64_t>(M, g.out_w() - at.left));
  if (rows == M && columns == M && lanes == kLanes) {
    finish_extent<M, LINES>(e, g, at, o, WholeTile<M>{}, y, out, codes);
  } else {
    finish_part<M, LINES>(e, g, at, o, PartTile{rows, columns, lanes}, y, out, codes);
  }
}

// A tile's values of the channels o..o+kPanel, whole lines, from [M, M, kPanel] to the output: for vectors of less than a
// line, which `finish_tile` cannot stream one after the other.
template <int M>
inline void stream_lines(const Epilogue& e, const Geometry& g, const TileGrid::Place& at, int64_t o, const float* lines,
                         float* out) {
  const int64_t step = e.pool ? 2 : 1, h = g.out_h() / step, w = g.out_w() / step;
  const int64_t top = at.top / step, left = at.left / step;
  const int64_t rows = std::min(M / step, h - top), columns = std::min(M / step, w - left);
  float* to = out + ((at.image * h + top) * w + left) * g.n_out + o;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      MTL_UNROLL for (int lane = 0; lane < kPanel; lane += kLanes) {
        stream(to + (i * w + j) * g.n_out + lane, load(lines + (i * M + j) * kPanel + lane));
      }
    }
  }
}

}  // namespace mtl
