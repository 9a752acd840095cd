// The ops of a training step from their tensors, for any launcher of autoregressive_training_steps.h; and how large its launches are.
#pragma once

#include <tuple>

#include "autoregressive_mirror.h"
#include "autoregressive_training_steps.h"
#include "tensor_sizes.h"

namespace flowkernels {

inline void check_training_dtype(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  check_training(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, "tensors must be float32 or float64");
  check_training(t.dim() == 2, "x must be a matrix");
}

// whether it has the dtype of x, where x is
inline bool is_like(const torch::stable::Tensor& t, const torch::stable::Tensor& x) {
  return t.scalar_type() == x.scalar_type() && t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index();
}

inline void check_cotangent(const torch::stable::Tensor& dlogabsdet, const torch::stable::Tensor& x) {
  check_training(dlogabsdet.dim() == 1 && dlogabsdet.size(0) == x.size(0) && is_like(dlogabsdet, x), "dlogabsdet must have one entry per row");
}

// run(shape) with the largest tile of which a product of batch x columns has two for each multiprocessor, or with the smallest: larger tiles read
// less from shared memory, smaller ones are more warps
template <class T, class F>
void with_tile(int64_t batch, int64_t columns, int processors, const F& run) {
  const auto fills = [&](auto shape) { return tiles_of(batch, shape.rows) * tiles_of(columns, shape.columns) >= 2 * int64_t(processors); };
  if constexpr (sizeof(T) == 4)
    if (fills(LargeTile{})) return run(LargeTile{});
  if (fills(SmallTile<T>{})) return run(SmallTile<T>{});
  run(NarrowTile<T>{});
}

// Where the blocks of each gradient begin, blocks_of(gradient) of them; how many there are
template <class T, class BlocksOf>
int64_t place_blocks(AcrossArgs<T>& args, const BlocksOf& blocks_of) {
  int64_t blocks = 0;
  for (int i = 0; i < args.n; ++i) {
    args.of[i].first_block = static_cast<int>(blocks);
    blocks += blocks_of(args.of[i]);
  }
  return blocks;
}

// Into how many shares the batch is divided: four blocks to a multiprocessor, of which half lie outside of the staircase, and no fewer rows than
// are worth a part's way through memory. Sets the rows of a share.
template <class T>
int64_t shares_of(AcrossArgs<T>& args, int64_t blocks, int processors) {
  constexpr int64_t kLeastRows = 128;
  const int64_t wanted = blocks > 0 ? (4 * int64_t(processors) + blocks - 1) / blocks : 1;
  const int64_t shares = std::max<int64_t>(1, std::min({wanted, int64_t(16), args.batch / kLeastRows}));
  args.share = (args.batch + shares - 1) / shares;
  return args.share > 0 ? (args.batch + args.share - 1) / args.share : 1;
}

// The maps of a stack with what a forward pass keeps of each. `kept`: from that pass, or empty for new ones
template <class T>
class TrainingStack {
 public:
  std::vector<TrainingMap<T>> maps;

  template <class Launch>
  TrainingStack(const StackTensors& t, const Tensors& kept, T* y, T* logabsdet, const Launch& launch) : networks_(read_stack<T>(t, y, nullptr, logabsdet, false)) {
    check_training(kept.empty() || kept.size() == networks_.size(), "every map needs its entries in each list");
    for (size_t i = 0; i < networks_.size(); ++i) {
      const LoopArgs<T>& args = networks_[i].args;
      check_training(!args.inverse, "the maps must be forward ones");
      const TrainingColumns<T> columns = TrainingMap<T>::columns_of(args);
      maps.emplace_back(args, columns, kept.empty() ? launch.empty({args.batch, columns.values}) : kept[i]);
      const torch::stable::Tensor& values = maps.back().kept;
      check_training(values.dim() == 2 && values.size(0) == args.batch && values.size(1) == columns.values && values.is_contiguous() &&
                         is_like(values, t.x),
                     "values are not those of the forward pass");
    }
  }

 private:
  std::vector<LoopNetwork<T>> networks_;
};

// Room for the gradients of these tensors, which are appended to what an op returns; empty where nobody asks for them
inline Tensors gradients_of(const Tensors& tensors, Tensors& out, const auto& launch, bool needed = true) {
  Tensors gradients;
  for (const torch::stable::Tensor& tensor : tensors) {
    gradients.push_back(launch.empty(needed ? sizes_of(tensor) : std::vector<int64_t>{0}));
  }
  out.insert(out.end(), gradients.begin(), gradients.end());
  return gradients;
}

template <class T, class Launch>
std::tuple<torch::stable::Tensor, torch::stable::Tensor, Tensors> training_forward(const StackTensors& t, Launch& launch) {
  torch::stable::Tensor y = launch.empty({t.x.size(0), t.x.size(1)}), logabsdet = launch.empty({t.x.size(0)});
  T *to = static_cast<T*>(y.mutable_data_ptr()), *log = static_cast<T*>(logabsdet.mutable_data_ptr());
  const TrainingStack<T> stack(t, {}, to, log, launch);
  std::optional<torch::stable::Tensor> context;
  train_forward<T>(stack.maps, {static_cast<const T*>(t.x.const_data_ptr()), t.x.stride(0), t.x.stride(1)}, context_matrix<T>(t.context, context), to, log,
                   launch);
  Tensors kept;
  for (const TrainingMap<T>& map : stack.maps) kept.push_back(map.kept);
  return {y, logabsdet, kept};
}

// dx and dcontext, then the gradients of all weights, biases, context weights and context biases; empty where nobody asks for them. t.x: dy
template <class T, class Launch>
Tensors training_backward(const StackTensors& t, const torch::stable::Tensor& dlogabsdet, const Tensors& kept, const std::vector<int64_t>& learned,
                          bool need_dx, bool need_dcontext, bool need_parameters, int64_t together, Launch& launch) {
  const int64_t batch = t.x.size(0), features = t.x.size(1), contexts = t.context ? t.context->size(1) : 0;
  check_cotangent(dlogabsdet, t.x);
  check_training(kept.size() == t.orders.size(), "every map needs its entries in each list");
  for (int64_t own : learned) check_training(own == 0, "a learned scale has no kernel here");
  const TrainingStack<T> stack(t, kept, nullptr, nullptr, launch);
  torch::stable::Tensor dx = launch.empty({need_dx || stack.maps.size() > 1 ? batch : 0, features});
  check_training(t.context.has_value() == !t.context_weights.empty(), "context and context_weights go together");
  need_dcontext = need_dcontext && t.context;
  torch::stable::Tensor dcontext = launch.empty({need_dcontext ? batch : 0, contexts});
  Tensors out{need_dx ? dx : launch.empty({0, features}), dcontext};
  const auto room = [&](const Tensors& tensors) { return gradients_of(tensors, out, launch, need_parameters); };
  const Tensors weights = room(t.weights), biases = room(t.biases), context_weights = room(t.context_weights), context_biases = room(t.context_biases);
  Rest<torch::stable::Tensor> of_weights{weights}, of_biases{biases}, of_context_weights{context_weights}, of_context_biases{context_biases};
  const auto list = [](auto part) { return Tensors(part.begin(), part.end()); };
  std::vector<ParameterTensors> parameters;
  for (size_t i = 0; need_parameters && i < t.orders.size(); ++i) {
    const MapNumbers numbers(t.stages, i);
    parameters.push_back({list(of_weights.next(numbers.layers)), list(of_biases.next(numbers.layers)), list(of_context_weights.next(numbers.contexts)),
                          list(of_context_biases.next(numbers.context_biases))});
  }
  std::optional<torch::stable::Tensor> context;
  const Matrix<T> given = context_matrix<T>(t.context, context);
  const Cotangents<T> cotangents{{static_cast<const T*>(t.x.const_data_ptr()), t.x.stride(0), t.x.stride(1)},
                                 static_cast<const T*>(dlogabsdet.const_data_ptr()),
                                 dlogabsdet.stride(0)};
  train_backward<T>(stack.maps, cotangents, given, need_dx, static_cast<T*>(dx.mutable_data_ptr()),
                    need_dcontext ? static_cast<T*>(dcontext.mutable_data_ptr()) : nullptr, parameters, together, launch);
  return out;
}

// The gradient of (x, logabsdet) = f^-1(z): dz, dcontext (empty without context), then as above. Every layer's values are made again from x;
// then solve(args) runs the mirrored loop, which gives dz and the gradients by the layers' sums; then all is as in training. t: of f
template <class T, class Launch, class Solve>
Tensors inverse_backward(const LoopTensors& t, const torch::stable::Tensor& dx, const torch::stable::Tensor& dlogabsdet, Launch& launch, const Solve& solve) {
  const LoopNetwork<T> network(t);
  const LoopArgs<T>& args = network.args;
  check_training(dx.dim() == 2 && dx.size(0) == args.batch && dx.size(1) == args.features && is_like(dx, t.x), "dx does not fit x");
  check_cotangent(dlogabsdet, t.x);
  const TrainingColumns<T> columns = TrainingMap<T>::columns_of(args);
  std::optional<torch::stable::Tensor> context;
  const Matrix<T> given = context_matrix<T>(t.context, context);
  const TrainingMap<T> map(args, columns, launch.empty({args.batch, columns.values}));
  launch.to_order(args.batch, ToOrder<T>{{args.x, args.x_row, args.x_column}, args.order, map.values, columns.values, args.features});
  rise_through(map, given, launch);

  torch::stable::Tensor dz = launch.empty({args.batch, args.features}), deltas = launch.empty({args.batch, columns.deltas});
  MirroredNetwork<T> mirrored(args, columns, {dx, dlogabsdet, map.values});
  mirrored.args.y = static_cast<T*>(dz.mutable_data_ptr());
  mirrored.args.deltas = static_cast<T*>(deltas.mutable_data_ptr());
  mirrored.args.deltas_row = columns.deltas;
  if (args.batch > 0) solve(mirrored.args);

  Descent<T, Launch> descent(map, mirrored.args.deltas, given, launch);
  descent.settle_terms();
  torch::stable::Tensor dcontext = launch.empty({t.context ? args.batch : 0, args.context_features});
  if (t.context) descent.find_context(static_cast<T*>(dcontext.mutable_data_ptr()), false);
  Tensors out{dz, dcontext};
  const ParameterTensors gradients{gradients_of(t.weights, out, launch), gradients_of(t.biases, out, launch),
                                   gradients_of(t.context_weights, out, launch), gradients_of(t.context_biases, out, launch)};
  AcrossQueue<T, Launch> queue(args.batch, launch);
  descent.find_parameters(gradients, queue);
  queue.flush();
  return out;
}

}  // namespace flowkernels
