// Gradient of the taps, or of their scale, from the points of input and output gradient, U the transformed taps:
//
//   dL/dW = Gᵀ dU G            dU[ξ] = Σ_tiles V[ξ]ᵀ dM[ξ]
//   Σ_taps W·dL/dW = Σ_ξ U[ξ]·dU[ξ]      so that a product's block is done with in registers, a point after the other
#pragma once

#include "tiles.h"

namespace mtl {

struct GradientPointsTag {};
struct BlockTag {};
struct SlicesTag {};

// Rows whose products are made point after point: they lie in one strip.
constexpr int64_t kGroupRows = kLine;

// Gᵀ dU G of a block of rows i [n_rows] by the panel at `o`, to packed taps `out`: added, or as its `first` value.
template <class F>
void finish_block(const float* du, int n_rows, int64_t i0, int64_t o, int64_t n_in, int64_t n_out, bool first,
                  float* out) {
  constexpr int R = F::kTaps, P = F::kPatch;
  for (int r = 0; r < n_rows; ++r) {
    for (int half = 0; half < kPanel; half += kLanes) {
      const int64_t column = o + half;
      if (column >= n_out) break;
      const float* from = du + r * kPanel + half;
      Vec dw[R][R];
      if constexpr (R == 1) {
        dw[0][0] = Vec{};
        for (int point = 0; point < F::kPoints; ++point) dw[0][0] = dw[0][0] + load(from + point * kGroupRows * kPanel);
      } else {
        Vec points[P][P];
        MTL_UNROLL for (int i = 0; i < P; ++i)
          MTL_UNROLL for (int j = 0; j < P; ++j) points[i][j] = load(from + (i * P + j) * kGroupRows * kPanel);
        F::filter_gradient(points, dw);
      }
      float* to = out + packed_offset(column, i0 + r, n_in, R * R);
      for (int t = 0; t < R * R; ++t) {
        const Vec before = first ? Vec{} : load(to + t * kPackedColumns);
        store(to + t * kPackedColumns, before + dw[t / R][t % R]);
      }
    }
  }
}

// Points of `n_tiles` tiles: of the input and of the output's gradient.
struct GradientPoints {
  Points v, d;
  int64_t n_tiles;
  // Of the product of a point from input `i` and output `o` on.
  Factors factors(int64_t point, int64_t i, int64_t o) const {
    return {v.at(point, i, 0), v.tile, d.at(point, o, 0), d.tile, n_tiles};
  }
};

// dL/dW of the rows of group `group` and panel `panel`, to `out` as in `finish_block`.
template <class F>
void weight_block(const Geometry& g, const GradientPoints& p, int64_t group, int64_t panel, bool first, float* out) {
  const int64_t o = panel * kPanel, start = group * kGroupRows, end = std::min(start + kGroupRows, g.n_in);
  float* du = scratch<BlockTag>(F::kPoints * kGroupRows * kPanel);
  for (int64_t point = 0; point < F::kPoints; ++point) {
    for (int64_t i0 = start; i0 < end; i0 += kRows) {
      // [n_tiles, rows]ᵀ @ [n_tiles, kPanel] -> [rows, kPanel]
      product<Left::kTransposed>(p.factors(point, i0, o), static_cast<int>(std::min<int64_t>(kRows, end - i0)),
                                 g.n_out - o, Kept{du + (point * kGroupRows + i0 - start) * kPanel, kPanel});
    }
  }
  finish_block<F>(du, static_cast<int>(end - start), start, o, g.n_in, g.n_out, first, out);
}

// What is done with the blocks of dU: times U [rows, kPanel], added to c [rows, ldc].
struct Weighted {
  const float* u;
  float* c;
  int64_t ldc;
  void operator()(int row, int column, Vec product) const {
    float* to = c + row * ldc + column;
    store(to, load(to) + product * load(u + row * kPanel + column));
  }
};

// Σ_taps W·dL/dW of the panels [begin, end), added to out [I, columns]; u: their transformed taps.
template <class F>
void scale_block(const Geometry& g, const GradientPoints& p, int64_t begin, int64_t end, const float* u,
                 int64_t columns, float* out) {
  for (int64_t point = 0; point < F::kPoints; ++point) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* taps = filter_point<F>(u + (panel - begin) * panel_points<F>(g.n_in), point, g.n_in);
      const int64_t o = panel * kPanel;
      for (int64_t strip = 0; strip < g.n_in; strip += kStrip) {
        const int64_t last = std::min(strip + kStrip, g.n_in);
        for (int64_t i0 = strip; i0 < last; i0 += kRows) {
          Factors factors = p.factors(point, i0, o);
          if (g.n_in >= kFarChannels) factors.ahead = {taps + (i0 + kRows) * kPanel, kRows * kPanel / kLine};
          product<Left::kTransposed>(factors, static_cast<int>(std::min<int64_t>(kRows, last - i0)), g.n_out - o,
                                     Weighted{taps + i0 * kPanel, out + i0 * columns + o, columns});
        }
      }
    }
  }
}

// How the gradient of taps or scales is cut into blocks, each added up by one thread at a time.
template <class F>
class GradientBlocks {
 public:
  // taps: of the scale's gradient; null: their own gradient is wanted. shared: blocks are dealt out to threads.
  GradientBlocks(const Geometry& g, const float* taps, int64_t columns, bool shared)
      : g_(g), columns_(columns), n_panels_(ceil_div(g.n_out, kPanel)), n_groups_(ceil_div(g.n_in, kGroupRows)),
        filters_{taps, g.n_in, g.n_out, {}} {
    if (taps == nullptr) return;
    // Sums that stay in the second cache, beside a point of input and output; where threads share the tiles, as many for
    // each, so that the points are read once. No bit depends on it.
    constexpr int64_t kSums = int64_t{1} << 16;
    panels_ = shared ? ceil_div(n_panels_, at::get_num_threads())
                     : std::max<int64_t>(kSums / (std::max<int64_t>(g.n_in, 1) * kPanel), 1);
    if (!shared) u_ = transform_all_filters<F>(filters_);
  }
  int64_t count() const { return filters_.taps ? ceil_div(n_panels_, panels_) : n_panels_ * n_groups_; }
  // Floats of the result.
  int64_t size() const { return g_.n_in * columns_ * (filters_.taps ? 1 : F::kTaps * F::kTaps); }

  // Adds what the tiles bring to block `index` of `out`, or (`first`) writes it.
  void add(int64_t index, const GradientPoints& p, bool first, float* out) const {
    if (filters_.taps == nullptr) return weight_block<F>(g_, p, index % n_groups_, index / n_groups_, first, out);
    const int64_t begin = index * panels_, end = std::min(begin + panels_, n_panels_), o = begin * kPanel;
    if (first) {
      for (int64_t i = 0; i < g_.n_in; ++i) std::fill_n(out + i * columns_ + o, (end - begin) * kPanel, 0.f);
    }
    scale_block<F>(g_, p, begin, end, points_of(begin, end), columns_, out);
  }

 private:
  // The transformed taps of the panels [begin, end).
  const float* points_of(int64_t begin, int64_t end) const {
    const int64_t size = panel_points<F>(g_.n_in);
    if (u_) return u_ + begin * size;
    float* u = scratch<FilterPointsTag>(panels_ * size);
    transform_panels<F>(filters_, begin, end, u);
    return u;
  }

  Geometry g_;
  int64_t columns_, n_panels_, n_groups_, panels_ = 1;
  Filters filters_;
  const float* u_ = nullptr;
};

// out as packed taps (dL/dW) or, where taps are given, [I, columns] (Σ_taps W·dL/dW); columns of no output
// stay as they are or become zeros; where there are no pixels, everything stays.
template <class F>
void weight_gradient(const Geometry& g, const Plan& plan, const float* x, const float* dz, const float* taps,
                     int64_t columns, float* out) {
  const TileGrid grid(g, F::kTile);
  if (grid.count == 0) return;
  const GradientBlocks<F> blocks(g, taps, columns, plan.shared);
  const auto points = [&](int64_t n_tiles) {
    return GradientPoints{points_by_strip<F, InputPointsTag>(plan.tiles, g.n_in),
                          points_by_strip<F, GradientPointsTag>(plan.tiles, g.n_out), n_tiles};
  };
  const auto transform = [&](const GradientPoints& p, int64_t first, int64_t begin, int64_t end) {
    transform_input<F>(g, grid, x, {p.v, first, begin, end});
    transform_output_gradient<F>(g, grid, dz, {p.d, first, begin, end});
  };
  if (plan.shared) {
    // Many products a tile: threads share the tiles, each has its own blocks of the gradient.
    const int64_t n_parts = ceil_div(grid.count, plan.tiles), part = ceil_div(grid.count, n_parts);
    for (int64_t first = 0; first < grid.count; first += part) {
      const GradientPoints p = points(std::min(part, grid.count - first));
      at::parallel_for(0, p.n_tiles, 4, [&](int64_t begin, int64_t end) { transform(p, first, begin, end); });
      at::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) blocks.add(block, p, first == 0, out);
      });
    }
    return;
  }
  // Few products a tile: tiles in a fixed number of slices, each with a sum of its own, added in order.
  constexpr int64_t kSlices = 16;
  // Parts are alike, and as a rule an even number of them: of nine, two threads would take five and four.
  const int64_t part = ceil_div(grid.count, 2 * ceil_div(grid.count, 2 * plan.tiles));
  const int64_t n_parts = ceil_div(grid.count, part), n_slices = std::min(kSlices, n_parts), size = blocks.size();
  float* partial = scratch<SlicesTag>(n_slices * size);
  at::parallel_for(0, n_slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      float* own = partial + slice * size;
      if (columns != g.n_out) std::memset(own, 0, sizeof(float) * size);
      const int64_t start = n_parts * slice / n_slices;
      for (int64_t i = start; i < n_parts * (slice + 1) / n_slices; ++i) {
        const int64_t first = i * part;
        const GradientPoints p = points(std::min(part, grid.count - first));
        transform(p, first, 0, p.n_tiles);
        for (int64_t block = 0; block < blocks.count(); ++block) blocks.add(block, p, i == start, own);
      }
    }
  });
  at::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    std::copy(partial + begin, partial + end, out + begin);
    for (int64_t slice = 1; slice < n_slices; ++slice)
      for (int64_t i = begin; i < end; ++i) out[i] += partial[slice * size + i];
  });
}

}  // namespace mtl
