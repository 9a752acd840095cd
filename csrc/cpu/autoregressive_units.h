// The state of the sequential loop where lanes are units, for few rows: [row][unit], each known value pushed down its contiguous row of
// weights. A value that is zero for all rows (a rectified unit) skips its row, which halves the weights that are read.
//
// Vectors of a layer's units lie on a grid from its first unit: what one push stores, the next loads as the same vector. A vector that lay
// across two would wait until both had reached the cache, in every step of the chain.
// Included once per instruction set, by autoregressive_kernel.h.

namespace flowkernels {
namespace FK_TARGET {

// where the vector begins that holds unit j
template <class T>
FK_INLINE int64_t on_grid(int64_t j) {
  return j / lanes<T> * lanes<T>;
}

// the lanes of the vector at j that hold units of [j0, j1)
template <class T>
FK_INLINE IVec<T> within(int64_t j, int64_t j0, int64_t j1) {
  return (iota<T>() >= static_cast<int>(j0 - j)) & (iota<T>() < static_cast<int>(smaller(j1 - j, lanes<T>)));
}

// v where `mine`; the others keep what memory holds there. Masked stores are slow, and loads after them wait.
template <class T>
FK_INLINE void store_within(T* p, Vec<T> v, IVec<T> mine) {
  store(p, select(mine, v, load(p)));
}

// Whether x is 0 or -0, by its bits: a comparison of floating-point numbers takes the way through the flags.
template <class T>
FK_INLINE bool is_zero(T x) {
  typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits << 1 == 0;
}

// What is compiled for each number of rows, B: the product. All else is little work, and loops over them.
template <class T, int B>
struct FewRowsProduct {
  // values pushed together: B * kGroup broadcasts stay in registers
  static constexpr int kGroup = FK_REGISTERS >= 32 ? (B <= 2 ? 8 : 4) : B == 1 ? 8 : B == 2 ? 4 : 2;

  template <int K>
  static FK_INLINE void push_group(const T* weight, int64_t ld, const int32_t* inputs, const T* h, int64_t h_stride, T* acc, int64_t stride,
                                   int64_t j0, int64_t j1) {
    const T* rows[K];
    Vec<T> value[B][K];
    for (int k = 0; k < K; ++k) {
      rows[k] = weight + inputs[k] * ld;
      for (int b = 0; b < B; ++b) value[b][k] = broadcast<T>(h[b * h_stride + inputs[k]]);
    }
    const auto edge = [&](int64_t j) FK_BODY {
      const IVec<T> mine = within<T>(j, j0, j1);
      Vec<T> w[K];
      for (int k = 0; k < K; ++k) w[k] = load_partial(rows[k] + j, smaller(j1 - j, lanes<T>));
      for (int b = 0; b < B; ++b) {
        Vec<T> a = load(acc + b * stride + j);
        for (int k = 0; k < K; ++k) a = fma(value[b][k], w[k], a);
        store_within(acc + b * stride + j, a, mine);
      }
    };
    int64_t j = on_grid<T>(j0);
    if (j < j0) {
      edge(j);
      j += lanes<T>;
    }
    if constexpr (B == 1)  // two chains hide each other's latency
      for (; j + 2 * lanes<T> <= j1; j += 2 * lanes<T>) {
        Vec<T> a = load(acc + j), b = load(acc + j + lanes<T>);
        for (int k = 0; k < K; ++k) {
          a = fma(value[0][k], load(rows[k] + j), a);
          b = fma(value[0][k], load(rows[k] + j + lanes<T>), b);
        }
        store(acc + j, a);
        store(acc + j + lanes<T>, b);
      }
    for (; j + lanes<T> <= j1; j += lanes<T>) {
      Vec<T> a[B];
      for (int b = 0; b < B; ++b) a[b] = load(acc + b * stride + j);
      for (int k = 0; k < K; ++k) {
        const Vec<T> w = load(rows[k] + j);
        for (int b = 0; b < B; ++b) a[b] = fma(value[b][k], w, a[b]);
      }
      for (int b = 0; b < B; ++b) store(acc + b * stride + j, a[b]);
    }
    if (j < j1) edge(j);
  }

  // every unit in [j0, j1) sees every input in [k0, k1), a chunk at most; h and acc are those of row 0, other rows follow at their strides
  static void push(const T* weight, int64_t ld, const T* h, int64_t h_stride, T* acc, int64_t stride, int64_t k0, int64_t k1, int64_t j0,
                   int64_t j1) {
    int32_t inputs[kChunk];
    int n = 0;
    for (int64_t k = k0; k < k1; ++k) {
      bool zero_everywhere = true;
      for (int b = 0; b < B; ++b) zero_everywhere &= is_zero(h[b * h_stride + k]);
      inputs[n] = static_cast<int32_t>(k);
      n += !zero_everywhere;  // no branch: it would be mispredicted half of the time
    }
    const auto group = [&](auto size, int i) FK_BODY {
      push_group<decltype(size)::value>(weight, ld, inputs + i, h, h_stride, acc, stride, j0, j1);
    };
    int i = 0;
    for (; i + kGroup <= n; i += kGroup) group(Count<kGroup>{}, i);
    if constexpr (kGroup > 4)
      if (i + 4 <= n) {
        group(Count<4>{}, i);
        i += 4;
      }
    if constexpr (kGroup > 2) {
      if (n - i == 3) return group(Count<3>{}, i);
      if (n - i == 2) return group(Count<2>{}, i);
    }
    if (n - i == 1) group(Count<1>{}, i);
  }
};

template <class T>
struct UnitLanes {
  static constexpr int64_t kMostRows = lanes<T> < 4 ? lanes<T> : 4;  // where this form is the quicker one; a feature's rows are one vector
  static constexpr int64_t kFewSteps = 16;            // so many are run one after the other
  static constexpr int64_t kFetchedBytes = 8 * 1024;  // of a layer's weights
  static constexpr bool kPushesAhead = true;

  const AutoregressiveArgs<T>& args;
  int64_t first_row, rows;
  int64_t units;  // of all layers, each padded to whole vectors
  T* values;      // [row][layer][unit]
  T* totals;
  T* gates;
  T* context;
  const int64_t* offsets;
  T log[lanes<T>] = {}, log_total[lanes<T>] = {};

  UnitLanes(const AutoregressiveArgs<T>& args, const int64_t* offsets, int64_t units, int64_t first_row, int64_t rows, T* scratch)
      : args(args), first_row(first_row), rows(rows), units(units), values(scratch), totals(values + rows * units), gates(totals + rows * units),
        context(gates + (args.gated ? rows * units : 0)), offsets(offsets) {}

  static int64_t scratch(const AutoregressiveArgs<T>& args, int64_t units, int64_t rows) {
    return rows * ((args.gated ? 3 : 2) * units + args.context_features);
  }

  void flush_chunk(int l, int64_t j0, int64_t j1) {
    for (int64_t b = 0; b < rows; ++b) {
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
      switch (rows) {
        case 1: FewRowsProduct<T, 1>::push(weight, ld, h, h_stride, acc, units, k0, k, j0, j1); break;
        case 2: FewRowsProduct<T, 2>::push(weight, ld, h, h_stride, acc, units, k0, k, j0, j1); break;
        case 3: FewRowsProduct<T, 3>::push(weight, ld, h, h_stride, acc, units, k0, k, j0, j1); break;
        default: FewRowsProduct<T, 4>::push(weight, ld, h, h_stride, acc, units, k0, k, j0, j1);
      }
      k0 = k;
    }
  }

  void begin() {
    for (int64_t b = 0; b < rows; ++b) {
      const T* x = args.x.data + (first_row + b) * args.x.row;
      T* row = values + b * units;
      for (int64_t p = 0; p < args.features; ++p) {
        const int64_t f = args.order ? args.order[p] : p, n = args.features;
        row[p] = args.affine ? (x[f * args.x.column] + args.affine[f]) * args.affine[n + f] + args.affine[2 * n + f] : x[f * args.x.column];
      }
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
    for (int64_t b = 0; b < rows; ++b) {
      T *total = totals + b * units + offsets[l], *gate = gates + b * units + offsets[l];
      for (int64_t j = 0; j < layer.outputs; j += lanes<T>) {
        const IVec<T> mine = within<T>(j, 0, layer.outputs);
        const Vec<T> term = activate(static_cast<Activation>(layer.context_activation), load(total + j));
        const Vec<T> bias = load_partial(layer.bias + j, smaller(layer.outputs - j, lanes<T>));
        if (layer.gate) store_within(gate + j, term, mine);
        store_within(total + j, layer.gate ? bias : bias + term, mine);
      }
    }
  }

  void push_layer(int l, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    if (layer.unitwise) return;
    push(l, layer.weight, layer.ld, layer.visible, values + offsets[layer.source], units, k0, k1, j0, j1);
  }

  // Asks for the weights of a small block before the values are known that say which rows of it are skipped. A large one is read in long
  // runs, which need no help. Inline, as a call that only prefetches is taken for one that does nothing.
  FK_INLINE void fetch_layer(int l, int64_t k0, int64_t k1, int64_t j0, int64_t j1) const {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    constexpr int64_t line = 64 / sizeof(T);
    if (layer.unitwise || (k1 - k0) * (j1 - j0) * int64_t(sizeof(T)) > kFetchedBytes) return;
    for (int64_t k = k0; k < k1; ++k)
      for (int64_t j = j0 / line * line; j < j1; j += line) __builtin_prefetch(layer.weight + k * layer.ld + j);
  }

  void finish_hidden(int l, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    if (layer.joins()) return finish_joined(l, j0, j1);
    with_activation(static_cast<Activation>(layer.activation), [&](auto code) {
      for (int64_t b = 0; b < rows; ++b) {
        T *h = values + b * units + offsets[l], *total = totals + b * units + offsets[l];
        for (int64_t j = on_grid<T>(j0); j < j1; j += lanes<T>)
          store_within(h + j, activate<decltype(code)::value>(load(total + j) + load(h + j)), within<T>(j, j0, j1));
      }
    });
  }

  // the same where more than a sum meets the activation
  FK_CALL void finish_joined(int l, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    const Activation activation = static_cast<Activation>(layer.activation);
    for (int64_t b = 0; b < rows; ++b) {
      T *row = values + b * units, *h = row + offsets[l];
      const T *total = totals + b * units + offsets[l], *gate = gates + b * units + offsets[l], *from = row + offsets[layer.source];
      const T* residual = layer.residual < 0 ? nullptr : row + offsets[layer.residual];
      for (int64_t j = on_grid<T>(j0); j < j1; j += lanes<T>) {
        const int64_t n = smaller(j1 - j, lanes<T>);
        Vec<T> v;
        if (!layer.unitwise)
          v = load(total + j) + load(h + j);
        else
          v = layer.weight ? fma(load_partial(layer.weight + j, n), load(from + j), load_partial(layer.bias + j, n)) : load(from + j);
        if (layer.gate) v = v * load(gate + j);
        if (residual) v = v + load(residual + j);
        store_within(h + j, activate(activation, v), within<T>(j, j0, j1));
      }
    }
  }

  void finish_features(int64_t p0, int64_t p1) {
    const bool scaled = args.output_columns.each == 2;
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t at = offsets[args.n_layers] + args.output_columns.of(p);
      const Vec<T> x = of_rows([&](int64_t row) { return values[row + p]; });
      const Vec<T> shift = of_rows([&](int64_t row) { return totals[row + at] + values[row + at]; });
      const Vec<T> raw = scaled ? of_rows([&](int64_t row) { return totals[row + at + 1] + values[row + at + 1]; }) : zero<T>();
      const ValueAndLog<Vec<T>> out = transform(args, x, shift, raw);
      add_log(log, log_total, out.log, p);
      for (int64_t b = 0; b < rows; ++b) values[b * units + p] = out.value[b];
    }
  }

  // lane b is row b's; f(where the row begins in values)
  template <class F>
  FK_INLINE Vec<T> of_rows(const F& f) const {
    Vec<T> v = broadcast<T>(f(0));  // one row needs no more
    for (int64_t b = 1; b < rows; ++b) v[b] = f(b * units);
    return v;
  }

  void end() const {
    for (int64_t b = 0; b < rows; ++b) {
      T* y = args.y + (first_row + b) * args.features;
      for (int64_t p = 0; p < args.features; ++p) y[args.order ? args.order[p] : p] = values[b * units + p];
      T& to = args.logabsdet[first_row + b];
      to = args.adds_log ? to + (log_total[b] + log[b]) : log_total[b] + log[b];
    }
  }
};

}  // namespace FK_TARGET
}  // namespace flowkernels
