// The phases of the sequential loop's kernel: what each thread does between two barriers of its block (autoregressive_schedule.h has
// the order of things). Device code; its twin, tests/autoregressive_twin.cpp, runs each phase for all threads in turn.
//
// The state of a tile is [unit][ROWS]: pending sums, which become the values themselves; z, which becomes x; the context; gates.
// A panel is run by warps that own rows (autoregressive_panel.h, autoregressive_register_panel.h), a block of weights by all: a thread
// computes 4 rows of 1, 2 or 4 units.
//
// MIRRORED, the gradient of the inverse. For x = f^-1(z) and cotangents g of x and c of log|dx/dz|, feature by feature, i = D..1:
//     dz_i = dx_i/dz_i * (g_i + what the deltas of later features push back onto x_i)
// and the deltas on the way give the gradients of the parameters. A delta is the sum over what sees its unit, times the activation's
// derivative, which is a gate here; sums of the last layer begin at g.
#pragma once

#include "cuda/autoregressive_register_panel.h"
#include "sum_order.h"

namespace flowkernels {

template <class T, int ROWS, bool MIRRORED = false, bool APART = false>
struct Tile {
  static constexpr bool kApart = APART, kMirrored = MIRRORED;
  static constexpr int kPanelRows = panel_rows(ROWS), kUnit = unit_stride(ROWS);
  static constexpr int kSums = MIRRORED ? 1 : 2;  // of a feature in the last layer

  const LoopArgs<T>& args;
  const Schedule schedule;
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
    FK_UNROLL_4
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
      for (int i = thread; i < layer.outputs * (ROWS / 4); i += threads) {
        const T bias = from ? from[i / (ROWS / 4)] : T(0);
        *reinterpret_cast<Pack<T, 4>*>(place_of_value(l, i / (ROWS / 4), i % (ROWS / 4) * 4)) = {bias, bias, bias, bias};
      }
    }
  }

  // Raw scale and shift of each feature wait where their deltas will be.
  template <class F>
  FK_INLINE void begin_mirrored(F&& dx, int thread, int threads) const {
    read(args.features, args.first_unit(args.n_layers), thread, threads, dx);
    read(args.features, args.context, thread, threads,
         [&](int64_t row, int p) { return args.context_rows[row * args.context_row + place(p) * args.context_column]; });
    read(1, args.context + args.features, thread, threads, [&](int64_t row, int) { return args.dlogabsdet[row * args.dlogabsdet_step]; });
    auto made = [&](int64_t row, int column, int units, int j) { return args.made[row * args.made_row + column + units - 1 - j]; };
    read(args.width(0), 0, thread, threads, [&](int64_t row, int j) { return made(row, args.known_outputs, args.width(0), j); });
    for (int l = 1; l < args.n_layers; ++l) {
      const LoopLayer<T>& layer = args.layer(l);
      if (!layer.unitwise) read(layer.outputs, layer.first, thread, threads, [](int64_t, int) { return T(0); });
      if (!layer.gate) continue;
      const Activation activation = static_cast<Activation>(layer.context_activation);
      read(layer.outputs, layer.gates, thread, threads, [&](int64_t row, int j) {
        T gate = T(1);
        if (layer.known >= 0) gate = made(row, layer.known, layer.outputs, j);
        if (layer.known >= 0 && !layer.gate_as_is) gate = scalar::derivative_at(activation, gate);
        return layer.bias ? gate * layer.bias[layer.outputs - 1 - j] : gate;
      });
    }
  }

  // ---- a slot, by the producers

  template <class Copies>
  FK_INLINE void produce(const Stage& stage, unsigned char* slot, int thread, int threads, Copies& copies) const {
    using Chunk = Pack<int32_t, 4>;
    const Chunk* from = reinterpret_cast<const Chunk*>(args.packed) + stage.offset;
    FK_UNROLL_4
    for (int i = thread; i < stage.chunks; i += threads) copies.copy(reinterpret_cast<Chunk*>(slot) + i, from + i);
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

  template <int UNITS, class W>
  FK_INLINE void block(const Head& head, const unsigned char* image, int thread, int threads) const {
    const int32_t* all_see = reinterpret_cast<const int32_t*>(image + sizeof(Head));
    const W* all_weights = reinterpret_cast<const W*>(image + head.weights);
    T* all_own = (APART && (head.flags & kIsApart) ? outputs : state) + place_of(head.own, 0);
    const int ld = block_ld(head.units);
    constexpr int groups = ROWS / 4;
    FK_KEEP_LOOP
    for (int item = thread; item < (head.units + UNITS - 1) / UNITS * groups; item += threads) {
      const int u0 = item / groups * UNITS, r0 = item % groups * 4;
      T* own = all_own + place_of(u0, r0);
      Pack<int32_t, UNITS> sees;  // inputs of this block, ascending
      for (int u = 0; u < UNITS; ++u) sees.at[u] = head.inputs;
      if (head.flags & kHasStairs) sees = *reinterpret_cast<const Pack<int32_t, UNITS>*>(all_see + u0);
      const int least = sees.at[0], most = sees.at[UNITS - 1];
      const W* w = all_weights + u0;
      FK_KEEP_LOOP
      for (int k = 0, cut = kRun - head.phase; k < most; cut += kRun) {
        const int begin = k, end = smaller(most, cut), seen_by_all = smaller(least, end);
        Pack<T, 4> run[UNITS] = {};
        FK_UNROLL_4
        for (; k < seen_by_all; ++k, w += ld) {
          const Pack<W, UNITS> weights = *reinterpret_cast<const Pack<W, UNITS>*>(w);
          const Pack<T, 4> rows = rows_at(head.input + k, r0);
          for (int u = 0; u < UNITS; ++u)
            for (int r = 0; r < 4; ++r) run[u].at[r] = scalar::fma(widened(weights.at[u]), rows.at[r], run[u].at[r]);
        }
        FK_KEEP_LOOP
        for (; k < end; ++k, w += ld) {
          const Pack<T, 4> rows = rows_at(head.input + k, r0);
          for (int u = 0; u < UNITS; ++u) {
            if (k >= sees.at[u]) continue;
            for (int r = 0; r < 4; ++r) run[u].at[r] = scalar::fma(widened(w[u]), rows.at[r], run[u].at[r]);
          }
        }
        for (int u = 0; u < UNITS; ++u) {
          if (u0 + u >= head.units || sees.at[u] <= begin) continue;  // what sees nothing here is not given a zero: -0 would become 0
          Pack<T, 4>& sums = *reinterpret_cast<Pack<T, 4>*>(own + place_of(u, 0));
          Pack<T, 4> sum = sums;
          for (int r = 0; r < 4; ++r) sum.at[r] = sum.at[r] + run[u].at[r];
          sums = sum;
        }
      }
      if (head.flags & kFinishes) finish(head, head.j0 + u0, smaller(UNITS, head.units - u0), r0);
    }
  }

  template <class W>
  FK_INLINE void block(const Head& head, const unsigned char* image, int thread, int threads) const {
    if (head.shape == 1) return block<1, W>(head, image, thread, threads);
    if (head.shape == 2 || sizeof(T) > 4) return block<2, W>(head, image, thread, threads);
    if constexpr (sizeof(T) == 4) block<4, W>(head, image, thread, threads);
  }

  // what follows the sums of n units from j0 on in the rows [r0, r0 + 4)
  FK_INLINE void finish(const Head& head, int j0, int n, int r0) const {
    const int l = head.layer;
    if (head.kind == static_cast<int>(StageKind::step) && l == args.n_layers) {
      FK_KEEP_LOOP
      for (int j = j0; j < j0 + n; j += kSums)  // shift and raw scale of one feature are in one thread
        for (int r = r0; r < r0 + 4; ++r) feature(j / kSums, r, [&](int sum) { return value(l, j + sum, r); });
      return;
    }
    FK_KEEP_LOOP  // code of one unit, not of all of them in registers: this is rare, and was most of the kernel
    for (int j = j0; j < j0 + n; ++j)
      for (int r = r0; r < r0 + 4; ++r) {
        T& sum = value(l, j, r);
        sum = head.kind == static_cast<int>(StageKind::context) ? with_context(l, j, r, sum) : hidden(l, j, r, sum);
      }
  }

  // The stages that share a slot. They begin with different warps, as small ones have work for few.
  template <class Lanes>
  FK_INLINE void consume(const unsigned char* slot, int warp, int warps, Lanes& lanes) const {
    FK_IS_SHARED(slot);
    const int turn = larger(1, warps / 3);
    const unsigned char* image = slot;
    FK_KEEP_LOOP
    for (;;) {
      const Head head = *reinterpret_cast<const Head*>(image);
      if (head.kind == static_cast<int>(StageKind::panel)) {
        FK_KEEP_LOOP
        for (int r0 = kPanelRows * warp; r0 < ROWS; r0 += kPanelRows * warps) panel(head, image, r0, lanes);
        return;
      }
      lanes.each([&](int lane) {
        const int thread = 32 * warp + lane, threads = 32 * warps;
        if constexpr (sizeof(T) == 4 && !MIRRORED)
          if (head.flags & kHasBfloat16) return block<Bfloat16>(head, image, thread, threads);
        block<T>(head, image, thread, threads);
      });
      if (head.next == 0) return;
      image = slot + head.next;
      warp = warp + turn < warps ? warp + turn : warp + turn - warps;
    }
  }

  template <class Lanes>
  FK_INLINE void panel(const Head& head, const unsigned char* image, int r0, Lanes& lanes) const {
    if (head.units == 1) {
      if (args.n_layers == 3) return RegisterPanel<T, Tile, 3, 1>(*this, image, head, r0).run(head.inputs, lanes);
      return RegisterPanel<T, Tile, 2, 1>(*this, image, head, r0).run(head.inputs, lanes);
    }
    if (head.units == 2) {
      if (args.n_layers == 3) return RegisterPanel<T, Tile, 3, 2>(*this, image, head, r0).run(head.inputs, lanes);
      return RegisterPanel<T, Tile, 2, 2>(*this, image, head, r0).run(head.inputs, lanes);
    }
    Panel<T, Tile>(*this, image, head, r0).run(head.inputs, lanes);
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
    const int sums = args.inverse ? schedule.ends[static_cast<int64_t>(schedule.steps) * (args.n_layers + 1) + args.n_layers] : 0;
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
      if (args.column(l) < 0) continue;
      T* first = args.deltas + first_row * args.deltas_row + args.column(l);
      for (int i = thread; i < rows() * width; i += threads) {
        const int r = i / width, j = i % width;
        first[r * args.deltas_row + j] = known == args.features ? value(l, width - 1 - j, r) : T(NAN);
      }
    }
  }
};

}  // namespace flowkernels
