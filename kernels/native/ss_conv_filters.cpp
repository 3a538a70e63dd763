// `ss_conv`'s filters: from a weight's order to the kernels' and back.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "pool.h"
#include "tiles.h"

namespace mtl {
namespace {

constexpr int64_t kBlock = 16;  // inputs at a time: both orders of a block then fit the first cache

// fn(o, i) for all outputs and inputs, in blocks small on both sides; threads own blocks of outputs.
template <class Fn>
void by_blocks(int64_t n_out, int64_t n_in, const Fn& fn) {
  at::parallel_for(0, ceil_div(n_out, kPackedColumns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(n_out, (block + 1) * kPackedColumns);
      for (int64_t i0 = 0; i0 < n_in; i0 += kBlock)
        for (int64_t o = block * kPackedColumns; o < last; ++o)
          for (int64_t i = i0; i < std::min(n_in, i0 + kBlock); ++i) fn(o, i);
    }
  });
}

// weight [O, I, k, k] -> taps for the convolution, which sums over I, and rotated ones for its input gradient, which
// sums over O; both packed.
std::tuple<at::Tensor, at::Tensor> pack_filters(const at::Tensor& weight) {
  const int64_t n_out = weight.size(0), n_in = weight.size(1), taps = weight.size(2) * weight.size(3);
  const at::Tensor w = weight.contiguous();
  // Padding is written where there is any: most weights have none.
  const auto allocate = [&](int64_t K, int64_t N) {
    const int64_t shape[] = {ceil_div(N, kPackedColumns), K, taps, kPackedColumns};
    const int64_t strides[] = {K * taps * kPackedColumns, taps * kPackedColumns, kPackedColumns, 1};
    // On large pages: read once a call, they would cost a page walk every few rows on small ones.
    const at::Tensor packed = new_tensor(shape, strides, w.options());
    return N % kPackedColumns ? packed.zero_() : packed;
  };
  at::Tensor forward = allocate(n_in, n_out), rotated = allocate(n_out, n_in);
  const float* from = w.const_data_ptr<float>();
  float* to = forward.mutable_data_ptr<float>();
  float* back = rotated.mutable_data_ptr<float>();
  by_blocks(n_out, n_in, [=](int64_t o, int64_t i) {
    float* there = to + packed_offset(o, i, n_in, taps);
    float* turned = back + packed_offset(i, o, n_out, taps);
    for (int64_t t = 0; t < taps; ++t) {
      const float value = from[(o * n_in + i) * taps + t];
      there[t * kPackedColumns] = value;
      turned[(taps - 1 - t) * kPackedColumns] = value;
    }
  });
  return {forward, rotated};
}

// Packed taps -> weight [O, I, k, k].
at::Tensor unpack_filters(const at::Tensor& taps, int64_t n_out) {
  const int64_t n_in = taps.size(1), n_taps = taps.size(2), side = n_taps == 1 ? 1 : 3;
  TORCH_CHECK(taps.dim() == 4 && taps.size(3) == kPackedColumns && side * side == n_taps &&
                  taps.size(0) == ceil_div(n_out, kPackedColumns),
              "unpack_filters: taps ", taps.sizes(), " for ", n_out);
  const at::Tensor packed = taps.contiguous();
  at::Tensor weight = at::empty({n_out, n_in, side, side}, packed.options());
  const float* from = packed.const_data_ptr<float>();
  float* to = weight.mutable_data_ptr<float>();
  by_blocks(n_out, n_in, [=](int64_t o, int64_t i) {
    const float* there = from + packed_offset(o, i, n_in, n_taps);
    for (int64_t t = 0; t < n_taps; ++t) to[(o * n_in + i) * n_taps + t] = there[t * kPackedColumns];
  });
  return weight;
}

}  // namespace
}  // namespace mtl

TORCH_LIBRARY_IMPL(mtl_fast, CPU, m) {
  m.impl("pack_filters", mtl::pack_filters);
  m.impl("unpack_filters", mtl::unpack_filters);
}
