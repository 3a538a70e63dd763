// `episode_norm` on CPUs: batch statistics per group of images, and the epilogue in the pass that normalises.
// Contract: mtl_fast/ops/episode_norm.py; autograd: mtl_fast/ops/_episode_norm_native.py.
//
// With x̂ = (z − mean)/σ, σ = √(var + eps), d = dL/d(γ·x̂ + β) through pooling and activation, m values a channel:
//
//   dL/dβ = Σ d      dL/dγ = Σ d·x̂      dL/dz = γ/σ·(d − Σ_g d/m − x̂·Σ_g d·x̂/m)
//
// d is unwound twice, for the sums and for dz: writing and reading it back would move more memory.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <type_traits>

#include "group_blocks.h"
#include "operands.h"
#include "unwind.h"

namespace mtl {
namespace {

struct TablesTag {};

Groups groups(const at::Tensor& z, int64_t n_groups, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(z.dim() == 4 && n_groups > 0 && z.size(0) % n_groups == 0, "episode_norm: ", z.sizes(), " in ",
              n_groups, " groups");
  TORCH_CHECK(!mask || (mask->numel() == z.size(0) && mask->is_contiguous()), "episode_norm: mask of the wrong shape");
  return {z.size(0), z.size(2), z.size(3), z.size(1), n_groups, mask ? mask->const_data_ptr<bool>() : nullptr};
}

// A 1×1 "convolution" of the same images: what the epilogue's tiles are cut from.
Geometry images_of(const Groups& g) { return {g.n, g.h, g.w, g.channels, g.channels, 0, 1}; }

// f(place, o, lanes) for every 2×2 tile of a block and every vector of channels; whole ones with a constant for
// lanes, so that the compiler makes them a case of their own.
template <class F>
void each_tile(const Groups& g, const Block& b, const F& f) {
  for (int64_t top = b.top; top < b.bottom; top += 2) {
    for (int64_t left = 0; left < g.w; left += 2) {
      const TileGrid::Place at{b.image, top, left};
      int64_t o = 0;
      for (; o + kLanes <= g.channels; o += kLanes) f(at, o, std::integral_constant<int, kLanes>());
      if (o < g.channels) f(at, o, static_cast<int>(g.channels - o));
    }
  }
}

// f(i, j, offset) for every pixel of a tile that lies in its image.
template <class F>
void each_pixel(const Groups& g, const TileGrid::Place& at, int64_t o, const F& f) {
  MTL_UNROLL for (int i = 0; i < 2; ++i) {
    MTL_UNROLL for (int j = 0; j < 2; ++j) {
      if (at.top + i < g.h && at.left + j < g.w) {
        f(i, j, ((at.image * g.h + at.top + i) * g.w + at.left + j) * g.channels + o);
      }
    }
  }
}

// 1/σ [G, C⁺] of variances [G, C].
void inverse_deviations(const Groups& g, const float* var, double eps, float* out) {
  for (int64_t group = 0; group < g.count; ++group) {
    for (int64_t c = 0; c < g.channels; ++c) {
      out[group * g.row() + c] = static_cast<float>(1 / std::sqrt(var[group * g.channels + c] + eps));
    }
  }
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Output, mean [G, C], variance [G, C], values a channel [G], codes of the output (no images unless `save`).
Outputs forward(const at::Tensor& z, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                double eps, int64_t n_groups, const std::optional<at::Tensor>& mask,
                const std::optional<at::Tensor>& residual, int64_t activation, double slope, bool pool, bool save) {
  const at::Tensor images = channels_last(z);
  const Groups g = groups(images, n_groups, mask);
  const Operand gamma(weight), beta(bias);
  const at::Tensor added = residual ? channels_last(*residual) : at::Tensor();
  const int64_t h = pool ? g.h / 2 : g.h, w = pool ? g.w / 2 : g.w;
  at::Tensor out = new_images({g.n, g.channels, h, w}, images.options());
  at::Tensor codes = new_images({save ? g.n : 0, g.channels, h, w}, images.options().dtype(at::kByte));
  at::Tensor mean = at::empty({n_groups, g.channels}, images.options()), var = at::empty_like(mean);
  at::Tensor n_values = at::empty({n_groups}, images.options());
  const float* from = images.const_data_ptr<float>();
  group_statistics(g, from, mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>(),
                   n_values.mutable_data_ptr<float>());

  const int64_t row = g.row();
  float* ratios = scratch<TablesTag>(g.count * row);
  inverse_deviations(g, var.const_data_ptr<float>(), eps, ratios);
  for (int64_t i = 0; gamma.data() && i < g.count * g.channels; ++i) {
    ratios[i / g.channels * row + i % g.channels] *= gamma.data()[i % g.channels];
  }
  const Epilogue epilogue{beta.data(), residual ? added.const_data_ptr<float>() : nullptr,
                          static_cast<Activation>(activation), static_cast<float>(slope), pool};
  const Geometry geometry = images_of(g);
  const float* means = mean.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  uint8_t* coded = save ? codes.mutable_data_ptr<uint8_t>() : nullptr;
  Blocks(g).each([&](const Block& b, int64_t) {
    if (!g.counts(b.image)) {
      const int64_t step = pool ? 2 : 1, first = (b.image * h + b.top / step) * w * g.channels;
      const int64_t length = (b.bottom / step - b.top / step) * w * g.channels;
      std::fill_n(to + first, length, 0.f);
      if (save) std::fill_n(coded + first, length, 0);
      return;
    }
    const float *center = means + g.of(b.image) * g.channels, *ratio = ratios + g.of(b.image) * row;
    each_tile(g, b, [&](const TileGrid::Place& at, int64_t o, auto lanes) {
      const Vec middle = load_part(center + o, lanes), factor = load(ratio + o);
      Vec y[2][2];
      each_pixel(g, at, o, [&](int i, int j, int64_t pixel) {
        // The deviation first: z·factor − mean·factor would be a difference of large numbers.
        y[i][j] = (load_part(from + pixel, lanes) - middle) * factor;
      });
      finish_tile<2>(epilogue, geometry, at, o, lanes, y, to, coded);
    });
  });
  return {out, mean, var, n_values, codes};
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of z, of γ and β [C], and of the residual (empty unless asked for).
Gradients backward(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& codes, const at::Tensor& mean,
                   const at::Tensor& var, const at::Tensor& n_values, const std::optional<at::Tensor>& weight,
                   double eps, const std::optional<at::Tensor>& mask, int64_t activation, double slope, bool pool,
                   bool needs_z, bool needs_residual) {
  const at::Tensor images = channels_last(z), upper = channels_last(grad);
  const Groups g = groups(images, mean.size(0), mask);
  const Operand gamma(weight);
  const auto options = images.options();
  const int64_t halved = pool ? 2 : 1;
  const int64_t shape[] = {g.n, g.channels, g.h / halved, g.w / halved};
  TORCH_CHECK(upper.sizes() == at::IntArrayRef(shape), "episode_norm: grad has shape ", upper.sizes());
  const bool coded = pool || static_cast<Activation>(activation) != Activation::kNone;
  TORCH_CHECK(!coded || codes.sizes() == at::IntArrayRef(shape), "episode_norm: codes have shape ", codes.sizes());
  // Saved tensors may come back in another order of memory.
  const at::Tensor signs = coded ? channels_last(codes) : at::Tensor();
  const Unwound unwound{images_of(g), static_cast<Activation>(activation), static_cast<float>(slope), pool,
                        upper.const_data_ptr<float>(), coded ? signs.const_data_ptr<uint8_t>() : nullptr};
  const float *from = images.const_data_ptr<float>(), *means = mean.const_data_ptr<float>();
  const int64_t row = g.row();
  const Blocks blocks(g);

  // [blocks, 2, C⁺]: Σ d and Σ d·(z − mean).
  float* partial = scratch<BlockSumsTag>((blocks.count() + g.count) * 2 * row);
  float* sums = partial + blocks.count() * 2 * row;
  blocks.each([&](const Block& b, int64_t index) {
    if (!g.counts(b.image)) return;
    float* own = partial + index * 2 * row;
    std::fill_n(own, 2 * row, 0.f);
    const float* center = means + g.of(b.image) * g.channels;
    each_tile(g, b, [&](const TileGrid::Place& at, int64_t o, auto lanes) {
      const Vec middle = load_part(center + o, lanes);
      const auto d = unwound.tile(at, o, lanes);
      Vec total{}, by_deviation{};
      each_pixel(g, at, o, [&](int i, int j, int64_t pixel) {
        total = total + d.inner[i][j];
        by_deviation = by_deviation + d.inner[i][j] * (load_part(from + pixel, lanes) - middle);
      });
      store(own + o, load(own + o) + total);
      store(own + row + o, load(own + row + o) + by_deviation);
    });
  });
  add_blocks(g, blocks, partial, sums);

  // A group's γ/σ, Σ d/m and Σ d·(z − mean)/(σ²·m) [G, 3, C⁺].
  float* inverse = scratch<TablesTag>(g.count * 4 * row);
  float* tables = inverse + g.count * row;
  inverse_deviations(g, var.const_data_ptr<float>(), eps, inverse);
  at::Tensor weight_grad = at::empty({g.channels}, options), bias_grad = at::empty({g.channels}, options);
  for (int64_t c = 0; c < g.channels; ++c) {
    double by_weight = 0, by_bias = 0;
    for (int64_t group = 0; group < g.count; ++group) {
      const double total = sums[group * 2 * row + c], m = n_values.const_data_ptr<float>()[group];
      const double ratio = inverse[group * row + c];
      const double along = sums[(group * 2 + 1) * row + c] * ratio;  // Σ d·x̂
      by_bias += total;
      by_weight += along;
      float* table = tables + group * 3 * row + c;
      table[0] = static_cast<float>(ratio * (gamma.data() ? gamma.data()[c] : 1));
      table[row] = static_cast<float>(total / m);
      table[2 * row] = static_cast<float>(along * ratio / m);
    }
    weight_grad.mutable_data_ptr<float>()[c] = static_cast<float>(by_weight);
    bias_grad.mutable_data_ptr<float>()[c] = static_cast<float>(by_bias);
  }

  at::Tensor z_grad = needs_z ? new_images(images.sizes(), options) : at::empty({0}, options);
  at::Tensor residual_grad = needs_residual ? new_images(images.sizes(), options) : at::empty({0}, options);
  float* to_z = needs_z ? z_grad.mutable_data_ptr<float>() : nullptr;
  float* to_residual = needs_residual ? residual_grad.mutable_data_ptr<float>() : nullptr;
  if (!needs_z && !needs_residual) return {z_grad, weight_grad, bias_grad, residual_grad};
  blocks.each([&](const Block& b, int64_t) {
    if (!g.counts(b.image)) {
      const int64_t first = (b.image * g.h + b.top) * g.w * g.channels;
      const int64_t length = (b.bottom - b.top) * g.w * g.channels;
      if (needs_z) std::fill_n(to_z + first, length, 0.f);
      if (needs_residual) std::fill_n(to_residual + first, length, 0.f);
      return;
    }
    const float *center = means + g.of(b.image) * g.channels, *table = tables + g.of(b.image) * 3 * row;
    each_tile(g, b, [&](const TileGrid::Place& at, int64_t o, auto lanes) {
      const Vec middle = load_part(center + o, lanes), factor = load(table + o);
      const Vec mean_d = load(table + row + o), along = load(table + 2 * row + o);
      const auto d = unwound.tile(at, o, lanes);
      each_pixel(g, at, o, [&](int i, int j, int64_t pixel) {
        if (needs_z) {
          const Vec deviation = load_part(from + pixel, lanes) - middle;
          store_part(to_z + pixel, factor * (d.inner[i][j] - mean_d - along * deviation), lanes);
        }
        if (needs_residual) store_part(to_residual + pixel, d.residual[i][j], lanes);
      });
    });
  });
  return {z_grad, weight_grad, bias_grad, residual_grad};
}

}  // namespace
}  // namespace mtl

TORCH_LIBRARY_IMPL(mtl_fast, CPU, m) {
  m.impl("episode_norm", mtl::forward);
  m.impl("episode_norm_backward", mtl::backward);
}
