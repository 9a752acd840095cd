// LU factorisation of small matrices, lanes are columns of one matrix. Included once per instruction set (for_each_target.h).
//
//   P A = L U, partial pivoting: in column k the first of the largest |a[i][k]|, i >= k;   log|det A| = sum log|u[k][k]|
//   inverse = U^-1 L^-1 P
//
// Each element is a chain of fused multiply-adds whose order does not depend on the number of lanes, so all instruction sets give the same
// bits: ascending k, but that a solve takes the rows that are known as a block before those of the block itself. A zero pivot has multipliers
// of zero (its column is zero below it): the rest goes on, as in LAPACK.

#include "cpu/lu_lanes_kernel.h"

namespace flowkernels {
namespace FK_TARGET {

constexpr int kPanel = 4;  // columns that are factored together, and rows of a tile: four rows of three vectors are bound by multiply-adds

// Rows of `ld` elements, an odd number of vectors: a power of two would put a whole column into a few sets of the cache.
template <class T>
constexpr int64_t lu_row(int64_t n) {
  return ((n + lanes<T> - 1) / lanes<T> | 1) * lanes<T>;
}

// Where lu_matrices keeps what it works on.
template <class T>
struct LuScratch {
  int64_t n, ld;
  T* a;         // [n][ld]: the matrix, then its factors; zeros beyond column n
  T* x;         // [n][ld]: the inverse
  T* diagonal;  // [ld]: of U
  T* row;       // [kPanel][ld]: rows of U, zero up to the panel's last column
  T* column;    // [kPanel][ld + lanes]: a panel, transposed
  int32_t* permutation;  // [n]: row i of P A is row permutation[i] of A

  int64_t column_ld() const { return ld + lanes<T>; }
};

// how many matrices one call of lu_matrices likes to have at once
template <class T>
int64_t lu_group(int64_t n) {
  return n <= kLargestInLanes ? lanes<T> : 1;
}

template <class T>
int64_t lu_scratch_bytes(int64_t n, bool inverse) {
  if (n <= kLargestInLanes) return sizeof(LuLanes<T>);
  const int64_t ld = lu_row<T>(n);
  return (ld * (n * (inverse ? 2 : 1) + 1 + 2 * kPanel) + kPanel * lanes<T>) * static_cast<int64_t>(sizeof(T)) +
         n * static_cast<int64_t>(sizeof(int32_t));
}

template <class T>
FK_INLINE LuScratch<T> lu_scratch(void* memory, int64_t n, bool inverse) {
  LuScratch<T> s{};
  s.n = n;
  s.ld = lu_row<T>(n);
  s.a = static_cast<T*>(memory);
  s.x = s.a + n * s.ld;
  s.diagonal = inverse ? s.x + n * s.ld : s.x;
  s.row = s.diagonal + s.ld;
  s.column = s.row + kPanel * s.ld;
  s.permutation = reinterpret_cast<int32_t*>(s.column + kPanel * s.column_ld());
  return s;
}

// The first index of the largest |x[i]|, NaN never the largest; 0 where all are NaN. x is followed by a vector of NaN.
template <class T>
FK_INLINE int64_t first_largest(const T* x, int64_t n) {
  Vec<T> best = broadcast<T>(-1);
  IVec<T> best_at{}, at = iota<T>();
  for (int64_t i = 0; i < n; i += lanes<T>) {
    const Vec<T> a = abs(load(x + i));
    const IVec<T> larger = a > best;
    best = select(larger, a, best);
    best_at = larger ? at : best_at;
    at += lanes<T>;
  }
  // without branches: which lane wins cannot be predicted
  T top = best[0];
  for (int lane = 1; lane < lanes<T>; ++lane) top = best[lane] > top ? best[lane] : top;
  const IVec<T> places = best == top ? best_at : IVec<T>{} + INT32_MAX;
  int64_t first = places[0];
  for (int lane = 1; lane < lanes<T>; ++lane) first = places[lane] < first ? places[lane] : first;
  return first;
}

// to[r] -= sum over k < K of coefficient[r][k] * from[k], for R rows of V vectors that stay in registers
template <int R, int V, class T>
FK_INLINE void subtract_tile(T* to, const T* coefficient, int64_t r_stride, int64_t k_stride, const T* from, int64_t ld, int64_t K) {
  Vec<T> sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = load(to + r * ld + v * lanes<T>);
  do {
    Vec<T> f[V];
    for (int v = 0; v < V; ++v) f[v] = load(from + v * lanes<T>);
    for (int r = 0; r < R; ++r) {
      const Vec<T> c = broadcast<T>(-coefficient[r * r_stride]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(c, f[v], sum[r][v]);
    }
    coefficient += k_stride;
    from += ld;
  } while (--K > 0);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(to + r * ld + v * lanes<T>, sum[r][v]);
}

// the same for the columns [begin, end), whole vectors; K >= 1
template <int R, class T>
FK_CALL void subtract_rows(T* to, const T* coefficient, int64_t r_stride, int64_t k_stride, const T* from, int64_t ld, int64_t K,
                           int64_t begin, int64_t end) {
  constexpr int64_t L = lanes<T>;
  int64_t j = begin;
  for (; j + 3 * L <= end; j += 3 * L) subtract_tile<R, 3>(to + j, coefficient, r_stride, k_stride, from + j, ld, K);
  for (; j + 2 * L <= end; j += 2 * L) subtract_tile<R, 2>(to + j, coefficient, r_stride, k_stride, from + j, ld, K);
  for (; j < end; j += L) subtract_tile<R, 1>(to + j, coefficient, r_stride, k_stride, from + j, ld, K);
}

template <class T>
FK_INLINE void exchange_rows(T* one, T* other, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += lanes<T>) {
    const Vec<T> held = load(one + j);
    store(one + j, load(other + j));
    store(other + j, held);
  }
}

// Factors s.a in place. Its pivots go to s.diagonal; the other factors are kept on request alone. Returns whether the permutation is odd.
// `end` is whole_vectors(n), written out: with the call g++ 12 makes code of this function that takes a tenth longer (96 of 48 and 96 rows).
template <class T>
FK_CALL bool factor(const LuScratch<T>& s, bool keep) {
  const int64_t n = s.n, ld = s.ld, column_ld = s.column_ld(), end = (n + lanes<T> - 1) / lanes<T> * lanes<T>;
  bool odd = false;
  for (int64_t i = 0; i < n; ++i) s.permutation[i] = static_cast<int32_t>(i);
  for (int64_t k = 0; k < n; k += kPanel) {
    const int64_t left = n - k, next = k + kPanel < n ? k + kPanel : n, panel = next - k;
    T* top = s.a + k * ld;
    for (int64_t i = 0; i < left; ++i)
      for (int64_t c = 0; c < panel; ++c) s.column[c * column_ld + i] = top[i * ld + k + c];
    for (int64_t c = 0; c < panel; ++c) store(s.column + c * column_ld + left, broadcast<T>(__builtin_nan("")));

    for (int64_t c = 0; c < panel; ++c) {
      T* column = s.column + c * column_ld;
      const int64_t p = c + first_largest(column + c, left - c);
      const T pivot = column[p];
      s.diagonal[k + c] = pivot;
      if (p != c) {
        exchange_rows(top + c * ld, top + p * ld, keep ? 0 : k / lanes<T> * lanes<T>, end);
        for (int64_t d = 0; d < panel; ++d) {
          T* other = s.column + d * column_ld;
          const T held = other[c];
          other[c] = other[p];
          other[p] = held;
        }
        const int32_t held = s.permutation[k + c];
        s.permutation[k + c] = s.permutation[k + p];
        s.permutation[k + p] = held;
        odd = !odd;
      }
      const Vec<T> divisor = broadcast<T>(pivot == 0 ? T(1) : pivot);
      for (int64_t i = c + 1; i < left; i += lanes<T>) store(column + i, load(column + i) / divisor);
      for (int64_t d = c + 1; d < panel; ++d) {
        T* other = s.column + d * column_ld;
        const Vec<T> u = broadcast<T>(-other[c]);
        for (int64_t i = c + 1; i < left; i += lanes<T>) store(other + i, fma(u, load(column + i), load(other + i)));
      }
    }

    if (next < n) {
      const int64_t begin = next / lanes<T> * lanes<T>;
      for (int64_t c = 0; c < panel; ++c) {
        for (int64_t j = begin; j < end; j += lanes<T>) {
          Vec<T> u = load(top + c * ld + j);
          for (int64_t d = 0; d < c; ++d) u = fma(broadcast<T>(-s.column[d * column_ld + c]), load(s.row + d * ld + j), u);
          store(top + c * ld + j, u);
          // zeros, so that whole vectors leave what is left of `next` alone
          store(s.row + c * ld + j, select(iota<T>() >= static_cast<int32_t>(next - j), u, zero<T>()));
        }
      }
      int64_t i = panel;
      for (; i + 4 <= left; i += 4) subtract_rows<4>(top + i * ld, s.column + i, 1, column_ld, s.row, ld, panel, begin, end);
      for (; i < left; ++i) subtract_rows<1>(top + i * ld, s.column + i, 1, column_ld, s.row, ld, panel, begin, end);
    }
    for (int64_t i = 0; keep && i < left; ++i)
      for (int64_t c = 0; c < panel; ++c) top[i * ld + k + c] = s.column[c * column_ld + i];
  }
  return odd;
}

// s.x = U^-1 L^-1 from the factors in s.a, four rows at a time
template <class T>
FK_CALL void invert_factors(const LuScratch<T>& s) {
  const int64_t n = s.n, ld = s.ld, end = (n + lanes<T> - 1) / lanes<T> * lanes<T>;
  const T* a = s.a;
  T* x = s.x;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < end; j += lanes<T>) store(x + i * ld + j, zero<T>());
    x[i * ld + i] = 1;
  }
  for (int64_t i = 0; i < n; i += 4) {  // x = L^-1, which has nothing right of its diagonal
    const int64_t last = smaller(i + 4, n), width = smaller(end, (last - 1) / lanes<T> * lanes<T> + lanes<T>);
    if (i > 0 && last == i + 4) subtract_rows<4>(x + i * ld, a + i * ld, ld, 1, x, ld, i, 0, width);
    for (int64_t r = i; r < last; ++r) {
      const int64_t done = last == i + 4 ? i : 0;
      if (r > done) subtract_rows<1>(x + r * ld, a + r * ld + done, ld, 1, x + done * ld, ld, r - done, 0, width);
    }
  }
  for (int64_t last = n; last > 0; last -= 4) {  // x = U^-1 x
    const int64_t i = last > 4 ? last - 4 : 0;
    if (last < n && last == i + 4) subtract_rows<4>(x + i * ld, a + i * ld + last, ld, 1, x + last * ld, ld, n - last, 0, end);
    for (int64_t r = last - 1; r >= i; --r) {
      const int64_t done = last == i + 4 ? last : n;
      if (done > r + 1) subtract_rows<1>(x + r * ld, a + r * ld + r + 1, ld, 1, x + (r + 1) * ld, ld, done - r - 1, 0, end);
      const Vec<T> divisor = broadcast<T>(a[r * ld + r]);
      for (int64_t j = 0; j < end; j += lanes<T>) store(x + r * ld + j, load(x + r * ld + j) / divisor);
    }
  }
}

// sum of log|d[k]| in ascending k, in double; d is overwritten, up to whole vectors
template <class T>
FK_CALL double sum_of_logs(T* d, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += lanes<T>) store(d + i, log(abs(load(d + i))));
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(d[i]);
  return sum;
}

// In: the tensors' type; T: what is computed in
template <class In, class T>
void lu_matrices(const LuArgs<In>& args, void* scratch, int64_t first, int64_t last) {
  if (args.n <= kLargestInLanes) {
    for (int64_t m = first; m < last; m += lanes<T>) lu_in_lanes(args, *static_cast<LuLanes<T>*>(scratch), m, smaller(m + lanes<T>, last));
    return;
  }
  const LuScratch<T> s = lu_scratch<T>(scratch, args.n, args.inverse != nullptr);
  const int64_t n = s.n, ld = s.ld;
  for (int64_t m = first; m < last; ++m) {
    const In* w = args.matrix(m);
    for (int64_t i = 0; i < n; ++i) {
      const In* from = w + i * args.row_stride;
      T* to = s.a + i * ld;
      store(to + ld - lanes<T>, zero<T>());
      if (ld >= 2 * lanes<T>) store(to + ld - 2 * lanes<T>, zero<T>());
      if (args.column_stride == 1) {
        for (int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(from[j]);
      } else {
        for (int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(from[j * args.column_stride]);
      }
    }
    const bool odd = factor(s, args.inverse != nullptr);
    int sign = odd ? -1 : 1;
    for (int64_t k = 0; k < n; ++k) sign *= (s.diagonal[k] > 0) - (s.diagonal[k] < 0);  // 0 for NaN, as torch.sgn has it
    args.sign[m] = static_cast<In>(sign);
    args.logabsdet[m] = static_cast<In>(sum_of_logs(s.diagonal, n));
    if (args.inverse) {
      invert_factors(s);
      In* to = args.inverse + m * n * n;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) to[i * n + s.permutation[j]] = static_cast<In>(s.x[i * ld + j]);
      }
    }
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
