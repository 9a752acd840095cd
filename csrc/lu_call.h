// The ops slogdet and slogdet_inverse around the kernels of one device, for which stands `Lu`:
//   Lu::empty(like, sizes)                             a contiguous tensor of the dtype and on the device of `like`
//   Lu::launch<In, T>(w, sign, logabsdet, inverse)     In: what the tensors hold; T: what is computed in; inverse: null for none
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>
#include <vector>

#include "tensor_sizes.h"

namespace flowkernels {

template <class Lu>
void launch_as(const torch::stable::Tensor& w, const torch::stable::Tensor& sign, const torch::stable::Tensor& logabsdet,
               const torch::stable::Tensor* inverse, bool in_float64) {
  if (w.scalar_type() == torch::headeronly::ScalarType::Double)
    Lu::template launch<double, double>(w, sign, logabsdet, inverse);
  else if (in_float64)
    Lu::template launch<float, double>(w, sign, logabsdet, inverse);
  else
    Lu::template launch<float, float>(w, sign, logabsdet, inverse);
}

// Python has checked what users get wrong; here only what would corrupt memory.
inline std::vector<int64_t> batch_sizes(const torch::stable::Tensor& w) {
  using torch::headeronly::ScalarType;
  const int64_t dims = w.dim();
  STD_TORCH_CHECK(dims >= 2 && w.size(dims - 1) == w.size(dims - 2), "flowkernels::slogdet: w must be [*, n, n]");
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float || w.scalar_type() == ScalarType::Double,
                  "flowkernels::slogdet: w must be float32 or float64");
  std::vector<int64_t> sizes = sizes_of(w);
  sizes.resize(dims - 2);
  return sizes;
}

template <class Lu>
std::tuple<torch::stable::Tensor, torch::stable::Tensor> slogdet(torch::stable::Tensor w, bool in_float64) {
  const std::vector<int64_t> sizes = batch_sizes(w);
  torch::stable::Tensor sign = Lu::empty(w, sizes), logabsdet = Lu::empty(w, sizes);
  launch_as<Lu>(w, sign, logabsdet, nullptr, in_float64);
  return {sign, logabsdet};
}

template <class Lu>
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> slogdet_inverse(torch::stable::Tensor w, bool in_float64) {
  const std::vector<int64_t> sizes = batch_sizes(w);
  torch::stable::Tensor sign = Lu::empty(w, sizes), logabsdet = Lu::empty(w, sizes), inverse = Lu::empty(w, sizes_of(w));
  launch_as<Lu>(w, sign, logabsdet, &inverse, in_float64);
  return {sign, logabsdet, inverse};
}

}  // namespace flowkernels
