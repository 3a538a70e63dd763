// The operands of the base-learner as pointers of single tasks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "base_learner_steps.h"

namespace mtl {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kQueryRows = 32;       // rows of a query set in a piece of work: a few tasks fill all threads
constexpr int64_t kPieceWork = 1 << 16;  // multiply-adds that pay for waking a thread

// Pieces of `work` multiply-adds each that one thread takes at least.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, kPieceWork / std::max<int64_t>(1, work)); }

// The operands, contiguous, as pointers per task.
struct Operands {
  Tensor support, labels, weight, bias, query, mask;
  int64_t n_tasks, n_query;
  TaskSize size;
  bool shared;  // one head for all tasks
  double inner_lr;

  Operands(const Tensor& support_, const Tensor& labels_, const MaybeTensor& query_, const Tensor& weight_,
           const Tensor& bias_, const MaybeTensor& mask_, double inner_lr_, int64_t n_steps)
      : support(support_.contiguous()),
        labels(labels_.contiguous()),
        weight(weight_.contiguous()),
        bias(bias_.contiguous()),
        query(query_ ? query_->contiguous() : Tensor()),
        mask(mask_ ? mask_->contiguous() : Tensor()),
        n_tasks(support.size(0)),
        n_query(query_ ? query.size(1) : 0),
        size{support.size(1), weight.size(-2), support.size(2), n_steps},
        shared(weight.dim() == 2),
        inner_lr(inner_lr_) {
    TORCH_CHECK(size.n <= kMaxRows && size.n_way <= kMaxClasses, "at most ", kMaxRows, " support rows and ",
                kMaxClasses, " classes a task, got ", size.n, " and ", size.n_way);
  }

  const float* head_weight(int64_t task) const {
    return weight.const_data_ptr<float>() + (shared ? 0 : task * size.n_way * size.n_features);
  }
  const float* head_bias(int64_t task) const {
    return bias.const_data_ptr<float>() + (shared ? 0 : task * size.n_way);
  }
  const float* query_rows(int64_t task, int64_t first) const {
    return query.const_data_ptr<float>() + (task * n_query + first) * size.n_features;
  }
  const bool* valid_rows(int64_t task) const {
    return mask.defined() ? mask.const_data_ptr<bool>() + task * size.n : nullptr;
  }

  // The mask is read before the label: a masked row may hold anything.
  void check_labels() const {
    const int64_t* label = labels.const_data_ptr<int64_t>();
    const bool* valid = valid_rows(0);
    for (int64_t i = 0; i < n_tasks * size.n; ++i) {
      TORCH_CHECK_VALUE((valid && !valid[i]) || (label[i] >= 0 && label[i] < size.n_way),
                        "support_labels: must lie in 0..", size.n_way - 1, " (weight has ", size.n_way,
                        " rows): row ", i % size.n, " of task ", i / size.n, " holds ", label[i]);
    }
  }

  // What the inner loop of a task reads; `memory` holds `task_memory()` floats.
  Task task(int64_t index, float* memory) const {
    Pieces pieces{memory};
    float* const rates = pieces.take(size.width);
    float* const targets = pieces.take(size.area);
    const int64_t* label = labels.const_data_ptr<int64_t>() + index * size.n;
    const bool* valid = valid_rows(index);
    const int64_t count = valid ? std::count(valid, valid + size.n, true) : size.n;
    const float rate = static_cast<float>(inner_lr / static_cast<double>(std::max<int64_t>(1, count)));
    std::fill(memory, pieces.next, 0.0f);
    for (int64_t i = 0; i < size.n; ++i) {
      if (valid && !valid[i]) continue;
      rates[i] = rate;
      targets[label[i] * size.width + i] = 1;
    }
    return {rows(index, pieces.next), rates, targets, head_weight(index), head_bias(index)};
  }
  int64_t task_memory() const { return size.width + size.area + (mask.defined() ? size.n * size.n_features : 0); }

  // f(task, first, count) for all blocks of query rows, in parallel.
  template <typename F>
  void for_query_blocks(const F& f) const {
    const int64_t n_blocks = (n_query + kQueryRows - 1) / kQueryRows;
    const int64_t work = std::min(kQueryRows, n_query) * size.n_way * size.n_features;
    at::parallel_for(0, n_tasks * n_blocks, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece % n_blocks * kQueryRows;
        f(piece / n_blocks, first, std::min(kQueryRows, n_query - first));
      }
    });
  }

 private:
  // Rows [n, D]: the caller's, or a copy with masked rows 0.
  const float* rows(int64_t index, float* copy) const {
    const float* x = support.const_data_ptr<float>() + index * size.n * size.n_features;
    const bool* valid = valid_rows(index);
    if (!valid) return x;
    for (int64_t i = 0; i < size.n; ++i) {
      float* row = copy + i * size.n_features;
      if (valid[i]) std::copy_n(x + i * size.n_features, size.n_features, row);
      else std::fill_n(row, size.n_features, 0.0f);
    }
    return copy;
  }
};

}  // namespace mtl
