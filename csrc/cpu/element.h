// The element types that kernels read and write, and the type that they compute in.
#pragma once

#include <cstdint>

namespace flowkernels {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class E>
struct ComputeOf {
  using type = E;
};
template <>
struct ComputeOf<Half> {
  using type = float;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <class E>
using compute_t = typename ComputeOf<E>::type;

}  // namespace flowkernels
