// The forward product of a masked linear map for a few rows, which a packed panel would serve too seldom: weights are read as they lie, four
// inputs at a time, and the sums wait in the first-level cache. Their order is that of panel_sums. One row of 784 x 1024 takes a quarter of the
// time, six take two thirds. Included once per instruction set, after masked_linear_tile_kernel.h.

namespace flowkernels {
namespace FK_TARGET {

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
    int64_t j = n < kInputs ? columns_ : smaller(whole_vectors<T>(first), columns_);  // from here on vectors have all inputs
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

}  // namespace FK_TARGET
}  // namespace flowkernels
