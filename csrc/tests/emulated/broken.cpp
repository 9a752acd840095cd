// Kernels with one mistake each, which the emulator must find, and the same kernel without one.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/launch.h"

namespace flowkernels {
namespace {

constexpr int kThreads = 64;

// Turns the words of each block's part by a warp and a lane, through shared memory.
enum class Mistake {
  none,
  no_block_barrier,      // between what is written and read by threads of different warps
  no_warp_barrier,       // and of one warp
  a_copy_is_not_waited_for,
  a_copy_is_waited_for_by_its_thread_alone,
  a_slot_is_refilled_while_it_is_read,
  beyond_shared_memory,
  blocks_write_one_word,
  a_block_reads_anothers,
  reads_ahead_of_shared_memory,
  a_vector_is_not_aligned,
  some_wait_for_their_warp,  // others for the block
  a_lane_returns,
  too_many_threads,
  too_much_shared_memory,
  a_copy_that_is_not_aligned,
  count
};

void turn(const float* from, float* to, Mistake mistake) {
  FK_LAUNCHED_SHARED(float, memory);
  __shared__ float beside[kThreads];
  const int thread = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  const AsyncCopies copies;
  copies.copy(memory + thread, from + first + thread);
  copies.commit();
  if (mistake != Mistake::a_copy_is_not_waited_for) copies.wait<0>();
  if (mistake != Mistake::a_copy_is_waited_for_by_its_thread_alone) __syncthreads();
  const float mine = memory[(thread + 1) % kThreads];
  if (mistake != Mistake::a_slot_is_refilled_while_it_is_read) __syncthreads();
  copies.copy(memory + thread, &mine, false);
  copies.commit();
  copies.wait<0>();

  beside[thread] = mine;
  if (mistake == Mistake::some_wait_for_their_warp && thread < 32)
    __syncwarp();
  else if (mistake != Mistake::no_block_barrier)
    __syncthreads();
  const float turned = beside[(thread + 32) % kThreads];
  if (mistake == Mistake::a_lane_returns && thread == 40) return;
  __syncthreads();
  beside[thread] = turned;
  if (mistake != Mistake::no_warp_barrier) __syncwarp();
  const float next = beside[thread / 32 * 32 + (thread + 1) % 32];
  if (mistake == Mistake::a_vector_is_not_aligned) (void)*reinterpret_cast<const volatile double*>(from + first + 1);
  if (mistake == Mistake::beyond_shared_memory) memory[thread + 1] = next;
  if (mistake == Mistake::reads_ahead_of_shared_memory) (void)FK_READ_AHEAD(false, memory[kThreads + thread % 2]);
  to[mistake == Mistake::blocks_write_one_word ? thread : first + thread] = next;
  if (mistake == Mistake::a_block_reads_anothers) to[first + thread] = to[thread] + next;
  if (mistake == Mistake::a_copy_that_is_not_aligned) {
    struct alignas(4) Sixteen {
      float of[4];
    };
    copies.copy(reinterpret_cast<Sixteen*>(memory), reinterpret_cast<const Sixteen*>(from + 1));
    copies.commit();
    copies.wait<0>();
  }
}

torch::stable::Tensor broken(torch::stable::Tensor from, torch::stable::Tensor to, int64_t mistake) {
  const Mistake of = static_cast<Mistake>(mistake);
  const int threads = of == Mistake::too_many_threads ? 2048 : kThreads;
  const int64_t shared = of == Mistake::too_much_shared_memory ? 64 << 10 : kThreads * sizeof(float);
  launch_kernel(turn, static_cast<unsigned>(from.numel() / kThreads), threads, shared, nullptr, static_cast<const float*>(from.const_data_ptr()),
                static_cast<float*>(to.mutable_data_ptr()), of);
  return to;
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_emulated, m) { m.def("broken(Tensor x, Tensor(a!) to, int mistake) -> Tensor(a!)"); }
STABLE_TORCH_LIBRARY_IMPL(flowkernels_emulated, CPU, m) { m.impl("broken", TORCH_BOX(&flowkernels::broken)); }
