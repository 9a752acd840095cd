// The fused sequential loop for CPU tensors: arguments, schedule, threads, registration. The loop itself is in autoregressive_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/autoregressive.h"
#include "cpu/kept_stacks.h"
#include "cpu/network.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/autoregressive_tiles.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One map and all that its arguments point to. It must stay where it is.
template <class T>
struct Map {
  Network<T> network;
  AutoregressiveArgs<T> args{};
  std::vector<int64_t> position, ends;

  Map(const Tensor& x, const std::optional<Tensor>& context, const NetworkParts& parts, const Tensor* order, const Tensor* affine, ScaleMapParams scale,
      int form, bool inverse)
      : network(parts, x.scalar_type(), x.size(1), context ? context->size(1) : 0) {
    const int64_t features = args.features = x.size(1);
    check_network(parts.context_weights.empty() || context.has_value(), "context is missing");
    args.batch = x.size(0);
    args.layers = network.layers.data();
    args.n_layers = static_cast<int>(network.layers.size());
    for (const MaskedLayer<T>& layer : network.layers) args.gated |= layer.gate;
    args.x = {data_of<T>(x), x.stride(0), x.stride(1)};
    if (!parts.context_weights.empty()) {
      check_network(context->dim() == 2 && context->size(0) == args.batch && context->scalar_type() == x.scalar_type() && context->is_cpu(),
                    "context does not fit x");
      args.context = {data_of<T>(*context), context->stride(0), context->stride(1)};
      args.context_features = context->size(1);
    }
    if (order) {
      args.order = network.order(*order, features, position);
      args.position = position.data();
    }
    if (affine) {
      int64_t row;
      args.affine = network.matrix(made_contiguous(*affine), 3, features, row, "affine");
    }
    args.scale = scale;
    args.form = form;
    args.inverse = inverse;
    const int64_t outputs = network.layers.back().outputs;
    args.output_columns = OutputColumns(outputs, features, scale.kind);
    check_network(order || (args.output_columns.passing == 0 && args.output_columns.each == 2), "x does not have the network's features");
    check_network(args.output_columns.fit(outputs, features), "the last layer must give shift and raw scale of each feature that does not pass");
    check_network(scale.kind != static_cast<int>(ScaleKind::unit) || form != static_cast<int>(Form::gate), "a gate needs a scale");
    ends = make_schedule(args.layers, args.n_layers, features, args.output_columns, inverse);
    check_network(features == 0 || !ends.empty(), "the network is not autoregressive");
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
    if (own.rows() < tiling.rows()) tiling = own;
  }
  for_each_task_in_turn(tiling.tiles(), threads, [&](int64_t tile) {
    FK_DISPATCH(run_tiles<T>(maps.data(), static_cast<int64_t>(maps.size()), tiling, tile, tile + 1));
  });
}

template <class T>
std::tuple<Tensor, Tensor> one_map(const Tensor& x, const std::optional<Tensor>& context, const NetworkParts& parts, const std::optional<Tensor>& order,
                                   ScaleMapParams scale, int form, bool inverse) {
  check_network(x.dim() == 2, "x must have two dimensions");
  check_network(parts.context_weights.empty() != context.has_value(), "context and context_weights go together");
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
  check_network(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  auto go = x.scalar_type() == ScalarType::Float ? one_map<float> : one_map<double>;
  const NetworkParts parts{weights, biases, context_weights, context_biases, visible, activations, wiring};
  return go(x, context, parts, order, scale, static_cast<int>(form), inverse);
}

template <class T>
double learned_number(const Tensor& t) {
  const ScalarType dtype = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  check_network(t.numel() == 1 && t.scalar_type() == dtype && t.is_cpu(), "a learned scale does not fit x");
  return *data_of<T>(t);
}

template <class T>
std::tuple<Tensor, Tensor> stack(const Tensor& x, const std::optional<Tensor>& context, const StackLists& lists, Tensor* between) {
  const size_t n = lists.orders.size();
  check_network(x.dim() == 2, "x must have two dimensions");
  check_network(n >= 1 && lists.affines.size() == n && lists.stages.size() == MapNumbers::kNumbers * n && lists.scales.size() == 2 * n,
                "every map needs its entries in each list");
  check_network(lists.factors.empty() || lists.factors.size() == n, "factors must have one entry for each map");
  const int64_t batch = x.size(0), features = x.size(1);
  Networks networks({lists.weights, lists.biases, lists.context_weights, lists.context_biases, lists.visible, lists.activations, lists.wiring});
  Tensor y = empty(x, {batch, features}), logabsdet = empty(x, {batch});
  if (between) *between = empty(x, {static_cast<int64_t>(n) - 1, batch, features});

  std::vector<Map<T>> maps;
  std::vector<AutoregressiveArgs<T>> args;
  maps.reserve(n);
  args.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const MapNumbers numbers(lists.stages, i);
    const double factor = lists.factors.empty() || lists.factors[i].numel() == 0 ? 1 : learned_number<T>(lists.factors[i]);
    const ScaleMapParams scale{static_cast<int>(numbers.scale_kind), lists.scales[2 * i] * factor, lists.scales[2 * i + 1]};
    const Tensor* affine = lists.affines[i].numel() ? &lists.affines[i] : nullptr;
    maps.emplace_back(x, context, networks.next(numbers), &lists.orders[i], affine, scale, static_cast<int>(numbers.form), numbers.inverse != 0);
    AutoregressiveArgs<T>& map = args.emplace_back(maps.back().args);
    if (i > 0) {
      map.x = {args[i - 1].y, features, 1};
      map.adds_log = true;
    }
    map.y = static_cast<T*>(y.mutable_data_ptr());
    if (between && i + 1 < n) map.y = static_cast<T*>(between->mutable_data_ptr()) + static_cast<int64_t>(i) * batch * features;
    map.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  }
  run<T>(args);
  return {y, logabsdet};
}

// between: what all maps but the last gave, [maps - 1, batch, features], where it is asked for
std::tuple<Tensor, Tensor> stack_of_any(const Tensor& x, const std::optional<Tensor>& context, const StackLists& lists, Tensor* between) {
  check_network(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  return (x.scalar_type() == ScalarType::Float ? stack<float> : stack<double>)(x, context, lists, between);
}

std::tuple<Tensor, Tensor, Tensor> autoregressive_stack(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                        std::vector<Tensor> context_weights, std::vector<Tensor> context_biases,
                                                        std::vector<Tensor> visible, std::vector<Tensor> orders, std::vector<Tensor> affines,
                                                        std::vector<int64_t> activations, std::vector<int64_t> wiring, std::vector<int64_t> stages,
                                                        std::vector<double> scales, bool keep) {
  const StackLists lists{std::move(weights), std::move(biases),      std::move(context_weights), std::move(context_biases), std::move(visible), std::move(orders),
                         std::move(affines), std::move(activations), std::move(wiring),          std::move(stages),         std::move(scales),         {}};
  Tensor between;
  const auto [y, logabsdet] = stack_of_any(x, context, lists, keep ? &between : nullptr);
  return {y, logabsdet, keep ? between : empty(x, {0, x.size(0), x.size(1)})};
}

KeptStacks& kept_stacks() {
  static auto* const all = new KeptStacks;  // never freed: torch may be gone when a process ends
  return *all;
}

int64_t keep_stack(std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> context_weights, std::vector<Tensor> context_biases,
                   std::vector<Tensor> visible, std::vector<Tensor> orders, std::vector<Tensor> affines, std::vector<int64_t> activations,
                   std::vector<int64_t> wiring, std::vector<int64_t> stages, std::vector<double> scales, std::vector<Tensor> factors) {
  return kept_stacks().keep({std::move(weights), std::move(biases), std::move(context_weights), std::move(context_biases), std::move(visible),
                             std::move(orders), std::move(affines), std::move(activations), std::move(wiring), std::move(stages), std::move(scales),
                             std::move(factors)});
}

int64_t release_stack(int64_t stack) { return kept_stacks().release(stack); }

std::tuple<Tensor, Tensor> autoregressive_kept(Tensor x, std::optional<Tensor> context, int64_t stack) {
  return stack_of_any(x, context, *kept_stacks().at(stack), nullptr);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("autoregressive", TORCH_BOX(&flowkernels::autoregressive));
  m.impl("autoregressive_stack", TORCH_BOX(&flowkernels::autoregressive_stack));
  m.impl("autoregressive_kept", TORCH_BOX(&flowkernels::autoregressive_kept));
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CompositeExplicitAutograd, m) {
  m.impl("_keep_stack", TORCH_BOX(&flowkernels::keep_stack));
  m.impl("_release_stack", TORCH_BOX(&flowkernels::release_stack));
}
