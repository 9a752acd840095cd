// The vector type of one instruction set. No include guard: cpu/for_each_target.h includes this once per instruction set.
//
// Vec<T> is a vector of GCC's and clang's own kind, so + - * / and comparisons work, also with a scalar. Operations that the
// language lacks are here; all of them round as IEEE 754 says, so every instruction set gives the same bits.

namespace flowkernels {
namespace FK_TARGET {

FK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
FK_INLINE void fill(T* to, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FK_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(FK_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(FK_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FK_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(FK_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(FK_VECTOR_BYTES)));
};

template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using IVec = typename VecOf<T>::mask;  // what comparisons give: -1 true, 0 false
template <class T>
using UVec = typename VecOf<T>::bits;

template <class T>
constexpr int lanes = FK_VECTOR_BYTES / static_cast<int>(sizeof(T));

// n elements, rounded up to whole vectors. Not FK_INLINE: code outside of the target's region calls it too.
template <class T>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

template <class V>
struct ScalarOf;
template <>
struct ScalarOf<Vec<float>> {
  using type = float;
};
template <>
struct ScalarOf<Vec<double>> {
  using type = double;
};
template <class V>
using scalar_t = typename ScalarOf<V>::type;

template <class T>
FK_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // x - 0 keeps -0; the compiler turns it into one broadcast
}

template <class T>
FK_INLINE Vec<T> zero() {
  return Vec<T>{};
}

// Where the element n further on would lie, to be asked for ahead: what does not exist there is ignored.
template <class T>
FK_INLINE const void* ahead(const T* p, int64_t n) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + n * sizeof(T));
}

// the same for code that is also written for scalars
template <class V>
FK_INLINE V splat(scalar_t<V> value) {
  return broadcast<scalar_t<V>>(value);
}

template <class T>
FK_INLINE IVec<T> iota() {
  IVec<T> v{};
  for (int i = 0; i < lanes<T>; ++i) v[i] = i;
  return v;
}

// ---- memory, of any alignment; the partial ones touch the first n elements alone, 0 <= n <= lanes

template <class T>
FK_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
FK_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

#if defined(FK_TARGET_AVX512) || defined(FK_TARGET_WIDE)
constexpr bool kSlowPartialStores = false;
#else
constexpr bool kSlowPartialStores = true;
#endif

#if defined(FK_TARGET_AVX2)

FK_INLINE Vec<float> load_partial(const float* p, int n) { return _mm256_maskload_ps(p, (__m256i)(iota<float>() < n)); }
FK_INLINE Vec<double> load_partial(const double* p, int n) { return _mm256_maskload_pd(p, (__m256i)(iota<double>() < n)); }
// A masked store takes a Zen 4 without AVX-512 twelve cycles, these a third and less.
FK_INLINE void store_partial(float* p, Vec<float> v, int n) {
  if (n == lanes<float>) return store(p, v);
  __m128 left = _mm256_castps256_ps128(v);
  if (n & 4) {
    _mm_storeu_ps(p, left);
    left = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), left);
    left = _mm_movehl_ps(left, left);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, left);
}
FK_INLINE void store_partial(double* p, Vec<double> v, int n) {
  if (n == lanes<double>) return store(p, v);
  __m128d left = _mm256_castpd256_pd128(v);
  if (n & 2) {
    _mm_storeu_pd(p, left);
    left = _mm256_extractf128_pd(v, 1);
    p += 2;
  }
  if (n & 1) _mm_store_sd(p, left);
}

FK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
FK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
// at_most and at_least keep a's NaN, and a where it equals the limit, which must not be NaN
FK_INLINE Vec<float> at_most(Vec<float> a, Vec<float> limit) { return _mm256_min_ps(limit, a); }
FK_INLINE Vec<double> at_most(Vec<double> a, Vec<double> limit) { return _mm256_min_pd(limit, a); }
FK_INLINE Vec<float> at_least(Vec<float> a, Vec<float> limit) { return _mm256_max_ps(limit, a); }
FK_INLINE Vec<double> at_least(Vec<double> a, Vec<double> limit) { return _mm256_max_pd(limit, a); }

#elif defined(FK_TARGET_AVX512)  // with the mask of all lanes where gcc 12 would warn of its own headers otherwise

FK_INLINE Vec<float> load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
FK_INLINE Vec<double> load_partial(const double* p, int n) { return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p); }
FK_INLINE void store_partial(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v); }
FK_INLINE void store_partial(double* p, Vec<double> v, int n) { _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), v); }

FK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
FK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
FK_INLINE Vec<float> at_most(Vec<float> a, Vec<float> limit) { return _mm512_maskz_min_ps((__mmask16)-1, limit, a); }
FK_INLINE Vec<double> at_most(Vec<double> a, Vec<double> limit) { return _mm512_maskz_min_pd((__mmask8)-1, limit, a); }
FK_INLINE Vec<float> at_least(Vec<float> a, Vec<float> limit) { return _mm512_maskz_max_ps((__mmask16)-1, limit, a); }
FK_INLINE Vec<double> at_least(Vec<double> a, Vec<double> limit) { return _mm512_maskz_max_pd((__mmask8)-1, limit, a); }

#else  // NEON, or vectors of its or of AVX-512's length on any x86

template <class T>
FK_INLINE Vec<T> load_partial(const T* p, int n) {
  Vec<T> v{};
  for (int i = 0; i < lanes<T>; ++i) {
    if (i < n) v[i] = p[i];
  }
  return v;
}
template <class T>
FK_INLINE void store_partial(T* p, Vec<T> v, int n) {
  for (int i = 0; i < lanes<T>; ++i) {
    if (i < n) p[i] = v[i];
  }
}

#if defined(FK_TARGET_NEON)
FK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return vfmaq_f32(c, a, b); }
FK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return vfmaq_f64(c, a, b); }
#elif defined(FK_TARGET_WIDE)
template <class V>
struct TwoHalves {
  typedef scalar_t<V> type __attribute__((vector_size(FK_VECTOR_BYTES / 2)));
  type part[2];
};
template <class V>
FK_INLINE TwoHalves<V> two_halves(V v) {
  return __builtin_bit_cast(TwoHalves<V>, v);
}
template <class F, class V, class... Vs>
FK_INLINE V by_halves(F f, V a, Vs... more) {
  const auto first = f(two_halves(a).part[0], two_halves(more).part[0]...), second = f(two_halves(a).part[1], two_halves(more).part[1]...);
  return __builtin_bit_cast(V, TwoHalves<V>{{first, second}});
}
FK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return by_halves([](__m256 x, __m256 y, __m256 z) FK_BODY { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
FK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return by_halves([](__m256d x, __m256d y, __m256d z) FK_BODY { return _mm256_fmadd_pd(x, y, z); }, a, b, c);
}
#else
FK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm_fmadd_ps(a, b, c); }
FK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm_fmadd_pd(a, b, c); }
#endif
template <class V>
FK_INLINE V at_most(V a, V limit) {
  return limit < a ? limit : a;
}
template <class V>
FK_INLINE V at_least(V a, V limit) {
  return limit > a ? limit : a;
}

#endif

// ---- lanes as a whole

#if defined(FK_TARGET_AVX2)

FK_INLINE bool any(IVec<float> mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
FK_INLINE bool any(IVec<double> mask) { return _mm256_movemask_pd((__m256d)mask) != 0; }

FK_INLINE void transpose(Vec<float> (&rows)[8]) {
  Vec<float> pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}
FK_INLINE void transpose(Vec<double> (&rows)[4]) {
  const Vec<double> low[2] = {_mm256_unpacklo_pd(rows[0], rows[1]), _mm256_unpacklo_pd(rows[2], rows[3])};
  const Vec<double> high[2] = {_mm256_unpackhi_pd(rows[0], rows[1]), _mm256_unpackhi_pd(rows[2], rows[3])};
  rows[0] = _mm256_permute2f128_pd(low[0], low[1], 0x20);
  rows[1] = _mm256_permute2f128_pd(high[0], high[1], 0x20);
  rows[2] = _mm256_permute2f128_pd(low[0], low[1], 0x31);
  rows[3] = _mm256_permute2f128_pd(high[0], high[1], 0x31);
}

#elif defined(FK_TARGET_NEON)

FK_INLINE bool any(IVec<float> mask) { return vmaxvq_u32((uint32x4_t)mask) != 0; }
FK_INLINE bool any(IVec<double> mask) { return vmaxvq_u32((uint32x4_t)mask) != 0; }

FK_INLINE void transpose(Vec<float> (&rows)[4]) {
  const Vec<double> even[2] = {(Vec<double>)vtrn1q_f32(rows[0], rows[1]), (Vec<double>)vtrn1q_f32(rows[2], rows[3])};
  const Vec<double> odd[2] = {(Vec<double>)vtrn2q_f32(rows[0], rows[1]), (Vec<double>)vtrn2q_f32(rows[2], rows[3])};
  rows[0] = (Vec<float>)vtrn1q_f64(even[0], even[1]);
  rows[1] = (Vec<float>)vtrn1q_f64(odd[0], odd[1]);
  rows[2] = (Vec<float>)vtrn2q_f64(even[0], even[1]);
  rows[3] = (Vec<float>)vtrn2q_f64(odd[0], odd[1]);
}
FK_INLINE void transpose(Vec<double> (&rows)[2]) {
  const Vec<double> first = rows[0];
  rows[0] = vtrn1q_f64(first, rows[1]);
  rows[1] = vtrn2q_f64(first, rows[1]);
}

#else

#if defined(FK_TARGET_AVX512)
FK_INLINE bool any(IVec<float> mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
FK_INLINE bool any(IVec<double> mask) { return _mm512_movepi64_mask((__m512i)mask) != 0; }
#elif defined(FK_TARGET_WIDE)
template <class M>
FK_INLINE bool any(M mask) {
  int64_t words[FK_VECTOR_BYTES / 8], found = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (int64_t word : words) found |= word;
  return found != 0;
}
#else
FK_INLINE bool any(IVec<float> mask) { return _mm_movemask_ps((__m128)mask) != 0; }
FK_INLINE bool any(IVec<double> mask) { return _mm_movemask_pd((__m128d)mask) != 0; }
#endif

template <class V, int n>
FK_INLINE void transpose(V (&rows)[n]) {
  V columns[n]{};
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) columns[i][j] = rows[j][i];
  for (int i = 0; i < n; ++i) rows[i] = columns[i];
}

#endif

// ---- elementwise, for vectors of either type

template <class M, class V>
FK_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

template <class V>
FK_INLINE UVec<scalar_t<V>> bits(V a) {
  return (UVec<scalar_t<V>>)a;
}
template <class T>
FK_INLINE Vec<T> from_bits(UVec<T> a) {
  return (Vec<T>)a;
}

template <class T>
constexpr auto sign_bit = typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type{1} << (8 * sizeof(T) - 1);

template <class V>
FK_INLINE V abs(V a) {
  using T = scalar_t<V>;
  return from_bits<T>(bits(a) & ~sign_bit<T>);
}

template <class V>
FK_INLINE V with_sign_of(V a, V b) {
  using T = scalar_t<V>;
  return from_bits<T>((bits(a) & ~sign_bit<T>) | (bits(b) & sign_bit<T>));
}

template <class V>
FK_INLINE V at_most(V a, scalar_t<V> limit) {
  return at_most(a, broadcast<scalar_t<V>>(limit));
}
template <class V>
FK_INLINE V at_least(V a, scalar_t<V> limit) {
  return at_least(a, broadcast<scalar_t<V>>(limit));
}

FK_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FK_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

template <class V>
FK_INLINE V fma(V a, V b, scalar_t<V> c) {
  return fma(a, b, broadcast<scalar_t<V>>(c));
}
template <class V>
FK_INLINE V fma(V a, scalar_t<V> b, V c) {
  return fma(a, broadcast<scalar_t<V>>(b), c);
}
template <class V>
FK_INLINE V fma(V a, scalar_t<V> b, scalar_t<V> c) {
  return fma(a, broadcast<scalar_t<V>>(b), broadcast<scalar_t<V>>(c));
}

// The sum of all lanes, always as the same tree for one number of lanes. Kernels whose result must not depend on the number of
// lanes sum in another way.
template <class V>
FK_INLINE scalar_t<V> horizontal_sum(V a) {
  constexpr int n = lanes<scalar_t<V>>;
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  }
  return a[0];
}

}  // namespace FK_TARGET
}  // namespace flowkernels
