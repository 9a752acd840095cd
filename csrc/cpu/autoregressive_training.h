// What the training passes of a masked autoregressive map work on, for every instruction set.
//
// Two matrices with one row per sample hold what the layers make: `values` [features, hidden values ..., outputs, pre-activations
// of the layers whose derivative needs them], and `deltas`, the same columns up to the outputs, the loss's gradient by each sum.
#pragma once

#include <cstdint>

#include "cpu/masked_linear.h"

namespace flowkernels {

template <class T>
struct TrainingArgs {
  const MaskedLinearArgs<T>* layers;    // forward products in turn, or those of dx from the last layer to the first
  const MaskedLinearArgs<T>* contexts;  // the same for context terms, or null
  int n_layers;
  int64_t batch, features;
  const int64_t* order;  // feature generated k-th; null for 0, 1, 2, ...
  ScaleMapParams scale;
  Form form;
  T *values, *deltas;
  int64_t values_ld, deltas_ld;
  int64_t outputs;  // first column of the outputs
  const T *x, *dy, *dlogabsdet;
  int64_t x_row, x_column, dy_row, dy_column, dlogabsdet_step;
  T *y, *logabsdet, *dx;  // contiguous
};

}  // namespace flowkernels
