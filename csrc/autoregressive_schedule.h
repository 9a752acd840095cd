// The schedule of the sequential loop in CUDA: steps, panels, stages and works. Arithmetic on integers alone, used by the kernels
// (cuda/autoregressive_phases.h), by their launcher and by their twin on the CPU, where it is tested.
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
// The gradient of the inverse is the loop of a mirrored network (args.mirrored): the same layers from the last to the first, weights
// transposed, units and features from the last to the first. Its features are pairs, the deltas of a raw scale and a shift, and its
// last layer gives one sum for each feature, what is pushed back onto x (cuda/autoregressive_phases.h has the mathematics).
#pragma once

#include <climits>

#include "autoregressive_loop_args.h"

namespace flowkernels {

// ---- steps, made on the device from `visible`: there is no way to the host that would not stop the stream

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
    for (int i = thread; i < layer.outputs; i += threads) {
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

// ---- stages, works and parts, made on the device too: what a loop would work out again and again between two barriers is read there

enum class StageKind : int16_t { end, context, step, push, panel };

struct alignas(16) Stage {
  StageKind kind;
  int16_t layer;  // block of weights: units [j0, j0 + units) of values `layer` over the inputs [k0, k0 + inputs)
  int k0, inputs, j0, units;  // panel: its number, its steps, the first of them, and the units that RegisterPanel has to a lane or 0
  int16_t finish;   // whether the sums are whole after this
  int16_t members;  // stages that share a slot, this and those that follow
  int offset;       // of the image, in chunks
  int16_t at;       // the same within the slot
  int16_t chunks;   // of all members' images
};

// What an image begins with: all that a warp needs to know of a stage, worked out before
struct alignas(16) Head {
  int kind;
  int next;           // where in the slot the image of the next member is; 0 for none
  int units, inputs;  // as in Stage
  int input, own;     // block: the first input and the first unit in the state of a tile; the latter in `outputs` if they are apart
  int phase;          // inputs before the first since a run began
  int shape;          // units to a thread
  int layer, j0;
  int flags;
  int weights;  // where they are in the image, in bytes
};
constexpr int kFinishes = 1, kHasStairs = 2, kIsApart = 4;  // flags; stairs: not every unit sees all of the inputs

// The weights of a layer that a panel needs, and where they are in its image
struct alignas(16) PanelPart {
  int weights, ld;
  int k0, inputs, j0, units;
  int end;  // where the next layer's begin
  int unused;
};

// The inputs [0, inputs) of this step, counted from the first of them, go into the sums of `targets` units, of which the first `finished`
// are whole then. All integers are whole ones: a warp that takes a work has no time to unpack them.
struct alignas(16) PanelWork {
  int weights, ld;     // where the weight of the first input and the first unit is in the slot, and the stride of an input
  int first, values;   // the first input and the first unit in the state of a tile
  int inputs, targets, finished;
  int activation;      // kThroughHidden: there is more to it than an activation; kFeatures: the layer is the last
  int layer, unit;     // the first unit in its layer
  int staircase;       // 1: not every unit sees all of the inputs
  int unused;
};
constexpr int kThroughHidden = -1, kFeatures = -2;
static_assert(sizeof(Stage) == 32 && sizeof(PanelPart) == 32 && sizeof(PanelWork) == 48 && sizeof(Head) == 48, "8 and 12 integers");

// A panel in registers has, behind its head: a layer each, the steps and one more that is never done, what each unit sees of the panel's
// inputs and in which step it is whole, kPanelUnits a layer.
struct alignas(16) PanelLayer {
  int weights, ld;
  int input, values;  // the first input and the first unit in the state of a tile
  int unit;           // the first in its layer
  int unused[3];
};
struct alignas(16) PanelStep {
  uint32_t counts[kRegisterLayers];  // of each layer: new inputs, and 65,536 times the units that are whole then
  int unit;                          // the first of those units of the last layer
};
struct SeesAndReady {
  int16_t sees, ready;
};
constexpr int kMostPanelWorks = 128;

// Row stride of weights in an image: lanes read aligned groups of units
FK_INLINE int block_ld(int units) { return up_to_multiple(units, 4); }

// Where the weights are in an image, in bytes
FK_INLINE int weights_at(const Stage& stage, int n_layers) {
  int at = sizeof(Head);
  if (stage.kind == StageKind::panel && stage.units > 0)
    at += n_layers * static_cast<int>(sizeof(PanelLayer)) + (stage.inputs + 1) * static_cast<int>(sizeof(PanelStep)) +
          n_layers * kPanelUnits * static_cast<int>(sizeof(SeesAndReady));
  else if (stage.kind == StageKind::panel)
    at += (stage.inputs * n_layers + 1) * static_cast<int>(sizeof(PanelWork));  // and one that is read and never done
  else if (stage.kind == StageKind::push || stage.kind == StageKind::step)
    at += block_ld(stage.units) * 4;  // what each unit sees of the inputs
  return at;
}
FK_INLINE int chunks_of(int64_t bytes) { return static_cast<int>((bytes + 15) / 16); }

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
    const int64_t elements = stage.kind == StageKind::panel ? part(stage.k0 * args.n_layers + args.n_layers - 1).end
                                                            : static_cast<int64_t>(stage.inputs) * block_ld(stage.units);
    return chunks_of(weights_at(stage, args.n_layers) + elements * static_cast<int64_t>(sizeof(T)));
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
  const int64_t chunks = (elements * int64_t(sizeof(T)) + (args.inverse ? works : 0)) / 16 + stages * (kBlockUnits * 4 / 16 + 5);
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

// ---- the images

// The weights of the inputs [k0, k0 + inputs) and the units [j0, j0 + units), by warps: what lies side by side is read by the lanes of one
template <class T>
FK_INLINE void pack_weights(const LoopArgs<T>& args, const T* weight, int64_t ld, int k0, int inputs, int j0, int units, T* to, int to_ld, int thread,
                            int threads) {
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  if (args.mirrored) {  // `weight` is the last element
    for (int j = warp; j < to_ld; j += warps)
      for (int k = lane; k < inputs; k += 32) to[k * to_ld + j] = j < units ? *(weight - (j0 + j) * ld - (k0 + k)) : T(0);
  } else {
    for (int k = warp; k < inputs; k += warps)
      for (int j = lane; j < to_ld; j += 32) to[k * to_ld + j] = j < units ? weight[(k0 + k) * ld + j0 + j] : T(0);
  }
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
FK_INLINE void pack_register_panel(const LoopArgs<T>& args, const Schedule& schedule, const Stage& stage, unsigned char* to, int thread, int threads) {
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
      if (part.inputs > 0) pack_weights(args, layer.weight, layer.ld, part.k0, part.inputs, part.j0, part.units, weights + part.weights, part.ld, thread, threads);
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
    head.flags = (stage.finish ? kFinishes : 0) | (apart ? kIsApart : 0);
    if (stage.inputs > 0)
      pack_weights(args, context ? layer.context_weight : layer.weight, context ? layer.context_ld : layer.ld, stage.k0, stage.inputs, stage.j0,
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
