// log|det| and inverses of small matrices, for CPU tensors: arguments, threads, registration. The factorisation is in lu_kernel.h.
//
// And a private op by which the tests reach the arithmetic of the CUDA kernel's launch:
//   flowkernels::_lu_plan(int n, int batch, int item_bytes, int shared_limit) -> int[]     LuPlan's members in order

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/lu.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"
#include "lu_plan.h"

#define FK_KERNEL "cpu/lu_kernel.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class In, class T>
void launch(const Tensor& w, const Tensor& sign, const Tensor& logabsdet, const Tensor* inverse) {
  const int64_t dims = w.dim(), n = w.size(dims - 1);
  std::vector<int64_t> sizes(dims), strides(dims);
  for (int64_t d = 0; d < dims; ++d) sizes[d] = w.size(d), strides[d] = w.stride(d);
  LuArgs<In> args{};
  args.w = data_of<In>(w);
  args.sizes = sizes.data();
  args.strides = strides.data();
  args.dims = dims;
  args.n = n;
  args.row_stride = strides[dims - 2];
  args.column_stride = strides[dims - 1];
  args.sign = static_cast<In*>(sign.mutable_data_ptr());
  args.logabsdet = static_cast<In*>(logabsdet.mutable_data_ptr());
  args.inverse = inverse ? static_cast<In*>(inverse->mutable_data_ptr()) : nullptr;

  const size_t bytes = FK_DISPATCH(lu_scratch_bytes<T>(n, inverse != nullptr));
  const int64_t batch = sign.numel(), group = FK_DISPATCH(lu_group<T>(n)), groups = (batch + group - 1) / group;
  const int64_t multiply_adds = group * (n * n * n / (inverse ? 1 : 3) + 100 * n + 1);  // a pivot costs as much as some 100
  in_grains(groups, worth_a_thread(multiply_adds), [&](int64_t first, int64_t last) {
    FK_DISPATCH(lu_matrices<In, T>(args, thread_scratch(bytes), first * group, std::min(last * group, batch)));
  });
}

void check_and_launch(const Tensor& w, const Tensor& sign, const Tensor& logabsdet, const Tensor* inverse, bool in_float64) {
  if (w.scalar_type() == ScalarType::Double)
    launch<double, double>(w, sign, logabsdet, inverse);
  else if (in_float64)
    launch<float, double>(w, sign, logabsdet, inverse);
  else
    launch<float, float>(w, sign, logabsdet, inverse);
}

// Python has checked what users get wrong; here only what would corrupt memory.
std::vector<int64_t> batch_sizes(const Tensor& w) {
  const int64_t dims = w.dim();
  STD_TORCH_CHECK(dims >= 2 && w.size(dims - 1) == w.size(dims - 2), "flowkernels::slogdet: w must be [*, n, n]");
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float || w.scalar_type() == ScalarType::Double,
                  "flowkernels::slogdet: w must be float32 or float64");
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < dims - 2; ++d) sizes.push_back(w.size(d));
  return sizes;
}

std::tuple<Tensor, Tensor> slogdet(Tensor w, bool in_float64) {
  const std::vector<int64_t> sizes = batch_sizes(w);
  Tensor sign = empty(w, sizes), logabsdet = empty(w, sizes);
  check_and_launch(w, sign, logabsdet, nullptr, in_float64);
  return {sign, logabsdet};
}

std::tuple<Tensor, Tensor, Tensor> slogdet_inverse(Tensor w, bool in_float64) {
  std::vector<int64_t> sizes = batch_sizes(w);
  Tensor sign = empty(w, sizes), logabsdet = empty(w, sizes);
  sizes.insert(sizes.end(), 2, w.size(w.dim() - 1));
  Tensor inverse = empty(w, sizes);
  check_and_launch(w, sign, logabsdet, &inverse, in_float64);
  return {sign, logabsdet, inverse};
}

std::vector<int64_t> plan(int64_t n, int64_t batch, int64_t item_bytes, int64_t shared_limit) {
  const LuPlan p = lu_plan(n, batch, item_bytes, shared_limit);
  return {p.ld, p.shared_bytes, p.workspace, p.blocks, p.warps};
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels, m) {
  m.def("_lu_plan(int n, int batch, int item_bytes, int shared_limit) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CompositeExplicitAutograd, m) { m.impl("_lu_plan", TORCH_BOX(&flowkernels::plan)); }

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("slogdet", TORCH_BOX(&flowkernels::slogdet));
  m.impl("slogdet_inverse", TORCH_BOX(&flowkernels::slogdet_inverse));
}
