// The network of the training passes, and where its values lie in a row.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <utility>
#include <vector>

#include "cpu/autoregressive_training.h"
#include "cpu/network.h"
#include "cpu/staircase.h"

namespace flowkernels {

template <class T>
struct TrainingLayer : MaskedLayer<T> {
  std::vector<int32_t> first;
  std::vector<int32_t> whole_context;  // visible of the context term
  std::vector<T> both_biases;          // of the layer and of a context term that is added as it is

  // whether the context term is more than an addend: it has columns of its own (TrainingColumns)
  bool apart() const { return this->gate || this->context_activation != static_cast<int>(Activation::identity); }
  const T* own_bias() const { return both_biases.empty() ? this->bias : both_biases.data(); }
};

// A matrix with one row per sample
template <class T>
struct Rows {
  const T* data;  // null for none
  int64_t ld;
};

// Some columns of a matrix with one row per sample
template <class T>
struct Columns {
  T* data;  // null for none
  int64_t ld;
};

// The network, and where its values lie in a row.
//
// A forward pass need not keep what costs less to make again than to hold: the first layer's values, where few features feed many units.
// The gradient remakes them, to the same bits, for the rows at hand.
template <class T>
class TrainingNetwork {
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;

 public:
  std::vector<TrainingLayer<T>> layers;
  std::vector<LayerColumns<T>> of_layers;
  const int64_t* order = nullptr;
  OrderKind order_kind = OrderKind::ascending;
  int64_t features, contexts, delta_columns = 0;
  int64_t columns = 0, remade_columns = 0;  // of values that are kept, and of those that the gradient remakes
  bool wired = false, takes_context, has_context_biases;
  OutputColumns output_columns;
  ScalarType dtype;

  // remakes: whether values may be remade
  TrainingNetwork(int64_t features, ScalarType dtype, const NetworkParts& parts, const Tensor* order_, int scale_kind, bool remakes)
      : features(features),
        contexts(parts.context_weights.empty() ? 0 : parts.context_weights[0].size(0)),
        takes_context(!parts.context_weights.empty()),
        has_context_biases(!parts.context_biases.empty()),
        dtype(dtype),
        network_(parts, dtype, features, contexts) {
    no_first_.assign(contexts, 0);
    layers.reserve(network_.layers.size());
    for (const MaskedLayer<T>& layer : network_.layers) {
      layers.push_back({layer, {}, {}, {}});
      TrainingLayer<T>& own = layers.back();
      if (!own.takes_context) continue;
      own.whole_context.assign(own.outputs, static_cast<int32_t>(contexts));
      if (!own.context_bias || own.apart()) continue;
      own.both_biases.assign(own.bias, own.bias + own.outputs);
      for (int64_t j = 0; j < own.outputs; ++j) own.both_biases[j] += own.context_bias[j];
    }
    TrainingColumns<T> placed(features, layers);
    of_layers = std::move(placed.layers);
    delta_columns = placed.deltas, wired = placed.wired;
    if (remakes && first_is_cheap()) remade_columns = (of_layers[0].pre < 0 ? 1 : 2) * of_layers[0].units;
    columns = placed.values - remade_columns;
    const int64_t outputs = layers.back().outputs;
    output_columns = OutputColumns(outputs, features, scale_kind);
    check_training(output_columns.fit(outputs, features), "the last layer must give shift and raw scale of each feature that does not pass");
    if (order_) read_order(*order_);
  }

  const std::vector<MaskedLayer<T>>& masked_layers() const { return network_.layers; }

  // where a column of TrainingColumns lies; -1 nowhere
  Columns<T> place(const TrainingArgs<T>& args, int64_t column) const {
    if (column < 0) return {nullptr, 0};
    int64_t remade_before = 0;
    for (const int64_t begin : {of_layers[0].value, of_layers[0].pre}) {
      if (remade_before == remade_columns || column < begin) break;
      if (column < begin + of_layers[0].units) return {args.remade + remade_before + column - begin, remade_columns};
      remade_before += of_layers[0].units;
    }
    return {args.values + column - remade_before, columns};
  }

  // what products with deltas need
  void find_first() {
    for (TrainingLayer<T>& layer : layers)
      if (!layer.unitwise) layer.first = first_seen_by(layer.visible, layer.outputs, layer.inputs);
  }

  // of a forward pass; what is done for each value besides, activations and maps among it, counts as so many
  double multiply_adds(int64_t batch) const {
    constexpr int64_t kForEachValue = 32;
    double pairs = static_cast<double>(kForEachValue * features);
    for (const TrainingLayer<T>& layer : layers)
      pairs += (layer.unitwise ? 0.0 : seen_pairs(layer.visible, layer.outputs)) +
               static_cast<double>(layer.outputs * (kForEachValue + (layer.takes_context ? contexts : 0)));
    return pairs * static_cast<double>(batch);
  }

  // nothing to do for a unitwise layer
  MaskedLinearArgs<T> product(const TrainingLayer<T>& layer, int64_t batch) const {
    MaskedLinearArgs<T> args{};
    if (layer.unitwise) return args;
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
    if (!layer.takes_context) return args;
    args.weight = layer.context_weight;
    args.weight_ld = layer.context_ld;
    args.visible = layer.whole_context.data();
    args.first = no_first_.data();
    args.batch = batch;
    args.inputs = contexts;
    args.outputs = layer.outputs;
    return args;
  }

 private:
  Network<T> network_;
  std::vector<int32_t> no_first_;
  std::vector<int64_t> position_;

  // _remade_columns of flowkernels/ops/autoregressive/training.py is the same. A context's inputs are seen by all units, features by half.
  bool first_is_cheap() const {
    constexpr int64_t kCheaper = 8;  // than the next layer: remaking costs at most a 24th of a step
    if (wired || layers.size() < 2) return false;
    const int64_t inputs = layers[0].inputs + (layers[0].takes_context ? 2 * contexts : 0);
    return kCheaper * inputs <= layers[1].outputs;
  }

  void read_order(const Tensor& given) {
    order = network_.order(given, features, position_);
    order_kind = kind_of(order, features);
  }
};

}  // namespace flowkernels
