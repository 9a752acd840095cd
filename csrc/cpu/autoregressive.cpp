// The fused sequential loop for CPU tensors: arguments, schedule, threads, registration. The loop itself is in autoregressive_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/autoregressive.h"
#include "cpu/scratch.h"
#include "cpu/stack_lists.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/autoregressive_tiles.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The message is built where a check fails: there is one check per unit.
inline void check(bool ok, const char* what, const char* more = "") { STD_TORCH_CHECK(ok, "flowkernels::autoregressive: ", what, more); }

int activation_code(int64_t code) {
  check(code >= 0 && code <= static_cast<int>(Activation::sigmoid), "unknown activation");
  return static_cast<int>(code);
}

// The tensors of a conditioner, in the order of the schema.
struct Parts {
  std::span<const Tensor> weights, biases, context_weights, context_biases, visible;
  std::span<const int64_t> activations, wiring;
};

// How a layer is wired: four numbers of the list `wiring`. Where that is empty, the layers are a chain, and the context joins the sums
// of all layers or of the first.
struct Wiring {
  int64_t source, residual, context, context_activation;  // context: 0 none, 1 is added, 2 gates

  static constexpr size_t kNumbers = 4;
  Wiring(const Parts& parts, size_t i)
      : source(static_cast<int64_t>(i)), residual(-1), context(i < parts.context_weights.size()), context_activation(0) {
    if (parts.wiring.empty()) return;
    const int64_t* numbers = &parts.wiring[kNumbers * i];
    source = numbers[0], residual = numbers[1], context = numbers[2], context_activation = numbers[3];
    check(source >= 0 && source <= int64_t(i) && residual >= -1 && residual <= int64_t(i), "a layer must read the features or a layer before it");
  }
};

// Reads the layers of a conditioner. Python has checked what users get wrong; here only what would corrupt memory.
template <class T>
struct Network {
  std::vector<MaskedLayer<T>> layers;
  std::vector<Tensor> kept;  // contiguous copies must outlive the loop
  const ScalarType dtype;

  Network(const Parts& parts, ScalarType dtype, int64_t features, int64_t context_features) : dtype(dtype) {
    const size_t n = parts.weights.size(), n_contexts = parts.context_weights.size();
    check(n >= 1 && parts.biases.size() == n && parts.visible.size() == n && parts.activations.size() == n &&
              (parts.wiring.empty() ? n_contexts <= 1 || n_contexts == n : parts.wiring.size() == Wiring::kNumbers * n),
          "weights, biases, visible, activations and wiring must have one entry per layer");
    check(parts.context_biases.empty() || parts.context_biases.size() == n_contexts, "context_biases must have one entry per context weight");
    kept.reserve(5 * n);
    layers.reserve(n);
    size_t context = 0;
    for (size_t i = 0; i < n; ++i) {
      const Wiring wired(parts, i);
      layers.push_back(layer(parts, i, wired, features));
      if (wired.context) read_context(parts, context++, wired, context_features);
    }
    const MaskedLayer<T>& last = layers.back();
    check(!last.joins() && last.activation == static_cast<int>(Activation::identity), "the last layer must be a plain masked layer");
  }

  MaskedLayer<T> layer(const Parts& parts, size_t i, const Wiring& wired, int64_t features) {
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
    check(wired.residual < 0 || width(wired.residual) == outputs, "residual must be as wide as its layer");
    const int32_t* visible = layer.visible = static_cast<const int32_t*>(vector(parts.visible[i], outputs, ScalarType::Int, "visible"));
    bool descends = outputs > 0 && (visible[0] < 0 || visible[outputs - 1] > inputs);
    for (int64_t j = 1; j < outputs; ++j) descends |= visible[j] < visible[j - 1];
    check(!descends, "visible must ascend from 0 to the number of inputs");
    return layer;
  }

  // the context term of the layer read last
  void read_context(const Parts& parts, size_t number, const Wiring& wired, int64_t context_features) {
    MaskedLayer<T>& layer = layers.back();
    check(number < parts.context_weights.size() && !layer.unitwise, "context_weights do not fit the wiring");
    layer.context_weight = matrix(parts.context_weights[number], context_features, layer.outputs, layer.context_ld, "context_weight");
    if (!parts.context_biases.empty()) layer.context_bias = vector(parts.context_biases[number], layer.outputs, "context_bias");
    layer.context_activation = activation_code(wired.context_activation);
    layer.gate = wired.context == 2;
  }

  const void* vector(const Tensor& t, int64_t length, ScalarType type, const char* name) {
    check(t.dim() == 1 && t.size(0) == length && t.scalar_type() == type && t.is_cpu(), name, " does not fit its layer");
    kept.push_back(made_contiguous(t));
    return kept.back().const_data_ptr();
  }

  const T* vector(const Tensor& t, int64_t length, const char* name) { return static_cast<const T*>(vector(t, length, dtype, name)); }

  const T* matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t& ld, const char* name) {
    check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == dtype && t.is_cpu(), name, " does not fit its layer");
    kept.push_back(rows_contiguous(t));
    ld = kept.back().stride(0);
    return static_cast<const T*>(kept.back().const_data_ptr());
  }
};

// One map and all that its arguments point to. It must stay where it is.
template <class T>
struct Map {
  Network<T> network;
  AutoregressiveArgs<T> args{};
  std::vector<int64_t> position, ends;

  Map(const Tensor& x, const std::optional<Tensor>& context, const Parts& parts, const Tensor* order, const Tensor* affine, ScaleMapParams scale,
      int form, bool inverse)
      : network(parts, x.scalar_type(), x.size(1), context ? context->size(1) : 0) {
    const int64_t features = args.features = x.size(1);
    check(parts.context_weights.empty() || context.has_value(), "context is missing");
    args.batch = x.size(0);
    args.layers = network.layers.data();
    args.n_layers = static_cast<int>(network.layers.size());
    for (const MaskedLayer<T>& layer : network.layers) args.gated |= layer.gate;
    args.x = {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
    if (!parts.context_weights.empty()) {
      check(context->dim() == 2 && context->size(0) == args.batch && context->scalar_type() == x.scalar_type() && context->is_cpu(),
            "context does not fit x");
      args.context = {static_cast<const T*>(context->const_data_ptr()), context->stride(0), context->stride(1)};
      args.context_features = context->size(1);
    }
    if (order) {
      args.order = static_cast<const int64_t*>(network.vector(*order, features, ScalarType::Long, "order"));
      position.assign(features, -1);
      for (int64_t p = 0; p < features; ++p) {
        check(args.order[p] >= 0 && args.order[p] < features && position[args.order[p]] < 0, "order must be a permutation");
        position[args.order[p]] = p;
      }
      args.position = position.data();
    }
    if (affine) {
      int64_t row;
      args.affine = network.matrix(*affine, 3, features, row, "affine");
      check(row == features, "affine must be contiguous");
    }
    args.scale = scale;
    args.form = form;
    args.inverse = inverse;
    const int64_t outputs = network.layers.back().outputs;
    args.output_columns = OutputColumns(outputs, features, scale.kind);
    check(order || (args.output_columns.passing == 0 && args.output_columns.each == 2), "x does not have the network's features");
    check(args.output_columns.fit(outputs, features), "the last layer must give shift and raw scale of each feature that does not pass");
    check(scale.kind != static_cast<int>(ScaleKind::unit) || form != static_cast<int>(Form::gate), "a gate needs a scale");
    ends = make_schedule(args.layers, args.n_layers, features, args.output_columns, inverse);
    check(features == 0 || !ends.empty(), "the network is not autoregressive");
    args.ends = ends.data();
    args.n_steps = static_cast<int64_t>(ends.size() / (args.n_layers + 1));
  }
};

// Runs maps one after another, whose outputs are set.
template <class T>
void run(const std::vector<AutoregressiveArgs<T>>& maps) {
  const int64_t batch = maps[0].batch, threads = static_cast<int64_t>(torch::stable::get_num_threads());
  if (batch == 0) return;
  Tiling tiling = FK_DISPATCH(plan_tiles<T>(maps[0], batch, threads));
  for (const AutoregressiveArgs<T>& map : maps) {
    const Tiling own = FK_DISPATCH(plan_tiles<T>(map, batch, threads));
    if (own.rows < tiling.rows) tiling = own;
  }
  auto go = [&](int64_t first, int64_t last) {
    FK_DISPATCH(run_tiles<T>(maps.data(), static_cast<int64_t>(maps.size()), tiling, first, last));
  };
  if (tiling.tiles == 1)
    go(0, 1);
  else
    torch::stable::parallel_for(0, tiling.tiles, 1, go);
}

template <class T>
std::tuple<Tensor, Tensor> one_map(const Tensor& x, const std::optional<Tensor>& context, const Parts& parts, const std::optional<Tensor>& order,
                                   ScaleMapParams scale, int form, bool inverse) {
  check(x.dim() == 2, "x must have two dimensions");
  check(parts.context_weights.empty() != context.has_value(), "context and context_weights go together");
  Map<T> map(x, context, parts, order ? &*order : nullptr, nullptr, scale, form, inverse);
  Tensor y = empty(x, {x.size(0), x.size(1)}), logabsdet = empty(x, {x.size(0)});
  map.args.y = static_cast<T*>(y.mutable_data_ptr());
  map.args.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  run<T>({map.args});
  return {y, logabsdet};
}

std::tuple<Tensor, Tensor> autoregressive(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                          std::vector<Tensor> context_weights, std::vector<Tensor> context_biases,
                                          std::vector<Tensor> visible, std::optional<Tensor> order, std::vector<int64_t> activations,
                                          std::vector<int64_t> wiring, int64_t scale_kind, double scale_p0, double scale_p1, int64_t form,
                                          bool inverse) {
  const ScaleMapParams scale{static_cast<int>(scale_kind), scale_p0, scale_p1};
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  auto go = x.scalar_type() == ScalarType::Float ? one_map<float> : one_map<double>;
  const Parts parts{weights, biases, context_weights, context_biases, visible, activations, wiring};
  return go(x, context, parts, order, scale, static_cast<int>(form), inverse);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> stack(const Tensor& x, const std::optional<Tensor>& context, const Parts& all, std::span<const Tensor> orders,
                                         std::span<const Tensor> affines, std::span<const int64_t> stages, std::span<const double> scales,
                                         bool keep) {
  const size_t n = orders.size();
  check(x.dim() == 2, "x must have two dimensions");
  check(n >= 1 && affines.size() == n && stages.size() == Stage::kNumbers * n && scales.size() == 2 * n, "every map needs its entries in each list");
  const int64_t batch = x.size(0), features = x.size(1);
  Rest<Tensor> weights{all.weights}, biases{all.biases}, context_weights{all.context_weights}, context_biases{all.context_biases}, visible{all.visible};
  Rest<int64_t> activations{all.activations}, wiring{all.wiring};
  Tensor y = empty(x, {batch, features}), logabsdet = empty(x, {batch});
  Tensor kept = empty(x, {keep ? static_cast<int64_t>(n) - 1 : 0, batch, features});

  std::vector<Map<T>> maps;
  std::vector<AutoregressiveArgs<T>> args;
  maps.reserve(n);
  args.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Stage stage(stages, i);
    const Parts parts{weights.next(stage.layers),
                      biases.next(stage.layers),
                      context_weights.next(stage.contexts),
                      context_biases.next(stage.context_biases),
                      visible.next(stage.layers),
                      activations.next(stage.layers),
                      wiring.next(stage.wired ? static_cast<int64_t>(Wiring::kNumbers) * stage.layers : 0)};
    const ScaleMapParams scale{static_cast<int>(stage.scale_kind), scales[2 * i], scales[2 * i + 1]};
    maps.emplace_back(x, context, parts, &orders[i], affines[i].numel() ? &affines[i] : nullptr, scale, static_cast<int>(stage.form), stage.inverse != 0);
    AutoregressiveArgs<T>& map = args.emplace_back(maps.back().args);
    if (i > 0) {
      map.x = {args[i - 1].y, features, 1};
      map.adds_log = true;
    }
    map.y = static_cast<T*>(y.mutable_data_ptr());
    if (keep && i + 1 < n) map.y = static_cast<T*>(kept.mutable_data_ptr()) + static_cast<int64_t>(i) * batch * features;
    map.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  }
  run<T>(args);
  return {y, logabsdet, kept};
}

std::tuple<Tensor, Tensor, Tensor> autoregressive_stack(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                        std::vector<Tensor> context_weights, std::vector<Tensor> context_biases,
                                                        std::vector<Tensor> visible, std::vector<Tensor> orders, std::vector<Tensor> affines,
                                                        std::vector<int64_t> activations, std::vector<int64_t> wiring, std::vector<int64_t> stages,
                                                        std::vector<double> scales, bool keep) {
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  auto go = x.scalar_type() == ScalarType::Float ? stack<float> : stack<double>;
  return go(x, context, {weights, biases, context_weights, context_biases, visible, activations, wiring}, orders, affines, stages, scales, keep);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("autoregressive", TORCH_BOX(&flowkernels::autoregressive));
  m.impl("autoregressive_stack", TORCH_BOX(&flowkernels::autoregressive_stack));
}
