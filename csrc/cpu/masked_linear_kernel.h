// The three products of a masked linear map. Included once per instruction set (for_each_target.h), after staircase_kernel.h.
//
// All three are its multiply_add; they differ in what is broadcast and what lies in the lanes:
//   forward  y[b][j]  = bias[j] + sum over k < visible[j] of x[b][k] * weight[k][j]    broadcast x,  lanes j
//   dx       dx[b][k] = sum over j >= first[k] of dy[b][j] * weight[k][j]              broadcast dy, lanes k
//   dweight  dweight[k][j] = sum over b of x[b][k] * dy[b][j], k < visible[j]          broadcast x,  lanes j
// The operand in the lanes is packed into panels of three vectors, because rows of a power of two apart would share a few sets of
// the cache. Sums have the order of staircase_kernel.h: chains of kChunk terms at absolute positions, added up in ascending order.
// Each vector of a panel has only the terms that any of its outputs has; for the other outputs the panel holds zeros. Times an
// infinity those would be NaN, so a tile in which NaN turns up is computed again term by term.

namespace flowkernels {
namespace FK_TARGET {

template <class T>
constexpr int64_t kPanel = kRowVectors * lanes<T>;

template <class T>
struct Panel {
  T* data;          // [k1 - k0][kPanel]
  int64_t k0, k1;   // terms of the sum
  int64_t n;        // outputs, at most kPanel
  const int32_t* limits;  // [n], ascending: output i has the terms below (from on) limits[i]
};

// n <= kPanel elements of a row, zeros behind them
template <class T>
FK_INLINE void copy_row(const T* from, int64_t n, T* to) {
  for (int v = 0; v < kRowVectors; ++v) {
    const int64_t left = n - v * lanes<T>;
    store(to + v * lanes<T>, left >= lanes<T> ? load(from + v * lanes<T>) : left > 0 ? load_partial(from + v * lanes<T>, left) : zero<T>());
  }
}

// outputs are columns of the weight, which see the terms before their limit
template <class T>
void pack(const T* weight, int64_t ld, const Panel<T>& p) {
  const int64_t everyone = p.n == kPanel<T> ? smaller(p.k1, p.limits[0]) : p.k0;
  int64_t k = p.k0;
  for (; k < everyone; ++k) copy_row(weight + k * ld, kPanel<T>, p.data + (k - p.k0) * kPanel<T>);
  for (; k < p.k1; ++k) {
    T* to = p.data + (k - p.k0) * kPanel<T>;
    copy_row(weight + k * ld, p.n, to);
    for (int64_t i = 0; i < p.n && p.limits[i] <= k; ++i) to[i] = 0;
  }
}

// outputs are rows of the weight, which see the terms from their limit on
template <class T>
void pack_transposed(const T* weight, int64_t ld, const Panel<T>& p) {
  for (int64_t i = 0; i < kPanel<T>; i += lanes<T>) {
    for (int64_t k = p.k0; k < p.k1;) {
      T* to = p.data + (k - p.k0) * kPanel<T> + i;
      if (i + lanes<T> <= p.n && k + lanes<T> <= p.k1 && p.limits[i + lanes<T> - 1] <= k) {
        Vec<T> block[lanes<T>];
        for (int l = 0; l < lanes<T>; ++l) block[l] = load(weight + (i + l) * ld + k);
        transpose(block);
        for (int l = 0; l < lanes<T>; ++l) store(to + l * kPanel<T>, block[l]);
        k += lanes<T>;
      } else {
        for (int l = 0; l < lanes<T>; ++l) to[l] = i + l < p.n && k >= p.limits[i + l] ? weight[(i + l) * ld + k] : T(0);
        ++k;
      }
    }
  }
}

// What a tile does with its sums: the common cases without a call for each vector
enum class Store { plain, relu, relu_derivative, any };

template <class T>
Store store_of(const Finish<T>& finish, bool last) {
  if (!last || (finish.activation == Activation::identity && !finish.pre)) return Store::plain;
  if (finish.activation == Activation::relu && !finish.pre) return finish.values ? Store::relu_derivative : Store::relu;
  return Store::any;
}

// n columns from j on of row r: sum is this chunk's, and may be the first
template <Store STORE, class T>
FK_INLINE void store_sum(const MaskedLinearArgs<T>& args, Vec<T> sum, int64_t r, int64_t j, int64_t n, bool first) {
  const Finish<T>& finish = args.finish;
  T* to = args.out + r * args.out_ld + j;
  if (!first || finish.accumulate)
    sum = load_some(to, n) + sum;
  else if (finish.bias)
    sum = load_some(finish.bias + j, n) + sum;
  if constexpr (STORE == Store::relu) sum = activate<Activation::relu>(sum);
  if constexpr (STORE == Store::relu_derivative)
    sum = sum * derivative_at<Activation::relu>(load_some(finish.values + r * finish.values_ld + j, n));
  if constexpr (STORE == Store::any) {
    if (finish.pre) store_some(finish.pre + r * finish.pre_ld + j, sum, n);
    sum = finish.values ? sum * derivative_at(finish.activation, load_some(finish.values + r * finish.values_ld + j, n))
                        : activate(finish.activation, sum);
  }
  store_some(to, sum, n);
}

template <int U, Store STORE, class T>
FK_INLINE void store_tile(const MaskedLinearArgs<T>& args, const Vec<T> (&sum)[U][kRowVectors], int64_t r, int64_t j, int64_t n, bool first) {
  if (n == kPanel<T>) {
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < kRowVectors; ++v) store_sum<STORE>(args, sum[u][v], r + u, j + v * lanes<T>, lanes<T>, first);
  } else {
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < kRowVectors; ++v)
        if (v * lanes<T> < n) store_sum<STORE>(args, sum[u][v], r + u, j + v * lanes<T>, n - v * lanes<T>, first);
  }
}

// The sums of a tile term by term, seeing nothing outside the staircase
template <int U, bool kFrom, class T>
void careful_sums(const T* x, int64_t ld, const Panel<T>& p, Vec<T> (&sum)[U][kRowVectors]) {
  for (int u = 0; u < U; ++u)
    for (int64_t i = 0; i < p.n; ++i) {
      T one = 0;
      for (int64_t k = p.k0; k < p.k1; ++k)
        if ((k >= p.limits[i]) == kFrom) one = fma(x[u * ld + k], p.data[(k - p.k0) * kPanel<T> + i], one);
      sum[u][i / lanes<T>][i % lanes<T>] = one;
    }
}

// One chunk of the sums of U rows. kFrom: see limits above
template <int U, bool kFrom, class T>
FK_INLINE void panel_sums(const T* x, int64_t ld, const Panel<T>& p, Vec<T> (&sum)[U][kRowVectors]) {
  static_assert(kRowVectors == 3);
  constexpr int64_t L = lanes<T>;
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < kRowVectors; ++v) sum[u][v] = zero<T>();
  const auto some = [&](auto from, auto to, int64_t k0, int64_t k1) {
    if (k0 < k1) multiply<U, to.value, from.value>(x + k0, ld, 1, p.data + (k0 - p.k0) * kPanel<T>, kPanel<T>, k1 - k0, sum);
  };
  const auto within = [&](int64_t k) { return k < p.k0 ? p.k0 : smaller(k, p.k1); };
  const Count<0> none;
  const Count<1> one;
  const Count<2> two;
  const Count<3> three;
  if (kFrom) {  // vector by vector, the sums begin
    const int64_t second = p.n > L ? within(p.limits[L]) : p.k1, third = p.n > 2 * L ? within(p.limits[2 * L]) : p.k1;
    some(none, one, p.k0, second);
    some(none, two, second, third);
    some(none, three, third, p.k1);
  } else if (p.n > 2 * L) {  // vector by vector, they end
    const int64_t first = within(p.limits[L - 1]), second = within(p.limits[2 * L - 1]);
    some(none, three, p.k0, first);
    some(one, three, first, second);
    some(two, three, second, p.k1);
  } else if (p.n > L) {
    const int64_t first = within(p.limits[L - 1]);
    some(none, two, p.k0, first);
    some(one, two, first, p.k1);
  } else {
    some(none, one, p.k0, p.k1);
  }
}

// The same of row r and those after it, columns from j on, stored. x: row r
template <int U, bool kFrom, class T>
FK_INLINE void panel_tile(const MaskedLinearArgs<T>& args, const T* x, int64_t ld, const Panel<T>& p, int64_t r, int64_t j, bool first,
                          Store store) {
  Vec<T> sum[U][kRowVectors];
  panel_sums<U, kFrom>(x, ld, p, sum);
  IVec<T> bad{};
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < kRowVectors; ++v) bad |= sum[u][v] != sum[u][v];
  if (__builtin_expect(any(bad), 0)) careful_sums<U, kFrom>(x, ld, p, sum);
  switch (store) {
    case Store::plain: return store_tile<U, Store::plain>(args, sum, r, j, p.n, first);
    case Store::relu: return store_tile<U, Store::relu>(args, sum, r, j, p.n, first);
    case Store::relu_derivative: return store_tile<U, Store::relu_derivative>(args, sum, r, j, p.n, first);
    default: return store_tile<U, Store::any>(args, sum, r, j, p.n, first);
  }
}

template <bool kFrom, class T>
void panel_rows(const MaskedLinearArgs<T>& args, const T* x, int64_t ld, const Panel<T>& p, int64_t r0, int64_t r1, int64_t j, bool first,
                bool last) {
  const Store store = store_of(args.finish, last);
  int64_t r = r0;
  for (; r + kUnits <= r1; r += kUnits) panel_tile<kUnits, kFrom>(args, x + r * ld, ld, p, r, j, first, store);
  for (; r < r1; ++r) panel_tile<1, kFrom>(args, x + r * ld, ld, p, r, j, first, store);
}

// Rows [r0, r1) of outputs [j0, j1); j0 and j1 are whole panels but for the end
template <class T>
void masked_linear_forward(const MaskedLinearArgs<T>& args, int64_t r0, int64_t r1, int64_t j0, int64_t j1, T* scratch) {
  for (int64_t k0 = 0; k0 == 0 || k0 < args.inputs; k0 += kChunk) {
    for (int64_t j = j0; j < j1; j += kPanel<T>) {
      const int64_t n = smaller(kPanel<T>, j1 - j), end = args.visible[j + n - 1], k1 = smaller(k0 + kChunk, end);
      if (k0 > 0 && k1 <= k0) continue;
      const Panel<T> panel{scratch, k0, k1, n, args.visible + j};
      pack(args.weight + j, args.weight_ld, panel);
      panel_rows<false>(args, args.x, args.x_ld, panel, r0, r1, j, k0 == 0, k1 == end);
    }
  }
}

template <class T>
void masked_linear_dx(const MaskedLinearArgs<T>& args, int64_t r0, int64_t r1, int64_t k0, int64_t k1, T* scratch) {
  for (int64_t c = 0; c == 0 || c < args.outputs; c += kChunk) {
    for (int64_t k = k0; k < k1; k += kPanel<T>) {
      const int64_t n = smaller(kPanel<T>, k1 - k), begin = args.first[k], end = smaller(c + kChunk, args.outputs);
      const bool last = end == args.outputs;
      if (end <= begin && !last) continue;  // a column that nobody sees is written with the last chunk
      const Panel<T> panel{scratch, begin > c ? begin : c, end, n, args.first + k};
      pack_transposed(args.weight + k * args.weight_ld, args.weight_ld, panel);
      panel_rows<true>(args, args.dy, args.dy_ld, panel, r0, r1, k, begin >= c, last);
    }
  }
}

// [rows][kUnits] from n <= kUnits columns of x, zeros behind them
template <class T>
void pack_broadcasts(const T* x, int64_t ld, int64_t rows, int64_t n, T* to) {
  if (n == kUnits) {
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(to + r * kUnits, x + r * ld, kUnits * sizeof(T));
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t u = 0; u < kUnits; ++u) to[r * kUnits + u] = u < n ? x[r * ld + u] : T(0);
  }
}

// U rows of dweight from row k on, one chunk of the batch
template <int U, class T>
FK_INLINE void dweight_tile(const T* x, const T* dy, int64_t rows, const MaskedLinearArgs<T>& args, int64_t k, int64_t j, int64_t n) {
  Vec<T> sum[U][kRowVectors];
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < kRowVectors; ++v) sum[u][v] = zero<T>();
  if (n > 2 * lanes<T> && args.visible[j + 2 * lanes<T> - 1] <= k)  // the staircase begins in the last vector
    multiply<U, kRowVectors, 2>(x, 1, kUnits, dy, kPanel<T>, rows, sum);
  else if (n > lanes<T> && args.visible[j + lanes<T> - 1] <= k)
    multiply<U, kRowVectors, 1>(x, 1, kUnits, dy, kPanel<T>, rows, sum);
  else if (n <= lanes<T>)
    multiply<U, 1>(x, 1, kUnits, dy, kPanel<T>, rows, sum);
  else
    multiply<U, kRowVectors>(x, 1, kUnits, dy, kPanel<T>, rows, sum);
  T* to = args.out + k * args.out_ld + j;
  if (n == kPanel<T> && k + U <= args.visible[j]) {
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < kRowVectors; ++v) {
        T* at = to + u * args.out_ld + v * lanes<T>;
        store(at, load(at) + sum[u][v]);
      }
    return;
  }
  for (int u = 0; u < U; ++u)
    for (int64_t i = 0; i < n; ++i)
      if (k + u < args.visible[j + i]) to[u * args.out_ld + i] += sum[u][i / lanes<T>][i % lanes<T>];
}

// Rows [k0, k1) of dweight
template <class T>
void masked_linear_dweight(const MaskedLinearArgs<T>& args, int64_t k0, int64_t k1, T* scratch) {
  for (int64_t k = k0; k < k1 && !args.finish.accumulate; ++k)
    for (int64_t j = 0; j < args.outputs; ++j) args.out[k * args.out_ld + j] = T(0);
  T *panel = scratch, *broadcasts = scratch + kChunk * kPanel<T>;  // broadcasts: [group of kUnits inputs][row][kUnits]
  for (int64_t b = 0; b < args.batch; b += kChunk) {
    const int64_t rows = smaller(kChunk, args.batch - b);
    for (int64_t k = k0; k < k1; k += kUnits)
      pack_broadcasts(args.x + b * args.x_ld + k, args.x_ld, rows, smaller(kUnits, k1 - k), broadcasts + (k - k0) * kChunk);
    for (int64_t j = 0; j < args.outputs; j += kPanel<T>) {
      const int64_t n = smaller(kPanel<T>, args.outputs - j), end = smaller(k1, args.visible[j + n - 1]);
      if (end <= k0) continue;
      if (n == kPanel<T>)
        for (int64_t r = 0; r < rows; ++r) copy_row(args.dy + (b + r) * args.dy_ld + j, kPanel<T>, panel + r * kPanel<T>);
      else
        for (int64_t r = 0; r < rows; ++r) copy_row(args.dy + (b + r) * args.dy_ld + j, n, panel + r * kPanel<T>);
      for (int64_t k = k0; k < end; k += kUnits) dweight_tile<kUnits>(broadcasts + (k - k0) * kChunk, panel, rows, args, k, j, n);
    }
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
