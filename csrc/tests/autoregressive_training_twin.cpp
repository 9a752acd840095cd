// A twin of the CUDA training step (cuda/autoregressive_training.cu) on the CPU, by which the tests reach its launches, its indices and its
// arithmetic:
//   flowkernels::_autoregressive_training_twin(<arguments of autoregressive_training>, int[] layout) -> (Tensor, Tensor, Tensor[])
//   flowkernels::_autoregressive_backward_twin(<arguments of _autoregressive_backward>, int[] layout) -> Tensor[]
//     layout: multiprocessors, by which tiles and shares of the batch are chosen; whether threads run backwards, their copies landing at once; bytes
//       of deltas that maps may hold together

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "tests/training_twin.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensors> training_twin(Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases, Tensors context_weights,
                                                  Tensors context_biases, Tensors visible, Tensors orders, std::vector<int64_t> activations,
                                                  std::vector<int64_t> wiring, std::vector<int64_t> stages, std::vector<double> scales,
                                                  std::vector<int64_t> layout) {
  check_training_dtype(x);
  const StackTensors tensors{x, context, weights, biases, context_weights, context_biases, visible, orders, {}, activations, wiring, stages, scales};
  const auto run = [&]<class T>(T) {
    TwinLaunch<T> launch(tensors.x, TrainingLayout(layout));
    return training_forward<T>(tensors, launch);
  };
  return x.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

Tensors backward_twin(Tensor dy, Tensor dlogabsdet, Tensors kept, std::optional<Tensor> context, Tensors weights, Tensors biases,
                      Tensors context_weights, Tensors context_biases, Tensors visible, Tensors orders, std::vector<int64_t> activations,
                      std::vector<int64_t> wiring, std::vector<int64_t> stages, std::vector<double> scales, std::vector<int64_t> learned, bool need_dx,
                      bool need_dcontext, bool need_parameters, std::vector<int64_t> layout) {
  check_training_dtype(dy);
  const StackTensors tensors{dy, context, weights, biases, context_weights, context_biases, visible, orders, {}, activations, wiring, stages, scales};
  const auto run = [&]<class T>(T) {
    const TrainingLayout of(layout);
    TwinLaunch<T> launch(tensors.x, of);
    return training_backward<T>(tensors, dlogabsdet, kept, learned, need_dx, need_dcontext, need_parameters, of.together, launch);
  };
  return dy.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

}  // namespace
}  // namespace flowkernels

#define FK_STACK                                                                                                                  \
  "Tensor? context, Tensor[] weights, Tensor[] biases, Tensor[] context_weights, Tensor[] context_biases, Tensor[] visible, Tensor[] orders, " \
  "int[] activations, int[] wiring, int[] stages, float[] scales"

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels, m) {
  m.def("_autoregressive_training_twin(Tensor x, " FK_STACK ", int[] layout) -> (Tensor, Tensor, Tensor[])");
  m.def("_autoregressive_backward_twin(Tensor dy, Tensor dlogabsdet, Tensor[] kept, " FK_STACK ", int[] learned, bool need_dx, bool need_dcontext, "
        "bool need_parameters, int[] layout) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("_autoregressive_training_twin", TORCH_BOX(&flowkernels::training_twin));
  m.impl("_autoregressive_backward_twin", TORCH_BOX(&flowkernels::backward_twin));
}
