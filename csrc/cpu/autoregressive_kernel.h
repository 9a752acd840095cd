// The fused sequential loop. Included once per instruction set (for_each_target.h), after staircase_kernel.h.
//
// The steps are visited by recursion: run(a, b) runs the first half of the steps, pushes what it produced into the pending sums of
// the second half as dense blocks, and runs the second half. Each weight inside the staircase is used once, nearly all of them in
// large blocks, at every size and without a panel width to choose; each sum still receives its inputs in ascending order.
// Two forms of it differ in what the lanes of a vector hold, and give the same bits:
//   RowLanes   lanes are batch rows: state [unit][row], each weight broadcast to several vectors of rows
//   UnitLanes  lanes are units, for few rows: state [row][unit], each known value pushed down its contiguous row of weights;
//              a value that is zero for all rows (a rectified unit) skips its row, which halves the weights that are read

namespace flowkernels {
namespace FK_TARGET {

constexpr int64_t kLogChunk = 16;  // log-derivatives are summed in chunks, as inputs are

template <class T>
FK_INLINE ValueAndLog<Vec<T>> transform(const AutoregressiveArgs<T>& args, Vec<T> x, Vec<T> shift, Vec<T> raw) {
  const Form form = static_cast<Form>(args.form);
  return args.inverse ? invert_form(form, args.scale, x, shift, raw) : apply_form(form, args.scale, x, shift, raw);
}

// adds the log-derivative of the p-th feature
template <class T>
FK_INLINE void add_log(T* chunk, T* total, Vec<T> log_derivative, int64_t p) {
  if (p % kLogChunk == 0) {
    store(total, load(total) + load(chunk));
    store(chunk, log_derivative);
  } else {
    store(chunk, load(chunk) + log_derivative);
  }
}

template <class T>
struct RowLanes {
  const AutoregressiveArgs<T>& args;
  int64_t first_row, n_rows, rows;  // rows: padded to whole vectors
  T* values;                        // [layer][unit][row]: pending sums, then the values themselves; layer 0 is the features
  T* totals;
  const int64_t* offsets;           // first unit of each layer in values
  T *gates, *context, *log, *log_total;

  RowLanes(const AutoregressiveArgs<T>& args, const int64_t* offsets, int64_t units, int64_t first_row, int64_t n_rows, int64_t rows,
           T* scratch)
      : args(args), first_row(first_row), n_rows(n_rows), rows(rows), values(scratch), totals(values + units * rows), offsets(offsets) {
    gates = totals + units * rows;
    context = gates + (args.gated ? units * rows : 0);
    log = context + args.context_features * rows;
    log_total = log + rows;
  }

  static int64_t scratch(const AutoregressiveArgs<T>& args, int64_t units, int64_t rows) {
    return rows * ((args.gated ? 3 : 2) * units + args.context_features + 2);
  }

  bool one_chunk(int l) const {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    return layer.inputs <= kChunk && (!layer.context_weight || layer.gate);
  }
  T* layer_values(int l) const { return values + offsets[l] * rows; }
  T* layer_gates(int l) const { return gates + offsets[l] * rows; }
  T* layer_totals(int l) const { return one_chunk(l) ? nullptr : totals + offsets[l] * rows; }

  void read(const Strided<T>& from, int64_t columns, const int64_t* order, T* to) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        to[c * rows + r] = r < n_rows ? from.data[(first_row + r) * from.row + (order ? order[c] : c) * from.column] : T(0);
  }

  void begin() {
    read(args.x, args.features, args.order, values);
    if (args.context_features) read(args.context, args.context_features, nullptr, context);
    for (int l = 1; l <= args.n_layers; ++l) {
      const MaskedLayer<T>& layer = args.layers[l - 1];
      if (layer.unitwise) continue;
      Tile<T> tile{context, layer_values(l), totals + offsets[l] * rows, rows};
      for (int64_t i = 0; i < layer.outputs * rows; i += lanes<T>) store(tile.acc + i, zero<T>());
      if (layer.context_weight) {
        fill(tile.total, layer.own_context_term() ? layer.context_bias : layer.bias, layer.outputs);
        push<T>(layer.context_weight, layer.context_ld, nullptr, tile, 0, args.context_features, 0, layer.outputs);
        flush_chunk(tile, 0, layer.outputs);
        if (layer.own_context_term()) finish_context(l, tile.total);
      } else if (!one_chunk(l)) {
        fill(tile.total, layer.bias, layer.outputs);
      }
    }
    for (int64_t r = 0; r < rows; r += lanes<T>) {
      store(log + r, zero<T>());
      store(log_total + r, zero<T>());
    }
  }

  void fill(T* to, const T* units, int64_t n) const {  // null: zeros
    for (int64_t j = 0; j < n; ++j)
      for (int64_t r = 0; r < rows; r += lanes<T>) store(to + j * rows + r, broadcast<T>(units ? units[j] : T(0)));
  }

  // total holds the context's sums; then, the gates are known, or total holds what the sums of the layer begin with
  void finish_context(int l, T* total) const {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    for (int64_t j = 0; j < layer.outputs; ++j)
      for (int64_t r = 0; r < rows; r += lanes<T>) {
        const int64_t at = j * rows + r;
        const Vec<T> term = activate(static_cast<Activation>(layer.context_activation), load(total + at)), bias = broadcast<T>(layer.bias[j]);
        if (layer.gate) store(layer_gates(l) + at, term);
        store(total + at, layer.gate ? bias : bias + term);
      }
  }

  void push_layer(int l, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    if (layer.unitwise) return;
    push<T>(layer.weight, layer.ld, layer.visible, {layer_values(layer.source), layer_values(l), layer_totals(l), rows}, k0, k1, j0, j1);
  }

  FK_INLINE Vec<T> sum(const MaskedLayer<T>& layer, const T* acc, const T* total, int64_t j, int64_t r) const {
    return (total ? load(total + j * rows + r) : broadcast<T>(layer.bias[j])) + load(acc + j * rows + r);
  }

  void finish_hidden(int l, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    T* h = layer_values(l);
    const T* total = layer_totals(l);
    if (layer.joins()) return finish_joined(l, j0, j1);
    with_activation(static_cast<Activation>(layer.activation), [&](auto code) {
      for (int64_t j = j0; j < j1; ++j)
        for (int64_t r = 0; r < rows; r += lanes<T>) store(h + j * rows + r, activate<decltype(code)::value>(sum(layer, h, total, j, r)));
    });
  }

  // the same where more than a sum meets the activation
  FK_CALL void finish_joined(int l, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    T* h = layer_values(l);
    const T *total = layer_totals(l), *from = layer_values(layer.source), *gate = layer.gate ? layer_gates(l) : nullptr;
    const T* residual = layer.residual < 0 ? nullptr : layer_values(layer.residual);
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t r = 0; r < rows; r += lanes<T>) {
        const int64_t at = j * rows + r;
        Vec<T> v;
        if (!layer.unitwise)
          v = sum(layer, h, total, j, r);
        else
          v = layer.weight ? fma(broadcast<T>(layer.weight[j]), load(from + at), broadcast<T>(layer.bias[j])) : load(from + at);
        if (gate) v = v * load(gate + at);
        if (residual) v = v + load(residual + at);
        store(h + at, v);
      }
    with_activation(static_cast<Activation>(layer.activation), [&](auto code) {
      for (int64_t i = j0 * rows; i < j1 * rows; i += lanes<T>) store(h + i, activate<decltype(code)::value>(load(h + i)));
    });
  }

  void finish_features(int64_t p0, int64_t p1) {
    const int last = args.n_layers;
    const MaskedLayer<T>& layer = args.layers[last - 1];
    const T *acc = layer_values(last), *total = layer_totals(last);
    for (int64_t p = p0; p < p1; ++p)
      for (int64_t r = 0; r < rows; r += lanes<T>) {
        const Vec<T> shift = sum(layer, acc, total, 2 * p, r), raw = sum(layer, acc, total, 2 * p + 1, r);
        T* at = values + p * rows + r;
        const ValueAndLog<Vec<T>> out = transform(args, load(at), shift, raw);
        store(at, out.value);
        add_log(log + r, log_total + r, out.log, p);
      }
  }

  void end() const {
    for (int64_t r = 0; r < n_rows; ++r) {
      T* y = args.y + (first_row + r) * args.features;
      for (int64_t p = 0; p < args.features; ++p) y[args.order ? args.order[p] : p] = values[p * rows + r];
      args.logabsdet[first_row + r] = log_total[r] + log[r];
    }
  }
};

// The first n lanes of v; the others keep what memory holds there. Masked stores are slow, and loads after them wait.
template <class T>
FK_INLINE void store_head(T* p, Vec<T> v, int64_t n) {
  store(p, n >= lanes<T> ? v : select(iota<T>() < static_cast<int>(n), v, load(p)));
}

template <class T, int B>
struct UnitLanes {
  static constexpr int kGroup = B == 1 ? 8 : B == 2 ? 4 : 2;  // values pushed together: B * kGroup broadcasts stay in registers

  const AutoregressiveArgs<T>& args;
  int64_t first_row;
  int64_t units;  // of all layers, padded
  T* values;      // [row][layer][unit]; vectors may reach past the end of a row, never past the scratch
  T* totals;
  T* gates;
  T* context;
  const int64_t* offsets;
  T log[lanes<T>] = {}, log_total[lanes<T>] = {};

  UnitLanes(const AutoregressiveArgs<T>& args, const int64_t* offsets, int64_t units, int64_t first_row, T* scratch)
      : args(args), first_row(first_row), units(units), values(scratch), totals(values + B * units), gates(totals + B * units),
        context(gates + (args.gated ? B * units : 0)), offsets(offsets) {}

  static int64_t scratch(const AutoregressiveArgs<T>& args, int64_t units) {
    return B * ((args.gated ? 3 : 2) * units + args.context_features) + lanes<T>;
  }

  template <int K>
  FK_INLINE void push_group(const T* const* weight, const Vec<T> (*h)[kGroup], T* acc, int64_t n) const {
    int64_t j = 0;
    if constexpr (B == 1)  // two chains hide each other's latency
      for (; j + 2 * lanes<T> <= n; j += 2 * lanes<T>) {
        Vec<T> a = load(acc + j), b = load(acc + j + lanes<T>);
        for (int k = 0; k < K; ++k) {
          a = fma(h[0][k], load(weight[k] + j), a);
          b = fma(h[0][k], load(weight[k] + j + lanes<T>), b);
        }
        store(acc + j, a);
        store(acc + j + lanes<T>, b);
      }
    for (; j + lanes<T> <= n; j += lanes<T>) {
      Vec<T> a[B];
      for (int b = 0; b < B; ++b) a[b] = load(acc + b * units + j);
      for (int k = 0; k < K; ++k) {
        const Vec<T> w = load(weight[k] + j);
        for (int b = 0; b < B; ++b) a[b] = fma(h[b][k], w, a[b]);
      }
      for (int b = 0; b < B; ++b) store(acc + b * units + j, a[b]);
    }
    if (j < n)
      for (int b = 0; b < B; ++b) {
        Vec<T> a = load(acc + b * units + j);
        for (int k = 0; k < K; ++k) a = fma(h[b][k], load_partial(weight[k] + j, n - j), a);
        store_head(acc + b * units + j, a, n - j);
      }
  }

  // every unit in [j0, j1) sees every input in [k0, k1); h and acc are those of row 0, other rows follow at the stride given
  void push_dense(const T* weight, int64_t ld, const T* h, int64_t h_stride, T* acc, int64_t k0, int64_t k1, int64_t j0, int64_t j1) const {
    const T* rows[kGroup];
    Vec<T> value[B][kGroup];
    const int64_t n = j1 - j0;
    int filled = 0;
    for (int64_t k = k0; k < k1; ++k) {
      bool zero_everywhere = true;
      for (int b = 0; b < B; ++b) {
        value[b][filled] = broadcast<T>(h[b * h_stride + k]);
        zero_everywhere &= h[b * h_stride + k] == T(0);
      }
      rows[filled] = weight + k * ld + j0;
      filled += !zero_everywhere;  // no branch: it would be mispredicted half of the time
      if (filled == kGroup) {
        push_group<kGroup>(rows, value, acc + j0, n);
        filled = 0;
      }
    }
    if constexpr (kGroup > 4)
      if (filled >= 4) {
        push_group<4>(rows, value, acc + j0, n);
        for (int i = 4; i < filled; ++i) {
          rows[i - 4] = rows[i];
          for (int b = 0; b < B; ++b) value[b][i - 4] = value[b][i];
        }
        filled -= 4;
      }
    if constexpr (kGroup > 2) {
      if (filled == 3) push_group<3>(rows, value, acc + j0, n);
      if (filled == 2) push_group<2>(rows, value, acc + j0, n);
    }
    if (filled == 1) push_group<1>(rows, value, acc + j0, n);
  }

  void flush_chunk(int l, int64_t j0, int64_t j1) {
    for (int b = 0; b < B; ++b) {
      T *acc = values + b * units + offsets[l], *total = totals + b * units + offsets[l];
      for (int64_t j = j0; j < j1; ++j) {
        total[j] += acc[j];
        acc[j] = T(0);
      }
    }
  }

  void push(int l, const T* weight, int64_t ld, const int32_t* visible, const T* h, int64_t h_stride, int64_t k0, int64_t k1, int64_t j0,
            int64_t j1) {
    T* acc = values + offsets[l];
    while (k0 < k1 && j0 < j1) {
      if (visible && visible[j0] <= k0) {
        ++j0;
        continue;
      }
      if (k0 > 0 && k0 % kChunk == 0) flush_chunk(l, j0, j1);
      // up to where all units from j0 on see, within one chunk
      int64_t k = smaller(k1, (k0 / kChunk + 1) * kChunk);
      if (visible) k = smaller(k, visible[j0]);
      push_dense(weight, ld, h, h_stride, acc, k0, k, j0, j1);
      k0 = k;
    }
  }

  void begin() {
    for (int b = 0; b < B; ++b) {
      const T* x = args.x.data + (first_row + b) * args.x.row;
      T* row = values + b * units;
      for (int64_t p = 0; p < args.features; ++p) row[p] = x[(args.order ? args.order[p] : p) * args.x.column];
      for (int64_t c = 0; c < args.context_features; ++c)
        context[b * args.context_features + c] = args.context.data[(first_row + b) * args.context.row + c * args.context.column];
      for (int64_t i = args.features; i < units; ++i) row[i] = T(0);
      for (int l = 1; l <= args.n_layers; ++l) {
        const MaskedLayer<T>& layer = args.layers[l - 1];
        const T* from = layer.context_weight && layer.own_context_term() ? layer.context_bias : layer.bias;
        T* total = totals + b * units + offsets[l];
        if (from)
          for (int64_t j = 0; j < layer.outputs; ++j) total[j] = from[j];
        else if (layer.context_weight)
          for (int64_t j = 0; j < layer.outputs; ++j) total[j] = T(0);
      }
    }
    for (int l = 1; l <= args.n_layers; ++l) {
      const MaskedLayer<T>& layer = args.layers[l - 1];
      if (!layer.context_weight) continue;
      push(l, layer.context_weight, layer.context_ld, nullptr, context, args.context_features, 0, args.context_features, 0, layer.outputs);
      flush_chunk(l, 0, layer.outputs);
      if (layer.own_context_term()) finish_context(l);
    }
  }

  // totals hold the context's sums; then, the gates are known, or totals hold what the sums of the layer begin with
  void finish_context(int l) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    for (int b = 0; b < B; ++b) {
      T *total = totals + b * units + offsets[l], *gate = gates + b * units + offsets[l];
      for (int64_t j = 0; j < layer.outputs; j += lanes<T>) {
        const int64_t n = smaller(layer.outputs - j, lanes<T>);
        const Vec<T> term = activate(static_cast<Activation>(layer.context_activation), load(total + j)), bias = load_partial(layer.bias + j, n);
        if (layer.gate) store_head(gate + j, term, n);
        store_head(total + j, layer.gate ? bias : bias + term, n);
      }
    }
  }

  void push_layer(int l, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    if (layer.unitwise) return;
    push(l, layer.weight, layer.ld, layer.visible, values + offsets[layer.source], units, k0, k1, j0, j1);
  }

  void finish_hidden(int l, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    if (layer.joins()) return finish_joined(l, j0, j1);
    with_activation(static_cast<Activation>(layer.activation), [&](auto code) {
      for (int b = 0; b < B; ++b) {
        T *h = values + b * units + offsets[l], *total = totals + b * units + offsets[l];
        for (int64_t j = j0; j < j1; j += lanes<T>) store_head(h + j, activate<decltype(code)::value>(load(total + j) + load(h + j)), j1 - j);
      }
    });
  }

  // the same where more than a sum meets the activation
  FK_CALL void finish_joined(int l, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    const Activation activation = static_cast<Activation>(layer.activation);
    for (int b = 0; b < B; ++b) {
      T *row = values + b * units, *h = row + offsets[l];
      const T *total = totals + b * units + offsets[l], *gate = gates + b * units + offsets[l], *from = row + offsets[layer.source];
      const T* residual = layer.residual < 0 ? nullptr : row + offsets[layer.residual];
      for (int64_t j = j0; j < j1; j += lanes<T>) {
        const int64_t n = smaller(j1 - j, lanes<T>);
        Vec<T> v;
        if (!layer.unitwise)
          v = load(total + j) + load(h + j);
        else
          v = layer.weight ? fma(load_partial(layer.weight + j, n), load(from + j), load_partial(layer.bias + j, n)) : load(from + j);
        if (layer.gate) v = v * load(gate + j);
        if (residual) v = v + load(residual + j);
        store_head(h + j, activate(activation, v), n);
      }
    }
  }

  void finish_features(int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      Vec<T> x = zero<T>(), shift = zero<T>(), raw = zero<T>();
      for (int b = 0; b < B; ++b) {
        const int64_t at = b * units + offsets[args.n_layers] + 2 * p;
        x[b] = values[b * units + p];
        shift[b] = totals[at] + values[at];
        raw[b] = totals[at + 1] + values[at + 1];
      }
      const ValueAndLog<Vec<T>> out = transform(args, x, shift, raw);
      add_log(log, log_total, out.log, p);
      for (int b = 0; b < B; ++b) values[b * units + p] = out.value[b];
    }
  }

  void end() const {
    for (int b = 0; b < B; ++b) {
      T* y = args.y + (first_row + b) * args.features;
      for (int64_t p = 0; p < args.features; ++p) y[args.order ? args.order[p] : p] = values[b * units + p];
      args.logabsdet[first_row + b] = log_total[b] + log[b];
    }
  }
};

// units of layer l known after step s, and before it; layer 0 is the features
template <class T>
FK_INLINE int64_t step_end(const AutoregressiveArgs<T>& args, int64_t s, int l) {
  return args.ends[s * (args.n_layers + 1) + l];
}
template <class T>
FK_INLINE int64_t step_begin(const AutoregressiveArgs<T>& args, int64_t s, int l) {
  return s == 0 ? 0 : step_end(args, s - 1, l);
}

// One step: the hidden units that the newest features complete, layer by layer, then the features that those complete.
template <class State, class T>
void run_step(State& state, const AutoregressiveArgs<T>& args, int64_t s) {
  for (int l = 1; l <= args.n_layers; ++l) {
    const int64_t j0 = step_begin(args, s, l), j1 = step_end(args, s, l);
    if (j0 == j1) continue;
    const int source = args.layers[l - 1].source;
    state.push_layer(l, step_begin(args, s, source), step_end(args, s, source), j0, j1);
    if (l < args.n_layers)
      state.finish_hidden(l, j0, j1);
    else
      state.finish_features(j0 / 2, j1 / 2);
  }
}

template <class State, class T>
void run_steps(State& state, const AutoregressiveArgs<T>& args, int64_t a, int64_t b) {
  if (b - a == 1) return run_step(state, args, a);
  const int64_t middle = a + (b - a) / 2;
  run_steps(state, args, a, middle);
  for (int l = 1; l <= args.n_layers; ++l) {
    const int source = args.layers[l - 1].source;
    state.push_layer(l, step_begin(args, a, source), step_end(args, middle - 1, source), step_end(args, middle - 1, l), step_end(args, b - 1, l));
  }
  run_steps(state, args, middle, b);
}

template <class State, class T>
void run_tile(State& state, const AutoregressiveArgs<T>& args) {
  state.begin();
  if (args.n_steps) run_steps(state, args, int64_t(0), args.n_steps);
  state.end();
}

}  // namespace FK_TARGET
}  // namespace flowkernels
