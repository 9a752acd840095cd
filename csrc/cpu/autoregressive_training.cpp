// Training passes of a masked autoregressive map for CPU tensors: the forward map that keeps its layers' values, and its gradient,
// and the gradient of the inverse. Rows are independent up to the gradients of the parameters, which are sums over rows: the gradients take
// the rows in spans, so that what only they need (deltas, remade values, and the values of the inverse) is held for a span alone.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/autoregressive.h"
#include "cpu/autoregressive_training.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"
#include "stack_lists.h"

#define FK_KERNEL "cpu/autoregressive_training_targets.h"
#include "cpu/for_each_target.h"

#include "cpu/autoregressive_training_calls.h"

namespace flowkernels {
namespace {

// Forward maps of a stack, the last one first, each getting its dy from the one before it in the list. A thread takes its rows through all
// of them, and then its share of all their parameters.
template <class T>
void run_backward(std::span<GradientCall<T>> calls, bool need_parameters) {
  const int64_t batch = calls[0].batch, threads = calls[0].threads, features = calls[0].net.features;
  for_each_span(batch, calls[0].span, [&](int64_t first, int64_t rows) {
    std::vector<TrainingArgs<T>> args;
    std::vector<Ascent<T>> ascents;
    std::vector<Descent<T>> descents;
    for (GradientCall<T>& call : calls) {
      TrainingArgs<T>& of_span = args.emplace_back(call.args.span(first, rows));
      of_span.values += first * of_span.values_ld;
      ascents.emplace_back(of_span, call.net, call.contexts.from(first));
      descents.emplace_back(of_span, call.net, call.dcontext_from(first), call.adds_dcontext);
    }
    for (size_t i = 0; i < calls.size(); ++i) descents[i].set(args[i]);
    for_each_block(rows, threads, [&](int64_t r0, int64_t r1, int64_t) {
      T* scratch = training_scratch<T>(features);
      for (size_t i = 0; i < calls.size(); ++i) {
        if (calls[i].net.remade_columns > 0) ascents[i].make_first(r0, r1, scratch);
        FK_DISPATCH(training_backward<T>(args[i], calls[i].need_dx, r0, r1, scratch));
      }
    });
    if (!need_parameters) return;
    for (size_t i = 0; i < calls.size(); ++i) calls[i].parameters.set_rows(args[i], calls[i].contexts.from(first));
    for_each_task(threads, threads, [&](int64_t share) {
      for (size_t i = 0; i < calls.size(); ++i) calls[i].parameters.add_share(share, args[i]);
    });
    for (size_t i = 0; i < calls.size(); ++i) calls[i].parameters.finish_rows(args[i]);
  });
}

// The steps of the inverse: ends[s][l] units of layer l are known after step s, layer 0 being the features known before it.
// Empty where the staircases are not autoregressive.
template <class T>
std::vector<int64_t> inverse_steps(const TrainingNetwork<T>& net) {
  const std::vector<MaskedLayer<T>>& layers = net.masked_layers();
  return make_schedule(layers.data(), static_cast<int>(layers.size()), net.features, net.output_columns, true);
}

// The gradient of (x, logabsdet) = f^-1(z), whose dx is called dz here
template <class T>
Tensors inverse_backward(const Tensor& dx, const Tensor& dlogabsdet, const Tensor& x, const std::optional<Tensor>& context, const Parts& parts,
                         const std::optional<Tensor>& dcontext) {
  check_training(x.dim() == 2 && x.is_cpu() && dx.dim() == 2 && dx.size(0) == x.size(0) && dx.size(1) == x.size(1), "x must be a matrix like dx");
  GradientCall<T> call(read_network<T>(parts, dx.size(1), x.scalar_type(), false), dx, dlogabsdet, x, context, parts, true, 0, dcontext);
  TrainingNetwork<T>& net = call.net;
  check_training(net.output_columns.passing == 0 && net.output_columns.each == 2,
                 "the gradient of the inverse is that of a network with shift and raw scale of each feature");
  const std::vector<int64_t> ends = inverse_steps(net);
  check_training(net.features == 0 || !ends.empty(), "the network is not autoregressive");
  const int64_t n_steps = static_cast<int64_t>(ends.size() / (net.layers.size() + 1));
  Tensor values = empty(x, {call.span, net.columns});
  call.args.values = static_cast<T*>(values.mutable_data_ptr());
  call.args.set_x(data_of<T>(x), x.stride(0), x.stride(1));

  for_each_span(call.batch, call.span, [&](int64_t first, int64_t span) {
    TrainingArgs<T> args = call.args.span(first, span);
    const Ascent<T> ascent(args, net, call.contexts.from(first));
    ascent.set(args);
    for_each_block(span, call.threads, [&](int64_t r0, int64_t r1, int64_t) {
      FK_DISPATCH(training_forward<T>(args, r0, r1, training_scratch<T>(args.features)));
    });
    const Descent<T> descent(args, net, call.dcontext_from(first), call.adds_dcontext);
    const std::vector<MaskedLinearArgs<T>> upward(descent.layers.rbegin(), descent.layers.rend());
    // equal tiles, as many as the rows need, in a multiple of the threads
    const int64_t most = FK_DISPATCH(solve_rows<T>()), even = ((span + most - 1) / most + call.threads - 1) / call.threads * call.threads;
    const int64_t rows = std::max<int64_t>((span + even - 1) / std::max<int64_t>(even, 1), 1);
    for_each_task((span + rows - 1) / rows, call.threads, [&](int64_t i) {
      const int64_t r0 = i * rows, r1 = std::min((i + 1) * rows, span);
      T* scratch = static_cast<T*>(thread_scratch(FK_DISPATCH(solve_scratch_bytes<T>(args, rows))));
      FK_DISPATCH(solve_tile<T>(args, upward.data(), ends.data(), n_steps, r0, r1, scratch));
      if (!call.contexts.data) return;
      T* panel = training_scratch<T>(args.features);
      for (const MaskedLinearArgs<T>& term : descent.contexts) FK_DISPATCH(masked_linear_dx<T>(term, r0, r1, int64_t(0), term.inputs, panel));
    });
    if (!parts.by_parameters) return;
    call.parameters.set_rows(args, call.contexts.from(first));
    for_each_task(call.threads, call.threads, [&](int64_t share) { call.parameters.add_share(share, args); });
    call.parameters.finish_rows(args);
  });
  return call.outputs();
}

// The maps of a stack, in turn
class Maps {
 public:
  Maps(const NetworkParts& all, std::span<const Tensor> orders, std::span<const int64_t> stages, std::span<const double> scales) {
    const size_t n = orders.size();
    check_training(n >= 1 && stages.size() == MapNumbers::kNumbers * n && scales.size() == 2 * n, "every map needs its entries in each list");
    Networks networks(all);
    for (size_t i = 0; i < n; ++i) {
      const MapNumbers numbers(stages, i);
      check_training(numbers.scale_kind != static_cast<int64_t>(ScaleKind::unit) || numbers.form != static_cast<int64_t>(Form::gate),
                     "a gate needs a scale");
      const ScaleMapParams scale{static_cast<int>(numbers.scale_kind), scales[2 * i], scales[2 * i + 1]};
      parts.push_back({networks.next(numbers), &orders[i], scale, static_cast<Form>(numbers.form)});
      inverse.push_back(numbers.inverse != 0);
    }
  }

  std::vector<Parts> parts;
  std::vector<bool> inverse;
};

void check_dtype(const Tensor& t) {
  check_training(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, "tensors must be float32 or float64");
}

// a map that takes no context is not given it
std::optional<Tensor> context_of(const Parts& parts, const std::optional<Tensor>& context) {
  return parts.network.context_weights.empty() ? std::nullopt : context;
}

template <class T>
std::tuple<Tensor, Tensor, Tensors> forward(Tensor x, const std::optional<Tensor>& context, const Maps& maps) {
  const int64_t batch = x.size(0);
  Tensor logabsdet = empty(x, {batch});
  Tensors kept;
  std::vector<ForwardCall<T>> calls;
  calls.reserve(maps.parts.size());
  double work = 0;
  for (size_t i = 0; i < maps.parts.size(); ++i) {
    check_training(!maps.inverse[i], "the maps must be forward ones");
    ForwardCall<T>& call = calls.emplace_back(x, context_of(maps.parts[i], context), maps.parts[i]);
    call.args.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
    call.args.adds_log = i > 0;
    work += call.net.multiply_adds(batch);
    kept.push_back(call.values);
    x = call.y;
  }
  const int64_t threads = threads_for(work);
  int64_t columns = 0;  // that are not kept, of which a thread has those of one map at a time
  for (const ForwardCall<T>& call : calls) columns = std::max(columns, call.net.remade_columns);
  Tensor passing = empty(x, {threads, columns * block_rows(batch, threads)});
  T* of_threads = static_cast<T*>(passing.mutable_data_ptr());
  for_each_block(batch, threads, [&](int64_t r0, int64_t r1, int64_t thread) {
    T* scratch = training_scratch<T>(calls[0].net.features);
    for (const ForwardCall<T>& call : calls) call.run(r0, r1, of_threads + thread * passing.size(1), scratch);
  });
  return {x, logabsdet, kept};
}

std::tuple<Tensor, Tensor, Tensors> autoregressive_training(Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                                            Tensors context_weights, Tensors context_biases, Tensors visible, Tensors orders,
                                                            std::vector<int64_t> activations, std::vector<int64_t> wiring,
                                                            std::vector<int64_t> stages, std::vector<double> scales) {
  check_dtype(x);
  check_training(x.dim() == 2 && x.is_cpu(), "x must be a matrix");
  const Maps maps({weights, biases, context_weights, context_biases, visible, activations, wiring}, orders, stages, scales);
  return (x.scalar_type() == ScalarType::Float ? forward<float> : forward<double>)(x, context, maps);
}

// What the gradient of a stack returns: dx (empty where nobody asks for it), dcontext (empty without context), then the gradients of all
// weights, biases, context weights and context biases (empty too where nobody does), and of the bounds of the scale maps that learn theirs. of_maps: the same of each map
Tensors joined(const std::vector<Tensors>& of_maps, const Maps& maps, const Tensor& dx, const std::optional<Tensor>& dcontext) {
  Tensors out{dx, dcontext ? *dcontext : empty(dx, {0, 0})};
  std::vector<size_t> taken(of_maps.size(), 2);
  const auto append = [&](auto count) {
    for (size_t i = 0; i < of_maps.size(); ++i) {
      const auto from = of_maps[i].begin() + taken[i];
      const size_t n = count(maps.parts[i]);
      out.insert(out.end(), from, from + n);
      taken[i] += n;
    }
  };
  append([](const Parts& p) { return p.network.weights.size(); });
  append([](const Parts& p) { return p.network.biases.size(); });
  append([](const Parts& p) { return p.network.context_weights.size(); });
  append([](const Parts& p) { return p.network.context_biases.size(); });
  append([](const Parts& p) { return static_cast<size_t>(p.by_bound); });
  return out;
}

template <class T>
Tensors backward(Tensor dy, const Tensor& dlogabsdet, const Tensors& kept, const std::optional<Tensor>& context, const Maps& maps, bool need_dx,
                 bool need_parameters) {
  constexpr int64_t kTogether = 4 << 20;  // bytes of deltas and remade values that maps run together may hold
  const int64_t batch = dy.size(0);
  std::optional<Tensor> dcontext;
  std::vector<Tensors> found(maps.parts.size());
  std::vector<GradientCall<T>> calls;
  for (size_t i = found.size(); i > 0;) {
    if (maps.inverse[i - 1]) {
      --i;
      const std::optional<Tensor> own = context_of(maps.parts[i], context);
      check_training(!maps.parts[i].by_bound, "the gradient of an inverse has none by a bound");
      found[i] = inverse_backward<T>(dy, dlogabsdet, kept[i], own, maps.parts[i], dcontext);
      dy = found[i][0];
      if (own) dcontext = found[i][1];
      continue;
    }
    // maps from i down to `first`
    size_t first = i;
    double work = 0;
    std::vector<TrainingNetwork<T>> networks;  // the last one first
    for (int64_t bytes = 0; first > 0 && !maps.inverse[first - 1] && (first == i || bytes < kTogether); --first) {
      const TrainingNetwork<T>& net = networks.emplace_back(read_network<T>(maps.parts[first - 1], dy.size(1), dy.scalar_type(), true));
      work += net.multiply_adds(batch);
      const int64_t span = span_of(batch, static_cast<int64_t>(torch::stable::get_num_threads()));
      bytes += (net.delta_columns + net.remade_columns) * span * static_cast<int64_t>(sizeof(T));
    }
    const size_t n = i - first;
    calls.clear();
    calls.reserve(n);
    for (TrainingNetwork<T>& network : networks) {
      const std::optional<Tensor> own = context_of(maps.parts[--i], context);
      GradientCall<T>& call =
          calls.emplace_back(std::move(network), dy, dlogabsdet, kept[i], own, maps.parts[i], need_dx || i > 0, threads_for(work), dcontext);
      set_values(call, kept[i]);
      dy = call.dx;
      if (own) dcontext = call.dcontext;
    }
    run_backward<T>(calls, need_parameters);
    for (size_t k = 0; k < n; ++k) found[first + n - 1 - k] = calls[k].outputs();
  }
  return joined(found, maps, dy, dcontext);
}

Tensors autoregressive_backward(Tensor dy, Tensor dlogabsdet, Tensors kept, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                Tensors context_weights, Tensors context_biases, Tensors visible, Tensors orders,
                                std::vector<int64_t> activations, std::vector<int64_t> wiring, std::vector<int64_t> stages,
                                std::vector<double> scales, std::vector<int64_t> learned, bool need_dx, bool need_parameters) {
  check_dtype(dy);
  check_training(dy.dim() == 2, "dy must be a matrix like y");
  Maps maps({weights, biases, context_weights, context_biases, visible, activations, wiring}, orders, stages, scales);
  const size_t n = maps.parts.size();
  check_training(kept.size() == n && learned.size() == n, "every map needs its entries in each list");
  for (size_t i = 0; i < n; ++i) {
    check_training(kept[i].scalar_type() == dy.scalar_type() && kept[i].is_cpu(), "dy must be of the dtype of y");
    maps.parts[i].by_bound = learned[i] != 0;
    maps.parts[i].by_parameters = need_parameters;
  }
  return (dy.scalar_type() == ScalarType::Float ? backward<float> : backward<double>)(dy, dlogabsdet, kept, context, maps, need_dx, need_parameters);
}

Tensors autoregressive_inverse_backward(Tensor dx, Tensor dlogabsdet, Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                        Tensors context_weights, Tensors context_biases, Tensors visible, std::optional<Tensor> order,
                                        std::vector<int64_t> activations, std::vector<int64_t> wiring, int64_t scale_kind, double scale_p0,
                                        double scale_p1, int64_t form) {
  check_dtype(x);
  auto go = x.scalar_type() == ScalarType::Float ? inverse_backward<float> : inverse_backward<double>;
  const Parts parts{{weights, biases, context_weights, context_biases, visible, activations, wiring},
                    order ? &*order : nullptr,
                    {static_cast<int>(scale_kind), scale_p0, scale_p1},
                    static_cast<Form>(form)};
  return go(dx, dlogabsdet, x, context, parts, std::nullopt);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("autoregressive_training", TORCH_BOX(&flowkernels::autoregressive_training));
  m.impl("autoregressive_backward", TORCH_BOX(&flowkernels::autoregressive_backward));
  m.impl("autoregressive_inverse_backward", TORCH_BOX(&flowkernels::autoregressive_inverse_backward));
}
