// Glow's conditioner for CPU tensors: arguments, bands, threads, registration. The arithmetic is in conv_net_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/conv_net.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/conv_net_targets.h"
#include "cpu/for_each_target.h"

#include "cpu/conv_net_calls.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const char* what) { check_conv_net(ok, what); }

// y; and the hidden layers if `keep`, else two empty tensors
template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, std::span<const Tensor, 6> parameters, const Tensor& log_gain, bool keep) {
  check(x.dim() == 4, "x must have four dimensions");
  ConvNetArgs<T> args = network<T>(parameters, x.size(3));
  set_images(args, x);
  const T* gains = checked_data<T>("conv_net", log_gain, {args.out.outputs});
  const auto images = [&](int64_t batch, int64_t channels) { return empty(x, {batch, args.height, args.width, channels}); };
  Tensor y = images(args.batch, args.out.outputs);
  Tensor first = images(keep ? args.batch : 0, args.mid.inputs), second = images(keep ? args.batch : 0, args.out.inputs);
  if (y.numel() == 0) return {y, first, second};
  check(x.size(3) > 0 && args.in.outputs > 0 && args.mid.outputs > 0, "there must be channels");
  args.x = data_of<T>(x);
  args.y = static_cast<T*>(y.mutable_data_ptr());
  if (keep) args.first = static_cast<T*>(first.mutable_data_ptr()), args.second = static_cast<T*>(second.mutable_data_ptr());
  const Packing<T> packing(args, false, args.out.outputs);
  const int64_t threads = threads_of(args, {args.in, args.mid, args.out});
  const size_t scratch = plan_bands(args, threads);
  in_shares(args.tasks(), threads, [&](int64_t first, int64_t last) {
    T* const room = static_cast<T*>(thread_scratch(scratch + packing.bytes()));
    ConvNetArgs<T> own = args;
    packing.pack(own, gains, room + scratch / sizeof(T));
    for (int64_t task = first; task < last; ++task) FK_DISPATCH(conv_net_band<T>(own, task, room));
  });
  return {y, first, second};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients by x and, if `parameters`, by all of them, else empty tensors
template <class T>
Gradients backward(const Tensor& dy, const Tensor& x, const Tensor& first, const Tensor& second, const Tensor& weight_in,
                   const Tensor& weight_mid, const Tensor& weight_out, const Tensor& bias_out, const Tensor& log_gain, bool parameters) {
  // parts of the sums, whatever the threads, on which no sum may depend: few where each has many weights to clear and to add
  constexpr int64_t kLeastParts = 4, kMostParts = 16, kBytes = 1 << 20;
  constexpr int64_t kLeastTasks = 2;  // a single image in two bands; a band makes two rows of the hidden layers' gradients more than its own
  ConvNetGradientArgs<T> args{};
  set_images(args, x);
  const Convolution<T> in = convolution<T>(weight_in, 3, x.size(3)), mid = convolution<T>(weight_mid, 1, in.outputs);
  const Convolution<T> out = convolution<T>(weight_out, 3, mid.outputs);
  const auto reversed = [](const Convolution<T>& c) { return Convolution<T>{c.weight, nullptr, c.taps, c.outputs, c.inputs, nullptr}; };
  args.in = reversed(in), args.mid = reversed(mid), args.out = reversed(out);
  const T* bias = checked_data<T>("conv_net", bias_out, {out.outputs});
  const T* gains = checked_data<T>("conv_net", log_gain, {out.outputs});
  args.x = data_of<T>(x);
  args.dy = checked_data<T>("conv_net", dy, {args.batch, args.height, args.width, out.outputs});
  args.first = checked_data<T>("conv_net", first, {args.batch, args.height, args.width, in.outputs});
  args.second = checked_data<T>("conv_net", second, {args.batch, args.height, args.width, mid.outputs});
  check(in.inputs > 0 && in.outputs > 0 && mid.outputs > 0 && out.outputs > 0, "there must be channels");

  Tensor dx = empty(x, {args.batch, args.height, args.width, in.inputs});
  args.dx = static_cast<T*>(dx.mutable_data_ptr());
  const auto made = [&](std::vector<int64_t> sizes) { return empty(x, parameters ? sizes : std::vector<int64_t>{0}); };
  const auto like = [&](const Convolution<T>& c) { return made({c.outputs, c.inputs, c.taps, c.taps}); };
  Tensor dweight_in = like(in), dweight_mid = like(mid), dweight_out = like(out);
  Tensor dbias_in = made({in.outputs}), dbias_mid = made({mid.outputs}), dbias_out = made({out.outputs}), dlog_gain = made({out.outputs});

  const auto at = args.places();
  // rows of dy and both hidden layers, with their gradients, and the factors of dy, x and one hidden layer, twice as many each
  const int64_t channels = 3 * out.outputs + 2 * in.inputs + 2 * (in.outputs + mid.outputs + std::max(in.outputs, mid.outputs));
  args.rows = dx.numel() == 0 ? 1 : rows_of(args, channels, kLeastTasks);
  const int64_t tasks = dx.numel() == 0 ? 0 : args.tasks();
  const int64_t most = std::clamp(kBytes / (at.end * static_cast<int64_t>(sizeof(T))), kLeastParts, kMostParts);
  const int64_t parts = parameters ? std::clamp<int64_t>(tasks, 1, most) : tasks;  // one without tasks where there are no pixels
  const std::unique_ptr<T[]> sums(parameters ? new T[parts * at.end + 64] : nullptr);  // 64: turned in whole vectors
  args.sums = sums.get();
  const Packing<T> packing(args, true, out.outputs);
  const size_t scratch = (FK_DISPATCH(conv_net_gradient_scratch_bytes<T>(args)) + 63) / 64 * 64;
  const int64_t threads = threads_of(args, {in, mid, out});
  in_shares(parts, threads, [&](int64_t first, int64_t last) {
    T* const room = static_cast<T*>(thread_scratch(scratch + packing.bytes()));
    ConvNetGradientArgs<T> own = args;
    packing.pack(own, gains, room + scratch / sizeof(T));
    for (int64_t part = first; part < last; ++part) {
      T* const sums = args.sums ? args.sums + part * at.end : nullptr;
      if (sums) std::fill(sums, sums + at.end, T(0));
      for (int64_t task = part * tasks / parts; task < (part + 1) * tasks / parts; ++task)
        FK_DISPATCH(conv_net_gradient_band<T>(own, task, sums, room));
    }
  });

  if (!parameters) return {dx, dweight_in, dbias_in, dweight_mid, dbias_mid, dweight_out, dbias_out, dlog_gain};

  // all of them in the place of the first part, by stretches; then each where it belongs
  constexpr int64_t kStretch = 4096;
  for_each_task((at.end + kStretch - 1) / kStretch, threads, [&](int64_t i) {
    T* own = args.sums + i * kStretch;
    FK_DISPATCH(add_conv_net_parts<T>(own, parts, at.end, std::min(kStretch, at.end - i * kStretch)));
  });
  const auto to = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
  const auto copy = [&](int64_t place, int64_t n, Tensor& t) { std::copy_n(args.sums + place, n, to(t)); };
  std::vector<int64_t> place(in.terms());
  FK_DISPATCH(find_terms<T>(in, place.data()));
  FK_DISPATCH(turn_first_weight<T>(args.sums + at.weight_in, in.inputs, in.outputs, place.data(), to(dweight_in)));
  copy(at.weight_mid, mid.terms() * mid.outputs, dweight_mid);
  FK_DISPATCH(turn_last_weight<T>(args.sums + at.weight_out, out.outputs, out.inputs, to(dweight_out)));
  copy(at.bias_in, in.outputs, dbias_in);
  copy(at.bias_mid, mid.outputs, dbias_mid);
  copy(at.bias_out, out.outputs, dbias_out);
  FK_DISPATCH(log_gain_gradient<T>(to(dweight_out), out.weight, to(dbias_out), bias, out.outputs, out.terms(), to(dlog_gain)));
  return {dx, dweight_in, dbias_in, dweight_mid, dbias_mid, dweight_out, dbias_out, dlog_gain};
}

bool is_double(const Tensor& x) {
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  return x.scalar_type() == ScalarType::Double;
}

Tensor conv_net(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_mid, const Tensor& bias_mid,
                const Tensor& weight_out, const Tensor& bias_out, const Tensor& log_gain) {
  const Tensor parameters[] = {weight_in, bias_in, weight_mid, bias_mid, weight_out, bias_out};
  return std::get<0>(is_double(x) ? forward<double>(x, parameters, log_gain, false) : forward<float>(x, parameters, log_gain, false));
}

std::tuple<Tensor, Tensor, Tensor> conv_net_training(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_mid,
                                                     const Tensor& bias_mid, const Tensor& weight_out, const Tensor& bias_out,
                                                     const Tensor& log_gain) {
  const Tensor parameters[] = {weight_in, bias_in, weight_mid, bias_mid, weight_out, bias_out};
  return is_double(x) ? forward<double>(x, parameters, log_gain, true) : forward<float>(x, parameters, log_gain, true);
}

Gradients conv_net_backward(const Tensor& dy, const Tensor& x, const Tensor& first, const Tensor& second, const Tensor& weight_in,
                            const Tensor& weight_mid, const Tensor& weight_out, const Tensor& bias_out, const Tensor& log_gain,
                            bool parameters) {
  const auto go = is_double(x) ? backward<double> : backward<float>;
  return go(dy, x, first, second, weight_in, weight_mid, weight_out, bias_out, log_gain, parameters);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("conv_net", TORCH_BOX(&flowkernels::conv_net));
  m.impl("conv_net_training", TORCH_BOX(&flowkernels::conv_net_training));
  m.impl("conv_net_backward", TORCH_BOX(&flowkernels::conv_net_backward));
}
