// The fused sequential loop for CUDA tensors, inverse and forward, and stacks of such maps in one launch: a block takes its tile of rows
// through all maps, each of which reads what the one before it wrote. A launch before it finds the steps of all maps and leaves their
// arguments on the device.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/autoregressive_loop.cuh"

namespace flowkernels {
namespace {

template <class T>
std::tuple<Tensor, Tensor> launch(const LoopTensors& tensors) {
  const Tensor& x = tensors.x;
  const DeviceGuard guard(x.get_device_index());
  LoopNetwork<T> network(tensors);
  LoopArgs<T>& args = network.args;
  std::vector<int64_t> size{args.batch, args.features};
  Tensor y = torch::stable::new_empty(x, size);
  size.pop_back();
  Tensor logabsdet = torch::stable::new_empty(x, size);
  if (args.batch == 0) return {y, logabsdet};
  args.y = static_cast<T*>(y.mutable_data_ptr());
  args.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  run_loop<T, false>(args, x);
  return {y, logabsdet};
}

std::tuple<Tensor, Tensor> autoregressive(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                          std::vector<Tensor> context_weights, std::vector<Tensor> context_biases,
                                          std::vector<Tensor> visible, std::optional<Tensor> order, std::vector<int64_t> activations,
                                          std::vector<int64_t> wiring, int64_t scale_kind, double scale_p0, double scale_p1, int64_t form,
                                          bool inverse) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "flowkernels::autoregressive: x must be float32 or float64");
  const LoopTensors tensors{x,     context,     weights, biases,
                            context_weights, context_biases, visible, order,
                            activations,     wiring,         {static_cast<int>(scale_kind), scale_p0, scale_p1},
                            static_cast<int>(form), inverse};
  return x.scalar_type() == ScalarType::Float ? launch<float>(tensors) : launch<double>(tensors);
}

// Arguments of several maps as one kernel takes them, only those layers that are in use
struct PackedArgs {
  static constexpr int kMost = 16;
  int first[kMost + 1];  // byte at which each begins
  alignas(16) unsigned char bytes[3904];
};
static_assert(sizeof(LoopArgs<float>) <= sizeof PackedArgs::bytes && sizeof(LoopArgs<double>) <= sizeof PackedArgs::bytes, "one map always fits");
static_assert(sizeof(PackedArgs) + 16 <= 4096, "what a kernel may be given");

template <class T>
int packed_size(const LoopArgs<T>& args) {
  return static_cast<int>(reinterpret_cast<const unsigned char*>(&args.layers[args.n_layers]) - reinterpret_cast<const unsigned char*>(&args));
}

// By all threads of a block, as bytes: what is written as integers may not be read as pointers.
__device__ __forceinline__ void copy_arguments(void* to, const void* from, int bytes) {
  for (int i = 4 * threadIdx.x; i < bytes; i += 4 * blockDim.x)
    memcpy(__builtin_assume_aligned(static_cast<unsigned char*>(to) + i, 4), __builtin_assume_aligned(static_cast<const unsigned char*>(from) + i, 4), 4);
}

// One block for each map
template <class T>
__global__ void __launch_bounds__(kScheduleThreads, 1) autoregressive_stack_schedule(const __grid_constant__ PackedArgs packed, LoopArgs<T>* maps, bool chain_in_shared) {
  FK_LAUNCHED_SHARED(int32_t, shared_chain);
  const int first = packed.first[blockIdx.x], size = packed.first[blockIdx.x + 1] - first;
  LoopArgs<T>& args = maps[blockIdx.x];
  copy_arguments(&args, packed.bytes + first, size);
  __syncthreads();
  make_schedule<T>(args, chain_in_shared ? shared_chain : nullptr);
}

constexpr int64_t kMostPackedChunks = int64_t(1) << 26;  // 1 GB for all maps at once; beyond it they take turns with one map's memory

template <class T>
__global__ void autoregressive_stack_pack(const LoopArgs<T>* maps) {
  pack(maps[blockIdx.y]);
}

template <class T, int ROWS, bool APART = false>
__global__ void __maxnreg__(kRegisters<T>) autoregressive_stack_loop(const LoopArgs<T>* maps, int n, const LoopPlan plan) {
  FK_LAUNCHED_SHARED(unsigned char, memory);
  LoopArgs<T>& args = *reinterpret_cast<LoopArgs<T>*>(memory);
  unsigned char* rest = memory + kStackArgsBytes<T>;
  const int64_t tiles = (maps->batch + ROWS - 1) / ROWS;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x)
    for (int m = 0; m < n; ++m) {
      copy_arguments(memory, maps + m, static_cast<int>(sizeof(LoopArgs<T>)));
      __syncthreads();
      T* state = reinterpret_cast<T*>(memory + plan.shared_bytes) - args.units_in_shared() * unit_stride(ROWS);
      T* outputs = args.workspace + blockIdx.x * static_cast<int64_t>(args.units_in_workspace(true)) * unit_stride(ROWS);
      run_tile<T, ROWS, false, APART>(args, rest, state, outputs, plan, t * ROWS);
    }
}

template <class T>
auto* stack_kernel(const LoopPlan& plan) {
  if constexpr (kMostRows<T> > 4) {
    if (plan.apart) return &autoregressive_stack_loop<T, kRowsApart, true>;
    if (plan.rows == 8) return &autoregressive_stack_loop<T, 8>;
    if (plan.rows == 16) return &autoregressive_stack_loop<T, 16>;
    if (plan.rows == 32) return &autoregressive_stack_loop<T, 32>;
  }
  return &autoregressive_stack_loop<T, 4>;
}

template <class T>
void run_stack(std::vector<LoopNetwork<T>>& networks, const Tensor& x) {
  const int32_t device = x.get_device_index();
  const int n = static_cast<int>(networks.size());
  std::vector<const LoopArgs<T>*> pointers;
  for (const LoopNetwork<T>& network : networks) pointers.push_back(&network.args);
  const Device properties = device_of(device);
  const LoopPlan plan = plan_stack(pointers.data(), n, properties);
  int64_t chunks = 0;
  int most_stages = 0;
  for (LoopNetwork<T>& network : networks) {
    set_launch(network.args, plan.rows, plan.consumers, plan.capacity, plan.apart);
    check_size(network.args);
    chunks += network.args.most_chunks;
    most_stages = larger(most_stages, network.args.most_stages);
  }
  if (n == 1 || !plan.state_in_shared || chunks > kMostPackedChunks) {
    for (LoopNetwork<T>& network : networks) run_loop<T, false>(network.args, x);
    return;
  }
  const cudaStream_t stream = current_stream(device);
  int64_t integers = 0, outputs = 0;
  for (LoopNetwork<T>& network : networks) {
    integers += schedule_space(network.args).size;
    if (network.args.units_in_workspace(true) > outputs) outputs = network.args.units_in_workspace(true);
  }
  std::vector<int64_t> size{integers};
  const Tensor schedules = torch::stable::new_empty(x, size, ScalarType::Int);
  size[0] = n * static_cast<int64_t>(sizeof(LoopArgs<T>));
  const Tensor all_args = torch::stable::new_empty(x, size, ScalarType::Byte);
  size[0] = plan.blocks * unit_stride(plan.rows) * outputs;
  const Tensor workspace = torch::stable::new_empty(x, size);
  size[0] = 16 * chunks;
  const Tensor all_packed = torch::stable::new_empty(x, size, ScalarType::Byte);
  LoopArgs<T>* maps = static_cast<LoopArgs<T>*>(all_args.mutable_data_ptr());
  int32_t* schedule = static_cast<int32_t*>(schedules.mutable_data_ptr());
  unsigned char* images = static_cast<unsigned char*>(all_packed.mutable_data_ptr());

  PackedArgs packed{};
  int count = 0, done = 0;
  const int64_t chain = chain_bytes(networks[0].args.features);
  auto flush = [&] {
    launch_kernel(autoregressive_stack_schedule<T>, static_cast<unsigned>(count), kScheduleThreads, chain, stream, packed, maps + done, chain > 0);
    done += count;
    count = 0;
  };
  for (LoopNetwork<T>& network : networks) {
    LoopArgs<T>& args = network.args;
    args.workspace = static_cast<T*>(workspace.mutable_data_ptr());
    args.schedule = schedule;
    schedule += schedule_space(args).size;
    args.packed = images;
    images += 16 * static_cast<int64_t>(args.most_chunks);
    const int bytes = packed_size(args);
    if (count == PackedArgs::kMost || (count > 0 && packed.first[count] + bytes > static_cast<int>(sizeof packed.bytes))) flush();
    std::memcpy(packed.bytes + packed.first[count], &args, bytes);
    packed.first[count + 1] = packed.first[count] + bytes;
    ++count;
  }
  flush();
  launch_kernel(autoregressive_stack_pack<T>, dim3(pack_blocks(properties, most_stages), static_cast<unsigned>(n)), kPackThreads, 0, stream, maps);
  auto* kernel = stack_kernel<T>(plan);
  allow_shared(kernel, properties);
  launch_kernel(kernel, static_cast<unsigned>(plan.blocks), 32 * (plan.consumers + plan.producers), plan.shared_bytes, stream, maps, n, plan);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> launch(const StackTensors& tensors, bool keep) {
  const Tensor& x = tensors.x;
  const DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() == 2, "flowkernels::autoregressive: x must have two dimensions");
  std::vector<int64_t> size{x.size(0), x.size(1)};
  Tensor y = torch::stable::new_empty(x, size);
  size.insert(size.begin(), keep ? static_cast<int64_t>(tensors.orders.size()) - 1 : 0);
  Tensor kept = torch::stable::new_empty(x, size);
  size = {x.size(0)};
  Tensor logabsdet = torch::stable::new_empty(x, size);
  std::vector<LoopNetwork<T>> networks = read_stack<T>(tensors, static_cast<T*>(y.mutable_data_ptr()), static_cast<T*>(kept.mutable_data_ptr()),
                                                       static_cast<T*>(logabsdet.mutable_data_ptr()), keep);
  if (x.size(0) > 0) run_stack(networks, x);
  return {y, logabsdet, kept};
}

std::tuple<Tensor, Tensor, Tensor> autoregressive_stack(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights,
                                                        std::vector<Tensor> biases, std::vector<Tensor> context_weights,
                                                        std::vector<Tensor> context_biases, std::vector<Tensor> visible,
                                                        std::vector<Tensor> orders, std::vector<Tensor> affines, std::vector<int64_t> activations,
                                                        std::vector<int64_t> wiring, std::vector<int64_t> stages, std::vector<double> scales,
                                                        bool keep) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "flowkernels::autoregressive: x must be float32 or float64");
  const StackTensors tensors{x,      context, weights,     biases, context_weights, context_biases, visible,
                             orders, affines, activations, wiring, stages,          scales};
  return x.scalar_type() == ScalarType::Float ? launch<float>(tensors, keep) : launch<double>(tensors, keep);
}

}  // namespace
}  // namespace flowkernels

#if defined(FK_LOOP_CLOCKS)
// the laps of all calls since the last, of a consumer and of a producer; 0, or the CUDA error
extern "C" __attribute__((visibility("default"))) int fk_take_loop_clocks(unsigned long long* laps) {
  const unsigned long long none[2][static_cast<int>(flowkernels::Lap::count)] = {};
  if (const cudaError_t error = cudaMemcpyFromSymbol(laps, flowkernels::loop_clocks, sizeof none)) return error;
  return cudaMemcpyToSymbol(flowkernels::loop_clocks, none, sizeof none);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CUDA, m) {
  m.impl("autoregressive", TORCH_BOX(&flowkernels::autoregressive));
  m.impl("autoregressive_stack", TORCH_BOX(&flowkernels::autoregressive_stack));
}
