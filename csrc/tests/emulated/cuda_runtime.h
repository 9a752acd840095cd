// In the place of CUDA's header: what the kernels name of CUDA, for a CPU (emulator.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tests/emulated/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static  // one block runs at a time
#define __align__(bytes) alignas(bytes)
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using cudaStream_t = void*;

inline void __syncthreads() { flowkernels::emulated::block_barrier(); }
inline bool __syncthreads_and(bool mine) { return flowkernels::emulated::all_of_block(mine); }
inline void __syncwarp() { flowkernels::emulated::warp_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned lanes, T mine, int by) {
  return flowkernels::emulated::from_lane(lanes, mine, static_cast<int>(threadIdx.x % 32) ^ by);
}
template <class T>
T __shfl_down_sync(unsigned lanes, T mine, int by) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return flowkernels::emulated::from_lane(lanes, mine, lane + by < 32 ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned lanes, bool mine) {
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(flowkernels::emulated::from_lane(lanes, mine, lane)) << lane;
  return all;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

#define FK_READ_AHEAD(is_used, value) flowkernels::emulated::read_ahead(is_used, value)
