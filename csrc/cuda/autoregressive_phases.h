// The phases of the sequential loop's kernel: what each thread does between two barriers of its block (autoregressive_schedule.h has
// the order of things). Device code; its twin, cpu/autoregressive_twin.cpp, runs each phase for all threads in turn.
//
// The state of a tile is [unit][ROWS]: pending sums, which become the values themselves; z, which becomes x; the context; gates.
// Rows of a tile never meet, so a panel is run by warps that own rows, with no barrier of the block inside. A block of weights is run
// by all warps: a thread computes 4 rows of 2 or 4 units.
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

constexpr int kLogChunk = 16;  // log-derivatives are summed in chunks, as on the CPU

// One slot of shared memory
template <class T>
struct Slot {
  Stage* stage;
  int32_t *ends, *visible;
  T* weights;

  FK_INLINE Slot(unsigned char* memory, const SlotLayout& layout)
      : stage(reinterpret_cast<Stage*>(memory)), ends(reinterpret_cast<int32_t*>(memory + layout.ends)),
        visible(reinterpret_cast<int32_t*>(memory + layout.visible)), weights(reinterpret_cast<T*>(memory + layout.weights)) {}
};

template <class T, int ROWS, bool MIRRORED = false>
struct Tile {
  const LoopArgs<T>& args;
  T* state;
  const int32_t* ends;
  int steps;
  int64_t first_row;

  FK_INLINE T* values(int l) const { return state + static_cast<int64_t>(args.first_unit(l)) * ROWS; }
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

  template <class Copies>
  FK_INLINE void copy_block(const T* weight, int64_t ld, int k0, int inputs, int j0, int units, T* to, int to_ld, int thread, int threads,
                            Copies& copies) const {
    const int lane = thread % 32;
    if constexpr (MIRRORED) {  // `weight` is the last element. A warp copies 8 inputs of 4 units: whole sectors, and few banks twice
      const int k_lane = lane % 8, j_lane = lane / 8, blocks = (inputs + 7) / 8;
      for (int i = thread / 32; i < (units + 3) / 4 * blocks; i += threads / 32) {
        const int k = i % blocks * 8 + k_lane, j = i / blocks * 4 + j_lane;
        if (k < inputs && j < units) copies.copy(to + k * to_ld + j, weight - (j0 + j) * ld - (k0 + k));
      }
    } else {
      for (int k = thread / 32; k < inputs; k += threads / 32) {
        const T* row = weight + (k0 + k) * ld + j0;
        for (int j = lane; j < units; j += 32) copies.copy(to + k * to_ld + j, row + j);
      }
    }
  }

  template <class Copies>
  FK_INLINE void produce(Cursor<T>& cursor, const Slot<T>& slot, int thread, int threads, Copies& copies) const {
    const Stage stage = cursor.next();
    if (thread == 0) *slot.stage = stage;
    if (stage.kind == StageKind::panel) {
      const int columns = args.n_layers + 1;
      const int32_t *from = cursor.row(stage.row), *to = cursor.row(stage.row + stage.rows);
      for (int i = thread; i < (stage.rows + 1) * columns; i += threads) slot.ends[i] = from[i];
      T* weights = slot.weights;
      int32_t* visible = slot.visible;
      for (int l = 1; l <= args.n_layers; ++l) {
        const LoopLayer<T>& layer = args.layer(l);
        if (layer.unitwise) continue;
        const int k0 = from[layer.source], inputs = to[layer.source] - k0, j0 = from[l], units = to[l] - j0;
        copy_block(layer.weight, layer.ld, k0, inputs, j0, units, weights, units, thread, threads, copies);
        for (int j = thread; j < units; j += threads) copies.copy(visible + j, layer.visible + j0 + j);
        weights += inputs * units;
        visible += units;
      }
    } else if (stage.kind != StageKind::end) {
      const LoopLayer<T>& layer = args.layer(stage.layer);
      const bool context = stage.kind == StageKind::context;
      copy_block(context ? layer.context_weight : layer.weight, context ? layer.context_ld : layer.ld, stage.k0, stage.inputs, stage.j0,
                 stage.units, slot.weights, block_ld(stage.units), thread, threads, copies);
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

  // pending + the runs of the inputs [k, end) in row r: input k's weights begin at `weight`
  FK_INLINE T add_runs(T pending, const T* weight, int ld, const T* h, int r, int k, int end) const {
    while (k < end) {
      const int stop = smaller(end, (k / kRun + 1) * kRun);
      T run = T(0);
      for (; k < stop; ++k, weight += ld) run = scalar::fma(*weight, h[k * ROWS + r], run);
      pending = pending + run;
    }
    return pending;
  }

  // Lanes::each(f) calls f(lane) in every lane of a warp and then waits for all of them.
  template <class Lanes>
  FK_INLINE void panel(const Slot<T>& slot, int warp, int warps, Lanes& lanes) const {
    const int columns = args.n_layers + 1, panel_rows = slot.stage->rows;
    const int share = larger(ROWS / warps, 1), r0 = warp * share;  // rows of this warp
    if (r0 >= ROWS) return;
    const int32_t *first = slot.ends, *last = slot.ends + panel_rows * columns;
    for (int s = 0; s < panel_rows; ++s) {
      const int32_t *begin = slot.ends + s * columns, *end = begin + columns;
      const T* weights = slot.weights;
      const int32_t* visible = slot.visible;
      for (int l = 1; l <= args.n_layers; ++l) {
        const LoopLayer<T>& layer = args.layer(l);
        const int source = layer.source, k0 = first[source], ld = last[l] - first[l], j0 = begin[l];
        T* sums = values(l);
        auto whole = [&](int j, int r) {
          T sum = sums[j * ROWS + r];
          if (layer.unitwise) return sum;
          const int column = j - first[l];
          return add_runs(sum, weights + column, ld, values(source), r, k0, smaller(visible[column], end[source]));
        };
        if (j0 == end[l]) {
        } else if (l < args.n_layers)
          lanes.each([&](int lane) {
            for (int i = lane; i < (end[l] - j0) * share; i += 32) {
              const int j = j0 + i / share, r = r0 + i % share;
              sums[j * ROWS + r] = hidden(l, j, r, whole(j, r));
            }
          });
        else
          lanes.each([&](int lane) {
            for (int i = lane; i < (end[l] - j0) / kSums * share; i += 32) {
              const int p = j0 / kSums + i / share, r = r0 + i % share;
              feature(p, r, [&](int sum) { return whole(kSums * p + sum, r); });
            }
          });
        if (!layer.unitwise) {
          weights += (last[source] - k0) * ld;
          visible += ld;
        }
      }
    }
  }

  // ---- a block of weights, by all consumers

  template <int UNITS>
  FK_INLINE void block(const Slot<T>& slot, int thread, int threads) const {
    const Stage stage = *slot.stage;
    const LoopLayer<T>& layer = args.layer(stage.layer);
    const bool context = stage.kind == StageKind::context;
    const T* h = (context ? state + static_cast<int64_t>(args.context) * ROWS : values(layer.source)) + static_cast<int64_t>(stage.k0) * ROWS;
    const int ld = block_ld(stage.units), k0 = stage.k0;
    constexpr int quads = ROWS / 4;
    for (int item = thread; item < (stage.units + UNITS - 1) / UNITS * quads; item += threads) {
      const int u0 = item / quads * UNITS, r0 = item % quads * 4, n = smaller(UNITS, stage.units - u0);
      T* at = values(stage.layer) + static_cast<int64_t>(stage.j0 + u0) * ROWS + r0;
      Pack<T, 4> sum[UNITS] = {};
      int sees[UNITS], most = 0;  // inputs of this block, ascending
      for (int u = 0; u < UNITS; ++u) {
        sees[u] = u < n ? (context ? stage.inputs : larger(0, smaller(slot.visible[u0 + u] - k0, stage.inputs))) : 0;
        most = larger(most, sees[u]);
        if (u < n) sum[u] = *reinterpret_cast<const Pack<T, 4>*>(at + u * ROWS);
      }
      for (int k = 0; k < most;) {
        const int end = smaller(most, ((k0 + k) / kRun + 1) * kRun - k0), seen_by_all = smaller(sees[0], end);
        Pack<T, 4> run[UNITS] = {};
        for (; k < seen_by_all; ++k) {
          const Pack<T, 4> x = *reinterpret_cast<const Pack<T, 4>*>(h + k * ROWS + r0);
          const Pack<T, UNITS> w = *reinterpret_cast<const Pack<T, UNITS>*>(slot.weights + k * ld + u0);
          for (int u = 0; u < UNITS; ++u)
            for (int r = 0; r < 4; ++r) run[u].at[r] = scalar::fma(w.at[u], x.at[r], run[u].at[r]);
        }
        for (; k < end; ++k) {
          const Pack<T, 4> x = *reinterpret_cast<const Pack<T, 4>*>(h + k * ROWS + r0);
          for (int u = 0; u < UNITS; ++u) {
            if (k >= sees[u]) continue;
            const T w = slot.weights[k * ld + u0 + u];
            for (int r = 0; r < 4; ++r) run[u].at[r] = scalar::fma(w, x.at[r], run[u].at[r]);
          }
        }
        for (int u = 0; u < UNITS; ++u)
          for (int r = 0; r < 4; ++r) sum[u].at[r] = sum[u].at[r] + run[u].at[r];
      }
      for (int u = 0; u < UNITS; ++u)
        if (u < n) *reinterpret_cast<Pack<T, 4>*>(at + u * ROWS) = sum[u];
      if (stage.finish) finish(stage, stage.j0 + u0, n, r0);
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
    const int threads = 32 * warps, quads = slot.stage->units * (ROWS / 4);
    constexpr int most = sizeof(T) == 8 ? 2 : 4;  // as many units to a thread as leave work for half of the threads, and have registers
    if (quads >= 2 * threads)
      lanes.each([&](int lane) { block<most>(slot, 32 * warp + lane, threads); });
    else
      lanes.each([&](int lane) { block<2>(slot, 32 * warp + lane, threads); });
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
