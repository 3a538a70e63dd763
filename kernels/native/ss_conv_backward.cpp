// `ss_conv` backward on CPUs. With G = dL/dz, z the convolution before its epilogue:
//
//   dL/dx = convolution of G with the rotated filters (`convolve`)
//   dL/dΦ_S1[o, i] = Σ_ξ U[ξ]·dU[ξ], U = G W Gᵀ, dU[ξ] = V[ξ]ᵀ dM[ξ]: a block of dU at a time, never a weight gradient
//   dL/dΦ_S1[o] = Σ G·(z − shift)/Φ_S1 (`filter`), from the saved output, without a product
//
// Sums run in an order that depends on shapes only, so any number of threads gives the same bits.

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "convolve.h"
#include "operands.h"
#include "plan.h"
#include "unwind.h"
#include "weight_gradient.h"

namespace mtl {
namespace {

// What is asked of the weights: nothing, Φ_S1 by kernel, Φ_S1 by filter, or the weight itself.
enum class Wanted : int64_t { kNone = 0, kKernelScale = 1, kFilterScale = 2, kWeight = 3 };

// Σ G·(z − shift) is a difference of larger things where γ·Φ_S1 is small: it serves while at most six bits are lost.
constexpr float kMostLost = 64;

// by_output [3, O] of `Unwinding::run`; of a scale of 0 the output tells nothing.
bool trusted(const at::Tensor& by_output, const float* scale) {
  const float* terms = by_output.const_data_ptr<float>() + by_output.size(1);
  const float* subtracted = terms + by_output.size(1);
  for (int64_t o = 0; o < by_output.size(1); ++o) {
    if (scale[o] == 0 || !(terms[o] * kMostLost >= subtracted[o])) return false;
  }
  return true;
}

// products [.., columns] with the first O columns times γ/σ; the padding stays zero.
at::Tensor scale_columns(const at::Tensor& products, const Operand& ratio, int64_t n_out) {
  at::Tensor factors = at::zeros({products.size(-1)}, products.options());
  factors.narrow(0, 0, n_out).copy_(*ratio.tensor);
  return products * factors;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of x, of the weights (as packed taps, [I, O⁺] or [O], as wanted), Σ G [O], of the residual.
Gradients backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& codes, const at::Tensor& taps,
                   const at::Tensor& rotated, const std::optional<at::Tensor>& scale,
                   const std::optional<at::Tensor>& ratio, const at::Tensor& shift,
                   const std::optional<at::Tensor>& output, const std::optional<at::Tensor>& residual,
                   int64_t padding, int64_t activation, double slope, bool pool, bool needs_x,
                   int64_t weights_wanted, bool needs_residual) {
  const at::Tensor images = channels_last(x), upper = channels_last(grad);
  const Geometry g = geometry(images, taps, shift, padding);
  const Operand factors(scale), ratios(ratio), shifts(shift);
  const auto options = images.options();
  const auto wanted = static_cast<Wanted>(weights_wanted);
  const int64_t columns = taps.size(0) * kPackedColumns, halved = pool ? 2 : 1;
  const int64_t shape[] = {g.n, g.n_out, g.out_h() / halved, g.out_w() / halved};
  check_shape("grad", upper, shape);
  check_shape("rotated taps", rotated, {ceil_div(g.n_in, kPackedColumns), g.n_out, taps.size(2), kPackedColumns});
  const bool coded = pool || static_cast<Activation>(activation) != Activation::kNone;
  if (coded) check_shape("codes", codes, shape);
  bool by_output = wanted == Wanted::kFilterScale;
  TORCH_CHECK(!by_output || (scale && output), "ss_conv: the scale of a filter takes its gradient from the output");
  if (by_output) check_shape("output", *output, shape);
  if (by_output && residual) check_shape("residual", *residual, {g.n, g.n_out, g.out_h(), g.out_w()});

  Unwinding unwinding{g, static_cast<Activation>(activation), static_cast<float>(slope), pool};
  unwinding.grad = upper.const_data_ptr<float>();
  // Saved tensors may come back in another order of memory.
  const at::Tensor signs = coded ? channels_last(codes) : at::Tensor();
  unwinding.codes = coded ? signs.const_data_ptr<uint8_t>() : nullptr;
  const at::Tensor after = by_output ? channels_last(*output) : at::Tensor();
  const at::Tensor added = by_output && residual ? channels_last(*residual) : at::Tensor();
  if (by_output) {
    unwinding.output = after.const_data_ptr<float>();
    unwinding.residual = residual ? added.const_data_ptr<float>() : nullptr;
    unwinding.shift = shifts.data();
  }
  const bool plain = unwinding.activation == Activation::kNone && !pool;
  at::Tensor inner = plain ? upper : new_images({g.n, g.n_out, g.out_h(), g.out_w()}, options);
  // After the activation a residual's gradient is G itself; before it, the output's gradient without the activation.
  // Where it is the output's gradient as it came, the caller passes that on.
  TORCH_CHECK(!needs_residual || pool || unwinding.activation == Activation::kAfterResidual,
              "ss_conv: the residual's gradient is the output's");
  const bool own_residual = needs_residual && unwinding.activation == Activation::kBeforeResidual;
  at::Tensor residual_grad = own_residual      ? new_images(inner.sizes(), options)
                             : needs_residual ? inner
                                              : at::empty({0}, options);
  if (!plain) unwinding.inner = inner.mutable_data_ptr<float>();
  if (own_residual) unwinding.residual_grad = residual_grad.mutable_data_ptr<float>();
  unwinding.streamed = !plain && streams(unwinding.inner, inner.nbytes(), g.n_out) &&
                       (!own_residual || streams(unwinding.residual_grad, residual_grad.nbytes(), g.n_out));
  at::Tensor sums = at::zeros({g.n_out}, options);
  at::Tensor weights = at::empty({0}, options);
  at::Tensor outputs = at::zeros({by_output ? 3 : 0, g.n_out}, options);
  unwinding.run(sums.mutable_data_ptr<float>(), by_output ? outputs.mutable_data_ptr<float>() : nullptr);
  by_output = by_output && trusted(outputs, factors.data());
  const float* g_inner = inner.const_data_ptr<float>();

  if (by_output) {
    weights = outputs[0] / factors.tensor->flatten();
  } else if (wanted != Wanted::kNone) {
    const bool whole = wanted == Wanted::kWeight;
    TORCH_CHECK(!whole || (!scale && !ratio), "ss_conv: a weight that trains has scale and norm multiplied in");
    const bool all_written = columns == g.n_out && inner.numel() > 0;
    const auto allocate = [&](at::IntArrayRef shape) {
      return all_written ? at::empty(shape, options) : at::zeros(shape, options);
    };
    at::Tensor products = whole ? allocate(taps.sizes()) : allocate({g.n_in, columns});
    const Plan plan = gradient_plan(g, whole);
    with_tile(plan, g.taps, [&](auto f) {
      weight_gradient<decltype(f)>(g, plan, images.const_data_ptr<float>(), g_inner,
                                   whole ? nullptr : taps.const_data_ptr<float>(), columns,
                                   products.mutable_data_ptr<float>());
    });
    if (ratio) products = scale_columns(products, ratios, g.n_out);
    weights = wanted == Wanted::kFilterScale ? products.sum(0).narrow(0, 0, g.n_out) : products;
  }
  at::Tensor x_grad = at::empty({0}, options);
  if (needs_x) {
    x_grad = new_images(images.sizes(), options);
    const Geometry back{g.n, g.out_h(), g.out_w(), g.n_out, g.n_in, g.taps - 1 - g.padding, g.taps};
    const Filters filters{rotated.const_data_ptr<float>(), g.n_out, g.n_in,
                          scaling(factors, ratios, g, /*transposed=*/true)};
    float* dx = x_grad.mutable_data_ptr<float>();
    Epilogue none;
    none.streams = streams(dx, x_grad.nbytes(), g.n_in);
    const Plan plan = forward_plan(back);
    with_tile(plan, g.taps, [&](auto f) {
      convolve<decltype(f)>(back, plan, filters, none, g_inner, dx, nullptr);
    });
  }
  return {x_grad, weights, sums, residual_grad};
}

}  // namespace
}  // namespace mtl

TORCH_LIBRARY_IMPL(mtl_fast, CPU, m) { m.impl("ss_conv_backward", mtl::backward); }
