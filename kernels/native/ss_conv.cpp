// `ss_conv` forward on CPUs: a stride-1 convolution of 3×3 or 1×1 taps, Φ_S1 and the folded norm in its filters,
// the epilogue in its output transform. Contract and autograd: mtl_fast/ops/ss_conv.py.

#include <torch/library.h>

#include "convolve.h"
#include "plan.h"
#include "operands.h"

namespace mtl {
namespace {

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
  if (residual) check_shape("residual", added, {g.n, g.n_out, g.out_h(), g.out_w()});
  if (out.numel() == 0) return {out, codes};
  const Filters filters{taps.const_data_ptr<float>(), g.n_in, g.n_out,
                        scaling(factors, ratios, g, /*transposed=*/false)};
  float* y = out.mutable_data_ptr<float>();
  const Epilogue epilogue{shifts.data(), residual ? added.const_data_ptr<float>() : nullptr,
                          static_cast<Activation>(activation), static_cast<float>(slope), pool,
                          streams(y, out.nbytes(), g.n_out)};
  const Plan plan = forward_plan(g);
  with_tile(plan, g.taps, [&](auto f) {
    convolve<decltype(f)>(g, plan, filters, epilogue, images.const_data_ptr<float>(),
                          y, save ? codes.mutable_data_ptr<uint8_t>() : nullptr);
  });
  return {out, codes};
}

}  // namespace
}  // namespace mtl

TORCH_LIBRARY_IMPL(mtl_fast, CPU, m) { m.impl("ss_conv", mtl::forward); }
