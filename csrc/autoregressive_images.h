// The images of the sequential loop's stages in CUDA: weights, and all that a warp needs to know, as they lie in a slot of shared memory. A
// launch of its own packs them before the loop; autoregressive_stages.h has their parts.
#pragma once

#include <climits>

#include "autoregressive_schedule.h"
#include "cuda/bfloat16.h"

namespace flowkernels {

// The weights of the inputs [k0, k0 + inputs) and the units [j0, j0 + units), by warps: what lies side by side is read by the lanes of one
template <class T, class Put>
FK_INLINE void each_weight(const LoopArgs<T>& args, const T* weight, int64_t ld, int k0, int inputs, int j0, int units, int to_ld, int thread, int threads,
                           const Put& put) {
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  if (args.mirrored) {  // `weight` is the last element
    for (int j = warp; j < to_ld; j += warps)
      for (int k = lane; k < inputs; k += 32) put(k * to_ld + j, j < units ? *(weight - (j0 + j) * ld - (k0 + k)) : T(0));
  } else {
    for (int k = warp; k < inputs; k += warps)
      for (int j = lane; j < to_ld; j += 32) put(k * to_ld + j, j < units ? weight[(k0 + k) * ld + j0 + j] : T(0));
  }
}

// to: [inputs, to_ld], of T, or, of a block of bfloat16 weights, of Bfloat16
template <class T>
FK_INLINE void pack_weights(const LoopArgs<T>& args, bool is_block, const T* weight, int64_t ld, int k0, int inputs, int j0, int units, T* to, int to_ld,
                            int thread, int threads) {
  const auto each = [&](const auto& put) { each_weight(args, weight, ld, k0, inputs, j0, units, to_ld, thread, threads, put); };
  if constexpr (sizeof(T) == 4) {
    if (args.bfloat16_weights && is_block) return each([&](int i, T w) { reinterpret_cast<Bfloat16*>(to)[i] = rounded(w); });
    if (args.bfloat16_weights) return each([&](int i, T w) { to[i] = widened(rounded(w)); });
  }
  each([&](int i, T w) { to[i] = w; });
}

// Units to a thread of a block, each with 4 rows: the fewest instructions one after another
FK_INLINE int shape_of(int units, int inputs, int groups, int threads, int least, int most) {
  int best = most, fewest = INT_MAX;
  for (int shape = most; shape >= least; shape /= 2) {
    const int rounds = ((units + shape - 1) / shape * groups + threads - 1) / threads, taken = rounds * (inputs * (4 * shape + 3) + 60);
    if (taken >= fewest) continue;
    best = shape;
    fewest = taken;
  }
  return best;
}

template <class T>
FK_INLINE void pack_register_panel(const LoopArgs<T>& args, const Schedule& schedule, const Stage& stage, unsigned char* to, int thread,
                                   int threads) {
  const int n = args.n_layers;
  const PanelWork* works = schedule.works + stage.j0 * n;
  PanelLayer* layers = reinterpret_cast<PanelLayer*>(to);
  PanelStep* steps = reinterpret_cast<PanelStep*>(layers + n);
  SeesAndReady* units = reinterpret_cast<SeesAndReady*>(steps + stage.inputs + 1);
  for (int l = thread; l < n; l += threads) layers[l] = {works[l].weights, works[l].ld, works[l].first, works[l].values, works[l].unit, {}};
  for (int s = thread; s <= stage.inputs; s += threads) {
    PanelStep step{};
    if (s < stage.inputs) {
      for (int l = 0; l < n; ++l) {
        const PanelWork& work = works[s * n + l];
        step.counts[l] = static_cast<uint32_t>(work.inputs) + (static_cast<uint32_t>(work.finished) << 16);
      }
      step.unit = works[s * n + n - 1].unit;
    }
    steps[s] = step;
  }
  for (int i = thread; i < n * kPanelUnits; i += threads) {
    const int l = i / kPanelUnits, j = works[l].unit + i % kPanelUnits;
    SeesAndReady unit{0, -1};
    if (i % kPanelUnits < works[l].targets) {
      const int inputs = works[l].first - args.first_unit(args.layers[l].source);  // before the panel's
      unit.sees = static_cast<int16_t>(larger(0, smaller(args.layers[l].visible[j] - inputs, 32767)));
      for (int s = 0; s < stage.inputs; ++s) {
        const PanelWork& work = works[s * n + l];
        if (j >= work.unit && j < work.unit + work.finished) unit.ready = static_cast<int16_t>(s);
      }
    }
    units[i] = unit;
  }
}

// The i-th stage's image, by the threads of a block
template <class T>
FK_INLINE void pack_stage(const LoopArgs<T>& args, const Schedule& schedule, int i, int thread, int threads) {
  const Stage stage = schedule.stages[i];
  unsigned char* to = args.packed + static_cast<int64_t>(stage.offset) * 16;
  Head head{};
  head.kind = static_cast<int>(stage.kind);
  head.units = stage.units;
  head.inputs = stage.inputs;
  head.weights = weights_at(stage, args.n_layers);
  T* weights = reinterpret_cast<T*>(to + head.weights);
  if (stage.kind == StageKind::panel) {
    const PanelWork* works = schedule.works + stage.j0 * args.n_layers;
    const PanelPart* parts = schedule.parts + stage.k0 * args.n_layers;
    if (stage.units > 0)
      pack_register_panel(args, schedule, stage, to + sizeof(Head), thread, threads);
    else
      for (int w = thread; w <= stage.inputs * args.n_layers; w += threads)
        reinterpret_cast<PanelWork*>(to + sizeof(Head))[w] = w < stage.inputs * args.n_layers ? works[w] : PanelWork{};
    for (int l = 1; l <= args.n_layers; ++l) {
      const LoopLayer<T>& layer = args.layer(l);
      const PanelPart part = parts[l - 1];
      if (part.inputs > 0)
        pack_weights(args, false, layer.weight, layer.ld, part.k0, part.inputs, part.j0, part.units, weights + part.weights, part.ld, thread,
                     threads);
    }
  } else if (stage.kind != StageKind::end) {
    const LoopLayer<T>& layer = args.layer(stage.layer);
    const bool context = stage.kind == StageKind::context, apart = args.apart && stage.layer == args.n_layers;
    const bool is_last_member = i + 1 >= args.schedule[1] || schedule.stages[i + 1].at == 0;
    head.next = is_last_member ? 0 : schedule.stages[i + 1].at * 16;
    head.input = (context ? args.context : args.first_unit(layer.source)) + stage.k0;
    head.own = apart ? stage.j0 : layer.first + stage.j0;
    head.phase = stage.k0 % kRun;
    const int together = stage.finish && stage.layer == args.n_layers ? args.sums_per_feature() : 1;  // a feature's shift and raw scale
    head.shape = shape_of(stage.units, stage.inputs, args.rows / 4, args.consumers, together, sizeof(T) == 4 ? 4 : 2);
    head.layer = stage.layer;
    head.j0 = stage.j0;
    head.flags = (stage.finish ? kFinishes : 0) | (apart ? kIsApart : 0) | (args.bfloat16_weights ? kHasBfloat16 : 0);
    if (stage.inputs > 0)
      pack_weights(args, true, context ? layer.context_weight : layer.weight, context ? layer.context_ld : layer.ld, stage.k0, stage.inputs, stage.j0,
                   stage.units, weights, block_ld(stage.units), thread, threads);
    if (!context && stage.inputs > 0) {
      int32_t* sees = reinterpret_cast<int32_t*>(to + sizeof(Head));
      auto seen_by = [&](int j) { return larger(0, smaller(layer.visible[stage.j0 + j] - stage.k0, stage.inputs)); };
      for (int j = thread; j < block_ld(stage.units); j += threads) sees[j] = seen_by(smaller(j, stage.units - 1));
      if (seen_by(0) < stage.inputs) head.flags |= kHasStairs;
    }
  }
  if (thread == 0) *reinterpret_cast<Head*>(to) = head;
}

}  // namespace flowkernels
