// Tensors without gaps whose map needs no walk: lines of contiguous elements, for every instruction set.
#pragma once

#include <cstdint>

namespace flowkernels {

// y = (x + before) * scale + after. Either each line is of one channel, line l of channel l % channels; or a line holds whole rows of
// channels, for whose elements the parameters stand in order, and all lines have the same.
template <class T>
struct DenseLines {
  const T* x;
  T* y;
  const T *before, *scale, *after;
  int64_t elements, length, channels;
  bool one_channel;

  int64_t lines() const { return (elements + length - 1) / length; }
};

}  // namespace flowkernels
