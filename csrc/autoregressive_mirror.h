// The mirrored network, whose loop is the gradient of the inverse: what carries gradients from the outputs of a conditioner back to its
// features, unit by unit from the last to the first. For its launcher and for its twin on the CPU. No data is read.
//
// Of layer l: sums s_l, the total t_l that its activation is given (the sum, times a gate, and what is added), values h_l = act_l(t_l).
// Its mirrored values are the gradients
//
//   by total   act_l'(t_l) * (sum over layers r that read h_l of the gradient by r's sums times W_r^T, or, unit by unit, times r's factors
//                             + sum over layers a that add h_l of the gradient by a's total)
//   by sums    the same, times the gate
//
// A layer of the loop is product * gate + residual (autoregressive_phases.h), so what arrives on several ways is added up layer by layer.
// The layer of outputs comes first: its gradients by raw scale and shift are the loop's features; the features' own come last.
#pragma once

#include <vector>

#include "autoregressive_network.h"
#include "training_columns.h"

namespace flowkernels {

// Row by row: the gradient by x and by the log-determinant, and what the layers have made
template <class T>
struct MirrorRows {
  torch::stable::Tensor dx, dlogabsdet;
  const T* values;  // TrainingColumns
};

template <class T>
class MirroredNetwork {
 public:
  LoopArgs<T> args{};

  // of: the network forward, its x being that of the inverse
  MirroredNetwork(const LoopArgs<T>& of, const TrainingColumns<T>& columns, const MirrorRows<T>& rows) : of_(of), columns_(columns) {
    args.batch = of.batch;
    args.features = of.features;
    args.mirrored = args.inverse = true;
    args.units = 2 * of.features;
    args.order = of.order;
    args.scale = of.scale;
    args.form = of.form;
    args.x = static_cast<const T*>(rows.dx.const_data_ptr());
    args.x_row = rows.dx.stride(0), args.x_column = rows.dx.stride(1);
    args.context_rows = of.x, args.context_row = of.x_row, args.context_column = of.x_column;
    args.context_features = of.features;
    args.context = take(of.features + 1);
    args.dlogabsdet = static_cast<const T*>(rows.dlogabsdet.const_data_ptr());
    args.dlogabsdet_step = rows.dlogabsdet.stride(0);
    args.made = rows.values;
    args.made_row = columns.values;
    mirror();
    choose_panels(args);
  }

 private:
  // What a product or a copy is multiplied by, unit by unit
  struct Gate {
    int known = -1;  // column of what the layers have made; -1: only a factor
    bool as_is = false;
    Activation activation = Activation::identity;  // otherwise: whose derivative
    const T* factor = nullptr;
    bool is_one() const { return !as_is && activation == Activation::identity && !factor; }
  };

  const LoopArgs<T>& of_;
  const TrainingColumns<T>& columns_;
  std::vector<int> by_sums_, by_total_;  // of each layer, as values of the loop

  static void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::autoregressive: ", what); }

  int take(int units) {
    const int first = args.units;
    check(int64_t(first) + units <= INT_MAX / 64, "too many units");
    args.units += units;
    return first;
  }

  const LoopLayer<T>& layer(int l) const { return of_.layer(l); }
  const LayerColumns<T>& own(int l) const { return columns_.layers[l - 1]; }

  std::vector<int> readers(int values) const {
    std::vector<int> found;
    for (int l = 1; l <= of_.n_layers; ++l)
      if (layer(l).source == values) found.push_back(l);
    return found;
  }
  std::vector<int> adders(int values) const {
    std::vector<int> found;
    for (int l = 1; l <= of_.n_layers; ++l)
      if (layer(l).residual == values) found.push_back(l);
    return found;
  }

  // Of a layer that only activates what one product reads: that product, whose gate it is; 0 for others
  int passed_on_to(int l) const {
    const std::vector<int> next = readers(l);
    const bool only = layer(l).unitwise && !layer(l).weight && layer(l).residual < 0 && next.size() == 1 && adders(l).empty();
    return only && !layer(next[0]).unitwise ? next[0] : 0;
  }

  Gate derivative(int l) const { return {static_cast<int>(own(l).pre >= 0 ? own(l).pre : own(l).value), false, own(l).activation, nullptr}; }

  // a layer of the loop, and the staircase that it mirrors; its values
  int add(LoopLayer<T> next, const int32_t* mirror_of, int source, int residual, const Gate& gate) {
    check(args.n_layers < kMaxLayers, "the gradient of this network's inverse takes more layers than the kernel has");
    args.visible_above[args.n_layers] = mirror_of;
    next.source = source;
    next.residual = residual;
    next.gates = next.column = -1;
    next.known = gate.known;
    next.gate_as_is = gate.as_is;
    next.context_activation = static_cast<int>(gate.activation);
    next.bias = gate.factor;
    next.first = take(next.outputs);
    next.gate = !gate.is_one();
    if (next.gate) next.gates = take(next.outputs);
    args.layers[args.n_layers] = next;
    return ++args.n_layers;
  }

  int add_product(int l, int residual, const Gate& gate) {
    LoopLayer<T> next{};
    next.inputs = layer(l).outputs;
    next.outputs = layer(l).inputs;
    next.ld = layer(l).ld;
    next.weight = layer(l).weight;
    if (next.inputs > 0 && next.outputs > 0) next.weight += (next.outputs - 1) * next.ld + next.inputs - 1;  // the last first
    return add(next, layer(l).visible, by_sums_[l], residual, gate);
  }

  int add_copy(int units, int source, int residual, const Gate& gate) {
    LoopLayer<T> next{};
    next.inputs = next.outputs = units;
    next.unitwise = true;
    return add(next, nullptr, source, residual, gate);
  }

  void mirror() {
    const int n = of_.n_layers;
    by_sums_.assign(n + 1, -1);
    by_total_.assign(n + 1, -1);
    by_sums_[n] = by_total_[n] = 0;
    args.known_outputs = static_cast<int>(own(n).value);
    args.column_outputs = static_cast<int>(own(n).value);
    for (int l = n - 1; l >= 1; --l)
      if (!passed_on_to(l)) mirror_layer(l);
    const std::vector<int> first = readers(0);
    check(first.size() == 1 && adders(0).empty() && !layer(first[0]).unitwise, "the features must be read by one masked layer, and added by none");
    add_product(first[0], -1, {});
  }

  void mirror_layer(int l) {
    const int units = layer(l).outputs;
    int sum = -1;
    for (int a : adders(l)) sum = sum < 0 ? by_total_[a] : add_copy(units, sum, by_total_[a], {});
    const std::vector<int> reading = readers(l);
    check(sum >= 0 || !reading.empty(), "every layer must be read or added by another");
    Gate left = derivative(l);
    bool is_new = false;
    for (int r : reading) {
      const bool alone = reading.size() == 1 && sum < 0;
      is_new = true;
      if (const int product = passed_on_to(r)) {
        sum = add_product(product, sum, derivative(r));
      } else if (layer(r).unitwise) {
        sum = add_copy(units, by_sums_[r], sum, {-1, false, Activation::identity, layer(r).weight});
      } else {
        sum = add_product(r, sum, alone ? left : Gate{});
        if (alone) left = {};
      }
    }
    if (!is_new || !left.is_one()) sum = add_copy(units, sum, -1, left);  // a column is of one layer
    by_total_[l] = by_sums_[l] = sum;
    args.layers[sum - 1].column = static_cast<int>(own(l).value);
    if (layer(l).gate) by_sums_[l] = add_copy(units, sum, -1, {static_cast<int>(own(l).term), true, Activation::identity, nullptr});
  }
};

}  // namespace flowkernels
