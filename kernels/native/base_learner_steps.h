// The inner loop of one task on its logits, and the way back through it.
//
// With x [n, D] (masked rows 0), one-hot targets Y, rates r [n] (inner_lr/n; 0 for a masked row) and, classes
// first, Z₀ = W₀·xᵀ + b₀ [C, n]:
//
//     H = diag(r)·(x·xᵀ + 1), rows and columns of masked rows 0      P_t = softmax(Z₀ + R_t·H)
//     R_{t+1} = R_t + Y − P_t                                        S = R_T·diag(r)
//     W_T = W₀ + S·x;    b_T = b₀ + Σ_rows S
//
// The rates of a task's rows are all the same or 0, so H is symmetric. Classes are rows and the support rows are
// the lanes: a softmax over the few classes needs nothing from a neighbouring lane.
#pragma once

#include <algorithm>
#include <utility>

#include "small_products.h"

namespace mtl {

constexpr int64_t kMaxRows = 128;
constexpr int64_t kMaxClasses = 64;
constexpr int64_t kRowAlignment = 16;  // of n in the layouts here: a multiple of every kLanes

inline int64_t padded(int64_t n) { return (n + kRowAlignment - 1) / kRowAlignment * kRowAlignment; }

// Sizes of one task; a [C, n] matrix is stored as [C, width].
struct TaskSize {
  int64_t n, n_way, n_features, n_steps;
  int64_t width = padded(n);
  int64_t area = n_way * width;
};

// Hands out consecutive pieces of a buffer.
struct Pieces {
  float* next;
  float* take(int64_t n_floats) { return std::exchange(next, next + n_floats); }
};

// One task's operands: x [n, D] with masked rows 0, rates [width] (0 for masked rows and the padding), Y [C, width],
// W₀ [C, D], b₀ [C].
struct Task {
  const float *x, *rates, *targets, *weight, *bias;
};

// H [n, width] from x [n, D].
inline void gram_matrix(const TaskSize& size, const float* x, const float* rates, float* kernel) {
  const int64_t n = size.n, D = size.n_features, width = size.width;
  // Each block of rows against itself and the rows after it; the rest is the mirror image.
  for (int64_t first = 0; first < n; first += kDotRows) {
    const Matrix rows{x + first * D, D};
    const auto store_both = [&](int64_t i, int64_t j, float dot) {
      i += first, j += first;
      const float value = rates[j] > 0 ? rates[i] * (dot + 1) : 0;
      kernel[i * width + j] = kernel[j * width + i] = value;
    };
    dot_products(rows, rows, std::min<int64_t>(kDotRows, n - first), n - first, D, store_both);
  }
  for (int64_t i = 0; i < n; ++i) std::fill(kernel + i * width + n, kernel + (i + 1) * width, 0.0f);
}

// out [C, width] = left [C, D] · x [n, D]ᵀ + bias [C]; lanes from n on are 0.
inline void project(const TaskSize& size, const float* left, const float* bias, const float* x, float* out) {
  const int64_t n = size.n, D = size.n_features, width = size.width;
  dot_products({left, D}, {x, D}, size.n_way, n, D,
               [=](int64_t c, int64_t i, float dot) { out[c * width + i] = dot + bias[c]; });
  for (int64_t c = 0; c < size.n_way; ++c) std::fill(out + c * width + n, out + (c + 1) * width, 0.0f);
}

// P = softmax of the logits z over the classes; R += Y − P; all [C, width]. P may be z.
// A NaN among the logits of a row makes all its probabilities NaN: it enters their sum.
inline void soften(const TaskSize& size, const float* z, const float* targets, float* p, float* residuals) {
  for (int64_t i = 0; i < size.width; i += kLanes) {
    Vec top = load(z + i), total{};
    for (int64_t k = i + size.width; k < size.area; k += size.width) top = larger(top, load(z + k));
    for (int64_t k = i; k < size.area; k += size.width) {
      const Vec e = exp_of_nonpositive(load(z + k) - top);
      total = total + e;
      store(p + k, e);
    }
    const Vec share = 1.0f / total;
    for (int64_t k = i; k < size.area; k += size.width) {
      const Vec probability = load(p + k) * share;
      store(p + k, probability);
      store(residuals + k, load(residuals + k) + (load(targets + k) - probability));
    }
  }
}

// n_steps of gradient descent from the logits Z₀: R_T and, where `trajectory` [n_steps, C, width] is not null, all
// P_t. `logits` [C, width] is overwritten.
inline void descend(const TaskSize& size, const float* start, const float* kernel, const float* targets,
                    float* logits, float* residuals, float* trajectory) {
  std::fill(residuals, residuals + size.area, 0.0f);
  for (int64_t t = 0; t < size.n_steps; ++t) {
    float* p = trajectory ? trajectory + t * size.area : logits;
    // Z_t = Z₀ + R_t·H: [C, n] @ [n, width] -> [C, width]
    sum_of_products({{{residuals, size.width}, {kernel, size.width}, t ? size.n : 0}}, {start, size.width},
                    size.n_way, size.width, p, size.width);
    soften(size, p, targets, p, residuals);
  }
}

// R_T [C, width] from all P_t, in the order in which `descend` adds them.
inline void residual_sums(const TaskSize& size, const float* targets, const float* trajectory, float* residuals) {
  std::fill(residuals, residuals + size.area, 0.0f);
  for (int64_t t = 0; t < size.n_steps; ++t)
    for (int64_t k = 0; k < size.area; k += kLanes) {
      const Vec step = load(targets + k) - load(trajectory + t * size.area + k);
      store(residuals + k, load(residuals + k) + step);
    }
}

// From dL/dR_T to λ = dL/dZ₀ [C, width] and dL/dH [n, width], with P_t and E_t = Y − P_t:
//
//     dL/dE_t = dL/dR_T + λ_{t+1}·H           (H is symmetric; λ_T = 0)
//     λ_t = λ_{t+1} + P_t ⊙ (Σ_classes P_t ⊙ dL/dE_t − dL/dE_t)
//     dL/dH = Σ_t E_tᵀ·λ_{t+1}
//
// The last is one product of the stacked E_t and λ_{t+1}. `stacks` holds 2·n_steps·C·width floats, `d_steps` C·width.
inline void descend_backward(const TaskSize& size, const float* d_residuals, const float* kernel,
                             const float* targets, const float* trajectory, float* stacks, float* d_steps,
                             float* lambda, float* d_kernel) {
  const int64_t area = size.area, width = size.width;
  float* lambdas = stacks;
  float* steps = stacks + size.n_steps * area;
  std::fill(lambda, lambda + area, 0.0f);
  for (int64_t t = size.n_steps; t-- > 0;) {
    const float* p = trajectory + t * area;
    std::copy(lambda, lambda + area, lambdas + t * area);
    // [C, n] @ [n, width] -> [C, width]
    sum_of_products({{{lambda, width}, {kernel, width}, size.n}}, {d_residuals, width}, size.n_way, width, d_steps,
                    width);
    for (int64_t i = 0; i < width; i += kLanes) {
      Vec mean{};
      for (int64_t k = i; k < area; k += width) mean = mean + load(p + k) * load(d_steps + k);
      for (int64_t k = i; k < area; k += width) {
        store(steps + t * area + k, load(targets + k) - load(p + k));
        store(lambda + k, load(lambda + k) + load(p + k) * (mean - load(d_steps + k)));
      }
    }
  }
  // [n, n_steps·C] @ [n_steps·C, width] -> [n, width]
  sum_of_products({{{steps, 1, width}, {lambdas, width}, size.n_steps * size.n_way}}, {nullptr, 0}, size.n, width,
                  d_kernel, width);
}

}  // namespace mtl
