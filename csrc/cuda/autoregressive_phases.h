// The phases of the sequential loop's kernel: what each thread does between two barriers of its block (autoregressive_schedule.h has
// the order of things). Device code; its twin, cpu/autoregressive_twin.cpp, runs each phase for all threads in turn.
//
// The state of a tile is [unit][ROWS]: pending sums, which become the values themselves; z, which becomes x; the context; gates.
// A panel is run by warps that own rows (autoregressive_panel.h), a block of weights by all: a thread computes 4 or 8 rows of 2 or 4 units.
//
// MIRRORED, the gradient of the inverse. For x = f^-1(z) and cotangents g of x and c of log|dx/dz|, feature by feature, i = D..1:
//     dz_i = dx_i/dz_i * (g_i + what the deltas of later features push back onto x_i)
// and the deltas on the way give the gradients of the parameters. A delta is the sum over what sees its unit, times the activation's
// derivative, which is a gate here; sums of the last layer begin at g.
#pragma once

#include "cuda/autoregressive_panel.h"

namespace flowkernels {

constexpr int kLogChunk = 16;  // log-derivatives are summed in chunks, as on the CPU

template <class T, int ROWS, bool MIRRORED = false, bool APART = false>
struct Tile {
  static constexpr bool kApart = APART;
  static constexpr int kSums = MIRRORED ? 1 : 2;  // of a feature in the last layer

  const LoopArgs<T>& args;
  T* state;
  int64_t first_row;
  T* outputs;  // APART: the last layer's sums, in global memory

  // where row r of a unit is, the unit counted from the beginning of the state, or of `outputs`
  FK_INLINE static int64_t place_of(int unit, int r) { return static_cast<int64_t>(unit) * unit_stride(ROWS) + r; }
  FK_INLINE T& at(int unit, int r) const { return state[place_of(unit, r)]; }
  FK_INLINE Pack<T, 4>& rows_at(int unit, int r0) const { return *reinterpret_cast<Pack<T, 4>*>(state + place_of(unit, r0)); }
  // of unit j of values l
  FK_INLINE T* place_of_value(int l, int j, int r) const {
    if constexpr (APART)
      if (l == args.n_layers) return outputs + place_of(j, r);
    return state + place_of(args.first_unit(l) + j, r);
  }
  FK_INLINE T& value(int l, int j, int r) const { return *place_of_value(l, j, r); }
  FK_INLINE int rows() const { return args.batch - first_row < ROWS ? static_cast<int>(args.batch - first_row) : ROWS; }

  // where the p-th feature of the loop is in a row of x
  FK_INLINE int64_t place(int p) const {
    const int made = MIRRORED ? args.features - 1 - p : p;
    return args.order ? args.order[made] : made;
  }

  // ---- before the stages, by all threads

  // unit first + c = get(row, c), and zeros where there is no row
  template <class F>
  FK_INLINE void read(int columns, int first, int thread, int threads, F&& get) const {
    for (int i = thread; i < columns * ROWS; i += threads) {
      const int r = i / columns, c = i % columns;
      at(first + c, r) = r < rows() ? get(first_row + r, c) : T(0);
    }
  }

  FK_INLINE void begin(int thread, int threads) const {
    auto x = [&](int64_t row, int p) {
      const int64_t at = place(p);
      const T given = args.x[row * args.x_row + at * args.x_column];
      if (!args.affine) return given;
      return (given + args.affine[at]) * args.affine[args.features + at] + args.affine[2 * args.features + at];
    };
    if constexpr (MIRRORED)
      begin_mirrored(x, thread, threads);
    else
      begin_network(x, thread, threads);
  }

  template <class F>
  FK_INLINE void begin_network(F&& x, int thread, int threads) const {
    read(args.features, 0, thread, threads, x);
    if (args.context_features)
      read(args.context_features, args.context, thread, threads,
           [&](int64_t row, int c) { return args.context_rows[row * args.context_row + c * args.context_column]; });
    for (int l = 1; l <= args.n_layers; ++l) {
      const LoopLayer<T>& layer = args.layer(l);
      if (layer.unitwise) continue;
      const T* from = layer.context_weight && layer.own_context_term() ? layer.context_bias : layer.bias;
      FK_UNROLL_4
      for (int i = thread; i < layer.outputs * ROWS; i += threads) value(l, i / ROWS, i % ROWS) = from ? from[i / ROWS] : T(0);
    }
  }

  // Raw scale and shift of each feature wait where their deltas will be.
  template <class F>
  FK_INLINE void begin_mirrored(F&& dx, int thread, int threads) const {
    read(args.features, args.first_unit(args.n_layers), thread, threads, dx);
    read(args.features, args.context, thread, threads,
         [&](int64_t row, int p) { return args.context_rows[row * args.context_row + place(p) * args.context_column]; });
    read(1, args.context + args.features, thread, threads, [&](int64_t row, int) { return args.dlogabsdet[row * args.dlogabsdet_step]; });
    for (int l = 0; l < args.n_layers; ++l) {
      const T* last = args.made + args.column(l) + args.width(l) - 1;
      auto made = [&](int64_t row, int j) { return last[row * args.made_row - j]; };
      if (l == 0) {
        read(args.width(0), 0, thread, threads, made);
        continue;
      }
      const LoopLayer<T>& layer = args.layer(l);
      const Activation activation = static_cast<Activation>(layer.context_activation);
      read(layer.outputs, layer.first, thread, threads, [](int64_t, int) { return T(0); });
      read(layer.outputs, layer.gates, thread, threads,
           [&](int64_t row, int j) { return scalar::derivative_at(activation, made(row, j)); });
    }
  }

  // ---- a stage into its slot, by the producers

  // rows of chunks of N elements, the lanes of a warp over the chunks of one row or of several
  template <int N, class Copies>
  FK_INLINE void copy_rows(const T* from, int64_t ld, int rows, int chunks, T* to, int to_ld, int thread, int threads, Copies& copies) const {
    int lanes = 32;  // to a row
    while (lanes > 1 && lanes / 2 >= chunks) lanes /= 2;
    const int at_once = threads / lanes, first = thread / lanes, lane = thread % lanes;
    from += first * ld + lane * N;
    to += first * to_ld + lane * N;
    FK_UNROLL_4
    for (int k = first; k < rows; k += at_once, from += at_once * ld, to += at_once * to_ld)
      for (int c = 0; c < chunks - lane; c += lanes)
        copies.copy(reinterpret_cast<Pack<T, N>*>(to + c * N), reinterpret_cast<const Pack<T, N>*>(from + c * N));
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
  FK_INLINE void produce(const Stage& stage, const Slot<T>& slot, int thread, int threads, Copies& copies) const {
    if (stage.kind == StageKind::panel) {
      const ScheduleSpace space = schedule_space(args);
      const PanelWork* works = reinterpret_cast<const PanelWork*>(args.schedule + space.works) + stage.row * args.n_layers;
      const PanelPart* parts = reinterpret_cast<const PanelPart*>(args.schedule + space.parts) + stage.row / args.panel_steps * args.n_layers;
      using Third = Pack<int32_t, 4>;
      for (int i = thread; i < 3 * stage.rows * args.n_layers; i += threads)
        copies.copy(reinterpret_cast<Third*>(slot.works) + i, reinterpret_cast<const Third*>(works) + i);
      for (int l = 1; l <= args.n_layers; ++l) {
        const LoopLayer<T>& layer = args.layer(l);
        const PanelPart part = parts[l - 1];
        copy_block(layer.weight, layer.ld, layer.copy, part.k0, part.inputs, part.j0, part.units, part.lead, slot.weights + part.weights, part.ld,
                   thread, threads, copies);
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
    T v = sum;
    if (layer.unitwise) {
      v = value(layer.source, j, r);
      if (layer.weight) v = scalar::fma(layer.weight[j], v, layer.bias[j]);
    }
    if (layer.gate) v = v * at(layer.gates + j, r);
    if (layer.residual >= 0) v = v + value(layer.residual, j, r);
    return activated(layer.activation, v);
  }

  // what the sum of unit j begins with, from its whole context term; the gate is put away
  FK_INLINE T with_context(int l, int j, int r, T term) const {
    const LoopLayer<T>& layer = args.layer(l);
    if (!layer.own_context_term()) return term;  // the bias was in it
    term = activated(layer.context_activation, term);
    if (!layer.gate) return layer.bias[j] + term;
    at(layer.gates + j, r) = term;
    return layer.bias[j];
  }

  // Feature p in row r from its shift and raw scale. x takes the place of z, for later steps to read; z takes that of shift, as others
  // may still read x. The log-derivative takes the place of the raw scale, and waits for the end.
  FK_INLINE void apply(int p, int r, T shift, T raw) const {
    const Form form = static_cast<Form>(args.form);
    T& z = at(p, r);
    const scalar::ValueAndLog<T> out =
        args.inverse ? scalar::invert_form(form, args.scale, z, shift, raw) : scalar::apply_form(form, args.scale, z, shift, raw);
    *(args.inverse ? &z : place_of_value(args.n_layers, 2 * p, r)) = out.value;
    value(args.n_layers, 2 * p + 1, r) = out.log;
  }

  // dz takes the place of the sum, the deltas of raw scale and shift that of these
  FK_INLINE void solve(int p, int r, T sum) const {
    const Form form = static_cast<Form>(args.form);
    T &raw = at(2 * p, r), &shift = at(2 * p + 1, r);
    const scalar::FormGradient<T> gradient =
        scalar::inverse_gradient(form, args.scale, at(args.context + p, r), shift, raw, sum, at(args.context + args.features, r));
    value(args.n_layers, p, r) = gradient.dvalue;
    raw = gradient.draw;
    shift = gradient.dshift;
  }

  // Feature p in row r; whole(i) is the i-th of its sums
  template <class F>
  FK_INLINE void feature(int p, int r, F&& whole) const {
    if constexpr (MIRRORED)
      solve(p, r, whole(0));
    else
      apply(p, r, whole(0), whole(1));
  }

  // ---- a block of weights, by all consumers

  template <int QUADS, int UNITS>
  FK_INLINE void block(const Stage& stage, const Slot<T>& slot, int thread, int threads) const {
    const LoopLayer<T>& layer = args.layer(stage.layer);
    const bool context = stage.kind == StageKind::context;
    const int input = (context ? args.context : args.first_unit(layer.source)) + stage.k0;
    const int columns = stage.lead + stage.units, ld = block_ld(columns), k0 = stage.k0;
    constexpr int groups = ROWS / 4 / QUADS, apart = 4 * groups;  // a thread's rows: 4 from r0 on, and 4 `apart` further
    for (int item = thread; item < (columns + UNITS - 1) / UNITS * groups; item += threads) {
      const int u0 = item / groups * UNITS, r0 = item % groups * 4;
      const int first = larger(stage.lead - u0, 0), last = smaller(UNITS, columns - u0);  // of the columns that are units of this block
      const int j0 = stage.j0 - stage.lead + u0;
      T* own = place_of_value(stage.layer, j0, r0);
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
        const T* w = slot.weights + k * ld + u0;
        FK_UNROLL_2
        for (; k < seen_by_all; ++k, w += ld) {
          const Pack<T, UNITS> weights = *reinterpret_cast<const Pack<T, UNITS>*>(w);
          for (int q = 0; q < QUADS; ++q) {
            const Pack<T, 4> rows = rows_at(input + k, r0 + q * apart);
            for (int u = 0; u < UNITS; ++u)
              for (int r = 0; r < 4; ++r) run[q][u].at[r] = scalar::fma(weights.at[u], rows.at[r], run[q][u].at[r]);
          }
        }
        FK_KEEP_LOOP
        for (; k < end; ++k, w += ld)
          for (int q = 0; q < QUADS; ++q) {
            const Pack<T, 4> rows = rows_at(input + k, r0 + q * apart);
            for (int u = 0; u < UNITS; ++u) {
              if (k >= sees[u]) continue;
              for (int r = 0; r < 4; ++r) run[q][u].at[r] = scalar::fma(w[u], rows.at[r], run[q][u].at[r]);
            }
          }
        for (int q = 0; q < QUADS; ++q)
          for (int u = 0; u < UNITS; ++u) {
            if (u < first || u >= last) continue;
            Pack<T, 4>& sums = *reinterpret_cast<Pack<T, 4>*>(own + place_of(u, q * apart));
            Pack<T, 4> sum = sums;
            for (int r = 0; r < 4; ++r) sum.at[r] = sum.at[r] + run[q][u].at[r];
            sums = sum;
          }
      }
      if (stage.finish)
        for (int q = 0; q < QUADS; ++q) finish(stage, j0 + first, last - first, r0 + q * apart);
    }
  }

  // what follows the sums of n units from j0 on in the rows [r0, r0 + 4)
  FK_INLINE void finish(const Stage& stage, int j0, int n, int r0) const {
    const int l = stage.layer;
    if (stage.kind == StageKind::step && l == args.n_layers) {
      FK_KEEP_LOOP
      for (int j = j0; j < j0 + n; j += kSums)  // shift and raw scale of one feature are in one thread
        for (int r = r0; r < r0 + 4; ++r) feature(j / kSums, r, [&](int sum) { return value(l, j + sum, r); });
      return;
    }
    FK_KEEP_LOOP  // code of one unit, not of all of them in registers: this is rare, and was most of the kernel
    for (int j = j0; j < j0 + n; ++j)
      for (int r = r0; r < r0 + 4; ++r) {
        T& sum = value(l, j, r);
        sum = stage.kind == StageKind::context ? with_context(l, j, r, sum) : hidden(l, j, r, sum);
      }
  }

  template <class Lanes>
  FK_INLINE void consume(const Stage& stage, const Slot<T>& slot, int warp, int warps, Lanes& lanes) const {
    if (stage.kind == StageKind::panel) {
      for (int r0 = 4 * warp; r0 < ROWS; r0 += 4 * warps) Panel<T, Tile>(*this, slot, r0).run(stage.rows, lanes);
      return;
    }
    // as many sums to a thread as leave work for half of the threads, and have registers
    const int threads = 32 * warps, quads = (stage.lead + stage.units) * (ROWS / 4);
    if constexpr (ROWS >= 8 && sizeof(T) == 4)
      if (quads >= 4 * threads) return lanes.each([&](int lane) { block<2, 4>(stage, slot, 32 * warp + lane, threads); });
    if constexpr (sizeof(T) == 4)
      if (quads >= 2 * threads) return lanes.each([&](int lane) { block<1, 4>(stage, slot, 32 * warp + lane, threads); });
    lanes.each([&](int lane) { block<1, 2>(stage, slot, 32 * warp + lane, threads); });
  }

  // ---- after the stages, by all threads

  // each chunk's sum takes the place of its first summand
  FK_INLINE void sum_logs(int thread, int threads) const {
    const int chunks = (args.features + kLogChunk - 1) / kLogChunk;
    for (int i = thread; i < chunks * ROWS; i += threads) {
      const int p0 = i / ROWS * kLogChunk, r = i % ROWS;
      T sum = value(args.n_layers, 2 * p0 + 1, r);
      for (int p = p0 + 1; p < smaller(p0 + kLogChunk, args.features); ++p) sum = sum + value(args.n_layers, 2 * p + 1, r);
      value(args.n_layers, 2 * p0 + 1, r) = sum;
    }
  }

  // NaN where the schedule ended early: the network was not autoregressive, and nothing else could tell without a look from the host
  FK_INLINE void write(int thread, int threads) const {
    const int steps = args.schedule[0];
    const int sums = args.inverse ? args.schedule[schedule_space(args).ends + static_cast<int64_t>(steps) * (args.n_layers + 1) + args.n_layers] : 0;
    const int known = args.inverse ? sums / kSums : args.features;
    if constexpr (MIRRORED)
      write_mirrored(known, thread, threads);
    else
      write_network(known, thread, threads);
  }

  FK_INLINE void write_network(int known, int thread, int threads) const {
    for (int i = thread; i < rows() * args.features; i += threads) {
      const int r = i / args.features, p = i % args.features;
      args.y[(first_row + r) * args.features + place(p)] = p < known ? (args.inverse ? at(p, r) : value(args.n_layers, 2 * p, r)) : T(NAN);
    }
    for (int r = thread; r < rows(); r += threads) {
      T total = T(0);
      for (int p = 0; p < args.features; p += kLogChunk) total = total + value(args.n_layers, 2 * p + 1, r);
      if (known < args.features) total = T(NAN);
      T& logabsdet = args.logabsdet[first_row + r];
      logabsdet = args.accumulate ? logabsdet + total : total;
    }
  }

  FK_INLINE void write_mirrored(int known, int thread, int threads) const {
    for (int i = thread; i < rows() * args.features; i += threads) {
      const int r = i / args.features, p = i % args.features;
      args.y[(first_row + r) * args.features + place(p)] = p < known ? value(args.n_layers, p, r) : T(NAN);
    }
    for (int l = 0; l < args.n_layers; ++l) {
      const int width = args.width(l);
      T* first = args.deltas + first_row * args.columns + args.column(l);
      for (int i = thread; i < rows() * width; i += threads) {
        const int r = i / width, j = i % width;
        first[static_cast<int64_t>(r) * args.columns + j] = known == args.features ? value(l, width - 1 - j, r) : T(NAN);
      }
    }
  }
};

}  // namespace flowkernels
