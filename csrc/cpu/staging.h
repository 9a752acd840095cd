// Moving blocks of elements between tensors of any strides and element type and packed buffers of the type that is computed in,
// and sums in a fixed order. No include guard: kernel headers include this once per instruction set.
//
// A block is `rows` rows of `n` elements; packed, the rows follow each other without a gap. Every function reads and writes the
// elements of the block alone, except that packed buffers may be read up to one vector beyond their end.

#include "cpu/shuffles.h"

namespace flowkernels {
namespace FK_TARGET {

// ---- half precision

typedef uint16_t Halves __attribute__((vector_size(FK_VECTOR_BYTES / 2)));  // as many as there are float lanes

FK_INLINE UVec<float> widened(Halves h) { return __builtin_convertvector(h, UVec<float>); }
FK_INLINE Halves narrowed(UVec<float> u) { return __builtin_convertvector(u, Halves); }

FK_INLINE Vec<float> float_of_bfloat16(Halves h) { return from_bits<float>(widened(h) << 16); }

FK_INLINE Halves bfloat16_of_float(Vec<float> v) {
  const UVec<float> u = bits(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return narrowed(v != v ? UVec<float>{} + 0x7fc0u : rounded);
}

FK_INLINE Vec<float> float_of_float16(Halves h) {
  constexpr uint32_t exponent = 0x7c00u << 13, rebias = 112u << 23;
  const UVec<float> u = widened(h), magnitude = (u & 0x7fffu) << 13, is = magnitude & exponent;
  const UVec<float> special = magnitude + 2 * rebias, normal = magnitude + rebias;
  const Vec<float> subnormal = from_bits<float>(magnitude + (113u << 23)) - 0x1p-14f;
  const UVec<float> value = is == exponent ? special : (is == 0u ? bits(subnormal) : normal);
  return from_bits<float>(value | ((u & 0x8000u) << 16));
}

FK_INLINE Halves float16_of_float(Vec<float> v) {  // to the nearest, ties to even
  const UVec<float> u = bits(v), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const UVec<float> normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const UVec<float> subnormal = bits(from_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const UVec<float> special = magnitude > 0x7f800000u ? UVec<float>{} + 0x7e00u : UVec<float>{} + 0x7c00u;
  const UVec<float> value = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  return narrowed(value | sign);
}

template <class F>
FK_INLINE void widen_by(F convert, const Half* from, int64_t n, float* to) {
  Halves h;
  int64_t i = 0;
  for (; i + lanes<float> <= n; i += lanes<float>) {
    __builtin_memcpy(&h, from + i, sizeof h);
    store(to + i, convert(h));
  }
  if (i < n) {
    h = Halves{};
    __builtin_memcpy(&h, from + i, (n - i) * sizeof(Half));
    store_partial(to + i, convert(h), static_cast<int>(n - i));
  }
}

template <class F>
FK_INLINE void narrow_by(F convert, const float* from, int64_t n, Half* to) {
  int64_t i = 0;
  for (; i + lanes<float> <= n; i += lanes<float>) {
    const Halves h = convert(load(from + i));
    __builtin_memcpy(to + i, &h, sizeof h);
  }
  if (i < n) {
    const Halves h = convert(load_partial(from + i, static_cast<int>(n - i)));
    __builtin_memcpy(to + i, &h, (n - i) * sizeof(Half));
  }
}

FK_CALL void widen(bool bfloat16, const Half* from, int64_t n, float* to) {
  if (bfloat16) return widen_by([](Halves h) { return float_of_bfloat16(h); }, from, n, to);
  widen_by([](Halves h) { return float_of_float16(h); }, from, n, to);
}

FK_CALL void narrow(bool bfloat16, const float* from, int64_t n, Half* to) {
  if (bfloat16) return narrow_by([](Vec<float> v) { return bfloat16_of_float(v); }, from, n, to);
  narrow_by([](Vec<float> v) { return float16_of_float(v); }, from, n, to);
}

// ---- moving elements

template <class W>
FK_INLINE W load_words(const void* p) {
  W w;
  __builtin_memcpy(&w, p, sizeof w);
  return w;
}

typedef unsigned char Bytes __attribute__((vector_size(FK_VECTOR_BYTES)));

template <int N>
FK_INLINE void copy_fixed(const char* from, char* to) {
  __builtin_memcpy(to, from, N);
}

FK_INLINE void copy_bytes(const char* from, char* to, int64_t n) {
  constexpr int64_t step = sizeof(Bytes);
  if (n >= step) {
    for (int64_t i = 0; i + step <= n; i += step) copy_fixed<step>(from + i, to + i);
    copy_fixed<step>(from + n - step, to + n - step);
    return;
  }
  if constexpr (step > 32) {
    if (n & 32) copy_fixed<32>(from, to), from += 32, to += 32;
  }
  if constexpr (step > 16) {
    if (n & 16) copy_fixed<16>(from, to), from += 16, to += 16;
  }
  if (n & 8) copy_fixed<8>(from, to), from += 8, to += 8;
  if (n & 4) copy_fixed<4>(from, to), from += 4, to += 4;
  if (n & 2) copy_fixed<2>(from, to);
}

template <int N>
FK_INLINE void copy_rows_fixed(const char* from, int64_t from_row, char* to, int64_t to_row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) copy_fixed<N>(from + r * from_row, to + r * to_row);
}

// rows of contiguous elements
template <class E>
FK_CALL void copy_rows(const E* from, int64_t from_row, E* to, int64_t to_row, int64_t rows, int64_t n) {
  constexpr int64_t size = sizeof(E);
  const char* p = reinterpret_cast<const char*>(from);
  char* q = reinterpret_cast<char*>(to);
  switch (n * size) {  // short rows are copied by one instruction each
    case 2: return copy_rows_fixed<2>(p, from_row * size, q, to_row * size, rows);
    case 4: return copy_rows_fixed<4>(p, from_row * size, q, to_row * size, rows);
    case 8: return copy_rows_fixed<8>(p, from_row * size, q, to_row * size, rows);
    case 16: return copy_rows_fixed<16>(p, from_row * size, q, to_row * size, rows);
    case 32: return copy_rows_fixed<32>(p, from_row * size, q, to_row * size, rows);
  }
  for (int64_t r = 0; r < rows; ++r) copy_bytes(p + r * from_row * size, q + r * to_row * size, n * size);
}

// to[i] = from[stride * i]
template <class E>
FK_INLINE void gather_row(const E* from, int64_t stride, int64_t n, E* to) {
  constexpr int64_t width = words<E>;
  int64_t i = 0;
  if (stride == 2 && n >= width) {
    for (;; i = i + width < n - width ? i + width : n - width) {
      // the second vector ends with the last element that is wanted
      const auto a = load_words<Words<E>>(from + 2 * i), b = load_words<Words<E>>(from + 2 * i + width - 1);
      const auto packed = AllLanes<E>::every_other_then_odd(a, b);
      __builtin_memcpy(to + i, &packed, sizeof packed);
      if (i == n - width) return;
    }
  }
  for (; i < n; ++i) to[i] = from[i * stride];
}

template <class E>
FK_CALL void pack(const E* from, int64_t row, int64_t stride, int64_t rows, int64_t n, E* to) {
  if (stride == 1) return copy_rows(from, row, to, n, rows, n);
  for (int64_t r = 0; r < rows; ++r) gather_row(from + r * row, stride, n, to + r * n);
}

template <class E>
FK_CALL void unpack(const E* from, E* to, int64_t row, int64_t stride, int64_t rows, int64_t n) {
  if (stride == 1) return copy_rows(from, n, to, row, rows, n);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) to[r * row + i * stride] = from[r * n + i];
  }
}

// A row of n elements, those at phase, phase + 2, ... from `packed` and the others from `rest`, or 0 without one
template <class E>
FK_INLINE void merge_row(const E* packed, const E* rest, int64_t rest_stride, E* to, int64_t stride, int64_t n, int64_t phase) {
  int64_t i = 0;
  if (stride == 1 && (rest == nullptr || rest_stride == 1)) {
    for (; i + words<E> <= n; i += words<E>) {
      const auto other = rest == nullptr ? Words<E>{} : load_words<Words<E>>(rest + i);
      const auto spread = AllLanes<E>::doubled(load_words<Words<E>>(packed + i / 2));  // of its first half
      const auto merged = phase == 0 ? AllLanes<E>::alternating(spread, other) : AllLanes<E>::alternating(other, spread);
      __builtin_memcpy(to + i, &merged, sizeof merged);
    }
  }
  for (; i < n; ++i) to[i * stride] = (i & 1) == phase ? packed[i / 2] : rest == nullptr ? E{} : rest[i * rest_stride];
}

// ---- sums

// The sum of n numbers: 16 sums of every 16th, then a tree; the same bits on every instruction set. Reads whole vectors.
template <class T>
FK_INLINE T sum_16(const T* p, int64_t n) {
  constexpr int count = 16 / lanes<T>;
  Vec<T> acc[count];
  for (int k = 0; k < count; ++k) acc[k] = Vec<T>{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int k = 0; k < count; ++k) acc[k] += load(p + i + k * lanes<T>);
  }
  if (i < n) {
    for (int k = 0; k < count; ++k) {
      const int left = static_cast<int>(n - i) - k * lanes<T>;
      if (left > 0) acc[k] += select(iota<T>() < left, load(p + i + k * lanes<T>), Vec<T>{});
    }
  }
  for (int half = count / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) acc[k] += acc[k + half];
  }
  return horizontal_sum(acc[0]);
}

// The same for each of several rows of n numbers: what is left of the tree for a few.
template <int N, class T>
FK_INLINE void sum_rows_of(const T* p, int64_t rows, T* to) {
  for (int64_t r = 0; r < rows; ++r, p += N) {
    T a[N];
    for (int i = 0; i < N; ++i) a[i] = T(0) + p[i];  // as sum_16 begins: what sums to -0 there is 0
    for (int half = 4; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        if (i + half < N) a[i] += a[i + half];
      }
    }
    to[r] = a[0];
  }
}

template <class T>
FK_INLINE void sum_rows(const T* p, int64_t rows, int64_t n, T* to) {
  switch (n) {
    case 1: return sum_rows_of<1>(p, rows, to);
    case 2: return sum_rows_of<2>(p, rows, to);
    case 3: return sum_rows_of<3>(p, rows, to);
    case 4: return sum_rows_of<4>(p, rows, to);
    case 5: return sum_rows_of<5>(p, rows, to);
    case 6: return sum_rows_of<6>(p, rows, to);
    case 7: return sum_rows_of<7>(p, rows, to);
    case 8: return sum_rows_of<8>(p, rows, to);
  }
  for (int64_t r = 0; r < rows; ++r) to[r] = sum_16(p + r * n, n);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
