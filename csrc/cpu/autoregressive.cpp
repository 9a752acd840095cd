// The fused sequential loop for CPU tensors: arguments, schedule, threads, registration. The loop itself is in autoregressive_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/autoregressive.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/autoregressive_tiles.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The message is built where a check fails: there is one check per unit.
inline void check(bool ok, const char* what, const char* more = "") { STD_TORCH_CHECK(ok, "flowkernels::autoregressive: ", what, more); }

// How a layer is wired: kWiring numbers of the list that the op takes.
constexpr size_t kWiring = 4;
struct Wiring {
  int64_t source, residual, context, context_activation;  // context: 0 none, 1 is added, 2 gates
};

Wiring read_wiring(const int64_t* numbers) { return {numbers[0], numbers[1], numbers[2], numbers[3]}; }

int activation_code(int64_t code) {
  check(code >= 0 && code <= static_cast<int>(Activation::sigmoid), "unknown activation");
  return static_cast<int>(code);
}

// Python has checked what users get wrong; here only what would corrupt memory.
template <class T>
std::tuple<Tensor, Tensor> launch(const Tensor& x, const std::optional<Tensor>& context, const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& biases, const std::vector<Tensor>& context_weights,
                                  const std::vector<Tensor>& context_biases, const std::vector<Tensor>& visible,
                                  const std::optional<Tensor>& order, const std::vector<int64_t>& activations,
                                  const std::vector<int64_t>& wiring, ScaleMapParams scale, int form, bool inverse) {
  const size_t n_layers = weights.size();
  check(x.dim() == 2, "x must have two dimensions");
  check(n_layers >= 1 && biases.size() == n_layers && visible.size() == n_layers && activations.size() == n_layers &&
            (wiring.empty() || wiring.size() == kWiring * n_layers),
        "weights, biases, visible, activations and wiring must have one entry per layer");
  check(context_weights.empty() != context.has_value(), "context and context_weights go together");
  check(context_biases.empty() || context_biases.size() == context_weights.size(), "context_biases must have one entry per context weight");
  const int64_t batch = x.size(0), features = x.size(1);
  const int64_t context_features = context ? context->size(1) : 0;

  std::vector<Tensor> kept;  // contiguous copies must outlive the loop
  kept.reserve(5 * n_layers + 1);
  auto vector = [&](const Tensor& t, int64_t length, ScalarType type, const char* name) {
    check(t.dim() == 1 && t.size(0) == length && t.scalar_type() == type && t.is_cpu(), name, " does not fit its layer");
    kept.push_back(made_contiguous(t));
    return kept.back().const_data_ptr();
  };
  auto matrix = [&](const Tensor& t, int64_t rows, int64_t columns, const char* name) {
    check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == x.scalar_type() && t.is_cpu(),
          name, " does not fit its layer");
    kept.push_back(rows_contiguous(t));
    return static_cast<const T*>(kept.back().const_data_ptr());
  };

  AutoregressiveArgs<T> args{};
  std::vector<MaskedLayer<T>> layers;
  layers.reserve(n_layers);
  auto width = [&](int values) { return values == 0 ? features : layers[values - 1].outputs; };
  size_t n_contexts = 0;
  for (size_t i = 0; i < n_layers; ++i) {
    const Wiring wired = wiring.empty() ? Wiring{int64_t(i), -1, !context_weights.empty(), 0} : read_wiring(&wiring[kWiring * i]);
    check(wired.source >= 0 && wired.source <= int64_t(i) && wired.residual >= -1 && wired.residual <= int64_t(i),
          "a layer must read the features or a layer before it");
    MaskedLayer<T> layer{};
    layer.source = static_cast<int>(wired.source);
    layer.residual = static_cast<int>(wired.residual);
    layer.unitwise = weights[i].dim() == 1;
    layer.inputs = width(layer.source);
    layer.outputs = layer.unitwise ? layer.inputs : weights[i].dim() == 2 ? weights[i].size(1) : -1;
    if (!layer.unitwise) {
      layer.weight = matrix(weights[i], layer.inputs, layer.outputs, "weight");
      layer.ld = kept.back().stride(0);
      layer.bias = static_cast<const T*>(vector(biases[i], layer.outputs, x.scalar_type(), "bias"));
    } else if (weights[i].numel() > 0) {
      layer.weight = static_cast<const T*>(vector(weights[i], layer.outputs, x.scalar_type(), "weight"));
      layer.bias = static_cast<const T*>(vector(biases[i], layer.outputs, x.scalar_type(), "bias"));
    }
    layer.visible = static_cast<const int32_t*>(vector(visible[i], layer.outputs, ScalarType::Int, "visible"));
    check(layer.residual < 0 || width(layer.residual) == layer.outputs, "residual must be as wide as its layer");
    if (wired.context) {
      check(n_contexts < context_weights.size() && !layer.unitwise, "context_weights do not fit the wiring");
      layer.context_weight = matrix(context_weights[n_contexts], context_features, layer.outputs, "context_weight");
      layer.context_ld = kept.back().stride(0);
      if (!context_biases.empty())
        layer.context_bias = static_cast<const T*>(vector(context_biases[n_contexts], layer.outputs, x.scalar_type(), "context_bias"));
      ++n_contexts;
      layer.gate = wired.context == 2;
      args.gated |= layer.gate;
    }
    layer.activation = activation_code(activations[i]);
    layer.context_activation = activation_code(wired.context_activation);
    bool descends = layer.outputs > 0 && (layer.visible[0] < 0 || layer.visible[layer.outputs - 1] > layer.inputs);
    for (int64_t j = 1; j < layer.outputs; ++j) descends |= layer.visible[j] < layer.visible[j - 1];
    check(!descends, "visible must ascend from 0 to the number of inputs");
    layers.push_back(layer);
  }
  const MaskedLayer<T>& last = layers.back();
  check(last.outputs == 2 * features, "the last layer must give shift and raw scale of each feature");
  check(!last.joins() && last.activation == static_cast<int>(Activation::identity),
        "the last layer must be a plain masked layer");

  args.layers = layers.data();
  args.n_layers = static_cast<int>(n_layers);
  args.x = {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
  if (context) {
    check(context->dim() == 2 && context->size(0) == batch && context->scalar_type() == x.scalar_type() && context->is_cpu(),
          "context does not fit x");
    args.context = {static_cast<const T*>(context->const_data_ptr()), context->stride(0), context->stride(1)};
  }
  args.batch = batch;
  args.features = features;
  args.context_features = context_features;
  if (order) {
    args.order = static_cast<const int64_t*>(vector(*order, features, ScalarType::Long, "order"));
    for (int64_t p = 0; p < features; ++p) check(args.order[p] >= 0 && args.order[p] < features, "order must be a permutation");
  }
  args.scale = scale;
  args.form = form;
  args.inverse = inverse;
  const std::vector<int64_t> ends = make_schedule(layers.data(), args.n_layers, features, inverse);
  check(features == 0 || !ends.empty(), "the network is not autoregressive");
  args.ends = ends.data();
  args.n_steps = static_cast<int64_t>(ends.size() / (n_layers + 1));

  Tensor y = empty(x, {batch, features}), logabsdet = empty(x, {batch});
  args.y = static_cast<T*>(y.mutable_data_ptr());
  args.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  if (batch > 0) {
    const Tiling tiling = FK_DISPATCH(plan_tiles<T>(args, batch, static_cast<int64_t>(torch::stable::get_num_threads())));
    auto run = [&](int64_t first, int64_t last) { FK_DISPATCH(run_tiles<T>(args, tiling, first, last)); };
    if (tiling.tiles == 1)
      run(0, 1);
    else
      torch::stable::parallel_for(0, tiling.tiles, 1, run);
  }
  return {y, logabsdet};
}

std::tuple<Tensor, Tensor> autoregressive(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                          std::vector<Tensor> context_weights, std::vector<Tensor> context_biases,
                                          std::vector<Tensor> visible, std::optional<Tensor> order, std::vector<int64_t> activations,
                                          std::vector<int64_t> wiring, int64_t scale_kind, double scale_p0, double scale_p1, int64_t form,
                                          bool inverse) {
  const ScaleMapParams scale{static_cast<int>(scale_kind), scale_p0, scale_p1};
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  auto go = x.scalar_type() == ScalarType::Float ? launch<float> : launch<double>;
  return go(x, context, weights, biases, context_weights, context_biases, visible, order, activations, wiring, scale,
            static_cast<int>(form), inverse);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() != flowkernels::Target::none) m.impl("autoregressive", TORCH_BOX(&flowkernels::autoregressive));
}
