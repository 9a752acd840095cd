// The phases of the sequential loop's kernel: what each thread does between two barriers of its block (autoregressive_schedule.h has
// the order of things). Device code; its twin, cpu/autoregressive_twin.cpp, runs each phase for all threads in turn.
//
// The state of a tile is [unit][ROWS]: pending sums, which become the values themselves; z, which becomes x; the context; gates.
// Rows of a tile never meet, so a panel is run by warps that own 4 rows each, with no barrier of the block inside; what counts there is
// the time from one sum to the next. Lanes share a unit's inputs: a sum is 8 chains of multiply-adds over every 8th input, summed as
// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)), of which a lane runs 1, 2 or 4, so that the order is the same however many units there are.
// A block of weights is run by all warps: a thread computes 4 or 8 rows of 2 or 4 units.
//
// MIRRORED, the gradient of the inverse. With x = f^-1(z), (z, l) = f(x), and cotangents g of x and c of -l, look for u such that f's
// gradient by x, for cotangents u of z and -c of l, is -g:
//     u_i * dz_i/dx_i + (what the deltas of later features push back onto x_i) = -g_i,      i = D..1
// Then dz = -u, and the deltas on the way give the gradients of the parameters. A delta is the sum over what sees its unit, times the
// activation's derivative, which is a gate here; sums of the last layer begin at g.
#pragma once

#include "autoregressive_schedule.h"

namespace flowkernels {

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {  // read and written by one instruction where it has at most 16 bytes
  T at[N];
};

// What a lane brings to a panel's sums: a share of the products in 4 rows of its unit, and what was pending in those that it will finish
template <class T, int N>
struct Partial {
  Pack<T, 4> run;
  T pending[N];
};
constexpr int kChains = 8;
// of a sum that so many lanes share, a lane finishes so many rows, from this on; none where that is negative
template <int LANES>
constexpr int kRowsOfLane = LANES == 2 ? 2 : 1;
template <int LANES>
FK_INLINE int first_row_of_lane(int lane) {
  if (LANES < 8) return lane % LANES * kRowsOfLane<LANES>;
  return lane % 2 == 0 ? lane % LANES / 2 : -1;
}

constexpr int kLogChunk = 16;  // log-derivatives are summed in chunks, as on the CPU

// One slot of shared memory
template <class T>
struct Slot {
  Stage* stage;
  PanelWork* works;
  int32_t* visible;
  T* weights;

  FK_INLINE Slot(unsigned char* memory, const SlotLayout& layout)
      : stage(reinterpret_cast<Stage*>(memory)), works(reinterpret_cast<PanelWork*>(memory + layout.works)),
        visible(reinterpret_cast<int32_t*>(memory + layout.visible)), weights(reinterpret_cast<T*>(memory + layout.weights)) {
    FK_IS_SHARED(memory);
  }
};

template <class T, int ROWS, bool MIRRORED = false, bool APART = false>
struct Tile {
  const LoopArgs<T>& args;
  T* state;
  const int32_t* ends;
  int steps;
  int64_t first_row;
  T* outputs;  // APART: the last layer's sums, in global memory

  FK_INLINE T* values(int l) const {
    if constexpr (APART)
      if (l == args.n_layers) return outputs;
    return state + static_cast<int64_t>(args.first_unit(l)) * ROWS;
  }
  FK_INLINE int rows() const { return args.batch - first_row < ROWS ? static_cast<int>(args.batch - first_row) : ROWS; }

  // where the p-th feature of the loop is in a row
  FK_INLINE int64_t place(int p) const {
    const int made = MIRRORED ? args.features - 1 - p : p;
    return args.order ? args.order[made] : made;
  }

  // ---- before the stages, by all threads

  // to[c] = get(row, c), and zeros where there is no row
  template <class F>
  FK_INLINE void read(int columns, T* to, int thread, int threads, F&& get) const {
    for (int i = thread; i < columns * ROWS; i += threads) {
      const int r = i / columns, c = i % columns;
      to[c * ROWS + r] = r < rows() ? get(first_row + r, c) : T(0);
    }
  }

  FK_INLINE void begin(int thread, int threads) const {
    T* context = state + static_cast<int64_t>(args.context) * ROWS;
    auto x = [&](int64_t row, int p) {
      const int64_t at = place(p);
      const T given = args.x[row * args.x_row + at * args.x_column];
      if (!args.affine) return given;
      return (given + args.affine[at]) * args.affine[args.features + at] + args.affine[2 * args.features + at];
    };
    if constexpr (MIRRORED)
      begin_mirrored(context, x, thread, threads);
    else
      begin_network(context, x, thread, threads);
  }

  template <class F>
  FK_INLINE void begin_network(T* context, F&& x, int thread, int threads) const {
    read(args.features, state, thread, threads, x);
    if (args.context_features)
      read(args.context_features, context, thread, threads,
           [&](int64_t row, int c) { return args.context_rows[row * args.context_row + c * args.context_column]; });
    for (int l = 1; l <= args.n_layers; ++l) {
      const LoopLayer<T>& layer = args.layer(l);
      if (layer.unitwise) continue;
      const T* from = layer.context_weight && layer.own_context_term() ? layer.context_bias : layer.bias;
      FK_UNROLL_4
      for (int i = thread; i < layer.outputs * ROWS; i += threads) values(l)[i] = from ? from[i / ROWS] : T(0);
    }
  }

  // Raw scale and shift of each feature wait where their deltas will be.
  template <class F>
  FK_INLINE void begin_mirrored(T* context, F&& dx, int thread, int threads) const {
    read(args.features, values(args.n_layers), thread, threads, dx);
    read(args.features, context, thread, threads,
         [&](int64_t row, int p) { return args.context_rows[row * args.context_row + place(p) * args.context_column]; });
    read(1, context + args.features * ROWS, thread, threads, [&](int64_t row, int) { return args.dlogabsdet[row * args.dlogabsdet_step]; });
    for (int l = 0; l < args.n_layers; ++l) {
      const T* last = args.made + args.column(l) + args.width(l) - 1;
      auto made = [&](int64_t row, int j) { return last[row * args.made_row - j]; };
      if (l == 0) {
        read(args.width(0), state, thread, threads, made);
        continue;
      }
      const LoopLayer<T>& layer = args.layer(l);
      const Activation activation = static_cast<Activation>(layer.context_activation);
      read(layer.outputs, values(l), thread, threads, [](int64_t, int) { return T(0); });
      read(layer.outputs, state + static_cast<int64_t>(layer.gates) * ROWS, thread, threads,
           [&](int64_t row, int j) { return scalar::derivative_at(activation, made(row, j)); });
    }
  }

  // ---- a stage into its slot, by the producers

  // rows of chunks of N elements, the lanes of a warp over the chunks of one row or of several
  template <int N, class Copies>
  FK_INLINE void copy_rows(const T* from, int64_t ld, int rows, int chunks, T* to, int to_ld, int thread, int threads, Copies& copies) const {
    int lanes = 32;  // to a row
    while (lanes > 1 && lanes / 2 >= chunks) lanes /= 2;
    const int at_once = threads / lanes;
    FK_UNROLL_4
    for (int k = thread / lanes; k < rows; k += at_once)
      for (int c = thread % lanes; c < chunks; c += lanes)
        copies.copy(reinterpret_cast<Pack<T, N>*>(to + k * to_ld) + c, reinterpret_cast<const Pack<T, N>*>(from + k * ld) + c);
  }

  // The weights of the inputs [k0, k0 + inputs) and the units [j0, j0 + units), in front of which there are `lead` columns for units
  // before them; copy: elements that a copy takes
  template <class Copies>
  FK_INLINE void copy_block(const T* weight, int64_t ld, int copy, int k0, int inputs, int j0, int units, int lead, T* to, int to_ld, int thread,
                            int threads, Copies& copies) const {
    if constexpr (MIRRORED) {  // `weight` is the last element. A warp copies 8 inputs of 4 units: whole sectors, and few banks twice
      const int lane = thread % 32, k_lane = lane % 8, j_lane = lane / 8, blocks = (inputs + 7) / 8;
      for (int i = thread / 32; i < (units + 3) / 4 * blocks; i += threads / 32) {
        const int k = i % blocks * 8 + k_lane, j = i / blocks * 4 + j_lane;
        if (k < inputs && j < units) copies.copy(to + k * to_ld + j, weight - (j0 + j) * ld - (k0 + k));
      }
    } else {
      const T* from = weight + k0 * ld + (j0 - lead);
      const int columns = lead + units;
      if (copy == 1) copy_rows<1>(from, ld, inputs, columns, to, to_ld, thread, threads, copies);
      if (copy == 2) copy_rows<2>(from, ld, inputs, (columns + 1) / 2, to, to_ld, thread, threads, copies);
      if constexpr (sizeof(T) == 4)
        if (copy == 4) copy_rows<4>(from, ld, inputs, (columns + 3) / 4, to, to_ld, thread, threads, copies);
    }
  }

  template <class Copies>
  FK_INLINE void produce(Cursor<T>& cursor, const Slot<T>& slot, int thread, int threads, Copies& copies) const {
    const Stage stage = cursor.next();
    if (thread == 0) *slot.stage = stage;
    if (stage.kind == StageKind::panel) {
      const int32_t *from = cursor.row(stage.row), *to = cursor.row(stage.row + stage.rows);
      int weights = 0;
      for (int l = 1; l <= args.n_layers; ++l) {
        const LoopLayer<T>& layer = args.layer(l);
        const int source = layer.source, k0 = from[source], inputs = layer.unitwise ? 0 : to[source] - k0, j0 = from[l], units = to[l] - j0;
        const int lead = layer.unitwise ? 0 : j0 % layer.copy, ld = panel_ld(units);
        for (int s = thread; s < stage.rows; s += threads) {
          const int32_t *begin = cursor.row(stage.row + s), *end = begin + args.n_layers + 1;
          const int j = begin[l], known = end[source];
          PanelWork work;
          work.weights = weights + lead + j - j0;
          work.ld = ld;
          work.inputs = args.first_unit(source) + k0;
          work.values = layer.first + j;
          work.unit = j;
          work.n = static_cast<int16_t>(end[l] - j);
          work.layer = static_cast<int16_t>(l);
          work.sees = static_cast<int16_t>(layer.unitwise ? 0 : work.n == 0 || layer.visible[j] >= known ? known - k0 : -1);
          const bool plain = !layer.unitwise && !layer.gate && layer.residual < 0;
          work.activation = static_cast<int16_t>(l == args.n_layers ? kFeatures : plain ? layer.activation : kThroughHidden);
          slot.works[s * args.n_layers + l - 1] = work;
        }
        if (layer.unitwise) continue;
        copy_block(layer.weight, layer.ld, layer.copy, k0, inputs, j0, units, lead, slot.weights + weights, ld, thread, threads, copies);
        weights += inputs * ld;
      }
    } else if (stage.kind != StageKind::end) {
      const LoopLayer<T>& layer = args.layer(stage.layer);
      const bool context = stage.kind == StageKind::context;
      copy_block(context ? layer.context_weight : layer.weight, context ? layer.context_ld : layer.ld, context ? layer.context_copy : layer.copy,
                 stage.k0, stage.inputs, stage.j0, stage.units, stage.lead, slot.weights, block_ld(stage.lead + stage.units), thread, threads, copies);
      if (!context)
        for (int j = thread; j < stage.units; j += threads) copies.copy(slot.visible + j, layer.visible + stage.j0 + j);
    }
    copies.commit();
  }

  // ---- whole sums

  FK_INLINE T activated(int activation, T v) const {
    if (activation == static_cast<int>(Activation::relu)) return scalar::activate<Activation::relu>(v);
    if (activation == static_cast<int>(Activation::identity)) return v;
    return scalar::activate(static_cast<Activation>(activation), v);
  }

  // the value of unit j of values l in row r, from its sum
  FK_INLINE T hidden(int l, int j, int r, T sum) const {
    const LoopLayer<T>& layer = args.layer(l);
    const int at = j * ROWS + r;
    T v = sum;
    if (layer.unitwise) {
      v = values(layer.source)[at];
      if (layer.weight) v = scalar::fma(layer.weight[j], v, layer.bias[j]);
    }
    if (layer.gate) v = v * state[static_cast<int64_t>(layer.gates) * ROWS + at];
    if (layer.residual >= 0) v = v + values(layer.residual)[at];
    return activated(layer.activation, v);
  }

  // what the sum of unit j begins with, from its whole context term; the gate is put away
  FK_INLINE T with_context(int l, int j, int r, T term) const {
    const LoopLayer<T>& layer = args.layer(l);
    if (!layer.own_context_term()) return term;  // the bias was in it
    term = activated(layer.context_activation, term);
    if (!layer.gate) return layer.bias[j] + term;
    state[(static_cast<int64_t>(layer.gates) + j) * ROWS + r] = term;
    return layer.bias[j];
  }

  // Feature p in row r from its shift and raw scale. x takes the place of z, for later steps to read; z takes that of shift, as others
  // may still read x. The log-derivative takes the place of the raw scale, and waits for the end.
  FK_INLINE void apply(int p, int r, T shift, T raw) const {
    const Form form = static_cast<Form>(args.form);
    T *at = state + p * ROWS + r, *outputs = values(args.n_layers) + 2 * p * ROWS + r;
    const scalar::ValueAndLog<T> out =
        args.inverse ? scalar::invert_form(form, args.scale, *at, shift, raw) : scalar::apply_form(form, args.scale, *at, shift, raw);
    *(args.inverse ? at : outputs) = out.value;
    outputs[ROWS] = out.log;
  }

  // dz takes the place of the sum, the deltas of raw scale and shift that of these
  FK_INLINE void solve(int p, int r, T sum) const {
    const Form form = static_cast<Form>(args.form);
    const T* context = state + static_cast<int64_t>(args.context) * ROWS;
    T *raw = state + 2 * p * ROWS + r, *shift = raw + ROWS;
    const T u = -sum * scalar::inverse_slope(form, args.scale, *raw);
    const scalar::FormGradient<T> gradient =
        scalar::form_gradient(form, args.scale, context[p * ROWS + r], *shift, *raw, u, -context[args.features * ROWS + r]);
    values(args.n_layers)[p * ROWS + r] = -u;
    *raw = gradient.draw;
    *shift = gradient.dshift;
  }

  // Feature p in row r; whole(i) is the i-th of its sums
  static constexpr int kSums = MIRRORED ? 1 : 2;
  template <class F>
  FK_INLINE void feature(int p, int r, F&& whole) const {
    if constexpr (MIRRORED)
      solve(p, r, whole(0));
    else
      apply(p, r, whole(0), whole(1));
  }

  // ---- a panel, by warps that own rows

  // The chains of one of LANES lanes over the first `sees` inputs in 4 rows, summed. All that a turn reads is on its way before it is
  // used; beyond the inputs there are zeros.
  template <int LANES>
  FK_INLINE Pack<T, 4> run_chains(const T* weight, int ld, const T* h, int lane, int sees) const {
    constexpr int own = kChains / LANES, turns = own < 4 ? 4 / own : 1;
    Pack<T, 4> run[own] = {};
    FK_KEEP_LOOP
    for (int k0 = 0; k0 < sees; k0 += turns * kChains) {
      T w[turns * own] = {};
      Pack<T, 4> x[turns * own] = {};
      for (int i = 0; i < turns * own; ++i) {
        const int k = k0 + i * LANES + lane;
        if (k >= sees) continue;
        w[i] = weight[k * ld];
        x[i] = *reinterpret_cast<const Pack<T, 4>*>(h + k * ROWS);
      }
      for (int i = 0; i < turns * own; ++i)
        for (int r = 0; r < 4; ++r) run[i % own].at[r] = scalar::fma(w[i], x[i].at[r], run[i % own].at[r]);
    }
    for (int n = own / 2; n > 0; n /= 2)
      for (int c = 0; c < n; ++c)
        for (int r = 0; r < 4; ++r) run[c].at[r] = run[c].at[r] + run[c + n].at[r];
    return run[0];
  }

  // of the panel's inputs, what a unit sees that does not see all
  FK_INLINE int seen_in_panel(const PanelWork& work, int j) const {
    const LoopLayer<T>& layer = args.layer(work.layer);
    return layer.visible[j] - (work.inputs - args.first_unit(layer.source));
  }

  // A work of a panel in the rows [r0, r0 + 4). Lanes::sum<L>(first, second) calls second(lane, sums, others) in every lane of a warp with
  // the sums that its L lanes brought in first(lane), and those of the L lanes beside them, and then waits for all.
  template <int LANES, class Lanes, class Ahead>
  FK_INLINE void units(const PanelWork& work, const T* weights, int r0, Lanes& lanes, const Ahead& ahead) const {
    constexpr int rows = kRowsOfLane<LANES>;
    T* sums = state + work.values * ROWS + r0;
    if constexpr (APART)
      if (work.activation == kFeatures) sums = outputs + work.unit * ROWS + r0;
    const T* h = state + work.inputs * ROWS + r0;
    for (int u0 = 0; u0 < work.n; u0 += 32 / LANES)
      lanes.template sum<LANES, T>(
          [&](int lane) {
            Partial<T, rows> part{};
            const int u = u0 + lane / LANES, first = first_row_of_lane<LANES>(lane);
            if (u >= work.n) return part;
            for (int i = 0; i < rows; ++i)
              if (first >= 0)
                part.pending[i] = APART && LANES == 8 && work.activation == kFeatures ? ahead.at(lane) : sums[u * ROWS + first + i];
            const int sees = work.sees >= 0 ? work.sees : seen_in_panel(work, work.unit + u);
            part.run = run_chains<LANES>(weights + work.weights + u, work.ld, h, lane % LANES, sees);
            return part;
          },
          [&](int lane, const T(&sum)[rows], const T(&other)[rows]) {
            const int u = u0 + lane / LANES, first = first_row_of_lane<LANES>(lane);
            if (u >= work.n || first < 0) return;
            FK_KEEP_LOOP
            for (int i = 0; i < rows; ++i) {
              const int r = r0 + first + i, j = work.unit + u;
              const T own = i == 0 ? sum[0] : sum[rows - 1], next = i == 0 ? other[0] : other[rows - 1];
              if (work.activation != kFeatures)
                sums[u * ROWS + first + i] = work.activation >= 0 ? activated(work.activation, own) : hidden(work.layer, j, r, own);
              else if (j % kSums == 0)
                feature(j / kSums, r, [&](int which) { return which == 0 ? own : next; });
            }
          });
  }

  template <class Lanes>
  FK_INLINE void panel(const Slot<T>& slot, int warp, int warps, Lanes& lanes) const {
    const int n = slot.stage->rows * args.n_layers;
    typename Lanes::template Local<T> ahead;
    for (int r0 = 4 * warp; r0 < ROWS; r0 += 4 * warps) {
      PanelWork next = slot.works[0];
      for (int i = 0; i < n; ++i) {
        const PanelWork work = next;
        next = slot.works[i + 1];  // on its way while this is done
        if constexpr (APART)
          if (work.layer == 1) ask_ahead(slot.works[i + args.n_layers - 1], r0, lanes, ahead);
        if (work.n <= 4)
          units<8>(work, slot.weights, r0, lanes, ahead);
        else if (work.n <= 8)
          units<4>(work, slot.weights, r0, lanes, ahead);
        else
          units<2>(work, slot.weights, r0, lanes, ahead);
      }
    }
  }

  // the sums that a step's last layer begins with, from global memory while the layers before it are at work
  template <class Lanes, class Ahead>
  FK_INLINE void ask_ahead(const PanelWork& work, int r0, Lanes& lanes, Ahead& ahead) const {
    lanes.each([&](int lane) {
      const int first = first_row_of_lane<8>(lane);
      if (lane / 8 < work.n && first >= 0) ahead.at(lane) = outputs[(work.unit + lane / 8) * ROWS + r0 + first];
    });
  }

  // ---- a block of weights, by all consumers

  template <int QUADS, int UNITS>
  FK_INLINE void block(const Slot<T>& slot, int thread, int threads) const {
    const Stage stage = *slot.stage;
    const LoopLayer<T>& layer = args.layer(stage.layer);
    const bool context = stage.kind == StageKind::context;
    const T* h = (context ? state + static_cast<int64_t>(args.context) * ROWS : values(layer.source)) + static_cast<int64_t>(stage.k0) * ROWS;
    const int columns = stage.lead + stage.units, ld = block_ld(columns), k0 = stage.k0;
    constexpr int groups = ROWS / 4 / QUADS, apart = 4 * groups;  // a thread's rows: 4 from r0 on, and 4 `apart` further
    for (int item = thread; item < (columns + UNITS - 1) / UNITS * groups; item += threads) {
      const int u0 = item / groups * UNITS, r0 = item % groups * 4;
      const int first = larger(stage.lead - u0, 0), last = smaller(UNITS, columns - u0);  // of the columns that are units of this block
      T* at = values(stage.layer) + static_cast<int64_t>(stage.j0 - stage.lead + u0) * ROWS + r0;
      int sees[UNITS] = {}, most = 0, least = stage.inputs;  // inputs of this block, ascending; in other columns nobody looks at the sums
      for (int u = 0; u < UNITS; ++u) {
        if (u < first || u >= last) continue;
        sees[u] = context ? stage.inputs : larger(0, smaller(slot.visible[u0 - stage.lead + u] - k0, stage.inputs));
        most = larger(most, sees[u]);
        least = smaller(least, sees[u]);
      }
      for (int k = 0; k < most;) {
        const int end = smaller(most, ((k0 + k) / kRun + 1) * kRun - k0), seen_by_all = smaller(least, end);
        Pack<T, 4> run[QUADS][UNITS] = {};
        const T *x = h + k * ROWS + r0, *w = slot.weights + k * ld + u0;
        FK_UNROLL_2
        for (; k < seen_by_all; ++k, x += ROWS, w += ld) {
          const Pack<T, UNITS> weights = *reinterpret_cast<const Pack<T, UNITS>*>(w);
          for (int q = 0; q < QUADS; ++q) {
            const Pack<T, 4> rows = *reinterpret_cast<const Pack<T, 4>*>(x + q * apart);
            for (int u = 0; u < UNITS; ++u)
              for (int r = 0; r < 4; ++r) run[q][u].at[r] = scalar::fma(weights.at[u], rows.at[r], run[q][u].at[r]);
          }
        }
        FK_KEEP_LOOP
        for (; k < end; ++k, x += ROWS, w += ld)
          for (int q = 0; q < QUADS; ++q) {
            const Pack<T, 4> rows = *reinterpret_cast<const Pack<T, 4>*>(x + q * apart);
            for (int u = 0; u < UNITS; ++u) {
              if (k >= sees[u]) continue;
              for (int r = 0; r < 4; ++r) run[q][u].at[r] = scalar::fma(w[u], rows.at[r], run[q][u].at[r]);
            }
          }
        for (int q = 0; q < QUADS; ++q)
          for (int u = 0; u < UNITS; ++u) {
            if (u < first || u >= last) continue;
            Pack<T, 4>& sums = *reinterpret_cast<Pack<T, 4>*>(at + u * ROWS + q * apart);
            Pack<T, 4> sum = sums;
            for (int r = 0; r < 4; ++r) sum.at[r] = sum.at[r] + run[q][u].at[r];
            sums = sum;
          }
      }
      if (stage.finish)
        for (int q = 0; q < QUADS; ++q) finish(stage, stage.j0 - stage.lead + u0 + first, last - first, r0 + q * apart);
    }
  }

  // what follows the sums of n units from j0 on in the rows [r0, r0 + 4)
  FK_INLINE void finish(const Stage& stage, int j0, int n, int r0) const {
    const int l = stage.layer;
    if (stage.kind == StageKind::step && l == args.n_layers) {
      const T* sums = values(l);
      FK_KEEP_LOOP
      for (int j = j0; j < j0 + n; j += kSums)  // shift and raw scale of one feature are in one thread
        for (int r = r0; r < r0 + 4; ++r) feature(j / kSums, r, [&](int sum) { return sums[(j + sum) * ROWS + r]; });
      return;
    }
    FK_KEEP_LOOP  // code of one unit, not of all of them in registers: this is rare, and was most of the kernel
    for (int j = j0; j < j0 + n; ++j)
      for (int r = r0; r < r0 + 4; ++r) {
        T& at = values(l)[j * ROWS + r];
        at = stage.kind == StageKind::context ? with_context(l, j, r, at) : hidden(l, j, r, at);
      }
  }

  template <class Lanes>
  FK_INLINE void consume(const Slot<T>& slot, int warp, int warps, Lanes& lanes) const {
    const StageKind kind = slot.stage->kind;
    if (kind == StageKind::panel) return panel(slot, warp, warps, lanes);
    if (kind == StageKind::end) return;
    // as many sums to a thread as leave work for half of the threads, and have registers
    const int threads = 32 * warps, columns = slot.stage->lead + slot.stage->units, quads = columns * (ROWS / 4);
    if constexpr (ROWS >= 8 && sizeof(T) == 4)
      if (quads >= 4 * threads) return lanes.each([&](int lane) { block<2, 4>(slot, 32 * warp + lane, threads); });
    if constexpr (sizeof(T) == 4)
      if (quads >= 2 * threads) return lanes.each([&](int lane) { block<1, 4>(slot, 32 * warp + lane, threads); });
    lanes.each([&](int lane) { block<1, 2>(slot, 32 * warp + lane, threads); });
  }

  // ---- after the stages, by all threads

  // each chunk's sum takes the place of its first summand
  FK_INLINE void sum_logs(int thread, int threads) const {
    const int chunks = (args.features + kLogChunk - 1) / kLogChunk;
    T* outputs = values(args.n_layers);
    for (int i = thread; i < chunks * ROWS; i += threads) {
      const int p0 = i / ROWS * kLogChunk, r = i % ROWS;
      T sum = outputs[(2 * p0 + 1) * ROWS + r];
      for (int p = p0 + 1; p < smaller(p0 + kLogChunk, args.features); ++p) sum = sum + outputs[(2 * p + 1) * ROWS + r];
      outputs[(2 * p0 + 1) * ROWS + r] = sum;
    }
  }

  // NaN where the schedule ended early: the network was not autoregressive, and nothing else could tell without a look from the host
  FK_INLINE void write(int thread, int threads) const {
    const int sums = args.inverse ? ends[static_cast<int64_t>(steps) * (args.n_layers + 1) + args.n_layers] : 0;
    const int known = args.inverse ? sums / kSums : args.features;
    const T* outputs = values(args.n_layers);
    if constexpr (MIRRORED)
      write_mirrored(known, outputs, thread, threads);
    else
      write_network(known, outputs, thread, threads);
  }

  FK_INLINE void write_network(int known, const T* outputs, int thread, int threads) const {
    for (int i = thread; i < rows() * args.features; i += threads) {
      const int r = i / args.features, p = i % args.features;
      args.y[(first_row + r) * args.features + place(p)] = p < known ? (args.inverse ? state[p * ROWS + r] : outputs[2 * p * ROWS + r]) : T(NAN);
    }
    for (int r = thread; r < rows(); r += threads) {
      T total = T(0);
      for (int p = 0; p < args.features; p += kLogChunk) total = total + outputs[(2 * p + 1) * ROWS + r];
      if (known < args.features) total = T(NAN);
      T& logabsdet = args.logabsdet[first_row + r];
      logabsdet = args.accumulate ? logabsdet + total : total;
    }
  }

  FK_INLINE void write_mirrored(int known, const T* dz, int thread, int threads) const {
    for (int i = thread; i < rows() * args.features; i += threads) {
      const int r = i / args.features, p = i % args.features;
      args.y[(first_row + r) * args.features + place(p)] = p < known ? dz[p * ROWS + r] : T(NAN);
    }
    for (int l = 0; l < args.n_layers; ++l) {
      const int width = args.width(l);
      T* first = args.deltas + first_row * args.columns + args.column(l);
      for (int i = thread; i < rows() * width; i += threads) {
        const int r = i / width, j = i % width;
        first[static_cast<int64_t>(r) * args.columns + j] = known == args.features ? values(l)[(width - 1 - j) * ROWS + r] : T(NAN);
      }
    }
  }
};

}  // namespace flowkernels
