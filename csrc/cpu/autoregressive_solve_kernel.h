// The gradient of the sequential inverse: the loop in reverse, for one tile of rows. Included once per instruction set, after
// autoregressive_training_kernel.h.
//
// For x = f^-1(z) and cotangents g of x and c of log|dx/dz|, feature by feature, i = D..1:
//     dz_i = dx_i/dz_i * (g_i + what the deltas of later features push back onto x_i)
// and the deltas of feature i's shift and raw scale, then those of the hidden units that only features from i on see, and so on down
// to x. The same deltas give the gradients of the parameters. As in the forward loop, a recursion turns nearly all of it into dense
// blocks; here rows of a weight are read where the forward loop reads columns.

namespace flowkernels {
namespace FK_TARGET {

constexpr int64_t kFewSteps = 8;                 // so many are run one after the other
constexpr int64_t kSolveRows = 4 * kRowVectors;  // vectors of rows in a tile

// below[k] += sum over j in [j0, j1) with j >= first[k] of weight[k][j] * above[j], for U rows of the weight and all rows of the tile
template <int U, class T>
void push_back_rows(const T* weight, int64_t ld, const T* above, T* below, int64_t rows, int64_t K) {
  int64_t r = 0;
  const auto some = [&](auto vectors) FK_BODY {
    constexpr int V = decltype(vectors)::value;
    // four vectors are better two and two than three and one
    for (; r + V * lanes<T> <= rows && !(V == kRowVectors && rows - r == (V + 1) * lanes<T>); r += V * lanes<T>) {
      Vec<T> sum[U][V];
      for (int u = 0; u < U; ++u)
        for (int v = 0; v < V; ++v) sum[u][v] = zero<T>();
      multiply<U, V>(weight, ld, 1, above + r, rows, K, sum);
      for (int u = 0; u < U; ++u)
        for (int v = 0; v < V; ++v) {
          T* to = below + u * rows + r + v * lanes<T>;
          store(to, load(to) + sum[u][v]);
        }
    }
  };
  if constexpr (U <= 2) some(Count<2 * kRowVectors>{});  // a few units make up for it with more vectors
  some(Count<kRowVectors>{});
  some(Count<2>{});
  some(Count<1>{});
}

template <class T>
void push_back(const T* weight, int64_t ld, const int32_t* first, const T* above, T* below, int64_t rows, int64_t k0, int64_t k1, int64_t j0,
               int64_t j1) {
  for (; j0 < j1; j0 += kBlock) {
    const int64_t end = smaller(j0 + kBlock, j1);
    const auto units = [&](int64_t k, auto count) FK_BODY {
      constexpr int n = decltype(count)::value;
      const int64_t shared = first[k + n - 1] > j0 ? first[k + n - 1] : j0;  // from here on, all n see
      for (int u = 0; u + 1 < n; ++u) {
        const int64_t begin = first[k + u] > j0 ? first[k + u] : j0;
        if (begin < shared) push_back_rows<1>(weight + (k + u) * ld + begin, ld, above + begin * rows, below + (k + u) * rows, rows, shared - begin);
      }
      push_back_rows<n>(weight + k * ld + shared, ld, above + shared * rows, below + k * rows, rows, end - shared);
      return n;
    };
    for (int64_t k = k0; k < k1 && first[k] < end;) {
      const auto fit = [&](int n) { return k + n <= k1 && first[k + n - 1] < end; };
      if (fit(kUnits))
        k += units(k, Count<kUnits>{});
      else if (fit(2))
        k += units(k, Count<2>{});
      else
        k += units(k, Count<1>{});
    }
  }
}

// The deltas of one tile; values and deltas as in TrainingArgs, here [column][row]
template <class T>
struct Solve {
  const TrainingArgs<T>& args;
  const MaskedLinearArgs<T>* layers;  // dx products, first layer first
  const int64_t* ends;                // the schedule of the inverse
  int64_t n_layers, rows;
  const T *values, *c;
  T* deltas;

  int64_t end(int64_t s, int64_t l) const { return s < 0 ? 0 : ends[s * (n_layers + 1) + l]; }
  // features known before step s
  int64_t features_before(int64_t s) const { return s == 0 ? 0 : end(s - 1, n_layers) / 2; }

  const LayerColumns<T>& columns(int64_t l) const { return args.columns[l - 1]; }

  // deltas of units [j0, j1) of layer l to units [k0, k1) of what it reads, which of the features may be the first alone
  void push(int64_t l, int64_t k0, int64_t k1, int64_t j0, int64_t j1) const {
    const MaskedLinearArgs<T>& layer = layers[l - 1];
    k1 = smaller(k1, layer.inputs);
    if (k0 >= k1 || j0 >= j1) return;
    push_back(layer.weight, layer.weight_ld, layer.first, deltas + columns(l).value * rows, deltas + columns(l).input * rows, rows, k0, k1, j0, j1);
  }

  // the features of step s: g + what was pushed, times dx/dz, and from it the deltas of shift and raw scale
  void solve_features(int64_t p0, int64_t p1) const {
    for (int64_t p = p0; p < p1; ++p)
      for (int64_t r = 0; r < rows; r += lanes<T>) {
        T *at = deltas + p * rows + r, *outputs = deltas + (args.outputs + 2 * p) * rows + r;
        const T* made = values + (args.made + 2 * p) * rows + r;
        const Vec<T> x = load(values + p * rows + r), shift = load(made), raw = load(made + rows);
        const FormGradient<Vec<T>> gradient = inverse_gradient(args.form, args.scale, x, shift, raw, load(at), load(c + r));
        store(at, gradient.dvalue);  // dz
        store(outputs, gradient.dshift);
        store(outputs + rows, gradient.draw);
      }
  }

  // What step s waits for comes from all steps up to `last` at once, so that its sums are loaded and stored once for several steps.
  void run_step(int64_t s, int64_t last) const {
    for (int64_t l = n_layers; l > 0; --l)
      if (!columns(l).unitwise && columns(l).source == 0) push(l, features_before(s), end(s, n_layers) / 2, end(s, l), end(last, l));
    solve_features(features_before(s), end(s, n_layers) / 2);
    for (int64_t l = n_layers; l > 0; --l) {
      const LayerColumns<T>& own = columns(l);
      const int64_t j0 = end(s - 1, l), j1 = end(s, l);
      descend(own, values, deltas, {rows, j0 * rows, (j1 - j0) * rows});
      if (!own.unitwise && own.source > 0) push(l, end(s - 1, own.source), end(s, own.source), j0, end(last, l));
    }
  }

  void run(int64_t a, int64_t b) const {
    if (b - a <= kFewSteps) {
      for (int64_t s = b - 1; s >= a; --s) run_step(s, b - 1);
      return;
    }
    const int64_t middle = a + (b - a) / 2;
    run(middle, b);
    for (int64_t l = n_layers; l > 0; --l) {
      const int source = columns(l).source;
      if (columns(l).unitwise) continue;
      const int64_t k0 = source > 0 ? end(a - 1, source) : features_before(a), k1 = source > 0 ? end(middle - 1, source) : features_before(middle);
      push(l, k0, k1, end(middle - 1, l), end(b - 1, l));
    }
    run(a, middle);
  }
};

template <class T>
size_t solve_scratch_bytes(const TrainingArgs<T>& args, int64_t rows) {
  return (args.values_ld + args.deltas_ld + 1) * whole_vectors<T>(rows) * sizeof(T);
}

template <class T>
int64_t solve_rows() {
  return kSolveRows * lanes<T>;
}

// Rows [r0, r1), no more than a tile: `values` is full, deltas and dx (here dz) are written
template <class T>
void solve_tile(const TrainingArgs<T>& args, const MaskedLinearArgs<T>* layers, const int64_t* ends, int64_t n_steps, int64_t r0,
                int64_t r1, T* scratch) {
  const int64_t n = r1 - r0, rows = whole_vectors<T>(n), D = args.features;
  T *values = scratch, *deltas = values + args.values_ld * rows, *c = deltas + args.deltas_ld * rows;
  read_columns(args.values + r0 * args.values_ld, args.values_ld, n, args.values_ld, nullptr, values, rows);
  fill(deltas, args.deltas_ld * rows, T(0));
  for (int64_t r = 0; r < rows; ++r) {
    c[r] = r < n ? args.dlogabsdet[(r0 + r) * args.dlogabsdet_step] : T(0);
    for (int64_t p = 0; p < D; ++p)
      deltas[p * rows + r] = r < n ? args.dy[(r0 + r) * args.dy_row + (args.order ? args.order[p] : p) * args.dy_column] : T(0);
  }
  const Solve<T> solve{args, layers, ends, args.n_layers, rows, values, c, deltas};
  if (n_steps) solve.run(0, n_steps);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t p = 0; p < D; ++p) args.dx[(r0 + r) * D + (args.order ? args.order[p] : p)] = deltas[p * rows + r];
  write_columns(deltas + D * rows, rows, n, args.deltas_ld - D, nullptr, args.deltas + r0 * args.deltas_ld + D, args.deltas_ld);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
