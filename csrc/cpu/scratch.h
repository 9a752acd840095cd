// Working memory of a thread, kept between calls: a fresh megabyte costs more in page faults than many a call.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace flowkernels {

// At least `bytes`, aligned to a cache line; contents undefined. Valid until the thread's next call. A build with FK_FILL_NAN makes it
// anew each time, no larger than asked and full of NaN, so that AddressSanitizer and tests see what leaves it or reads it too soon.
inline void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t capacity = 0;
#ifdef FK_FILL_NAN
  capacity = 0;
#endif
  if (bytes > capacity) {
    const size_t rounded = (bytes + 63) / 64 * 64;
    buffer.reset();
    capacity = 0;
    buffer.reset(std::aligned_alloc(64, rounded));
    if (!buffer) throw std::bad_alloc();
    capacity = rounded;
#ifdef FK_FILL_NAN
    std::memset(buffer.get(), 0xff, rounded);
#endif
  }
  return buffer.get();
}

}  // namespace flowkernels
