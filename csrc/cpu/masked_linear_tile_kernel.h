// The tiles of a masked linear map's forward product and of dx, and what becomes of their sums. Included once per instruction set, after
// staircase_kernel.h.
//
// The operand in the lanes is packed into panels of up to three vectors, because rows of a power of two apart would share a few sets of
// the cache. Each vector of a panel has only the terms that any of its outputs has; for the other outputs the panel holds zeros. Times an
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

}  // namespace FK_TARGET
}  // namespace flowkernels
