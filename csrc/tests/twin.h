// What the twins of CUDA kernels on the CPU share: the threads of a block in turn, and copies that land late.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

namespace flowkernels {
namespace {

// The copies of one thread, as cp.async makes them: they land at the last moment that the waits allow, or, with `early`, at once
struct LateCopies {
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool inside;
  };
  std::deque<std::vector<Copy>> groups{{}};
  bool early = false;

  template <class U>
  void copy(U* to, const U* from, bool inside = true) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % sizeof(U) == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(U) == 0, "a copy is not aligned");
    const Copy copy{to, from, sizeof(U), inside};
    if (early)
      land(copy);
    else
      groups.back().push_back(copy);
  }
  void commit() { groups.emplace_back(); }
  template <int N>
  void wait() {
    for (; groups.size() > N + 1; groups.pop_front())
      for (const Copy& c : groups.front()) land(c);
  }

 private:
  static void land(const Copy& c) {
    if (c.inside)
      std::memcpy(c.to, c.from, c.bytes);
    else
      std::memset(c.to, 0, c.bytes);
  }
};

template <class F>
void all_threads(int threads, bool backwards, F&& f) {
  for (int i = 0; i < threads; ++i) f(backwards ? threads - 1 - i : i);
}

}  // namespace
}  // namespace flowkernels
