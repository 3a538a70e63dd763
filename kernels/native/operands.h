// Tensors of the operators as the kernels take them: dense, checked, with pointers.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "pool.h"
#include "tiles.h"

namespace mtl {

inline at::Tensor channels_last(const at::Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

// An optional tensor, dense; a null pointer where there is none.
struct Operand {
  std::optional<at::Tensor> tensor;
  explicit Operand(const std::optional<at::Tensor>& t) {
    if (t) tensor = t->contiguous();
  }
  explicit Operand(const at::Tensor& t) : tensor(t.contiguous()) {}
  const float* data() const { return tensor ? tensor->const_data_ptr<float>() : nullptr; }
};

// The kernels trust shapes: what reads memory is checked at the operator's door.
inline void check_shape(const char* name, const at::Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK(t.sizes() == shape, "ss_conv: ", name, " has shape ", t.sizes(), ", expected ", shape);
}

// Of x [N, I, H, W], packed taps and a vector [O].
inline Geometry geometry(const at::Tensor& x, const at::Tensor& taps, const at::Tensor& per_output, int64_t padding) {
  TORCH_CHECK(x.dim() == 4 && taps.dim() == 4 && per_output.dim() == 1, "ss_conv: operands of the wrong rank");
  TORCH_CHECK(x.size(1) == taps.size(1), "ss_conv: ", x.size(1), " channels for taps of ", taps.size(1));
  const int64_t side = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(taps.size(2)))));
  TORCH_CHECK(side == 1 || side == 3, "ss_conv: taps of side ", side);
  const int64_t n_out = per_output.size(0);
  check_shape("taps", taps, {ceil_div(n_out, kPackedColumns), x.size(1), side * side, kPackedColumns});
  TORCH_CHECK(taps.is_contiguous(), "ss_conv: taps are not dense");
  TORCH_CHECK(padding >= 0 && padding < side, "ss_conv: padding ", padding, " for taps of side ", side);
  return {x.size(0), x.size(2), x.size(3), x.size(1), n_out, padding, side};
}

// Φ_S1 [O, I, 1, 1] or [O, 1, 1, 1] and γ/σ [O], for the convolution or (transposed) for its input gradient.
inline Scaling scaling(const Operand& scale, const Operand& ratio, const Geometry& g, bool transposed) {
  Scaling s;
  if (ratio.tensor) check_shape("ratio", *ratio.tensor, {g.n_out});
  if (scale.tensor) {
    const bool by_kernel = scale.tensor->size(1) != 1;
    TORCH_CHECK(scale.tensor->size(0) == g.n_out && (!by_kernel || scale.tensor->size(1) == g.n_in),
                "ss_conv: scale of the wrong shape");
    const int64_t o_stride = by_kernel ? g.n_in : 1, i_stride = by_kernel ? 1 : 0;
    s.scale = scale.data();
    s.k_stride = transposed ? o_stride : i_stride;
    s.n_stride = transposed ? i_stride : o_stride;
  }
  (transposed ? s.k_factor : s.n_factor) = ratio.data();
  return s;
}

}  // namespace mtl
