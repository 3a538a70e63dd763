// One convolution: tiles to points, a matrix product a point, points to tiles with the epilogue.
#pragma once

#include "epilogue.h"

namespace mtl {

struct ProductsTag {};

// Points of the input: `n_tiles` tiles from `first` on, read by one thread or shared by all.
struct InputPoints {
  Points points;
  int64_t first, n_tiles;
  bool shared;
  TileRange range(int64_t begin, int64_t end) const { return {points, first, begin, end}; }
};

// What is read from far away after the product of `point` with the rows at tile `t`, K summed channels: the next rows of
// shared tiles; else the filters of the next point, a part of them beside each of the first rows.
template <class F>
Ahead far_ahead(const InputPoints& p, int64_t point, int64_t t, const float* filter, int64_t K) {
  if (p.shared) {
    const bool last = t + kRows >= p.n_tiles;
    return {last ? p.points.at((point + 1) % F::kPoints, 0, 0) : p.points.at(point, 0, t + kRows),
            kRows * p.points.tile / kLine};
  }
  const int64_t part = K / kStepsALine, begin = t / kRows * part, lines = K * kPanel / kLine;
  if (F::kFilterPoints == 1 || K < kFarChannels || begin >= lines) return {};
  return {filter + panel_stride(K) + begin * kLine, std::min(part, lines - begin)};
}

// Products and epilogue of these tiles, for the panel of channels at `o` and its transformed filters u.
template <class F>
void finish_panel(const Geometry& g, const TileGrid& grid, const Epilogue& e, const InputPoints& p, const float* u,
                  int64_t o, float* out, uint8_t* codes) {
  const int64_t m_stride = panel_stride(p.n_tiles);
  float* m = scratch<ProductsTag>(F::kPoints * m_stride);
  for (int64_t point = 0; point < F::kPoints; ++point) {
    const float* filter = filter_point<F>(u, point, g.n_in);
    // [n_tiles, I] @ [I, kPanel] -> [n_tiles, kPanel]
    for (int64_t t = 0; t < p.n_tiles; t += kRows) {
      product<Left::kRows>(
          {p.points.at(point, 0, t), p.points.tile, filter, kPanel, g.n_in,
           far_ahead<F>(p, point, t, filter, g.n_in)},
          static_cast<int>(std::min<int64_t>(kRows, p.n_tiles - t)), g.n_out - o,
          Kept{m + point * m_stride + t * kPanel, kPanel});
    }
  }
  alignas(kLine * sizeof(float)) float lines[F::kTile * F::kTile * kPanel];
  const bool by_lines = kStreams && kLanes < kLine && e.streams;
  for (int64_t t = 0; t < p.n_tiles; ++t) {
    const auto at = grid.place(p.first + t);
    for (int half = 0; half < kPanel && o + half < g.n_out; half += kLanes) {
      Vec y[F::kTile][F::kTile];
      const float* own = m + t * kPanel + half;
      F::output([=](int i, int j) MTL_INLINED { return load(own + (i * F::kPatch + j) * m_stride); }, y);
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, g.n_out - o - half));
      if (by_lines) {
        finish_tile<F::kTile, true>(e, g, at, o + half, lanes, y, lines + half, codes);
      } else {
        finish_tile<F::kTile>(e, g, at, o + half, lanes, y, out, codes);
      }
    }
    if (by_lines) stream_lines<F::kTile>(e, g, at, o, lines, out);
  }
}

// x [N, H, W, I] -> out, of the filters' N = O channels, by the plan.
template <class F>
void convolve(const Geometry& g, const Plan& plan, const Filters& filters, const Epilogue& e, const float* x,
              float* out, uint8_t* codes) {
  const TileGrid grid(g, F::kTile);
  const int64_t n_panels = ceil_div(g.n_out, kPanel), panel_size = panel_points<F>(g.n_in);
  if (plan.shared) {
    // Large filters: all threads work on the same tiles, each on its own panels of filters.
    const Points points = points_by_tile<F, InputPointsTag>(plan.tiles, g.n_in);
    for (int64_t first = 0; first < grid.count; first += plan.tiles) {
      const InputPoints p{points, first, std::min(plan.tiles, grid.count - first), true};
      at::parallel_for(0, p.n_tiles, 4, [&](int64_t begin, int64_t end) {
        transform_input<F>(g, grid, x, p.range(begin, end));
      });
      at::parallel_for(0, n_panels, 1, [&](int64_t begin, int64_t end) {
        float* u = scratch<FilterPointsTag>(panel_size);
        for (int64_t panel = begin; panel < end; ++panel) {
          transform_filters<F>(filters, panel * kPanel, u);
          finish_panel<F>(g, grid, e, p, u, panel * kPanel, out, codes);
        }
        end_streams();
      });
    }
    return;
  }
  // Small filters: transformed once, then every thread takes its own tiles through all of them.
  const float* u = transform_all_filters<F>(filters);
  // Whole rows of products are dealt out, not whole blocks, of which one thread may get many more; then each thread's
  // blocks are alike. No bit depends on where a block ends.
  at::parallel_for(0, ceil_div(grid.count, kRows), 1, [&](int64_t begin, int64_t end) {
    const Points points = points_by_tile<F, InputPointsTag>(plan.tiles, g.n_in);
    const int64_t rows = ceil_div(end - begin, ceil_div((end - begin) * kRows, plan.tiles));
    for (int64_t row = begin; row < end; row += rows) {
      const int64_t first = row * kRows, last = std::min(std::min(row + rows, end) * kRows, grid.count);
      const InputPoints p{points, first, last - first, false};
      transform_input<F>(g, grid, x, p.range(0, p.n_tiles));
      for (int64_t panel = 0; panel < n_panels; ++panel) {
        finish_panel<F>(g, grid, e, p, u + panel * panel_size, panel * kPanel, out, codes);
      }
    }
    end_streams();
  });
}

// Calls fn with the Winograd type that plan and taps ask for.
template <class Fn>
void with_tile(const Plan& plan, int64_t taps, const Fn& fn) {
  if (taps == 1) return fn(Winograd<4, 1>{});
  if (plan.tile == 2) return fn(Winograd<2, 3>{});
  if (plan.tile == 6) return fn(Winograd<6, 3>{});
  return fn(Winograd<4, 3>{});
}

}  // namespace mtl
