// The sizes of a tensor on any device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace flowkernels {

inline std::vector<int64_t> sizes_of(const torch::stable::Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  return sizes;
}

}  // namespace flowkernels
