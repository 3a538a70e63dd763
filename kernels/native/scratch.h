// Memory that a thread keeps from call to call: a fresh allocation would be paid for in page faults each time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mtl {

// Asks for 2 MB pages inside [data, data + bytes): a fresh page of 4 KB costs as much as computing what goes into it.
// A hint only; where it is refused nothing but speed is lost.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// One buffer a thread and purpose (`Tag`); contents do not survive a call that asks for more.
template <typename Tag>
inline float* scratch(int64_t n_floats) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < n_floats) {
    constexpr int64_t kHuge = int64_t{1} << 21;
    const int64_t bytes = (n_floats * int64_t{sizeof(float)} + kHuge - 1) / kHuge * kHuge;
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = static_cast<float*>(std::aligned_alloc(kHuge, bytes));
    if (buffer.data == nullptr) throw std::bad_alloc();
    advise_huge_pages(buffer.data, bytes);
    buffer.size = bytes / int64_t{sizeof(float)};
  }
  return buffer.data;
}

}  // namespace mtl
