// One vector type for AVX-512, AVX2 and NEON: compiler vector types, so that one source serves all three.
// Multiply-adds are written a * b + c; the build allows the compiler to contract them (-ffp-contract=fast).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mtl {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else  // NEON, and whatever else has 128 bits
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#endif

#define MTL_UNROLL _Pragma("GCC unroll 16")
// Of lambdas: a vector handed to a call would go through memory.
#define MTL_INLINED __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VecInt __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// x - 0 is x to the bit, so the compiler keeps the broadcast alone.
inline Vec broadcast(float x) { return x - Vec{}; }

// The first n lanes, zeros after them; 0 <= n <= kLanes. Reads nothing beyond p[n - 1].
inline Vec load_part(const float* p, int n) {
  if (n == kLanes) return load(p);
  Vec v{};
  __builtin_memcpy(&v, p, n * sizeof(float));
  return v;
}

// The first n lanes; writes nothing beyond p[n - 1]. A whole vector must not become a call of memcpy.
inline void store_part(float* p, Vec v, int n) {
  if (n == kLanes) return store(p, v);
  __builtin_memcpy(p, &v, n * sizeof(float));
}

// Past the caches: a store into a line that no cache holds would read it first. `p` is aligned to vectors, and the vectors of
// a line are written one right after the other. A thread that streamed calls `end_streams` before it tells others.
constexpr int kLine = 16;  // floats of a line
#if defined(__AVX512F__)
constexpr bool kStreams = true;
inline void stream(float* p, Vec v) { _mm512_stream_ps(p, reinterpret_cast<__m512>(v)); }
inline void end_streams() { _mm_sfence(); }
#elif defined(__AVX2__)
constexpr bool kStreams = true;
inline void stream(float* p, Vec v) { _mm256_stream_ps(p, reinterpret_cast<__m256>(v)); }
inline void end_streams() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
inline void stream(float* p, Vec v) { store(p, v); }
inline void end_streams() {}
#endif

// Whether a result of this many bytes should be streamed: it is larger than what a core's own cache keeps for the next
// reader, and made of whole lines.
inline bool streams(const float* data, int64_t bytes, int64_t channels) {
  constexpr int64_t kLeast = int64_t{1} << 20;
  return kStreams && bytes >= kLeast && channels % kLine == 0 &&
         reinterpret_cast<uintptr_t>(data) % (kLine * sizeof(float)) == 0;
}

// `lanes` of a vector, streamed where that was decided (then they are all).
inline void put(float* p, Vec v, int lanes, bool streamed) {
  if (kStreams && streamed) return stream(p, v);
  store_part(p, v, lanes);
}

inline Vec select(VecInt mask, Vec yes, Vec no) { return mask ? yes : no; }

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

}  // namespace mtl
