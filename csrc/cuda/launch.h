// What kernels and their launches have of CUDA beside threads and barriers: shared memory of a size known at launch, copies that land
// later, the device, the launch. Tests put another header in its place, by which the kernels run on a CPU (tests/emulated).
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>

#include "autoregressive_plan.h"

namespace flowkernels {

using torch::stable::accelerator::DeviceGuard;

inline Device device_of(int index) {
  int multiprocessors = 0, block = 0, all = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
  return {multiprocessors, block, all};
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// of a training step's maps, whose parameters' gradients then share launches
inline int64_t most_delta_bytes() { return int64_t(64) << 20; }

// All that a block may have, whatever this launch takes: the attribute is one for all threads of the process.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), const Device& device) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared_per_block)));
}

template <class... Parameters, class... Args>
void launch_kernel(void (*kernel)(Parameters...), dim3 blocks, int threads, int64_t shared_bytes, cudaStream_t stream, const Args&... args) {
  kernel<<<blocks, threads, shared_bytes, stream>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The launch's shared_bytes, in a kernel
#define FK_LAUNCHED_SHARED(T, name) extern __shared__ __align__(16) T name[]

// Copies from global into shared memory that land while the thread goes on, in groups
struct AsyncCopies {
  template <class U>
  __device__ __forceinline__ void copy(U* to, const U* from) const {
    if constexpr (sizeof(U) == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(from) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared(to)), "l"(from), "n"(sizeof(U)) : "memory");
  }
  // zeros where there is nothing inside
  template <class U>
  __device__ __forceinline__ void copy(U* to, const U* from, bool inside) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared(to)), "l"(from), "n"(sizeof(U)), "r"(inside ? int(sizeof(U)) : 0) : "memory");
  }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // until all but the last N groups of this thread have landed
  template <int N>
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
  }

 private:
  __device__ __forceinline__ static uint32_t shared(const void* to) { return static_cast<uint32_t>(__cvta_generic_to_shared(to)); }
};

}  // namespace flowkernels
