// The network of the training passes, and where its values lie in a row.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <span>
#include <vector>

#include "cpu/autoregressive_training.h"
#include "cpu/staircase.h"
#include "cpu/tensor.h"

namespace flowkernels {

// Python has checked what users get wrong; here only what would corrupt memory.
inline void check_training(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::autoregressive_training: ", what); }

template <class T>
struct TrainingLayer {
  const T *weight, *context_weight;
  const int32_t* visible;
  int64_t ld, context_ld, inputs, outputs, offset;  // offset: first column of its values
  int64_t pre;                                      // first column of its pre-activations, -1 where they are not kept
  Activation activation;
  std::vector<int32_t> first;
  std::vector<int32_t> whole_context;  // visible of the context term
};

// A matrix with one row per sample
template <class T>
struct Rows {
  const T* data;  // null for none
  int64_t ld;
};

// The network, and where its values lie in a row
template <class T>
class TrainingNetwork {
  using Tensor = torch::stable::Tensor;
  using Tensors = std::vector<Tensor>;
  using ScalarType = torch::headeronly::ScalarType;

 public:
  std::vector<TrainingLayer<T>> layers;
  const int64_t* order = nullptr;
  OrderKind order_kind = OrderKind::ascending;
  int64_t features = 0, contexts = 0, delta_columns = 0, columns = 0;
  OutputColumns output_columns;
  ScalarType dtype;

  TrainingNetwork(int64_t features, ScalarType dtype, std::span<const Tensor> weights, std::span<const Tensor> context_weights,
                  std::span<const Tensor> visible, const Tensor* order_, std::span<const int64_t> activations, int scale_kind)
      : features(features), dtype(dtype) {
    const size_t n = weights.size();
    check_training(n >= 1 && visible.size() == n && activations.size() == n && (context_weights.size() <= 1 || context_weights.size() == n),
                   "weights, visible and activations must have one entry per layer");
    kept_.reserve(4 * n + 1);
    layers.resize(n);
    contexts = context_weights.empty() ? 0 : context_weights[0].size(0);
    no_first_.assign(contexts, 0);
    int64_t inputs = features, offset = features;
    for (size_t l = 0; l < n; ++l) {
      TrainingLayer<T>& layer = layers[l];
      if (l == 0 && weights[0].dim() == 2) inputs = std::min(inputs, weights[0].size(0));  // the first features alone may be read
      layer.inputs = inputs;
      layer.outputs = weights[l].dim() == 2 ? weights[l].size(1) : -1;
      check_training(inputs < (int64_t{1} << 31), "too many units");
      layer.weight = matrix(weights[l], inputs, layer.outputs, layer.ld);
      layer.visible = static_cast<const int32_t*>(vector(visible[l], layer.outputs, ScalarType::Int));
      check_training(is_staircase(layer.visible, layer.outputs, inputs), "visible must ascend from 0 to the number of inputs");
      layer.context_weight = nullptr;
      if (l < context_weights.size()) {
        layer.context_weight = matrix(context_weights[l], contexts, layer.outputs, layer.context_ld);
        layer.whole_context.assign(layer.outputs, static_cast<int32_t>(contexts));
      }
      check_training(activations[l] >= 0 && activations[l] <= static_cast<int>(Activation::sigmoid), "unknown activation");
      layer.activation = static_cast<Activation>(activations[l]);
      layer.offset = offset;
      offset += layer.outputs;
      inputs = layer.outputs;
    }
    output_columns = OutputColumns(inputs, features, scale_kind);
    check_training(output_columns.fit(inputs, features) && layers.back().activation == Activation::identity,
                   "the last layer must give shift and raw scale of each feature that does not pass");
    delta_columns = offset;
    for (TrainingLayer<T>& layer : layers) {
      const bool keep = !derivative_from_value(layer.activation);
      layer.pre = keep ? offset : -1;
      offset += keep ? layer.outputs : 0;
    }
    columns = offset;
    if (order_) {
      order = static_cast<const int64_t*>(vector(*order_, features, ScalarType::Long));
      bool ascending = true, descending = true;
      std::vector<bool> seen(features);
      for (int64_t p = 0; p < features; ++p) {
        check_training(order[p] >= 0 && order[p] < features && !seen[order[p]], "order must be a permutation");
        seen[order[p]] = true;
        ascending &= order[p] == p;
        descending &= order[p] == features - 1 - p;
      }
      order_kind = ascending ? OrderKind::ascending : descending ? OrderKind::descending : OrderKind::any;
    }
  }

  std::vector<const T*> read_biases(std::span<const Tensor> biases) {
    check_training(biases.size() == layers.size(), "there must be one bias per layer");
    std::vector<const T*> data;
    for (size_t l = 0; l < layers.size(); ++l) data.push_back(static_cast<const T*>(vector(biases[l], layers[l].outputs, dtype)));
    return data;
  }

  // what products with deltas need
  void find_first() {
    for (TrainingLayer<T>& layer : layers) layer.first = first_seen_by(layer.visible, layer.outputs, layer.inputs);
  }

  bool takes_context() const { return layers[0].context_weight != nullptr; }

  int64_t input_offset(size_t l) const { return l == 0 ? 0 : layers[l - 1].offset; }

  // of a forward pass; what is done for each value besides, activations and maps among it, counts as so many
  double multiply_adds(int64_t batch) const {
    constexpr int64_t kForEachValue = 32;
    double pairs = static_cast<double>(kForEachValue * features);
    for (const TrainingLayer<T>& layer : layers)
      pairs += seen_pairs(layer.visible, layer.outputs) +
               static_cast<double>(layer.outputs * (kForEachValue + (layer.context_weight ? contexts : 0)));
    return pairs * static_cast<double>(batch);
  }

  MaskedLinearArgs<T> product(const TrainingLayer<T>& layer, int64_t batch) const {
    MaskedLinearArgs<T> args{};
    args.weight = layer.weight;
    args.weight_ld = layer.ld;
    args.visible = layer.visible;
    args.first = layer.first.data();
    args.batch = batch;
    args.inputs = layer.inputs;
    args.outputs = layer.outputs;
    return args;
  }

  MaskedLinearArgs<T> context_product(const TrainingLayer<T>& layer, int64_t batch) const {
    MaskedLinearArgs<T> args{};
    args.weight = layer.context_weight;
    args.weight_ld = layer.context_ld;
    args.visible = layer.whole_context.data();
    args.first = no_first_.data();
    args.batch = batch;
    args.inputs = contexts;
    args.outputs = layer.context_weight ? layer.outputs : 0;
    return args;
  }

 private:
  Tensors kept_;  // contiguous copies must outlive the kernel
  std::vector<int32_t> no_first_;

  const T* matrix(const Tensor& t, int64_t rows, int64_t columns_, int64_t& ld) {
    check_training(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns_ && t.scalar_type() == dtype && t.is_cpu(), "a weight does not fit");
    kept_.push_back(rows_contiguous(t));
    ld = kept_.back().size(0) > 1 ? kept_.back().stride(0) : columns_;
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }

  const void* vector(const Tensor& t, int64_t length, ScalarType type) {
    check_training(t.dim() == 1 && t.size(0) == length && t.scalar_type() == type && t.is_cpu(), "a bias, visible or order does not fit");
    kept_.push_back(made_contiguous(t));
    return kept_.back().const_data_ptr();
  }
};

}  // namespace flowkernels
