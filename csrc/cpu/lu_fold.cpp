// LU-parametrised weights composed or inverted, all of one size in one call, for CPU tensors. The arithmetic is in lu_fold_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <tuple>
#include <vector>

#include "cpu/lu_fold.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/lu_fold_kernel.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::lu_fold: ", what); }

// The data of one tensor for each matrix. Python has checked what users get wrong, here only what would corrupt memory.
template <class T>
std::vector<const T*> data_of_each(const Tensors& tensors, size_t count, std::initializer_list<int64_t> sizes) {
  check(tensors.size() == count, "there must be as many tensors of each kind as matrices");
  std::vector<const T*> data;
  data.reserve(count);
  for (const Tensor& t : tensors) data.push_back(checked_data<T>("lu_fold", t, sizes));
  return data;
}

struct Lists {
  const Tensors &factors, &log_diagonal, &log_scale, &sign, &row;
};

// f(args, one of the tensors)
template <class T, class F>
auto with_args(const Lists& lists, bool inverse, const F& f) {
  const size_t count = lists.factors.size();
  const int64_t n = lists.factors[0].size(0);
  const auto factors = data_of_each<T>(lists.factors, count, {n, n}), log_diagonal = data_of_each<T>(lists.log_diagonal, count, {n});
  const auto sign = data_of_each<T>(lists.sign, count, {n});
  const auto row = data_of_each<int64_t>(lists.row, count, {n});
  for (const int64_t* rows : row) {
    for (int64_t i = 0; i < n; ++i) check(rows[i] >= 0 && rows[i] < n, "row must hold numbers of rows");
  }
  const bool scaled = !lists.log_scale.empty();
  const auto log_scale = data_of_each<T>(lists.log_scale, scaled ? count : 0, {n});
  LuFoldArgs<T> args{};
  args.n = n;
  args.inverse = inverse;
  args.factors = factors.data();
  args.log_diagonal = log_diagonal.data();
  args.log_scale = scaled ? log_scale.data() : nullptr;
  args.sign = sign.data();
  args.row = row.data();
  return f(args, lists.factors[0]);
}

template <class T>
void run(const LuFoldArgs<T>& args, int64_t count, bool backward) {
  const size_t bytes = FK_DISPATCH(lu_fold_scratch(args.n, backward)) * sizeof(double);
  in_grains(count, worth_a_thread(args.n * args.n * args.n + 1), [&](int64_t first, int64_t last) {
    FK_DISPATCH(lu_fold_matrices<T>(args, static_cast<double*>(thread_scratch(bytes)), backward, first, last));
  });
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Lists& lists, bool inverse) {
  return with_args<T>(lists, inverse, [&](LuFoldArgs<T>& args, const Tensor& like) -> std::tuple<Tensor, Tensor> {
    const int64_t count = static_cast<int64_t>(lists.factors.size());
    Tensor weight = empty(like, {count, args.n, args.n}), logabsdet = empty(like, {count});
    args.weight = static_cast<T*>(weight.mutable_data_ptr());
    args.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
    run(args, count, false);
    return {weight, logabsdet};
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dweight, const Tensor& dlogabsdet, const Tensor& weight, const Lists& lists,
                                            bool inverse) {
  return with_args<T>(lists, inverse, [&](LuFoldArgs<T>& args, const Tensor& like) -> std::tuple<Tensor, Tensor, Tensor> {
    const int64_t count = static_cast<int64_t>(lists.factors.size()), n = args.n;
    const bool scaled = args.log_scale != nullptr;
    Tensor dfactors = empty(like, {count, n, n}), dlog_diagonal = empty(like, {count, n}), dlog_scale = empty(like, {scaled ? count : 0, n});
    args.dweight = checked_data<T>("lu_fold", dweight, {count, n, n});
    args.dlogabsdet = checked_data<T>("lu_fold", dlogabsdet, {count});
    args.composed = checked_data<T>("lu_fold", weight, {count, n, n});
    args.dfactors = static_cast<T*>(dfactors.mutable_data_ptr());
    args.dlog_diagonal = static_cast<T*>(dlog_diagonal.mutable_data_ptr());
    args.dlog_scale = scaled ? static_cast<T*>(dlog_scale.mutable_data_ptr()) : nullptr;
    run(args, count, true);
    return {dfactors, dlog_diagonal, dlog_scale};
  });
}

bool in_double(const Tensors& factors) {
  check(!factors.empty() && factors[0].dim() == 2, "there must be a matrix");
  const ScalarType dtype = factors[0].scalar_type();
  check(dtype == ScalarType::Double || dtype == ScalarType::Float, "factors must be float32 or float64");
  return dtype == ScalarType::Double;
}

std::tuple<Tensor, Tensor> lu_fold(Tensors factors, Tensors log_diagonal, Tensors log_scale, Tensors sign, Tensors row, bool inverse) {
  const Lists lists{factors, log_diagonal, log_scale, sign, row};
  return in_double(factors) ? forward<double>(lists, inverse) : forward<float>(lists, inverse);
}

std::tuple<Tensor, Tensor, Tensor> lu_fold_backward(const Tensor& dweight, const Tensor& dlogabsdet, const Tensor& weight, Tensors factors,
                                                    Tensors log_diagonal, Tensors log_scale, Tensors sign, Tensors row, bool inverse) {
  const Lists lists{factors, log_diagonal, log_scale, sign, row};
  return in_double(factors) ? backward<double>(dweight, dlogabsdet, weight, lists, inverse)
                            : backward<float>(dweight, dlogabsdet, weight, lists, inverse);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("lu_fold", TORCH_BOX(&flowkernels::lu_fold));
  m.impl("lu_fold_backward", TORCH_BOX(&flowkernels::lu_fold_backward));
}
