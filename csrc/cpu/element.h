// The element types that kernels read and write, and the type that they compute in.
#pragma once

#include <cstdint>

namespace flowkernels {

// float16 or bfloat16; which of them is known at run time, since all that depends on it is the conversion
struct Half {
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
template <class E>
using compute_t = typename ComputeOf<E>::type;

}  // namespace flowkernels
