// Memory of results, kept when a tensor dies and handed to the next of its size.
//
// A fresh 145 MB costs 35 ms of page faults and clearing (6 ms on large pages), more than many a convolution that
// fills it; malloc gives every block of more than 32 MB back at once. So do 3 MB of gradients cost a fit of two
// milliseconds. What is kept is bounded, oldest goes first.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/strides.h>

#include <deque>
#include <mutex>

#include "scratch.h"

namespace mtl {

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool();  // never destroyed: tensors may die after static objects do
    return *pool;
  }

  void* take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // The newest of the size first: it is most likely still in a cache.
      for (auto block = free_.rbegin(); block != free_.rend(); ++block) {
        if (block->bytes != bytes) continue;
        void* data = block->data;
        kept_ -= bytes;
        free_.erase(std::next(block).base());
        return data;
      }
    }
    void* data = std::aligned_alloc(kAlignment, bytes);
    if (data == nullptr) {
      drain();  // other sizes may be what fills the memory
      data = std::aligned_alloc(kAlignment, bytes);
    }
    if (data == nullptr) throw std::bad_alloc();
    advise_huge_pages(data, bytes);
    return data;
  }

  void drain() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& block : free_) std::free(block.data);
    free_.clear();
    kept_ = 0;
  }

  // Called where a tensor dies: must not throw.
  void give(void* data, int64_t bytes) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      free_.push_back({data, bytes});
    } catch (const std::bad_alloc&) {
      std::free(data);
      return;
    }
    kept_ += bytes;
    while (kept_ > kMostKept) {
      kept_ -= free_.front().bytes;
      std::free(free_.front().data);
      free_.pop_front();
    }
  }

  static constexpr int64_t kAlignment = int64_t{1} << 21;
  static constexpr int64_t kMostKept = int64_t{1} << 30;

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  std::mutex mutex_;
  std::deque<Block> free_;
  int64_t kept_ = 0;
};

// Uninitialised, of this shape and these strides, without gaps; from the pool where it is large.
inline at::Tensor new_tensor(at::IntArrayRef shape, at::IntArrayRef strides, const at::TensorOptions& options) {
  constexpr int64_t kLarge = int64_t{1} << 20;  // below, malloc keeps and reuses memory itself
  const int64_t bytes = c10::multiply_integers(shape) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < kLarge) return at::empty_strided(shape, strides, options);
  const int64_t rounded = (bytes + Pool::kAlignment - 1) / Pool::kAlignment * Pool::kAlignment;
  return at::from_blob(Pool::get().take(rounded), shape, strides,
                       [rounded](void* data) { Pool::get().give(data, rounded); }, options);
}

// Uninitialised and contiguous.
inline at::Tensor new_contiguous(at::IntArrayRef shape, const at::TensorOptions& options) {
  return new_tensor(shape, c10::contiguous_strides(shape), options);
}

// Uninitialised channels-last images [N, C, H, W].
inline at::Tensor new_images(at::IntArrayRef shape, const at::TensorOptions& options) {
  const int64_t strides[] = {shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1]};
  return new_tensor(shape, strides, options);
}

}  // namespace mtl
