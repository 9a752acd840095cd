// What the products of a masked linear map work on, for every instruction set.
#pragma once

#include <cstdint>

#include "cpu/for_each_target.h"  // declares the codes of activations

namespace flowkernels {

// What becomes of a finished sum before it is stored
template <class T>
struct Finish {
  bool accumulate = false;   // out holds values already, to which the sum is added
  const T* bias = nullptr;   // or the sum is added to this, by column
  Activation activation = Activation::identity;
  T* pre = nullptr;          // where the sum before the activation is kept, or null; its rows are pre_ld apart
  int64_t pre_ld = 0;
  const T* values = nullptr; // not null: the sum is multiplied by the activation's derivative at these values (see activation.h)
  int64_t values_ld = 0;
};

template <class T>
struct MaskedLinearArgs {
  const T *x, *dy, *weight;  // [batch, inputs], [batch, outputs], [inputs, outputs]; rows contiguous. Those that a product reads
  int64_t x_ld, dy_ld, weight_ld;
  const int32_t* visible;  // [outputs], ascending: inputs that an output sees
  const int32_t* first;    // [inputs], ascending: the first output that sees an input
  int64_t batch, inputs, outputs;
  T* out;  // rows contiguous
  int64_t out_ld;
  Finish<T> finish;
};

}  // namespace flowkernels
