// The steps of the sequential loop in CUDA (autoregressive_schedule.h says what they are), made on the device from `visible`: there is no way
// to the host that would not stop the stream. And where the whole schedule lies.
#pragma once

#include "autoregressive_loop_args.h"

namespace flowkernels {

// Where the schedule lies in a workspace of integers. ends[(s + 1) * (n_layers + 1) + l]: units of values l known after step s,
// and row 0 is zeros; for the features, those known before the step. Then what is made of it: works [step][layer], parts
// [panel][layer], the stages and the chunks of 16 bytes that each section has, stages one after another.
struct ScheduleSpace {
  int64_t works, parts, stages, counts, ends, ready, next, chain, seen, visible, size;  // offsets; the first integers are the steps and stages
};

template <class T>
FK_INLINE ScheduleSpace schedule_space(const LoopArgs<T>& args) {
  constexpr int integers = 8, of_a_work = 12;  // of a part, a stage
  ScheduleSpace space{};
  const int64_t steps = args.most_steps(), panels = (steps + args.panel_steps - 1) / args.panel_steps;
  space.works = 4;
  space.parts = space.works + of_a_work * steps * args.n_layers;
  space.stages = space.parts + integers * panels * args.n_layers;
  space.counts = space.stages + integers * int64_t(args.most_stages);
  space.ends = space.counts + 2 * (args.n_layers + (args.inverse ? panels : args.n_layers));
  const int64_t table = static_cast<int64_t>(args.features + 2) * (args.n_layers + 1);
  space.ready = space.ends + table;
  space.next = space.ready + table;
  space.chain = space.next + args.features + 1;
  space.seen = space.chain + args.features + 1;
  space.size = space.seen;
  for (int l = 1; l <= args.n_layers; ++l) space.size += args.layer(l).inputs + 1;
  space.visible = space.size;
  if (args.mirrored)
    for (int l = 1; l <= args.n_layers; ++l) space.size += args.layer(l).outputs;
  space.size = (space.size + 3) / 4 * 4;
  return space;
}

// The staircases of a mirrored network lie in its schedule's workspace
template <class T>
inline void place_visible(LoopArgs<T>& args) {
  if (!args.mirrored) return;
  const int32_t* visible = args.schedule + schedule_space(args).visible;
  for (int l = 0; l < args.n_layers; ++l) {
    args.layers[l].visible = visible;
    visible += args.layers[l].outputs;
  }
}

// Unit k of the last-to-first order sees the units of the layer above that see it: all but the first so many.
template <class T>
FK_INLINE void mirror_visible(const LoopArgs<T>& args, int32_t* visible, int thread, int threads) {
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    const int32_t* above = args.visible_above[l - 1];
    for (int i = layer.unitwise ? layer.outputs : thread; i < layer.outputs; i += threads) {
      const int k = layer.outputs - 1 - i;
      int low = 0, high = layer.inputs;  // how many of the layer above see no more than k units
      while (low < high) {
        const int middle = (low + high) / 2;
        if (above[middle] <= k)
          low = middle + 1;
        else
          high = middle;
      }
      visible[i] = layer.inputs - low;
    }
    visible += layer.outputs;
  }
}

// seen[l][v]: how many units of layer l see no more than v inputs. False where a staircase does not ascend: such a network has no steps, as
// all that follows relies on it.
template <class T>
FK_INLINE bool count_seen(const LoopArgs<T>& args, int32_t* seen, int thread, int threads) {
  bool ascends = true;
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    auto limit = [&](int v) { return v < 0 ? 0 : smaller(v, layer.inputs + 1); };
    if (!layer.unitwise) {
      for (int j = thread; j <= layer.outputs; j += threads) {  // from what unit j - 1 sees up to what unit j sees, j units do
        const int begin = j == 0 ? 0 : limit(layer.visible[j - 1]);
        const int end = j == layer.outputs ? layer.inputs + 1 : limit(layer.visible[j]);
        for (int v = begin; v < end; ++v) seen[v] = j;
        ascends = ascends && begin <= end;
      }
    }
    seen += layer.inputs + 1;
  }
  return ascends;
}

// ready[d][l]: units of values l that can be known when d features are; next[d]: features that are known then
template <class T>
FK_INLINE void find_ready(const LoopArgs<T>& args, const int32_t* seen, int32_t* ready, int32_t* next, int thread, int threads) {
  const int columns = args.n_layers + 1;
  for (int d = thread; d <= args.features; d += threads) {
    int32_t* row = ready + static_cast<int64_t>(d) * columns;
    const int32_t* counts = seen;
    row[0] = args.per_feature() * d;
    for (int l = 1; l <= args.n_layers; ++l) {
      const LoopLayer<T>& layer = args.layer(l);
      const int known = row[layer.source];
      int end = layer.unitwise ? known : counts[known];
      if (layer.residual >= 0) end = smaller(end, row[layer.residual]);
      row[l] = smaller(larger(end, 0), layer.outputs);  // whatever `visible` holds, nothing reads beyond a layer
      counts += layer.inputs + 1;
    }
    row[args.n_layers] -= row[args.n_layers] % args.sums_per_feature();  // a feature is known when both its shift and its raw scale are
    next[d] = row[args.n_layers] / args.sums_per_feature();
  }
}

// chain[s]: features known before step s; returns the number of steps. Ends early where the network is not autoregressive.
template <class T>
FK_INLINE int follow_chain(const LoopArgs<T>& args, const int32_t* next, int32_t* chain) {
  int steps = 0, d = 0;
  for (; d < args.features && next[d] > d; d = next[d]) chain[steps++] = d;
  if (args.mirrored && d == args.features) chain[steps++] = d;
  return steps;
}

template <class T>
FK_INLINE void write_ends(const LoopArgs<T>& args, const int32_t* ready, const int32_t* chain, int steps, int32_t* ends, int thread, int threads) {
  const int columns = args.n_layers + 1;
  for (int i = thread; i < (steps + 1) * columns; i += threads)
    ends[i] = i < columns ? 0 : ready[static_cast<int64_t>(chain[i / columns - 1]) * columns + i % columns];
}

}  // namespace flowkernels
