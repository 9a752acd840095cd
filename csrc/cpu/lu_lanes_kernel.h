// LU factorisation of very small matrices, lanes are matrices. Included once per instruction set, by lu_kernel.h.
//
// Each lane chooses its own pivot: exchanges of rows are blends under the mask `chosen[i]`, true in the lanes whose pivot is in row i.
// The operations on one matrix, and so its bits, are those of lu_kernel.h.

namespace flowkernels {
namespace FK_TARGET {

constexpr int kLargestInLanes = 16;

template <class T>
struct LuLanes {
  int64_t n;
  Vec<T> a[kLargestInLanes * kLargestInLanes];  // [n][n]
  Vec<T> x[kLargestInLanes * kLargestInLanes];  // the inverse
  Vec<T> pivot_row[kLargestInLanes], diagonal[kLargestInLanes];
  IVec<T> chosen[kLargestInLanes], permutation[kLargestInLanes];
};

// Returns, as a mask, the lanes whose permutation is odd.
template <class T>
FK_CALL IVec<T> factor(LuLanes<T>& s) {
  const int64_t n = s.n;
  IVec<T> odd{};
  for (int64_t i = 0; i < n; ++i) s.permutation[i] = IVec<T>{} + static_cast<int32_t>(i);
  for (int64_t k = 0; k < n; ++k) {
    Vec<T>* top = s.a + k * n;
    Vec<T> best = broadcast<T>(-1);
    IVec<T> at = IVec<T>{} + static_cast<int32_t>(k);  // stays so where all are NaN
    for (int64_t i = k; i < n; ++i) {
      const Vec<T> size = abs(s.a[i * n + k]);
      const IVec<T> larger = size > best;
      best = select(larger, size, best);
      at = larger ? IVec<T>{} + static_cast<int32_t>(i) : at;
    }
    odd ^= at != static_cast<int32_t>(k);
    for (int64_t i = k; i < n; ++i) s.chosen[i] = at == static_cast<int32_t>(i);

    for (int64_t j = 0; j < n; ++j) {
      Vec<T> u = top[j];
      for (int64_t i = k + 1; i < n; ++i) u = select(s.chosen[i], s.a[i * n + j], u);
      s.pivot_row[j] = u;
    }
    const Vec<T> pivot = s.pivot_row[k], divisor = select(pivot == T(0), broadcast<T>(1), pivot);
    s.diagonal[k] = pivot;
    const IVec<T> from = s.permutation[k];
    for (int64_t i = k + 1; i < n; ++i) {
      Vec<T>* row = s.a + i * n;
      const IVec<T> mask = s.chosen[i];
      for (int64_t j = 0; j < k; ++j) row[j] = select(mask, top[j], row[j]);
      const Vec<T> multiplier = select(mask, top[k], row[k]) / divisor;
      row[k] = multiplier;
      for (int64_t j = k + 1; j < n; ++j) row[j] = fma(-multiplier, s.pivot_row[j], select(mask, top[j], row[j]));
      s.permutation[k] = mask ? s.permutation[i] : s.permutation[k];
      s.permutation[i] = mask ? from : s.permutation[i];
    }
    for (int64_t j = 0; j < n; ++j) top[j] = s.pivot_row[j];
  }
  return odd;
}

// to[j] -= sum over k < count of coefficient[k] * from[k][j], for W columns
template <int W, class T>
FK_INLINE void subtract_columns(Vec<T>* to, const Vec<T>* coefficient, const Vec<T>* from, int64_t n, int64_t count) {
  Vec<T> sum[W];
  for (int j = 0; j < W; ++j) sum[j] = to[j];
  for (int64_t k = 0; k < count; ++k) {
    const Vec<T> c = -coefficient[k];
    for (int j = 0; j < W; ++j) sum[j] = fma(c, from[k * n + j], sum[j]);
  }
  for (int j = 0; j < W; ++j) to[j] = sum[j];
}

template <class T>
FK_INLINE void subtract_columns(Vec<T>* to, const Vec<T>* coefficient, const Vec<T>* from, int64_t n, int64_t count, int64_t columns) {
  int64_t j = 0;
  for (; j + 4 <= columns; j += 4) subtract_columns<4, T>(to + j, coefficient, from + j, n, count);
  for (; j < columns; ++j) subtract_columns<1, T>(to + j, coefficient, from + j, n, count);
}

// s.x = U^-1 L^-1
template <class T>
FK_CALL void invert_factors(LuLanes<T>& s) {
  const int64_t n = s.n;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) s.x[i * n + j] = broadcast<T>(i == j);
    subtract_columns<T>(s.x + i * n, s.a + i * n, s.x, n, i, i);
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    subtract_columns<T>(s.x + i * n, s.a + i * n + i + 1, s.x + (i + 1) * n, n, n - 1 - i, n);
    for (int64_t j = 0; j < n; ++j) s.x[i * n + j] = s.x[i * n + j] / s.diagonal[i];
  }
}

// the matrices [first, last), as many as there are lanes at most; a lane without one factors the identity
template <class In, class T>
FK_CALL void lu_in_lanes(const LuArgs<In>& args, LuLanes<T>& s, int64_t first, int64_t last) {
  const int64_t n = s.n = args.n, count = last - first;
  T* a = reinterpret_cast<T*>(s.a);
  for (int64_t lane = 0; lane < lanes<T>; ++lane) {
    const In* w = lane < count ? args.matrix(first + lane) : nullptr;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        a[(i * n + j) * lanes<T> + lane] = w ? static_cast<T>(w[i * args.row_stride + j * args.column_stride]) : T(i == j);
  }
  const IVec<T> odd = factor(s);
  if (args.inverse) invert_factors(s);
  Vec<T> logs[kLargestInLanes], sign = select(odd, broadcast<T>(-1), broadcast<T>(1));
  for (int64_t k = 0; k < n; ++k) {
    const Vec<T> d = s.diagonal[k];
    logs[k] = log(abs(d));
    sign *= select(d > T(0), broadcast<T>(1), select(d < T(0), broadcast<T>(-1), zero<T>()));  // 0 for NaN, as torch.sgn has it
  }
  const T* x = reinterpret_cast<const T*>(s.x);
  for (int64_t lane = 0; lane < count; ++lane) {
    double sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += static_cast<double>(logs[k][lane]);
    args.sign[first + lane] = static_cast<In>(sign[lane]);
    args.logabsdet[first + lane] = static_cast<In>(sum);
    In* to = args.inverse ? args.inverse + (first + lane) * n * n : nullptr;
    for (int64_t i = 0; to && i < n; ++i)
      for (int64_t j = 0; j < n; ++j) to[i * n + s.permutation[j][lane]] = static_cast<In>(x[(i * n + j) * lanes<T> + lane]);
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
