// Training passes of a masked autoregressive map for CPU tensors: the forward map that keeps every layer's values, and its gradient.
// Rows are independent up to the gradients of the parameters, which are sums over rows and come last.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/autoregressive.h"
#include "cpu/autoregressive_training.h"
#include "cpu/scratch.h"
#include "cpu/staircase.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/autoregressive_training_targets.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Python has checked what users get wrong; here only what would corrupt memory.
inline void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::autoregressive_training: ", what); }

template <class T>
struct Layer {
  const T *weight, *context_weight;
  const int32_t* visible;
  int64_t ld, context_ld, inputs, outputs, offset;  // offset: first column of its values
  int64_t pre;                                      // first column of its pre-activations, -1 where they are not kept
  Activation activation;
  std::vector<int32_t> first;
  std::vector<int32_t> whole_context;  // visible of the context term
};

// The network, and where its values lie in a row
template <class T>
struct Network {
  std::vector<Layer<T>> layers;
  Tensors kept;  // contiguous copies must outlive the kernel
  std::vector<int32_t> no_first;
  const int64_t* order = nullptr;
  int64_t features = 0, contexts = 0, delta_columns = 0, columns = 0;
  ScalarType dtype;

  const T* matrix(const Tensor& t, int64_t rows, int64_t columns_, int64_t& ld) {
    check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns_ && t.scalar_type() == dtype && t.is_cpu(), "a weight does not fit");
    kept.push_back(rows_contiguous(t));
    ld = kept.back().size(0) > 1 ? kept.back().stride(0) : columns_;
    return static_cast<const T*>(kept.back().const_data_ptr());
  }

  const void* vector(const Tensor& t, int64_t length, ScalarType type) {
    check(t.dim() == 1 && t.size(0) == length && t.scalar_type() == type && t.is_cpu(), "a bias, visible or order does not fit");
    kept.push_back(made_contiguous(t));
    return kept.back().const_data_ptr();
  }

  Network(int64_t features, ScalarType dtype, const Tensors& weights, const Tensors& context_weights, const Tensors& visible,
          const std::optional<Tensor>& order_, const std::vector<int64_t>& activations)
      : features(features), dtype(dtype) {
    const size_t n = weights.size();
    check(n >= 1 && visible.size() == n && activations.size() == n && (context_weights.empty() || context_weights.size() == n),
          "weights, visible and activations must have one entry per layer");
    kept.reserve(4 * n + 1);
    layers.resize(n);
    contexts = context_weights.empty() ? 0 : context_weights[0].size(0);
    no_first.assign(contexts, 0);
    int64_t inputs = features, offset = features;
    for (size_t l = 0; l < n; ++l) {
      Layer<T>& layer = layers[l];
      layer.inputs = inputs;
      layer.outputs = weights[l].dim() == 2 ? weights[l].size(1) : -1;
      check(inputs < (int64_t{1} << 31), "too many units");
      layer.weight = matrix(weights[l], inputs, layer.outputs, layer.ld);
      layer.visible = static_cast<const int32_t*>(vector(visible[l], layer.outputs, ScalarType::Int));
      check(is_staircase(layer.visible, layer.outputs, inputs), "visible must ascend from 0 to the number of inputs");
      layer.context_weight = nullptr;
      if (!context_weights.empty()) {
        layer.context_weight = matrix(context_weights[l], contexts, layer.outputs, layer.context_ld);
        layer.whole_context.assign(layer.outputs, static_cast<int32_t>(contexts));
      }
      check(activations[l] >= 0 && activations[l] <= static_cast<int>(Activation::sigmoid), "unknown activation");
      layer.activation = static_cast<Activation>(activations[l]);
      layer.offset = offset;
      offset += layer.outputs;
      inputs = layer.outputs;
    }
    check(inputs == 2 * features && layers.back().activation == Activation::identity, "the last layer must give shift and raw scale of each feature");
    delta_columns = offset;
    for (Layer<T>& layer : layers) {
      const bool keep = !derivative_from_value(layer.activation);
      layer.pre = keep ? offset : -1;
      offset += keep ? layer.outputs : 0;
    }
    columns = offset;
    if (order_) {
      order = static_cast<const int64_t*>(vector(*order_, features, ScalarType::Long));
      for (int64_t p = 0; p < features; ++p) check(order[p] >= 0 && order[p] < features, "order must be a permutation");
    }
  }

  int64_t input_offset(size_t l) const { return l == 0 ? 0 : layers[l - 1].offset; }

  double multiply_adds(int64_t batch) const {
    double pairs = 0;
    for (const Layer<T>& layer : layers) pairs += seen_pairs(layer.visible, layer.outputs) + static_cast<double>(layer.outputs * contexts);
    return pairs * static_cast<double>(batch);
  }

  MaskedLinearArgs<T> product(const Layer<T>& layer, int64_t batch) const {
    MaskedLinearArgs<T> args{};
    args.weight = layer.weight;
    args.weight_ld = layer.ld;
    args.visible = layer.visible;
    args.first = layer.first.data();
    args.batch = batch;
    args.inputs = layer.inputs;
    args.outputs = layer.outputs;
    return args;
  }

  MaskedLinearArgs<T> context_product(const Layer<T>& layer, int64_t batch) const {
    MaskedLinearArgs<T> args{};
    args.weight = layer.context_weight;
    args.weight_ld = layer.context_ld;
    args.visible = layer.whole_context.data();
    args.first = no_first.data();
    args.batch = batch;
    args.inputs = contexts;
    args.outputs = layer.outputs;
    return args;
  }
};

struct Rows {
  const void* data;
  int64_t ld;
};

// rows of a matrix [batch, columns], contiguous
Rows rows_of(const Tensor& t, int64_t batch, int64_t columns, ScalarType dtype, Tensors& kept) {
  check(t.dim() == 2 && t.size(0) == batch && t.size(1) == columns && t.scalar_type() == dtype && t.is_cpu(), "a matrix does not fit the batch");
  kept.push_back(rows_contiguous(t));
  return {kept.back().const_data_ptr(), kept.back().size(0) > 1 ? kept.back().stride(0) : columns};
}

constexpr double kParallelMultiplyAdds = 4e5;  // about 10 us of one thread, against 5 us to start the others

// run(r0, r1) over blocks of rows: no more than kRows, which a packed panel serves, and at least one for each thread
template <class F>
void for_each_block(int64_t batch, double multiply_adds, const F& run) {
  constexpr int64_t kRows = 512;
  const int64_t threads = multiply_adds > kParallelMultiplyAdds ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
  const int64_t rows = std::clamp<int64_t>((batch + threads - 1) / threads, 1, kRows), blocks = (batch + rows - 1) / rows;
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i * rows, std::min((i + 1) * rows, batch));
  };
  if (threads > 1 && blocks > 1)
    torch::stable::parallel_for(0, blocks, 1, some);
  else
    some(0, blocks);
}

template <class T>
TrainingArgs<T> training_args(const Network<T>& net, int64_t batch, ScaleMapParams scale, Form form) {
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
  return args;
}

// Fills args.values, and args.y and args.logabsdet where they are wanted
template <class T>
void run_forward(TrainingArgs<T>& args, Network<T>& net, const Tensors& biases, const Tensor& x, const Rows* context) {
  check(biases.size() == net.layers.size(), "there must be one bias per layer");
  args.x = static_cast<const T*>(x.const_data_ptr());
  args.x_row = x.stride(0);
  args.x_column = x.stride(1);
  std::vector<MaskedLinearArgs<T>> products, context_products;
  for (size_t l = 0; l < net.layers.size(); ++l) {
    const Layer<T>& layer = net.layers[l];
    const T* bias = static_cast<const T*>(net.vector(biases[l], layer.outputs, net.dtype));
    MaskedLinearArgs<T> product = net.product(layer, args.batch);
    product.x = args.values + net.input_offset(l);
    product.x_ld = args.values_ld;
    product.out = args.values + layer.offset;
    product.out_ld = args.values_ld;
    if (context) {
      MaskedLinearArgs<T> term = net.context_product(layer, args.batch);
      term.x = static_cast<const T*>(context->data);
      term.x_ld = context->ld;
      term.out = product.out;
      term.out_ld = product.out_ld;
      term.finish.bias = bias;
      context_products.push_back(term);
      product.finish.accumulate = true;
    } else {
      product.finish.bias = bias;
    }
    product.finish.activation = layer.activation;
    if (layer.pre >= 0) {
      product.finish.pre = args.values + layer.pre;
      product.finish.pre_ld = args.values_ld;
    }
    products.push_back(product);
  }
  args.layers = products.data();
  args.contexts = context ? context_products.data() : nullptr;
  for_each_block(args.batch, net.multiply_adds(args.batch), [&](int64_t r0, int64_t r1) {
    FK_DISPATCH(training_forward<T>(args, r0, r1, static_cast<T*>(thread_scratch(FK_DISPATCH(training_scratch_bytes<T>(args.features))))));
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& context, const Tensors& weights, const Tensors& biases,
                                           const Tensors& context_weights, const Tensors& visible, const std::optional<Tensor>& order,
                                           const std::vector<int64_t>& activations, ScaleMapParams scale, Form form) {
  check(x.dim() == 2 && x.is_cpu(), "x must be a matrix");
  check(context_weights.empty() != context.has_value(), "context and context_weights go together");
  const int64_t batch = x.size(0), features = x.size(1);
  Network<T> net(features, x.scalar_type(), weights, context_weights, visible, order, activations);
  Tensors kept;
  const Rows contexts = context ? rows_of(*context, batch, net.contexts, net.dtype, kept) : Rows{};
  Tensor y = empty(x, {batch, features}), logabsdet = empty(x, {batch}), values = empty(x, {batch, net.columns});
  TrainingArgs<T> args = training_args(net, batch, scale, form);
  args.values = static_cast<T*>(values.mutable_data_ptr());
  args.y = static_cast<T*>(y.mutable_data_ptr());
  args.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  run_forward(args, net, biases, x, context ? &contexts : nullptr);
  return {y, logabsdet, values};
}

// One piece of the parameters' gradients: rows [k0, k1) of a product's dweight, or a sum over rows
template <class T>
struct Task {
  MaskedLinearArgs<T> product;
  int64_t k0, k1;
  double cost;
};

template <class T>
void add_tasks(std::vector<Task<T>>& tasks, const MaskedLinearArgs<T>& product, int64_t block) {
  for (int64_t k0 = 0; k0 < product.inputs; k0 += block) {
    const int64_t k1 = std::min(k0 + block, product.inputs);
    double cost = 0;
    for (int64_t j = 0; j < product.outputs; ++j) cost += static_cast<double>(std::clamp<int64_t>(product.visible[j] - k0, 0, k1 - k0));
    tasks.push_back({product, k0, k1, cost});
  }
}

// run(task) for all of them, spread over the threads by cost: the dearest first, each to the thread with the least
template <class T, class F>
void for_each_task(std::vector<Task<T>>& tasks, int64_t threads, const F& run) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task<T>& a, const Task<T>& b) { return a.cost > b.cost; });
  std::vector<std::vector<const Task<T>*>> shares(threads);
  std::vector<double> load(threads, 0);
  for (const Task<T>& task : tasks) {
    const size_t least = std::min_element(load.begin(), load.end()) - load.begin();
    shares[least].push_back(&task);
    load[least] += task.cost;
  }
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (const Task<T>* task : shares[i]) run(*task);
  };
  if (threads > 1)
    torch::stable::parallel_for(0, threads, 1, some);
  else
    some(0, 1);
}

// The products that carry deltas down, from the last layer to the first, and those that carry them to the context
template <class T>
struct Descent {
  std::vector<MaskedLinearArgs<T>> layers, contexts;

  Descent(const TrainingArgs<T>& args, Network<T>& net, T* dcontext) {
    for (size_t l = net.layers.size(); l-- > 0;) {
      Layer<T>& layer = net.layers[l];
      layer.first = first_seen_by(layer.visible, layer.outputs, layer.inputs);
      MaskedLinearArgs<T> product = net.product(layer, args.batch);
      product.dy = args.deltas + layer.offset;
      product.dy_ld = args.deltas_ld;
      product.out = args.deltas + net.input_offset(l);
      product.out_ld = args.deltas_ld;
      if (l == 0) {
        product.finish.accumulate = true;  // to what reaches x past the network
      } else {
        const Layer<T>& below = net.layers[l - 1];
        product.finish.activation = below.activation;
        product.finish.values = below.activation == Activation::identity ? nullptr : args.values + (below.pre >= 0 ? below.pre : below.offset);
        product.finish.values_ld = args.values_ld;
      }
      layers.push_back(product);
      if (!dcontext) continue;
      MaskedLinearArgs<T> term = net.context_product(layer, args.batch);
      term.dy = product.dy;
      term.dy_ld = product.dy_ld;
      term.out = dcontext;
      term.out_ld = net.contexts;
      term.finish.accumulate = !contexts.empty();
      contexts.push_back(term);
    }
  }
};

// The gradients of weights, biases and context weights, from the deltas
template <class T>
void add_parameter_gradients(Tensors& out, const TrainingArgs<T>& args, const Network<T>& net, const Tensor& like, const Rows* context) {
  const int64_t batch = args.batch;
  const int64_t threads = net.multiply_adds(batch) > kParallelMultiplyAdds ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
  Tensors dbiases, dcontext_weights;
  std::vector<Task<T>> tasks;
  int64_t largest = 0;
  auto add = [&](MaskedLinearArgs<T> product, const T* x, int64_t x_ld, const Layer<T>& layer) {
    Tensor dweight = empty(like, {product.inputs, product.outputs});
    product.x = x;
    product.x_ld = x_ld;
    product.dy = args.deltas + layer.offset;
    product.dy_ld = args.deltas_ld;
    product.out = static_cast<T*>(dweight.mutable_data_ptr());
    product.out_ld = product.outputs;
    const int64_t block = FK_DISPATCH(dweight_rows<T>(product.inputs, threads));
    largest = std::max(largest, block);
    add_tasks(tasks, product, block);
    return dweight;
  };
  for (size_t l = 0; l < net.layers.size(); ++l) {
    const Layer<T>& layer = net.layers[l];
    out.push_back(add(net.product(layer, batch), args.values + net.input_offset(l), args.values_ld, layer));
    if (context) dcontext_weights.push_back(add(net.context_product(layer, batch), static_cast<const T*>(context->data), context->ld, layer));
    Tensor dbias = empty(like, {layer.outputs});
    MaskedLinearArgs<T> sum{};
    sum.dy = args.deltas + layer.offset;
    sum.dy_ld = args.deltas_ld;
    sum.outputs = layer.outputs;
    sum.out = static_cast<T*>(dbias.mutable_data_ptr());
    tasks.push_back({sum, 0, 0, 4.0 * static_cast<double>(layer.outputs)});  // bound by memory: a row is worth some multiply-adds
    dbiases.push_back(dbias);
  }
  for_each_task(tasks, threads, [&](const Task<T>& task) {
    if (task.k1 == 0) return FK_DISPATCH(sum_rows<T>(task.product.dy, task.product.dy_ld, batch, task.product.outputs, task.product.out));
    T* scratch = static_cast<T*>(thread_scratch(FK_DISPATCH(dweight_scratch_bytes<T>(largest))));
    FK_DISPATCH(masked_linear_dweight<T>(task.product, task.k0, task.k1, scratch));
  });
  out.insert(out.end(), dbiases.begin(), dbiases.end());
  out.insert(out.end(), dcontext_weights.begin(), dcontext_weights.end());
}

template <class T>
void set_cotangents(TrainingArgs<T>& args, const Tensor& dy, const Tensor& dlogabsdet, ScalarType dtype) {
  check(dy.dim() == 2 && dy.size(0) == args.batch && dy.size(1) == args.features && dy.scalar_type() == dtype && dy.is_cpu(),
        "dy must be a matrix like y");
  check(dlogabsdet.dim() == 1 && dlogabsdet.size(0) == args.batch && dlogabsdet.scalar_type() == dtype && dlogabsdet.is_cpu(),
        "dlogabsdet must have one entry per row");
  args.dy = static_cast<const T*>(dy.const_data_ptr());
  args.dy_row = dy.stride(0);
  args.dy_column = dy.stride(1);
  args.dlogabsdet = static_cast<const T*>(dlogabsdet.const_data_ptr());
  args.dlogabsdet_step = dlogabsdet.stride(0);
}

// dx (empty where nobody asks for it), dcontext (empty without context), then the gradients of weights, biases, context weights
template <class T>
Tensors backward(const Tensor& dy, const Tensor& dlogabsdet, const Tensor& values, const std::optional<Tensor>& context, const Tensors& weights,
                 const Tensors& context_weights, const Tensors& visible, const std::optional<Tensor>& order,
                 const std::vector<int64_t>& activations, ScaleMapParams scale, Form form, bool need_dx) {
  check(dy.dim() == 2, "dy must be a matrix like y");
  const int64_t batch = dy.size(0), features = dy.size(1);
  Network<T> net(features, values.scalar_type(), weights, context_weights, visible, order, activations);
  check(values.dim() == 2 && values.size(0) == batch && values.size(1) == net.columns && values.is_contiguous(), "values are not those of the forward pass");
  Tensors kept;
  const Rows contexts = context ? rows_of(*context, batch, net.contexts, net.dtype, kept) : Rows{};

  Tensor dx = empty(values, {need_dx ? batch : 0, features}), dcontext = empty(values, {context ? batch : 0, net.contexts});
  Tensor deltas = empty(values, {batch, net.delta_columns});
  TrainingArgs<T> args = training_args(net, batch, scale, form);
  args.values = const_cast<T*>(static_cast<const T*>(values.const_data_ptr()));
  args.deltas = static_cast<T*>(deltas.mutable_data_ptr());
  set_cotangents(args, dy, dlogabsdet, net.dtype);
  args.dx = static_cast<T*>(dx.mutable_data_ptr());
  const Descent<T> descent(args, net, context ? static_cast<T*>(dcontext.mutable_data_ptr()) : nullptr);
  args.layers = descent.layers.data();
  args.contexts = context ? descent.contexts.data() : nullptr;
  for_each_block(batch, net.multiply_adds(batch), [&](int64_t r0, int64_t r1) {
    T* scratch = static_cast<T*>(thread_scratch(FK_DISPATCH(training_scratch_bytes<T>(features))));
    FK_DISPATCH(training_backward<T>(args, need_dx, r0, r1, scratch));
  });
  Tensors out{dx, dcontext};
  add_parameter_gradients(out, args, net, values, context ? &contexts : nullptr);
  return out;
}

// The steps of the inverse: ends[s][l] units of layer l are known after step s, layer 0 being the features known before it.
// Empty where the staircases are not autoregressive.
template <class T>
std::vector<int64_t> inverse_steps(const Network<T>& net) {
  const size_t n = net.layers.size();
  std::vector<MaskedLayer<T>> layers(n);
  for (size_t l = 0; l < n; ++l) {
    layers[l].visible = net.layers[l].visible;
    layers[l].outputs = net.layers[l].outputs;
    layers[l].source = static_cast<int>(l);
    layers[l].residual = -1;
  }
  return make_schedule(layers.data(), static_cast<int>(n), net.features, true);
}

// The gradient of (x, logabsdet) = f^-1(z): dz, dcontext (empty without context), then the gradients of the parameters
template <class T>
Tensors inverse_backward(const Tensor& dx, const Tensor& dlogabsdet, const Tensor& x, const std::optional<Tensor>& context,
                         const Tensors& weights, const Tensors& biases, const Tensors& context_weights, const Tensors& visible,
                         const std::optional<Tensor>& order, const std::vector<int64_t>& activations, ScaleMapParams scale, Form form) {
  check(x.dim() == 2 && x.is_cpu(), "x must be a matrix");
  const int64_t batch = x.size(0), features = x.size(1);
  Network<T> net(features, x.scalar_type(), weights, context_weights, visible, order, activations);
  const std::vector<int64_t> ends = inverse_steps(net);
  check(features == 0 || !ends.empty(), "the network is not autoregressive");
  Tensors kept;
  const Rows contexts = context ? rows_of(*context, batch, net.contexts, net.dtype, kept) : Rows{};
  Tensor values = empty(x, {batch, net.columns}), deltas = empty(x, {batch, net.delta_columns});
  Tensor dz = empty(x, {batch, features}), dcontext = empty(x, {context ? batch : 0, net.contexts});
  TrainingArgs<T> args = training_args(net, batch, scale, form);
  args.values = static_cast<T*>(values.mutable_data_ptr());
  args.deltas = static_cast<T*>(deltas.mutable_data_ptr());
  set_cotangents(args, dx, dlogabsdet, net.dtype);
  args.dx = static_cast<T*>(dz.mutable_data_ptr());
  run_forward(args, net, biases, x, context ? &contexts : nullptr);

  Descent<T> descent(args, net, context ? static_cast<T*>(dcontext.mutable_data_ptr()) : nullptr);
  const std::vector<MaskedLinearArgs<T>> upward(descent.layers.rbegin(), descent.layers.rend());
  std::vector<int64_t> offsets{0};
  for (const Layer<T>& layer : net.layers) offsets.push_back(layer.offset);
  const int64_t n_steps = static_cast<int64_t>(ends.size() / (net.layers.size() + 1));
  // equal tiles, as many as the rows need, in a multiple of the threads
  const int64_t threads = net.multiply_adds(batch) > kParallelMultiplyAdds ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
  const int64_t most = FK_DISPATCH(solve_rows<T>()), tiles = ((batch + most - 1) / most + threads - 1) / threads * threads;
  const int64_t rows = std::max<int64_t>((batch + tiles - 1) / std::max<int64_t>(tiles, 1), 1);
  auto solve = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r0 = i * rows, r1 = std::min((i + 1) * rows, batch);
      T* scratch = static_cast<T*>(thread_scratch(FK_DISPATCH(solve_scratch_bytes<T>(args))));
      FK_DISPATCH(solve_tile<T>(args, upward.data(), ends.data(), n_steps, offsets.data(), r0, r1, scratch));
      if (!context) continue;
      T* panel = static_cast<T*>(thread_scratch(FK_DISPATCH(training_scratch_bytes<T>(features))));
      for (const MaskedLinearArgs<T>& term : descent.contexts) FK_DISPATCH(masked_linear_dx<T>(term, r0, r1, int64_t(0), term.inputs, panel));
    }
  };
  const int64_t n_tiles = (batch + rows - 1) / rows;
  if (threads > 1 && n_tiles > 1)
    torch::stable::parallel_for(0, n_tiles, 1, solve);
  else
    solve(0, n_tiles);
  Tensors out{dz, dcontext};
  add_parameter_gradients(out, args, net, x, context ? &contexts : nullptr);
  return out;
}

void check_dtype(const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, "tensors must be float32 or float64");
}

std::tuple<Tensor, Tensor, Tensor> autoregressive_training(Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                                           Tensors context_weights, Tensors visible, std::optional<Tensor> order,
                                                           std::vector<int64_t> activations, int64_t scale_kind, double scale_p0,
                                                           double scale_p1, int64_t form) {
  check_dtype(x);
  const ScaleMapParams scale{static_cast<int>(scale_kind), scale_p0, scale_p1};
  auto go = x.scalar_type() == ScalarType::Float ? forward<float> : forward<double>;
  return go(x, context, weights, biases, context_weights, visible, order, activations, scale, static_cast<Form>(form));
}

Tensors autoregressive_backward(Tensor dy, Tensor dlogabsdet, Tensor values, std::optional<Tensor> context, Tensors weights,
                                Tensors context_weights, Tensors visible, std::optional<Tensor> order, std::vector<int64_t> activations,
                                int64_t scale_kind, double scale_p0, double scale_p1, int64_t form, bool need_dx) {
  check_dtype(values);
  const ScaleMapParams scale{static_cast<int>(scale_kind), scale_p0, scale_p1};
  auto go = values.scalar_type() == ScalarType::Float ? backward<float> : backward<double>;
  return go(dy, dlogabsdet, values, context, weights, context_weights, visible, order, activations, scale, static_cast<Form>(form), need_dx);
}

Tensors autoregressive_inverse_backward(Tensor dx, Tensor dlogabsdet, Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                        Tensors context_weights, Tensors visible, std::optional<Tensor> order, std::vector<int64_t> activations,
                                        int64_t scale_kind, double scale_p0, double scale_p1, int64_t form) {
  check_dtype(x);
  const ScaleMapParams scale{static_cast<int>(scale_kind), scale_p0, scale_p1};
  auto go = x.scalar_type() == ScalarType::Float ? inverse_backward<float> : inverse_backward<double>;
  return go(dx, dlogabsdet, x, context, weights, biases, context_weights, visible, order, activations, scale, static_cast<Form>(form));
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("autoregressive_training", TORCH_BOX(&flowkernels::autoregressive_training));
  m.impl("autoregressive_backward", TORCH_BOX(&flowkernels::autoregressive_backward));
  m.impl("autoregressive_inverse_backward", TORCH_BOX(&flowkernels::autoregressive_inverse_backward));
}
