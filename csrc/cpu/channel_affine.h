// The ops themselves, for channel_normalize.cpp; and tensors without gaps whose map needs no walk: lines of contiguous elements, for every
// instruction set.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace flowkernels {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> channel_affine(const torch::stable::Tensor& x,
                                                                        std::optional<torch::stable::Tensor> shift,
                                                                        const torch::stable::Tensor& log_scale,
                                                                        std::optional<torch::stable::Tensor> bias, bool inverse);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> channel_affine_backward(
    const torch::stable::Tensor& dy, const torch::stable::Tensor& dlogabsdet, const torch::stable::Tensor& kept,
    std::optional<torch::stable::Tensor> shift, const torch::stable::Tensor& log_scale, std::optional<torch::stable::Tensor> bias,
    bool inverse, bool from_output);

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

// Backward on vectors: dx = dy * scale, and the sums over each `unit` rows of dy and of what goes to the log scale, [units, channels]
// each. Parameters are repeated for 16 rows, down which the sums run in turn.
template <class T>
struct VectorGradients {
  const T *dy, *kept;
  T* dx;
  const T *before, *scale, *after;
  T* sums[2];
  int64_t batch, channels, unit;
  bool from_output;
};

}  // namespace flowkernels
