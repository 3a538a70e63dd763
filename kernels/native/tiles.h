// What convolution, its gradients and their epilogue share: geometry, and moving tiles between images and points.
//
// Images are [N, H, W, C] in memory. Points are value ξ of every tile, a matrix of tiles by channels for each.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "product.h"
#include "scratch.h"
#include "winograd.h"

namespace mtl {

// Packed taps are [packs, K, k², kPackedColumns]: a whole number of panels of every vector width side by side, so that
// a panel reads its taps one after the other and memory keeps up. Columns of no channel are zeros.
constexpr int64_t kPackedColumns = 32;

// Where the taps of the summed channel k lie for the vector of produced channels at `n`; taps are kPackedColumns apart.
inline int64_t packed_offset(int64_t n, int64_t k, int64_t K, int64_t n_taps) {
  return (n / kPackedColumns * K + k) * n_taps * kPackedColumns + n % kPackedColumns;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
  int64_t n, h, w, n_in, n_out, padding, taps;
  int64_t out_h() const { return h + 2 * padding - taps + 1; }
  int64_t out_w() const { return w + 2 * padding - taps + 1; }
};

// How a convolution is cut up: tiles in flight, and whether threads share them (or each has its own).
struct Plan {
  int tile;
  int64_t tiles;
  bool shared;
};

// Tiles are numbered over images, rows, columns.
struct TileGrid {
  int64_t tile, rows, columns, count;
  TileGrid(const Geometry& g, int64_t tile)
      : tile(tile), rows(ceil_div(g.out_h(), tile)), columns(ceil_div(g.out_w(), tile)),
        count(g.n * rows * columns) {}
  struct Place {
    int64_t image, top, left;  // of the tile's first output pixel
  };
  Place place(int64_t index) const {
    const int64_t column = index % columns, row = index / columns % rows;
    return {index / (columns * rows), row * tile, column * tile};
  }
};

// From one point to the next: not a power of two, so that a value's points do not share cache sets.
inline int64_t panel_stride(int64_t rows) { return rows * kPanel + 16; }

// Points of tiles: from a point, a strip of kStrip channels, a tile to the next.
struct Points {
  float* data;
  int64_t point, strip, tile;
  float* at(int64_t p, int64_t channel, int64_t t) const {
    return data + p * point + channel / kStrip * strip + t * tile + channel % kStrip;
  }
};

// A thread's own for one purpose (`Tag`), [P, tiles, channels]: for products that sum over channels. Rows are a little
// longer, so that those of 2^k floats do not share cache sets.
template <class F, class Tag>
Points points_by_tile(int64_t tiles, int64_t channels) {
  const int64_t row = ceil_div(channels, kStrip) * kStrip + 16;
  return {scratch<Tag>(F::kPoints * tiles * row), tiles * row, kStrip, row};
}

// The same as [P, strips, tiles, kStrip]: products that sum over tiles read whole lines, one after the other.
template <class F, class Tag>
Points points_by_strip(int64_t tiles, int64_t channels) {
  const int64_t strip = tiles * kStrip, point = ceil_div(channels, kStrip) * strip + 16;
  return {scratch<Tag>(F::kPoints * point), point, strip, kStrip};
}

// Dense images [N, H, W, channels].
struct Images {
  const float* data;
  int64_t h, w, channels;
};

// A window of SIDE×SIDE pixels as pointers; pixels outside the image point to zeros.
template <int SIDE>
struct Window {
  const float* pixel[SIDE][SIDE];
  Window(const Images& images, const float* zeros, int64_t image, int64_t top, int64_t left) {
    for (int i = 0; i < SIDE; ++i) {
      for (int j = 0; j < SIDE; ++j) {
        const int64_t y = top + i, x = left + j;
        const bool inside = y >= 0 && y < images.h && x >= 0 && x < images.w;
        pixel[i][j] =
            inside ? images.data + ((image * images.h + y) * images.w + x) * images.channels : zeros;
      }
    }
  }
};

struct ZerosTag {};
struct InputPointsTag {};

// At least `channels` zeros.
inline const float* zeros(int64_t channels) {
  float* z = scratch<ZerosTag>(channels + kLanes);
  std::memset(z, 0, sizeof(float) * (channels + kLanes));
  return z;
}

// Tiles [begin, end) of `points`, the first of which is tile `first` of the grid.
struct TileRange {
  Points points;
  int64_t first, begin, end;
};

// fn(pixels, out) for every vector of channels of these tiles: pixels(i, j) of the windows of SIDE×SIDE around each tile,
// with `margin` pixels before it, and where the vector's first point goes.
template <int SIDE, int TILE, class Fn>
inline __attribute__((always_inline)) void each_window(
    const TileGrid& grid, const Images& images, int64_t margin, const TileRange& range, const Fn& fn) {
  const float* zero = zeros(images.channels);
  const auto window_of = [&](int64_t t) {
    const auto at = grid.place(std::min(range.first + t, grid.count - 1));
    return Window<SIDE>(images, zero, at.image, at.top - margin, at.left - margin);
  };
  Window<SIDE> next = window_of(range.begin);
  for (int64_t t = range.begin; t < range.end; ++t) {
    const Window<SIDE> window = next;
    next = window_of(t + 1);
    const auto vector = [&](int64_t c, auto lanes) MTL_INLINED {
      // A tile ahead, what is new in it: the processor's own prefetcher loses its way between the rows of tiles.
      MTL_UNROLL for (int i = 0; i < SIDE; ++i)
        MTL_UNROLL for (int j = SIDE - TILE; j < SIDE; ++j) __builtin_prefetch(next.pixel[i][j] + c);
      fn([&](int i, int j) MTL_INLINED { return load_part(window.pixel[i][j] + c, lanes); }, range.points.at(0, c, t));
    };
    int64_t c = 0;
    for (; c + kLanes <= images.channels; c += kLanes) vector(c, std::integral_constant<int, kLanes>{});
    if (c < images.channels) vector(c, static_cast<int>(images.channels - c));
  }
}

// Stores a vector's points.
template <int PATCH>
struct PointStore {
  float* out;
  int64_t stride;
  inline __attribute__((always_inline)) void operator()(int i, int j, Vec point) const {
    store(out + (i * PATCH + j) * stride, point);
  }
};

// Bᵀ x B of these tiles of x [N, H, W, I].
template <class F>
void transform_input(const Geometry& g, const TileGrid& grid, const float* x, const TileRange& range) {
  const int64_t stride = range.points.point;
  each_window<F::kPatch, F::kTile>(grid, Images{x, g.h, g.w, g.n_in}, g.padding, range,
                                   [=](const auto& pixels, float* out) MTL_INLINED {
                                     F::input(pixels, PointStore<F::kPatch>{out, stride});
                                   });
}

// A dy Aᵀ of these tiles of dy [N, H', W', O].
template <class F>
void transform_output_gradient(const Geometry& g, const TileGrid& grid, const float* dy, const TileRange& range) {
  const int64_t stride = range.points.point;
  each_window<F::kTile, F::kTile>(grid, Images{dy, g.out_h(), g.out_w(), g.n_out}, 0, range,
                                  [=](const auto& pixels, float* out) MTL_INLINED {
                                    F::output_gradient(pixels, PointStore<F::kPatch>{out, stride});
                                  });
}

// Φ_S1 and γ/σ as factors of the taps [k, n], k the summed channels and n the produced ones.
struct Scaling {
  const float* scale = nullptr;  // scale[k·k_stride + n·n_stride]
  int64_t k_stride = 0, n_stride = 0;
  const float* k_factor = nullptr;  // [k]
  const float* n_factor = nullptr;  // [n]
  bool none() const { return scale == nullptr && k_factor == nullptr && n_factor == nullptr; }
};

// Packed taps of one convolution: K summed channels, N produced ones.
struct Filters {
  const float* taps;
  int64_t K, N;
  Scaling scaling;
};

// Transformed taps of so many channels are read from the last cache, and fetched ahead; fewer need no help (bench/NOTES.md).
constexpr int64_t kFarChannels = 256;

struct FactorsTag {};
struct FilterPointsTag {};

// Floats of a panel of transformed taps, and where those of a point begin.
template <class F>
int64_t panel_points(int64_t K) {
  return F::kFilterPoints * panel_stride(K);
}

template <class F>
const float* filter_point(const float* panel, int64_t point, int64_t K) {
  return panel + (F::kFilterPoints == 1 ? 0 : point * panel_stride(K));
}

// G(w ⊙ scale)Gᵀ of the columns from `n0` on -> u [kFilterPoints, K, kPanel], points panel_stride(K) apart.
template <class F>
void transform_filters(const Filters& f, int64_t n0, float* u) {
  constexpr int R = F::kTaps;
  const Scaling& s = f.scaling;
  const int64_t columns = std::min<int64_t>(kPanel, f.N - n0);
  const bool scaled = !s.none();
  float* factors = scratch<FactorsTag>(f.K * kPanel);
  if (scaled) {
    // A few rows at a time: a scale lies by outputs, its factors by inputs, and both sides should stay in cache.
    constexpr int64_t kBlock = 16;
    for (int64_t k0 = 0; k0 < f.K; k0 += kBlock) {
      for (int64_t n = 0; n < kPanel; ++n) {
        const float column = n >= columns ? 0.f : s.n_factor ? s.n_factor[n0 + n] : 1.f;
        for (int64_t k = k0; k < std::min(f.K, k0 + kBlock); ++k) {
          float value = column;
          if (s.scale && n < columns) value *= s.scale[k * s.k_stride + (n0 + n) * s.n_stride];
          if (s.k_factor) value *= s.k_factor[k];
          factors[k * kPanel + n] = value;
        }
      }
    }
  }
  for (int64_t k = 0; k < f.K; ++k) {
    // Ahead of the loads: the processor's own prefetcher does not keep up with so little work a row.
    constexpr int64_t kAhead = 4;
    for (int64_t column = 0; column < kPanel; column += 16) {
      for (int t = 0; t < R * R; ++t) {
        __builtin_prefetch(f.taps + packed_offset(n0 + column, k + kAhead, f.K, R * R) + t * kPackedColumns);
      }
    }
    for (int half = 0; half < kPanel; half += kLanes) {
      const float* w = f.taps + packed_offset(n0 + half, k, f.K, R * R);
      float* out = u + k * kPanel + half;
      const Vec factor = scaled ? load(factors + k * kPanel + half) : broadcast(1.f);
      if constexpr (R == 1) {
        store(out, load(w) * factor);
      } else {
        Vec taps[R][R], points[F::kPatch][F::kPatch];
        MTL_UNROLL for (int i = 0; i < R; ++i)
          MTL_UNROLL for (int j = 0; j < R; ++j) taps[i][j] = load(w + (i * R + j) * kPackedColumns) * factor;
        F::filter(taps, points);
        MTL_UNROLL for (int i = 0; i < F::kPatch; ++i)
          MTL_UNROLL for (int j = 0; j < F::kPatch; ++j)
            store(out + (i * F::kPatch + j) * panel_stride(f.K), points[i][j]);
      }
    }
  }
}

// The panels [begin, end) one after the other.
template <class F>
void transform_panels(const Filters& f, int64_t begin, int64_t end, float* u) {
  for (int64_t panel = begin; panel < end; ++panel) {
    transform_filters<F>(f, panel * kPanel, u + (panel - begin) * panel_points<F>(f.K));
  }
}

// All of them, by all threads.
template <class F>
float* transform_all_filters(const Filters& f) {
  const int64_t n_panels = ceil_div(f.N, kPanel), size = panel_points<F>(f.K);
  float* u = scratch<FilterPointsTag>(n_panels * size);
  at::parallel_for(0, n_panels, 1, [&](int64_t begin, int64_t end) {
    transform_panels<F>(f, begin, end, u + begin * size);
  });
  return u;
}

}  // namespace mtl
