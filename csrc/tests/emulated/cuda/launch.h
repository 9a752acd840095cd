// In the place of ../../../cuda/launch.h: the same for kernels that run on a CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "autoregressive_plan.h"

namespace flowkernels {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline Device device_of(int) { return emulated::device(); }
inline cudaStream_t current_stream(int32_t) { return nullptr; }

template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), const Device& device) {
  emulated::allow_shared(reinterpret_cast<const void*>(kernel), device.shared_per_block);
}

template <class... Parameters, class... Args>
void launch_kernel(void (*kernel)(Parameters...), dim3 blocks, int threads, int64_t shared_bytes, cudaStream_t, const Args&... args) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "what a kernel may be given");
  emulated::run(__PRETTY_FUNCTION__, reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, [&] { kernel(args...); });
}

#define FK_LAUNCHED_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulated::launched_shared())

// They land as late as the waits allow.
struct AsyncCopies {
  template <class U>
  void copy(U* to, const U* from, bool inside = true) const {
    static_assert(sizeof(U) == 4 || sizeof(U) == 8 || sizeof(U) == 16);
    emulated::copy_later(to, from, sizeof(U), inside);
  }
  void commit() const { emulated::commit_copies(); }
  template <int N>
  void wait() const {
    emulated::wait_for_copies(N);
  }
};

}  // namespace flowkernels
