// The kernel of the fused sequential loop, and its launch: one block owns a tile of rows and runs all of its steps; no barrier crosses
// the grid. Included by a source for each direction that is compiled by itself.
//
// What the threads do is in autoregressive_phases.h, in which order in ../autoregressive_schedule.h. Here: the barriers, the copies
// ahead of use, the launch. Some warps bring stages of weights into a ring of slots in shared memory, the others compute; all meet at
// one barrier a stage, so that a slot is refilled only when nobody reads it any more.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "autoregressive_images.h"
#include "autoregressive_network.h"
#include "cuda/autoregressive_phases.h"
#include "cuda/launch.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct WarpLanes {
  int lane;
  template <class S>
  struct PerLane {
    S one;
    __device__ __forceinline__ S& operator[](int) { return one; }
  };
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    f(lane);
    __syncwarp();
  }
};

// of a thread: kResidentThreads to a multiprocessor, fewer in float64 and where a state is in global memory
template <class T, bool STATE_IN_SHARED = true>
constexpr int kRegisters = sizeof(T) == 8 || !STATE_IN_SHARED ? 168 : 128;
static_assert(sizeof(LoopArgs<double>) + sizeof(LoopPlan) <= 4096, "what a kernel may be given");

// Where a tile's time goes, for benchmarks/loop_clocks.py: cycles of the first consumer and of the first producer of block 0. Only in a build
// with -DFK_LOOP_CLOCKS.
enum class Lap { begin, panel, push, produce, landing, waiting, end, panels, pushes, count };
#if defined(FK_LOOP_CLOCKS)
__device__ unsigned long long loop_clocks[2][static_cast<int>(Lap::count)];
struct Clocks {
  unsigned long long* sums;
  unsigned long long last;
  __device__ __forceinline__ static unsigned long long now() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(t)::"memory");
    return t;
  }
  __device__ __forceinline__ Clocks(int thread, int first_producer)
      : sums(blockIdx.x > 0 || (thread > 0 && thread != first_producer) ? nullptr : loop_clocks[thread > 0]), last(now()) {}
  __device__ __forceinline__ void lap(Lap lap) {
    const unsigned long long t = now();
    if (sums) sums[static_cast<int>(lap)] += t - last;
    last = t;
  }
  __device__ __forceinline__ void tick(Lap lap) {
    if (sums) sums[static_cast<int>(lap)] += 1;
  }
};
#else
struct Clocks {
  __device__ __forceinline__ Clocks(int, int) {}
  __device__ __forceinline__ void lap(Lap) {}
  __device__ __forceinline__ void tick(Lap) {}
};
#endif

// slots: the ring, at the beginning of what a map may use of shared memory; the state of a tile is at its end.
template <class T, int ROWS, bool MIRRORED, bool APART>
__device__ __forceinline__ void run_tile(const LoopArgs<T>& args, unsigned char* slots, T* state, T* outputs, const LoopPlan& plan,
                                         int64_t first_row) {
  const int thread = threadIdx.x, threads = blockDim.x, warp = thread / 32;
  const bool producer = warp >= plan.consumers;
  const int slot_bytes = args.slot_chunks * 16;
  AsyncCopies copies;
  WarpLanes lanes{thread % 32};
  Clocks clocks(thread, 32 * plan.consumers);

  const Tile<T, ROWS, MIRRORED, APART> tile{args, Schedule(args), state, first_row, outputs};
  const Stage* stages = tile.schedule.stages;
  static_assert(kSlots == 3, "a producer is two slots ahead, and remembers two kinds");
  const int second = stages[0].members, third = second + stages[second].members;
  tile.produce(stages[0], slots, thread, threads, copies);  // by all: nobody can compute yet
  tile.produce(stages[second], slots + slot_bytes, thread, threads, copies);
  tile.begin(thread, threads);
  copies.wait<0>();
  __syncthreads();
  clocks.lap(Lap::begin);
  Stage next = stages[third];  // a producer reads a stage ahead of its use; a consumer finds all in the slot
  StageKind kind = stages[0].kind, following = stages[second].kind;
  for (int i = third, at = producer ? 2 : 0; kind != StageKind::end; at = at == kSlots - 1 ? 0 : at + 1) {
    unsigned char* slot = slots + at * slot_bytes;
    if (producer) {
      const Stage stage = next;
      i += stage.members;
      next = stages[i];
      tile.produce(stage, slot, thread - 32 * plan.consumers, 32 * plan.producers, copies);  // where the last stage was
      clocks.lap(Lap::produce);
      copies.wait<kSlots - 2>();
      clocks.lap(Lap::landing);
      kind = following;
      following = stage.kind;
    } else {
      tile.consume(slot, warp, plan.consumers, lanes);
      clocks.lap(kind == StageKind::panel ? Lap::panel : Lap::push);
      clocks.tick(kind == StageKind::panel ? Lap::panels : Lap::pushes);
    }
    __syncthreads();  // this stage is used, the next has landed
    clocks.lap(Lap::waiting);
    if (!producer) kind = static_cast<StageKind>(reinterpret_cast<const Head*>(slots + (at == kSlots - 1 ? 0 : at + 1) * slot_bytes)->kind);
  }
  copies.wait<0>();  // what was asked for behind the end
  if constexpr (!MIRRORED) {
    tile.sum_logs(thread, threads);
    __syncthreads();
  }
  tile.write(thread, threads);
  clocks.lap(Lap::end);
  __syncthreads();  // before the next tile or map takes the place of this one
}

template <class T, int ROWS, bool STATE_IN_SHARED, bool MIRRORED, bool APART = false>
__global__ void __maxnreg__((kRegisters<T, STATE_IN_SHARED>))
    autoregressive_loop(const __grid_constant__ LoopArgs<T> args, const LoopPlan plan) {
  FK_LAUNCHED_SHARED(unsigned char, memory);
  T* workspace = args.workspace + blockIdx.x * (args.units_in_workspace(STATE_IN_SHARED) * int64_t(unit_stride(ROWS)));
  T* state = STATE_IN_SHARED ? reinterpret_cast<T*>(memory + plan.shared_bytes) - args.units_in_shared() * unit_stride(ROWS) : workspace;
  const int64_t tiles = (args.batch + ROWS - 1) / ROWS;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) run_tile<T, ROWS, MIRRORED, APART>(args, memory, state, workspace, plan, t * ROWS);
}

constexpr int kScheduleThreads = 512, kPackThreads = 256;

// The steps of the inverse from the staircases, by one block. shared_chain: 2 * (features + 1) integers, or null.
template <class T>
__device__ __forceinline__ int find_steps(const LoopArgs<T>& args, int32_t* shared_chain) {
  const ScheduleSpace space = schedule_space(args);
  int32_t *ready = args.schedule + space.ready, *seen = args.schedule + space.seen;
  int32_t* next = shared_chain ? shared_chain : args.schedule + space.next;
  int32_t* chain = shared_chain ? next + args.features + 1 : args.schedule + space.chain;
  __shared__ int steps;

  if (args.mirrored) {
    mirror_visible(args, args.schedule + space.visible, threadIdx.x, blockDim.x);
    __syncthreads();
  }
  const bool ascends = __syncthreads_and(count_seen(args, seen, threadIdx.x, blockDim.x));
  find_ready(args, seen, ready, next, threadIdx.x, blockDim.x);
  bool one_by_one = true;  // as nearly always; following a chain takes a thread alone 20 ns a step. A thread reads the next[d] that it wrote
  for (int d = threadIdx.x; d < args.most_steps(); d += blockDim.x) {
    one_by_one &= d == args.features || next[d] == d + 1;
    chain[d] = d;
  }
  one_by_one = __syncthreads_and(one_by_one);
  if (threadIdx.x == 0) steps = args.schedule[0] = !ascends ? 0 : one_by_one ? args.most_steps() : follow_chain(args, next, chain);
  __syncthreads();
  write_ends(args, ready, chain, steps, args.schedule + space.ends, threadIdx.x, blockDim.x);
  return steps;
}

template <class T>
__device__ __forceinline__ void make_schedule(const LoopArgs<T>& args, int32_t* shared_chain) {
  int steps = 1;
  if (args.inverse) steps = find_steps(args, shared_chain);
  __syncthreads();
  write_works(args, steps, threadIdx.x, blockDim.x);
  __syncthreads();
  write_stages(args, steps, threadIdx.x, blockDim.x);
}

template <class T>
__global__ void __launch_bounds__(kScheduleThreads, 1) autoregressive_schedule(const __grid_constant__ LoopArgs<T> args, bool chain_in_shared) {
  FK_LAUNCHED_SHARED(int32_t, shared_chain);
  make_schedule(args, chain_in_shared ? shared_chain : nullptr);
}

template <class T>
__device__ __forceinline__ void pack(const LoopArgs<T>& args) {
  const Schedule schedule(args);
  const int stages = args.schedule[1];
  for (int i = blockIdx.x; i < stages; i += gridDim.x) pack_stage(args, schedule, i, threadIdx.x, blockDim.x);
}

template <class T>
__global__ void autoregressive_pack(const __grid_constant__ LoopArgs<T> args) {
  pack(args);
}

// Bytes of shared memory for following the chain of features; 0 where it is too long for it
inline int64_t chain_bytes(int features) {
  const int64_t bytes = 2 * (int64_t(features) + 1) * sizeof(int32_t);
  return bytes <= 40 * 1024 ? bytes : 0;
}

template <class T, bool MIRRORED>
auto* loop_kernel(const LoopPlan& plan) {
  if (!plan.state_in_shared) return &autoregressive_loop<T, kMostRows<T>, false, MIRRORED>;
  if constexpr (kMostRows<T> > 4) {
    if constexpr (!MIRRORED)
      if (plan.apart) return &autoregressive_loop<T, kRowsApart, true, false, true>;
    if (plan.rows == 8) return &autoregressive_loop<T, 8, true, MIRRORED>;
    if (plan.rows == 16) return &autoregressive_loop<T, 16, true, MIRRORED>;
    if (plan.rows == 32) return &autoregressive_loop<T, 32, true, MIRRORED>;
  }
  return &autoregressive_loop<T, 4, true, MIRRORED>;
}

// Of a map's stages: what all multiprocessors hold at once, a thousand threads each
inline unsigned pack_blocks(const Device& device, int most_stages) { return static_cast<unsigned>(smaller(4 * device.multiprocessors, most_stages)); }

template <class T>
void check_size(const LoopArgs<T>& args) {
  STD_TORCH_CHECK(!args.is_too_large, "flowkernels::autoregressive: the network is too large for this kernel; flowkernels.backend('reference') serves it");
}

// Launches the loop on the current stream of x's device; what args name must outlive the call.
template <class T, bool MIRRORED>
void run_loop(LoopArgs<T>& args, const Tensor& x) {
  const int32_t device = x.get_device_index();
  const auto properties = device_of(device);
  const LoopPlan plan = plan_loop(args, properties, true);
  set_launch(args, plan.rows, plan.consumers, plan.capacity, plan.apart);
  check_size(args);
  const cudaStream_t stream = current_stream(device);

  // all are freed when this function returns; the allocator gives them to nobody but this stream
  std::vector<int64_t> size{schedule_space(args).size};
  const Tensor schedule = torch::stable::new_empty(x, size, ScalarType::Int);
  size = {plan.blocks * unit_stride(plan.rows) * args.units_in_workspace(plan.state_in_shared)};
  const Tensor workspace = torch::stable::new_empty(x, size);
  size = {16 * int64_t(args.most_chunks)};
  const Tensor packed = torch::stable::new_empty(x, size, ScalarType::Byte);
  args.schedule = static_cast<int32_t*>(schedule.mutable_data_ptr());
  args.packed = static_cast<unsigned char*>(packed.mutable_data_ptr());
  args.workspace = static_cast<T*>(workspace.mutable_data_ptr());
  place_visible(args);

  const int64_t chain = chain_bytes(args.features);
  launch_kernel(autoregressive_schedule<T>, 1, kScheduleThreads, chain, stream, args, chain > 0);
  launch_kernel(autoregressive_pack<T>, pack_blocks(properties, args.most_stages), kPackThreads, 0, stream, args);
  auto* kernel = loop_kernel<T, MIRRORED>(plan);
  allow_shared(kernel, properties);
  launch_kernel(kernel, static_cast<unsigned>(plan.blocks), 32 * (plan.consumers + plan.producers), plan.shared_bytes, stream, args, plan);
}

}  // namespace
}  // namespace flowkernels
