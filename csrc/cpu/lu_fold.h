// What composing and inverting LU-parametrised weights works on, for every instruction set.
#pragma once

#include <cstdint>

namespace flowkernels {

// One contiguous tensor a matrix: factors [n, n], log_diagonal [n], log_scale [n] or null, sign [n], row [n]; outputs are stacked.
template <class T>
struct LuFoldArgs {
  int64_t n;
  bool inverse;
  const T *const *factors, *const *log_diagonal, *const *log_scale, *const *sign;
  const int64_t* const* row;
  T *weight, *logabsdet;                               // forward
  const T *dweight, *dlogabsdet, *composed;            // backward; `composed` is forward's weight
  T *dfactors, *dlog_diagonal, *dlog_scale;            // dlog_scale is null without log_scale
};

}  // namespace flowkernels
