// A twin of the CUDA loop (cuda/autoregressive.cu) on the CPU, by which the tests reach its schedule, its indices and its arithmetic:
//   flowkernels::_autoregressive_twin(<arguments of autoregressive>, int[] layout) -> (Tensor, Tensor)
//     layout: rows, capacity, consumers, producers, panel_steps (0: the rule's, and its panel_capacity), backwards, panel_capacity, apart,
//       whether panels do without registers
//   flowkernels::_autoregressive_steps(<arguments of autoregressive>) -> Tensor       `ends`, [steps + 1, layers + 1]
//   flowkernels::_autoregressive_plan(<arguments of autoregressive>, int[] device) -> int[]
//     device: multiprocessors, shared memory of a block and of a multiprocessor, batch, whether weights are bfloat16. The plan's members,
//     panel_steps, units
//   flowkernels::_autoregressive_stack_twin(<arguments of autoregressive_stack>, int[] layout) -> (Tensor, Tensor, Tensor)
// Each phase runs for all threads of a block in turn, forwards or backwards; a copy into a slot lands at the last moment that the kernel's
// waits allow, and slots begin full of NaN. What is left to a GPU: the barriers themselves, memory, speed.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "autoregressive_images.h"
#include "autoregressive_network.h"
#include "cuda/autoregressive_phases.h"
#include "cpu/tensor.h"
#include "tests/twin.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct SerialLanes {
  bool backwards;
  template <class S>
  struct PerLane {
    S all[32];
    S& operator[](int lane) { return all[lane]; }
  };
  template <class F>
  void each(F&& f) const {
    for (int i = 0; i < 32; ++i) f(backwards ? 31 - i : i);
  }
};

// The steps of a network: what autoregressive_schedule of the kernel does
template <class T>
std::vector<int32_t> find_steps(LoopArgs<T>& args, int threads, bool backwards) {
  const ScheduleSpace space = schedule_space(args);
  std::vector<int32_t> schedule(space.size, -1);
  int32_t* s = args.schedule = schedule.data();
  place_visible(args);
  if (args.inverse) {
    bool ascends = true;
    all_threads(threads, backwards, [&](int t) { ascends = count_seen(args, s + space.seen, t, threads) && ascends; });
    all_threads(threads, backwards, [&](int t) { find_ready(args, s + space.seen, s + space.ready, s + space.next, t, threads); });
    s[0] = ascends ? follow_chain(args, s + space.next, s + space.chain) : 0;
    all_threads(threads, backwards, [&](int t) { write_ends(args, s + space.ready, s + space.chain, s[0], s + space.ends, t, threads); });
  } else {
    s[0] = 1;
  }
  all_threads(threads, backwards, [&](int t) { write_works(args, s[0], t, threads); });
  const Sections<T> sections{args, s + space.ends, s[0]};
  int stages = kStagesBehind, chunks = kStagesBehind * chunks_of(sizeof(Head));
  for (int i = 0; i < sections.count(); ++i) {
    stages += s[space.counts + 2 * i];
    chunks += s[space.counts + 2 * i + 1];
  }
  STD_TORCH_CHECK(stages <= args.most_stages, "more stages than their bound: ", stages, " and ", args.most_stages);
  STD_TORCH_CHECK(chunks <= args.most_chunks, "more chunks than their bound: ", chunks, " and ", args.most_chunks);
  all_threads(threads, backwards, [&](int t) { write_stages(args, s[0], t, threads); });
  return schedule;
}

// Their images: what autoregressive_pack of the kernel does
template <class T>
std::vector<Pack<int32_t, 4>> pack(LoopArgs<T>& args, int threads, bool backwards) {
  std::vector<Pack<int32_t, 4>> images(args.most_chunks);
  if (!images.empty()) std::memset(images.data(), 0xff, images.size() * 16);
  args.packed = reinterpret_cast<unsigned char*>(images.data());
  const Schedule schedule(args);
  for (int i = 0; i < args.schedule[1]; ++i) all_threads(threads, backwards, [&](int t) { pack_stage(args, schedule, i, t, threads); });
  return images;
}

struct Layout {
  int rows, capacity, consumers, producers;
  bool backwards, apart;
};

// autoregressive_loop of the kernel for one tile
template <class T, int ROWS, bool APART = false>
void run_tile(const LoopArgs<T>& args, const Layout& layout, int64_t first_row) {
  const int threads = 32 * (layout.consumers + layout.producers), copiers = 32 * layout.producers;
  const bool backwards = layout.backwards;
  auto empty_units = [](int units) {
    std::vector<Pack<T, 4>> packs(static_cast<size_t>(units) * unit_stride(ROWS) / 4);
    for (Pack<T, 4>& pack : packs) std::fill_n(pack.at, 4, std::numeric_limits<T>::quiet_NaN());
    return packs;
  };
  std::vector<Pack<T, 4>> state = empty_units(args.units_in_shared()), outputs = empty_units(args.units_in_workspace(true));
  std::vector<Pack<int32_t, 4>> memory(static_cast<size_t>(kSlots) * args.slot_chunks);
  std::memset(memory.data(), 0xff, memory.size() * 16);
  auto slot = [&](int i) { return reinterpret_cast<unsigned char*>(memory.data() + static_cast<size_t>(i % kSlots) * args.slot_chunks); };

  T *values = reinterpret_cast<T*>(state.data()), *apart = reinterpret_cast<T*>(outputs.data());
  const Tile<T, ROWS, false, APART> tile{args, Schedule(args), values, first_row, apart};
  const Stage* stages = tile.schedule.stages;
  std::vector<LateCopies> copies(threads);
  const SerialLanes lanes{backwards};
  std::vector<int> heads{0};  // of the stages that share a slot
  for (; stages[heads.back()].kind != StageKind::end; heads.push_back(heads.back() + stages[heads.back()].members)) {
  }
  const int used = static_cast<int>(heads.size()) - 1;
  for (int behind = 1; behind < kStagesBehind; ++behind) heads.push_back(heads.back() + 1);
  for (int i = 0; i < kSlots - 1; ++i)
    all_threads(threads, backwards, [&](int t) { tile.produce(stages[heads[i]], slot(i), t, threads, copies[t]); });
  all_threads(threads, backwards, [&](int t) { tile.begin(t, threads); });
  all_threads(threads, backwards, [&](int t) { copies[t].template wait<0>(); });
  for (int i = 0; i < used; ++i) {
    auto produce = [&] {
      all_threads(copiers, backwards, [&](int t) {
        tile.produce(stages[heads[i + kSlots - 1]], slot(i + kSlots - 1), t, copiers, copies[t]);
        copies[t].template wait<kSlots - 2>();
      });
    };
    if (!backwards) produce();
    for (int w = 0; w < layout.consumers; ++w)
      tile.consume(slot(i), backwards ? layout.consumers - 1 - w : w, layout.consumers, lanes);
    if (backwards) produce();
  }
  all_threads(threads, backwards, [&](int t) { tile.sum_logs(t, threads); });
  all_threads(threads, backwards, [&](int t) { tile.write(t, threads); });
}

template <class T>
void run_loop(LoopArgs<T>& args, const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 9, "a layout has 9 numbers");
  auto number = [&](int i) { return static_cast<int>(numbers[i]); };
  const Layout layout{number(0), number(1), number(2), number(3), numbers[5] != 0, numbers[7] != 0};
  if (numbers[4] > 0) {
    args.panel_steps = number(4);
    args.panel_capacity = number(6);
  }
  args.in_registers = args.in_registers && numbers[8] == 0;
  set_launch(args, layout.rows, layout.consumers, std::max(layout.capacity, args.panel_capacity), layout.apart && args.inverse);
  const std::vector<int32_t> schedule = find_steps(args, 96, layout.backwards);
  const std::vector<Pack<int32_t, 4>> images = pack(args, 64, layout.backwards);
  for (int64_t row = 0; row < args.batch; row += layout.rows) {
    auto tile = layout.rows == 4    ? run_tile<T, 4>
                : layout.rows == 8  ? run_tile<T, 8>
                : layout.rows == 16 ? run_tile<T, 16>
                                    : run_tile<T, 32>;
    if (args.apart) tile = run_tile<T, kRowsApart, true>;
    tile(args, layout, row);
  }
}

template <class T>
std::tuple<Tensor, Tensor> run(const LoopTensors& tensors, const std::vector<int64_t>& layout) {
  LoopNetwork<T> network(tensors);
  LoopArgs<T>& args = network.args;
  Tensor y = empty(tensors.x, {args.batch, args.features}), logabsdet = empty(tensors.x, {args.batch});
  args.y = static_cast<T*>(y.mutable_data_ptr());
  args.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  run_loop<T>(args, layout);
  return {y, logabsdet};
}

template <class T>
Tensor steps(const LoopTensors& tensors) {
  LoopNetwork<T> network(tensors);
  set_launch(network.args, 4, 1, network.args.panel_capacity, false);
  const std::vector<int32_t> schedule = find_steps(network.args, 32, false);
  const std::vector<int64_t> size{schedule[0] + 1, network.args.n_layers + 1};
  Tensor ends = torch::stable::new_empty(tensors.visible[0], size);
  std::memcpy(ends.mutable_data_ptr(), schedule.data() + schedule_space(network.args).ends, size[0] * size[1] * sizeof(int32_t));
  return ends;
}

template <class T>
std::vector<int64_t> plan(const LoopTensors& tensors, const std::vector<int64_t>& device) {
  LoopNetwork<T> network(tensors);
  network.args.batch = device[3];
  network.args.bfloat16_weights = device[4] != 0;
  const LoopPlan p = plan_loop(network.args, {static_cast<int>(device[0]), device[1], device[2]}, true);
  return {p.rows,         p.capacity,   p.consumers, p.producers, p.state_in_shared,
          p.shared_bytes, p.slot_bytes, p.blocks,    network.args.panel_steps, network.args.units, p.apart};
}

#define FK_ARGUMENTS                                                                                                                          \
  Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> context_weights,       \
      std::vector<Tensor> context_biases, std::vector<Tensor> visible, std::optional<Tensor> order, std::vector<int64_t> activations,          \
      std::vector<int64_t> wiring, int64_t scale_kind, double scale_p0, double scale_p1, int64_t form, bool inverse
#define FK_TENSORS                                                                                                                  \
  LoopTensors {                                                                                                                     \
    x, context, weights, biases, context_weights, context_biases, visible, order, activations, wiring,                              \
        ScaleMapParams{static_cast<int>(scale_kind), scale_p0, scale_p1}, static_cast<int>(form), inverse                           \
  }

template <class T>
std::tuple<Tensor, Tensor, Tensor> run(const StackTensors& tensors, bool keep, const std::vector<int64_t>& layout) {
  const Tensor& x = tensors.x;
  const int64_t n = static_cast<int64_t>(tensors.orders.size());
  Tensor y = empty(x, {x.size(0), x.size(1)}), logabsdet = empty(x, {x.size(0)}), kept = empty(x, {keep ? n - 1 : 0, x.size(0), x.size(1)});
  std::vector<LoopNetwork<T>> networks = read_stack<T>(tensors, static_cast<T*>(y.mutable_data_ptr()), static_cast<T*>(kept.mutable_data_ptr()),
                                                       static_cast<T*>(logabsdet.mutable_data_ptr()), keep);
  for (LoopNetwork<T>& network : networks) run_loop<T>(network.args, layout);
  return {y, logabsdet, kept};
}

std::tuple<Tensor, Tensor, Tensor> stack_twin(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                              std::vector<Tensor> context_weights, std::vector<Tensor> context_biases, std::vector<Tensor> visible,
                                              std::vector<Tensor> orders, std::vector<Tensor> affines, std::vector<int64_t> activations,
                                              std::vector<int64_t> wiring, std::vector<int64_t> stages, std::vector<double> scales, bool keep,
                                              std::vector<int64_t> layout) {
  const StackTensors tensors{x,      context, weights,     biases, context_weights, context_biases, visible,
                             orders, affines, activations, wiring, stages,          scales};
  return x.scalar_type() == ScalarType::Float ? run<float>(tensors, keep, layout) : run<double>(tensors, keep, layout);
}

std::tuple<Tensor, Tensor> twin(FK_ARGUMENTS, std::vector<int64_t> layout) {
  return x.scalar_type() == ScalarType::Float ? run<float>(FK_TENSORS, layout) : run<double>(FK_TENSORS, layout);
}
Tensor twin_steps(FK_ARGUMENTS) { return x.scalar_type() == ScalarType::Float ? steps<float>(FK_TENSORS) : steps<double>(FK_TENSORS); }
std::vector<int64_t> twin_plan(FK_ARGUMENTS, std::vector<int64_t> device) {
  return x.scalar_type() == ScalarType::Float ? plan<float>(FK_TENSORS, device) : plan<double>(FK_TENSORS, device);
}

}  // namespace
}  // namespace flowkernels

#define FK_SCHEMA                                                                                                                   \
  "Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, Tensor[] context_weights, Tensor[] context_biases, Tensor[] visible, " \
  "Tensor? order, int[] activations, int[] wiring, int scale_kind, float scale_p0, float scale_p1, int form, bool inverse"

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels, m) {
  m.def("_autoregressive_twin(" FK_SCHEMA ", int[] layout) -> (Tensor, Tensor)");
  m.def(
      "_autoregressive_stack_twin(Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, Tensor[] context_weights, Tensor[] context_biases, "
      "Tensor[] visible, Tensor[] orders, Tensor[] affines, int[] activations, int[] wiring, int[] stages, float[] scales, bool keep, int[] layout) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("_autoregressive_steps(" FK_SCHEMA ") -> Tensor");
  m.def("_autoregressive_plan(" FK_SCHEMA ", int[] device) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("_autoregressive_twin", TORCH_BOX(&flowkernels::twin));
  m.impl("_autoregressive_stack_twin", TORCH_BOX(&flowkernels::stack_twin));
  m.impl("_autoregressive_steps", TORCH_BOX(&flowkernels::twin_steps));
  m.impl("_autoregressive_plan", TORCH_BOX(&flowkernels::twin_plan));
}
