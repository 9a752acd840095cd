// Working memory of a thread, kept between calls: a fresh megabyte costs more in page faults than many a call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__) && !defined(FK_FILL_NAN)
#include <sys/mman.h>
#endif

namespace flowkernels {

// Memory that std::free takes back, at least `bytes`, which may grow; null where there is none. What nearly fills huge pages lies in them
// if the system has any: the loops would fill the address cache with small ones.
inline void* scratch_pages(size_t& bytes) {
  size_t align = 64;
#ifdef MADV_HUGEPAGE
  constexpr size_t page = size_t{2} << 20;
  const size_t huge = (bytes + page / 4) / page * page;
  if (huge > 0) align = page, bytes = std::max(bytes, huge);
#endif
  bytes = (bytes + 63) / 64 * 64;
  void* p = std::aligned_alloc(align, (bytes + align - 1) / align * align);
#ifdef MADV_HUGEPAGE
  if (p && huge > 0) madvise(p, huge, MADV_HUGEPAGE);  // a hint
#endif
  return p;
}

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
    buffer.reset();
    capacity = 0;
    buffer.reset(scratch_pages(bytes));
    if (!buffer) throw std::bad_alloc();
    capacity = bytes;
#ifdef FK_FILL_NAN
    std::memset(buffer.get(), 0xff, bytes);
#endif
  }
  return buffer.get();
}

}  // namespace flowkernels
