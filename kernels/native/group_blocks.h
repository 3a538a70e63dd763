// Batch statistics of groups of images: how images are cut into blocks, and the mean and variance over them.
//
// A block is some rows of one image, small enough for a cache, its size given by the shape alone: sums within a
// block and then over the blocks in order are the same bits for any number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "scratch.h"
#include "tiles.h"

namespace mtl {

// Neighbouring images [N, H, W, C] in groups of one size; masked-out images count for nothing.
struct Groups {
  int64_t n, h, w, channels, count;
  const bool* mask = nullptr;  // [N]

  bool counts(int64_t image) const { return mask == nullptr || mask[image]; }
  int64_t size() const { return n / count; }
  int64_t of(int64_t image) const { return image / size(); }
  // Of tables and partial sums: whole vectors.
  int64_t row() const { return ceil_div(channels, kLanes) * kLanes; }
};

struct Block {
  int64_t image, top, bottom;
};

// Numbered over images, then rows; every block but an image's last has an even number of rows, as pooling asks.
class Blocks {
 public:
  explicit Blocks(const Groups& g) : h_(g.h), values_(g.w * g.channels) {
    rows_ = std::max<int64_t>(kBlockValues / std::max<int64_t>(values_, 1) / 2 * 2, 2);
    per_image_ = ceil_div(h_, rows_);
    count_ = g.n * per_image_;
  }
  int64_t per_image() const { return per_image_; }
  Block operator[](int64_t index) const {
    const int64_t top = index % per_image_ * rows_;
    return {index / per_image_, top, std::min(top + rows_, h_)};
  }
  int64_t count() const { return count_; }

  // f(block, its number), the blocks in parallel.
  template <class F>
  void each(const F& f) const {
    const int64_t grain = std::max<int64_t>(kLeastValues / std::max<int64_t>(values_ * std::min(rows_, h_), 1), 1);
    at::parallel_for(0, count_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f((*this)[i], i);
    });
  }

 private:
  static constexpr int64_t kBlockValues = 16384;
  static constexpr int64_t kLeastValues = 32768;  // below, starting a thread costs more than it saves
  int64_t h_, values_, rows_, per_image_, count_;
};

// Of K vectors of channels over n pixels, `stride` apart: the first pixel, the mean's distance from it, Σ(z − mean)².
// Everything is measured from the first pixel: a large mean costs no digits, a constant channel has no variance.
template <int K>
void pixel_statistics(const float* z, int64_t n, int64_t stride, int lanes, float* first, float* apart, float* squares) {
  const auto vector = [&](int64_t pixel, int k) {
    const float* from = z + pixel * stride + k * kLanes;
    return K > 1 ? load(from) : load_part(from, lanes);
  };
  Vec origin[K], offset[K]{}, sums[K]{};
  MTL_UNROLL for (int k = 0; k < K; ++k) origin[k] = vector(0, k);
  for (int64_t i = 1; i < n; ++i) {
    MTL_UNROLL for (int k = 0; k < K; ++k) offset[k] = offset[k] + (vector(i, k) - origin[k]);
  }
  MTL_UNROLL for (int k = 0; k < K; ++k) offset[k] = offset[k] / static_cast<float>(n);
  for (int64_t i = 0; i < n; ++i) {
    MTL_UNROLL for (int k = 0; k < K; ++k) {
      const Vec deviation = (vector(i, k) - origin[k]) - offset[k];
      sums[k] = sums[k] + deviation * deviation;
    }
  }
  MTL_UNROLL for (int k = 0; k < K; ++k) {
    store(first + k * kLanes, origin[k]);
    store(apart + k * kLanes, offset[k]);
    store(squares + k * kLanes, sums[k]);
  }
}

struct BlockStatisticsTag {};
struct BlockSumsTag {};

// Of z [N, H, W, C] -> mean and biased variance [G, C] and the number of values a channel [G].
// Chan, Golub, LeVeque 1983: Σ(z − mean)² = Σ over blocks of squares + n·(block's mean − mean)².
inline void group_statistics(const Groups& g, const float* z, float* mean, float* var, float* n_values) {
  const Blocks blocks(g);
  const int64_t row = g.row();
  float* partial = scratch<BlockStatisticsTag>(blocks.count() * 3 * row);
  const auto pixels = [&](const Block& b) { return g.counts(b.image) ? (b.bottom - b.top) * g.w : 0; };
  blocks.each([&](const Block& b, int64_t index) {
    const int64_t n = pixels(b);
    if (n == 0) return;
    const float* from = z + (b.image * g.h + b.top) * g.w * g.channels;
    float *first = partial + index * 3 * row, *apart = first + row, *squares = apart + row;
    int64_t c = 0;
    for (; c + 4 * kLanes <= g.channels; c += 4 * kLanes) {
      pixel_statistics<4>(from + c, n, g.channels, kLanes, first + c, apart + c, squares + c);
    }
    for (; c < g.channels; c += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, g.channels - c));
      pixel_statistics<1>(from + c, n, g.channels, lanes, first + c, apart + c, squares + c);
    }
  });
  const int64_t each = blocks.per_image() * g.size();
  const auto block_mean = [&](int64_t i, int64_t c) {
    return static_cast<double>(partial[i * 3 * row + c]) + partial[(i * 3 + 1) * row + c];
  };
  at::parallel_for(0, g.count, std::max<int64_t>(32768 / (each * row + 1), 1), [&](int64_t begin, int64_t end) {
    std::vector<double> center(g.channels), squares(g.channels);
    for (int64_t group = begin; group < end; ++group) {
      double total = 0;
      std::fill(center.begin(), center.end(), 0);
      std::fill(squares.begin(), squares.end(), 0);
      for (int64_t i = group * each; i < (group + 1) * each; ++i) {
        const double n = static_cast<double>(pixels(blocks[i]));
        if (n == 0) continue;
        total += n;
        for (int64_t c = 0; c < g.channels; ++c) center[c] += n * block_mean(i, c);
      }
      for (double& m : center) m /= total;
      for (int64_t i = group * each; i < (group + 1) * each; ++i) {
        const double n = static_cast<double>(pixels(blocks[i]));
        if (n == 0) continue;
        for (int64_t c = 0; c < g.channels; ++c) {
          const double apart = block_mean(i, c) - center[c];
          squares[c] += partial[(i * 3 + 2) * row + c] + n * apart * apart;
        }
      }
      for (int64_t c = 0; c < g.channels; ++c) {
        mean[group * g.channels + c] = static_cast<float>(center[c]);
        var[group * g.channels + c] = static_cast<float>(squares[c] / total);
      }
      n_values[group] = static_cast<float>(total);
    }
  });
}

// Partial sums [blocks, 2, C⁺] of `blocks` -> [G, 2, C⁺], added in order.
inline void add_blocks(const Groups& g, const Blocks& blocks, const float* partial, float* sums) {
  const int64_t row = 2 * g.row(), each = blocks.per_image() * g.size();
  std::vector<double> total(row);
  for (int64_t group = 0; group < g.count; ++group) {
    std::fill(total.begin(), total.end(), 0);
    for (int64_t i = group * each; i < (group + 1) * each; ++i) {
      if (!g.counts(blocks[i].image)) continue;
      for (int64_t c = 0; c < row; ++c) total[c] += partial[i * row + c];
    }
    for (int64_t c = 0; c < row; ++c) sums[group * row + c] = static_cast<float>(total[c]);
  }
}

}  // namespace mtl
