// Where the layers of a masked autoregressive map have their columns in a training step.
//
// Two matrices with one row per sample hold what the layers make. `values`: the features in the order of generation, each layer's values,
// and what a derivative needs besides. `deltas`: the same columns up to the outputs, which hold the loss's gradient by the values, and then
// by each sum; after them the gradients by context terms that are more than an addend.
//
// Whoever includes this has declared Activation (cpu/activation.h).
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <iterator>
#include <vector>

namespace flowkernels {

inline void check_training(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::autoregressive_training: ", what); }

// What becomes of a layer's sums, and where: columns of `values`, -1 where there is none
template <class T>
struct LayerColumns {
  int64_t units, value;
  int source;             // which values it reads
  int64_t input;          // where those lie
  int64_t residual;       // of the values that are added
  int64_t pre;            // what comes before the activation, where the derivative needs that
  int64_t sum;            // what a gate multiplies
  int64_t term;           // the context term, where it is more than an addend
  int64_t term_pre;       // what comes before the activation of that, where the derivative needs it
  int64_t term_delta;     // column of deltas: the gradient by what comes before the context's activation
  Activation activation, context_activation;
  bool unitwise, gate;
  const T *factor, *bias;  // of a unitwise layer, or null

  // whether more than its products and an activation make its values
  bool assembled() const { return unitwise || residual >= 0 || term >= 0; }
  // the column of deltas that the context's product gets
  int64_t context_delta() const { return term >= 0 ? term_delta : value; }
};

// Columns for all layers of a network
template <class T>
struct TrainingColumns {
  std::vector<LayerColumns<T>> layers;
  int64_t values = 0, deltas = 0;  // columns
  bool wired = false;              // whether some layer is assembled(), or reads another than the one before it

  TrainingColumns() = default;

  // of_network: MaskedLayer or LoopLayer, in turn
  template <class Layers>
  TrainingColumns(int64_t features, const Layers& of_network) {
    int64_t end = features;
    layers.reserve(std::size(of_network));
    for (const auto& layer : of_network) {
      LayerColumns<T> own{};
      own.units = layer.outputs;
      own.value = take(end, true, layer.outputs);
      own.source = layer.source;
      own.input = column_of(layer.source);
      own.residual = layer.residual < 0 ? -1 : column_of(layer.residual);
      own.activation = static_cast<Activation>(layer.activation);
      own.context_activation = static_cast<Activation>(layer.context_activation);
      own.unitwise = layer.unitwise;
      own.gate = layer.gate;
      if (layer.unitwise) own.factor = layer.weight, own.bias = layer.bias;
      layers.push_back(own);
    }
    values = deltas = end;
    for (size_t l = 0; l < layers.size(); ++l) {
      LayerColumns<T>& own = layers[l];
      const bool apart = own.gate || own.context_activation != Activation::identity;  // the context term is more than an addend
      own.pre = take(values, !derivative_from_value(own.activation), own.units);
      own.sum = take(values, own.gate, own.units);
      own.term = take(values, apart, own.units);
      own.term_pre = take(values, apart && !derivative_from_value(own.context_activation), own.units);
      own.term_delta = take(deltas, apart, own.units);
      wired |= own.assembled() || own.source != static_cast<int>(l);
    }
  }

 private:
  static int64_t take(int64_t& end, bool wanted, int64_t units) {
    if (!wanted) return -1;
    end += units;
    return end - units;
  }

  int64_t column_of(int of) const { return of == 0 ? 0 : layers[of - 1].value; }
};

}  // namespace flowkernels
