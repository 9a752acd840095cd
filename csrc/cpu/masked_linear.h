// What the products of a masked linear map work on, for every instruction set.
#pragma once

#include <cstdint>

namespace flowkernels {

template <class T>
struct MaskedLinearArgs {
  const T *x, *dy, *weight;  // [batch, inputs], [batch, outputs], [inputs, outputs]; rows contiguous. Those that a product reads
  int64_t x_ld, dy_ld, weight_ld;
  const T* bias;           // [outputs] or null
  const int32_t* visible;  // [outputs], ascending: inputs that an output sees
  const int32_t* first;    // [inputs], ascending: the first output that sees an input
  int64_t batch, inputs, outputs;
  T* out;  // contiguous
};

}  // namespace flowkernels
