// The gradients of weights, biases and context weights of a masked autoregressive map, and of its scale map's bound: sums over rows,
// which come span by span.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/autoregressive_training_network.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/staircase.h"

namespace flowkernels {

constexpr int64_t kChunkRows = 256;  // sums over rows are made in chunks of so many: kChunk of staircase_kernel.h

// Included after the kernels that it dispatches to.
template <class T>
class ParameterGradients {
  using Tensor = torch::stable::Tensor;
  using Tensors = std::vector<Tensor>;

 public:
  ParameterGradients(const TrainingNetwork<T>& net, const Tensor& like, int64_t threads, bool of_bound) : net_(net) {
    for (size_t l = 0; l < net.layers.size(); ++l) {
      const TrainingLayer<T>& layer = net.layers[l];
      weights_.push_back(add_product(net.product(layer, 0), l, false, like));
      if (layer.context_weight) context_weights_.push_back(add_product(net.context_product(layer, 0), l, true, like));
      biases_.push_back(empty(like, {layer.outputs}));
    }
    if (of_bound) bound_.push_back(empty(like, {1}));
    make_tasks(threads);
  }

  // The next rows, a multiple of kChunkRows of them but for the last, are added in three calls: set_rows, add_share for each thread, which
  // may run at the same time, and finish_rows.
  void set_rows(const TrainingArgs<T>& args, Rows<T> context) {
    for (Product& product : products_) {
      MaskedLinearArgs<T>& p = product.args;
      p.batch = args.batch;
      p.x = product.of_context ? context.data : args.values + net_.input_offset(product.layer);
      p.x_ld = product.of_context ? context.ld : args.values_ld;
      p.dy = args.deltas + net_.layers[product.layer].offset;
      p.dy_ld = args.deltas_ld;
      p.finish.accumulate = begun_;
    }
  }

  void add_share(int64_t share, const TrainingArgs<T>& args) {
    for (int64_t task : shares_[share]) run(tasks_[task], args);
  }

  void finish_rows(const TrainingArgs<T>& args) {
    for (Tensor& bound : bound_)
      FK_DISPATCH(sum_rows<T>(args.deltas + args.by_bound, args.deltas_ld, args.batch, int64_t(1), begun_, static_cast<T*>(bound.mutable_data_ptr())));
    begun_ = true;
  }

  void append_to(Tensors& out) const {
    for (const Tensors* list : {&weights_, &biases_, &context_weights_, &bound_}) out.insert(out.end(), list->begin(), list->end());
  }

 private:
  struct Product {
    MaskedLinearArgs<T> args;
    size_t layer;
    bool of_context;
  };
  // rows [k0, k1) of a product's dweight; or of a bias, whose layer is `product`, where k1 is 0
  struct Task {
    size_t product;
    int64_t k0, k1;
  };

  const TrainingNetwork<T>& net_;
  Tensors weights_, biases_, context_weights_;
  Tensors bound_;  // one, or none
  std::vector<Product> products_;
  std::vector<Task> tasks_;
  Shares shares_;
  int64_t largest_ = 0;                    // rows of a task
  bool begun_ = false;

  Tensor add_product(MaskedLinearArgs<T> args, size_t layer, bool of_context, const Tensor& like) {
    Tensor dweight = empty(like, {args.inputs, args.outputs});
    args.out = static_cast<T*>(dweight.mutable_data_ptr());
    args.out_ld = args.outputs;
    products_.push_back({args, layer, of_context});
    return dweight;
  }

  void make_tasks(int64_t threads) {
    std::vector<double> work;
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
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      tasks_.push_back({l, 0, 0});
      work.push_back(4.0 * static_cast<double>(net_.layers[l].outputs));  // bound by memory: a row is worth some multiply-adds
    }
    shares_ = share_out(work, threads);
  }

  void run(const Task& task, const TrainingArgs<T>& args) {
    if (task.k1 == 0) {
      const TrainingLayer<T>& layer = net_.layers[task.product];
      T* out = static_cast<T*>(biases_[task.product].mutable_data_ptr());
      return FK_DISPATCH(sum_rows<T>(args.deltas + layer.offset, args.deltas_ld, args.batch, layer.outputs, begun_, out));
    }
    T* scratch = static_cast<T*>(thread_scratch(FK_DISPATCH(dweight_scratch_bytes<T>(largest_))));
    FK_DISPATCH(masked_linear_dweight<T>(products_[task.product].args, task.k0, task.k1, scratch));
  }
};

}  // namespace flowkernels
