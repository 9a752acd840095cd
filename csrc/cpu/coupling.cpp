// Coupling for CPU tensors: arguments, registration. The arithmetic is in coupling_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <tuple>

#include "cpu/elementwise.h"
#include "cpu/for_each_target.h"  // declares the codes of maps and forms
#include "cpu/shares.h"
#include "cpu/tensor.h"
#include "cpu/tile_map.h"

namespace flowkernels {

struct Affine {
  ScaleMapParams scale;
  Form form;
  bool inverse, from_output;
};

}  // namespace flowkernels

#define FK_KERNEL "cpu/coupling_kernel.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// the codes of Part in flowkernels/ops/coupling/part.py
enum class Part : int { first_half, second_half, even, odd, checkerboard_even, checkerboard_odd };

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::coupling: ", what); }

// Python has checked what users get wrong; here only what would corrupt memory.
void check_like(const Tensor& t, const Tensor& x, int64_t channels) {
  check(t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == x.dim(), "tensors must be on the CPU, of one dtype and dimension");
  for (int64_t d = 0; d < x.dim(); ++d) check(t.size(d) == (d == 1 ? channels : x.size(d)), "tensors must have fitting sizes");
}

template <class E>
Elementwise<E> describe(const Tensor& x, int64_t part_code) {
  check(part_code >= 0 && part_code <= static_cast<int64_t>(Part::checkerboard_odd), "unknown part");
  const Part part = static_cast<Part>(part_code);
  Elementwise<E> args{};
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.phase = part_code & 1;
  args.along = part >= Part::checkerboard_even ? Along::checkerboard : part >= Part::even ? Along::alternate_channels : Along::channels;
  args.transformed = part == Part::odd ? args.channels / 2 : args.channels - args.channels / 2;
  if (args.along == Along::checkerboard) args.transformed = args.channels;
  check(x.dim() <= kMaxDims, "x has too many dimensions");
  check(x.numel() > 0 || args.batch == 0, "x must have at least one site");
  check(args.along == Along::checkerboard ? x.dim() == 4 : args.transformed >= 1, "x cannot be split so");  // a channel alone is transformed
  return args;
}

template <class E>
void set_scale_parameter(Elementwise<E>& args, const std::optional<Tensor>& a) {
  if (!a) return;
  check(a->is_cpu() && a->dim() == 1 && (a->size(0) == 1 || a->size(0) == args.transformed) && a->scalar_type() == compute_type<E>,
        "scale_parameter does not fit x");
  args.n_parameters = 1;
  args.parameter[0] = data_of<compute_t<E>>(*a);
  args.parameter_stride[0] = a->size(0) == 1 ? 0 : a->stride(0);
}

template <class E>
void run(const Elementwise<E>& args, const Affine& affine, bool additive, bool backward) {
  using T = compute_t<E>;
  const bool learned = args.n_parameters > 0;
  run_elementwise<E>(args, {FK_DISPATCH(choose_tile<T>(affine, additive, learned, backward)), &affine});
}

template <class E>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& shift, const std::optional<Tensor>& raw_scale,
                                   const std::optional<Tensor>& scale_parameter, int64_t part, const Affine& affine) {
  using T = compute_t<E>;
  Elementwise<E> args = describe<E>(x, part);
  check_like(shift, x, args.transformed);
  if (raw_scale) check_like(*raw_scale, x, args.transformed);
  Tensor y = empty_in_layout_of(x), logabsdet = empty_vector(args.batch, compute_type<E>);
  const Tensor *in[] = {&x, &shift, raw_scale ? &*raw_scale : nullptr}, *out[] = {&y};
  set_views(args, in, raw_scale ? 3 : 2, 1, out, 1);
  set_scale_parameter(args, scale_parameter);
  const bool additive = !raw_scale, sums = !additive && !args.one_site;
  plan(args, sums);
  T* total = static_cast<T*>(logabsdet.mutable_data_ptr());
  if (additive) std::fill(total, total + args.batch, T(0));
  if (args.batch == 0) return {y, logabsdet};

  args.n_terms = additive ? 0 : 1;
  if (!additive && args.one_site) args.sample_sums = total;
  const int64_t terms = args.lines * args.transformed;  // of a sample
  const std::unique_ptr<T[]> line_sums(sums ? new T[args.batch * terms] : nullptr);
  args.sums[0] = line_sums.get();
  run(args, affine, additive, false);
  if (sums) {
    in_parallel(args.batch, args.batch * terms, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        double sum = 0;
        for (int64_t i = 0; i < terms; ++i) sum += line_sums[b * terms + i];
        total[b] = static_cast<T>(sum);
      }
    });
  }
  return {y, logabsdet};
}

template <class E>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& dlogabsdet, const Tensor& kept, const Tensor& shift,
                                                    const Tensor& raw_scale, const std::optional<Tensor>& scale_parameter, int64_t part,
                                                    const Affine& affine) {
  using T = compute_t<E>;
  Elementwise<E> args = describe<E>(dy, part);
  check_like(kept, dy, args.channels);
  check_like(shift, dy, args.transformed);
  check_like(raw_scale, dy, args.transformed);
  check(dlogabsdet.is_cpu() && dlogabsdet.dim() == 1 && dlogabsdet.size(0) == args.batch && dlogabsdet.scalar_type() == compute_type<E>,
        "dlogabsdet does not fit");
  Tensor dx = empty_in_layout_of(dy), dshift = empty_in_layout_of(shift), draw_scale = empty_in_layout_of(raw_scale);
  const bool learned = scale_parameter.has_value();
  Tensor dparameter = learned ? empty_vector(scale_parameter->size(0), compute_type<E>) : empty_vector(0, shift.scalar_type());
  const Tensor *in[] = {&dy, &kept, &shift, &raw_scale}, *out[] = {&dx, &dshift, &draw_scale};
  set_views(args, in, 4, 2, out, 3);
  set_scale_parameter(args, scale_parameter);
  args.per_sample = data_of<T>(dlogabsdet);
  args.per_sample_stride = dlogabsdet.stride(0);
  plan(args, learned);

  args.n_terms = learned ? 1 : 0;
  const int64_t parts = args.one_site ? args.units : args.batch * args.lines;
  const std::unique_ptr<T[]> part_sums(learned ? new T[parts * args.transformed] : nullptr);
  args.sums[0] = part_sums.get();
  if (args.batch > 0) run(args, affine, false, true);
  if (learned) {
    T* result = static_cast<T*>(dparameter.mutable_data_ptr());
    const bool for_all = dparameter.size(0) == 1;
    double sum = 0;
    for (int64_t c = 0; c < args.transformed; ++c) {
      for (int64_t i = 0; i < parts; ++i) sum += part_sums[i * args.transformed + c];
      if (for_all) continue;
      result[c] = static_cast<T>(sum);
      sum = 0;
    }
    if (for_all) result[0] = static_cast<T>(sum);
  }
  return {dx, dshift, draw_scale, dparameter};
}

Affine affine_of(int64_t kind, double p0, double p1, int64_t form, bool inverse, bool from_output) {
  return {ScaleMapParams{static_cast<int>(kind), p0, p1}, static_cast<Form>(form), inverse, from_output};
}

std::tuple<Tensor, Tensor> coupling(const Tensor& x, const Tensor& shift, std::optional<Tensor> raw_scale,
                                    std::optional<Tensor> scale_parameter, int64_t part, int64_t scale_kind, double scale_p0,
                                    double scale_p1, int64_t form, bool inverse) {
  const Affine affine = affine_of(scale_kind, scale_p0, scale_p1, form, inverse, false);
  switch (x.scalar_type()) {
    case ScalarType::Float: return forward<float>(x, shift, raw_scale, scale_parameter, part, affine);
    case ScalarType::Double: return forward<double>(x, shift, raw_scale, scale_parameter, part, affine);
    case ScalarType::Half:
    case ScalarType::BFloat16: return forward<Half>(x, shift, raw_scale, scale_parameter, part, affine);
    default: STD_TORCH_CHECK(false, "flowkernels::coupling: x must be float64, float32, float16 or bfloat16");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> coupling_backward(const Tensor& dy, const Tensor& dlogabsdet, const Tensor& kept,
                                                             const Tensor& shift, const Tensor& raw_scale,
                                                             std::optional<Tensor> scale_parameter, int64_t part, int64_t scale_kind,
                                                             double scale_p0, double scale_p1, int64_t form, bool inverse,
                                                             bool from_output) {
  const Affine affine = affine_of(scale_kind, scale_p0, scale_p1, form, inverse, from_output);
  switch (dy.scalar_type()) {
    case ScalarType::Float: return backward<float>(dy, dlogabsdet, kept, shift, raw_scale, scale_parameter, part, affine);
    case ScalarType::Double: return backward<double>(dy, dlogabsdet, kept, shift, raw_scale, scale_parameter, part, affine);
    case ScalarType::Half:
    case ScalarType::BFloat16: return backward<Half>(dy, dlogabsdet, kept, shift, raw_scale, scale_parameter, part, affine);
    default: STD_TORCH_CHECK(false, "flowkernels::coupling: dy must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("coupling", TORCH_BOX(&flowkernels::coupling));
  m.impl("coupling_backward", TORCH_BOX(&flowkernels::coupling_backward));
}
