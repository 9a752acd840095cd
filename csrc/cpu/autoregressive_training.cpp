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

int64_t threads_for(double multiply_adds) {
  return multiply_adds > kParallelMultiplyAdds ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
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
  args.order_kind = net.order_kind;
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

// The products that make the values, layer by layer, and those of the context
template <class T>
struct Ascent {
  std::vector<MaskedLinearArgs<T>> layers, contexts;

  Ascent(const TrainingArgs<T>& args, const TrainingNetwork<T>& net, const std::vector<const T*>& biases, Rows<T> context) {
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
        contexts.push_back(term);
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
      layers.push_back(product);
    }
  }

  void set(TrainingArgs<T>& args) const {
    args.layers = layers.data();
    args.contexts = contexts.empty() ? nullptr : contexts.data();
  }
};

template <class T>
T* training_scratch(int64_t features) {
  return static_cast<T*>(thread_scratch(FK_DISPATCH(training_scratch_bytes<T>(features))));
}

// One map of a stack, with what its gradient needs. It must stay where it is.
template <class T>
struct ForwardCall {
  TrainingNetwork<T> net;
  ContextRows<T> contexts;
  Tensor y, values;
  TrainingArgs<T> args;
  Ascent<T> ascent;

  ForwardCall(const Tensor& x, const std::optional<Tensor>& context, const Parts& parts)
      : net(read_network<T>(parts, x.size(1), x.scalar_type())),
        contexts(context, net, x.size(0)),
        y(empty(x, {x.size(0), x.size(1)})),
        values(empty(x, {x.size(0), net.columns})),
        args(with_tensors(training_args(net, x.size(0), parts.scale, parts.form), x)),
        ascent(args, net, net.read_biases(parts.biases), contexts.from(0)) {
    ascent.set(args);
  }

 private:
  TrainingArgs<T> with_tensors(TrainingArgs<T> some, const Tensor& x) {
    some.set_x(static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1));
    some.values = static_cast<T*>(values.mutable_data_ptr());
    some.y = static_cast<T*>(y.mutable_data_ptr());
    return some;
  }
};

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

  void set(TrainingArgs<T>& args) const {
    args.layers = layers.data();
    args.contexts = contexts.empty() ? nullptr : contexts.data();
  }
};

// What both gradients take and return, for any span of rows. It must stay where it is.
template <class T>
struct GradientCall {
  TrainingNetwork<T> net;
  ContextRows<T> contexts;
  int64_t batch, threads, span;
  bool need_dx, adds_dcontext;  // to what dcontext holds already
  Tensor dx, dcontext, deltas;
  ParameterGradients<T> parameters;
  TrainingArgs<T> args;

  static int64_t delta_columns(const TrainingNetwork<T>& net, const Parts& parts) { return net.delta_columns + parts.by_bound; }

  // threads_: 0 for as many as the work is worth; dcontext: where the context's gradient so far lies, or nothing
  GradientCall(const Tensor& dy, const Tensor& dlogabsdet, const Tensor& like, const std::optional<Tensor>& context, const Parts& parts, bool need_dx,
               int64_t threads_, const std::optional<Tensor>& dcontext_)
      : net(read_network<T>(parts, dy.size(1), like.scalar_type())),
        contexts(context, net, dy.size(0)),
        batch(dy.size(0)),
        threads(threads_ ? threads_ : threads_for(net.multiply_adds(batch))),
        span(span_of(batch, threads)),
        need_dx(need_dx),
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
void set_values(GradientCall<T>& call, const Tensor& values) {
  check_training(values.dim() == 2 && values.size(0) == call.batch && values.size(1) == call.net.columns && values.is_contiguous(),
                 "values are not those of the forward pass");
  call.args.values = const_cast<T*>(static_cast<const T*>(values.const_data_ptr()));
}

// Forward maps of a stack, the last one first, each getting its dy from the one before it in the list. A thread takes its rows through all
// of them, and then its share of all their parameters.
template <class T>
void run_backward(std::span<GradientCall<T>> calls) {
  const int64_t batch = calls[0].batch, threads = calls[0].threads, features = calls[0].net.features;
  for_each_span(batch, calls[0].span, [&](int64_t first, int64_t rows) {
    std::vector<TrainingArgs<T>> args;
    std::vector<Descent<T>> descents;
    for (GradientCall<T>& call : calls) {
      TrainingArgs<T>& of_span = args.emplace_back(call.args.span(first, rows));
      of_span.values += first * of_span.values_ld;
      descents.emplace_back(of_span, call.net, call.dcontext_from(first), call.adds_dcontext);
    }
    for (size_t i = 0; i < calls.size(); ++i) descents[i].set(args[i]);
    for_each_block(rows, threads, [&](int64_t r0, int64_t r1) {
      T* scratch = training_scratch<T>(features);
      for (size_t i = 0; i < calls.size(); ++i) FK_DISPATCH(training_backward<T>(args[i], calls[i].need_dx, r0, r1, scratch));
    });
    for (size_t i = 0; i < calls.size(); ++i) calls[i].parameters.set_rows(args[i], calls[i].contexts.from(first));
    in_parallel(threads, threads, [&](int64_t share) {
      for (size_t i = 0; i < calls.size(); ++i) calls[i].parameters.add_share(share, args[i]);
    });
    for (size_t i = 0; i < calls.size(); ++i) calls[i].parameters.finish_rows(args[i]);
  });
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
  GradientCall<T> call(dx, dlogabsdet, x, context, parts, true, 0, dcontext);
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
    TrainingArgs<T> args = call.args.span(first, span);
    const Ascent<T> ascent(args, net, bias_data, call.contexts.from(first));
    ascent.set(args);
    for_each_block(span, call.threads, [&](int64_t r0, int64_t r1) { FK_DISPATCH(training_forward<T>(args, r0, r1, training_scratch<T>(args.features))); });
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
      T* panel = training_scratch<T>(args.features);
      for (const MaskedLinearArgs<T>& term : descent.contexts) FK_DISPATCH(masked_linear_dx<T>(term, r0, r1, int64_t(0), term.inputs, panel));
    });
    call.parameters.set_rows(args, call.contexts.from(first));
    in_parallel(call.threads, call.threads, [&](int64_t share) { call.parameters.add_share(share, args); });
    call.parameters.finish_rows(args);
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
      check_training(stage.scale_kind != static_cast<int64_t>(ScaleKind::unit) || stage.form != static_cast<int64_t>(Form::gate), "a gate needs a scale");
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
  for_each_block(batch, threads_for(work), [&](int64_t r0, int64_t r1) {
    T* scratch = training_scratch<T>(calls[0].net.features);
    for (const ForwardCall<T>& call : calls) FK_DISPATCH(training_forward<T>(call.args, r0, r1, scratch));
  });
  return {x, logabsdet, kept};
}

std::tuple<Tensor, Tensor, Tensors> autoregressive_training(Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                                            Tensors context_weights, Tensors visible, Tensors orders,
                                                            std::vector<int64_t> activations, std::vector<int64_t> stages,
                                                            std::vector<double> scales) {
  check_dtype(x);
  check_training(x.dim() == 2 && x.is_cpu(), "x must be a matrix");
  const Maps maps(weights, biases, context_weights, visible, orders, activations, stages, scales);
  return (x.scalar_type() == ScalarType::Float ? forward<float> : forward<double>)(x, context, maps);
}

// What the gradient of a stack returns: dx (empty where nobody asks for it), dcontext (empty without context), then the gradients of all
// weights, of all biases, of all context weights, and of the bounds of the scale maps that learn theirs. of_maps: the same of each map
Tensors joined(const std::vector<Tensors>& of_maps, const Maps& maps, const Tensor& dx, const std::optional<Tensor>& dcontext) {
  Tensors out{dx, dcontext ? *dcontext : empty(dx, {0, 0})};
  const auto append = [&](auto begin, auto count) {
    for (size_t i = 0; i < of_maps.size(); ++i) {
      const auto from = of_maps[i].begin() + begin(maps.parts[i]);
      out.insert(out.end(), from, from + count(maps.parts[i]));
    }
  };
  const auto layers = [](const Parts& p) { return static_cast<int64_t>(p.weights.size()); };
  const auto contexts = [](const Parts& p) { return static_cast<int64_t>(p.context_weights.size()); };
  append([](const Parts&) { return int64_t(2); }, layers);
  append([&](const Parts& p) { return 2 + layers(p); }, layers);
  append([&](const Parts& p) { return 2 + 2 * layers(p); }, contexts);
  append([&](const Parts& p) { return 2 + 2 * layers(p) + contexts(p); }, [](const Parts& p) { return static_cast<int64_t>(p.by_bound); });
  return out;
}

template <class T>
Tensors backward(Tensor dy, const Tensor& dlogabsdet, const Tensors& kept, const std::optional<Tensor>& context, const Maps& maps, bool need_dx) {
  constexpr int64_t kTogether = 4 << 20;  // bytes of deltas that maps run together may hold
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
    for (int64_t bytes = 0; first > 0 && !maps.inverse[first - 1] && (first == i || bytes < kTogether); --first) {
      const TrainingNetwork<T> net = read_network<T>(maps.parts[first - 1], dy.size(1), dy.scalar_type());
      work += net.multiply_adds(batch);
      bytes += net.delta_columns * span_of(batch, static_cast<int64_t>(torch::stable::get_num_threads())) * static_cast<int64_t>(sizeof(T));
    }
    const size_t n = i - first;
    calls.clear();
    calls.reserve(n);
    while (i-- > first) {
      const std::optional<Tensor> own = context_of(maps.parts[i], context);
      GradientCall<T>& call = calls.emplace_back(dy, dlogabsdet, kept[i], own, maps.parts[i], need_dx || i > 0, threads_for(work), dcontext);
      set_values(call, kept[i]);
      dy = call.dx;
      if (own) dcontext = call.dcontext;
    }
    i = first;
    run_backward<T>(calls);
    for (size_t k = 0; k < n; ++k) found[first + n - 1 - k] = calls[k].outputs();
  }
  return joined(found, maps, dy, dcontext);
}

Tensors autoregressive_backward(Tensor dy, Tensor dlogabsdet, Tensors kept, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                Tensors context_weights, Tensors visible, Tensors orders, std::vector<int64_t> activations,
                                std::vector<int64_t> stages, std::vector<double> scales, std::vector<int64_t> learned, bool need_dx) {
  check_dtype(dy);
  check_training(dy.dim() == 2, "dy must be a matrix like y");
  Maps maps(weights, biases, context_weights, visible, orders, activations, stages, scales);
  const size_t n = maps.parts.size();
  check_training(kept.size() == n && learned.size() == n, "every map needs its entries in each list");
  for (size_t i = 0; i < n; ++i) {
    check_training(kept[i].scalar_type() == dy.scalar_type() && kept[i].is_cpu(), "dy must be of the dtype of y");
    maps.parts[i].by_bound = learned[i] != 0;
  }
  return (dy.scalar_type() == ScalarType::Float ? backward<float> : backward<double>)(dy, dlogabsdet, kept, context, maps, need_dx);
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
