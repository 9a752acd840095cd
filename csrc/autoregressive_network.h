// From the tensors of the op's schema to the arguments of the CUDA loop, for its launcher and for its twin on the CPU. No data is read.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <climits>
#include <optional>
#include <vector>

#include "autoregressive_plan.h"
#include "stack_lists.h"

namespace flowkernels {

// The tensors of a conditioner, in the order of the schema, and how a launch uses them.
struct LoopTensors {
  torch::stable::Tensor x;
  std::optional<torch::stable::Tensor> context;
  std::vector<torch::stable::Tensor> weights, biases, context_weights, context_biases, visible;
  std::optional<torch::stable::Tensor> order;
  std::vector<int64_t> activations, wiring;
  ScaleMapParams scale;
  int form;
  bool inverse;
};

// The tensors of a stack's networks, one network after the other, in the order of its schema (stack_lists.h).
struct StackTensors {
  torch::stable::Tensor x;
  std::optional<torch::stable::Tensor> context;
  std::vector<torch::stable::Tensor> weights, biases, context_weights, context_biases, visible, orders, affines;
  std::vector<int64_t> activations, wiring, stages;
  std::vector<double> scales;
};

// Python has checked what users get wrong; here only what would corrupt memory.
template <class T>
class LoopNetwork {
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;

 public:
  LoopArgs<T> args{};

  explicit LoopNetwork(const LoopTensors& t) : like_(t.x) {
    const size_t n = t.weights.size(), contexts = t.context_weights.size();
    check(t.x.dim() == 2, "x must have two dimensions");
    check(n >= 1 && n <= static_cast<size_t>(kMaxLayers), "a conditioner has 1 to 32 layers");
    check_lengths({t.weights, t.biases, t.context_weights, t.context_biases, t.visible, t.activations, t.wiring});
    check((contexts > 0) == t.context.has_value(), "context and context_weights go together");
    kept_.reserve(5 * n + 1);
    args.batch = t.x.size(0);
    args.features = args.units = number(t.x.size(1));
    args.x = static_cast<const T*>(t.x.const_data_ptr());
    args.x_row = t.x.stride(0);
    args.x_column = t.x.stride(1);
    if (t.context) {
      check(t.context->dim() == 2 && t.context->size(0) == args.batch && fits(*t.context, like_.scalar_type()), "context does not fit x");
      args.context_rows = static_cast<const T*>(t.context->const_data_ptr());
      args.context_row = t.context->stride(0);
      args.context_column = t.context->stride(1);
      args.context_features = number(t.context->size(1));
    }
    args.context = take(args.context_features);
    size_t context = 0;
    for (size_t i = 0; i < n; ++i) read_layer(t, static_cast<int>(i), context);
    check(context == contexts, "context_weights do not fit the wiring");
    const LoopLayer<T>& last = args.layer(args.n_layers);
    check(last.outputs == 2 * args.features, "the last layer must give shift and raw scale of each feature");
    check(!last.unitwise && !last.gate && last.residual < 0 && last.activation == static_cast<int>(Activation::identity),
          "the last layer must be a plain masked layer");
    if (t.order) args.order = static_cast<const int64_t*>(vector(*t.order, args.features, ScalarType::Long, "order"));
    args.scale = t.scale;
    args.form = t.form;
    args.inverse = t.inverse;
    choose_panels(args);
  }

  // [3, features] or empty: what happens to x before the map
  void set_affine(const Tensor& affine) {
    if (affine.numel() == 0) return;
    check(affine.dim() == 2 && affine.size(0) == 3 && affine.size(1) == args.features && fits(affine, like_.scalar_type()), "an affine map does not fit x");
    kept_.push_back(affine.is_contiguous() ? affine : torch::stable::contiguous(affine));
    args.affine = static_cast<const T*>(kept_.back().const_data_ptr());
  }

 private:
  Tensor like_;
  std::vector<Tensor> kept_;  // contiguous copies must outlive the launch

  static void check(bool ok, const char* what, const char* more = "") { STD_TORCH_CHECK(ok, "flowkernels::autoregressive: ", what, more); }

  static int number(int64_t n) {
    check(n <= INT_MAX / 64, "too many units");
    return static_cast<int>(n);
  }

  // the first of so many units of the state
  int take(int units) {
    const int first = args.units;
    args.units = number(int64_t(first) + units);
    return first;
  }

  void read_layer(const LoopTensors& t, int i, size_t& context) {
    const Wiring wired(t.wiring, t.context_weights.size(), i);
    const Tensor& weight = t.weights[i];
    LoopLayer<T>& layer = args.layers[i];
    layer.source = static_cast<int>(wired.source);
    layer.residual = static_cast<int>(wired.residual);
    layer.activation = activation(t.activations[i]);
    layer.unitwise = weight.dim() == 1;
    layer.inputs = args.width(layer.source);
    layer.outputs = layer.unitwise ? layer.inputs : weight.dim() == 2 ? number(weight.size(1)) : -1;
    if (!layer.unitwise) layer.weight = matrix(weight, layer.inputs, layer.outputs, layer.ld, "weight");
    if (layer.unitwise && weight.numel() > 0) layer.weight = vector(weight, layer.outputs, "weight");
    if (!layer.unitwise || layer.weight) layer.bias = vector(t.biases[i], layer.outputs, "bias");  // also of a layer without inputs
    check(wired.residual < 0 || args.width(layer.residual) == layer.outputs, "residual must be as wide as its layer");
    layer.visible = static_cast<const int32_t*>(vector(t.visible[i], layer.outputs, ScalarType::Int, "visible"));
    layer.first = take(layer.outputs);
    layer.gates = -1;
    if (wired.context != 0) {
      layer.takes_context = true;
      check(context < t.context_weights.size() && !layer.unitwise, "context_weights do not fit the wiring");
      layer.context_weight = matrix(t.context_weights[context], args.context_features, layer.outputs, layer.context_ld, "context_weight");
      if (!t.context_biases.empty()) layer.context_bias = vector(t.context_biases[context], layer.outputs, "context_bias");
      layer.context_activation = activation(wired.context_activation);
      layer.gate = wired.context == 2;
      if (layer.gate) layer.gates = take(layer.outputs);
      ++context;
    }
    args.n_layers = i + 1;
  }

  static int activation(int64_t code) {
    check(code >= 0 && code <= static_cast<int>(Activation::sigmoid), "unknown activation");
    return static_cast<int>(code);
  }

  bool fits(const Tensor& t, ScalarType type) const {
    check(t.is_cuda() == like_.is_cuda() && t.get_device_index() == like_.get_device_index(), "all tensors must be on the device of x");
    return t.scalar_type() == type;
  }

  const void* vector(const Tensor& t, int64_t length, ScalarType type, const char* name) {
    check(t.dim() == 1 && t.size(0) == length && fits(t, type), name, " does not fit its layer");
    kept_.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return kept_.back().const_data_ptr();
  }
  const T* vector(const Tensor& t, int64_t length, const char* name) { return static_cast<const T*>(vector(t, length, like_.scalar_type(), name)); }

  const T* matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t& ld, const char* name) {
    check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && fits(t, like_.scalar_type()), name, " does not fit its layer");
    kept_.push_back(columns <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t));
    ld = kept_.back().stride(0);
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }
};

// The maps of a stack, each from what the one before it wrote. y: [batch, features]; kept: what all maps but the last gave, or empty;
// all contiguous.
template <class T>
std::vector<LoopNetwork<T>> read_stack(const StackTensors& t, T* y, T* kept, T* logabsdet, bool keep) {
  const size_t n = t.orders.size();
  STD_TORCH_CHECK(n >= 1 && t.stages.size() == MapNumbers::kNumbers * n && t.scales.size() == 2 * n && (t.affines.empty() || t.affines.size() == n),
                  "flowkernels::autoregressive: every map needs its entries in each list");
  Networks networks({t.weights, t.biases, t.context_weights, t.context_biases, t.visible, t.activations, t.wiring});
  const auto list = [](auto part) { return std::vector(part.begin(), part.end()); };
  std::vector<LoopNetwork<T>> maps;
  maps.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const MapNumbers numbers(t.stages, i);
    const NetworkParts parts = networks.next(numbers);
    const LoopTensors one{t.x,
                          numbers.contexts > 0 ? t.context : std::nullopt,
                          list(parts.weights),
                          list(parts.biases),
                          list(parts.context_weights),
                          list(parts.context_biases),
                          list(parts.visible),
                          t.orders[i],
                          list(parts.activations),
                          list(parts.wiring),
                          {static_cast<int>(numbers.scale_kind), t.scales[2 * i], t.scales[2 * i + 1]},
                          static_cast<int>(numbers.form),
                          numbers.inverse != 0};
    LoopArgs<T>& args = maps.emplace_back(one).args;
    args.bfloat16_weights = sizeof(T) == 4 && numbers.bfloat16_weights != 0;
    if (!t.affines.empty()) maps.back().set_affine(t.affines[i]);
    if (i > 0) {
      args.x = maps[i - 1].args.y;
      args.x_row = args.features;
      args.x_column = 1;
    }
    args.y = keep && i + 1 < n ? kept + static_cast<int64_t>(i) * args.batch * args.features : y;
    args.logabsdet = logabsdet;
    args.accumulate = i > 0;
  }
  return maps;
}

}  // namespace flowkernels
