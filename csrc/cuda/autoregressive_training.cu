// Training steps of masked autoregressive maps for CUDA tensors: the forward maps of a stack, which keep every layer's values, and their
// gradients; and the gradient of the inverse, one launch of the mirrored loop among such launches (../autoregressive_training_steps.h).

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "autoregressive_training_ops.h"
#include "cuda/autoregressive_loop.cuh"
#include "cuda/launch.h"
#include "cuda/training_launch.h"

namespace flowkernels {
namespace {

std::tuple<Tensor, Tensor, Tensors> autoregressive_training(Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                                            Tensors context_weights, Tensors context_biases, Tensors visible, Tensors orders,
                                                            std::vector<int64_t> activations, std::vector<int64_t> wiring,
                                                            std::vector<int64_t> stages, std::vector<double> scales) {
  check_training_dtype(x);
  const DeviceGuard guard(x.get_device_index());
  const StackTensors tensors{x, context, weights, biases, context_weights, context_biases, visible, orders, {}, activations, wiring, stages, scales};
  const auto run = [&]<class T>(T) {
    CudaLaunch<T> launch(tensors.x);
    return training_forward<T>(tensors, launch);
  };
  return x.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

Tensors autoregressive_backward(Tensor dy, Tensor dlogabsdet, Tensors kept, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                Tensors context_weights, Tensors context_biases, Tensors visible, Tensors orders,
                                std::vector<int64_t> activations, std::vector<int64_t> wiring, std::vector<int64_t> stages,
                                std::vector<double> scales, std::vector<int64_t> learned, bool need_dx, bool need_dcontext,
                                bool need_parameters) {
  check_training_dtype(dy);
  const DeviceGuard guard(dy.get_device_index());
  const StackTensors tensors{dy, context, weights, biases, context_weights, context_biases, visible, orders, {}, activations, wiring, stages, scales};
  const auto run = [&]<class T>(T) {
    CudaLaunch<T> launch(tensors.x);
    return training_backward<T>(tensors, dlogabsdet, kept, learned, need_dx, need_dcontext, need_parameters, most_delta_bytes(), launch);
  };
  return dy.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

Tensors autoregressive_inverse_backward(Tensor dx, Tensor dlogabsdet, Tensor x, std::optional<Tensor> context, Tensors weights, Tensors biases,
                                        Tensors context_weights, Tensors context_biases, Tensors visible, std::optional<Tensor> order,
                                        std::vector<int64_t> activations, std::vector<int64_t> wiring, int64_t scale_kind, double scale_p0,
                                        double scale_p1, int64_t form) {
  check_training_dtype(x);
  const DeviceGuard guard(x.get_device_index());
  const LoopTensors tensors{x,     context,     weights, biases,
                            context_weights, context_biases, visible, order,
                            activations,     wiring,         {static_cast<int>(scale_kind), scale_p0, scale_p1},
                            static_cast<int>(form), false};
  const auto run = [&]<class T>(T) {
    CudaLaunch<T> launch(tensors.x);
    return inverse_backward<T>(tensors, dx, dlogabsdet, launch, [&](LoopArgs<T>& args) { run_loop<T, true>(args, tensors.x); });
  };
  return x.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CUDA, m) {
  m.impl("_autoregressive_training", TORCH_BOX(&flowkernels::autoregressive_training));
  m.impl("_autoregressive_backward", TORCH_BOX(&flowkernels::autoregressive_backward));
  m.impl("autoregressive_inverse_backward", TORCH_BOX(&flowkernels::autoregressive_inverse_backward));
}
