// Gradient of the taps, or of their scale, from the points of input and output gradient.
#pragma once

#include "tiles.h"

namespace mtl {

struct GradientPointsTag {};
struct BlockTag {};
struct SlicesTag {};

// Gᵀ dU G of a block of rows i [n_rows] by the panel at `o`, times the taps and summed (or whole), to `out`:
// added, or as its `first` value.
template <class F>
void finish_block(const float* du, int n_rows, int64_t i0, int64_t o, int64_t n_in, int64_t n_out,
                  const float* taps, int64_t columns, bool whole, bool first, float* out) {
  constexpr int R = F::kTaps, P = F::kPatch;
  for (int r = 0; r < n_rows; ++r) {
    for (int half = 0; half < kPanel; half += kLanes) {
      const int64_t column = o + half;
      if (column >= n_out) break;
      const float* from = du + r * kPanel + half;
      Vec dw[R][R];
      if constexpr (R == 1) {
        dw[0][0] = Vec{};
        for (int point = 0; point < F::kPoints; ++point) dw[0][0] = dw[0][0] + load(from + point * kRows * kPanel);
      } else {
        Vec points[P][P];
        MTL_UNROLL for (int i = 0; i < P; ++i)
          MTL_UNROLL for (int j = 0; j < P; ++j) points[i][j] = load(from + (i * P + j) * kRows * kPanel);
        F::filter_gradient(points, dw);
      }
      const int64_t packed = packed_offset(column, i0 + r, n_in, R * R);
      if (whole) {
        float* to = out + packed;
        for (int t = 0; t < R * R; ++t) {
          const Vec before = first ? Vec{} : load(to + t * kPackedColumns);
          store(to + t * kPackedColumns, before + dw[t / R][t % R]);
        }
      } else {
        float* to = out + (i0 + r) * columns + column;
        Vec total = first ? Vec{} : load(to);
        for (int t = 0; t < R * R; ++t) total = total + load(taps + packed + t * kPackedColumns) * dw[t / R][t % R];
        store(to, total);
      }
    }
  }
}

// Points of `n_tiles` tiles from `first` on: v of the input, d of the output's gradient.
struct GradientPoints {
  float *v, *d;
  int64_t row_v, row_d, stride_v, stride_d, n_tiles;
};

// Rows whose products are made point after point. Six rows use 24 bytes of each line of the input's points: in groups,
// whole lines are used while they are near. Twelve use most of a line as they are.
constexpr int64_t kGroupRows = kRows < 12 ? ceil_div(64, kRows) * kRows : kRows;

// The products of the rows of group `group` and panel `panel`, to `out` as in `finish_block`.
template <class F>
void gradient_block(const Geometry& g, const GradientPoints& p, int64_t group, int64_t panel, const float* taps,
                    int64_t columns, bool whole, bool first, float* out) {
  constexpr int64_t kBlock = F::kPoints * kRows * kPanel;
  const int64_t o = panel * kPanel, start = group * kGroupRows, end = std::min(start + kGroupRows, g.n_in);
  float* du = scratch<BlockTag>(kGroupRows / kRows * kBlock);
  const auto n_rows = [end](int64_t i0) { return static_cast<int>(std::min<int64_t>(kRows, end - i0)); };
  for (int64_t point = 0; point < F::kPoints; ++point) {
    for (int64_t i0 = start; i0 < end; i0 += kRows) {
      // [n_tiles, rows]ᵀ @ [n_tiles, kPanel] -> [rows, kPanel]
      product<Left::kTransposed>({p.v + point * p.stride_v + i0, p.row_v, p.d + point * p.stride_d + o, p.row_d,
                                  p.n_tiles, du + (i0 - start) / kRows * kBlock + point * kRows * kPanel, kPanel},
                                 n_rows(i0), g.n_out - o);
    }
  }
  for (int64_t i0 = start; i0 < end; i0 += kRows) {
    finish_block<F>(du + (i0 - start) / kRows * kBlock, n_rows(i0), i0, o, g.n_in, g.n_out, taps, columns, whole, first,
                    out);
  }
}

// out as packed taps (whole: dL/dW) or [I, columns] (Σ_taps W·dL/dW); columns of no output
// stay as they are, and so does everything where there are no pixels.
template <class F>
void weight_gradient(const Geometry& g, const Plan& plan, const float* x, const float* dz, const float* taps,
                     int64_t columns, bool whole, float* out) {
  const TileGrid grid(g, F::kTile);
  if (grid.count == 0) return;
  const int64_t row_v = points_row(g.n_in), row_d = points_row(ceil_div(g.n_out, kPanel) * kPanel);
  const int64_t stride_v = plan.tiles * row_v, stride_d = plan.tiles * row_d;
  const int64_t n_panels = ceil_div(g.n_out, kPanel), n_groups = ceil_div(g.n_in, kGroupRows);
  const auto points = [&](int64_t n_tiles) {
    return GradientPoints{scratch<InputPointsTag>(F::kPoints * stride_v),
                          scratch<GradientPointsTag>(F::kPoints * stride_d),
                          row_v, row_d, stride_v, stride_d, n_tiles};
  };
  const auto transform = [&](const GradientPoints& p, int64_t first, int64_t begin, int64_t end) {
    transform_input<F>(g, grid, x, first + begin, first + end, p.v + begin * row_v, row_v, stride_v);
    transform_output_gradient<F>(g, grid, dz, first + begin, first + end, p.d + begin * row_d, row_d, stride_d);
  };
  if (plan.shared) {
    // Many products a tile: threads share the tiles, each has its own blocks of the gradient.
    const int64_t n_parts = ceil_div(grid.count, plan.tiles), part = ceil_div(grid.count, n_parts);
    for (int64_t first = 0; first < grid.count; first += part) {
      const GradientPoints p = points(std::min(part, grid.count - first));
      at::parallel_for(0, p.n_tiles, 4, [&](int64_t begin, int64_t end) { transform(p, first, begin, end); });
      at::parallel_for(0, n_panels * n_groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          gradient_block<F>(g, p, item % n_groups, item / n_groups, taps, columns, whole, first == 0, out);
        }
      });
    }
    return;
  }
  // Few products a tile: tiles in a fixed number of slices, each with a sum of its own, added in order.
  constexpr int64_t kSlices = 16;
  const int64_t n_parts = ceil_div(grid.count, plan.tiles), n_slices = std::min(kSlices, n_parts);
  const int64_t size = g.n_in * columns * (whole ? F::kTaps * F::kTaps : 1);
  float* partial = scratch<SlicesTag>(n_slices * size);
  at::parallel_for(0, n_slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      float* own = partial + slice * size;
      if (columns != g.n_out) std::memset(own, 0, sizeof(float) * size);
      const int64_t start = n_parts * slice / n_slices;
      for (int64_t part = start; part < n_parts * (slice + 1) / n_slices; ++part) {
        const int64_t first = part * plan.tiles;
        const GradientPoints p = points(std::min(plan.tiles, grid.count - first));
        transform(p, first, 0, p.n_tiles);
        for (int64_t group = 0; group < n_groups; ++group)
          for (int64_t panel = 0; panel < n_panels; ++panel)
            gradient_block<F>(g, p, group, panel, taps, columns, whole, part == start, own);
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
