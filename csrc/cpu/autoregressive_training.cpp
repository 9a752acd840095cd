// Training passes of a masked autoregressive map for CPU tensors: the forward map that keeps every layer's values, and its gradient,
// and the gradient of the inverse. Rows are independent up to the gradients of the parameters, which are sums over rows: the
// gradients take the rows in spans, so that what only they need (deltas, and the values of the inverse) is held for a span alone.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "cpu/autoregressive.h"
#include "cpu/autoregressive_training.h"
#include "cpu/scratch.h"
#include "cpu/stack_lists.h"

#define FK_KERNEL "cpu/autoregressive_training_targets.h"
#include "cpu/for_each_target.h"

#include "cpu/autoregressive_training_network.h"
#include "cpu/parameter_gradients.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr double kParallelMultiplyAdds = 4e5;  // about 10 us of one thread, against 5 us to start the others

// The tensors of a conditioner, and its map
struct Parts {
  std::span<const Tensor> weights, biases, context_weights, visible;
  const Tensor* order;
  std::span<const int64_t> activations;
  ScaleMapParams scale;
  Form form;
  bool by_bound = false;  // whether the gradient by the scale map's bound is asked for
};

template <class T>
TrainingNetwork<T> read_network(const Parts& parts, int64_t features, ScalarType dtype) {
  return {features, dtype, parts.weights, parts.context_weights, parts.visible, parts.order, parts.activations, parts.scale.kind};
}

template <class T>
int64_t threads_for(const TrainingNetwork<T>& net, int64_t batch) {
  return net.multiply_adds(batch) > kParallelMultiplyAdds ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
}

// run(i) for i < n
template <class F>
void in_parallel(int64_t n, int64_t threads, const F& run) {
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  };
  if (threads > 1 && n > 1)
    torch::stable::parallel_for(0, n, 1, some);
  else
    some(0, n);
}

// run(r0, r1) over blocks of rows: no more than kRows, which a packed panel serves, and at least one for each thread
template <class F>
void for_each_block(int64_t batch, int64_t threads, const F& run) {
  constexpr int64_t kRows = 512;
  const int64_t rows = std::clamp<int64_t>((batch + threads - 1) / threads, 1, kRows);
  in_parallel((batch + rows - 1) / rows, threads, [&](int64_t i) { run(i * rows, std::min((i + 1) * rows, batch)); });
}

// run(first row, rows) over spans: whole chunks of the sums over rows, a chunk for each thread. Once where there are no rows.
template <class F>
void for_each_span(int64_t batch, int64_t span, const F& run) {
  for (int64_t r0 = 0; r0 == 0 || r0 < batch; r0 += span) run(r0, std::min(span, batch - r0));
}

int64_t span_of(int64_t batch, int64_t threads) { return std::clamp<int64_t>(batch, 1, kChunkRows * std::max<int64_t>(threads, 2)); }

template <class T>
TrainingArgs<T> training_args(const TrainingNetwork<T>& net, int64_t batch, ScaleMapParams scale, Form form) {
  TrainingArgs<T> args{};
  args.n_layers = static_cast<int>(net.layers.size());
  args.batch = batch;
  args.features = net.features;
  args.order = net.order;
  args.scale = scale;
  args.form = form;
  args.values_ld = net.columns;
  args.deltas_ld = net.delta_columns;
  args.outputs = net.layers.back().offset;
  args.output_columns = net.output_columns;
  args.by_bound = -1;
  return args;
}

// The context, or nothing
template <class T>
struct ContextRows {
  const T* data = nullptr;
  int64_t ld = 0;
  Tensor kept;

  ContextRows(const std::optional<Tensor>& context, const TrainingNetwork<T>& net, int64_t batch) {
    check_training(net.takes_context() == context.has_value(), "context and context_weights go together");
    if (!context) return;
    check_training(context->dim() == 2 && context->size(0) == batch && context->size(1) == net.contexts && context->scalar_type() == net.dtype &&
                       context->is_cpu(),
                   "context does not fit the batch");
    kept = rows_contiguous(*context);
    data = static_cast<const T*>(kept.const_data_ptr());
    ld = batch > 1 ? kept.stride(0) : net.contexts;
  }

  Rows<T> from(int64_t row) const { return {data ? data + row * ld : nullptr, ld}; }
};

// Fills args.values, and args.y and args.logabsdet where they are wanted
template <class T>
void run_forward(TrainingArgs<T> args, const TrainingNetwork<T>& net, const std::vector<const T*>& biases, Rows<T> context, int64_t threads) {
  std::vector<MaskedLinearArgs<T>> products, context_products;
  for (size_t l = 0; l < net.layers.size(); ++l) {
    const TrainingLayer<T>& layer = net.layers[l];
    MaskedLinearArgs<T> product = net.product(layer, args.batch);
    product.x = args.values + net.input_offset(l);
    product.x_ld = args.values_ld;
    product.out = args.values + layer.offset;
    product.out_ld = args.values_ld;
    if (context.data) {
      MaskedLinearArgs<T> term = net.context_product(layer, args.batch);
      term.x = context.data;
      term.x_ld = context.ld;
      term.out = product.out;
      term.out_ld = product.out_ld;
      term.finish.bias = biases[l];
      context_products.push_back(term);
    }
    if (context.data && layer.context_weight)
      product.finish.accumulate = true;
    else
      product.finish.bias = biases[l];
    product.finish.activation = layer.activation;
    if (layer.pre >= 0) {
      product.finish.pre = args.values + layer.pre;
      product.finish.pre_ld = args.values_ld;
    }
    products.push_back(product);
  }
  args.layers = products.data();
  args.contexts = context.data ? context_products.data() : nullptr;
  for_each_block(args.batch, threads, [&](int64_t r0, int64_t r1) {
    FK_DISPATCH(training_forward<T>(args, r0, r1, static_cast<T*>(thread_scratch(FK_DISPATCH(training_scratch_bytes<T>(args.features))))));
  });
}

// x's image under the map, and the values that its gradient needs; log|det| is added to what logabsdet holds already, unless it is the first
template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& context, const Parts& parts, Tensor& logabsdet, bool first) {
  const int64_t batch = x.size(0), features = x.size(1);
  TrainingNetwork<T> net = read_network<T>(parts, features, x.scalar_type());
  const ContextRows<T> contexts(context, net, batch);
  Tensor y = empty(x, {batch, features}), values = empty(x, {batch, net.columns});
  TrainingArgs<T> args = training_args(net, batch, parts.scale, parts.form);
  args.set_x(static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1));
  args.values = static_cast<T*>(values.mutable_data_ptr());
  args.y = static_cast<T*>(y.mutable_data_ptr());
  args.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  args.adds_log = !first;
  run_forward(args, net, net.read_biases(parts.biases), contexts.from(0), threads_for(net, batch));
  return {y, values};
}

// The products that carry deltas down, from the last layer to the first, and those that carry them to the context
template <class T>
struct Descent {
  std::vector<MaskedLinearArgs<T>> layers, contexts;

  // begun: whether dcontext holds values already
  Descent(const TrainingArgs<T>& args, const TrainingNetwork<T>& net, T* dcontext, bool begun) {
    for (size_t l = net.layers.size(); l-- > 0;) {
      const TrainingLayer<T>& layer = net.layers[l];
      MaskedLinearArgs<T> product = net.product(layer, args.batch);
      product.dy = args.deltas + layer.offset;
      product.dy_ld = args.deltas_ld;
      product.out = args.deltas + net.input_offset(l);
      product.out_ld = args.deltas_ld;
      if (l == 0) {
        product.finish.accumulate = true;  // to what reaches x past the network
      } else {
        const TrainingLayer<T>& below = net.layers[l - 1];
        product.finish.activation = below.activation;
        product.finish.values = below.activation == Activation::identity ? nullptr : args.values + (below.pre >= 0 ? below.pre : below.offset);
        product.finish.values_ld = args.values_ld;
      }
      layers.push_back(product);
      if (!dcontext || !layer.context_weight) {
        if (dcontext) contexts.push_back({});  // nothing to do
        continue;
      }
      MaskedLinearArgs<T> term = net.context_product(layer, args.batch);
      term.dy = product.dy;
      term.dy_ld = product.dy_ld;
      term.out = dcontext;
      term.out_ld = net.contexts;
      term.finish.accumulate = begun;
      begun = true;
      contexts.push_back(term);
    }
  }
};

// What both gradients take and return, for any span of rows
template <class T>
struct GradientCall {
  TrainingNetwork<T> net;
  ContextRows<T> contexts;
  int64_t batch, threads, span;
  bool adds_dcontext;  // to what dcontext holds already
  Tensor dx, dcontext, deltas;
  ParameterGradients<T> parameters;
  TrainingArgs<T> args;

  static int64_t delta_columns(const TrainingNetwork<T>& net, const Parts& parts) { return net.delta_columns + parts.by_bound; }

  // dcontext: where the context's gradient so far lies, or nothing
  GradientCall(const Tensor& dy, const Tensor& dlogabsdet, const Tensor& like, const std::optional<Tensor>& context, const Parts& parts, bool need_dx,
               const std::optional<Tensor>& dcontext_)
      : net(read_network<T>(parts, dy.size(1), like.scalar_type())),
        contexts(context, net, dy.size(0)),
        batch(dy.size(0)),
        threads(threads_for(net, batch)),
        span(span_of(batch, threads)),
        adds_dcontext(context && dcontext_),
        dx(empty(like, {need_dx ? batch : 0, net.features})),
        dcontext(adds_dcontext ? *dcontext_ : empty(like, {context ? batch : 0, net.contexts})),
        deltas(empty(like, {span, delta_columns(net, parts)})),
        parameters(net, like, threads, parts.by_bound),
        args(training_args(net, batch, parts.scale, parts.form)) {
    net.find_first();
    args.deltas_ld = delta_columns(net, parts);
    if (parts.by_bound) {
      check_training(parts.scale.kind == static_cast<int>(ScaleKind::exp_tanh), "only exp_tanh has a bound");
      args.by_bound = net.delta_columns;
    }
    check_training(dy.dim() == 2 && dy.scalar_type() == net.dtype && dy.is_cpu(), "dy must be a matrix like y");
    check_training(dlogabsdet.dim() == 1 && dlogabsdet.size(0) == batch && dlogabsdet.scalar_type() == net.dtype && dlogabsdet.is_cpu(),
                   "dlogabsdet must have one entry per row");
    args.set_cotangents(static_cast<const T*>(dy.const_data_ptr()), dy.stride(0), dy.stride(1),
                        static_cast<const T*>(dlogabsdet.const_data_ptr()), dlogabsdet.stride(0));
    args.deltas = static_cast<T*>(deltas.mutable_data_ptr());
    args.dx = static_cast<T*>(dx.mutable_data_ptr());
  }

  T* dcontext_from(int64_t row) { return contexts.data ? static_cast<T*>(dcontext.mutable_data_ptr()) + row * net.contexts : nullptr; }

  // dx (empty where nobody asks for it), dcontext (empty without context), then the gradients of weights, biases, context weights, and
  // last that of the bound where it is asked for
  Tensors outputs() const {
    Tensors out{dx, dcontext};
    parameters.append_to(out);
    return out;
  }
};

template <class T>
Tensors backward(const Tensor& dy, const Tensor& dlogabsdet, const Tensor& values, const std::optional<Tensor>& context, const Parts& parts,
                 bool need_dx, const std::optional<Tensor>& dcontext) {
  check_training(dy.dim() == 2, "dy must be a matrix like y");
  GradientCall<T> call(dy, dlogabsdet, values, context, parts, need_dx, dcontext);
  check_training(values.dim() == 2 && values.size(0) == call.batch && values.size(1) == call.net.columns && values.is_contiguous(),
                 "values are not those of the forward pass");
  call.args.values = const_cast<T*>(static_cast<const T*>(values.const_data_ptr()));
  for_each_span(call.batch, call.span, [&](int64_t first, int64_t rows) {
    TrainingArgs<T> args = call.args.span(first, rows);
    args.values += first * args.values_ld;
    const Descent<T> descent(args, call.net, call.dcontext_from(first), call.adds_dcontext);
    args.layers = descent.layers.data();
    args.contexts = call.contexts.data ? descent.contexts.data() : nullptr;
    for_each_block(rows, call.threads, [&](int64_t r0, int64_t r1) {
      T* scratch = static_cast<T*>(thread_scratch(FK_DISPATCH(training_scratch_bytes<T>(args.features))));
      FK_DISPATCH(training_backward<T>(args, need_dx, r0, r1, scratch));
    });
    call.parameters.add(args, call.contexts.from(first));
  });
  return call.outputs();
}

// The steps of the inverse: ends[s][l] units of layer l are known after step s, layer 0 being the features known before it.
// Empty where the staircases are not autoregressive.
template <class T>
std::vector<int64_t> inverse_steps(const TrainingNetwork<T>& net) {
  const size_t n = net.layers.size();
  std::vector<MaskedLayer<T>> layers(n);
  for (size_t l = 0; l < n; ++l) {
    layers[l].visible = net.layers[l].visible;
    layers[l].outputs = net.layers[l].outputs;
    layers[l].source = static_cast<int>(l);
    layers[l].residual = -1;
  }
  return make_schedule(layers.data(), static_cast<int>(n), net.features, net.output_columns, true);
}

// The gradient of (x, logabsdet) = f^-1(z), whose dx is called dz here
template <class T>
Tensors inverse_backward(const Tensor& dx, const Tensor& dlogabsdet, const Tensor& x, const std::optional<Tensor>& context, const Parts& parts,
                         const std::optional<Tensor>& dcontext) {
  check_training(x.dim() == 2 && x.is_cpu() && dx.dim() == 2 && dx.size(0) == x.size(0) && dx.size(1) == x.size(1), "x must be a matrix like dx");
  GradientCall<T> call(dx, dlogabsdet, x, context, parts, true, dcontext);
  TrainingNetwork<T>& net = call.net;
  check_training(net.output_columns.passing == 0 && net.output_columns.each == 2 && net.layers[0].inputs == net.features,
                 "the gradient of the inverse is that of a network with shift and raw scale of each feature");
  const std::vector<int64_t> ends = inverse_steps(net);
  check_training(net.features == 0 || !ends.empty(), "the network is not autoregressive");
  const int64_t n_steps = static_cast<int64_t>(ends.size() / (net.layers.size() + 1));
  std::vector<int64_t> offsets{0};
  for (const TrainingLayer<T>& layer : net.layers) offsets.push_back(layer.offset);
  const std::vector<const T*> bias_data = net.read_biases(parts.biases);
  Tensor values = empty(x, {call.span, net.columns});
  call.args.values = static_cast<T*>(values.mutable_data_ptr());
  call.args.set_x(static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1));

  for_each_span(call.batch, call.span, [&](int64_t first, int64_t span) {
    const TrainingArgs<T> args = call.args.span(first, span);
    run_forward(args, net, bias_data, call.contexts.from(first), call.threads);
    const Descent<T> descent(args, net, call.dcontext_from(first), call.adds_dcontext);
    const std::vector<MaskedLinearArgs<T>> upward(descent.layers.rbegin(), descent.layers.rend());
    // equal tiles, as many as the rows need, in a multiple of the threads
    const int64_t most = FK_DISPATCH(solve_rows<T>()), even = ((span + most - 1) / most + call.threads - 1) / call.threads * call.threads;
    const int64_t rows = std::max<int64_t>((span + even - 1) / std::max<int64_t>(even, 1), 1);
    in_parallel((span + rows - 1) / rows, call.threads, [&](int64_t i) {
      const int64_t r0 = i * rows, r1 = std::min((i + 1) * rows, span);
      T* scratch = static_cast<T*>(thread_scratch(FK_DISPATCH(solve_scratch_bytes<T>(args))));
      FK_DISPATCH(solve_tile<T>(args, upward.data(), ends.data(), n_steps, offsets.data(), r0, r1, scratch));
      if (!call.contexts.data) return;
      T* panel = static_cast<T*>(thread_scratch(FK_DISPATCH(training_scratch_bytes<T>(args.features))));
      for (const MaskedLinearArgs<T>& term : descent.contexts) FK_DISPATCH(masked_linear_dx<T>(term, r0, r1, int64_t(0), term.inputs, panel));
    });
    call.parameters.add(args, call.contexts.from(first));
  });
  return call.outputs();
}

// The maps of a stack, in turn
class Maps {
 public:
  Maps(std::span<const Tensor> weights, std::span<const Tensor> biases, std::span<const Tensor> context_weights, std::span<const Tensor> visible,
       std::span<const Tensor> orders, std::span<const int64_t> activations, std::span<const int64_t> stages, std::span<const double> scales) {
    const size_t n = orders.size();
    check_training(n >= 1 && stages.size() == Stage::kNumbers * n && scales.size() == 2 * n, "every map needs its entries in each list");
    Rest<Tensor> w{weights}, b{biases}, c{context_weights}, v{visible};
    Rest<int64_t> a{activations};
    for (size_t i = 0; i < n; ++i) {
      const Stage stage(stages, i);
      check_training(stage.wired == 0 && stage.context_biases == 0, "networks must be plain chains");
      const ScaleMapParams scale{static_cast<int>(stage.scale_kind), scales[2 * i], scales[2 * i + 1]};
      parts.push_back({w.next(stage.layers), b.next(stage.layers), c.next(stage.contexts), v.next(stage.layers), &orders[i], a.next(stage.layers), scale,
                       static_cast<Form>(stage.form)});
      inverse.push_back(stage.inverse != 0);
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
  return parts.context_weights.empty() ? std::nullopt : context;
}

std::tuple<Tensor, Tensor, Tensors> autoregressive_training(Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                                            Tensors context_weights, Tensors visible, Tensors orders,
                                                            std::vector<int64_t> activations, std::vector<int64_t> stages,
                                                            std::vector<double> scales) {
  check_dtype(x);
  check_training(x.dim() == 2 && x.is_cpu(), "x must be a matrix");
  const Maps maps(weights, biases, context_weights, visible, orders, activations, stages, scales);
  Tensor logabsdet = empty(x, {x.size(0)});
  Tensors kept;
  for (size_t i = 0; i < maps.parts.size(); ++i) {
    check_training(!maps.inverse[i], "the maps must be forward ones");
    auto go = x.scalar_type() == ScalarType::Float ? forward<float> : forward<double>;
    auto [y, values] = go(x, context_of(maps.parts[i], context), maps.parts[i], logabsdet, i == 0);
    x = y;
    kept.push_back(values);
  }
  return {x, logabsdet, kept};
}

// The gradient of a stack: dx (empty where nobody asks for it), dcontext (empty without context), then the gradients of all weights, of all
// biases, of all context weights, and of the bounds of the scale maps that learn theirs
Tensors autoregressive_backward(Tensor dy, Tensor dlogabsdet, Tensors kept, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                Tensors context_weights, Tensors visible, Tensors orders, std::vector<int64_t> activations,
                                std::vector<int64_t> stages, std::vector<double> scales, std::vector<int64_t> learned, bool need_dx) {
  check_dtype(dy);
  Maps maps(weights, biases, context_weights, visible, orders, activations, stages, scales);
  const size_t n = maps.parts.size();
  check_training(kept.size() == n && learned.size() == n, "every map needs its entries in each list");
  const bool single = dy.scalar_type() == ScalarType::Float;
  std::optional<Tensor> dcontext;
  std::vector<Tensors> found(n);
  for (size_t i = n; i-- > 0;) {
    Parts& parts = maps.parts[i];
    parts.by_bound = learned[i] != 0;
    check_training(kept[i].scalar_type() == dy.scalar_type(), "dy must be of the dtype of y");
    const std::optional<Tensor> own = context_of(parts, context);
    if (maps.inverse[i]) {
      check_training(!parts.by_bound, "the gradient of an inverse has none by a bound");
      found[i] = (single ? inverse_backward<float> : inverse_backward<double>)(dy, dlogabsdet, kept[i], own, parts, dcontext);
    } else {
      found[i] = (single ? backward<float> : backward<double>)(dy, dlogabsdet, kept[i], own, parts, need_dx || i > 0, dcontext);
    }
    dy = found[i][0];
    if (own) dcontext = found[i][1];
  }
  Tensors out{dy, dcontext ? *dcontext : empty(dy, {0, 0})};
  const auto append = [&](auto begin, auto count) {  // of each map's gradients
    for (size_t i = 0; i < n; ++i) out.insert(out.end(), found[i].begin() + begin(i), found[i].begin() + begin(i) + count(i));
  };
  const auto layers = [&](size_t i) { return static_cast<int64_t>(maps.parts[i].weights.size()); };
  append([&](size_t) { return int64_t(2); }, layers);
  append([&](size_t i) { return 2 + layers(i); }, layers);
  append([&](size_t i) { return 2 + 2 * layers(i); }, [&](size_t i) { return static_cast<int64_t>(maps.parts[i].context_weights.size()); });
  append([&](size_t i) { return static_cast<int64_t>(found[i].size()) - learned[i]; }, [&](size_t i) { return learned[i]; });
  return out;
}

Tensors autoregressive_inverse_backward(Tensor dx, Tensor dlogabsdet, Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                        Tensors context_weights, Tensors visible, std::optional<Tensor> order, std::vector<int64_t> activations,
                                        int64_t scale_kind, double scale_p0, double scale_p1, int64_t form) {
  check_dtype(x);
  auto go = x.scalar_type() == ScalarType::Float ? inverse_backward<float> : inverse_backward<double>;
  const Parts parts{weights,     biases, context_weights, visible, order ? &*order : nullptr,
                    activations, {static_cast<int>(scale_kind), scale_p0, scale_p1}, static_cast<Form>(form)};
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
