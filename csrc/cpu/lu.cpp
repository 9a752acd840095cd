// log|det| and inverses of small matrices, for CPU tensors: arguments, threads, registration. The factorisation is in lu_kernel.h.
//
// And a private op by which the tests reach the arithmetic of the CUDA kernel's launch:
//   flowkernels::_lu_plan(int n, int batch, int item_bytes, int shared_limit) -> int[]     LuPlan's members in order

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/lu.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"
#include "lu_call.h"
#include "lu_plan.h"

#define FK_KERNEL "cpu/lu_kernel.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::stable::Tensor;

struct CpuLu {
  static Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) { return flowkernels::empty(like, sizes); }

  template <class In, class T>
  static void launch(const Tensor& w, const Tensor& sign, const Tensor& logabsdet, const Tensor* inverse) {
    const int64_t dims = w.dim(), n = w.size(dims - 1);
    const std::vector<int64_t> sizes = sizes_of(w);
    std::vector<int64_t> strides(dims);
    for (int64_t d = 0; d < dims; ++d) strides[d] = w.stride(d);
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
};

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
  m.impl("slogdet", TORCH_BOX(&flowkernels::slogdet<flowkernels::CpuLu>));
  m.impl("slogdet_inverse", TORCH_BOX(&flowkernels::slogdet_inverse<flowkernels::CpuLu>));
}
