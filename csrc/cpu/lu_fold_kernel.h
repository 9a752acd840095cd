// W = P L U diag(exp(log_scale)) or its inverse, and their gradients, one matrix at a time and all in float64. No include guard:
// cpu/for_each_target.h includes this once per instruction set.

#include "cpu/small_matmul.h"

namespace flowkernels {
namespace FK_TARGET {

FK_INLINE void add_multiple(double* to, double factor, const double* from, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) to[j] += factor * from[j];
}

template <class T>
class LuFold {
 public:
  static int64_t scratch_size(int64_t n, bool backward) { return (backward ? 5 : 3) * rows(n) * width(n, backward) + 2 * n; }

  // The matrices in scratch: u_, a_ and, forward, b_ lie in rows of w_ elements, those of the gradient in rows of n.
  LuFold(const LuFoldArgs<T>& a, double* scratch, bool backward)
      : args(a), n(a.n), w_(width(n, backward)), u_(scratch), a_(u_ + rows(n) * w_), b_(a_ + rows(n) * w_), d_(b_ + rows(n) * w_), dls_(d_ + n),
        c_(dls_ + n), e_(c_ + n * n) {}

  void forward(int64_t m) {
    prepare(m);
    T* weight = args.weight + m * n * n;
    const int64_t* row = args.row[m];
    if (!args.inverse) {
      multiply(m);
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t j = 0; j < n; ++j) weight[r * n + j] = static_cast<T>(a_[row[r] * w_ + j] * d_[j]);
      }
    } else {
      invert(m);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t r = 0; r < n; ++r) weight[i * n + r] = static_cast<T>(a_[i * w_ + row[r]] / d_[i]);
      }
    }
    double logabsdet = 0;
    for (int64_t k = 0; k < n; ++k) logabsdet += args.log_diagonal[m][k];
    for (int64_t k = 0; k < n && args.log_scale; ++k) logabsdet += args.log_scale[m][k];
    args.logabsdet[m] = static_cast<T>(args.inverse ? -logabsdet : logabsdet);
  }

  // lu_fold_backward_reference says what is what
  void backward(int64_t m) {
    prepare(m);
    const int64_t* row = args.row[m];
    const T *g = args.dweight + m * n * n, *w = args.composed + m * n * n, *factors = args.factors[m];
    double* da = b_;  // [n][n], of A = L U
    for (int64_t j = 0; j < n; ++j) dls_[j] = 0;
    if (!args.inverse) {
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t j = 0; j < n; ++j) {
          dls_[j] += static_cast<double>(g[r * n + j]) * w[r * n + j];
          da[row[r] * n + j] = g[r * n + j] * d_[j];
        }
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) dls_[i] -= static_cast<double>(g[i * n + j]) * w[i * n + j];
      }
      // -w^T g w^T, its columns scaled
      for (int64_t i = 0; i < n * n; ++i) c_[i] = 0;
      for (int64_t k = 0; k < n; ++k) {
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < n; ++j) c_[i * n + j] -= static_cast<double>(w[k * n + i]) * g[k * n + j];
        }
      }
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t k = 0; k < n; ++k) e_[k * n + j] = w[j * n + k];
      }
      for (int64_t r = 0; r < n; ++r) {
        double* to = da + row[r] * n;
        for (int64_t j = 0; j < n; ++j) to[j] = 0;
        for (int64_t k = 0; k < n; ++k) add_multiple(to, c_[r * n + k], e_ + k * n, 0, n);
        for (int64_t j = 0; j < n; ++j) to[j] *= d_[j];
      }
    }
    // dL = dA U^T below the diagonal, dU = L^T dA on it and above
    double *dl = c_, *du = a_;
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t j = k; j < n; ++j) e_[j * n + k] = u_[k * n + j];
    }
    for (int64_t i = 0; i < n; ++i) {
      double* to = dl + i * n;
      for (int64_t k = 0; k < n; ++k) to[k] = 0;
      for (int64_t j = 0; j < n; ++j) add_multiple(to, da[i * n + j], e_ + j * n, 0, j + 1 < i ? j + 1 : i);
      for (int64_t j = 0; j < n; ++j) du[i * n + j] = da[i * n + j];
      for (int64_t k = 0; k < i; ++k) add_multiple(du + k * n, factors[i * n + k], da + i * n, k, n);
    }
    const double c = args.inverse ? -static_cast<double>(args.dlogabsdet[m]) : static_cast<double>(args.dlogabsdet[m]);
    for (int64_t i = 0; i < n; ++i) {
      T* to = args.dfactors + (m * n + i) * n;
      for (int64_t k = 0; k < i; ++k) to[k] = static_cast<T>(dl[i * n + k]);
      to[i] = T(0);
      for (int64_t j = i + 1; j < n; ++j) to[j] = static_cast<T>(du[i * n + j]);
      args.dlog_diagonal[m * n + i] = static_cast<T>(du[i * n + i] * u_[i * n + i] + c);
      if (args.dlog_scale) args.dlog_scale[m * n + i] = static_cast<T>(dls_[i] + c);
    }
  }

 private:
  static double exp_of(double x) { return exp(broadcast(x))[0]; }

  static constexpr int64_t kRows = 4;  // that are computed together

  static int64_t rows(int64_t n) { return (n + kRows - 1) / kRows * kRows; }
  static int64_t width(int64_t n, bool backward) { return backward ? n : whole_vectors<double>(n); }

  // u = U, d = exp(log_scale)
  void prepare(int64_t m) {
    const T* factors = args.factors[m];
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t j = 0; j < w_; ++j) u_[k * w_ + j] = k < j && j < n ? static_cast<double>(factors[k * n + j]) : 0;
      u_[k * w_ + k] = args.sign[m][k] * exp_of(args.log_diagonal[m][k]);
      d_[k] = args.log_scale ? exp_of(args.log_scale[m][k]) : 1;
    }
  }

  // l = sign * L below the diagonal
  double* lower(int64_t m, double sign) {
    double* l = b_;
    const T* factors = args.factors[m];
    for (int64_t i = 0; i < rows(n); ++i)
      for (int64_t j = 0; j < w_; ++j) l[i * w_ + j] = j < i && i < n ? sign * static_cast<double>(factors[i * n + j]) : 0;
    return l;
  }

  // kRows rows of a from i on += those of `left`, columns k0 to k1, times rows k0 to k1 of `right`
  void add_products(int64_t i, const double* left, int64_t k0, int64_t k1, const double* right) {
    if (k0 >= k1) return;
    constexpr int64_t L = lanes<double>;
    const auto columns = [&](int64_t j, auto vectors) FK_BODY {
      matmul_block<double, kRows, decltype(vectors)::value, true>(k1 - k0, left + i * w_ + k0, w_, 1, right + k0 * w_ + j, w_, a_ + i * w_ + j, w_);
    };
    int64_t j = 0;
    for (; j + 3 * L <= w_; j += 3 * L) columns(j, std::integral_constant<int, 3>{});
    for (; j < w_; j += L) columns(j, std::integral_constant<int, 1>{});
  }

  // a = L U
  void multiply(int64_t m) {
    const double* l = lower(m, 1);
    for (int64_t i = 0; i < n * w_; ++i) a_[i] = u_[i];
    for (int64_t i0 = 0; i0 < n; i0 += kRows) {
      add_products(i0, l, 0, i0, u_);
      for (int64_t i = i0; i < smaller(i0 + kRows, n); ++i)
        for (int64_t k = i0; k < i; ++k) add_multiple(a_ + i * w_, l[i * w_ + k], u_ + k * w_, k, n);
    }
  }

  // a = U^-1 L^-1
  void invert(int64_t m) {
    const double* l = lower(m, -1);
    for (int64_t i = 0; i < rows(n); ++i)
      for (int64_t j = 0; j < w_; ++j) a_[i * w_ + j] = i == j;
    for (int64_t i0 = 0; i0 < n; i0 += kRows) {
      add_products(i0, l, 0, i0, a_);
      for (int64_t i = i0; i < smaller(i0 + kRows, n); ++i)
        for (int64_t k = i0; k < i; ++k) add_multiple(a_ + i * w_, l[i * w_ + k], a_ + k * w_, 0, k + 1);
    }
    for (int64_t k = 0; k < n; ++k)
      for (int64_t j = k + 1; j < n; ++j) u_[k * w_ + j] = -u_[k * w_ + j];
    for (int64_t i0 = rows(n) - kRows; i0 >= 0; i0 -= kRows) {
      add_products(i0, u_, i0 + kRows, n, a_);
      for (int64_t i = smaller(i0 + kRows, n) - 1; i >= i0; --i) {
        double* to = a_ + i * w_;
        for (int64_t k = i + 1; k < smaller(i0 + kRows, n); ++k) add_multiple(to, u_[i * w_ + k], a_ + k * w_, 0, n);
        for (int64_t j = 0; j < n; ++j) to[j] /= u_[i * w_ + i];
      }
    }
  }

  const LuFoldArgs<T>& args;
  const int64_t n, w_;
  double *u_, *a_, *b_, *d_, *dls_, *c_, *e_;
};

inline int64_t lu_fold_scratch(int64_t n, bool backward) { return LuFold<double>::scratch_size(n, backward); }

template <class T>
FK_CALL void lu_fold_matrices(const LuFoldArgs<T>& args, double* scratch, bool backward, int64_t first, int64_t last) {
  LuFold<T> fold(args, scratch, backward);
  for (int64_t m = first; m < last; ++m) backward ? fold.backward(m) : fold.forward(m);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
