// The training passes of a masked autoregressive map, a block of rows at a time. Included once per instruction set, after
// masked_linear_kernel.h.

namespace flowkernels {
namespace FK_TARGET {

constexpr int64_t kLogTerms = 16;  // log-derivatives are summed in chunks, as inputs are

// shift and raw scale of each feature lie side by side; the scratch holds [shift | raw | a | b], each `padded` long. Shift and raw scale of
// features that pass are 0 before each row.
template <class T>
struct FeatureRow {
  T *shift, *raw, *a, *b;
  FeatureRow(T* scratch, int64_t padded) : shift(scratch), raw(shift + padded), a(raw + padded), b(a + padded) {}
};

template <class T>
int64_t padded_features(int64_t features) {
  return (features + lanes<T> - 1) / lanes<T> * lanes<T>;
}

template <class T>
void split_outputs(const T* outputs, const OutputColumns& columns, int64_t features, FeatureRow<T>& row) {
  if (columns.each == 1) {
    for (int64_t p = columns.passing; p < features; ++p) row.shift[p] = outputs[columns.of(p)];
    return;
  }
  for (int64_t p = columns.passing; p < features; ++p) {
    row.shift[p] = outputs[columns.of(p)];
    row.raw[p] = outputs[columns.of(p) + 1];
  }
}

// to[k] = the feature generated k-th of a row whose features are `column` apart
template <class T>
FK_INLINE void to_order(const TrainingArgs<T>& args, const T* from, int64_t column, T* to) {
  const int64_t D = args.features;
  if (column == 1 && args.order_kind == OrderKind::ascending)
    for (int64_t p = 0; p < D; ++p) to[p] = from[p];
  else if (column == 1 && args.order_kind == OrderKind::descending)
    for (int64_t p = 0; p < D; ++p) to[p] = from[D - 1 - p];
  else
    for (int64_t p = 0; p < D; ++p) to[p] = from[(args.order ? args.order[p] : p) * column];
}

// and back, into a contiguous row
template <class T>
FK_INLINE void from_order(const TrainingArgs<T>& args, const T* from, T* to) {
  const int64_t D = args.features;
  if (args.order_kind == OrderKind::ascending)
    for (int64_t p = 0; p < D; ++p) to[p] = from[p];
  else if (args.order_kind == OrderKind::descending)
    for (int64_t p = 0; p < D; ++p) to[D - 1 - p] = from[p];
  else
    for (int64_t p = 0; p < D; ++p) to[args.order[p]] = from[p];
}

template <class T>
void training_forward(const TrainingArgs<T>& args, int64_t r0, int64_t r1, T* scratch) {
  const int64_t D = args.features, padded = padded_features<T>(D), passing = args.output_columns.passing;
  for (int64_t r = r0; r < r1; ++r) to_order(args, args.x + r * args.x_row, args.x_column, args.values + r * args.values_ld);
  for (int l = 0; l < args.n_layers; ++l) {
    if (args.contexts) masked_linear_forward(args.contexts[l], r0, r1, int64_t(0), args.contexts[l].outputs, scratch);
    masked_linear_forward(args.layers[l], r0, r1, int64_t(0), args.layers[l].outputs, scratch);
  }
  if (!args.y) return;  // the values alone were asked for
  FeatureRow<T> row(scratch, padded);
  for (int64_t i = 0; i < 4 * padded; ++i) scratch[i] = T(0);
  for (int64_t r = r0; r < r1; ++r) {
    const T* values = args.values + r * args.values_ld;
    split_outputs(values + args.outputs, args.output_columns, D, row);
    for (int64_t p = passing / lanes<T> * lanes<T>; p < D; p += lanes<T>) {
      const ValueAndLog<Vec<T>> out = apply_form(args.form, args.scale, load_some(values + p, D - p), load(row.shift + p), load(row.raw + p));
      store(row.a + p, out.value);
      store(row.b + p, out.log);
    }
    for (int64_t p = 0; p < passing; ++p) {
      row.a[p] = values[p];
      row.b[p] = T(0);
    }
    T* y = args.y + r * D;
    T total = 0;
    for (int64_t chunk = 0; chunk < D; chunk += kLogTerms) {
      T sum = row.b[chunk];
      for (int64_t p = chunk + 1; p < smaller(chunk + kLogTerms, D); ++p) sum += row.b[p];
      total += sum;
    }
    from_order(args, row.a, y);
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

// The deltas of rows [r0, r1), and dx. need_dx: whether anybody asks for the gradient by x
template <class T>
void training_backward(const TrainingArgs<T>& args, bool need_dx, int64_t r0, int64_t r1, T* scratch) {
  const int64_t D = args.features, padded = padded_features<T>(D);
  const OutputColumns columns = args.output_columns;
  FeatureRow<T> row(scratch, padded);
  for (int64_t i = 0; i < 4 * padded; ++i) scratch[i] = T(0);
  for (int64_t r = r0; r < r1; ++r) {
    const T* values = args.values + r * args.values_ld;
    T *deltas = args.deltas + r * args.deltas_ld, *outputs = deltas + args.outputs;
    split_outputs(values + args.outputs, columns, D, row);
    to_order(args, args.dy + r * args.dy_row, args.dy_column, row.a);
    const Vec<T> c = broadcast<T>(args.dlogabsdet[r * args.dlogabsdet_step]);
    const int64_t begin = columns.passing / lanes<T> * lanes<T>;
    if (args.by_bound >= 0) {
      T total = 0;
      for (int64_t p = begin; p < D; p += lanes<T>)
        store(row.b + p, gradient_by_bound(args, load_some(values + p, D - p), load(row.shift + p), load(row.raw + p), load(row.a + p), c));
      for (int64_t p = columns.passing; p < D; ++p) total += row.b[p];
      deltas[args.by_bound] = total;
    }
    for (int64_t p = begin; p < D; p += lanes<T>) {
      const FormGradient<Vec<T>> gradient =
          form_gradient(args.form, args.scale, load_some(values + p, D - p), load(row.shift + p), load(row.raw + p), load(row.a + p), c);
      store_some(deltas + p, gradient.dvalue, D - p);
      store(row.shift + p, gradient.dshift);
      store(row.raw + p, gradient.draw);
    }
    for (int64_t p = 0; p < columns.passing; ++p) {
      deltas[p] = row.a[p];
      row.shift[p] = row.raw[p] = T(0);
    }
    if (columns.each == 1) {
      for (int64_t p = columns.passing; p < D; ++p) outputs[columns.of(p)] = row.shift[p], row.raw[p] = T(0);
      continue;
    }
    for (int64_t p = columns.passing; p < D; ++p) {
      outputs[columns.of(p)] = row.shift[p];
      outputs[columns.of(p) + 1] = row.raw[p];
    }
  }
  for (int l = 0; l < args.n_layers; ++l) {
    if (args.contexts) masked_linear_dx(args.contexts[l], r0, r1, int64_t(0), args.contexts[l].inputs, scratch);
    if (need_dx || l + 1 < args.n_layers) masked_linear_dx(args.layers[l], r0, r1, int64_t(0), args.layers[l].inputs, scratch);
  }
  if (!need_dx) return;
  for (int64_t r = r0; r < r1; ++r) from_order(args, args.deltas + r * args.deltas_ld, args.dx + r * D);
}

template <class T>
size_t training_scratch_bytes(int64_t features) {
  const int64_t row = 4 * padded_features<T>(features), panel = kChunk * kPanel<T>;
  return (row > panel ? row : panel) * sizeof(T);
}

// out[j] = sum over rows of dy[r][j], in chunks of kChunk rows; or added to out
template <class T>
void sum_rows(const T* dy, int64_t ld, int64_t rows, int64_t columns, bool accumulate, T* out) {
  for (int64_t j = 0; j < columns; j += lanes<T>) {
    const int64_t n = columns - j;
    Vec<T> total = accumulate ? load_some(out + j, n) : zero<T>();
    for (int64_t b = 0; b < rows; b += kChunk) {
      Vec<T> sum = zero<T>();
      for (int64_t r = b; r < smaller(b + kChunk, rows); ++r) sum = sum + load_some(dy + r * ld + j, n);
      total = total + sum;
    }
    store_some(out + j, total, n);
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
