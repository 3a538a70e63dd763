// Which tile, how many of them at a time, shared by the threads or not. Chosen by measurement (bench/NOTES.md).
// Plans depend on shapes alone, never on the number of threads: any number gives the same bits.
//
//   map                       84, 42, 21   10     32, 16, 8   512 @ 4   4    2
//   tile                      6            4      4           4         4    2
//   tiles, forward            24           48     24          192       24   24
//   tiles, scale gradient     60           60     60          192       60   60
//   tiles, weight gradient    60           60     60          60        60   60
//
// 512 @ 4 (and 256 → 512) stands for few tiles in all of filters that outgrow the caches when transformed: threads share
// their tiles, all at once, so that filters are transformed once. 192 goes with every scale gradient of more than
// 512 × 512 channels, whose filters are transformed anew for so many tiles; 48 forward with other filters of more than
// 256 × 256.
#pragma once

#include "tiles.h"

namespace mtl {

// Products a channel pair and image with tiles of `tile`.
inline int64_t products(const Geometry& g, int64_t tile) {
  return ceil_div(g.out_h(), tile) * ceil_div(g.out_w(), tile) * (tile + 2) * (tile + 2);
}

inline int best_tile(const Geometry& g) {
  if (g.taps == 1) return 4;
  const int64_t by_four = products(g, 4);
  if (products(g, 2) < by_four) return 2;
  // Sixes round a little more and their filters are 1.8 times as large: they must save a good part of the products.
  const bool small_filters = g.n_in * g.n_out <= 256 * 256;
  return small_filters && products(g, 6) * 10 < by_four * 9 ? 6 : 4;
}

inline bool few_tiles_of_large_filters(const Geometry& g, int tile) {
  const int64_t tiles = g.n * ceil_div(g.out_h(), tile) * ceil_div(g.out_w(), tile);
  return g.taps == 3 && tiles <= 192 && g.n_in * g.n_out >= 256 * 512;
}

inline Plan forward_plan(const Geometry& g) {
  const int tile = best_tile(g);
  if (few_tiles_of_large_filters(g, tile)) return {tile, 192, true};
  return {tile, g.n_in * g.n_out > 256 * 256 ? 48 : 24, false};
}

// `whole`: a weight gradient is kept, nine values where its scale needs one.
inline Plan gradient_plan(const Geometry& g, bool whole) {
  const int tile = best_tile(g);
  const bool slices_fit = g.n_in * g.n_out * (whole ? g.taps * g.taps : 1) <= 512 * 512;
  const bool shared = few_tiles_of_large_filters(g, tile) || !slices_fit;
  return {tile, shared && !whole ? 192 : 60, shared};
}

}  // namespace mtl
