// Normalisation of channels by their own statistics, for CPU tensors: channel_affine, the sums before it and the gradient through them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>

#include "cpu/channel_affine.h"
#include "cpu/channel_normalize.h"
#include "cpu/elementwise.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/channel_normalize_kernel.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::channel_normalize: ", what); }

// t without gaps in the layout that results like x have, in what is computed in; t itself where it is so
template <class T>
Tensor dense(const Tensor& t, const Tensor& x) {
  Tensor to = empty_in_layout_of(x, compute_type<T>);
  bool same = t.scalar_type() == compute_type<T>;
  for (int64_t d = 0; d < x.dim(); ++d) same = same && (x.size(d) <= 1 || t.stride(d) == to.stride(d));
  return same ? t : torch::stable::copy_(to, t);
}

Tensor in_dtype_of(const Tensor& like, const Tensor& t) {
  if (t.scalar_type() == like.scalar_type()) return t;
  Tensor to = empty_in_layout_of(like);
  return torch::stable::copy_(to, t);
}

struct Sizes {
  int64_t batch, channels, sites;
  bool rows;  // channels lie side by side

  explicit Sizes(const Tensor& x) : batch(x.size(0)), channels(x.size(1)), sites(sites_of(x)), rows(sites == 1 || is_channels_last(x)) {}
  int64_t elements() const { return batch * channels * sites; }
};

// means over each channel, of x or, given the mean, of (x - mean)^2
template <class T>
void means(const Tensor& x, const Sizes& n, const T* mean, T* result) {
  const int64_t samples = std::max<int64_t>(1, 1024 / n.sites);
  ChannelSums<T> sums{data_of<T>(x), mean, nullptr, n.batch, n.channels, n.sites, samples, n.rows};
  const int64_t parts = sums.n_parts();
  const std::unique_ptr<double[]> of_parts(new double[parts * n.channels]);
  sums.parts = of_parts.get();
  in_parallel(sums.units(), n.elements(), [&](int64_t first, int64_t last) {
    auto* lanes = static_cast<double*>(n.rows ? thread_scratch(16 * n.channels * sizeof(double)) : nullptr);
    FK_DISPATCH(channel_sums<T>(sums, lanes, first, last));
  });
  for (int64_t c = 0; c < n.channels; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += of_parts[i * n.channels + c];
    result[c] = static_cast<T>(sum / static_cast<double>(n.batch * n.sites));
  }
}

template <class T>
const T* channel_values(const Tensor& t, int64_t channels) {
  check(t.is_cpu() && t.dim() == 1 && t.size(0) == channels && t.scalar_type() == compute_type<T> && t.is_contiguous(),
        "log_gain, bias, variance or mean does not fit x");
  return data_of<T>(t);
}

template <class T>
T* values(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// -mean, and log_gain - 1/2 log(variance + eps)
template <class T>
std::tuple<Tensor, Tensor> shift_and_log_scale(const T* mean, const T* variance, const std::optional<Tensor>& log_gain, double eps,
                                               int64_t channels) {
  Tensor shift = empty_vector(channels, compute_type<T>), log_scale = empty_vector(channels, compute_type<T>);
  const T* gain = log_gain ? channel_values<T>(*log_gain, channels) : nullptr;
  for (int64_t c = 0; c < channels; ++c) {
    values<T>(shift)[c] = -mean[c];
    values<T>(log_scale)[c] = (gain == nullptr ? T(0) : gain[c]) + T(-0.5) * std::log(variance[c] + static_cast<T>(eps));
  }
  return {shift, log_scale};
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) { return t ? std::optional<Tensor>(made_contiguous(*t)) : t; }

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& given, const std::optional<Tensor>& log_gain,
                                                   const std::optional<Tensor>& bias, double eps) {
  const Tensor x = dense<T>(given, given);
  const Sizes n(x);
  Tensor variance = empty_vector(n.channels, compute_type<T>), mean = empty_vector(n.channels, compute_type<T>);
  means<T>(x, n, nullptr, values<T>(mean));
  means<T>(x, n, values<T>(mean), values<T>(variance));
  const auto [shift, log_scale] = shift_and_log_scale<T>(values<T>(mean), values<T>(variance), contiguous(log_gain), eps, n.channels);
  auto [z, logabsdet] = channel_affine(x, shift, log_scale, bias, false);
  return {in_dtype_of(given, z), logabsdet, variance, mean};
}

// With n numbers in a channel: dm = -dshift, dv = -dlog_scale / (2 (v + eps)), and to x, besides the gradient at fixed m and v,
// dm / n + dv 2 (x - m) / n, whose first part is -dshift / n as shift = -m has the gradient dshift.
template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& given_dz, const Tensor& dlogabsdet, const Tensor& given_x,
                                            const std::optional<Tensor>& log_gain, const Tensor& variance_, const Tensor& mean_,
                                            double eps) {
  const Tensor x = dense<T>(given_x, given_x), dz = dense<T>(given_dz, given_x);
  const Tensor variance = made_contiguous(variance_), mean = made_contiguous(mean_);
  const Sizes n(x);
  const T *m = channel_values<T>(mean, n.channels), *v = channel_values<T>(variance, n.channels);
  const auto [shift, log_scale] = shift_and_log_scale<T>(m, v, contiguous(log_gain), eps, n.channels);
  auto [dx, dshift, dlog_scale, dbias] = channel_affine_backward(dz, dlogabsdet, x, shift, log_scale, std::nullopt, false, false);
  const std::unique_ptr<T[]> slope(new T[2 * n.channels]);
  T* offset = slope.get() + n.channels;
  const T count = static_cast<T>(n.batch * n.sites);
  for (int64_t c = 0; c < n.channels; ++c) {
    slope[c] = values<T>(dlog_scale)[c] / (v[c] + static_cast<T>(eps)) / -count;
    offset[c] = values<T>(dshift)[c] / -count;
  }
  const StatisticsGradient<T> to_x{data_of<T>(x), values<T>(dx), m, slope.get(), offset, n.channels,
                                   n.rows ? 1 : n.sites};
  in_parallel(n.batch * n.sites / to_x.run, n.elements(), [&](int64_t first, int64_t last) {
    FK_DISPATCH(add_statistics_gradient<T>(to_x, first, last));
  });
  return {in_dtype_of(given_x, dx), dlog_scale, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_normalize(const Tensor& x, std::optional<Tensor> log_gain, std::optional<Tensor> bias,
                                                             double eps) {
  check(x.dim() >= 2 && x.dim() <= kMaxDims && x.numel() > 0, "x must have at least a batch and channels, and be of some size");
  return x.scalar_type() == ScalarType::Double ? forward<double>(x, log_gain, bias, eps) : forward<float>(x, log_gain, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> channel_normalize_backward(const Tensor& dz, const Tensor& dlogabsdet, const Tensor& x,
                                                              std::optional<Tensor> log_gain, const Tensor& variance, const Tensor& mean,
                                                              double eps) {
  check(x.dim() >= 2 && x.dim() <= kMaxDims && x.numel() > 0, "x must have at least a batch and channels, and be of some size");
  check(dz.is_cpu() && dz.dim() == x.dim(), "dz does not fit x");
  for (int64_t d = 0; d < x.dim(); ++d) check(dz.size(d) == x.size(d), "dz does not fit x");
  if (x.scalar_type() == ScalarType::Double) return backward<double>(dz, dlogabsdet, x, log_gain, variance, mean, eps);
  return backward<float>(dz, dlogabsdet, x, log_gain, variance, mean, eps);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("channel_normalize", TORCH_BOX(&flowkernels::channel_normalize));
  m.impl("channel_normalize_backward", TORCH_BOX(&flowkernels::channel_normalize_backward));
}
