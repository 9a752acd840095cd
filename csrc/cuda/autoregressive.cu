// The fused sequential loop for CUDA tensors, inverse and forward.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/autoregressive_loop.cuh"

namespace flowkernels {
namespace {

template <class T>
std::tuple<Tensor, Tensor> launch(const LoopTensors& tensors) {
  const Tensor& x = tensors.x;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  LoopNetwork<T> network(tensors);
  LoopArgs<T>& args = network.args;
  std::vector<int64_t> size{args.batch, args.features};
  Tensor y = torch::stable::new_empty(x, size);
  size.pop_back();
  Tensor logabsdet = torch::stable::new_empty(x, size);
  if (args.batch == 0) return {y, logabsdet};
  args.y = static_cast<T*>(y.mutable_data_ptr());
  args.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  run_loop<T, false>(args, x);
  return {y, logabsdet};
}

std::tuple<Tensor, Tensor> autoregressive(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                          std::vector<Tensor> context_weights, std::vector<Tensor> context_biases,
                                          std::vector<Tensor> visible, std::optional<Tensor> order, std::vector<int64_t> activations,
                                          std::vector<int64_t> wiring, int64_t scale_kind, double scale_p0, double scale_p1, int64_t form,
                                          bool inverse) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "flowkernels::autoregressive: x must be float32 or float64");
  const LoopTensors tensors{x,     context,     weights, biases,
                            context_weights, context_biases, visible, order,
                            activations,     wiring,         {static_cast<int>(scale_kind), scale_p0, scale_p1},
                            static_cast<int>(form), inverse};
  return x.scalar_type() == ScalarType::Float ? launch<float>(tensors) : launch<double>(tensors);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CUDA, m) { m.impl("autoregressive", TORCH_BOX(&flowkernels::autoregressive)); }
