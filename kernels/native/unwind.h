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
        image_rows(image, own, by_output ? own + row : nullptr, row);
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
  void image_rows(int64_t image, float* sums, float* by_output, int64_t row) const {
    const int64_t h = g.out_h(), w = g.out_w(), step = pool ? 2 : 1;
    if (pool) clear_dropped(image);
    for (int64_t y = 0; y < h / step; ++y) {
      for (int64_t x = 0; x < w / step; ++x) {
        const int64_t at = ((image * (h / step) + y) * (w / step) + x) * g.n_out;
        const int64_t corner = ((image * h + y * step) * w + x * step) * g.n_out;
        for (int64_t o = 0; pool && o < g.n_out; o += kLine) {
          window(at + o, corner + o, o, sums + o, by_output ? by_output + o : nullptr, row);
        }
        for (int64_t o = 0; !pool && o < g.n_out; o += kLanes) {
          const Value v = value(at + o, corner + o, o, sums + o, by_output ? by_output + o : nullptr, row);
          if (inner) put(inner + at + o, v.d, v.lanes, streamed);
        }
      }
    }
  }

  // What one value's gradient is made of.
  struct Value {
    VecInt code;
    Vec upper, d;  // dL/dy and G
    int lanes;
  };

  // A line's channels, from `o` on, of the window whose value is at `at` and first pixel at `corner`.
  void window(int64_t at, int64_t corner, int64_t o, float* sums, float* by_output, int64_t row) const {
    constexpr int kVectors = kLine / kLanes;
    Value values[kVectors];
    int n = 0;
    for (; n < kVectors && o + n * kLanes < g.n_out; ++n) {
      const int64_t lane = n * kLanes;
      values[n] = value(at + lane, corner + lane, o + lane, sums + lane, by_output ? by_output + lane : nullptr, row);
    }
    for (int place = 0; place < 4; ++place) {
      const int64_t to = corner + (place / 2 * g.out_w() + place % 2) * g.n_out;
      // The vectors of a line one right after the other, see `stream`.
      for (int v = 0; v < n; ++v) spread(values[v], values[v].d, place, inner + to + v * kLanes);
      for (int v = 0; residual_grad && v < n; ++v) {
        spread(values[v], values[v].upper, place, residual_grad + to + v * kLanes);
      }
    }
  }

  // A window's gradient at one place of it.
  void spread(const Value& value, Vec whole, int place, float* to) const {
    put(to, select((value.code & 3) == place, whole, Vec{}), value.lanes, streamed);
  }

  // One vector, and its part of the sums.
  Value value(int64_t at, int64_t corner, int64_t o, float* sums, float* by_output, int64_t row) const {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, g.n_out - o));
    const Vec upper = load_part(grad + at, lanes);
    const VecInt code = codes ? load_codes(codes + at, lanes) : VecInt{};
    const VecInt positive = (code & kPositive) != 0;
    const Vec d = through_activation(activation, slope, code, upper);
    store(sums, load(sums) + d);
    if (by_output) {
      const Vec t = load_part(shift + o, lanes);
      Vec subtracted{};
      const Vec term = d * (before(at, corner, lanes, code, positive, subtracted) - t);
      store(by_output, load(by_output) + term);
      store(by_output + row, load(by_output + row) + size(term));
      store(by_output + 2 * row, load(by_output + 2 * row) + size(d) * (subtracted + size(t)));
    }
    return {code, upper, d, lanes};
  }

  // z with its shift, from y: undo the residual and the activation. Where the slope is 0 and y is not positive,
  // d is 0 and any finite value serves. `subtracted` takes the size of what z came from.
  Vec before(int64_t at, int64_t corner, int lanes, VecInt code, VecInt positive, Vec& subtracted) const {
    Vec y = load_part(output + at, lanes), r{};
    if (residual) {
      r = load_part(residual + corner, lanes);
      for (int place = 1; pool && place < 4; ++place) {
        const Vec other = load_part(residual + corner + (place / 2 * g.out_w() + place % 2) * g.n_out, lanes);
        r = select((code & 3) == place, other, r);
      }
    }
    const float upwards = 1 / slope;
    const Vec inverse = broadcast(std::isfinite(upwards) ? upwards : 0.f);
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

  static Vec size(Vec v) { return select(v < 0, -v, v); }

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
