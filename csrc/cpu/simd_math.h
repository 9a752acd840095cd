// exp, log and their relatives on vectors. No include guard: cpu/for_each_target.h includes this once per instruction set, and
// cuda/device_math.h once for single numbers.
//
// Only IEEE operations and fma in a fixed order, so that the bits are the same on every instruction set and in every lane.
// Each polynomial is a minimax fit of relative error (Remez exchange in 60 digits), its coefficients rounded once.
// Beside each function stands its largest error in units in the last place: over all 2^32 floats, and over 20,000 doubles
// against 40 digits (avx2, gcc 12; avx2 with clang and neon gave the same bits).

namespace flowkernels {
namespace FK_TARGET {

template <class T>
struct Format;  // how a float is laid out, and where exp leaves its range
template <>
struct Format<float> {
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float min_normal = 0x1p-126f;
  static constexpr float exp_low = -104.0f, exp_high = 89.0f;  // beyond them exp is 0 and infinity
  static constexpr float expm1_low = -20.0f, expm1_tiny = 0x1p-25f;  // below them expm1 is -1 and x
  static constexpr float erf_high = 3.95f;
  static constexpr uint32_t root_half = 0x3f3504f3;
  static constexpr float half_pi_low = -0x1.777a5cp-25f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // n * ln2_high is exact
};
template <>
struct Format<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double min_normal = 0x1p-1022;
  static constexpr double exp_low = -746.0, exp_high = 710.0;
  static constexpr double expm1_low = -40.0, expm1_tiny = 0x1p-54;
  static constexpr double erf_high = 5.95;
  static constexpr uint64_t root_half = 0x3fe6a09e667f3bcd;
  static constexpr double half_pi_low = 0x1.1a62633145c07p-54;
  static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
};

template <class T>
struct Coefficients;
template <>
struct Coefficients<float> {
  static constexpr float exp[] = {0x1p-1f, 0x1.555554p-3f, 0x1.5554bp-5f, 0x1.111196p-7f, 0x1.6d72e8p-10f,
      0x1.a01d86p-13f};
  static constexpr float log[] = {-0x1.fffff8p-2f, 0x1.55555p-2f, -0x1.000426p-2f, 0x1.99a3f2p-3f, -0x1.542762p-3f,
      0x1.227196p-3f, -0x1.0f37c6p-3f, 0x1.0848bp-3f, -0x1.382eeap-4f};
  static constexpr float log1p[] = {-0x1.fffffcp-2f, 0x1.55541ap-2f, -0x1.ffcd54p-3f, 0x1.97aec4p-3f, -0x1.4ac4dap-3f,
      0x1.ffd35ep-4f, -0x1.54e4b4p-4f, 0x1.576d58p-5f, -0x1.bb3134p-7f, 0x1.0b158cp-9f};
  static constexpr float erf[] = {0x1.06eba8p-3f, 0x1.45f308p-1f, 0x1.a4f37ep-4f, -0x1.39396cp-6f, -0x1.095a7ep-12f,
      0x1.d7b092p-10f, -0x1.845522p-11f, 0x1.5f3b9p-13f, -0x1.664512p-16f, 0x1.40527ap-20f};
  static constexpr float atan[] = {-0x1.55553ep-2f, 0x1.9991fep-3f, -0x1.2421b6p-3f, 0x1.c099fep-4f, -0x1.583492p-4f,
      0x1.dac9e8p-5f, -0x1.fed168p-6f, 0x1.65a666p-7f, -0x1.d63p-10f};
};

template <>
struct Coefficients<double> {
  static constexpr double exp[] = {0x1p-1, 0x1.5555555555559p-3, 0x1.555555555553dp-5, 0x1.111111110f68ap-7,
      0x1.6c16c16c1fdb4p-10, 0x1.a01a01aff7b8ap-13, 0x1.a01a017769624p-16, 0x1.71ddf81aef577p-19, 0x1.27e5400f0cacbp-22,
      0x1.af5f323317dfcp-26, 0x1.1ed86ce58b92cp-29};
  static constexpr double log[] = {-0x1.0000000000003p-1, 0x1.555555555551ep-2, -0x1.fffffffffdcb1p-3,
      0x1.99999999a119ep-3, -0x1.55555556f1e67p-3, 0x1.2492492279b25p-3, -0x1.fffffef0230a7p-4, 0x1.c71c71beef687p-4,
      -0x1.9999c9c466f26p-4, 0x1.745d4887ddde2p-4, -0x1.55506961b15cep-4, 0x1.3b0a858b444a4p-4, -0x1.24dc8c1d5bdefp-4,
      0x1.11db1e5b8c9c1p-4, -0x1.fb70f3f2ffb4p-5, 0x1.cf94e621d185fp-5, -0x1.d127c52532e33p-5, 0x1.0b73f253946e7p-4,
      -0x1.ec03d5da5ff02p-5, 0x1.acd0e6cb13e47p-6};
  static constexpr double log1p[] = {-0x1.ffffffffffffbp-2, 0x1.5555555554f2fp-2, -0x1.ffffffffbbc0fp-3,
      0x1.9999998e5bd4dp-3, -0x1.55555442ab647p-3, 0x1.2492382bce836p-3, -0x1.fffe8b1b8b0b1p-4, 0x1.c710c94949323p-4,
      -0x1.99533ebb016f9p-4, 0x1.7314a975df7f5p-4, -0x1.509bcf80b5196p-4, 0x1.2d21d5cfd62d3p-4, -0x1.032442dd5cb62p-4,
      0x1.9e4a69642ba98p-5, -0x1.273285242265p-5, 0x1.66eb8fbea1b77p-6, -0x1.637e8125f3b34p-7, 0x1.0fe23d4301cep-8,
      -0x1.2a9d8bf5efa94p-10, 0x1.a0a644366e42cp-13, -0x1.143d37ffeb496p-16};
  static constexpr double erf[] = {0x1.06eba8214db69p-3, 0x1.45f306dc9c885p-1, 0x1.a4f4e2a1b466bp-4,
      -0x1.39668594d53ffp-6, -0x1.b6b684fa87314p-13, 0x1.bca674632607ap-10, -0x1.3564fb2aac163p-11,
      0x1.b2017cf2c35dp-16, 0x1.0e9eaeb8ca7fcp-14, -0x1.f3c4405156c49p-16, 0x1.d82c332c988d6p-19, 0x1.6870448c8da2ap-19,
      -0x1.a843848dff77ap-20, 0x1.a790ca024162dp-23, 0x1.f70943a7134d1p-23, -0x1.a639c604d178p-23,
      0x1.86356ffad0387p-24, -0x1.03f0744910057p-25, 0x1.0ac42e7855616p-27, -0x1.adaba083f6dadp-30,
      0x1.0ede1355d0936p-32, -0x1.06bd0b3dc596p-35, 0x1.7b1d5fe748b4p-39, -0x1.7f5827ce4ee32p-43, 0x1.e4b187683a496p-48,
      -0x1.2036b4f28ea1cp-53};
  static constexpr double atan[] = {-0x1.5555555555526p-2, 0x1.9999999995549p-3, -0x1.249249237e29p-3,
      0x1.c71c717f9598ap-4, -0x1.745d11ab02b1ap-4, 0x1.3b1366769d7bap-4, -0x1.110e50215c4f2p-4, 0x1.e1bb9b4df2e61p-5,
      -0x1.ae5e44f46b229p-5, 0x1.82da4656d5c29p-5, -0x1.59a2989446405p-5, 0x1.2c2ba85efa99cp-5, -0x1.e9f1e0d2cc03ap-6,
      0x1.68332ab8be617p-6, -0x1.c77e5ee53756cp-7, 0x1.d7a1536dd5afap-8, -0x1.7a21d8cd98026p-9, 0x1.b3da3515fea8fp-11,
      -0x1.3f1ad1ec16b4ap-13, 0x1.bbc2ac883213ep-17};
};

// The coefficients are a template argument: device code may use the values of a constexpr array, but not the array.
template <const auto& C, int K, class V>
FK_INLINE V polynomial_from(V x, V x2) {
  using T = scalar_t<V>;
  constexpr int N = sizeof(C) / sizeof(T);
  constexpr T c = C[K];
  if constexpr (K == N - 1) {
    return broadcast<T>(c);
  } else {
    constexpr T next = C[K + 1];
    const V pair = fma(x, next, c);
    if constexpr (K == N - 2) {
      return pair;
    } else {
      return fma(polynomial_from<C, K + 2>(x, x2), x2, pair);
    }
  }
}

// C[0] + C[1] x + C[2] x^2 + ..., by Horner's rule in x^2: its chain of dependent operations is half as long as in x
template <const auto& C, class V>
FK_INLINE V polynomial(V x) {
  return polynomial_from<C, 0>(x, x * x);
}

template <class V>
struct Reduced {
  V r;                         // x - n ln 2, |r| <= ln 2 / 2
  V n;                         // the nearest integer to x / ln 2
  UVec<scalar_t<V>> exponent;  // n + OFFSET in the lowest bits
};

template <int OFFSET, class V>
FK_INLINE Reduced<V> reduce_exp(V x) {
  using T = scalar_t<V>;
  using F = Format<T>;
  static_assert(OFFSET % 2 == 0);  // or ties would go the other way
  // adding 1.5 * 2^mantissa leaves the rounded integer in the lowest bits
  constexpr T shift = T(3ull << (F::mantissa - 1)) + OFFSET;
  const V t = fma(x, T(1.44269504088896340736), shift);
  const V n = t - shift;
  return {fma(n, -F::ln2_low, fma(n, -F::ln2_high, x)), n, bits(t)};
}

// exp(r) for |r| <= ln 2 / 2
template <class V>
FK_INLINE V exp_reduced(V r) {
  using T = scalar_t<V>;
  return fma(r, fma(r, polynomial<Coefficients<T>::exp>(r), T(1)), T(1));
}

// exp(r) - 1 for |r| <= ln 2 / 2
template <class V>
FK_INLINE V expm1_reduced(V r) {
  return fma(r * r, polynomial<Coefficients<scalar_t<V>>::exp>(r), r);
}

// 0.89 ulp; double 0.83
template <class V>
FK_INLINE V exp(V x) {
  using T = scalar_t<V>;
  using F = Format<T>;
  const Reduced<V> t = reduce_exp<2 * F::bias>(at_least(at_most(x, F::exp_high), F::exp_low));
  const V p = exp_reduced(t.r);
  // 2^n in two factors: the first product is exact, the second overflows or becomes subnormal with one rounding
  const UVec<T> half = t.exponent >> 1, rest = t.exponent - half;
  return p * from_bits<T>(half << F::mantissa) * from_bits<T>(rest << F::mantissa);
}

// exp(x) for x <= 0: the same bits, for a fifth less
template <class V>
FK_INLINE V exp_of_nonpositive(V x) {
  using T = scalar_t<V>;
  using F = Format<T>;
  constexpr int up = 65;  // 2^(n + up) is normal, and the product with 2^-up is rounded once
  const Reduced<V> t = reduce_exp<F::bias + up>(at_least(x, F::exp_low));
  return exp_reduced(t.r) * from_bits<T>(t.exponent << F::mantissa) * T(0x1p-65);
}

// exp(x) - 1 for x < 80, without keeping -0
template <class V>
FK_INLINE V expm1_bounded(V x) {
  using T = scalar_t<V>;
  using F = Format<T>;
  const Reduced<V> t = reduce_exp<2 * F::bias>(at_least(x, F::expm1_low));
  const V scale = from_bits<T>((t.exponent - F::bias) << F::mantissa);
  return fma(expm1_reduced(t.r), scale, scale - T(1));
}

// 1.46 ulp; double 1.73
template <class V>
FK_INLINE V expm1(V x) {
  using T = scalar_t<V>;
  using F = Format<T>;
  const Reduced<V> t = reduce_exp<2 * F::bias>(at_least(at_most(x, F::exp_high), F::expm1_low));
  // half of the result, because 2^n may be out of range when the result is not
  const V scale = from_bits<T>((t.exponent - (F::bias + 1)) << F::mantissa);
  const V y = fma(expm1_reduced(t.r), scale, scale - T(0.5)) * T(2);
  return select(abs(x) < F::expm1_tiny, x, y);
}

// k ln 2 + log(1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
template <class V>
FK_INLINE V log_reduced(V k, V f) {
  using T = scalar_t<V>;
  using F = Format<T>;
  const V tail = f * f * polynomial<Coefficients<T>::log>(f);
  const V high = k * F::ln2_high;
  const V sum = high + f;
  const V lost = f - (sum - high);  // exact, as |high| > |f| or high = 0
  return sum + (fma(k, F::ln2_low, lost) + tail);
}

template <class V>
struct Split {
  V k, m;                      // x = 2^k m, sqrt(1/2) <= m < sqrt(2)
  UVec<scalar_t<V>> exponent;  // k + bias
};

// of a normal, finite x > 0
template <class V>
FK_INLINE Split<V> split(V x) {
  using T = scalar_t<V>;
  using F = Format<T>;
  using U = decltype(sign_bit<T>);
  constexpr U one = U(F::bias) << F::mantissa, fraction = (U(1) << F::mantissa) - 1;
  constexpr T shift = T(1ull << F::mantissa) + F::bias;
  constexpr U shift_bits = U(F::bias + F::mantissa) << F::mantissa;
  const UVec<T> t = bits(x) + (one - F::root_half);
  const UVec<T> exponent = t >> F::mantissa;
  return {from_bits<T>(exponent | shift_bits) - shift, from_bits<T>((t & fraction) + F::root_half), exponent};
}

// y where x is positive and finite; else the limits of a logarithm: -inf at 0, inf at inf, NaN below 0 and of NaN
template <class V>
FK_INLINE V log_limits(V x, V y) {
  using T = scalar_t<V>;
  constexpr T inf = __builtin_inf();
  const V at_zero = select(x == T(0), broadcast<T>(-inf), broadcast<T>(__builtin_nan("")));
  return select(x > T(0), select(x < inf, y, x), at_zero);
}

// 0.92 ulp; double 0.90
template <class V>
FK_INLINE V log(V x) {
  using T = scalar_t<V>;
  using F = Format<T>;
  constexpr T up = T(1ull << F::mantissa);
  const auto subnormal = x < F::min_normal;
  const Split<V> t = split(select(subnormal, x * up, x));
  const V k = select(subnormal, t.k - T(F::mantissa), t.k);
  return log_limits(x, log_reduced(k, t.m - T(1)));
}

// log(1 + d) where near_one, without the rounding of 1 + d; log(u) elsewhere. u is 1 + d where near_one.
template <class M, class V>
FK_INLINE V log_or_log1p(M near_one, V u, V d) {
  using T = scalar_t<V>;
  using F = Format<T>;
  const Split<V> t = split(u);
  const V scale = from_bits<T>((2 * F::bias - t.exponent) << F::mantissa);  // 2^-k
  const V f = select(near_one, fma(d, scale, scale - T(1)), t.m - T(1));
  return log_limits(u, log_reduced(t.k, f));
}

// log(1 + x) for 0 <= x <= 1
template <class V>
FK_INLINE V log1p_unit(V x) {
  return fma(x * x, polynomial<Coefficients<scalar_t<V>>::log1p>(x), x);
}

// 2.43 ulp; double 2.02. By t = exp(2 |x|) - 1, whose error fades in t / (t + 2) as it grows.
template <class V>
FK_INLINE V tanh(V x) {
  using T = scalar_t<V>;
  const V t = expm1_bounded(at_most(abs(x) * T(2), -Format<T>::expm1_low));
  return with_sign_of(t / (t + T(2)), x);
}

// sigmoid and softplus of x, given e = exp(-|x|)
template <class V>
FK_INLINE V sigmoid_of(V x, V e) {
  using T = scalar_t<V>;
  return select(x > T(0), broadcast<T>(1), e) / (e + T(1));
}
template <class V>
FK_INLINE V softplus_of(V x, V e) {
  return log1p_unit(e) + at_least(x, scalar_t<V>(0));
}

// 2.41 ulp; double 2.27. Subnormal, not 0, at -100.
template <class V>
FK_INLINE V sigmoid(V x) {
  return sigmoid_of(x, exp_of_nonpositive(-abs(x)));
}

// 1.98 ulp; double 1.71
template <class V>
FK_INLINE V softplus(V x) {
  return softplus_of(x, exp_of_nonpositive(-abs(x)));
}

// 1.78 ulp; double 1.46. log(1 - erf(a)) = -a (1 + P(a)), a fit whose error is relative to erf
template <class V>
FK_INLINE V erf(V x) {
  using T = scalar_t<V>;
  const V a = at_most(abs(x), Format<T>::erf_high);
  return with_sign_of(expm1_bounded(-fma(a, polynomial<Coefficients<T>::erf>(a), a)), x);
}

// 1.49 ulp; double 1.80
template <class V>
FK_INLINE V atan(V x) {
  using T = scalar_t<V>;
  constexpr T half_pi = T(1.57079632679489661923);
  constexpr T half_pi_low = Format<T>::half_pi_low;
  const V a = abs(x);
  const auto big = a > T(1);
  const V b = select(big, T(1) / a, a);
  const V z = b * b;
  const V y = fma(b * z, polynomial<Coefficients<T>::atan>(z), b);
  return with_sign_of(select(big, half_pi - (y - half_pi_low), y), x);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
