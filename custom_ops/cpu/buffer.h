// Memory for packed weights and scratch.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_MSC_VER)
#include <malloc.h>
#endif

namespace tetris {

// An array of floats aligned to a cache line; large ones are aligned to, and ask for, huge pages: a kernel that walks
// through megabytes of weights otherwise waits for the page table. The content is not initialized.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) {
    constexpr size_t kHugePage = size_t{2} << 20;
    if (count > (static_cast<size_t>(-1) >> 1) / sizeof(float) - kHugePage) throw std::bad_alloc();
    const size_t alignment = count * sizeof(float) >= kHugePage ? kHugePage : 64;
    const size_t bytes = (count * sizeof(float) + alignment) / alignment * alignment;
#if defined(_MSC_VER)
    data_ = static_cast<float*>(_aligned_malloc(bytes, alignment));
#else
    data_ = static_cast<float*>(std::aligned_alloc(alignment, bytes));
#endif
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = count;
#if defined(__linux__)
    if (alignment == kHugePage) (void)madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(_MSC_VER)
    _aligned_free(data_);
#else
    std::free(data_);
#endif
  }

  float* data() { return data_; }
  const float* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

// At least `count` floats of the calling thread's scratch memory, valid until its next call for the same use (a tag type).
// It grows to the largest request and is freed when the thread ends, so that a run after the first allocates nothing.
template <class Use>
float* thread_scratch(size_t count) {
  static thread_local Buffer buffer;
  if (buffer.size() < count) {
    buffer = Buffer();
    buffer = Buffer(count);
  }
  return buffer.data();
}

}  // namespace tetris
