// One task from its operands to its fitted head, and from the gradients of that head back to the operands.
#pragma once

#include "base_learner_steps.h"

namespace mtl {

// matrix [C, width] · diag(rates), in place.
inline void scale_lanes(const TaskSize& size, const float* rates, float* matrix) {
  for (int64_t c = 0; c < size.area; c += size.width)
    for (int64_t i = 0; i < size.width; i += kLanes) store(matrix + c + i, load(matrix + c + i) * load(rates + i));
}

// out [C] = start [C] + the sums of the rows of matrix [C, width].
inline void add_row_sums(const TaskSize& size, const float* matrix, const float* start, float* out) {
  for (int64_t c = 0; c < size.n_way; ++c) {
    Vec total{};
    for (int64_t i = 0; i < size.width; i += kLanes) total = total + load(matrix + c * size.width + i);
    out[c] = start[c] + lane_sums(total, total, total, total)[0];
  }
}

inline int64_t fit_memory(const TaskSize& size) { return 3 * size.area; }

// W_T [C, D] and b_T [C]. `kernel` [n, width] receives H; `trajectory` [n_steps, C, width], or null, all P_t.
// `memory` holds `fit_memory` floats.
inline void fit_task(const TaskSize& size, const Task& task, float* kernel, float* trajectory, float* memory,
                     float* weight, float* bias) {
  const int64_t D = size.n_features;
  Pieces pieces{memory};
  float* const start = pieces.take(size.area);
  float* const logits = pieces.take(size.area);
  float* const steps = pieces.take(size.area);  // R, then S
  if (size.n_steps > 0) {
    gram_matrix(size, task.x, task.rates, kernel);
    project(size, task.weight, task.bias, task.x, start);
  }
  descend(size, start, kernel, task.targets, logits, steps, trajectory);
  scale_lanes(size, task.rates, steps);
  // W_T = W₀ + S·x: [C, n] @ [n, D] -> [C, D]
  sum_of_products({{{steps, size.width}, {task.x, D}, size.n_steps > 0 ? size.n : 0}}, {task.weight, D}, size.n_way, D,
                  weight, D);
  add_row_sums(size, steps, task.bias, bias);
}

inline int64_t fit_backward_memory(const TaskSize& size) {
  return (4 + 2 * size.n_steps) * size.area + 2 * size.n * size.width;
}

// From d_weight [C, D] and d_bias [C] of the fitted head to those of the initial one and, where not null, to
// d_x [n, D]. `kernel` and `trajectory` are what `fit_task` left; n_steps >= 1; `memory` holds `fit_backward_memory`.
inline void fit_task_backward(const TaskSize& size, const Task& task, const float* kernel, const float* trajectory,
                              const float* d_weight, const float* d_bias, float* memory, float* d_first_weight,
                              float* d_first_bias, float* d_x) {
  const int64_t n = size.n, C = size.n_way, D = size.n_features, width = size.width;
  Pieces pieces{memory};
  float* const d_residuals = pieces.take(size.area);
  float* const d_steps = pieces.take(size.area);
  float* const lambda = pieces.take(size.area);
  float* const steps = pieces.take(size.area);
  float* const d_kernel = pieces.take(n * width);
  float* const d_gram = pieces.take(n * width);
  // dS = dW_T·xᵀ + db_T and dR_T = dS·diag(rates).
  project(size, d_weight, d_bias, task.x, d_residuals);
  scale_lanes(size, task.rates, d_residuals);
  descend_backward(size, d_residuals, kernel, task.targets, trajectory, pieces.next, d_steps, lambda, d_kernel);
  // dW₀ = dW_T + λ·x: [C, n] @ [n, D] -> [C, D]
  sum_of_products({{{lambda, width}, {task.x, D}, n}}, {d_weight, D}, C, D, d_first_weight, D);
  add_row_sums(size, lambda, d_bias, d_first_bias);
  if (d_x == nullptr) return;
  // d(x·xᵀ) plus its transpose, as x stands on both sides in H; columns of masked rows meet an x of 0.
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      d_gram[i * width + j] = task.rates[i] * (d_kernel[i * width + j] + d_kernel[j * width + i]);
  residual_sums(size, task.targets, trajectory, steps);
  scale_lanes(size, task.rates, steps);
  // dx = (d(x·xᵀ) + its transpose)·x + Sᵀ·dW_T + λᵀ·W₀, each [n, depth] @ [depth, D] -> [n, D]
  sum_of_products({{{d_gram, width}, {task.x, D}, n},
                   {{steps, 1, width}, {d_weight, D}, C},
                   {{lambda, 1, width}, {task.weight, D}, C}},
                  {nullptr, 0}, n, D, d_x, D);
}

}  // namespace mtl
