// The launches of a training step (../autoregressive_training_steps.h) on the current stream of a device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda/training_rows.h"

namespace flowkernels {

template <class T>
class CudaLaunch {
 public:
  explicit CudaLaunch(const torch::stable::Tensor& like);  // which must outlive it

  torch::stable::Tensor empty(const std::vector<int64_t>& sizes) const;
  void up(const UpArgs<T>& args) const;
  void down(const DownArgs<T>& args) const;
  void across(AcrossArgs<T>& args) const;
  void to_order(int64_t batch, const ToOrder<T>& args) const;
  void map(const MapArgs<T>& args) const;
  void map_backward(const MapBackwardArgs<T>& args) const;
  void unitwise_up(const UnitwiseUpArgs<T>& args) const;
  void settle(const SettleArgs<T>& args) const;
  void column_sum(const ColumnSumArgs<T>& args) const;

 private:
  const torch::stable::Tensor& like_;
  cudaStream_t stream_;
  int processors_;

  template <template <class> class Tile, class Args, class Kernel>
  void product(const Args& args, int columns, const Kernel& kernel_of) const;
  template <class Kernel, class... Args>
  void rows(int64_t batch, Kernel kernel, const Args&... args) const;
  template <class Args>
  void each_unit(const Args& args) const;
};

}  // namespace flowkernels
