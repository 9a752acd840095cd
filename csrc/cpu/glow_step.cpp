// The joined Glow step for CPU tensors: arguments, threads, registration. The arithmetic is in glow_step_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/elementwise.h"
#include "cpu/glow_step.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/glow_step_kernel.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::glow_step: ", what); }

// Python has checked what users get wrong; here only what would corrupt memory.
void check_like(const Tensor& t, const Tensor& x, int64_t channels) {
  check(t.is_cpu() && t.is_contiguous() && t.scalar_type() == x.scalar_type() && t.dim() == x.dim(), "tensors must be alike and contiguous");
  for (int64_t d = 0; d < x.dim(); ++d) check(t.size(d) == (d + 1 == x.dim() ? channels : x.size(d)), "tensors must have fitting sizes");
}

struct Inputs {
  const Tensor& x;
  const std::optional<Tensor>&raw, &weight, &bias;
};

template <class T>
GlowStepArgs<T> describe(const Inputs& in, bool inverse) {
  const Tensor& x = in.x;
  const int64_t dims = x.dim();
  check(dims >= 2 && x.size(dims - 1) >= 2 && x.size(dims - 1) % 2 == 0, "x must be [batch, *sites, channels] with an even number of channels");
  GlowStepArgs<T> args{};
  args.batch = x.size(0);
  args.channels = x.size(dims - 1);
  args.sites = 1;
  for (int64_t d = 1; d < dims - 1; ++d) args.sites *= x.size(d);
  args.inverse = inverse;
  args.channels_first = !x.is_contiguous();
  check(x.is_cpu() && (x.is_contiguous() || channels_lie_first(x)), "x must be contiguous, channels first or last");
  args.x = data_of<T>(x);
  if (in.raw) {
    check_like(*in.raw, x, args.channels);
    args.raw = data_of<T>(*in.raw);
  }
  check(in.weight.has_value() == in.bias.has_value(), "weight and bias come together");
  if (in.weight) {
    for (const Tensor* t : {&*in.weight, &*in.bias}) {
      check(t->is_cpu() && t->is_contiguous() && t->scalar_type() == x.scalar_type(), "weight or bias is not like x");
    }
    check(in.weight->dim() == 2 && in.weight->size(0) == args.channels && in.weight->size(1) == args.channels, "weight does not fit x");
    check(in.bias->dim() == 1 && in.bias->size(0) == args.channels, "bias does not fit x");
    args.weight = data_of<T>(*in.weight);
    args.bias = data_of<T>(*in.bias);
  }
  return args;
}

template <class T>
void run(const GlowStepArgs<T>& args, bool backward) {
  const size_t bytes = FK_DISPATCH(glow_step_scratch<T>(args.channels, backward));
  const int64_t units = backward ? args.parts() : args.tiles();
  // an element is worth two of an elementwise map, and one more for each sixteen of its products
  const int64_t worth = 2 + (args.weight ? args.channels / 16 : 0);
  in_parallel(units, args.batch * args.sites * args.channels * worth, [&](int64_t first, int64_t last) {
    FK_DISPATCH(run_glow_step<T>(args, thread_scratch(bytes), backward, first, last));
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Inputs& in, bool inverse, bool passes) {
  GlowStepArgs<T> args = describe<T>(in, inverse);
  const Tensor& x = in.x;
  std::vector<int64_t> sizes = sizes_of(x);
  Tensor y = empty(x, sizes), logabsdet = empty(x, {args.batch});
  sizes.back() = args.channels / 2;
  Tensor passing = empty(x, sizes);  // made in any case: a kernel that asks takes 2 percent longer
  if (args.batch == 0) return {y, logabsdet, passes ? passing : empty(x, {0})};
  args.y = static_cast<T*>(y.mutable_data_ptr());
  args.passing = static_cast<T*>(passing.mutable_data_ptr());
  const std::unique_ptr<T[]> logs(new T[args.tiles()]);
  args.tile_logs = logs.get();
  run(args, false);
  T* total = static_cast<T*>(logabsdet.mutable_data_ptr());
  const int64_t each = args.tiles_of_sample();
  for (int64_t b = 0; b < args.batch; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < each; ++i) sum += logs[b * each + i];
    total[b] = static_cast<T>(sum);
  }
  return {y, logabsdet, passes ? passing : empty(x, {0})};
}

// to[i] = the sum over parts of from[part][i]
template <class T>
void add_parts(const T* from, int64_t parts, int64_t n, T* to) {
  std::vector<double> sums(n, 0.0);
  for (int64_t p = 0; p < parts; ++p) {
    for (int64_t i = 0; i < n; ++i) sums[i] += from[p * n + i];
  }
  std::copy(sums.begin(), sums.end(), to);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& dlogabsdet, const std::optional<Tensor>& dpassing,
                                                    const Inputs& in, bool inverse) {
  GlowStepArgs<T> args = describe<T>(in, inverse);
  const Tensor& x = in.x;
  check_like(dy, x, args.channels);
  check(dlogabsdet.is_cpu() && dlogabsdet.is_contiguous() && dlogabsdet.scalar_type() == x.scalar_type() && dlogabsdet.dim() == 1 &&
            dlogabsdet.size(0) == args.batch,
        "dlogabsdet does not fit x");
  if (dpassing) check_like(*dpassing, x, args.channels / 2);
  const std::vector<int64_t> sizes = sizes_of(x);
  const int64_t channels = in.weight ? args.channels : 0;  // not args.weight: tensors without elements have no data
  Tensor dx = empty(x, sizes), draw = empty(x, in.raw ? sizes : std::vector<int64_t>{0});
  Tensor dweight = empty(x, {channels, channels}), dbias = empty(x, {channels});
  args.dy = data_of<T>(dy);
  args.dlogabsdet = data_of<T>(dlogabsdet);
  args.dpassing = dpassing ? data_of<T>(*dpassing) : nullptr;
  args.dx = static_cast<T*>(dx.mutable_data_ptr());
  args.draw = static_cast<T*>(draw.mutable_data_ptr());
  const int64_t parts = args.parts(), size = channels * channels;
  const std::unique_ptr<T[]> sums(new T[parts * (size + channels) + 1]);
  args.part_dweight = sums.get();
  args.part_dbias = sums.get() + parts * size;
  if (parts > 0) run(args, true);
  add_parts(args.part_dweight, parts, size, static_cast<T*>(dweight.mutable_data_ptr()));
  add_parts(args.part_dbias, parts, channels, static_cast<T*>(dbias.mutable_data_ptr()));
  return {dx, draw, dweight, dbias};
}

using Maybe = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> glow_step(const Tensor& x, Maybe raw, Maybe weight, Maybe bias, bool inverse, bool passes) {
  const Inputs in{x, raw, weight, bias};
  if (x.scalar_type() == ScalarType::Double) return forward<double>(in, inverse, passes);
  check(x.scalar_type() == ScalarType::Float, "x must be float32 or float64");
  return forward<float>(in, inverse, passes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> glow_step_backward(const Tensor& dy, const Tensor& dlogabsdet, Maybe dpassing, const Tensor& x,
                                                              Maybe raw, Maybe weight, Maybe bias, bool inverse) {
  const Inputs in{x, raw, weight, bias};
  if (x.scalar_type() == ScalarType::Double) return backward<double>(dy, dlogabsdet, dpassing, in, inverse);
  check(x.scalar_type() == ScalarType::Float, "x must be float32 or float64");
  return backward<float>(dy, dlogabsdet, dpassing, in, inverse);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("glow_step", TORCH_BOX(&flowkernels::glow_step));
  m.impl("glow_step_backward", TORCH_BOX(&flowkernels::glow_step_backward));
}
