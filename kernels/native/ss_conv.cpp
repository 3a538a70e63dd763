// `ss_conv` forward on CPUs: a stride-1 convolution of 3×3 or 1×1 taps, Φ_S1 and the folded norm in its filters,
// the epilogue in its output transform. Contract and autograd: mtl_fast/ops/ss_conv.py.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "convolve.h"
#include "plan.h"
#include "operands.h"

namespace mtl {
namespace {

// weight [O, I, k, k] -> taps [I, k², O⁺] for the convolution, rotated [O, k², I⁺] for its input gradient;
// ⁺ is padded with zeros to kPackedColumns.
std::tuple<at::Tensor, at::Tensor> pack_filters(const at::Tensor& weight) {
  const int64_t n_out = weight.size(0), n_in = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t out_columns = ceil_div(n_out, kPackedColumns) * kPackedColumns;
  const int64_t in_columns = ceil_div(n_in, kPackedColumns) * kPackedColumns;
  const at::Tensor w = weight.contiguous();
  at::Tensor forward = at::zeros({n_in, taps, out_columns}, w.options());
  at::Tensor rotated = at::zeros({n_out, taps, in_columns}, w.options());
  const float* from = w.const_data_ptr<float>();
  float* to = forward.mutable_data_ptr<float>();
  float* back = rotated.mutable_data_ptr<float>();
  at::parallel_for(0, n_out, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t i = 0; i < n_in; ++i)
          back[(o * taps + taps - 1 - t) * in_columns + i] = from[(o * n_in + i) * taps + t];
  });
  // By blocks of outputs, so that the strided side stays in cache.
  at::parallel_for(0, ceil_div(n_out, kPackedColumns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t i = 0; i < n_in; ++i)
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t o = block * kPackedColumns; o < std::min(n_out, (block + 1) * kPackedColumns); ++o)
            to[(i * taps + t) * out_columns + o] = from[(o * n_in + i) * taps + t];
  });
  return {forward, rotated};
}

std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& x, const at::Tensor& taps, const at::Tensor& /*rotated*/, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& ratio, const at::Tensor& shift, const std::optional<at::Tensor>& residual,
    int64_t padding, int64_t activation, double slope, bool pool, bool save) {
  const at::Tensor images = channels_last(x);
  const Geometry g = geometry(images, taps, shift, padding);
  const Operand factors(scale), ratios(ratio), shifts(shift);
  const at::Tensor added = residual ? channels_last(*residual) : at::Tensor();
  const int64_t h = pool ? g.out_h() / 2 : g.out_h(), w = pool ? g.out_w() / 2 : g.out_w();
  at::Tensor out = new_images({g.n, g.n_out, h, w}, images.options());
  at::Tensor codes = new_images({save ? g.n : 0, g.n_out, h, w}, images.options().dtype(at::kByte));
  if (out.numel() == 0) return {out, codes};
  const Filters filters{taps.const_data_ptr<float>(), g.n_in, g.n_out, taps.size(2),
                        scaling(factors, ratios, g, /*transposed=*/false)};
  const Epilogue epilogue{shifts.data(), residual ? added.const_data_ptr<float>() : nullptr,
                          static_cast<Activation>(activation), static_cast<float>(slope), pool};
  const Plan plan = forward_plan(g);
  with_tile(plan, g.taps, [&](auto f) {
    convolve<decltype(f)>(g, plan, filters, epilogue, images.const_data_ptr<float>(),
                          out.mutable_data_ptr<float>(), save ? codes.mutable_data_ptr<uint8_t>() : nullptr);
  });
  return {out, codes};
}

}  // namespace
}  // namespace mtl

TORCH_LIBRARY_IMPL(mtl_fast, CPU, m) {
  m.impl("pack_filters", mtl::pack_filters);
  m.impl("ss_conv", mtl::forward);
}
