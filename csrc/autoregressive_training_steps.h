// The launches of a training step on a GPU, in turn: forward through a stack of maps, which keeps every layer's values, and back to the
// gradients. For its launcher (cuda/autoregressive_training.cu) and for its twin on the CPU.
//
// `Launch` runs a kernel with its arguments: up, down, across, to_order, map, map_backward, unitwise_up, settle, column_sum; and makes tensors:
// empty(sizes).
#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

#include "autoregressive_network.h"
#include "cuda/training_rows.h"

namespace flowkernels {

using Tensors = std::vector<torch::stable::Tensor>;

// One map of a stack in training
template <class T>
struct TrainingMap {
  const LoopArgs<T>* args;
  TrainingColumns<T> columns;
  torch::stable::Tensor kept;
  T* values;

  TrainingMap(const LoopArgs<T>& args, const TrainingColumns<T>& columns, torch::stable::Tensor kept)
      : args(&args), columns(columns), kept(kept), values(static_cast<T*>(kept.mutable_data_ptr())) {}

  static TrainingColumns<T> columns_of(const LoopArgs<T>& args) {
    return {args.features, std::span<const LoopLayer<T>>(args.layers, args.n_layers)};
  }
  int64_t outputs() const { return columns.layers.back().value; }
  Matrix<T> at(int64_t column) const { return {values + column, columns.values}; }
};

// The context as a matrix with contiguous rows; `kept` holds it
template <class T>
Matrix<T> context_matrix(const std::optional<torch::stable::Tensor>& context, std::optional<torch::stable::Tensor>& kept) {
  if (!context) return {nullptr, 0};
  kept = context->size(1) <= 1 || context->stride(1) == 1 ? *context : torch::stable::contiguous(*context);
  return {static_cast<const T*>(kept->const_data_ptr()), kept->stride(0)};
}

template <class T, class Launch>
void rise_through(const TrainingMap<T>& map, Matrix<T> context, Launch& launch) {
  const LoopArgs<T>& args = *map.args;
  for (int l = 1; l <= args.n_layers; ++l) {
    const LoopLayer<T>& layer = args.layer(l);
    const LayerColumns<T>& own = map.columns.layers[l - 1];
    const Rise<T> rise{map.values, map.columns.values, own, layer.bias, nullptr};
    if (layer.unitwise) {
      UnitwiseUpArgs<T> unitwise{args.batch, rise};
      unitwise.rise.bias = nullptr;
      launch.unitwise_up(unitwise);
      continue;
    }
    UpArgs<T> product{map.at(own.input), {layer.weight, layer.ld}, {}, {}, layer.visible, args.batch, layer.inputs, layer.outputs, 0, rise};
    if (layer.takes_context) {
      const Matrix<T> weight{layer.context_weight, layer.context_ld};
      if (own.term >= 0) {  // a product of its own
        LayerColumns<T> term{};
        term.units = own.units, term.value = own.term, term.pre = own.term_pre, term.activation = own.context_activation;
        term.residual = term.sum = term.term = -1;
        launch.up(UpArgs<T>{context, weight, {}, {}, nullptr, args.batch, args.context_features, layer.outputs, 0,
                            {map.values, map.columns.values, term, layer.context_bias, nullptr}});
      } else {
        product.context = context, product.context_weight = weight, product.contexts = args.context_features;
        product.rise.context_bias = layer.context_bias;
      }
    }
    launch.up(product);
  }
}

// y and logabsdet from x; every map keeps its values
template <class T, class Launch>
void train_forward(const std::vector<TrainingMap<T>>& maps, FeatureRows<T> x, Matrix<T> context, T* y, T* logabsdet, Launch& launch) {
  const LoopArgs<T>& first = *maps[0].args;
  launch.to_order(first.batch, ToOrder<T>{x, first.order, maps[0].values, maps[0].columns.values, first.features});
  for (size_t i = 0; i < maps.size(); ++i) {
    const TrainingMap<T>& map = maps[i];
    const LoopArgs<T>& args = *map.args;
    rise_through(map, context, launch);
    MapArgs<T> end{args.batch, args.features, map.values, map.columns.values, map.outputs(), args.order, args.scale, static_cast<Form>(args.form),
                   y, logabsdet, i > 0, {}};
    if (i + 1 < maps.size())
      end.next = {{y, args.features, 1}, maps[i + 1].args->order, maps[i + 1].values, maps[i + 1].columns.values, args.features};
    launch.map(end);
  }
}

// The gradients of a map's parameters, in the order of the schema
struct ParameterTensors {
  Tensors weights, biases, context_weights, context_biases;
};

// Gradients of parameters that one launch finds, when enough of them are known
template <class T, class Launch>
class AcrossQueue {
 public:
  AcrossQueue(int64_t batch, Launch& launch) : batch_(batch), launch_(launch) { args_.batch = batch; }

  void add(Matrix<T> input, Matrix<T> delta, const int32_t* visible, int inputs, int outputs, T* weight, T* bias) {
    if (outputs == 0) return;
    if (args_.n == AcrossArgs<T>::kMost) flush();
    WeightGradient<T>& of = args_.of[args_.n++];
    of = {input, delta, visible, inputs, outputs, weight, bias, 0, args_.parts_size};
    args_.parts_size += of.size();
  }

  void flush() {
    if (args_.n == 0) return;
    launch_.across(args_);
    args_ = {};
    args_.batch = batch_;
  }

 private:
  int64_t batch_;
  Launch& launch_;
  AcrossArgs<T> args_{};
};

// Down through the layers of a map, whose `deltas` hold the gradients by its outputs and the map's own by its features
template <class T, class Launch>
class Descent {
 public:
  Descent(const TrainingMap<T>& map, T* deltas, Matrix<T> context, Launch& launch) : map_(map), args_(*map.args), deltas_(deltas), context_(context), launch_(launch) {
    arrived_.assign(args_.n_layers + 1, false);
    settled_.assign(args_.n_layers + 1, false);
    arrived_[0] = arrived_[args_.n_layers] = true;
    first_reader_.assign(args_.n_layers + 1, args_.n_layers + 1);
    for (int l = args_.n_layers; l >= 1; --l) {
      first_reader_[args_.layer(l).source] = l;
      if (args_.layer(l).residual >= 0) first_reader_[args_.layer(l).residual] = l;
    }
  }

  // need_features: whether anybody asks for the gradient by the features
  void run(bool need_features) {
    for (int l = args_.n_layers; l >= 1; --l) {
      const LoopLayer<T>& layer = args_.layer(l);
      const LayerColumns<T>& own = columns(l);
      const bool goes_down = layer.source > 0 || need_features, known = settled_[l] || (arrived_[l] && is_plain(own));
      if (!known || (layer.unitwise && goes_down)) settle(l, layer.unitwise && goes_down);
      if (layer.unitwise || !goes_down) continue;
      const bool goes_on = settles_with(layer.source, l);
      launch_.down(DownArgs<T>{delta(own.value), {layer.weight, layer.ld}, layer.visible, args_.batch, layer.inputs, layer.outputs, fall(layer.source, goes_on)});
    }
  }

  // Where the gradients by all totals are known: those by context terms that are more than an addend, and by sums that a gate multiplies
  void settle_terms() {
    for (int l = 1; l <= args_.n_layers; ++l) {
      if (columns(l).term < 0) continue;
      SettleArgs<T> settle{};
      settle.batch = args_.batch;
      settle.settles = true;
      settle.own = {map_.values, deltas_, map_.columns.values, map_.columns.deltas, columns(l), false, true, false};
      settle.own.to.activation = Activation::identity;
      settle.own.to.residual = -1;
      launch_.settle(settle);
    }
  }

  // The gradient by the context, [batch, contexts]; adds: to what dcontext holds
  void find_context(T* dcontext, bool adds) {
    Fall<T> to{nullptr, dcontext, 0, args_.context_features, {}, adds, false, false};
    for (int l = args_.n_layers; l >= 1; --l) {
      const LoopLayer<T>& layer = args_.layer(l);
      if (!layer.takes_context) continue;
      const Matrix<T> weight{layer.context_weight, layer.context_ld};
      launch_.down(DownArgs<T>{delta(columns(l).context_delta()), weight, nullptr, args_.batch, args_.context_features, layer.outputs, to});
      to.adds = true;
    }
  }

  void find_parameters(const ParameterTensors& to, AcrossQueue<T, Launch>& queue) {
    const auto data = [](const torch::stable::Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    for (int l = 1, contexts = 0; l <= args_.n_layers; ++l) {
      const LoopLayer<T>& layer = args_.layer(l);
      const LayerColumns<T>& own = columns(l);
      T *weight = data(to.weights[l - 1]), *bias = data(to.biases[l - 1]);
      if (layer.unitwise) {
        if (layer.weight) launch_.column_sum(ColumnSumArgs<T>{map_.at(own.input), delta(own.value), args_.batch, layer.outputs, weight, bias});
        continue;
      }
      queue.add(map_.at(own.input), delta(own.value), layer.visible, layer.inputs, layer.outputs, weight, bias);
      if (!layer.takes_context) continue;
      T* context_bias = to.context_biases.empty() ? nullptr : data(to.context_biases[contexts]);
      queue.add(context_, delta(own.context_delta()), nullptr, args_.context_features, layer.outputs, data(to.context_weights[contexts]), context_bias);
      ++contexts;
    }
  }

 private:
  const TrainingMap<T>& map_;
  const LoopArgs<T>& args_;
  T* deltas_;
  Matrix<T> context_;
  Launch& launch_;
  std::vector<bool> arrived_, settled_;  // of each layer's values: whether some gradient by them has arrived, and has gone on to the sums
  std::vector<int> first_reader_;        // the lowest layer that reads or adds them: what arrives from it is the last

  const LayerColumns<T>& columns(int l) const { return map_.columns.layers[l - 1]; }
  Matrix<T> delta(int64_t column) const { return {deltas_ + column, map_.columns.deltas}; }

  // whether its sums' gradients are those by its values
  static bool is_plain(const LayerColumns<T>& own) { return own.activation == Activation::identity && own.residual < 0 && own.term < 0; }

  // whether nothing arrives at these values after layer l. What layer l itself adds to others has gone there before its product.
  bool settles_with(int values, int l) const { return values > 0 && first_reader_[values] == l; }

  Fall<T> fall(int values, bool goes_on) {
    Fall<T> to{map_.values, deltas_, map_.columns.values, map_.columns.deltas, {}, arrived_[values], goes_on, false};
    if (values > 0) to.to = columns(values);
    if (goes_on && to.to.residual >= 0) {
      const int added = args_.layer(values).residual;
      to.residual_adds = arrived_[added];
      arrived_[added] = true;
    }
    arrived_[values] = true;
    settled_[values] = settled_[values] || goes_on;
    return to;
  }

  void settle(int l, bool goes_down) {
    SettleArgs<T> settle{};
    settle.batch = args_.batch;
    settle.settles = !settled_[l];
    settle.is_unread = !arrived_[l];
    settle.own = fall(l, settle.settles);
    settle.own.adds = false;
    settle.goes_down = goes_down;
    if (goes_down) settle.source = fall(args_.layer(l).source, settles_with(args_.layer(l).source, l));
    launch_.settle(settle);
  }
};

template <class T>
struct Cotangents {
  FeatureRows<T> dy;
  const T* dlogabsdet;
  int64_t dlogabsdet_step;
};

// dx, where it is asked for or `dx` is room to work in; dcontext, or null; and the gradients of the parameters of each map, or none. together: bytes
// of deltas that maps may hold whose parameters' gradients are found by one launch
template <class T, class Launch>
void train_backward(const std::vector<TrainingMap<T>>& maps, Cotangents<T> of, Matrix<T> context, bool need_dx, T* dx, T* dcontext,
                    const std::vector<ParameterTensors>& parameters, int64_t together, Launch& launch) {
  const LoopArgs<T>& any = *maps[0].args;
  AcrossQueue<T, Launch> queue(any.batch, launch);
  Tensors held;  // deltas that the queue reads
  int64_t bytes = 0;
  MapBackwardArgs<T> step{};
  step.batch = any.batch, step.features = any.features, step.dlogabsdet = of.dlogabsdet, step.dlogabsdet_step = of.dlogabsdet_step;
  step.dy = of.dy, step.dx = dx;
  std::optional<torch::stable::Tensor> above;
  bool adds_dcontext = false;
  for (size_t i = maps.size(); i-- > 0;) {
    const TrainingMap<T>& map = maps[i];
    const LoopArgs<T>& args = *map.args;
    torch::stable::Tensor deltas = launch.empty({args.batch, map.columns.deltas});
    step.values = map.values, step.values_ld = map.columns.values, step.outputs = map.outputs();
    step.order = args.order, step.scale = args.scale, step.form = static_cast<Form>(args.form);
    step.deltas = static_cast<T*>(deltas.mutable_data_ptr()), step.deltas_ld = map.columns.deltas;
    launch.map_backward(step);
    Descent<T, Launch> descent(map, step.deltas, context, launch);
    descent.run(need_dx || i > 0);
    if (dcontext && args.context_features > 0) {
      descent.find_context(dcontext, adds_dcontext);
      adds_dcontext = true;
    }
    if (!parameters.empty()) descent.find_parameters(parameters[i], queue);
    step.above = step.deltas, step.above_ld = step.deltas_ld, step.above_order = args.order;
    step.dy = {dx, any.features, 1};
    bytes += args.batch * map.columns.deltas * static_cast<int64_t>(sizeof(T));
    held.push_back(deltas);
    if (bytes >= together) {
      queue.flush();
      held.clear();
      bytes = 0;
    }
    above = deltas;  // until its dx has been read
  }
  queue.flush();
  step.values = nullptr;
  if (need_dx) launch.map_backward(step);
}

}  // namespace flowkernels
