// Small helpers on stable tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <span>

#include "tensor_sizes.h"

namespace flowkernels {

// What a tensor holds, for reading. Its memory may be gone: sharding frees the storage of parameters that nobody is to use.
template <class T>
const T* data_of(const torch::stable::Tensor& t) {
  const void* data = t.const_data_ptr();
  STD_TORCH_CHECK(data || t.numel() == 0, "flowkernels: a tensor's memory was freed: its storage holds nothing");
  return static_cast<const T*>(data);
}

// The same of a tensor that must be contiguous, on the CPU, of dtype T and of these sizes: what Python has made so, and a kernel reads unasked.
template <class T>
const T* checked_data(const char* op, const torch::stable::Tensor& t, std::initializer_list<int64_t> sizes) {
  bool fits = t.is_cpu() && t.is_contiguous() && t.scalar_type() == torch::headeronly::CppTypeToScalarType<T>::value &&
              t.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && t.size(d++) == size;
  STD_TORCH_CHECK(fits, "flowkernels::", op, ": tensors must be contiguous, on the CPU, of one dtype and of fitting sizes");
  return data_of<T>(t);
}

// asks first: the call of contiguous itself goes through the dispatcher
inline torch::stable::Tensor made_contiguous(const torch::stable::Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// a matrix whose rows are contiguous, also where there is one row alone
inline torch::stable::Tensor rows_contiguous(const torch::stable::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// of [batch, channels, *sites]
inline int64_t sites_of(const torch::stable::Tensor& t) {
  int64_t sites = 1;
  for (int64_t d = 2; d < t.dim(); ++d) sites *= t.size(d);
  return sites;
}

// Whether x, [batch, *sites, channels], is a view of a contiguous [batch, channels, *sites].
inline bool channels_lie_first(const torch::stable::Tensor& x) {
  const int64_t last = x.dim() - 1;
  int64_t step = 1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (d == 0) {
      if (x.size(last) > 1 && x.stride(last) != step) return false;
      step *= x.size(last);
    }
    if (x.size(d) > 1 && x.stride(d) != step) return false;
    step *= x.size(d);
  }
  return true;
}

// Uninitialised; new_empty would look its operator up by name. torch.use_deterministic_algorithms does not reach this memory: a
// build with FK_FILL_NAN fills it with NaN, so that an element that no kernel writes cannot pass a test.
inline torch::stable::Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  torch::stable::Tensor t(handle);
#ifdef FK_FILL_NAN
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  if (bytes > 0) std::memset(t.mutable_data_ptr(), 0xff, bytes);
#endif
  return t;
}

// Contiguous and uninitialised, with the dtype of `like`.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like, std::span<const int64_t> sizes) {
  std::array<int64_t, 64> strides;  // as many dimensions as torch's own kernels take
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "flowkernels: tensors have at most 64 dimensions");
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype);
}

inline torch::stable::Tensor empty(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty(like, std::span(sizes.begin(), sizes.size()));
}

}  // namespace flowkernels
