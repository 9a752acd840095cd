// Numbers of 16 bits with float's exponent, for device code and its twin on the host.
#pragma once

#include "cuda/device_math.h"

namespace flowkernels {

struct Bfloat16 {
  uint16_t bits;
};

FK_INLINE float widened(Bfloat16 a) { return scalar::from_bits<float>(static_cast<uint32_t>(a.bits) << 16); }
template <class T>
FK_INLINE T widened(T a) {
  return a;
}

// to the nearest, of two the even one; a NaN stays one
FK_INLINE Bfloat16 rounded(float a) {
  const uint32_t bits = scalar::bits(a);
  if (a != a) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace flowkernels
