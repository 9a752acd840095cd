// Masked linear maps for CPU tensors: checks, tasks, registration. The products themselves are in masked_linear_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/masked_linear.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/staircase.h"
#include "cpu/tensor.h"

#define FK_PRODUCTS  // here
#define FK_KERNEL "cpu/masked_linear_targets.h"
#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Python has checked what users get wrong; here only what would corrupt memory.
inline void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::masked_linear: ", what); }

bool fits(const Tensor& t, ScalarType dtype) { return t.is_cpu() && t.scalar_type() == dtype; }

// [..., columns] as a matrix whose rows are contiguous; with no columns there are rows all the same
Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2) return rows_contiguous(t);
  const int64_t last = t.dim() - 1;
  int64_t rows = 1;
  for (int64_t d = 0; d < last; ++d) rows *= t.size(d);
  return rows_contiguous(torch::stable::reshape(t, {rows, t.size(last)}));
}

int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); }

// What the three products share: the staircase, checked, and the order in which tasks of unequal size are spread over threads
template <class T>
struct Product {
  std::vector<Tensor> kept;  // contiguous copies must outlive the kernel
  std::vector<int32_t> first;
  MaskedLinearArgs<T> args{};

  const T* matrix(const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns, int64_t& ld, const char* misfit) {
    check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && fits(t, dtype), misfit);
    kept.push_back(rows_contiguous(t));
    ld = row_stride(kept.back());
    return data_of<T>(kept.back());
  }

  void set_staircase(const Tensor& visible) {
    check(visible.dim() == 1 && visible.size(0) == args.outputs && fits(visible, ScalarType::Int), "visible does not fit the weight");
    kept.push_back(made_contiguous(visible));
    args.visible = data_of<int32_t>(kept.back());
    check(args.inputs < (int64_t{1} << 31), "too many inputs");
    check(is_staircase(args.visible, args.outputs, args.inputs), "visible must ascend from 0 to the number of inputs");
  }

  void set_first() {
    first = first_seen_by(args.visible, args.outputs, args.inputs);
    args.first = first.data();
  }

  double multiply_adds() const { return seen_pairs(args.visible, args.outputs) * static_cast<double>(args.batch); }
};

// Rows and columns of one task of a product whose output is [batch, columns], in panels of `panel` columns
struct Split {
  int64_t rows, columns, row_tasks, column_tasks;
};

// element: bytes. terms: of a sum
Split split(int64_t batch, int64_t columns, int64_t panel, int64_t element, int64_t terms, int64_t threads) {
  // many rows for each packed panel, and few enough to stay in the second-level cache for all panels
  constexpr int64_t kMost = 512, kLeast = 128, kBytes = 1 << 20;
  const int64_t rows = std::clamp(kBytes / (element * std::max<int64_t>(terms, 1)), kLeast, kMost);
  const int64_t row_tasks = (batch + rows - 1) / rows, panels = (columns + panel - 1) / panel;
  // few blocks of rows: cut the columns too, four parts a thread
  const int64_t parts = row_tasks >= 2 * threads || threads == 1 ? 1 : std::min(panels, 4 * threads);
  const int64_t width = (panels + parts - 1) / parts * panel;
  return {(batch + row_tasks - 1) / std::max<int64_t>(row_tasks, 1), width, row_tasks, (columns + width - 1) / width};
}

// terms_of(c): how many terms the sums of column c have
template <class T, class Terms, class F>
void for_each_part(const Product<T>& product, int64_t columns, int64_t terms, const Terms& terms_of, const F& run) {
  const int64_t batch = product.args.batch;
  if (batch == 0 || columns == 0) return;
  const int64_t threads = threads_for(product.multiply_adds());
  const Split s = split(batch, columns, FK_DISPATCH(panel_width<T>()), sizeof(T), terms, threads);
  std::vector<double> work(s.row_tasks * s.column_tasks, 0);
  for (int64_t c = 0; c < columns; ++c) work[c / s.columns * s.row_tasks] += terms_of(c);
  for (int64_t task = 0; task < static_cast<int64_t>(work.size()); ++task) work[task] = work[task / s.row_tasks * s.row_tasks];
  run_shares(share_out(work, threads), [&](int64_t task) {
    const int64_t r = task % s.row_tasks * s.rows, c = task / s.row_tasks * s.columns;
    run(r, std::min(r + s.rows, batch), c, std::min(c + s.columns, columns));
  });
}

template <class T>
Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& visible) {
  check(x.dim() >= 1 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(0), "x does not fit the weight");
  Product<T> p;
  const Tensor rows = as_rows(x);
  p.args.batch = rows.size(0);
  p.args.inputs = weight.size(0);
  p.args.outputs = weight.size(1);
  p.args.x = p.matrix(rows, x.scalar_type(), p.args.batch, p.args.inputs, p.args.x_ld, "x does not fit the weight");
  p.args.weight = p.matrix(weight, x.scalar_type(), p.args.inputs, p.args.outputs, p.args.weight_ld, "weight does not fit x");
  p.set_staircase(visible);
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == p.args.outputs && fits(*bias, x.scalar_type()), "bias does not fit the weight");
    p.kept.push_back(made_contiguous(*bias));
    p.args.finish.bias = data_of<T>(p.kept.back());
  }
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = p.args.outputs;
  Tensor y = empty(x, sizes);
  p.args.out = static_cast<T*>(y.mutable_data_ptr());
  p.args.out_ld = p.args.outputs;
  for_each_part(p, p.args.outputs, p.args.inputs, [&](int64_t c) { return p.args.visible[c]; }, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
    FK_DISPATCH(masked_linear_forward<T>(p.args, r0, r1, c0, c1, static_cast<T*>(thread_scratch(FK_DISPATCH(scratch_bytes<T>())))));
  });
  return y;
}

template <class T>
Tensor dx(const Tensor& dy, const Tensor& weight, const Tensor& visible) {
  check(dy.dim() >= 1 && weight.dim() == 2 && dy.size(dy.dim() - 1) == weight.size(1), "dy does not fit the weight");
  Product<T> p;
  const Tensor rows = as_rows(dy);
  p.args.batch = rows.size(0);
  p.args.inputs = weight.size(0);
  p.args.outputs = weight.size(1);
  p.args.dy = p.matrix(rows, dy.scalar_type(), p.args.batch, p.args.outputs, p.args.dy_ld, "dy does not fit the weight");
  p.args.weight = p.matrix(weight, dy.scalar_type(), p.args.inputs, p.args.outputs, p.args.weight_ld, "weight does not fit dy");
  p.set_staircase(visible);
  p.set_first();
  std::vector<int64_t> sizes = sizes_of(dy);
  sizes.back() = p.args.inputs;
  Tensor out = empty(dy, sizes);
  p.args.out = static_cast<T*>(out.mutable_data_ptr());
  p.args.out_ld = p.args.inputs;
  for_each_part(p, p.args.inputs, p.args.outputs, [&](int64_t c) { return p.args.outputs - p.args.first[c]; }, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
    FK_DISPATCH(masked_linear_dx<T>(p.args, r0, r1, c0, c1, static_cast<T*>(thread_scratch(FK_DISPATCH(scratch_bytes<T>())))));
  });
  return out;
}

template <class T>
Tensor dweight(const Tensor& x, const Tensor& dy, const Tensor& visible) {
  check(x.dim() >= 1 && dy.dim() == x.dim(), "x and dy must have the same number of dimensions");
  Product<T> p;
  const Tensor x_rows = as_rows(x), dy_rows = as_rows(dy);
  p.args.batch = x_rows.size(0);
  p.args.inputs = x_rows.size(1);
  p.args.outputs = dy_rows.size(1);
  p.args.x = p.matrix(x_rows, x.scalar_type(), p.args.batch, p.args.inputs, p.args.x_ld, "x does not fit dy");
  p.args.dy = p.matrix(dy_rows, x.scalar_type(), p.args.batch, p.args.outputs, p.args.dy_ld, "dy does not fit x");
  p.set_staircase(visible);
  Tensor out = empty(x, {p.args.inputs, p.args.outputs});
  p.args.out = static_cast<T*>(out.mutable_data_ptr());
  p.args.out_ld = p.args.outputs;
  if (p.args.inputs == 0) return out;
  const int64_t threads = threads_for(p.multiply_adds());
  const int64_t rows = FK_DISPATCH(dweight_rows<T>(p.args.inputs, threads, 1));
  std::vector<double> work;
  for (int64_t k0 = 0; k0 < p.args.inputs; k0 += rows)
    work.push_back(seen_pairs(p.args.visible, p.args.outputs, k0, std::min(k0 + rows, p.args.inputs)));
  run_shares(share_out(work, threads), [&](int64_t task) {
    T* scratch = static_cast<T*>(thread_scratch(FK_DISPATCH(dweight_scratch_bytes<T>(rows))));
    FK_DISPATCH(masked_linear_dweight<T>(p.args, task * rows, std::min((task + 1) * rows, p.args.inputs), scratch));
  });
  return out;
}

void check_dtype(const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, "tensors must be float64, float32, float16 or bfloat16");
}

// Half and bfloat16 are computed in float32 and rounded once.
bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16; }

Tensor widened(const Tensor& t) { return torch::stable::to(t, ScalarType::Float); }

Tensor masked_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor visible) {
  if (is_half(x)) {
    if (bias) bias = widened(*bias);
    return torch::stable::to(forward<float>(widened(x), widened(weight), bias, visible), x.scalar_type());
  }
  check_dtype(x);
  return (x.scalar_type() == ScalarType::Float ? forward<float> : forward<double>)(x, weight, bias, visible);
}
Tensor masked_linear_dx(Tensor dy, Tensor weight, Tensor visible) {
  if (is_half(dy)) return torch::stable::to(dx<float>(widened(dy), widened(weight), visible), dy.scalar_type());
  check_dtype(dy);
  return (dy.scalar_type() == ScalarType::Float ? dx<float> : dx<double>)(dy, weight, visible);
}
Tensor masked_linear_dweight(Tensor x, Tensor dy, Tensor visible) {
  if (is_half(x)) return torch::stable::to(dweight<float>(widened(x), widened(dy), visible), x.scalar_type());
  check_dtype(x);
  return (x.scalar_type() == ScalarType::Float ? dweight<float> : dweight<double>)(x, dy, visible);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("masked_linear", TORCH_BOX(&flowkernels::masked_linear));
  m.impl("masked_linear_dx", TORCH_BOX(&flowkernels::masked_linear_dx));
  m.impl("masked_linear_dweight", TORCH_BOX(&flowkernels::masked_linear_dweight));
}
