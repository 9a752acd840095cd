// What the training passes of one masked autoregressive map hold: its network and tensors, and the products that carry values up and
// deltas down, for a thread's rows or for a span of them. A part of autoregressive_training.cpp, which includes it after the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "cpu/autoregressive_training_network.h"
#include "cpu/parameter_gradients.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"
#include "sum_order.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// The tensors of a conditioner, and its map
struct Parts {
  NetworkParts network;
  const Tensor* order;
  ScaleMapParams scale;
  Form form;
  bool by_bound = false;      // whether the gradient by the scale map's bound is asked for
  bool by_parameters = true;  // and those by all that is the network's
};

template <class T>
TrainingNetwork<T> read_network(const Parts& parts, int64_t features, ScalarType dtype, bool remakes) {
  return {features, dtype, parts.network, parts.order, parts.scale.kind, remakes};
}

// Rows are taken in blocks: no more than kRows, which a packed panel serves, and at least one block for each thread
inline int64_t block_rows(int64_t batch, int64_t threads) {
  constexpr int64_t kRows = 256;
  return std::clamp<int64_t>((batch + threads - 1) / threads, 1, kRows);
}

// run(r0, r1, thread) over blocks, a thread's own one after the other
template <class F>
void for_each_block(int64_t batch, int64_t threads, const F& run) {
  const int64_t rows = block_rows(batch, threads), blocks = (batch + rows - 1) / rows;
  for_each_task(threads, threads, [&](int64_t thread) {
    for (int64_t i = thread * blocks / threads; i < (thread + 1) * blocks / threads; ++i) run(i * rows, std::min((i + 1) * rows, batch), thread);
  });
}

// run(first row, rows) over spans: whole chunks of the sums over rows, a chunk for each thread. Once where there are no rows.
template <class F>
void for_each_span(int64_t batch, int64_t span, const F& run) {
  for (int64_t r0 = 0; r0 == 0 || r0 < batch; r0 += span) run(r0, std::min(span, batch - r0));
}

// A span's deltas and remade values would be most of what a step of few rows holds, so such batches are taken a chunk at a time
int64_t span_of(int64_t batch, int64_t threads) {
  const int64_t chunks = threads <= 2 && batch <= 4 * kChunk ? 1 : std::max<int64_t>(threads, 2);
  return std::clamp<int64_t>(batch, 1, kChunk * chunks);
}

template <class T>
TrainingArgs<T> training_args(const TrainingNetwork<T>& net, int64_t batch, ScaleMapParams scale, Form form) {
  TrainingArgs<T> args{};
  args.columns = net.of_layers.data();
  args.wired = net.wired;
  args.n_layers = static_cast<int>(net.layers.size());
  args.batch = batch;
  args.features = net.features;
  args.order = net.order;
  args.order_kind = net.order_kind;
  args.scale = scale;
  args.form = form;
  args.values_ld = net.columns;
  args.deltas_ld = net.delta_columns;
  args.outputs = net.of_layers.back().value;
  args.made = args.outputs - (net.remade_columns > 0 ? net.of_layers[0].units : 0);
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
    check_training(net.takes_context == context.has_value(), "context and context_weights go together");
    if (!context) return;
    check_training(context->dim() == 2 && context->size(0) == batch && context->size(1) == net.contexts && context->scalar_type() == net.dtype &&
                       context->is_cpu(),
                   "context does not fit the batch");
    kept = rows_contiguous(*context);
    data = data_of<T>(kept);
    ld = batch > 1 ? kept.stride(0) : net.contexts;
  }

  Rows<T> from(int64_t row) const { return {data ? data + row * ld : nullptr, ld}; }
};

// The products that make the values, layer by layer, and those of the context
template <class T>
struct Ascent {
  std::vector<MaskedLinearArgs<T>> layers, contexts;

  Ascent(const TrainingArgs<T>& args, const TrainingNetwork<T>& net, Rows<T> context) {
    layers.reserve(net.layers.size());
    contexts.reserve(context.data ? net.layers.size() : 0);
    for (size_t l = 0; l < net.layers.size(); ++l) {
      const TrainingLayer<T>& layer = net.layers[l];
      const LayerColumns<T>& own = net.of_layers[l];
      const bool adds_context = context.data && layer.takes_context && own.term < 0;
      const auto at = [&](int64_t column) { return net.place(args, column); };
      MaskedLinearArgs<T> product = net.product(layer, args.batch);
      const Columns<T> input = at(own.input), made = at(own.gate ? own.sum : own.value), pre = at(own.pre);
      product.x = input.data;
      product.x_ld = input.ld;
      product.out = made.data;
      product.out_ld = made.ld;
      product.finish.accumulate = adds_context;
      if (!adds_context) product.finish.bias = layer.own_bias();
      if (!own.assembled()) {
        product.finish.activation = own.activation;
        product.finish.pre = pre.data;
        product.finish.pre_ld = pre.ld;
      }
      layers.push_back(product);
      if (!context.data) continue;
      MaskedLinearArgs<T> term = net.context_product(layer, args.batch);
      term.x = context.data;
      term.x_ld = context.ld;
      const Columns<T> sum = adds_context ? made : at(own.term), term_pre = at(own.term_pre);
      term.out = sum.data;
      term.out_ld = sum.ld;
      term.finish.bias = adds_context ? layer.own_bias() : layer.context_bias;
      term.finish.activation = own.context_activation;
      term.finish.pre = term_pre.data;
      term.finish.pre_ld = term_pre.ld;
      contexts.push_back(term);
    }
  }

  void set(TrainingArgs<T>& args) const {
    args.layers = layers.data();
    args.contexts = contexts.empty() ? nullptr : contexts.data();
  }

  // the first layer's values of rows [r0, r1)
  void make_first(int64_t r0, int64_t r1, T* scratch) const {
    for (const auto* products : {&contexts, &layers})
      if (!products->empty()) FK_DISPATCH(masked_linear_forward<T>(products->front(), r0, r1, int64_t(0), products->front().outputs, scratch));
  }
};

template <class T>
T* training_scratch(int64_t features) {
  return static_cast<T*>(thread_scratch(FK_DISPATCH(training_scratch_bytes<T>(features))));
}

// One map of a forward pass. It must stay where it is.
template <class T>
struct ForwardCall {
  TrainingNetwork<T> net;
  ContextRows<T> contexts;
  Tensor y, values;
  TrainingArgs<T> args;

  ForwardCall(const Tensor& x, const std::optional<Tensor>& context, const Parts& parts)
      : net(read_network<T>(parts, x.size(1), x.scalar_type(), true)),
        contexts(context, net, x.size(0)),
        y(empty(x, {x.size(0), x.size(1)})),
        values(empty(x, {x.size(0), net.columns})),
        args(with_tensors(training_args(net, x.size(0), parts.scale, parts.form), x)) {}

  // Rows [r0, r1); remade: room for what is not kept of them
  void run(int64_t r0, int64_t r1, T* remade, T* scratch) const {
    TrainingArgs<T> block = args.span(r0, r1 - r0);
    block.values += r0 * block.values_ld;
    block.remade = remade;
    const Ascent<T> ascent(block, net, contexts.from(r0));
    ascent.set(block);
    FK_DISPATCH(training_forward<T>(block, int64_t(0), r1 - r0, scratch));
  }

 private:
  TrainingArgs<T> with_tensors(TrainingArgs<T> some, const Tensor& x) {
    some.set_x(data_of<T>(x), x.stride(0), x.stride(1));
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
    layers.reserve(net.layers.size());
    contexts.reserve(dcontext ? net.layers.size() : 0);
    for (size_t l = net.layers.size(); l-- > 0;) {
      const TrainingLayer<T>& layer = net.layers[l];
      const LayerColumns<T>& own = net.of_layers[l];
      MaskedLinearArgs<T> product = net.product(layer, args.batch);
      product.dy = args.deltas + own.value;
      product.dy_ld = args.deltas_ld;
      product.out = args.deltas + own.input;
      product.out_ld = args.deltas_ld;
      if (net.wired || own.source == 0) {
        product.finish.accumulate = true;  // to what reaches the source on other ways
      } else {
        const LayerColumns<T>& below = net.of_layers[l - 1];
        product.finish.activation = below.activation;
        const Columns<T> known = net.place(args, below.pre >= 0 ? below.pre : below.value);
        product.finish.values = below.activation == Activation::identity ? nullptr : known.data;
        product.finish.values_ld = known.ld;
      }
      layers.push_back(product);
      if (!dcontext) continue;
      MaskedLinearArgs<T> term = net.context_product(layer, args.batch);  // or nothing to do
      term.dy = args.deltas + own.context_delta();
      term.dy_ld = args.deltas_ld;
      term.out = dcontext;
      term.out_ld = net.contexts;
      term.finish.accumulate = begun;
      begun |= layer.takes_context;
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
  Tensor dx, dcontext, deltas, remade;
  ParameterGradients<T> parameters;
  TrainingArgs<T> args;

  static int64_t delta_columns(const TrainingNetwork<T>& net, const Parts& parts) { return net.delta_columns + parts.by_bound; }

  // threads_: 0 for as many as the work is worth; dcontext: where the context's gradient so far lies, or nothing
  GradientCall(TrainingNetwork<T> network, const Tensor& dy, const Tensor& dlogabsdet, const Tensor& like, const std::optional<Tensor>& context,
               const Parts& parts, bool need_dx, int64_t threads_, const std::optional<Tensor>& dcontext_)
      : net(std::move(network)),
        contexts(context, net, dy.size(0)),
        batch(dy.size(0)),
        threads(threads_ ? threads_ : threads_for(net.multiply_adds(batch))),
        span(span_of(batch, threads)),
        need_dx(need_dx),
        adds_dcontext(context && dcontext_),
        dx(empty(like, {need_dx ? batch : 0, net.features})),
        dcontext(adds_dcontext ? *dcontext_ : empty(like, {context ? batch : 0, net.contexts})),
        deltas(empty(like, {span, delta_columns(net, parts)})),
        remade(empty(like, {span, net.remade_columns})),
        parameters(net, like, threads, parts.by_bound, parts.by_parameters),
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
    args.set_cotangents(data_of<T>(dy), dy.stride(0), dy.stride(1), data_of<T>(dlogabsdet), dlogabsdet.stride(0));
    args.deltas = static_cast<T*>(deltas.mutable_data_ptr());
    args.remade = static_cast<T*>(remade.mutable_data_ptr());
    args.dx = static_cast<T*>(dx.mutable_data_ptr());
  }

  T* dcontext_from(int64_t row) { return contexts.data ? static_cast<T*>(dcontext.mutable_data_ptr()) + row * net.contexts : nullptr; }

  // dx (empty where nobody asks for it), dcontext (empty without context), then the gradients of weights, biases, context weights
  // and context biases (empty too where nobody does), and last that of the bound where it is asked for
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
  call.args.values = const_cast<T*>(data_of<T>(values));
}

}  // namespace
}  // namespace flowkernels
