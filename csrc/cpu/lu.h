// What the factorisation works on, for every instruction set.
#pragma once

#include <cstdint>

namespace flowkernels {

// Matrices [*, n, n], read through their strides; outputs are contiguous.
template <class T>
struct LuArgs {
  const T* w;
  const int64_t *sizes, *strides;  // of all dimensions; the last two are the matrix
  int64_t dims, n, row_stride, column_stride;
  T *sign, *logabsdet;
  T* inverse;  // null where it is not wanted

  const T* matrix(int64_t m) const {
    int64_t offset = 0;
    for (int64_t d = dims - 3; d >= 0; --d) {
      offset += m % sizes[d] * strides[d];
      m /= sizes[d];
    }
    return w + offset;
  }
};

}  // namespace flowkernels
