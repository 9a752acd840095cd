// What a GPU can do at best for a loop inside one block: see bench_limits.py. Plain C functions, called through ctypes; each returns
// seconds, or minus the CUDA error.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kSlotBytes = 32 * 1024, kSlots = 3;  // as in csrc/autoregressive_schedule.h

// A number passes from one thread to all through shared memory, `turns` times: one block barrier each, as the two cells alternate.
__global__ void barrier_chain(int turns, int* out) {
  __shared__ int cell[2];
  int value = 0;
  for (int i = 0; i < turns; ++i) {
    if (threadIdx.x == i % blockDim.x) cell[i % 2] = value + 1;
    __syncthreads();
    value = cell[i % 2];
  }
  if (threadIdx.x == 0) *out = value;
}

// Each block copies all of `weights` into a ring of slots in shared memory, as the loop's producers do; nobody computes.
template <int BYTES>
__global__ void stream(const unsigned char* weights, int64_t slots, int* out) {
  extern __shared__ __align__(16) unsigned char ring[];
  for (int64_t i = 0; i < slots; ++i) {
    unsigned char* to = ring + i % kSlots * kSlotBytes;
    const unsigned char* from = weights + i * kSlotBytes;
    for (int b = threadIdx.x * BYTES; b < kSlotBytes; b += blockDim.x * BYTES)
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to + b))), "l"(from + b), "n"(BYTES)
                   : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group %0;" ::"n"(kSlots - 2) : "memory");
    __syncthreads();
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (threadIdx.x == 0) out[blockIdx.x] = ring[0];
}

// seconds of what f launches, after one untimed launch
template <class F>
double timed(F&& f) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  f();
  cudaEventRecord(start);
  f();
  cudaEventRecord(stop);
  cudaEventSynchronize(stop);
  float milliseconds = 0;
  cudaEventElapsedTime(&milliseconds, start, stop);
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? milliseconds * 1e-3 : -static_cast<double>(error);
}

}  // namespace

// seconds a barrier; out: one int on the device
extern "C" double fk_barrier_chain(int threads, int turns, int* out) {
  const double seconds = timed([&] { barrier_chain<<<1, threads>>>(turns, out); });
  return seconds < 0 ? seconds : seconds / turns;
}

// seconds in which each of `blocks` blocks, one on each multiprocessor, copies `bytes` (a multiple of 32 KB), `width` at a time;
// out: one int for each block
extern "C" double fk_stream(int blocks, int threads, int width, const unsigned char* weights, int64_t bytes, int* out) {
  auto* kernel = width == 16 ? &stream<16> : &stream<4>;
  constexpr int shared = kSlots * kSlotBytes;  // two such blocks fit into a multiprocessor; with fewer blocks than those none is shared
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  return timed([&] { kernel<<<blocks, threads, shared>>>(weights, bytes / kSlotBytes, out); });
}
