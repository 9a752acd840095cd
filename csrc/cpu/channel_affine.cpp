// The per-channel affine map for CPU tensors: arguments, threads, registration.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>

#include "cpu/channel_affine.h"
#include "cpu/elementwise.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"
#include "cpu/tile_map.h"

#define FK_KERNEL "cpu/channel_affine_kernel.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostParameters = 4096;  // elements of each parameter repeated for a plain pass

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::channel_affine: ", what); }

// before, scale and after, [3, channels], of y = (x + before) * scale + after
template <class E>
class Parameters {
  using T = compute_t<E>;

 public:
  Parameters(const std::optional<Tensor>& shift, const Tensor& log_scale, const std::optional<Tensor>& bias, bool inverse, int64_t channels)
      : values_(new T[3 * channels]), channels_(channels) {
    read(inverse ? bias : shift, inverse ? T(-1) : T(1), before());
    read(inverse ? shift : bias, inverse ? T(-1) : T(1), after());
    fits(log_scale);
    const T* from = data_of<T>(log_scale);
    FK_DISPATCH(exp_of(from, log_scale.stride(0), inverse ? T(-1) : T(1), channels_, scale()));
    double sum = 0;
    for (int64_t c = 0; c < channels_; ++c) sum += from[c * log_scale.stride(0)];
    log_det_ = inverse ? -sum : sum;
  }

  T* before() const { return values_.get(); }
  T* scale() const { return values_.get() + channels_; }
  T* after() const { return values_.get() + 2 * channels_; }
  double log_det() const { return log_det_; }  // of one site

  // the three for `length` elements, of which `run` side by side are of one channel, [3, length]
  std::unique_ptr<T[]> repeated(int64_t length, int64_t run) const {
    std::unique_ptr<T[]> result(new T[3 * length]);
    for (int64_t i = 0; i < length; ++i)
      for (int64_t p = 0; p < 3; ++p) result[p * length + i] = values_[p * channels_ + i / run % channels_];
    return result;
  }

 private:
  void fits(const Tensor& t) const {
    check(t.is_cpu() && t.dim() == 1 && t.size(0) == channels_ && t.scalar_type() == compute_type<E>, "shift, log_scale or bias does not fit x");
  }

  void read(const std::optional<Tensor>& t, T sign, T* to) const {
    if (!t) return std::fill(to, to + channels_, T(0));
    fits(*t);
    const T* from = data_of<T>(*t);
    for (int64_t c = 0; c < channels_; ++c) to[c] = sign * from[c * t->stride(0)];
  }

  std::unique_ptr<T[]> values_;
  int64_t channels_;
  double log_det_;
};

template <class E>
Elementwise<E> describe(const Tensor& x, const Parameters<E>& parameters, const Tensor* const* in, int n_inputs, const Tensor& out) {
  Elementwise<E> args{};
  args.batch = x.size(0);
  args.channels = args.transformed = x.size(1);
  args.along = Along::channels;
  args.phase = 1;
  const Tensor* outputs[] = {&out};
  set_views(args, in, n_inputs, n_inputs, outputs, 1);
  args.n_parameters = 3;
  const compute_t<E>* values[] = {parameters.before(), parameters.scale(), parameters.after()};
  for (int i = 0; i < 3; ++i) args.parameter[i] = values[i], args.parameter_stride[i] = 1;
  return args;
}

template <class E>
void run(const Elementwise<E>& args, bool backward, bool from_output) {
  using T = compute_t<E>;
  run_elementwise<E>(args, {FK_DISPATCH(choose_tile<T>(backward)), &from_output});
}

// The map on x without gaps as one plain pass over lines: of one channel where its sites are many, of whole rows of channels (and
// sites) where they are few. Returns false where a walk is needed. The bits are the walk's.
template <class E>
bool forward_on_lines(const Tensor& x, const Parameters<E>& parameters, int64_t sites, const Tensor& y) {
  using T = compute_t<E>;
  if constexpr (!std::is_same_v<E, T>) return false;
  constexpr int64_t kRowsLine = 512;  // elements of a line of rows, about
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) > 1 && x.stride(d) != y.stride(d)) return false;
  const int64_t channels = x.size(1), elements = x.numel(), run = is_channels_last(x) ? 1 : sites;  // run: sites side by side
  DenseLines<T> lines{data_of<T>(x),
                      static_cast<T*>(y.mutable_data_ptr()),
                      parameters.before(),
                      parameters.scale(),
                      parameters.after(),
                      elements,
                      run,
                      channels,
                      true};
  std::unique_ptr<T[]> repeated;
  if (run < 64) {
    const int64_t row = channels * run, length = (std::min(kRowsLine, elements) + row - 1) / row * row;
    if (length > kMostParameters) return false;
    repeated = parameters.repeated(length, run);
    lines.before = repeated.get(), lines.scale = lines.before + length, lines.after = lines.scale + length;
    lines.length = length, lines.one_channel = false;
  }
  in_parallel(lines.lines(), elements, [&](int64_t first, int64_t last) { FK_DISPATCH(run_lines<T>(lines, first, last)); });
  return true;
}

template <class E>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& shift, const Tensor& log_scale,
                                   const std::optional<Tensor>& bias, bool inverse) {
  using T = compute_t<E>;
  const Parameters<E> parameters(shift, log_scale, bias, inverse, x.size(1));
  Tensor y = empty_in_layout_of(x), logabsdet = empty_vector(x.size(0), compute_type<E>);
  const int64_t batch = x.size(0), sites = sites_of(x);
  T* total = static_cast<T*>(logabsdet.mutable_data_ptr());
  std::fill(total, total + batch, static_cast<T>(sites * parameters.log_det()));
  if (x.numel() == 0 || forward_on_lines<E>(x, parameters, sites, y)) return {y, logabsdet};
  const Tensor* in[] = {&x};
  Elementwise<E> args = describe<E>(x, parameters, in, 1, y);
  plan(args, false);
  run(args, false, false);
  return {y, logabsdet};
}

// of dy, and of what goes to the log scale: [2, parts, channels], `each` of either kind
template <class T>
struct Sums {
  int64_t each;
  std::unique_ptr<T[]> values;

  explicit Sums(int64_t n) : each(n), values(new T[2 * n]) {}
};

template <class E>
Sums<compute_t<E>> gradients_of_any(const Tensor& dy, const Tensor& kept, const Parameters<E>& parameters, bool from_output,
                                    const Tensor& dx) {
  const Tensor* in[] = {&dy, &kept};
  Elementwise<E> args = describe<E>(dy, parameters, in, 2, dx);
  plan(args, true);
  args.n_terms = 2;
  Sums<compute_t<E>> sums((args.one_site ? args.units : args.batch * args.lines) * args.channels);
  args.sums[0] = sums.values.get();
  args.sums[1] = sums.values.get() + sums.each;
  if (args.batch > 0) run(args, true, from_output);
  return sums;
}

// Vectors without gaps: one plain pass. The bits are the walk's.
template <class T>
Sums<T> gradients_of_vectors(const Tensor& dy, const Tensor& kept, const Parameters<T>& parameters, bool from_output, const Tensor& dx) {
  const int64_t batch = dy.size(0), channels = dy.size(1), length = 16 * channels, units = (batch + kLine - 1) / kLine;
  const std::unique_ptr<T[]> repeated = parameters.repeated(length, 1);
  Sums<T> sums(units * channels);
  const VectorGradients<T> gradients{data_of<T>(dy),
                                     data_of<T>(kept),
                                     static_cast<T*>(dx.mutable_data_ptr()),
                                     repeated.get(),
                                     repeated.get() + length,
                                     repeated.get() + 2 * length,
                                     {sums.values.get(), sums.values.get() + sums.each},
                                     batch,
                                     channels,
                                     kLine,
                                     from_output};
  in_parallel(units, batch * channels, [&](int64_t first, int64_t last) {
    FK_DISPATCH(run_vector_gradients<T>(gradients, static_cast<T*>(thread_scratch(2 * length * sizeof(T))), first, last));
  });
  return sums;
}

template <class E>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& dlogabsdet, const Tensor& kept,
                                                    const std::optional<Tensor>& shift, const Tensor& log_scale,
                                                    const std::optional<Tensor>& bias, bool inverse, bool from_output) {
  using T = compute_t<E>;
  check(kept.is_cpu() && kept.scalar_type() == dy.scalar_type() && kept.dim() == dy.dim(), "what is kept does not fit dy");
  for (int64_t d = 0; d < dy.dim(); ++d) check(kept.size(d) == dy.size(d), "what is kept does not fit dy");
  check(dlogabsdet.is_cpu() && dlogabsdet.dim() == 1 && dlogabsdet.size(0) == dy.size(0) && dlogabsdet.scalar_type() == compute_type<E>,
        "dlogabsdet does not fit dy");
  const int64_t channels = dy.size(1);
  const Parameters<E> parameters(shift, log_scale, bias, inverse, channels);
  Tensor dx = empty_in_layout_of(dy), dshift = empty_vector(channels, compute_type<E>);
  Tensor dlog_scale = empty_vector(channels, compute_type<E>), dbias = empty_vector(channels, compute_type<E>);
  const int64_t sites = sites_of(dy);
  const Sums<T> sums = [&] {
    if constexpr (std::is_same_v<E, T>) {
      const bool plain = sites == 1 && 16 * channels <= kMostParameters && dy.is_contiguous() && kept.is_contiguous();
      if (plain) return gradients_of_vectors<T>(dy, kept, parameters, from_output, dx);
    }
    return gradients_of_any<E>(dy, kept, parameters, from_output, dx);
  }();

  const T* c = data_of<T>(dlogabsdet);
  double by_logabsdet = 0;
  for (int64_t b = 0; b < dy.size(0); ++b) by_logabsdet += c[b * dlogabsdet.stride(0)];
  by_logabsdet *= static_cast<double>(sites);
  const double sign = inverse ? -1 : 1;
  T* dbefore = static_cast<T*>((inverse ? dbias : dshift).mutable_data_ptr());
  T* dafter = static_cast<T*>((inverse ? dshift : dbias).mutable_data_ptr());
  T* dlog = static_cast<T*>(dlog_scale.mutable_data_ptr());
  for (int64_t k = 0; k < channels; ++k) {
    double constant = 0, linear = by_logabsdet;
    for (int64_t i = k; i < sums.each; i += channels) constant += sums.values[i], linear += sums.values[sums.each + i];
    dafter[k] = static_cast<T>(sign * constant);
    dbefore[k] = static_cast<T>(sign * constant * parameters.scale()[k]);
    dlog[k] = static_cast<T>(sign * linear);
  }
  return {dx, dshift, dlog_scale, dbias};
}

}  // namespace

std::tuple<Tensor, Tensor> channel_affine(const Tensor& x, std::optional<Tensor> shift, const Tensor& log_scale, std::optional<Tensor> bias,
                                          bool inverse) {
  check(x.dim() >= 2 && x.dim() <= kMaxDims && x.size(1) >= 1, "x must have at least a batch and channels");
  switch (x.scalar_type()) {
    case ScalarType::Float: return forward<float>(x, shift, log_scale, bias, inverse);
    case ScalarType::Double: return forward<double>(x, shift, log_scale, bias, inverse);
    case ScalarType::Half:
    case ScalarType::BFloat16: return forward<Half>(x, shift, log_scale, bias, inverse);
    default: STD_TORCH_CHECK(false, "flowkernels::channel_affine: x must be float64, float32, float16 or bfloat16");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_affine_backward(const Tensor& dy, const Tensor& dlogabsdet, const Tensor& kept,
                                                                   std::optional<Tensor> shift, const Tensor& log_scale,
                                                                   std::optional<Tensor> bias, bool inverse, bool from_output) {
  check(dy.dim() >= 2 && dy.dim() <= kMaxDims && dy.size(1) >= 1, "dy must have at least a batch and channels");
  switch (dy.scalar_type()) {
    case ScalarType::Float: return backward<float>(dy, dlogabsdet, kept, shift, log_scale, bias, inverse, from_output);
    case ScalarType::Double: return backward<double>(dy, dlogabsdet, kept, shift, log_scale, bias, inverse, from_output);
    case ScalarType::Half:
    case ScalarType::BFloat16: return backward<Half>(dy, dlogabsdet, kept, shift, log_scale, bias, inverse, from_output);
    default: STD_TORCH_CHECK(false, "flowkernels::channel_affine: dy must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("channel_affine", TORCH_BOX(&flowkernels::channel_affine));
  m.impl("channel_affine_backward", TORCH_BOX(&flowkernels::channel_affine_backward));
}
