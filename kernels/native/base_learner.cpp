// Heads of a batch of tasks fitted and applied in one call, and the gradients of the first and the second order.
// Contract: mtl_fast/ops/base_learner.py; schema and autograd: mtl_fast/ops/_base_learner_native.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "base_learner_operands.h"
#include "base_learner_task.h"
#include "pool.h"
#include "scratch.h"

namespace mtl {
namespace {

struct BaseLearnerTag {};

// logits = Q·W_Tᵀ + b_T, which is cheaper than Q·W₀ᵀ + (Q·xᵀ + 1)·Sᵀ from as many queries as classes on.
void predict(const Operands& o, const float* weight, const float* bias, float* logits) {
  const int64_t C = o.size.n_way, D = o.size.n_features;
  o.for_query_blocks([&](int64_t task, int64_t first, int64_t count) {
    float* const block = logits + (task * o.n_query + first) * C;
    const float* const b = bias + task * C;
    // [count, D] @ [D, C] -> [count, C]
    dot_products({o.query_rows(task, first), D}, {weight + task * C * D, D}, count, C, D,
                 [=](int64_t i, int64_t c, float dot) { block[i * C + c] = dot + b[c]; });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fit(
    const Tensor& support, const Tensor& labels, const MaybeTensor& query, const Tensor& weight, const Tensor& bias,
    const MaybeTensor& mask, double inner_lr, int64_t n_steps, bool second_order) {
  const Operands o(support, labels, query, weight, bias, mask, inner_lr, n_steps);
  o.check_labels();
  const TaskSize& size = o.size;
  const int64_t n = size.n, C = size.n_way, D = size.n_features, width = size.width;
  const int64_t n_kept = second_order ? o.n_tasks : 0;
  const auto options = o.support.options();
  const Tensor logits = at::empty({o.n_tasks, o.n_query, C}, options);
  const Tensor head_weight = at::empty({o.n_tasks, C, D}, options);
  const Tensor head_bias = at::empty({o.n_tasks, C}, options);
  const Tensor kernel = at::empty({n_kept, n, width}, options);
  const Tensor trajectory = at::empty({n_kept, n_steps, C, width}, options);
  float* const w = head_weight.mutable_data_ptr<float>();
  float* const b = head_bias.mutable_data_ptr<float>();
  float* const kept_kernel = kernel.mutable_data_ptr<float>();
  float* const kept_trajectory = trajectory.mutable_data_ptr<float>();

  const int64_t work = n * n * D / 2 + 2 * n * C * D + n_steps * n * width * C;
  at::parallel_for(0, o.n_tasks, grain(work), [&](int64_t begin, int64_t end) {
    Pieces pieces{scratch<BaseLearnerTag>(o.task_memory() + fit_memory(size) + n * width)};
    float* const task_memory = pieces.take(o.task_memory());
    float* const own_memory = pieces.take(fit_memory(size));
    float* const own_kernel = pieces.take(n * width);
    for (int64_t task = begin; task < end; ++task) {
      float* const h = second_order ? kept_kernel + task * n * width : own_kernel;
      float* const p = second_order ? kept_trajectory + task * n_steps * size.area : nullptr;
      fit_task(size, o.task(task, task_memory), h, p, own_memory, w + task * C * D, b + task * C);
    }
  });
  predict(o, w, b, logits.mutable_data_ptr<float>());
  return {logits, head_weight, head_bias, kernel, trajectory};
}

// dQ = G·W_T for d_logits G.
void predict_backward(const Operands& o, const float* d_logits, const float* weight, float* d_query) {
  const int64_t C = o.size.n_way, D = o.size.n_features;
  o.for_query_blocks([&](int64_t task, int64_t first, int64_t count) {
    const int64_t row = task * o.n_query + first;
    // [count, C] @ [C, D] -> [count, D]
    sum_of_products({{{d_logits + row * C, C}, {weight + task * C * D, D}, C}}, {nullptr, 0}, count, D,
                    d_query + row * D, D);
  });
}

// What reaches the fitted head of one task, from the logits (G [m, C], or null) and directly (or null):
// dW_T [C, D] = Gᵀ·Q + direct, db_T [C] likewise.
void head_cotangents(const Operands& o, int64_t task, const float* d_logits, const float* direct_weight,
                     const float* direct_bias, float* d_weight, float* d_bias) {
  const int64_t C = o.size.n_way, D = o.size.n_features, m = d_logits ? o.n_query : 0;
  const float* const g = d_logits ? d_logits + task * m * C : nullptr;
  const Matrix start{direct_weight ? direct_weight + task * C * D : nullptr, D};
  // [C, m] @ [m, D] -> [C, D]
  sum_of_products({{{g, 1, C}, {m > 0 ? o.query_rows(task, 0) : nullptr, D}, m}}, start, C, D, d_weight, D);
  for (int64_t c = 0; c < C; ++c) {
    double total = direct_bias ? direct_bias[task * C + c] : 0;
    for (int64_t i = 0; i < m; ++i) total += g[i * C + c];
    d_bias[c] = static_cast<float>(total);
  }
}

// The sum over tasks of parts [T, ...], in their order.
Tensor sum_over_tasks(const Tensor& parts) {
  const Tensor total = at::zeros(parts.sizes().slice(1), parts.options());
  const int64_t n_tasks = parts.size(0), count = total.numel();
  const float* const from = parts.const_data_ptr<float>();
  float* const to = total.mutable_data_ptr<float>();
  at::parallel_for(0, count, grain(n_tasks), [&](int64_t begin, int64_t end) {
    for (int64_t task = 0; task < n_tasks; ++task)
      for (int64_t i = begin; i < end; ++i) to[i] += from[task * count + i];
  });
  return total;
}

// A tensor's values, or null without one; `holder` keeps a contiguous copy alive.
const float* values(const MaybeTensor& tensor, Tensor& holder) {
  if (!tensor) return nullptr;
  holder = tensor->contiguous();
  return holder.const_data_ptr<float>();
}

// Gradients of support, query, weight and bias from those that reach the logits and the fitted head; empty where
// `wanted` (support, query, head) says no. The other arguments are those of `fit` and its outputs.
std::tuple<Tensor, Tensor, Tensor, Tensor> fit_backward(
    const MaybeTensor& d_logits, const MaybeTensor& d_head_weight, const MaybeTensor& d_head_bias,
    const Tensor& support, const Tensor& labels, const MaybeTensor& query, const Tensor& weight, const Tensor& bias,
    const MaybeTensor& mask, const Tensor& head_weight, const Tensor& kernel, const Tensor& trajectory,
    double inner_lr, int64_t n_steps, bool second_order, std::array<bool, 3> wanted) {
  const Operands o(support, labels, query, weight, bias, mask, inner_lr, n_steps);
  const TaskSize& size = o.size;
  const int64_t n = size.n, C = size.n_way, D = size.n_features, width = size.width;
  const bool want_support = wanted[0], want_query = wanted[1], want_head = wanted[2];
  const bool through_steps = second_order && n_steps > 0;
  const auto options = o.support.options();
  Tensor holders[6];
  const float* const g = values(d_logits, holders[0]);
  const float* const direct_weight = values(d_head_weight, holders[1]);
  const float* const direct_bias = values(d_head_bias, holders[2]);
  const float* const w = values(head_weight, holders[3]);
  const float* const h = values(kernel, holders[4]);
  const float* const p = values(trajectory, holders[5]);

  const auto nothing = [&] { return at::empty({0}, options); };
  Tensor d_query = nothing(), d_support = nothing();
  if (want_query) {
    d_query = g ? new_contiguous(o.query.sizes(), options) : at::zeros(o.query.sizes(), options);
    if (g) predict_backward(o, g, w, d_query.mutable_data_ptr<float>());
  }
  if (want_support) {
    d_support = through_steps ? new_contiguous(o.support.sizes(), options) : at::zeros(o.support.sizes(), options);
  }
  if (!want_head && !(want_support && through_steps)) return {d_support, d_query, nothing(), nothing()};

  // A shared head's gradient is a part from each task.
  const Tensor d_weight = at::empty({o.n_tasks, C, D}, options);
  const Tensor d_bias = at::empty({o.n_tasks, C}, options);
  float* const dw = d_weight.mutable_data_ptr<float>();
  float* const db = d_bias.mutable_data_ptr<float>();
  float* const dx = want_support ? d_support.mutable_data_ptr<float>() : nullptr;
  const int64_t steps_work = 2 * n_steps * n * width * C + n * n * D + 4 * n * C * D;
  const int64_t work = o.n_query * C * D + (through_steps ? steps_work : 0);
  at::parallel_for(0, o.n_tasks, grain(work), [&](int64_t begin, int64_t end) {
    if (!through_steps) {
      for (int64_t task = begin; task < end; ++task)
        head_cotangents(o, task, g, direct_weight, direct_bias, dw + task * C * D, db + task * C);
      return;
    }
    Pieces pieces{scratch<BaseLearnerTag>(o.task_memory() + fit_backward_memory(size) + C * D + C)};
    float* const task_memory = pieces.take(o.task_memory());
    float* const own_memory = pieces.take(fit_backward_memory(size));
    float* const d_adapted_weight = pieces.take(C * D);
    float* const d_adapted_bias = pieces.take(C);
    for (int64_t task = begin; task < end; ++task) {
      head_cotangents(o, task, g, direct_weight, direct_bias, d_adapted_weight, d_adapted_bias);
      fit_task_backward(size, o.task(task, task_memory), h + task * n * width, p + task * n_steps * size.area,
                        d_adapted_weight, d_adapted_bias, own_memory, dw + task * C * D, db + task * C,
                        want_support ? dx + task * n * D : nullptr);
    }
  });
  if (!want_head) return {d_support, d_query, nothing(), nothing()};
  if (!o.shared) return {d_support, d_query, d_weight, d_bias};
  return {d_support, d_query, sum_over_tasks(d_weight), sum_over_tasks(d_bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mtl_fast, CPU, m) {
  m.impl("base_learner", &fit);
  m.impl("base_learner_backward", &fit_backward);
}

}  // namespace mtl
