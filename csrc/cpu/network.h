// From the tensors of a conditioner, as the ops take them, to the layers that kernels work on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "cpu/autoregressive.h"
#include "cpu/staircase.h"
#include "cpu/tensor.h"
#include "stack_lists.h"

namespace flowkernels {

// Python has checked what users get wrong; here only what would corrupt memory.
inline void check_network(bool ok, const char* what, const char* more = "") { STD_TORCH_CHECK(ok, "flowkernels::autoregressive: ", what, more); }

inline int activation_code(int64_t code) {
  check_network(code >= 0 && code <= static_cast<int>(Activation::sigmoid), "unknown activation");
  return static_cast<int>(code);
}

// The layers of a conditioner.
template <class T>
struct Network {
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;

  std::vector<MaskedLayer<T>> layers;
  std::vector<Tensor> kept;  // contiguous copies must outlive the kernel
  ScalarType dtype;

  Network(const NetworkParts& parts, ScalarType dtype, int64_t features, int64_t context_features) : dtype(dtype) {
    const size_t n = parts.weights.size(), n_contexts = parts.context_weights.size();
    check_lengths(parts);
    kept.reserve(5 * n + 2);
    layers.reserve(n);
    size_t context = 0;
    for (size_t i = 0; i < n; ++i) {
      const Wiring wired(parts.wiring, n_contexts, i);
      layers.push_back(layer(parts, i, wired, features));
      if (wired.context) read_context(parts, context++, wired, context_features);
    }
    check_network(context == n_contexts, "context_weights do not fit the wiring");
    const MaskedLayer<T>& last = layers.back();
    check_network(!last.joins() && last.activation == static_cast<int>(Activation::identity), "the last layer must be a plain masked layer");
  }

  MaskedLayer<T> layer(const NetworkParts& parts, size_t i, const Wiring& wired, int64_t features) {
    auto width = [&](int64_t values) { return values == 0 ? features : layers[values - 1].outputs; };
    const Tensor& weight = parts.weights[i];
    MaskedLayer<T> layer{};
    layer.source = static_cast<int>(wired.source);
    layer.residual = static_cast<int>(wired.residual);
    layer.activation = activation_code(parts.activations[i]);
    layer.unitwise = weight.dim() == 1;
    int64_t& inputs = layer.inputs = width(wired.source);
    const int64_t outputs = layer.outputs = layer.unitwise ? inputs : weight.dim() == 2 ? weight.size(1) : -1;
    if (!layer.unitwise) {
      if (wired.source == 0 && weight.dim() == 2) inputs = std::min(inputs, weight.size(0));  // of the features, the first alone may be read
      layer.weight = matrix(weight, inputs, outputs, layer.ld, "weight");
      layer.bias = vector(parts.biases[i], outputs, "bias");
    } else if (weight.numel() > 0) {
      layer.weight = vector(weight, outputs, "weight");
      layer.bias = vector(parts.biases[i], outputs, "bias");
    }
    check_network(wired.residual < 0 || width(wired.residual) == outputs, "residual must be as wide as its layer");
    layer.visible = static_cast<const int32_t*>(vector(parts.visible[i], outputs, ScalarType::Int, "visible"));
    check_network(is_staircase(layer.visible, outputs, inputs), "visible must ascend from 0 to the number of inputs");
    return layer;
  }

  // the context term of the layer read last
  void read_context(const NetworkParts& parts, size_t number, const Wiring& wired, int64_t context_features) {
    MaskedLayer<T>& layer = layers.back();
    check_network(number < parts.context_weights.size() && !layer.unitwise, "context_weights do not fit the wiring");
    layer.context_weight = matrix(parts.context_weights[number], context_features, layer.outputs, layer.context_ld, "context_weight");
    if (!parts.context_biases.empty()) layer.context_bias = vector(parts.context_biases[number], layer.outputs, "context_bias");
    layer.context_activation = activation_code(wired.context_activation);
    layer.gate = wired.context == 2;
    layer.takes_context = true;
  }

  // which feature is generated k-th; position: when each is
  const int64_t* order(const Tensor& t, int64_t features, std::vector<int64_t>& position) {
    const auto* data = static_cast<const int64_t*>(vector(t, features, ScalarType::Long, "order"));
    position.assign(features, -1);
    for (int64_t p = 0; p < features; ++p) {
      check_network(data[p] >= 0 && data[p] < features && position[data[p]] < 0, "order must be a permutation");
      position[data[p]] = p;
    }
    return data;
  }

  const void* vector(const Tensor& t, int64_t length, ScalarType type, const char* name) {
    check_network(t.dim() == 1 && t.size(0) == length && t.scalar_type() == type && t.is_cpu(), name, " does not fit its layer");
    kept.push_back(made_contiguous(t));
    return data_of<void>(kept.back());
  }

  const T* vector(const Tensor& t, int64_t length, const char* name) { return static_cast<const T*>(vector(t, length, dtype, name)); }

  const T* matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t& ld, const char* name) {
    check_network(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == dtype && t.is_cpu(), name, " does not fit its layer");
    kept.push_back(rows_contiguous(t));
    ld = rows > 1 ? kept.back().stride(0) : columns;
    return data_of<T>(kept.back());
  }
};

}  // namespace flowkernels
