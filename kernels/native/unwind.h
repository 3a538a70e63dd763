// From dL/dy to G = dL/dz through pooling and activation, with the sums over pixels that G's channels need.
#pragma once

#include <cmath>

#include "epilogue.h"

namespace mtl {

// dL/dy before the activation.
inline Vec through_activation(Activation activation, float slope, VecInt code, Vec upper) {
  if (activation == Activation::kNone) return upper;
  // Slope 0 is exact also for an infinite gradient, as in `activate`.
  return select((code & kPositive) != 0, upper, slope == 0 ? Vec{} : broadcast(slope) * upper);
}

// The way back through `finish_tile`, a tile at a time.
struct Unwound {
  Geometry g;
  Activation activation;
  float slope;
  bool pool;
  const float* grad;     // dL/dy [N, H'', W'', O], of the pooled size where there is pooling
  const uint8_t* codes;  // of the same shape; null where nothing was coded

  // Gradients of 2×2 values: before the activation and the residual, and of the residual.
  struct Tile {
    Vec inner[2][2], residual[2][2];
  };

  // Zeros where pooling drops an odd last row or column; undefined outside the image.
  Tile tile(const TileGrid::Place& at, int64_t o, int lanes) const {
    const int64_t h = g.out_h(), w = g.out_w();
    Tile t{};
    if (pool && (at.top + 1 >= h || at.left + 1 >= w)) return t;
    const int64_t step = pool ? 2 : 1;
    const int64_t corner = ((at.image * (h / step) + at.top / step) * (w / step) + at.left / step) * g.n_out + o;
    if (pool) {
      const VecInt code = load_codes(codes + corner, lanes);
      const Vec upper = load_part(grad + corner, lanes);
      const Vec inner = through_activation(activation, slope, code, upper);
      const Vec residual = activation == Activation::kBeforeResidual ? upper : inner;
      MTL_UNROLL for (int place = 0; place < 4; ++place) {
        const VecInt here = (code & 3) == place;
        t.inner[place / 2][place % 2] = select(here, inner, Vec{});
        t.residual[place / 2][place % 2] = select(here, residual, Vec{});
      }
      return t;
    }
    MTL_UNROLL for (int i = 0; i < 2; ++i) {
      MTL_UNROLL for (int j = 0; j < 2; ++j) {
        if (at.top + i >= h || at.left + j >= w) continue;
        const int64_t pixel = corner + (i * w + j) * g.n_out;
        const Vec upper = load_part(grad + pixel, lanes);
        const VecInt code = codes ? load_codes(codes + pixel, lanes) : VecInt{};
        t.inner[i][j] = through_activation(activation, slope, code, upper);
        t.residual[i][j] = activation == Activation::kBeforeResidual ? upper : t.inner[i][j];
      }
    }
    return t;
  }
};

struct PartialSumsTag {};

struct Unwinding {
  Geometry g;
  Activation activation;
  float slope;
  bool pool;
  const float* grad = nullptr;      // [N, H'', W'', O], of the pooled size where there is pooling
  const uint8_t* codes = nullptr;   // of the same shape; null where nothing was coded
  const float* output = nullptr;    // y, only where the scale of a filter is wanted
  const float* residual = nullptr;  // [N, H', W', O], likewise
  const float* shift = nullptr;     // [O], likewise
  float* inner = nullptr;           // G [N, H', W', O]; null where it is `grad` itself
  float* residual_grad = nullptr;   // [N, H', W', O]; null where it is G or `grad`
  bool streamed = false;            // both, see `streams` in vec.h

  // sums [O] = Σ G. Unless null, by_output [3, O]: Σ G·(z − shift), and how far that can be trusted: the sums of its
  // terms' sizes, and of the sizes that were subtracted to get them.
  void run(float* sums, float* by_output) const {
    if (g.n == 0) return;
    const int64_t row = ceil_div(g.n_out, kLanes) * kLanes, rows = by_output ? 4 : 1;
    // Partial sums of each image, added in order.
    float* partial = scratch<PartialSumsTag>(g.n * rows * row);
    std::memset(partial, 0, sizeof(float) * g.n * rows * row);
    at::parallel_for(0, g.n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        float* own = partial + image * rows * row;
        if (pool) {
          by_output ? image_rows<true, true>(image, own, row) : image_rows<false, true>(image, own, row);
        } else {
          by_output ? image_rows<true, false>(image, own, row) : image_rows<false, false>(image, own, row);
        }
      }
      end_streams();
    });
    for (int64_t image = 0; image < g.n; ++image) {
      const float* own = partial + image * rows * row;
      for (int64_t o = 0; o < g.n_out; ++o) sums[o] += own[o];
      for (int64_t kind = 0; kind + 1 < rows; ++kind)
        for (int64_t o = 0; o < g.n_out; ++o) by_output[kind * g.n_out + o] += own[(kind + 1) * row + o];
    }
  }

 private:
  // Values along a row whose sums stay in registers.
  static constexpr int64_t kRun = 16;
  static constexpr int kVectors = kLine / kLanes;  // of a line

  // A run of n values: the first, and the first pixel of its window (the same without pooling), of channel 0.
  struct Run {
    int64_t at, corner, n;
  };

  // sums: Σ G [row] and, BY_OUTPUT, the three of `run`, a row each.
  template <bool BY_OUTPUT, bool POOL>
  void image_rows(int64_t image, float* sums, int64_t row) const {
    constexpr int kStep = POOL ? 2 : 1;
    const int64_t h = g.out_h() / kStep, w = g.out_w() / kStep;
    if (POOL) clear_dropped(image);
    for (int64_t y = 0; y < h; ++y) {
      for (int64_t x = 0; x < w; x += kRun) {
        const Run run{((image * h + y) * w + x) * g.n_out,
                      ((image * g.out_h() + y * kStep) * g.out_w() + x * kStep) * g.n_out, std::min(kRun, w - x)};
        int64_t o = 0;
        for (; o + kLine <= g.n_out; o += kLine) {
          line<BY_OUTPUT, POOL>(run, o, std::integral_constant<int, kLine>{}, sums, row);
        }
        if (o < g.n_out) line<BY_OUTPUT, POOL>(run, o, static_cast<int>(g.n_out - o), sums, row);
      }
    }
  }

  // Channels o..o+channels of a run, at most a line: lines are written whole, see `stream`.
  template <bool BY_OUTPUT, bool POOL, class Channels>
  inline __attribute__((always_inline)) void line(const Run& run, int64_t o, Channels channels, float* sums,
                                                  int64_t row) const {
    Vec totals[BY_OUTPUT ? 4 : 1][kVectors]{};
    const auto each = [&](const auto& fn) MTL_INLINED {
      MTL_UNROLL for (int v = 0; v < kVectors; ++v) {
        if (v * kLanes < channels) fn(v, v * kLanes, std::min<int>(kLanes, channels - v * kLanes));
      }
    };
    for (int64_t i = 0; i < run.n; ++i) {
      const int64_t at = run.at + i * g.n_out + o, corner = run.corner + i * (POOL ? 2 : 1) * g.n_out + o;
      // The same line of the next run: a line at a time, rows are not what the processor's own prefetcher follows.
      __builtin_prefetch(grad + at + kRun * g.n_out);
      if (BY_OUTPUT) __builtin_prefetch(output + at + kRun * g.n_out);
      VecInt code[kVectors]{};
      Vec upper[kVectors], inner_grad[kVectors];
      each([&](int v, int lane, int lanes) MTL_INLINED {
        upper[v] = load_part(grad + at + lane, lanes);
        if (codes) code[v] = load_codes(codes + at + lane, lanes);
        const Vec d = inner_grad[v] = through_activation(activation, slope, code[v], upper[v]);
        totals[0][v] = totals[0][v] + d;
        if constexpr (BY_OUTPUT) {
          const Vec t = load_part(shift + o + lane, lanes);
          Vec subtracted{};
          const Vec term = d * (before<POOL>(at + lane, corner + lane, lanes, code[v], subtracted) - t);
          totals[1][v] = totals[1][v] + term;
          totals[2][v] = totals[2][v] + size(term);
          totals[3][v] = totals[3][v] + size(d) * (subtracted + size(t));
        }
      });
      if constexpr (POOL) {
        MTL_UNROLL for (int place = 0; place < 4; ++place) {
          const int64_t to = corner + (place / 2 * g.out_w() + place % 2) * g.n_out;
          const auto spread = [&](const Vec* whole, float* out) MTL_INLINED {
            each([&](int v, int lane, int lanes) MTL_INLINED {
              put(out + to + lane, select((code[v] & 3) == place, whole[v], Vec{}), lanes, streamed);
            });
          };
          spread(inner_grad, inner);
          if (residual_grad) spread(upper, residual_grad);
        }
      } else if (inner) {
        each([&](int v, int lane, int lanes) MTL_INLINED { put(inner + at + lane, inner_grad[v], lanes, streamed); });
      }
    }
    each([&](int v, int lane, int) MTL_INLINED {
      MTL_UNROLL for (int kind = 0; kind < (BY_OUTPUT ? 4 : 1); ++kind) {
        float* sum = sums + kind * row + o + lane;
        store(sum, load(sum) + totals[kind][v]);
      }
    });
  }

  // z with its shift, from y: undo the residual and the activation. Where the slope is 0 and y is not positive,
  // d is 0 and any finite value serves. `subtracted` takes the size of what z came from.
  template <bool POOL>
  inline __attribute__((always_inline)) Vec before(int64_t at, int64_t corner, int lanes, VecInt code,
                                                   Vec& subtracted) const {
    Vec y = load_part(output + at, lanes), r{};
    if (residual) {
      r = load_part(residual + corner, lanes);
      for (int place = 1; POOL && place < 4; ++place) {
        const Vec other = load_part(residual + corner + (place / 2 * g.out_w() + place % 2) * g.n_out, lanes);
        r = select((code & 3) == place, other, r);
      }
    }
    const float upwards = 1 / slope;
    const Vec inverse = broadcast(std::isfinite(upwards) ? upwards : 0.f);
    const VecInt positive = (code & kPositive) != 0;
    Vec z;
    if (activation == Activation::kAfterResidual) {
      z = select(positive, y, y * inverse) - r;
    } else {
      z = y - r;
      if (activation == Activation::kBeforeResidual) z = select(positive, z, z * inverse);
    }
    subtracted = size(z) + size(r);
    return z;
  }

  static Vec size(Vec v) { return reinterpret_cast<Vec>(reinterpret_cast<VecInt>(v) & 0x7fffffff); }

  // Pooling leaves an odd last row and column out: no gradient there.
  void clear_dropped(int64_t image) const {
    const int64_t h = g.out_h(), w = g.out_w();
    for (float* to : {inner, residual_grad}) {
      if (to == nullptr) continue;
      float* first = to + image * h * w * g.n_out;
      if (h % 2) std::memset(first + (h - 1) * w * g.n_out, 0, sizeof(float) * w * g.n_out);
      for (int64_t y = 0; w % 2 && y < h; ++y) {
        std::memset(first + (y * w + w - 1) * g.n_out, 0, sizeof(float) * g.n_out);
      }
    }
  }
};

}  // namespace mtl
