// The gradient of the fused sequential inverse for CUDA tensors: dz, and the deltas of every layer, of which
// flowkernels/ops/autoregressive/solve.py makes the gradients of the parameters. One launch of the mirrored loop.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/autoregressive_loop.cuh"

namespace flowkernels {
namespace {

template <class T>
std::tuple<Tensor, Tensor> launch(const SolveTensors& tensors) {
  const Tensor& x = tensors.x;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  LoopNetwork<T> network(tensors);
  LoopArgs<T>& args = network.args;
  std::vector<int64_t> size{args.batch, args.features};
  Tensor dz = torch::stable::new_empty(x, size);
  size[1] = args.columns;
  Tensor deltas = torch::stable::new_empty(x, size);
  if (args.batch == 0) return {dz, deltas};
  args.y = static_cast<T*>(dz.mutable_data_ptr());
  args.deltas = static_cast<T*>(deltas.mutable_data_ptr());
  run_loop<T, true>(args, x);
  return {dz, deltas};
}

std::tuple<Tensor, Tensor> autoregressive_solve(Tensor dx, Tensor dlogabsdet, Tensor x, Tensor made, std::vector<Tensor> weights,
                                                std::vector<Tensor> visible, std::optional<Tensor> order, std::vector<int64_t> activations,
                                                int64_t scale_kind, double scale_p0, double scale_p1, int64_t form) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "flowkernels::autoregressive: x must be float32 or float64");
  const SolveTensors tensors{dx,          dlogabsdet, x, made, weights, visible, order, activations, {static_cast<int>(scale_kind), scale_p0, scale_p1},
                             static_cast<int>(form)};
  return x.scalar_type() == ScalarType::Float ? launch<float>(tensors) : launch<double>(tensors);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CUDA, m) { m.impl("_autoregressive_solve", TORCH_BOX(&flowkernels::autoregressive_solve)); }
