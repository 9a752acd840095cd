// The training passes of a masked autoregressive map, a block of rows at a time. Included once per instruction set, after
// masked_linear_kernel.h.

namespace flowkernels {
namespace FK_TARGET {

// the scratch of a row of features, which whole vectors may be written to from any of them on
template <class T>
int64_t padded_features(int64_t features) {
  return whole_vectors<T>(features) + lanes<T>;
}

template <class T>
struct ShiftAndRaw {
  Vec<T> shift, raw;
};

// Shift and raw scale of a vector of features that do not pass, the first one at `at`; `left` of them are in the row. In the last layer
// they lie side by side; an additive map has shifts alone.
template <class T>
FK_INLINE ShiftAndRaw<T> load_outputs(const T* at, const OutputColumns& columns, int64_t left) {
  if (columns.each == 1) return {load_some(at, left), zero<T>()};
  const Vec<T> a = load_some(at, 2 * left), b = 2 * left > lanes<T> ? load_some(at + lanes<T>, 2 * left - lanes<T>) : zero<T>();
  return {AllLanes<T>::even(a, b), AllLanes<T>::odd(a, b)};
}

template <class T>
FK_INLINE void store_outputs(T* at, const OutputColumns& columns, Vec<T> shift, Vec<T> raw, int64_t left) {
  if (columns.each == 1) return store_some(at, shift, left);
  store_some(at, AllLanes<T>::low_pairs(shift, raw), 2 * left);
  if (2 * left > lanes<T>) store_some(at + lanes<T>, AllLanes<T>::high_pairs(shift, raw), 2 * left - lanes<T>);
}

// Even and odd elements of a row apart, and back
template <class T>
FK_INLINE void part_pairs(const T* from, int64_t n, T* evens, T* odds) {
  int64_t i = 0;
  for (; i + 2 * lanes<T> <= n; i += 2 * lanes<T>) {
    const Vec<T> a = load(from + i), b = load(from + i + lanes<T>);
    store(evens + i / 2, AllLanes<T>::even(a, b));
    store(odds + i / 2, AllLanes<T>::odd(a, b));
  }
  for (; i + 2 <= n; i += 2) evens[i / 2] = from[i], odds[i / 2] = from[i + 1];
  if (i < n) evens[i / 2] = from[i];
}

template <class T>
FK_INLINE void join_pairs(const T* evens, const T* odds, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + 2 * lanes<T> <= n; i += 2 * lanes<T>) {
    const Vec<T> a = load(evens + i / 2), b = load(odds + i / 2);
    store(to + i, AllLanes<T>::low_pairs(a, b));
    store(to + i + lanes<T>, AllLanes<T>::high_pairs(a, b));
  }
  for (; i + 2 <= n; i += 2) to[i] = evens[i / 2], to[i + 1] = odds[i / 2];
  if (i < n) to[i] = evens[i / 2];
}

// to[k] = the feature generated k-th of a row whose features are `column` apart
template <class T>
FK_INLINE void to_order(const TrainingArgs<T>& args, const T* from, int64_t column, T* to) {
  const int64_t D = args.features, evens = (D + 1) / 2, odds = D / 2;
  switch (column == 1 ? args.order_kind : OrderKind::any) {
    case OrderKind::ascending:
      for (int64_t p = 0; p < D; ++p) to[p] = from[p];
      return;
    case OrderKind::descending:
      for (int64_t p = 0; p < D; ++p) to[p] = from[D - 1 - p];
      return;
    case OrderKind::rotated: {
      const int64_t first = args.order[0];
      for (int64_t p = first; p < D; ++p) to[p - first] = from[p];
      for (int64_t p = 0; p < first; ++p) to[D - first + p] = from[p];
      return;
    }
    case OrderKind::evens_first: return part_pairs(from, D, to, to + evens);
    case OrderKind::odds_first: return part_pairs(from, D, to + odds, to);
    case OrderKind::any:
      for (int64_t p = 0; p < D; ++p) to[p] = from[(args.order ? args.order[p] : p) * column];
  }
}

// and back, into a contiguous row
template <class T>
FK_INLINE void from_order(const TrainingArgs<T>& args, const T* from, T* to) {
  const int64_t D = args.features, evens = (D + 1) / 2, odds = D / 2;
  switch (args.order_kind) {
    case OrderKind::ascending:
      for (int64_t p = 0; p < D; ++p) to[p] = from[p];
      return;
    case OrderKind::descending:
      for (int64_t p = 0; p < D; ++p) to[D - 1 - p] = from[p];
      return;
    case OrderKind::rotated: {
      const int64_t first = args.order[0];
      for (int64_t p = first; p < D; ++p) to[p] = from[p - first];
      for (int64_t p = 0; p < first; ++p) to[p] = from[D - first + p];
      return;
    }
    case OrderKind::evens_first: return join_pairs(from, from + evens, D, to);
    case OrderKind::odds_first: return join_pairs(from + odds, from, D, to);
    case OrderKind::any:
      for (int64_t p = 0; p < D; ++p) to[args.order[p]] = from[p];
  }
}

// What a layer makes of its sums in one row: joins them with its context term and the values that it adds, and activates them.
// The sums lie where the values go, or where a gate finds them; a unitwise layer's are what it reads.
template <class T>
void join(const LayerColumns<T>& layer, T* row) {
  const T* sums = row + (layer.unitwise ? layer.input : layer.gate ? layer.sum : layer.value);
  with_activation(layer.activation, [&](auto code) {
    for (int64_t j = 0; j < layer.units; j += lanes<T>) {
      const int64_t n = layer.units - j;
      Vec<T> v = load_some(sums + j, n);
      if (layer.factor) v = fma(v, load_some(layer.factor + j, n), load_some(layer.bias + j, n));
      if (layer.term >= 0) {
        const Vec<T> term = load_some(row + layer.term + j, n);
        v = layer.gate ? v * term : v + term;
      }
      if (layer.residual >= 0) v = v + load_some(row + layer.residual + j, n);
      if (layer.pre >= 0) store_some(row + layer.pre + j, v, n);
      store_some(row + layer.value + j, activate<decltype(code)::value>(v), n);
    }
  });
}

template <class T>
FK_INLINE void add_some(T* to, Vec<T> v, int64_t n) {
  store_some(to, load_some(to, n) + v, n);
}

// Some elements of some columns: unit j of column c lies at (c + j) * stride, and there are n from `first` on. Either units of one row, or,
// with a stride of many rows, these rows of some units.
struct Elements {
  int64_t stride, first, n;
  int64_t at(int64_t column) const { return column * stride + first; }
};

// From the gradient by some of a layer's values that by its sums, in its place, and what goes on to the values that it adds and to its
// context term
template <class T>
void descend_to_sums(const LayerColumns<T>& layer, const T* values, T* deltas, Elements e) {
  if (layer.activation == Activation::identity && layer.residual < 0 && layer.term < 0) return;
  with_activation(layer.activation, [&](auto code) {
    T* delta = deltas + e.at(layer.value);
    const T* h = values + e.at(layer.pre >= 0 ? layer.pre : layer.value);
    for (int64_t i = 0; i < e.n; i += lanes<T>) {
      const int64_t some = e.n - i;
      Vec<T> d = load_some(delta + i, some) * derivative_at<decltype(code)::value>(load_some(h + i, some));
      if (layer.residual >= 0) add_some(deltas + e.at(layer.residual) + i, d, some);
      if (layer.term >= 0) {
        const Vec<T> term = load_some(values + e.at(layer.term) + i, some);
        const Vec<T> by_term = layer.gate ? d * load_some(values + e.at(layer.sum) + i, some) : d;
        const Vec<T> known = layer.term_pre >= 0 ? load_some(values + e.at(layer.term_pre) + i, some) : term;
        store_some(deltas + e.at(layer.term_delta) + i, by_term * derivative_at(layer.context_activation, known), some);
        if (layer.gate) d = d * term;
      }
      store_some(delta + i, d, some);
    }
  });
}

// to[i] += delta[i], times factor(i) where the layer has factors
template <class T, class F>
FK_INLINE void add_products(const LayerColumns<T>& layer, const T* delta, T* to, int64_t n, const F& factor) {
  for (int64_t i = 0; i < n; i += lanes<T>) {
    const Vec<T> d = load_some(delta + i, n - i);
    add_some(to + i, layer.factor ? d * factor(i) : d, n - i);
  }
}

// The way down through a layer, but for its products: by its sums, and unit by unit to what a unitwise layer reads
template <class T>
void descend(const LayerColumns<T>& layer, const T* values, T* deltas, Elements e) {
  descend_to_sums(layer, values, deltas, e);
  if (!layer.unitwise) return;
  const T* delta = deltas + e.at(layer.value);
  T* to = deltas + e.at(layer.input);
  if (e.stride == 1) return add_products(layer, delta, to, e.n, [&](int64_t i) { return load_some(layer.factor + e.first + i, e.n - i); });
  for (int64_t i = 0; i < e.n; i += e.stride)
    add_products(layer, delta + i, to + i, e.stride, [&](int64_t) { return broadcast<T>(layer.factor[(e.first + i) / e.stride]); });
}

template <class T>
void training_forward(const TrainingArgs<T>& args, int64_t r0, int64_t r1, T* scratch) {
  const int64_t D = args.features, passing = args.output_columns.passing;
  for (int64_t r = r0; r < r1; ++r) to_order(args, args.x + r * args.x_row, args.x_column, args.values + r * args.values_ld);
  for (int l = 0; l < args.n_layers; ++l) {
    if (args.contexts) masked_linear_forward(args.contexts[l], r0, r1, int64_t(0), args.contexts[l].outputs, scratch);
    masked_linear_forward(args.layers[l], r0, r1, int64_t(0), args.layers[l].outputs, scratch);
    if (!args.columns[l].assembled()) continue;
    for (int64_t r = r0; r < r1; ++r) join(args.columns[l], args.values + r * args.values_ld);
  }
  if (!args.y) return;  // the values alone were asked for
  const bool adds = args.only_adds();
  T *results = scratch, *logs = scratch + padded_features<T>(D);
  for (int64_t p = 0; p < passing; ++p) logs[p] = T(0);
  for (int64_t r = r0; r < r1; ++r) {
    const T* values = args.values + r * args.values_ld;
    for (int64_t p = passing; adds && p < D; p += lanes<T>)
      store(results + p, load_some(values + p, D - p) + load_some(values + args.made + args.output_columns.of(p), D - p));
    for (int64_t p = passing; !adds && p < D; p += lanes<T>) {
      const ShiftAndRaw<T> made = load_outputs(values + args.made + args.output_columns.of(p), args.output_columns, D - p);
      const ValueAndLog<Vec<T>> out = apply_form(args.form, args.scale, load_some(values + p, D - p), made.shift, made.raw);
      store(results + p, out.value);
      store(logs + p, out.log);
    }
    for (int64_t p = 0; p < passing; ++p) results[p] = values[p];
    T total = 0;
    for (int64_t chunk = 0; !adds && chunk < D; chunk += kLogChunk) {
      T sum = logs[chunk];
      for (int64_t p = chunk + 1; p < smaller(chunk + kLogChunk, D); ++p) sum += logs[p];
      total += sum;
    }
    from_order(args, results, args.y + r * D);
    args.logabsdet[r] = args.adds_log ? args.logabsdet[r] + total : total;
  }
}

// The gradient of g * y + c * log|dy/dx| by the bound of the scale map exp(bound * tanh(s / inner))
template <class T>
FK_INLINE Vec<T> gradient_by_bound(const TrainingArgs<T>& args, Vec<T> x, Vec<T> shift, Vec<T> raw, Vec<T> g, Vec<T> c) {
  const ExpTanhMap<Vec<T>> map(args.scale);
  const Vec<T> exponent = tanh(raw * map.inverse_inner);
  if (args.form == Form::divide) return -fma(g * map.reciprocal(raw), x - shift, c) * exponent;
  const Vec<T> by_sigma = args.form == Form::scale_shift ? x : args.form == Form::gate ? x - shift : x + shift;
  return fma(g * by_sigma, map.sigma(raw), c) * exponent;
}

constexpr int64_t kRowsAhead = 16;  // a row's values have left the caches since the forward pass: they are asked for so many rows before

// The deltas of rows [r0, r1), and dx. need_dx: whether anybody asks for the gradient by x
template <class T>
void training_backward(const TrainingArgs<T>& args, bool need_dx, int64_t r0, int64_t r1, T* scratch) {
  const int64_t D = args.features;
  const OutputColumns columns = args.output_columns;
  const bool adds = args.only_adds();
  T* by_bound = scratch;
  // all rows before any is used: vectors that are loaded where single elements have just been stored wait for all stores before them
  for (int64_t r = r0; r < r1; ++r) to_order(args, args.dy + r * args.dy_row, args.dy_column, args.deltas + r * args.deltas_ld);
  for (int64_t r = r0; r < r1; ++r) {
    const T* values = args.values + r * args.values_ld;
    for (int64_t i = 0; i < args.values_ld; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(ahead(values, kRowsAhead * args.values_ld + i), 0, 2);
    T *deltas = args.deltas + r * args.deltas_ld, *outputs = deltas + args.outputs;
    for (int64_t i = D; args.wired && i < args.outputs; ++i) deltas[i] = T(0);
    const Vec<T> c = broadcast<T>(args.dlogabsdet[r * args.dlogabsdet_step]);
    for (int64_t p = columns.passing; adds && p < D; ++p) outputs[columns.of(p)] = deltas[p];
    for (int64_t p = columns.passing; !adds && p < D; p += lanes<T>) {
      const int64_t left = D - p;
      const Vec<T> x = load_some(values + p, left), dy = load_some(deltas + p, left);
      const ShiftAndRaw<T> made = load_outputs(values + args.made + columns.of(p), columns, left);
      if (args.by_bound >= 0) store(by_bound + p, gradient_by_bound(args, x, made.shift, made.raw, dy, c));
      const FormGradient<Vec<T>> gradient = form_gradient(args.form, args.scale, x, made.shift, made.raw, dy, c);
      store_some(deltas + p, gradient.dvalue, left);
      store_outputs(outputs + columns.of(p), columns, gradient.dshift, gradient.draw, left);
    }
    if (args.by_bound < 0) continue;
    T total = 0;
    for (int64_t p = columns.passing; p < D; ++p) total += by_bound[p];
    deltas[args.by_bound] = total;
  }
  for (int l = 0; l < args.n_layers; ++l) {
    const LayerColumns<T>& own = args.columns[args.n_layers - 1 - l];
    for (int64_t r = r0; args.wired && r < r1; ++r)
      descend(own, args.values + r * args.values_ld, args.deltas + r * args.deltas_ld, {1, 0, own.units});
    if (args.contexts) masked_linear_dx(args.contexts[l], r0, r1, int64_t(0), args.contexts[l].inputs, scratch);
    if (need_dx || own.source > 0) masked_linear_dx(args.layers[l], r0, r1, int64_t(0), args.layers[l].inputs, scratch);
  }
  if (!need_dx) return;
  for (int64_t r = r0; r < r1; ++r) from_order(args, args.deltas + r * args.deltas_ld, args.dx + r * D);
}

template <class T>
size_t training_scratch_bytes(int64_t features) {
  const int64_t rows = 2 * padded_features<T>(features), panel = kChunk * kPanel<T>;
  return (rows > panel ? rows : panel) * sizeof(T);
}

// out[j] = sum over rows of dy[r][j], or of dy[r][j] * x[r][j] where there is an x, in chunks of kChunk rows; or added to out
template <class T>
void sum_rows(const T* dy, int64_t ld, const T* x, int64_t x_ld, int64_t rows, int64_t columns, bool accumulate, T* out) {
  for (int64_t j = 0; j < columns; j += lanes<T>) {
    const int64_t n = columns - j;
    Vec<T> total = accumulate ? load_some(out + j, n) : zero<T>();
    for (int64_t b = 0; b < rows; b += kChunk) {
      Vec<T> sum = zero<T>();
      const int64_t end = smaller(b + kChunk, rows);
      if (x)
        for (int64_t r = b; r < end; ++r) sum = fma(load_some(dy + r * ld + j, n), load_some(x + r * x_ld + j, n), sum);
      else
        for (int64_t r = b; r < end; ++r) sum = sum + load_some(dy + r * ld + j, n);
      total = total + sum;
    }
    store_some(out + j, total, n);
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
