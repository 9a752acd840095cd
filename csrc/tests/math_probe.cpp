// Private ops by which the tests reach every vector function on every instruction set of this machine:
//   flowkernels::_elementwise(Tensor x, str function, str target, float[] params) -> Tensor, and _elementwise_out, which writes to a tensor
//   flowkernels::_affine_form(Tensor x, Tensor shift, Tensor s, str target, int form, bool inverse, float[] params) -> (Tensor, Tensor)
//   flowkernels::_math_targets() -> str     the targets that run here, separated by blanks
// params are (kind, p0, p1) of a scale map or the code of an activation, where the function needs them.
// Tensors are contiguous, float or double.
//
// This file is its own kernel header: for_each_target.h includes the part below #else once per instruction set.

#ifndef FK_TARGET

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

struct Probe {
  enum Kind { plain, scale, activation, activation_derivative } kind;
  int which;
  ScaleMapParams map;
};

}  // namespace
}  // namespace flowkernels

#define FK_KERNEL "tests/math_probe.cpp"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScaleMapParams scale_map_params(const std::vector<double>& params) {
  return params.size() == 3 ? ScaleMapParams{static_cast<int>(params[0]), params[1], params[2]} : ScaleMapParams{0, 0.0, 0.0};
}

void check(const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == like.numel() && tensor.scalar_type() == like.scalar_type(),
                  "flowkernels::_elementwise wants contiguous CPU tensors of one size and dtype");
}

Probe find(const std::string& function, const std::vector<double>& params) {
  const std::vector<const char*> plain = {"exp", "expm1", "log", "tanh", "sigmoid", "softplus", "erf", "atan", "exp_of_nonpositive"};
  const std::vector<const char*> scale = {"sigma", "log_sigma", "reciprocal", "log_reciprocal", "complement", "dsigma", "dlog_sigma"};
  for (size_t i = 0; i < plain.size(); ++i) {
    if (function == plain[i]) return {Probe::plain, static_cast<int>(i), {}};
  }
  for (size_t i = 0; i < scale.size(); ++i) {
    if (function == scale[i]) return {Probe::scale, static_cast<int>(i), scale_map_params(params)};
  }
  STD_TORCH_CHECK(params.size() == 1, "flowkernels::_elementwise knows no function ", function);
  return {function == "activation" ? Probe::activation : Probe::activation_derivative, static_cast<int>(params[0]), {}};
}

template <class T>
void launch_elementwise(const Tensor& x, const Tensor& out, const Probe& probe, Target target) {
  const T* from = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  FK_DISPATCH_ON(target, probe_elementwise(probe, from, to, x.numel()));
}

void elementwise_out(const Tensor& x, const Tensor& out, std::string function, std::string target, std::vector<double> params) {
  for (const Tensor* tensor : {&x, &out}) check(*tensor, x);
  const Probe probe = find(function, params);
  if (x.scalar_type() == ScalarType::Double) {
    launch_elementwise<double>(x, out, probe, target_named(target));
  } else {
    launch_elementwise<float>(x, out, probe, target_named(target));
  }
}

Tensor elementwise(const Tensor& x, std::string function, std::string target, std::vector<double> params) {
  Tensor out = torch::stable::empty_like(x);
  elementwise_out(x, out, function, target, params);
  return out;
}

template <class T>
std::tuple<Tensor, Tensor> launch_form(const Tensor& x, const Tensor& shift, const Tensor& s, const std::string& target, Form form,
                                       bool inverse, const ScaleMapParams& map) {
  Tensor y = torch::stable::empty_like(x), log = torch::stable::empty_like(x);
  const T *x_in = static_cast<const T*>(x.const_data_ptr()), *shift_in = static_cast<const T*>(shift.const_data_ptr());
  const T* s_in = static_cast<const T*>(s.const_data_ptr());
  T *y_out = static_cast<T*>(y.mutable_data_ptr()), *log_out = static_cast<T*>(log.mutable_data_ptr());
  FK_DISPATCH_ON(target_named(target), probe_form(x_in, shift_in, s_in, y_out, log_out, x.numel(), form, inverse, map));
  return {y, log};
}

std::tuple<Tensor, Tensor> affine_form(const Tensor& x, const Tensor& shift, const Tensor& s, std::string target, int64_t form,
                                       bool inverse, std::vector<double> params) {
  for (const Tensor* tensor : {&x, &shift, &s}) check(*tensor, x);
  const ScaleMapParams map = scale_map_params(params);
  return x.scalar_type() == ScalarType::Double ? launch_form<double>(x, shift, s, target, static_cast<Form>(form), inverse, map)
                                               : launch_form<float>(x, shift, s, target, static_cast<Form>(form), inverse, map);
}

std::string math_targets() {
  std::string names;
  for (Target target : {Target::neon, Target::avx2, Target::avx512}) {
    if (runs_here(target)) names += (names.empty() ? "" : " ") + std::string(target_name(target));
  }
  return names;
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels, m) {
  m.def("_elementwise(Tensor x, str function, str target, float[] params) -> Tensor");
  m.def("_elementwise_out(Tensor x, Tensor(a!) out, str function, str target, float[] params) -> ()");
  m.def("_affine_form(Tensor x, Tensor shift, Tensor s, str target, int form, bool inverse, float[] params) -> (Tensor, Tensor)");
  m.def("_math_targets() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("_elementwise", TORCH_BOX(&flowkernels::elementwise));
  m.impl("_elementwise_out", TORCH_BOX(&flowkernels::elementwise_out));
  m.impl("_affine_form", TORCH_BOX(&flowkernels::affine_form));
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CompositeExplicitAutograd, m) { m.impl("_math_targets", TORCH_BOX(&flowkernels::math_targets)); }

#else

namespace flowkernels {
namespace FK_TARGET {

template <class V>
FK_CALL V probe_plain(int which, V v) {
  switch (which) {
    case 0: return exp(v);
    case 1: return expm1(v);
    case 2: return log(v);
    case 3: return tanh(v);
    case 4: return sigmoid(v);
    case 5: return softplus(v);
    case 6: return erf(v);
    case 7: return atan(v);
    default: return exp_of_nonpositive(v);
  }
}

template <class V>
FK_CALL V probe_scale(int which, const ScaleMapParams& params, V s) {
  return with_scale_map<V>(params, [&](const auto& map) {
    switch (which) {
      case 0: return map.sigma(s);
      case 1: return map.log_sigma(s);
      case 2: return map.reciprocal(s);
      case 3: return map.log_reciprocal(s);
      case 4: return map.complement(s);
      case 5: return map.dsigma(s);
      default: return map.dlog_sigma(s);
    }
  });
}

template <class V>
FK_CALL V probe_activation_derivative(Activation activation, V v) {
  return with_activation(activation, [&](auto tag) { return activate_derivative<decltype(tag)::value>(v); });
}

template <class V>
FK_INLINE V probe_value(const Probe& probe, V v) {
  switch (probe.kind) {
    case Probe::plain: return probe_plain(probe.which, v);
    case Probe::scale: return probe_scale(probe.which, probe.map, v);
    case Probe::activation: return activate(static_cast<Activation>(probe.which), v);
    default: return probe_activation_derivative(static_cast<Activation>(probe.which), v);
  }
}

// full vectors, then one partial load and store
template <class T>
FK_CALL void probe_elementwise(const Probe& probe, const T* x, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) store(y + i, probe_value(probe, load(x + i)));
  const int rest = static_cast<int>(n - i);
  if (rest > 0) store_partial(y + i, probe_value(probe, load_partial(x + i, rest)), rest);
}

template <class T>
FK_CALL void probe_form(const T* x, const T* shift, const T* s, T* y, T* log, int64_t n, Form form, bool inverse,
                        const ScaleMapParams& params) {
  for (int64_t i = 0; i < n; i += lanes<T>) {
    const int k = n - i < lanes<T> ? static_cast<int>(n - i) : lanes<T>;
    const Vec<T> vx = load_partial(x + i, k), vshift = load_partial(shift + i, k), vs = load_partial(s + i, k);
    const ValueAndLog<Vec<T>> r = inverse ? invert_form(form, params, vx, vshift, vs) : apply_form(form, params, vx, vshift, vs);
    store_partial(y + i, r.value, k);
    store_partial(log + i, r.log, k);
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels

#endif
