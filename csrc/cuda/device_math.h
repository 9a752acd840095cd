// The functions of cpu/simd_math.h, scale_map.h and cpu/activation.h on single numbers, for device code and for its twin on the host:
// the same operations in the same order as in a vector's lanes. What they build on is here: cpu/simd.h for one lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define FK_INLINE __host__ __device__ __forceinline__
#define FK_CALL __host__ __device__ __noinline__
#else
#define FK_INLINE inline __attribute__((always_inline))
#define FK_CALL inline __attribute__((noinline))
#endif
#if defined(__CUDA_ARCH__)
#define FK_KEEP_LOOP _Pragma("unroll 1")
#define FK_UNROLL _Pragma("unroll")
#define FK_UNROLL_4 _Pragma("unroll 4")
#define FK_IS_SHARED(pointer) __builtin_assume(__isShared(pointer))
#else
#define FK_KEEP_LOOP
#define FK_UNROLL
#define FK_UNROLL_4
#define FK_IS_SHARED(pointer)
#endif
// What is read although nothing orders it, as it is not used then. Tests that look for races put their own in its place.
#if !defined(FK_READ_AHEAD)
#define FK_READ_AHEAD(is_used, value) (value)
#endif
#define FK_TARGET scalar

namespace flowkernels {
namespace FK_TARGET {

template <class T>
using Vec = T;
template <class T>
using UVec = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
template <class V>
using scalar_t = V;

template <class T>
FK_INLINE T broadcast(T value) {
  return value;
}
template <class V>
FK_INLINE V splat(scalar_t<V> value) {
  return value;
}
template <class V>
FK_INLINE V select(bool mask, V a, V b) {
  return mask ? a : b;
}

FK_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FK_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }

template <class V>
FK_INLINE UVec<V> bits(V a) {
  UVec<V> b;
  memcpy(&b, &a, sizeof b);
  return b;
}
template <class T>
FK_INLINE T from_bits(UVec<T> a) {
  T b;
  memcpy(&b, &a, sizeof b);
  return b;
}

template <class T>
constexpr UVec<T> sign_bit = UVec<T>{1} << (8 * sizeof(T) - 1);

template <class V>
FK_INLINE V abs(V a) {
  return from_bits<V>(bits(a) & ~sign_bit<V>);
}
template <class V>
FK_INLINE V with_sign_of(V a, V b) {
  return from_bits<V>((bits(a) & ~sign_bit<V>) | (bits(b) & sign_bit<V>));
}

// they keep a's NaN
template <class V>
FK_INLINE V at_most(V a, scalar_t<V> limit) {
  return limit < a ? limit : a;
}
template <class V>
FK_INLINE V at_least(V a, scalar_t<V> limit) {
  return limit > a ? limit : a;
}

}  // namespace FK_TARGET
}  // namespace flowkernels

#include "cpu/simd_math.h"
#include "scale_map.h"
#include "cpu/activation.h"
