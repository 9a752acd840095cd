// In the place of ../../../cuda/launch.h: the same for kernels that run on a CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <vector>

#include "autoregressive_plan.h"

namespace flowkernels {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

// A device on which tests may want another plan than the rule's
struct ToldDevice : Device {
  std::vector<int64_t> layout;  // rows, capacity, consumers, producers, panel_steps (0: the rule's, and its panel_capacity), panel_capacity, apart,
                                // whether panels do without registers; empty for the rule's plan
};
inline ToldDevice device_of(int) { return {emulated::device(), emulated::layout()}; }

template <class T>
LoopPlan plan_loop(LoopArgs<T>& args, const ToldDevice& device, bool may_be_apart) {
  LoopPlan plan = plan_loop(args, static_cast<const Device&>(device), may_be_apart);
  if (device.layout.empty()) return plan;
  const auto number = [&](int i) { return static_cast<int>(device.layout[i]); };
  if (number(4) > 0) {
    args.panel_steps = number(4);
    args.panel_capacity = number(5);
  }
  args.in_registers = args.in_registers && number(7) == 0;
  plan.rows = smaller(number(0), kMostRows<T>);
  plan.apart = number(6) != 0 && args.inverse && !args.mirrored && plan.rows == kRowsApart;
  plan.state_in_shared = true;
  plan.consumers = number(2);
  plan.producers = number(3);
  plan.capacity = up_to_multiple(larger(number(1), args.panel_capacity), 4);
  plan.slot_bytes = slot_bytes(args, plan.capacity);
  plan.shared_bytes = kSlots * plan.slot_bytes + int64_t(args.units_in_shared(plan.apart)) * unit_stride(plan.rows) * int64_t(sizeof(T));
  choose_blocks<T>(plan, args.batch, device);
  return plan;
}

// Memory is NaN until it is written, and so is what lies before and behind it; torch.use_deterministic_algorithms does not reach this. But not so
// much of it that filling it takes long.
inline AOTITorchError empty_strided_of_nan(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t type, int32_t device,
                                           AtenTensorHandle* made) {
  constexpr int64_t kBeside = 1024;
  int64_t n = 1, bytes = 0;
  const int64_t one = 1;
  for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
  const int64_t all = n + 2 * kBeside;
  AtenTensorHandle whole = nullptr;
  AOTITorchError error = aoti_torch_empty_strided(1, &all, &one, dtype, type, device, &whole);
  if (error) return error;
  const torch::stable::Tensor owner(whole);
  error = aoti_torch_get_storage_size(whole, &bytes);
  if (!error && bytes < 1 << 28) std::memset(owner.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
  return error ? error : aoti_torch__reinterpret_tensor(whole, dims, sizes, strides, kBeside, made);
}
#define aoti_torch_empty_strided empty_strided_of_nan

inline int64_t most_delta_bytes() { return emulated::most_delta_bytes(); }
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
