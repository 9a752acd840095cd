// The schedule of the sequential loop in CUDA: steps, panels, stages and works. Arithmetic on integers alone, used by the kernels
// (cuda/autoregressive_phases.h), by their launcher and by their twin on the CPU, where it is tested. autoregressive_steps.h makes the
// steps, autoregressive_images.h the images.
//
//   step   the hidden units that the newest features complete, layer by layer, then the features that those complete: one per
//          distinct degree, as on the CPU (cpu/autoregressive.h). The forward direction is one step that knows every feature.
//   panel  a number of consecutive steps. Within a panel each unit sums over what the panel itself has made; what earlier panels
//          have made was pushed into its pending sum as dense blocks. After panel q, of the t = q + 1 panels that are done, the last
//          2^m are pushed into the next 2^m panels, 2^m being the largest power of two that divides t. So each pair of panels meets
//          exactly once, nearly all weights are used in large blocks, and each sum receives its inputs in ascending order.
//   stage  a whole panel, or a block of one layer's weights, and what one slot of shared memory holds for it: its image. All images lie
//          packed in a workspace in the order of their use, so that a slot is filled by copying so many bytes, whatever the weights' layout.
//          Pushes of different layers that fit a slot together are joined: no barrier between them.
//   work   a layer's part in one step of a panel: what the newest inputs add to the panel's units that are not known yet, of which the
//          first are known after it.
//
// The order of a sum: bias (or context), then products as the blocks come, each cut at absolute multiples of kRun inputs; a run is one
// chain of multiply-adds that begins at zero. What a panel itself has made comes last, product by product. Steps and panels depend on
// the network alone, so neither the batch nor the layout of a launch changes the order.
//
// The gradient of the inverse is the loop of a mirrored network (args.mirrored, autoregressive_mirror.h): the layers from the last to the
// first, weights transposed, units and features from the last to the first, and copies where what arrives on several ways is added up. Its features are pairs, the deltas of a raw scale and a shift, and its
// last layer gives one sum for each feature, what is pushed back onto x (cuda/autoregressive_phases.h has the mathematics).
#pragma once

#include <climits>

#include "autoregressive_stages.h"
#include "autoregressive_steps.h"

namespace flowkernels {

template <class T>
FK_INLINE int block_units(const LoopArgs<T>& args) {
  return smaller(kBlockUnits, args.capacity / kRun / 4 * 4);
}

// f(stage) for the stages of one product, in order
template <class T, class F>
FK_INLINE void cut(const LoopArgs<T>& args, StageKind kind, int l, int k0, int k1, int j0, int j1, bool finish, F&& f) {
  const LoopLayer<T>& layer = args.layer(l);
  const int widest = block_units(args);
  for (int j = j0; j < j1; j += widest) {
    const int units = smaller(widest, j1 - j), most = args.capacity / block_ld(units);
    int end = k1;
    if (!args.inverse && kind == StageKind::step && k1 > k0) end = larger(k0, smaller(k1, layer.visible[j + units - 1]));  // half of them
    int k = k0;
    do {
      const int next = end - k <= most ? end : (k + most) / kRun * kRun;  // runs are whole: most >= kRun
      f(Stage{kind, static_cast<int16_t>(l), k, next - k, j, units, static_cast<int16_t>(finish && next == end), 1, 0, 0, 0});
      k = next;
    } while (k < end);
  }
}

// The stages of a tile come in sections: each layer's context, then each panel with what it pushes; forward, then each layer.
template <class T>
struct Sections {
  const LoopArgs<T>& args;
  const int32_t* ends;
  int steps;

  FK_INLINE int panels() const { return (steps + args.panel_steps - 1) / args.panel_steps; }
  FK_INLINE int count() const { return args.n_layers + (args.inverse ? panels() : args.n_layers); }
  FK_INLINE const int32_t* row(int s) const { return ends + static_cast<int64_t>(s) * (args.n_layers + 1); }
  FK_INLINE int panel_row(int q) const { return smaller(q * args.panel_steps, steps); }

  // Whether a panel is one stage. One that is not sums in another order, so no launch has a say.
  FK_INLINE bool is_one_stage(const int32_t* from, const int32_t* to) const {
    int64_t elements = 0;
    for (int l = 1; l <= args.n_layers; ++l) {
      const LoopLayer<T>& layer = args.layer(l);
      if (!layer.unitwise) elements += static_cast<int64_t>(to[layer.source] - from[layer.source]) * block_ld(to[l] - from[l]);
    }
    return elements <= args.panel_capacity && to[args.n_layers] - from[args.n_layers] <= kNearUnits;
  }

  // of a panel that is one stage: units that a lane has registers for, or 0 where it is run without
  FK_INLINE int units_of_a_lane(const int32_t* from, const int32_t* to) const {
    if (!args.in_registers) return 0;
    int widest = 0;
    for (int l = 1; l <= args.n_layers; ++l) widest = larger(widest, to[l] - from[l]);
    return widest <= 32 ? 1 : widest <= kPanelUnits ? 2 : 0;
  }

  // f(stage) for the stages of a section, in order
  template <class F>
  FK_INLINE void each_stage(int section, F&& f) const {
    const int n = args.n_layers, l = section % n + 1;
    if (section < n) {
      if (args.layer(l).context_weight) cut(args, StageKind::context, l, 0, args.context_features, 0, args.layer(l).outputs, true, f);
    } else if (!args.inverse) {
      cut(args, StageKind::step, l, 0, args.layer(l).unitwise ? 0 : args.width(args.layer(l).source), 0, args.layer(l).outputs, true, f);
    } else {
      panel(section - n, f);
    }
  }

  FK_INLINE int chunks(const Stage& stage) const {
    if (stage.kind == StageKind::end) return chunks_of(sizeof(Head));
    const int64_t bytes = stage.kind == StageKind::panel ? part(stage.k0 * args.n_layers + args.n_layers - 1).end * static_cast<int64_t>(sizeof(T))
                                                         : static_cast<int64_t>(stage.inputs) * block_ld(stage.units) * args.block_item();
    return chunks_of(weights_at(stage, args.n_layers) + bytes);
  }

  // the p-th work, counted through steps and layers, and the p-th part, through panels and layers
  FK_INLINE PanelWork work(int p) const {
    const int s = p / args.n_layers, l = p % args.n_layers + 1, q = s / args.panel_steps;
    const int32_t *from = row(panel_row(q)), *to = row(panel_row(q + 1)), *begin = row(s), *end = row(s + 1);
    const LoopLayer<T>& layer = args.layer(l);
    const PanelPart own = part(q * args.n_layers + l - 1);
    const int source = layer.source, j = begin[l];
    const bool plain = !layer.unitwise && !layer.gate && layer.residual < 0;
    PanelWork work{};
    work.ld = own.ld;
    work.weights = own.weights + (begin[source] - from[source]) * own.ld + j - from[l];
    work.first = args.first_unit(source) + begin[source];
    work.values = layer.first + (args.apart && l == args.n_layers ? j - from[l] : j);
    work.unit = j;
    work.inputs = layer.unitwise ? 0 : end[source] - begin[source];
    work.targets = (layer.unitwise ? end[l] : to[l]) - j;
    work.finished = end[l] - j;
    work.layer = l;
    work.activation = l == args.n_layers ? kFeatures : plain ? layer.activation : kThroughHidden;
    work.staircase = work.inputs > 0 && work.targets > 0 && layer.visible[j] < end[source];
    return work;
  }
  FK_INLINE PanelPart part(int p) const {
    const int q = p / args.n_layers, l = p % args.n_layers + 1;
    const int32_t *from = row(panel_row(q)), *to = row(panel_row(q + 1));
    PanelPart part{};
    for (int i = 1; i <= l; ++i) {
      const LoopLayer<T>& layer = args.layer(i);
      part.weights = part.end;
      part.ld = block_ld(to[i] - from[i]);
      part.inputs = layer.unitwise ? 0 : to[layer.source] - from[layer.source];
      part.end += part.inputs * part.ld;
    }
    part.k0 = from[args.layer(l).source];
    part.j0 = from[l];
    part.units = to[l] - from[l];
    return part;
  }

 private:
  template <class F>
  FK_INLINE void panel(int q, F&& f) const {
    const int done = q + 1, count = done & -done;
    const int32_t *from = row(panel_row(q)), *now = row(panel_row(done));
    if (is_one_stage(from, now)) {
      f(Stage{StageKind::panel, 0, q, panel_row(done) - panel_row(q), panel_row(q), units_of_a_lane(from, now), 0, 1, 0, 0, 0});
    } else {
      for (int s = panel_row(q); s < panel_row(done); ++s)
        for (int l = 1; l <= args.n_layers; ++l) {
          const LoopLayer<T>& layer = args.layer(l);
          const int32_t *begin = row(s), *end = row(s + 1);
          if (begin[l] < end[l])
            cut(args, StageKind::step, l, from[layer.source], layer.unitwise ? from[layer.source] : end[layer.source], begin[l], end[l], true, f);
        }
    }
    if (panel_row(done) == steps) return;
    const int32_t *first = row(panel_row(done - count)), *last = row(panel_row(done + count));
    for (int l = 1; l <= args.n_layers; ++l) {
      const LoopLayer<T>& layer = args.layer(l);
      if (!layer.unitwise && first[layer.source] < now[layer.source])
        cut(args, StageKind::push, l, first[layer.source], now[layer.source], now[l], last[l], false, f);
    }
  }
};

constexpr int kStagesBehind = 3;  // that end the sequence, for those who read ahead

// Bounds for the number of stages and for the chunks of their images, by what is known without the steps. A product of so many inputs and
// units has at most (units / widest + 1) * (inputs / kRun's multiple in `most` + 2) stages; pushes of one size share the inputs and the
// units of a layer. An input is in `passes` of them for each block of units, and each time its weights are padded by up to 3.
template <class T>
inline void count_most(LoopArgs<T>& args) {
  const int64_t steps = args.most_steps(), panels = (steps + args.panel_steps - 1) / args.panel_steps, widest = block_units(args);
  const int64_t most = args.capacity / block_ld(static_cast<int>(widest)) / kRun * kRun;
  int64_t stages = panels + kStagesBehind, levels = 1, elements = 0;
  while ((int64_t(1) << levels) <= panels) ++levels;
  const int64_t passes = args.inverse ? levels + 1 + args.panel_steps : 1;
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    const int64_t blocks = layer.outputs / widest + 1, pieces = layer.inputs / most + 2;
    stages += blocks * (args.context_features / most + 2);
    stages += args.inverse ? args.panel_steps * (layer.inputs / most + 2 * panels) + blocks * pieces : blocks * pieces;
    if (args.inverse) stages += levels * (blocks * pieces + 2 * blocks + pieces + 2 * panels);
    elements += int64_t(layer.unitwise ? 0 : layer.inputs) * (layer.outputs + 3 * blocks * passes);
    if (layer.context_weight) elements += int64_t(args.context_features) * (layer.outputs + 3 * blocks);
  }
  const int64_t works = (steps * args.n_layers + panels) * int64_t(sizeof(PanelWork)) + panels * args.n_layers * (kPanelUnits * 4 + 32);
  const int64_t in_panels = panels * args.panel_capacity * (int64_t(sizeof(T)) - args.block_item());  // more than in a block
  const int64_t chunks = (elements * args.block_item() + (args.inverse ? works + in_panels : 0)) / 16 + stages * (kBlockUnits * 4 / 16 + 5);
  args.is_too_large = stages > INT_MAX / 64 || chunks > INT_MAX;
  args.most_stages = static_cast<int>(args.is_too_large ? 0 : stages);
  args.most_chunks = static_cast<int>(args.is_too_large ? 0 : chunks);
}

// A schedule as the loop reads it
struct Schedule {
  const int32_t* ends;
  const PanelWork* works;
  const PanelPart* parts;
  Stage* stages;
  int steps;

  template <class T>
  FK_INLINE explicit Schedule(const LoopArgs<T>& args) {
    const ScheduleSpace space = schedule_space(args);
    ends = args.schedule + space.ends;
    works = reinterpret_cast<const PanelWork*>(args.schedule + space.works);
    parts = reinterpret_cast<const PanelPart*>(args.schedule + space.parts);
    stages = reinterpret_cast<Stage*>(args.schedule + space.stages);
    steps = args.schedule[0];
  }
};

// Phases of making them; a barrier of the block belongs after each.
template <class T>
FK_INLINE void write_works(const LoopArgs<T>& args, int steps, int thread, int threads) {
  const ScheduleSpace space = schedule_space(args);
  const Sections<T> sections{args, args.schedule + space.ends, steps};
  PanelWork* works = reinterpret_cast<PanelWork*>(args.schedule + space.works);
  PanelPart* parts = reinterpret_cast<PanelPart*>(args.schedule + space.parts);
  if (args.inverse) {
    for (int i = thread; i < steps * args.n_layers; i += threads) works[i] = sections.work(i);
    for (int i = thread; i < sections.panels() * args.n_layers; i += threads) parts[i] = sections.part(i);
  }
  for (int i = thread; i < sections.count(); i += threads) {
    int count = 0, chunks = 0;
    sections.each_stage(i, [&](const Stage& stage) {
      ++count;
      chunks += sections.chunks(stage);
    });
    args.schedule[space.counts + 2 * i] = count;
    args.schedule[space.counts + 2 * i + 1] = chunks;
  }
}

template <class T>
FK_INLINE void write_stages(const LoopArgs<T>& args, int steps, int thread, int threads) {
  const ScheduleSpace space = schedule_space(args);
  const Sections<T> sections{args, args.schedule + space.ends, steps};
  Stage* stages = reinterpret_cast<Stage*>(args.schedule + space.stages);
  const int32_t* counts = args.schedule + space.counts;
  for (int i = thread; i < sections.count(); i += threads) {
    int at = 0, offset = 0, head = -1;
    for (int before = 0; before < i; ++before) {
      at += counts[2 * before];
      offset += counts[2 * before + 1];
    }
    const int most = args.most_stages - kStagesBehind;  // never reached, and never passed
    sections.each_stage(i, [&](Stage stage) {
      const int chunks = sections.chunks(stage);
      if (at >= most || offset + chunks > args.most_chunks - kStagesBehind * static_cast<int>(sizeof(Head) / 16)) return;
      // blocks of one layer may share sums, which a barrier keeps in order
      const bool joins = head >= 0 && stage.kind == StageKind::push && stages[head].kind == StageKind::push &&
                         stage.layer != stages[at - 1].layer && stages[head].chunks + chunks <= args.slot_chunks;
      if (!joins) head = at;
      stage.offset = offset;
      stage.at = static_cast<int16_t>(joins ? stages[head].chunks : 0);
      stage.chunks = static_cast<int16_t>(chunks);
      stages[at] = stage;
      if (joins) {
        ++stages[head].members;
        stages[head].chunks = static_cast<int16_t>(stages[head].chunks + chunks);
      }
      ++at;
      offset += chunks;
    });
    if (i + 1 == sections.count()) {
      at = smaller(at, most);
      for (int behind = 0; behind < kStagesBehind; ++behind) {
        Stage stage{StageKind::end, 0, 0, 0, 0, 0, 0, 1, offset, 0, 0};
        stage.chunks = static_cast<int16_t>(sections.chunks(stage));
        offset += stage.chunks;
        stages[at++] = stage;
      }
      args.schedule[1] = at;
    }
  }
}

}  // namespace flowkernels
