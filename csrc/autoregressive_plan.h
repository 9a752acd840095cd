// How a launch of the sequential loop in CUDA is laid out: panels, rows of a tile, warps, shared memory, blocks. Rules on the host, from the
// network, the batch and the device; what the order of a sum depends on comes from the network alone.
#pragma once

#include "autoregressive_schedule.h"

namespace flowkernels {

struct LoopPlan {
  int rows;              // of one tile: 4, 8, 16 or 32, in float64 4
  int capacity;          // elements of weights in a slot
  int consumers, producers;  // warps that compute, and warps that bring weights
  bool state_in_shared, narrow;
  bool apart;  // the last layer's sums are in a workspace, all else of the state in shared memory
  int64_t shared_bytes, slot_bytes;
  int64_t blocks;        // each takes every blocks-th tile
};

// Bytes of a slot: of a panel's image and what its lanes may read beyond their units, or of a block's of so many weights
template <class T>
FK_INLINE int64_t slot_bytes(const LoopArgs<T>& args, int64_t capacity) {
  const int n = args.n_layers, steps = args.panel_steps;
  const int64_t in_memory = (int64_t(steps) * n + 1) * int64_t(sizeof(PanelWork));
  const int64_t in_registers = n * int64_t(sizeof(PanelLayer) + kPanelUnits * sizeof(SeesAndReady)) + (steps + 1) * int64_t(sizeof(PanelStep));
  const int64_t lists = in_memory > in_registers ? in_memory : in_registers;
  const int64_t panel = sizeof(Head) + lists + (args.panel_capacity + int64_t(3 * kPanelUnits)) * int64_t(sizeof(T));
  const int64_t block = sizeof(Head) + kBlockUnits * 4 + capacity * args.block_item();
  return ((panel > block ? panel : block) + 15) / 16 * 16;
}

// Panels, from the network alone. Their blocks should hold some 2,000 weights: a panel's steps cost no barrier of the thread block, but
// each unit sums over what its panel has made, so that panels of many units per degree must be short. A network of no more than
// 16 KB of weights is one panel.
template <class T>
inline void choose_panels(LoopArgs<T>& args) {
  constexpr int kUsual = 2048, kWhole = 16384 / sizeof(T);
  args.panel_steps = 1;
  args.panel_capacity = kUsual;
  args.in_registers = args.inverse && args.n_layers >= 2 && args.n_layers <= kRegisterLayers;
  if (!args.inverse) return;
  int64_t padded = 0;
  double weights = 0;
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    const bool quick = l == args.n_layers || layer.activation == static_cast<int>(Activation::relu);
    const bool chain = layer.source == l - 1 && !layer.unitwise && layer.residual < 0;
    args.in_registers = args.in_registers && layer.outputs > 0 && chain && (args.mirrored ? layer.gate || l == args.n_layers : quick && !layer.gate);
    if (layer.unitwise) continue;
    padded += int64_t(layer.inputs) * block_ld(layer.outputs);
    weights += double(layer.inputs) * layer.outputs;
  }
  if (padded <= kWhole && args.most_steps() * args.n_layers <= kMostPanelWorks) {
    args.panel_steps = larger(args.most_steps(), 1);
    args.panel_capacity = larger(static_cast<int>(padded), 1024);
    return;
  }
  weights /= double(larger(args.features, 1)) * larger(args.features, 1);  // of the block of one average step
  while (2 * args.panel_steps * args.n_layers <= kMostPanelWorks && args.panel_steps < 16 &&
         4 * args.panel_steps * args.panel_steps * weights <= kUsual)
    args.panel_steps *= 2;
}

template <class T>
constexpr int kResidentThreads = sizeof(T) == 8 ? 384 : 512;  // that 65,536 registers hold at 168 and 128 each

struct Device {
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes; a block's share costs 1 KB more than it asks for
};

template <class T>
inline void choose_blocks(LoopPlan& plan, int64_t batch, const Device& device) {
  const int64_t tiles = (batch + plan.rows - 1) / plan.rows;
  const int64_t by_shared = device.shared_per_multiprocessor / (plan.shared_bytes + 1024);
  const int64_t by_threads = kResidentThreads<T> / (32 * (plan.consumers + plan.producers));
  int64_t resident = by_shared < by_threads ? by_shared : by_threads;
  if (resident < 1 || !plan.state_in_shared) resident = 1;  // a workspace is bounded by one block for each multiprocessor
  plan.blocks = tiles < resident * device.multiprocessors ? tiles : resident * device.multiprocessors;
}

// A panel gives work to eight warps at most; wide layers give more to all, as many as registers allow. A narrow network leaves room for
// several blocks.
template <class T>
inline void set_warps(LoopPlan& plan, bool narrow) {
  plan.narrow = narrow;
  plan.consumers = narrow ? plan.rows / panel_rows(plan.rows) : sizeof(T) == 4 && plan.state_in_shared ? 14 : 8;
  plan.producers = narrow ? 1 : 2;
}

// What a launch decides of a map's arguments
template <class T>
inline void set_launch(LoopArgs<T>& args, int rows, int consumers, int capacity, bool apart) {
  args.rows = rows;
  args.consumers = 32 * consumers;
  args.capacity = capacity;
  args.slot_chunks = chunks_of(slot_bytes(args, capacity));
  args.apart = apart;
  count_most(args);
}

// The arguments of one map in shared memory
template <class T>
constexpr int64_t kStackArgsBytes = (sizeof(LoopArgs<T>) + 15) / 16 * 16;

// Rows: the fewest of 4, 8, 16, 32 with which one wave of blocks takes the batch, as every row of a block shares its weights and a block
// alone is as slow as all of them. Fewer where the state of more does not fit, unless 16 do without the last layer's sums, which a
// step needs one feature of and can ask for ahead; where not even 4 rows fit, the state lies in a workspace. Slots: 32 KB each, or what
// the largest layer needs, or what the state leaves.
template <class T>
inline LoopPlan plan_loop(const LoopArgs<T>& args, const Device& device, bool may_be_apart) {
  LoopPlan plan{};
  int64_t largest = args.panel_capacity;
  int widest = args.features;
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    widest = larger(widest, layer.outputs);
    const int64_t inputs = larger(layer.inputs, args.context_features), most = int64_t(32768) / args.block_item();
    const int64_t all = inputs * block_ld(layer.outputs);
    if (all > largest) largest = all < most ? all : most;
  }

  auto slots = [&](int64_t capacity) { return kSlots * slot_bytes(args, capacity); };
  auto state = [&](int rows, bool apart) { return int64_t(args.units_in_shared(apart)) * unit_stride(rows) * int64_t(sizeof(T)); };
  auto fits = [&](int rows, bool apart) { return slots(args.panel_capacity + 3) + state(rows, apart) <= device.shared_per_block; };
  plan.rows = 4;
  while (plan.rows < kMostRows<T> && (args.batch + plan.rows - 1) / plan.rows > device.multiprocessors) plan.rows *= 2;
  const int wanted = plan.rows;
  while (plan.rows > 4 && !fits(plan.rows, false)) plan.rows /= 2;
  if (may_be_apart && kMostRows<T> >= kRowsApart && args.inverse && !args.mirrored && plan.rows < kRowsApart && wanted >= kRowsApart)
    plan.apart = fits(kRowsApart, true);
  if (plan.apart) plan.rows = kRowsApart;
  plan.state_in_shared = fits(plan.rows, plan.apart);
  if (!plan.state_in_shared) plan.rows = kMostRows<T>;
  set_warps<T>(plan, widest <= 128);
  const int64_t fixed = plan.state_in_shared ? state(plan.rows, plan.apart) : 0, least = args.panel_capacity;
  int64_t capacity = largest;
  while (capacity > least && fixed + slots(capacity + 3) > device.shared_per_block) capacity -= 128;
  if (capacity < least) capacity = least;
  plan.capacity = up_to_multiple(static_cast<int>(capacity), 4);
  plan.slot_bytes = slots(plan.capacity) / kSlots;
  plan.shared_bytes = fixed + kSlots * plan.slot_bytes;

  choose_blocks<T>(plan, args.batch, device);
  return plan;
}

// One launch for all maps of a stack: what each of them needs at most. state_in_shared is false where that does not fit.
template <class T>
inline LoopPlan plan_stack(const LoopArgs<T>* const* maps, int n, Device device, bool may_be_apart = true) {
  const Device given = device;
  device.shared_per_block -= kStackArgsBytes<T>;
  LoopPlan plan = plan_loop(*maps[0], device, may_be_apart);
  bool narrow = plan.narrow;
  for (int i = 1; i < n; ++i) {
    const LoopPlan own = plan_loop(*maps[i], device, may_be_apart);
    if (own.apart != plan.apart) return plan_stack(maps, n, given, false);
    plan.rows = smaller(plan.rows, own.rows);
    plan.capacity = smaller(plan.capacity, own.capacity);
    narrow = narrow && own.narrow;
    plan.state_in_shared = plan.state_in_shared && own.state_in_shared;
    if (own.shared_bytes > plan.shared_bytes) plan.shared_bytes = own.shared_bytes;
  }
  set_warps<T>(plan, narrow);
  plan.shared_bytes += kStackArgsBytes<T>;
  choose_blocks<T>(plan, maps[0]->batch, device);
  return plan;
}

}  // namespace flowkernels
