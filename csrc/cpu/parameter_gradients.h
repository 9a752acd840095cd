// The gradients of a masked autoregressive map's parameters, and of its scale map's bound: sums over rows, which come span by span.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/autoregressive_training_network.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/staircase.h"
#include "sum_order.h"

namespace flowkernels {

// Included after the kernels that it dispatches to.
template <class T>
class ParameterGradients {
  using Tensor = torch::stable::Tensor;
  using Tensors = std::vector<Tensor>;

 public:
  // needed: otherwise every gradient is an empty tensor, and there is nothing to do
  ParameterGradients(const TrainingNetwork<T>& net, const Tensor& like, int64_t threads, bool of_bound, bool needed) : net_(net), needed_(needed) {
    const size_t n = net.layers.size();
    for (Tensors* list : {&weights_, &biases_}) list->reserve(n);
    for (Tensors* list : {&context_weights_, &context_biases_}) list->reserve(net.takes_context ? n : 0);
    products_.reserve(net.takes_context ? 2 * n : n);
    sums_.reserve(net.has_context_biases ? 3 * n : 2 * n);
    for (size_t l = 0; l < n; ++l) {
      const TrainingLayer<T>& layer = net.layers[l];
      const LayerColumns<T>& own = net.of_layers[l];
      if (layer.unitwise)
        weights_.push_back(add_sum(own.value, layer.weight ? own.units : 0, own.input, like));
      else
        weights_.push_back(add_product(net.product(layer, 0), l, false, like));
      biases_.push_back(add_sum(own.value, layer.bias ? own.units : 0, -1, like));
      if (!layer.takes_context) continue;
      context_weights_.push_back(add_product(net.context_product(layer, 0), l, true, like));
      if (net.has_context_biases) context_biases_.push_back(add_sum(own.context_delta(), own.units, -1, like));
    }
    if (of_bound) bound_.push_back(empty(like, {1}));
    make_tasks(threads);
  }

  // The next rows, a multiple of kChunk of them but for the last, are added in three calls: set_rows, add_share for each thread, which
  // may run at the same time, and finish_rows.
  void set_rows(const TrainingArgs<T>& args, Rows<T> context) {
    for (Product& product : products_) {
      MaskedLinearArgs<T>& p = product.args;
      p.batch = args.batch;
      const LayerColumns<T>& own = net_.of_layers[product.layer];
      const Columns<T> input = net_.place(args, own.input);
      p.x = product.of_context ? context.data : input.data;
      p.x_ld = product.of_context ? context.ld : input.ld;
      p.dy = args.deltas + (product.of_context ? own.context_delta() : own.value);
      p.dy_ld = args.deltas_ld;
      p.finish.accumulate = begun_;
    }
  }

  void add_share(int64_t share, const TrainingArgs<T>& args) {
    for (int64_t task : shares_[share]) run(tasks_[task], args);
  }

  void finish_rows(const TrainingArgs<T>& args) {
    for (Tensor& bound : bound_)
      FK_DISPATCH(sum_rows<T>(args.deltas + args.by_bound, args.deltas_ld, nullptr, int64_t(0), args.batch, int64_t(1), begun_,
                              static_cast<T*>(bound.mutable_data_ptr())));
    begun_ = true;
  }

  void append_to(Tensors& out) const {
    for (const Tensors* list : {&weights_, &biases_, &context_weights_, &context_biases_, &bound_}) out.insert(out.end(), list->begin(), list->end());
  }

 private:
  struct Product {
    MaskedLinearArgs<T> args;
    size_t layer;
    bool of_context;
  };
  // the sum of some columns of deltas, or of their products with columns of values
  struct Sum {
    int64_t deltas, values, columns;  // values: -1 for ones
    T* out;
  };
  // rows [k0, k1) of a product's dweight; or a sum, where k1 is 0
  struct Task {
    size_t number;
    int64_t k0, k1;
  };

  const TrainingNetwork<T>& net_;
  const bool needed_;
  Tensors weights_, biases_, context_weights_, context_biases_;
  Tensors bound_;  // one, or none
  std::vector<Product> products_;
  std::vector<Sum> sums_;
  std::vector<Task> tasks_;
  Shares shares_;
  int64_t largest_ = 0;                    // rows of a task
  bool begun_ = false;

  Tensor add_product(MaskedLinearArgs<T> args, size_t layer, bool of_context, const Tensor& like) {
    if (!needed_) return empty(like, {0});
    Tensor dweight = empty(like, {args.inputs, args.outputs});
    args.out = static_cast<T*>(dweight.mutable_data_ptr());
    args.out_ld = args.outputs;
    products_.push_back({args, layer, of_context});
    return dweight;
  }

  Tensor add_sum(int64_t deltas, int64_t columns, int64_t values, const Tensor& like) {
    if (!needed_) return empty(like, {0});
    Tensor sum = empty(like, {columns});
    if (columns > 0) sums_.push_back({deltas, values, columns, static_cast<T*>(sum.mutable_data_ptr())});
    return sum;
  }

  void make_tasks(int64_t threads) {
    std::vector<double> work;
    tasks_.reserve(2 * products_.size() + sums_.size());
    work.reserve(tasks_.capacity());
    for (size_t i = 0; i < products_.size(); ++i) {
      const MaskedLinearArgs<T>& p = products_[i].args;
      const int64_t block = FK_DISPATCH(dweight_rows<T>(p.inputs, threads, 64));  // the products together are tasks enough
      largest_ = std::max(largest_, block);
      for (int64_t k0 = 0; k0 < p.inputs; k0 += block) {
        const int64_t k1 = std::min(k0 + block, p.inputs);
        tasks_.push_back({i, k0, k1});
        work.push_back(seen_pairs(p.visible, p.outputs, k0, k1));
      }
    }
    for (size_t i = 0; i < sums_.size(); ++i) {
      tasks_.push_back({i, 0, 0});
      work.push_back(4.0 * static_cast<double>(sums_[i].columns));  // bound by memory: a row is worth some multiply-adds
    }
    shares_ = share_out(work, threads);
  }

  void run(const Task& task, const TrainingArgs<T>& args) {
    if (task.k1 == 0) {
      const Sum& sum = sums_[task.number];
      const T* values = sum.values < 0 ? nullptr : args.values + sum.values;
      return FK_DISPATCH(sum_rows<T>(args.deltas + sum.deltas, args.deltas_ld, values, args.values_ld, args.batch, sum.columns, begun_, sum.out));
    }
    T* scratch = static_cast<T*>(thread_scratch(FK_DISPATCH(dweight_scratch_bytes<T>(largest_))));
    FK_DISPATCH(masked_linear_dweight<T>(products_[task.number].args, task.k0, task.k1, scratch));
  }
};

}  // namespace flowkernels
