// The three products of a masked linear map. Included once per instruction set (for_each_target.h), after staircase_kernel.h.
//
// All three are its multiply_add; they differ in what is broadcast and what lies in the lanes:
//   forward  y[b][j]  = bias[j] + sum over k < visible[j] of x[b][k] * weight[k][j]    broadcast x,  lanes j
//   dx       dx[b][k] = sum over j >= first[k] of dy[b][j] * weight[k][j]              broadcast dy, lanes k
//   dweight  dweight[k][j] = sum over b of x[b][k] * dy[b][j], k < visible[j]          broadcast x,  lanes j
// The operand in the lanes is packed into panels of up to three vectors, because rows of a power of two apart would share a few sets of
// the cache. Sums have the order of staircase_kernel.h: chains of kChunk terms at absolute positions, added up in ascending order.
// Each vector of a panel has only the terms that any of its outputs has; for the other outputs the panel holds zeros. Times an
// infinity those would be NaN, so a tile in which NaN turns up is computed again term by term.

namespace flowkernels {
namespace FK_TARGET {

template <class T>
constexpr int64_t kPanel = kRowVectors * lanes<T>;

// Columns of the next panel where so many are left: three vectors, but two and two rather than three and one, whose few chains of
// multiply-adds would wait for each other
template <class T>
FK_INLINE int64_t panel_columns(int64_t left) {
  return left > kPanel<T> && left <= kPanel<T> + lanes<T> ? 2 * lanes<T> : smaller(left, kPanel<T>);
}

template <class T>
struct Panel {
  T* data;          // [k1 - k0][kPanel]
  int64_t k0, k1;   // terms of the sum
  int64_t n;        // outputs, at most kPanel
  const int32_t* limits;  // [n], ascending: output i has the terms below (from on) limits[i]
};

// limits[i] for the first n lanes, 0 for the others
template <class T>
FK_INLINE IVec<T> load_limits(const int32_t* limits, int64_t n) {
  IVec<T> v{};
  for (int l = 0; l < lanes<T>; ++l) v[l] = l < n ? limits[l] : 0;
  return v;
}

// Outputs are columns of the weight, which see the terms before their limit. A vector has the terms that its last output sees.
template <class T>
void pack(const T* weight, int64_t ld, const Panel<T>& p) {
  for (int64_t i = 0; i < p.n; i += lanes<T>) {
    const int64_t n = smaller(lanes<T>, p.n - i), end = smaller(p.k1, p.limits[i + n - 1]);
    const T* from = weight + p.k0 * ld + i;
    T* to = p.data + i;
    int64_t k = p.k0;
    const auto rows = [&](int64_t before, auto row) FK_BODY {
      for (; k < before; ++k, from += ld, to += kPanel<T>) store(to, row());
    };
    if (n == lanes<T>) rows(smaller(end, p.limits[i]), [&] { return load(from); });
    IVec<T> left = load_limits<T>(p.limits + i, n) - static_cast<int>(k);  // terms from k on that each output sees
    rows(end, [&] {
      const Vec<T> row = select(left > 0, load_some(from, n), zero<T>());
      left -= 1;
      return row;
    });
  }
}

// Outputs are rows of the weight, which see the terms from their limit on. A vector has the terms that its first output sees, and some before.
template <class T>
void pack_transposed(const T* weight, int64_t ld, const Panel<T>& p) {
  for (int64_t i = 0; i < p.n; i += lanes<T>) {
    const int64_t outputs = smaller(lanes<T>, p.n - i), everyone = p.limits[i + outputs - 1];
    const int64_t unseen = p.limits[i] > p.k0 ? (p.limits[i] - p.k0) / lanes<T> * lanes<T> : 0;
    for (int64_t k = p.k0 + unseen; k < p.k1; k += lanes<T>) {
      const int64_t terms = smaller(lanes<T>, p.k1 - k);
      Vec<T> block[lanes<T>];
      const T* corner = weight + i * ld + k;
      if (outputs == lanes<T> && terms == lanes<T>)
        for (int l = 0; l < lanes<T>; ++l) block[l] = load(corner + l * ld);
      else
        for (int l = 0; l < lanes<T>; ++l) block[l] = l < outputs ? load_some(corner + l * ld, terms) : zero<T>();
      if (k < everyone)
        for (int l = 0; l < outputs; ++l) block[l] = select(iota<T>() < static_cast<int>(p.limits[i + l] - k), zero<T>(), block[l]);
      transpose(block);
      T* to = p.data + (k - p.k0) * kPanel<T> + i;
      for (int l = 0; l < terms; ++l) store(to + l * kPanel<T>, block[l]);
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

// n columns from j on of row r, of which `sum` has everything
template <Store STORE, class T>
FK_INLINE Vec<T> finished(const Finish<T>& finish, Vec<T> sum, int64_t r, int64_t j, int64_t n) {
  if constexpr (STORE == Store::relu) return activate<Activation::relu>(sum);
  if constexpr (STORE == Store::relu_derivative)
    return sum * derivative_at<Activation::relu>(load_some(finish.values + r * finish.values_ld + j, n));
  if constexpr (STORE == Store::any) {
    if (finish.pre) store_some(finish.pre + r * finish.pre_ld + j, sum, n);
    return finish.values ? sum * derivative_at(finish.activation, load_some(finish.values + r * finish.values_ld + j, n))
                         : activate(finish.activation, sum);
  }
  return sum;
}

// What a tile's sums are added to: the sums so far, a bias or zeros
template <class T>
struct Begun {
  const T* data;
  int64_t ld;
  Begun(const MaskedLinearArgs<T>& args, int64_t r, int64_t j, bool first) : data(args.finish.bias ? args.finish.bias + j : kZeros<T>), ld(0) {
    if (!first || args.finish.accumulate) data = args.out + r * args.out_ld + j, ld = args.out_ld;
  }
};

template <Store STORE, class T>
void store_rows(const MaskedLinearArgs<T>& args, const Vec<T>* sum, int64_t rows, int64_t r, int64_t j, int64_t n, bool first) {
  const Begun<T> begun(args, r, j, first);
  for (int64_t u = 0; u < rows; ++u, sum += kRowVectors)
    for (int64_t v = 0, i = 0; i < n; ++v, i += lanes<T>) {
      const Vec<T> all = load_some(begun.data + u * begun.ld + i, n - i) + sum[v];
      store_some(args.out + (r + u) * args.out_ld + j + i, finished<STORE>(args.finish, all, r + u, j + i, n - i), n - i);
    }
}

// Any tile, from memory
template <class T>
FK_CALL void store_any(const MaskedLinearArgs<T>& args, Store store, const Vec<T>* sum, int64_t rows, int64_t r, int64_t j, int64_t n, bool first) {
  switch (store) {
    case Store::plain: return store_rows<Store::plain>(args, sum, rows, r, j, n, first);
    case Store::relu: return store_rows<Store::relu>(args, sum, rows, r, j, n, first);
    case Store::relu_derivative: return store_rows<Store::relu_derivative>(args, sum, rows, r, j, n, first);
    default: return store_rows<Store::any>(args, sum, rows, r, j, n, first);
  }
}

// A tile of V vectors, the last of which may have fewer columns, from registers: nothing here takes the address of `sum`, or it would be kept
// in memory
template <int U, int V, Store STORE, class T>
FK_INLINE void store_tile(const MaskedLinearArgs<T>& args, const Vec<T> (&sum)[U][kRowVectors], int64_t r, int64_t j, int64_t n, bool first) {
  const Begun<T> begun(args, r, j, first);
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const int64_t i = v * lanes<T>, some = v + 1 < V ? lanes<T> : n - i;
      const Vec<T> all = load_some(begun.data + u * begun.ld + i, some) + sum[u][v];
      store_some(args.out + (r + u) * args.out_ld + j + i, finished<STORE>(args.finish, all, r + u, j + i, some), some);
    }
}

// A tile computed term by term, seeing nothing outside the staircase, and stored
template <int U, bool kFrom, class T>
FK_CALL void careful_tile(const MaskedLinearArgs<T>& args, const T* x, int64_t ld, const Panel<T>& p, int64_t r, int64_t j, bool first, Store store) {
  Vec<T> sum[U][kRowVectors];
  for (int u = 0; u < U; ++u)
    for (int64_t i = 0; i < p.n; ++i) {
      T one = 0;
      for (int64_t k = p.k0; k < p.k1; ++k)
        if ((k >= p.limits[i]) == kFrom) one = fma(x[u * ld + k], p.data[(k - p.k0) * kPanel<T> + i], one);
      sum[u][i / lanes<T>][i % lanes<T>] = one;
    }
  store_any(args, store, sum[0], U, r, j, p.n, first);
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
  Vec<T> sum[U][kRowVectors], nan[kRowVectors];
  panel_sums<U, kFrom>(x, ld, p, sum);
  for (int v = 0; v < kRowVectors; ++v) nan[v] = zero<T>();
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < kRowVectors; ++v) nan[v] = fma(sum[u][v], zero<T>(), nan[v]);  // of an infinity too
  const Vec<T> bad = nan[0] + nan[1] + nan[2];
  const IVec<T> is_bad = bad != bad;
  if (__builtin_expect(any(is_bad), 0)) return careful_tile<U, kFrom>(args, x, ld, p, r, j, first, store);
  const auto stored = [&](auto vectors) FK_BODY {
    constexpr int V = decltype(vectors)::value;
    if (store == Store::plain) return store_tile<U, V, Store::plain>(args, sum, r, j, p.n, first);
    if (store == Store::relu) return store_tile<U, V, Store::relu>(args, sum, r, j, p.n, first);
    store_tile<U, V, Store::relu_derivative>(args, sum, r, j, p.n, first);
  };
  if (store != Store::any) return p.n > 2 * lanes<T> ? stored(Count<3>{}) : p.n > lanes<T> ? stored(Count<2>{}) : stored(Count<1>{});
  Vec<T> kept[U][kRowVectors];
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < kRowVectors; ++v) kept[u][v] = sum[u][v];
  store_any(args, store, kept[0], U, r, j, p.n, first);
}

template <bool kFrom, class T>
void panel_rows(const MaskedLinearArgs<T>& args, const T* x, int64_t ld, const Panel<T>& p, int64_t r0, int64_t r1, int64_t j, bool first,
                bool last) {
  const Store store = store_of(args.finish, last);
  int64_t r = r0;
  const auto tile = [&](auto rows) FK_BODY {
    constexpr int U = decltype(rows)::value;
    panel_tile<U, kFrom>(args, x + r * ld, ld, p, r, j, first, store);
    r += U;
  };
  while (r + kUnits <= r1) tile(Count<kUnits>{});
  if constexpr (kUnits > 4)
    if (r + 4 <= r1) tile(Count<4>{});
  if (r + 2 <= r1) tile(Count<2>{});
  if (r < r1) tile(Count<1>{});
}

// ---- a few rows, which a packed panel would serve too seldom: weights are read as they lie, four inputs at a time, and the sums wait in the
// first-level cache. Their order is that of panel_sums. One row of 784 x 1024 takes a quarter of the time, six take two thirds.

constexpr int64_t kFewRows = 6;
template <class T>
constexpr int64_t kFewColumns = 16 * kPanel<T>;

template <int R, class T>
class FewRows {
 public:
  // columns: no more than kFewColumns
  FK_INLINE FewRows(const MaskedLinearArgs<T>& args, int64_t row, int64_t column, int64_t columns, T* scratch)
      : args_(args), row_(row), column_(column), columns_(columns), sums_(scratch), totals_(scratch + R * kFewColumns<T>) {}

  FK_INLINE void run() const {
    const Finish<T>& finish = args_.finish;
    const T* begun = finish.accumulate ? args_.out + row_ * args_.out_ld + column_ : finish.bias ? finish.bias + column_ : nullptr;
    const int64_t ld = finish.accumulate ? args_.out_ld : 0, end = args_.visible[column_ + columns_ - 1];
    each([&](int64_t u, int64_t j, int64_t at) FK_BODY { store(totals_ + at, begun ? load_some(begun + u * ld + j, columns_ - j) : zero<T>()); });
    int64_t first = 0;
    for (int64_t begin = 0; begin == 0 || begin < end; begin += kChunk) {
      each([&](int64_t, int64_t, int64_t at) FK_BODY { store(sums_ + at, zero<T>()); });
      const int64_t stop = smaller(begin + kChunk, end);
      for (int64_t k = begin; k < stop; k += kInputs) first = add(k, smaller(kInputs, stop - k), first);
      each([&](int64_t, int64_t, int64_t at) FK_BODY { store(totals_ + at, load(totals_ + at) + load(sums_ + at)); });
    }
    switch (store_of(finish, true)) {
      case Store::plain: return store_totals<Store::plain>();
      case Store::relu: return store_totals<Store::relu>();
      case Store::relu_derivative: return store_totals<Store::relu_derivative>();
      default: return store_totals<Store::any>();
    }
  }

 private:
  static constexpr int64_t L = lanes<T>, kInputs = 4;

  // f(row, column, place) for the vectors of all rows
  template <class F>
  FK_INLINE void each(const F& f) const {
    for (int64_t u = 0; u < R; ++u)
      for (int64_t j = 0; j < columns_; j += L) f(u, j, u * kFewColumns<T> + j);
  }

  // n inputs from k on. first: no column before it sees one of them; the same for those that come next
  FK_INLINE int64_t add(int64_t k, int64_t n, int64_t first) const {
    const T *x = args_.x + row_ * args_.x_ld + k, *weight = args_.weight + k * args_.weight_ld + column_;
    const int64_t ld = args_.weight_ld;
    int64_t stairs[kInputs];  // the first column that sees each
    for (int64_t i = 0; i < n; stairs[i++] = first)
      while (args_.visible[column_ + first] <= k + i) ++first;
    int64_t j = n < kInputs ? columns_ : smaller((first + L - 1) / L * L, columns_);  // from here on vectors have all inputs
    for (int64_t i = 0; i < n; ++i)
      for (int64_t some = stairs[i] / L * L; some < j; some += L) add_to(some, x + i, weight + i * ld, stairs[i]);
    for (; j + L <= columns_; j += L) {
      Vec<T> w[kInputs];
      for (int i = 0; i < kInputs; ++i) w[i] = load(weight + i * ld + j);
      for (int64_t u = 0; u < R; ++u) {
        Vec<T> sum = load(sums_ + u * kFewColumns<T> + j);
        for (int i = 0; i < kInputs; ++i) sum = fma(broadcast<T>(x[u * args_.x_ld + i]), w[i], sum);
        store(sums_ + u * kFewColumns<T> + j, sum);
      }
    }
    for (int64_t i = 0; i < n && j < columns_; ++i) add_to(j, x + i, weight + i * ld, j);
    return first;
  }

  // one input, to the vector of column j, of which those before `first` do not see it
  FK_INLINE void add_to(int64_t j, const T* x, const T* weight, int64_t first) const {
    const Vec<T> w = load_some(weight + j, columns_ - j);
    const IVec<T> sees = iota<T>() >= static_cast<int>(first - j);
    for (int64_t u = 0; u < R; ++u) {
      T* at = sums_ + u * kFewColumns<T> + j;
      const Vec<T> sum = load(at);
      store(at, select(sees, fma(broadcast<T>(x[u * args_.x_ld]), w, sum), sum));
    }
  }

  template <Store STORE>
  FK_INLINE void store_totals() const {
    each([&](int64_t u, int64_t j, int64_t at) FK_BODY {
      const int64_t r = row_ + u, n = columns_ - j;
      store_some(args_.out + r * args_.out_ld + column_ + j, finished<STORE>(args_.finish, load(totals_ + at), r, column_ + j, n), n);
    });
  }

  const MaskedLinearArgs<T>& args_;
  const int64_t row_, column_, columns_;
  T *sums_, *totals_;  // [R][kFewColumns]: the chunk under way, and what the sums began with and the chunks before it
};

template <class T>
void few_rows(const MaskedLinearArgs<T>& args, int64_t r0, int64_t r1, int64_t j0, int64_t j1, T* scratch) {
  for (int64_t j = j0; j < j1; j += kFewColumns<T>) {
    const int64_t n = smaller(kFewColumns<T>, j1 - j);
    for (int64_t r = r0; r < r1; r += 4) {
      if (r1 - r >= 4)
        FewRows<4, T>(args, r, j, n, scratch).run();
      else if (r1 - r == 3)
        FewRows<3, T>(args, r, j, n, scratch).run();
      else if (r1 - r == 2)
        FewRows<2, T>(args, r, j, n, scratch).run();
      else
        FewRows<1, T>(args, r, j, n, scratch).run();
    }
  }
}

constexpr int64_t kFar = 2048;  // so many terms of the rows of a task go through all panels before the next ones: they stay in the second-level cache

// Rows [r0, r1) of outputs [j0, j1); j0 and j1 are whole panels but for the end
template <class T>
void masked_linear_forward(const MaskedLinearArgs<T>& args, int64_t r0, int64_t r1, int64_t j0, int64_t j1, T* scratch) {
  if (r1 - r0 <= kFewRows) return few_rows(args, r0, r1, j0, j1, scratch);
  for (int64_t begin = 0; begin == 0 || begin < args.inputs; begin += kFar) {
    for (int64_t j = j0, n; j < j1; j += n) {
      n = panel_columns<T>(j1 - j);
      const int64_t end = args.visible[j + n - 1], far = smaller(begin + kFar, end);
      for (int64_t k0 = begin; k0 == 0 || k0 < far; k0 += kChunk) {
        const int64_t k1 = smaller(k0 + kChunk, end);
        const Panel<T> panel{scratch, k0, k1, n, args.visible + j};
        pack(args.weight + j, args.weight_ld, panel);
        panel_rows<false>(args, args.x, args.x_ld, panel, r0, r1, j, k0 == 0, k1 == end);
      }
    }
  }
}

template <class T>
void masked_linear_dx(const MaskedLinearArgs<T>& args, int64_t r0, int64_t r1, int64_t k0, int64_t k1, T* scratch) {
  for (int64_t start = 0; start == 0 || start < args.outputs; start += kFar) {
    for (int64_t k = k0, n; k < k1; k += n) {
      n = panel_columns<T>(k1 - k);
      const int64_t begin = args.first[k];
      for (int64_t c = start; c == start || c < smaller(start + kFar, args.outputs); c += kChunk) {
        const int64_t end = smaller(c + kChunk, args.outputs);
        const bool last = end == args.outputs;
        if (end <= begin && !last) continue;  // a column that nobody sees is written with the last chunk
        const Panel<T> panel{scratch, begin > c ? begin : c, end, n, args.first + k};
        pack_transposed(args.weight + k * args.weight_ld, args.weight_ld, panel);
        panel_rows<true>(args, args.dy, args.dy_ld, panel, r0, r1, k, begin >= c, last);
      }
    }
  }
}

// elements from one packed group of kUnits columns to the next: an odd number of cache lines, which do not share a set
template <class T>
constexpr int64_t kGroup = kChunk * kUnits + 64 / int64_t(sizeof(T));

// [group of columns][row][kUnits] of x, zeros beyond the last column
template <class T>
void pack_broadcasts(const T* x, int64_t ld, int64_t rows, int64_t columns, T* to) {
  const int64_t whole = columns / kUnits * kUnits;
  for (int64_t r = 0; r < rows; ++r, x += ld, to += kUnits) {
    T* group = to;
    for (int64_t c = 0; c < whole; c += kUnits, group += kGroup<T>) __builtin_memcpy(group, x + c, kUnits * sizeof(T));
    for (int64_t u = 0; whole < columns && u < kUnits; ++u) group[u] = whole + u < columns ? x[whole + u] : T(0);
  }
}

constexpr int64_t kPanels = 4;  // panels of dy that are packed together: rows so long are read at the memory's rate

// elements from one packed panel to the next
template <class T>
constexpr int64_t kPackedPanel = kChunk * kPanel<T> + 5 * 64 / int64_t(sizeof(T));

// n <= kPanel elements of a row, zeros behind them in their last vector
template <class T>
FK_INLINE void copy_row(const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += lanes<T>) store(to + i, load_some(from + i, n - i));
}

struct Panels {
  int count;
  int64_t begin[kPanels + 1];  // the first column of each, and where the last ends
};

// Up to kPanels panels of columns from j on
template <class T>
FK_INLINE Panels panels_from(int64_t j, int64_t columns) {
  Panels panels{0, {j}};
  for (; panels.count < kPanels && j < columns; panels.begin[++panels.count] = j) j += panel_columns<T>(columns - j);
  return panels;
}

// [panel][kChunk rows][kPanel] of dy
template <class T>
void pack_panels(const T* dy, int64_t ld, int64_t rows, const Panels& panels, T* to) {
  for (int64_t r = 0; r < rows; ++r, dy += ld, to += kPanel<T>)
    for (int i = 0; i < panels.count; ++i) {
      const int64_t j = panels.begin[i], n = panels.begin[i + 1] - j;
      T* at = to + i * kPackedPanel<T>;
      n == kPanel<T> ? copy_row(dy + j, kPanel<T>, at) : copy_row(dy + j, n, at);
    }
}

// Stores sums of rows of dweight from row k on, or adds them to what is there; zeros outside the staircase
template <class T>
void store_inside(const Vec<T>* sum, int64_t rows, const MaskedLinearArgs<T>& args, int64_t k, int64_t j, int64_t n, bool first) {
  rows = smaller(rows, args.inputs - k);
  for (int64_t v = 0, i = 0; i < n; ++v, i += lanes<T>) {
    IVec<T> seen{};  // how many of the rows from k on each column sees
    for (int l = 0; l < lanes<T>; ++l) seen[l] = i + l < n ? args.visible[j + i + l] - k : 0;
    T* at = args.out + k * args.out_ld + j + i;
    for (int64_t u = 0; u < rows; ++u, at += args.out_ld, seen -= 1) {
      const Vec<T> inside = select(seen > 0, sum[u * kRowVectors + v], zero<T>());
      store_some(at, first ? inside : load_some(at, n - i) + inside, n - i);
    }
  }
}

// U rows of dweight from row k on, one chunk of the batch; the first one is not added to what was there
template <int U, class T>
FK_CALL void dweight_tile(const T* x, const T* dy, int64_t rows, const MaskedLinearArgs<T>& args, int64_t k, int64_t j, int64_t n, bool first) {
  constexpr int64_t L = lanes<T>;
  Vec<T> sum[U][kRowVectors];
  T* const out = args.out + k * args.out_ld + j;
  for (int u = 0; u < U && !first; ++u)  // what the sums are added to comes while they are made
    for (int v = 0; v < kRowVectors; ++v)
      __builtin_prefetch(ahead(out, u * args.out_ld + v * L), 1);
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < kRowVectors; ++v) sum[u][v] = zero<T>();
  const auto vectors = [&](auto from, auto to) FK_BODY {
    multiply<U, decltype(to)::value, decltype(from)::value>(x, 1, kUnits, dy, kPanel<T>, rows, sum);
  };
  const bool second = n > L && args.visible[j + L - 1] <= k;  // the staircase begins after the first vector, or after the second
  if (n > 2 * L && args.visible[j + 2 * L - 1] <= k)
    vectors(Count<2>{}, Count<3>{});
  else if (n > 2 * L && second)
    vectors(Count<1>{}, Count<3>{});
  else if (n > 2 * L)
    vectors(Count<0>{}, Count<3>{});
  else if (second)
    vectors(Count<1>{}, Count<2>{});
  else if (n > L)
    vectors(Count<0>{}, Count<2>{});
  else
    vectors(Count<0>{}, Count<1>{});
  const auto store_whole = [&](auto whole) FK_BODY {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 3
      for (int v = 0; v < decltype(whole)::value; ++v) {
        T* at = out + u * args.out_ld + v * L;
        store(at, first ? sum[u][v] : load(at) + sum[u][v]);
      }
  };
  if (k + U <= args.visible[j]) {
    if (n == kPanel<T>) return store_whole(Count<3>{});
    if (n == 2 * L) return store_whole(Count<2>{});
  }
  Vec<T> kept[U][kRowVectors];
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < kRowVectors; ++v) kept[u][v] = sum[u][v];
  store_inside(kept[0], U, args, k, j, n, first);
}

// Rows [k0, k1) of dweight
template <class T>
void masked_linear_dweight(const MaskedLinearArgs<T>& args, int64_t k0, int64_t k1, T* scratch) {
  T *packed = scratch, *broadcasts = scratch + kPanels * kPackedPanel<T>;
  // the first panel of which a column sees input k; none before it is written by tiles
  int64_t begin = 0;
  const auto begin_at = [&](int64_t k) {
    for (int64_t n; begin < args.outputs && args.visible[begin + (n = panel_columns<T>(args.outputs - begin)) - 1] <= k;) begin += n;
    return begin;
  };
  const int64_t j_begin = begin_at(k0);
  const bool writes = !args.finish.accumulate;
  for (int64_t k = k0; k < k1 && writes; k += kUnits) {
    const int64_t end = args.batch > 0 ? begin_at(k) : args.outputs;
    for (int64_t i = k; i < smaller(k + kUnits, k1); ++i)
      for (int64_t j = 0; j < end; ++j) args.out[i * args.out_ld + j] = T(0);
  }
  for (int64_t b = 0; b < args.batch; b += kChunk) {
    const int64_t rows = smaller(kChunk, args.batch - b);
    const bool first = b == 0 && writes;
    pack_broadcasts(args.x + b * args.x_ld + k0, args.x_ld, rows, k1 - k0, broadcasts);
    for (int64_t j0 = j_begin; j0 < args.outputs;) {
      const Panels panels = panels_from<T>(j0, args.outputs);
      pack_panels(args.dy + b * args.dy_ld, args.dy_ld, rows, panels, packed);
      for (int i = 0; i < panels.count; ++i) {
        const int64_t j = panels.begin[i], n = panels.begin[i + 1] - j, end = smaller(k1, args.visible[j + n - 1]);
        for (int64_t k = k0; k < end; k += kUnits)
          dweight_tile<kUnits>(broadcasts + (k - k0) / kUnits * kGroup<T>, packed + i * kPackedPanel<T>, rows, args, k, j, n, first);
      }
      j0 = panels.begin[panels.count];
    }
  }
}

// Compiled in masked_linear.cpp, called from other files too.
#ifndef FK_PRODUCTS
#define FK_PRODUCTS extern
#endif
FK_PRODUCTS template void masked_linear_forward(const MaskedLinearArgs<float>&, int64_t, int64_t, int64_t, int64_t, float*);
FK_PRODUCTS template void masked_linear_forward(const MaskedLinearArgs<double>&, int64_t, int64_t, int64_t, int64_t, double*);
FK_PRODUCTS template void masked_linear_dx(const MaskedLinearArgs<float>&, int64_t, int64_t, int64_t, int64_t, float*);
FK_PRODUCTS template void masked_linear_dx(const MaskedLinearArgs<double>&, int64_t, int64_t, int64_t, int64_t, double*);
FK_PRODUCTS template void masked_linear_dweight(const MaskedLinearArgs<float>&, int64_t, int64_t, float*);
FK_PRODUCTS template void masked_linear_dweight(const MaskedLinearArgs<double>&, int64_t, int64_t, double*);

}  // namespace FK_TARGET
}  // namespace flowkernels
