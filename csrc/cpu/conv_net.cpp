// Glow's conditioner for CPU tensors: arguments, bands, threads, registration. The arithmetic is in conv_net_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>

#include "cpu/conv_net.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/conv_net_targets.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::conv_net: ", what); }

// Python has checked what users get wrong; here only what would corrupt memory. weight: [outputs, inputs, taps, taps], channels last
template <class T>
Convolution<T> convolution(const Tensor& weight, const Tensor& bias, int64_t taps, int64_t inputs, ScalarType dtype) {
  check(weight.dim() == 4 && weight.size(1) == inputs && weight.size(2) == taps && weight.size(3) == taps, "weights do not fit");
  const int64_t strides[4] = {taps * taps * inputs, 1, taps * inputs, inputs};
  for (int d = 0; d < 4; ++d) check(weight.size(d) <= 1 || weight.stride(d) == strides[d], "weights must lie channels last");
  check(bias.dim() == 1 && bias.size(0) == weight.size(0) && bias.is_contiguous(), "a bias does not fit its weight");
  for (const Tensor* t : {&weight, &bias}) check(t->is_cpu() && t->scalar_type() == dtype, "tensors must be like x");
  return {static_cast<const T*>(weight.const_data_ptr()), static_cast<const T*>(bias.const_data_ptr()), taps, inputs, weight.size(0), nullptr};
}

// Rows of a band: an image, or what fits the second-level cache, or less where there are fewer images than threads
template <class T>
int64_t rows_of(const ConvNetArgs<T>& args, int64_t threads) {
  constexpr int64_t kBytes = 1 << 20;
  const int64_t row = (args.width + 1) * (args.in.inputs + args.mid.outputs) * static_cast<int64_t>(sizeof(T));
  const int64_t fits = std::max<int64_t>(kBytes / row - 2, 1);
  const int64_t bands = std::max((args.height + fits - 1) / fits, (threads + args.batch - 1) / args.batch);
  return (args.height + bands - 1) / bands;
}

template <class T>
Tensor run(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_mid, const Tensor& bias_mid, const Tensor& weight_out,
           const Tensor& bias_out, const Tensor& log_gain) {
  check(x.dim() == 4 && x.is_cpu() && x.is_contiguous(), "x must be [batch, height, width, channels], contiguous");
  ConvNetArgs<T> args{};
  args.batch = x.size(0), args.height = x.size(1), args.width = x.size(2);
  args.in = convolution<T>(weight_in, bias_in, 3, x.size(3), x.scalar_type());
  args.mid = convolution<T>(weight_mid, bias_mid, 1, args.in.outputs, x.scalar_type());
  args.out = convolution<T>(weight_out, bias_out, 3, args.mid.outputs, x.scalar_type());
  check(log_gain.dim() == 1 && log_gain.size(0) == args.out.outputs && log_gain.is_contiguous() && log_gain.is_cpu() &&
            log_gain.scalar_type() == x.scalar_type(),
        "log_gain does not fit");
  Tensor y = empty(x, {args.batch, args.height, args.width, args.out.outputs});
  if (y.numel() == 0) return y;
  check(x.size(3) > 0 && args.in.outputs > 0 && args.mid.outputs > 0, "there must be channels");
  args.x = static_cast<const T*>(x.const_data_ptr());
  args.log_gain = static_cast<const T*>(log_gain.const_data_ptr());
  args.y = static_cast<T*>(y.mutable_data_ptr());

  size_t bytes[4], all = 0;
  Convolution<T>* const convolutions[] = {&args.in, &args.mid, &args.out};
  for (int i = 0; i < 3; ++i) all += bytes[i] = FK_DISPATCH(packed_convolution_bytes<T>(*convolutions[i]));
  all += bytes[3] = FK_DISPATCH(whole_vectors<T>(args.out.outputs)) * sizeof(T);
  const std::unique_ptr<char[]> packed(new char[all]);
  char* next = packed.get();
  for (int i = 0; i < 3; next += bytes[i++]) {
    convolutions[i]->packed = reinterpret_cast<T*>(next);
    FK_DISPATCH(pack_convolution<T>(*convolutions[i]));
  }
  args.gain = reinterpret_cast<T*>(next);
  FK_DISPATCH(conv_net_gain<T>(args.log_gain, args.out.outputs, args.gain));

  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  args.rows = rows_of(args, threads);
  const int64_t bands = args.bands(), tasks = args.batch * bands;
  const size_t scratch = FK_DISPATCH(conv_net_scratch_bytes<T>(args));
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      FK_DISPATCH(conv_net_band<T>(args, i / bands, i % bands * args.rows, static_cast<T*>(thread_scratch(scratch))));
  };
  if (tasks > 1 && threads > 1)
    torch::stable::parallel_for(0, tasks, 1, some);
  else
    some(0, tasks);
  return y;
}

Tensor conv_net(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_mid, const Tensor& bias_mid,
                const Tensor& weight_out, const Tensor& bias_out, const Tensor& log_gain) {
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  const auto go = x.scalar_type() == ScalarType::Float ? run<float> : run<double>;
  return go(x, weight_in, bias_in, weight_mid, bias_mid, weight_out, bias_out, log_gain);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("conv_net", TORCH_BOX(&flowkernels::conv_net));
}
