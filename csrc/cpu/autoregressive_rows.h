// The state of the sequential loop where lanes are batch rows: [unit][row], each weight broadcast to several vectors of rows.
// Included once per instruction set, by autoregressive_kernel.h.

namespace flowkernels {
namespace FK_TARGET {

template <class T>
struct RowLanes {
  static constexpr int64_t kFewSteps = 8;  // so many are run one after the other
  static constexpr bool kPushesAhead = false;

  const AutoregressiveArgs<T>& args;
  int64_t first_row, n_rows, rows;  // rows: padded to whole vectors
  T* values;                        // [layer][unit][row]: pending sums, then the values themselves; layer 0 is the features
  T* totals;
  const int64_t* offsets;           // first unit of each layer in values
  T *gates, *context, *log, *log_total, *starts;
  bool shares_context;  // all rows have the same

  RowLanes(const AutoregressiveArgs<T>& args, const int64_t* offsets, int64_t units, int64_t first_row, int64_t n_rows, int64_t rows,
           T* scratch, bool one_context)
      : args(args), first_row(first_row), n_rows(n_rows), rows(rows), values(scratch), totals(values + units * rows), offsets(offsets) {
    gates = totals + units * rows;
    context = gates + (args.gated ? units * rows : 0);
    log = context + args.context_features * rows;
    log_total = log + rows;
    starts = log_total + rows;
    shares_context = args.context_features > 0 && one_context;
  }

  static int64_t scratch(const AutoregressiveArgs<T>& args, int64_t units, int64_t rows) {
    return rows * ((args.gated ? 3 : 2) * units + args.context_features + 2) + (args.context_features ? units : 0);
  }

  // what a layer's totals begin with; null where the context's sums stand in them
  const T* start(int l) const {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    if (!layer.context_weight || layer.gate) return layer.bias;
    return shares_context ? starts + offsets[l] : nullptr;
  }
  T* layer_values(int l) const { return values + offsets[l] * rows; }
  T* layer_gates(int l) const { return gates + offsets[l] * rows; }
  T* layer_totals(int l) const { return totals + offsets[l] * rows; }

  void read(const Strided<T>& from, int64_t columns, const int64_t* position, T* to) const {
    const T* row = from.data + first_row * from.row;
    if (from.column == 1) return read_columns(row, from.row, n_rows, columns, position, to, rows);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        to[(position ? position[c] : c) * rows + r] = r < n_rows ? row[r * from.row + c * from.column] : T(0);
  }

  // handed: what a map before left in columns, or null for x
  void begin(const T* handed) {
    if (handed)
      copy_columns(handed, [](int64_t c) { return c; }, values, [&](int64_t c) { return position(c); });
    else
      read(args.x, args.features, args.position, values);
    if (args.affine) apply_affine();
    if (shares_context)
      begin_shared_context();
    else if (args.context_features)
      begin_context();
    for (int64_t r = 0; r < rows; r += lanes<T>) {
      store(log + r, zero<T>());
      store(log_total + r, zero<T>());
    }
  }

  void begin_context() {
    read(args.context, args.context_features, nullptr, context);
    for (int l = 1; l <= args.n_layers; ++l) {
      const MaskedLayer<T>& layer = args.layers[l - 1];
      if (layer.unitwise || !layer.context_weight) continue;
      add_context(l, rows);
      if (layer.own_context_term()) finish_context(l, layer_totals(l));
    }
  }

  // For rows of one context a network has but other biases: what is made of it is made for one vector of rows.
  void begin_shared_context() {
    const T* row = args.context.data + first_row * args.context.row;
    for (int64_t c = 0; c < args.context_features; ++c) store(context + c * lanes<T>, broadcast<T>(row[c * args.context.column]));
    alignas(64) T room[lanes<T>];
    for (int l = 1; l <= args.n_layers; ++l) {
      const MaskedLayer<T>& layer = args.layers[l - 1];
      if (layer.unitwise || !layer.context_weight) continue;
      add_context(l, lanes<T>);
      for (int64_t j = 0; j < layer.outputs; ++j) {
        Vec<T> v = load(layer_totals(l) + j * lanes<T>);
        if (layer.own_context_term()) v = activate(static_cast<Activation>(layer.context_activation), v);
        if (layer.gate) {
          for (int64_t r = 0; r < rows; r += lanes<T>) store(layer_gates(l) + j * rows + r, v);
          continue;
        }
        store(room, layer.own_context_term() ? broadcast<T>(layer.bias[j]) + v : v);
        starts[offsets[l] + j] = room[0];
      }
    }
  }

  // a layer's context sums in its totals, for so many rows
  void add_context(int l, int64_t rows) const {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    const Tile<T> tile{context, layer_values(l), layer_totals(l), rows, nullptr, false};
    const T* from = layer.own_context_term() ? layer.context_bias : layer.bias;
    for (int64_t j = 0; j < layer.outputs; ++j)
      for (int64_t r = 0; r < rows; r += lanes<T>) store(tile.total + j * rows + r, broadcast<T>(from ? from[j] : T(0)));
    push<T>(layer.context_weight, layer.context_ld, nullptr, tile, 0, args.context_features, 0, layer.outputs);
    flush_chunk(tile, 0, layer.outputs, false);
  }

  void apply_affine() const {
    for (int64_t p = 0; p < args.features; ++p) {
      const T* a = args.affine + (args.order ? args.order[p] : p);
      const Vec<T> before = broadcast<T>(a[0]), factor = broadcast<T>(a[args.features]), after = broadcast<T>(a[2 * args.features]);
      T* x = values + p * rows;
      for (int64_t r = 0; r < rows; r += lanes<T>) store(x + r, (load(x + r) + before) * factor + after);
    }
  }

  // total holds the context's sums; then, the gates are known, or total holds what the sums of the layer begin with
  void finish_context(int l, T* total) const {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    for (int64_t j = 0; j < layer.outputs; ++j)
      for (int64_t r = 0; r < rows; r += lanes<T>) {
        const int64_t at = j * rows + r;
        const Vec<T> term = activate(static_cast<Activation>(layer.context_activation), load(total + at));
        if (layer.gate)
          store(layer_gates(l) + at, term);
        else
          store(total + at, broadcast<T>(layer.bias[j]) + term);
      }
  }

  void push_layer(int l, int64_t k0, int64_t k1, int64_t j0, int64_t j1, bool relu = false) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    if (layer.unitwise) return;
    const Tile<T> tile{layer_values(layer.source), layer_values(l), layer_totals(l), rows, start(l), relu};
    push<T>(layer.weight, layer.ld, layer.visible, tile, k0, k1, j0, j1);
  }

  // the last inputs of hidden units and what becomes of their sums, where that can be one: else false, and nothing is done
  bool push_and_finish(int l, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    if (layer.joins() || static_cast<Activation>(layer.activation) != Activation::relu || !start(l)) return false;
    if (k0 >= k1 || k1 > kChunk || layer.visible[j0] != k1 || layer.visible[j1 - 1] != k1) return false;
    push_layer(l, k0, k1, j0, j1, true);
    return true;
  }

  // What a unit's sums are made of: a row of each addend, or one vector for all rows (step 0)
  struct Addends {
    const T *begun, *acc;
    int64_t begun_step, acc_step;
    FK_INLINE Vec<T> at(int64_t r) const { return load(begun + r * begun_step) + load(acc + r * acc_step); }
  };

  // room: for a vector
  FK_INLINE Addends addends(int l, int64_t j, T* room) const {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    const T* from = start(l);
    const bool one = from && layer.visible[j] <= kChunk, seen = layer.visible[j] > 0;
    if (one) store(room, broadcast<T>(from[j]));
    return {one ? room : layer_totals(l) + j * rows, seen ? layer_values(l) + j * rows : kZeros<T>, one ? 0 : 1, seen ? 1 : 0};
  }

  void finish_hidden(int l, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    if (layer.joins()) return finish_joined(l, j0, j1);
    alignas(64) T room[lanes<T>];
    const int64_t n = rows;  // where no store could change it
    with_activation(static_cast<Activation>(layer.activation), [&](auto code) {
      for (int64_t j = j0; j < j1; ++j) {
        const Addends sum = addends(l, j, room);
        T* h = layer_values(l) + j * rows;
        for (int64_t r = 0; r < n; r += lanes<T>) store(h + r, activate<decltype(code)::value>(sum.at(r)));
      }
    });
  }

  // the same where more than a sum meets the activation
  FK_CALL void finish_joined(int l, int64_t j0, int64_t j1) {
    const MaskedLayer<T>& layer = args.layers[l - 1];
    T* h = layer_values(l);
    const T *from = layer_values(layer.source), *gate = layer.gate ? layer_gates(l) : nullptr;
    const T* residual = layer.residual < 0 ? nullptr : layer_values(layer.residual);
    alignas(64) T room[lanes<T>];
    for (int64_t j = j0; j < j1; ++j) {
      const Addends sum = addends(l, j, room);
      for (int64_t r = 0; r < rows; r += lanes<T>) {
        const int64_t at = j * rows + r;
        Vec<T> v;
        if (!layer.unitwise)
          v = sum.at(r);
        else
          v = layer.weight ? fma(broadcast<T>(layer.weight[j]), load(from + at), broadcast<T>(layer.bias[j])) : load(from + at);
        if (gate) v = v * load(gate + at);
        if (residual) v = v + load(residual + at);
        store(h + at, v);
      }
    }
    with_activation(static_cast<Activation>(layer.activation), [&](auto code) {
      for (int64_t i = j0 * rows; i < j1 * rows; i += lanes<T>) store(h + i, activate<decltype(code)::value>(load(h + i)));
    });
  }

  void finish_features(int64_t p0, int64_t p1) {
    const int last = args.n_layers;
    const bool scaled = args.output_columns.each == 2;
    alignas(64) T room[2][lanes<T>];
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t column = args.output_columns.of(p);
      const Addends shift = addends(last, column, room[0]), raw = addends(last, column + (scaled ? 1 : 0), room[1]);
      transform_rows(
          args, values + p * rows, rows, [&](int64_t r) { return shift.at(r); }, [&](int64_t r) { return scaled ? raw.at(r) : zero<T>(); },
          [&](int64_t r, Vec<T> one) { add_log(log + r, log_total + r, one, p); });
    }
  }

  int64_t position(int64_t feature) const { return args.position ? args.position[feature] : feature; }

  template <class From, class To>
  void copy_columns(const T* from, const From& from_column, T* to, const To& to_column) const {
    for (int64_t c = 0; c < args.features; ++c)
      for (int64_t r = 0; r < rows; r += lanes<T>) store(to + to_column(c) * rows + r, load(from + from_column(c) * rows + r));
  }

  // y in its place; or in columns, where the totals of features would be, for a map after, whose values of features do not reach so far
  const T* end(bool hands_on) const {
    if (hands_on)
      copy_columns(values, [&](int64_t c) { return position(c); }, totals, [](int64_t c) { return c; });
    else
      write_columns(values, rows, n_rows, args.features, args.position, args.y + first_row * args.features, args.features);
    T* to = args.logabsdet + first_row;
    for (int64_t r = 0; r < n_rows; ++r) to[r] = args.adds_log ? to[r] + (log_total[r] + log[r]) : log_total[r] + log[r];
    return hands_on ? totals : nullptr;
  }
};

}  // namespace FK_TARGET
}  // namespace flowkernels
