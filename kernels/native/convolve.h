// One convolution: tiles to points, a matrix product a point, points to tiles with the epilogue.
#pragma once

#include "epilogue.h"

namespace mtl {

struct ProductsTag {};

// Products and epilogue of `n_tiles` tiles from `first` on, for the panel of channels at `o`.
template <class F>
void finish_panel(const Geometry& g, const TileGrid& grid, const Epilogue& e, int64_t first, int64_t n_tiles,
                  const float* v, int64_t row, int64_t stride, const float* u, int64_t o, float* out,
                  uint8_t* codes) {
  const int64_t m_stride = panel_stride(n_tiles);
  float* m = scratch<ProductsTag>(F::kPoints * m_stride);
  for (int64_t point = 0; point < F::kPoints; ++point) {
    const float* filter = filter_point<F>(u, point, g.n_in);
    // [n_tiles, I] @ [I, kPanel] -> [n_tiles, kPanel]
    for (int64_t t = 0; t < n_tiles; t += kRows) {
      product<Left::kRows>({v + point * stride + t * row, row, filter, kPanel, g.n_in},
                           static_cast<int>(std::min<int64_t>(kRows, n_tiles - t)), g.n_out - o,
                           Kept{m + point * m_stride + t * kPanel, kPanel});
    }
  }
  alignas(kLine * sizeof(float)) float lines[F::kTile * F::kTile * kPanel];
  const bool by_lines = kStreams && kLanes < kLine && e.streams;
  for (int64_t t = 0; t < n_tiles; ++t) {
    const auto at = grid.place(first + t);
    for (int half = 0; half < kPanel && o + half < g.n_out; half += kLanes) {
      Vec points[F::kPatch][F::kPatch], y[F::kTile][F::kTile];
      MTL_UNROLL for (int i = 0; i < F::kPatch; ++i)
        MTL_UNROLL for (int j = 0; j < F::kPatch; ++j)
          points[i][j] = load(m + (i * F::kPatch + j) * m_stride + t * kPanel + half);
      F::output(points, y);
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
  const int64_t row = points_row(g.n_in), stride = plan.tiles * row;
  if (plan.shared) {
    // Large filters: all threads work on the same tiles, each on its own panels of filters.
    float* v = scratch<InputPointsTag>(F::kPoints * stride);
    for (int64_t first = 0; first < grid.count; first += plan.tiles) {
      const int64_t n_tiles = std::min(plan.tiles, grid.count - first);
      at::parallel_for(0, n_tiles, 4, [&](int64_t begin, int64_t end) {
        transform_input<F>(g, grid, x, first + begin, first + end, v + begin * row, row, stride);
      });
      at::parallel_for(0, n_panels, 1, [&](int64_t begin, int64_t end) {
        float* u = scratch<FilterPointsTag>(panel_size);
        for (int64_t panel = begin; panel < end; ++panel) {
          transform_filters<F>(filters, panel * kPanel, u);
          finish_panel<F>(g, grid, e, first, n_tiles, v, row, stride, u, panel * kPanel, out, codes);
        }
        end_streams();
      });
    }
    return;
  }
  // Small filters: transformed once, then every thread takes its own tiles through all of them.
  const float* u = transform_all_filters<F>(filters);
  at::parallel_for(0, ceil_div(grid.count, plan.tiles), 1, [&](int64_t begin, int64_t end) {
    float* v = scratch<InputPointsTag>(F::kPoints * stride);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * plan.tiles, n_tiles = std::min(plan.tiles, grid.count - first);
      transform_input<F>(g, grid, x, first, first + n_tiles, v, row, stride);
      for (int64_t panel = 0; panel < n_panels; ++panel) {
        finish_panel<F>(g, grid, e, first, n_tiles, v, row, stride, u + panel * panel_size, panel * kPanel, out,
                        codes);
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
