// The schedule of the sequential loop in CUDA: steps, panels and stages, and how a launch is laid out. Arithmetic on integers alone,
// used by the kernels (cuda/autoregressive_phases.h), by their launcher and by their twin on the CPU, where it is tested.
//
//   step   the hidden units that the newest features complete, layer by layer, then the features that those complete: one per
//          distinct degree, as on the CPU (cpu/autoregressive.h). The forward direction is one step that knows every feature.
//   panel  a number of consecutive steps. Within a panel each unit sums over what the panel itself has made; what earlier panels
//          have made was pushed into its pending sum as dense blocks. After panel q, of the t = q + 1 panels that are done, the last
//          2^m are pushed into the next 2^m panels, 2^m being the largest power of two that divides t. So each pair of panels meets
//          exactly once, nearly all weights are used in large blocks, and each sum receives its inputs in ascending order.
//   stage  what one slot of weights in shared memory feeds: a whole panel, or a block of one layer's weights.
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
#include <cstdint>

#include "cuda/device_math.h"

namespace flowkernels {

constexpr int kMaxLayers = 32;  // beyond them Python runs the reference: all layers are one kernel argument
constexpr int kRun = 32;        // inputs in one chain of multiply-adds
constexpr int kRowsApart = 16;  // of a tile whose last layer's sums are in a workspace
constexpr int kSlots = 3;       // stages in shared memory: one is used, one has landed or is landing, one is asked for
constexpr int kBlockUnits = 256;  // units of one block of weights
constexpr int kNearUnits = 64;    // of the last layer in a panel, at most
constexpr int kMirroredBlockUnits = 252;  // 4 less than a multiple of the banks: a transposed copy meets each bank once
template <class T>
constexpr int kMostRows = sizeof(T) == 8 ? 4 : 32;  // of a tile; and of each whose state is not in shared memory

// Elements from one unit to the next in the state of a tile: lanes read the same 4 rows of units side by side, and 32 rows are all banks.
FK_INLINE constexpr int unit_stride(int rows) { return rows == 32 ? 36 : rows; }

FK_INLINE int smaller(int a, int b) { return a < b ? a : b; }
FK_INLINE int larger(int a, int b) { return a > b ? a : b; }
FK_INLINE int up_to_multiple(int n, int of) { return (n + of - 1) / of * of; }

// One layer of the conditioner, as in cpu/autoregressive.h, and where its values are: values 0 are the features.
template <class T>
struct LoopLayer {
  const T* weight;  // [inputs, outputs], row stride ld; of a unitwise layer [outputs], or null for ones
  int64_t ld;
  const T* bias;            // [outputs]; null for zeros
  const T* context_weight;  // [context features, outputs], row stride context_ld; null without context
  int64_t context_ld;
  const T* context_bias;
  const int32_t* visible;  // [outputs], ascending
  int inputs, outputs;
  int activation, context_activation;
  int source, residual;  // residual -1 for none
  int first, gates;      // first unit of its values, and of its gates, in the state of a tile; gates -1 for none
  int column;            // mirrored: first column of its values in args.made
  int copy, context_copy;  // elements of a row of weights that one copy into a slot takes: 1, 2 or 4, as they are aligned
  bool unitwise, gate;

  // whether the context term is finished before it meets the sum
  FK_INLINE bool own_context_term() const { return gate || context_bias || context_activation != static_cast<int>(Activation::identity); }
};

template <class T>
struct LoopArgs {
  int n_layers, features, context_features;
  int context;      // first unit of the context in the state of a tile
  int units;        // of the state
  int panel_steps, panel_capacity;  // steps of a panel, and how many elements its weights may have to be one stage
  int capacity;                     // elements of weights in a slot
  int most_stages;                  // that this can take
  bool apart;                       // the last layer's sums are in a workspace; those of a panel come near, to where they would begin
  bool inverse;
  const T *x, *context_rows;
  int64_t x_row, x_column, context_row, context_column, batch;
  const int64_t* order;  // feature generated k-th; null for 0, 1, 2, ...
  int form;
  ScaleMapParams scale;
  T *y, *logabsdet;   // contiguous
  const T* affine;    // null, or [3, features]: what is read of x is (x + affine[0]) * affine[1] + affine[2]
  bool accumulate;    // logabsdet holds that of the maps before
  // of a mirrored network alone: x is the gradient by x, the context is x itself with one more unit for dlogabsdet, y is dz
  bool mirrored;
  const T* made;  // [batch, columns], row stride made_row: what the layers of the network itself gave, first layer first
  int64_t made_row, dlogabsdet_step;
  const T* dlogabsdet;
  T* deltas;  // [batch, columns], contiguous
  int columns;
  const int32_t* visible_above[kMaxLayers];  // the staircase that layer l is the mirror of

  int32_t* schedule;  // ScheduleSpace
  T* workspace;       // [blocks][units][rows]: what of the state is not in shared memory
  LoopLayer<T> layers[kMaxLayers];  // at the end: of a stack's maps, only the layers in use are given to a kernel

  FK_INLINE const LoopLayer<T>& layer(int l) const { return layers[l - 1]; }
  FK_INLINE int first_unit(int l) const { return l == 0 ? 0 : layer(l).first; }
  FK_INLINE int per_feature() const { return mirrored ? 2 : 1; }     // values 0
  FK_INLINE int sums_per_feature() const { return mirrored ? 1 : 2; }  // of the last layer
  FK_INLINE int width(int l) const { return l == 0 ? per_feature() * features : layer(l).outputs; }
  // what of the state is in shared memory; the last layer's sums are last
  FK_INLINE int units_in_shared() const { return apart ? units - layer(n_layers).outputs + kNearUnits : units; }
  FK_INLINE int units_in_workspace(bool state_in_shared) const { return !state_in_shared ? units : apart ? layer(n_layers).outputs : 0; }
  // steps of the inverse, at most; after the last feature, a mirrored network has units that only its deltas reach
  FK_INLINE int most_steps() const { return inverse ? features + (mirrored ? 1 : 0) : 1; }
  FK_INLINE int column(int l) const { return l == 0 ? columns - 2 * features : layer(l).column; }
};

// ---- steps, made on the device from `visible`: there is no way to the host that would not stop the stream

// Where the schedule lies in a workspace of integers. ends[(s + 1) * (n_layers + 1) + l]: units of values l known after step s,
// and row 0 is zeros; for the features, those known before the step. Then what is made of it: works [step][layer], parts
// [panel][layer], the counts of stages that each section has, stages one after another.
struct ScheduleSpace {
  int64_t works, parts, stages, counts, ends, ready, next, chain, seen, visible, size;  // offsets; the first integer is the number of steps
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
  space.ends = space.counts + args.n_layers + (args.inverse ? panels : args.n_layers);
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

// seen[l][v]: how many units of layer l see no more than v inputs
template <class T>
FK_INLINE void count_seen(const LoopArgs<T>& args, int32_t* seen, int thread, int threads) {
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    auto limit = [&](int v) { return v < 0 ? 0 : smaller(v, layer.inputs + 1); };
    if (!layer.unitwise) {
      for (int j = thread; j <= layer.outputs; j += threads) {  // from what unit j - 1 sees up to what unit j sees, j units do
        const int begin = j == 0 ? 0 : limit(layer.visible[j - 1]);
        const int end = j == layer.outputs ? layer.inputs + 1 : limit(layer.visible[j]);
        for (int v = begin; v < end; ++v) seen[v] = j;
      }
    }
    seen += layer.inputs + 1;
  }
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
  int k0, inputs, j0, units;
  int16_t finish;  // whether the sums are whole after this
  int16_t lead;    // columns in the slot before unit j0: copies begin where memory is aligned
  int row, rows;   // panel: its first step, and how many
};

// The weights of a layer that a panel needs, and where they are in its slot
struct alignas(16) PanelPart {
  int weights, ld;
  int k0, inputs, j0, units, lead;
  int end;  // where the next layer's begin
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
static_assert(sizeof(Stage) == 32 && sizeof(PanelPart) == 32 && sizeof(PanelWork) == 48, "8 and 12 integers");
constexpr int kMostPanelWorks = 128;

// Row stride of a block of weights in its slot: lanes read aligned groups of units
FK_INLINE int block_ld(int units) { return up_to_multiple(units, 4); }
// and of a panel's weights, whose lead is one of 0 to 3 columns: what fits does not depend on how memory is aligned
FK_INLINE int panel_ld(int units) { return block_ld(units + 3); }

template <class T>
FK_INLINE int block_units(const LoopArgs<T>& args) {
  return smaller(args.mirrored ? kMirroredBlockUnits : kBlockUnits, args.capacity / kRun / 4 * 4 - 4);
}

// f(stage) for the stages of one product, in order
template <class T, class F>
FK_INLINE void cut(const LoopArgs<T>& args, StageKind kind, int l, int k0, int k1, int j0, int j1, bool finish, F&& f) {
  const LoopLayer<T>& layer = args.layer(l);
  const int copy = kind == StageKind::context ? layer.context_copy : layer.copy, widest = block_units(args);
  for (int j = j0; j < j1; j += widest) {
    const int units = smaller(widest, j1 - j), lead = j % copy, most = args.capacity / block_ld(lead + units);
    int end = k1;
    if (!args.inverse && kind == StageKind::step && k1 > k0) end = larger(k0, smaller(k1, layer.visible[j + units - 1]));  // half of them
    int k = k0;
    do {
      const int next = end - k <= most ? end : (k + most) / kRun * kRun;  // runs are whole: most >= kRun
      f(Stage{kind, static_cast<int16_t>(l), k, next - k, j, units, static_cast<int16_t>(finish && next == end), static_cast<int16_t>(lead), 0, 0});
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
      if (!layer.unitwise) elements += static_cast<int64_t>(to[layer.source] - from[layer.source]) * panel_ld(to[l] - from[l]);
    }
    return elements <= args.panel_capacity && to[args.n_layers] - from[args.n_layers] <= kNearUnits;
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
    work.weights = own.weights + own.lead + (begin[source] - from[source]) * own.ld + j - from[l];
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
      part.ld = panel_ld(to[i] - from[i]);
      part.inputs = layer.unitwise ? 0 : to[layer.source] - from[layer.source];
      part.end += part.inputs * part.ld;
    }
    part.k0 = from[args.layer(l).source];
    part.j0 = from[l];
    part.units = to[l] - from[l];
    part.lead = part.j0 % args.layer(l).copy;
    return part;
  }

 private:
  template <class F>
  FK_INLINE void panel(int q, F&& f) const {
    const int done = q + 1, count = done & -done;
    const int32_t *from = row(panel_row(q)), *now = row(panel_row(done));
    if (is_one_stage(from, now)) {
      f(Stage{StageKind::panel, 0, 0, 0, 0, 0, 0, 0, panel_row(q), panel_row(done) - panel_row(q)});
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

// A bound for the number of stages, by what is known without the steps. A product of so many inputs and units has at most
// (units / widest + 1) * (inputs / kRun's multiple in `most` + 2); pushes of one size share the inputs and the units of a layer.
template <class T>
inline int count_most_stages(const LoopArgs<T>& args) {
  const int64_t steps = args.most_steps(), panels = (steps + args.panel_steps - 1) / args.panel_steps, widest = block_units(args);
  const int64_t most = args.capacity / block_ld(static_cast<int>(widest) + 3) / kRun * kRun;
  int64_t bound = panels + kStagesBehind, levels = 1;
  while ((int64_t(1) << levels) <= panels) ++levels;
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    const int64_t blocks = layer.outputs / widest + 1, pieces = layer.inputs / most + 2;
    bound += blocks * (args.context_features / most + 2);
    bound += args.inverse ? args.panel_steps * (layer.inputs / most + 2 * panels) + blocks * pieces : blocks * pieces;
    if (args.inverse) bound += levels * (blocks * pieces + 2 * blocks + pieces + 2 * panels);
  }
  return static_cast<int>(bound < INT_MAX / 64 ? bound : INT_MAX / 64);
}

template <class T>
FK_INLINE const Stage* stages_of(const LoopArgs<T>& args) {
  return reinterpret_cast<const Stage*>(args.schedule + schedule_space(args).stages);
}

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
    int count = 0;
    sections.each_stage(i, [&](const Stage&) { ++count; });
    args.schedule[space.counts + i] = count;
  }
}

template <class T>
FK_INLINE void write_stages(const LoopArgs<T>& args, int steps, int thread, int threads) {
  const ScheduleSpace space = schedule_space(args);
  const Sections<T> sections{args, args.schedule + space.ends, steps};
  Stage* stages = reinterpret_cast<Stage*>(args.schedule + space.stages);
  const int32_t* counts = args.schedule + space.counts;
  for (int i = thread; i < sections.count(); i += threads) {
    int at = 0;
    for (int before = 0; before < i; ++before) at += counts[before];
    const int most = args.most_stages - kStagesBehind;  // a staircase that does not ascend may come to more: nothing is written beyond
    sections.each_stage(i, [&](const Stage& stage) {
      if (at < most) stages[at++] = stage;
    });
    if (i + 1 == sections.count())
      for (int behind = 0; behind < kStagesBehind; ++behind) stages[smaller(at, most) + behind] = Stage{};
  }
}

// ---- the layout of a launch

struct LoopPlan {
  int rows;              // of one tile: 4, 8, 16 or 32, in float64 4
  int capacity;          // elements of weights in a slot
  int consumers, producers;  // warps that compute, and warps that bring weights
  bool state_in_shared, narrow;
  bool apart;  // the last layer's sums are in a workspace, all else of the state in shared memory
  int64_t shared_bytes, slot_bytes;
  int64_t blocks;        // each takes every blocks-th tile
};

// A slot: the works of a panel and one more that is never done, `visible` of the units, weights
struct SlotLayout {
  int64_t works, visible, weights, size;  // bytes
};

FK_INLINE SlotLayout slot_layout(int panel_steps, int n_layers, int capacity, int64_t item_bytes) {
  SlotLayout layout{};
  layout.visible = layout.works + (int64_t(panel_steps) * n_layers + 1) * int64_t(sizeof(PanelWork));
  layout.weights = (layout.visible + kBlockUnits * 4 + 15) / 16 * 16;
  layout.size = layout.weights + capacity * item_bytes;
  return layout;
}

// Panels, from the network alone. Their blocks should hold some 2,000 weights: a panel's steps cost no barrier of the thread block, but
// each unit sums over what its panel has made, so that panels of many units per degree must be short. A network of no more than
// 16 KB of weights is one panel.
template <class T>
inline void choose_panels(LoopArgs<T>& args) {
  constexpr int kUsual = 2048, kWhole = 16384 / sizeof(T);
  args.panel_steps = 1;
  args.panel_capacity = kUsual;
  if (!args.inverse) return;
  int64_t padded = 0;
  double weights = 0;
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    if (layer.unitwise) continue;
    padded += int64_t(layer.inputs) * panel_ld(layer.outputs);
    weights += double(layer.inputs) * layer.outputs;
  }
  if (padded <= kWhole && args.most_steps() * args.n_layers <= kMostPanelWorks) {
    args.panel_steps = args.most_steps();
    args.panel_capacity = larger(static_cast<int>(padded), 1024);
    return;
  }
  weights /= double(larger(args.features, 1)) * larger(args.features, 1);  // of the block of one average step
  while (2 * args.panel_steps * args.n_layers <= kMostPanelWorks && args.panel_steps < 16 &&
         4 * args.panel_steps * args.panel_steps * weights <= kUsual)
    args.panel_steps *= 2;
}

constexpr int kResidentThreads = 480;  // that 65,536 registers hold at 136 each: three blocks of a narrow network

struct Device {
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes; a block's share costs 1 KB more than it asks for
};

inline void choose_blocks(LoopPlan& plan, int64_t batch, const Device& device) {
  const int64_t tiles = (batch + plan.rows - 1) / plan.rows;
  const int64_t by_shared = device.shared_per_multiprocessor / (plan.shared_bytes + 1024);
  const int64_t by_threads = kResidentThreads / (32 * (plan.consumers + plan.producers));
  int64_t resident = by_shared < by_threads ? by_shared : by_threads;
  if (resident < 1 || !plan.state_in_shared) resident = 1;  // a workspace is bounded by one block for each multiprocessor
  plan.blocks = tiles < resident * device.multiprocessors ? tiles : resident * device.multiprocessors;
}

// A panel gives work to one warp for each 4 rows; wide layers give more to all. A narrow network leaves room for several blocks.
inline void set_warps(LoopPlan& plan, bool narrow) {
  plan.narrow = narrow;
  plan.consumers = narrow ? larger(plan.rows / 4, 2) : 8;
  plan.producers = narrow ? 1 : 4;
}

// What a launch decides of a map's arguments
template <class T>
inline void set_launch(LoopArgs<T>& args, int capacity, bool apart) {
  args.capacity = capacity;
  args.apart = apart;
  args.most_stages = count_most_stages(args);
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
  const int64_t item = sizeof(T);
  LoopPlan plan{};

  int64_t largest = args.panel_capacity;
  int widest = args.features;
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    widest = larger(widest, layer.outputs);
    const int64_t inputs = larger(layer.inputs, args.context_features), most = int64_t(32768) / item;
    const int64_t all = inputs * block_ld(layer.outputs);
    if (all > largest) largest = all < most ? all : most;
  }

  auto slots = [&](int64_t capacity) { return kSlots * slot_layout(args.panel_steps, args.n_layers, static_cast<int>(capacity), item).size; };
  auto state = [&](int rows) {
    LoopArgs<T> own = args;
    own.apart = plan.apart;
    return int64_t(own.units_in_shared()) * unit_stride(rows) * item;
  };
  const int64_t limit = device.shared_per_block, least = args.panel_capacity;
  plan.rows = 4;
  while (plan.rows < kMostRows<T> && (args.batch + plan.rows - 1) / plan.rows > device.multiprocessors) plan.rows *= 2;
  const int wanted = plan.rows;
  while (plan.rows > 4 && slots(least + 3) + state(plan.rows) > limit) plan.rows /= 2;
  if (may_be_apart && kMostRows<T> >= kRowsApart && args.inverse && !args.mirrored && plan.rows < kRowsApart && wanted >= kRowsApart) {
    plan.apart = true;  // which is what state() counts by
    plan.apart = slots(least + 3) + state(kRowsApart) <= limit;
    if (plan.apart) plan.rows = kRowsApart;
  }
  plan.state_in_shared = slots(least + 3) + state(plan.rows) <= limit;
  if (!plan.state_in_shared) plan.rows = kMostRows<T>;
  set_warps(plan, widest <= 128);
  const int64_t fixed = plan.state_in_shared ? state(plan.rows) : 0;
  int64_t capacity = largest;
  while (capacity > least && fixed + slots(capacity + 3) > limit) capacity -= 128;
  if (capacity < least) capacity = least;
  plan.capacity = up_to_multiple(static_cast<int>(capacity), 4);
  plan.slot_bytes = slots(plan.capacity) / kSlots;
  plan.shared_bytes = fixed + kSlots * plan.slot_bytes;

  choose_blocks(plan, args.batch, device);
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
  set_warps(plan, narrow);
  plan.shared_bytes += kStackArgsBytes<T>;
  choose_blocks(plan, maps[0]->batch, device);
  return plan;
}

}  // namespace flowkernels
