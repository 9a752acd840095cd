// The three products of a masked linear map. Included once per instruction set (for_each_target.h), after their parts.
//
// All three are the `multiply` of staircase_kernel.h; they differ in what is broadcast and what lies in the lanes:
//   forward  y[b][j]  = bias[j] + sum over k < visible[j] of x[b][k] * weight[k][j]    broadcast x,  lanes j
//   dx       dx[b][k] = sum over j >= first[k] of dy[b][j] * weight[k][j]              broadcast dy, lanes k
//   dweight  dweight[k][j] = sum over b of x[b][k] * dy[b][j], k < visible[j]          broadcast x,  lanes j
// Sums have the order of staircase_kernel.h: chains of kChunk terms at absolute positions, added up in ascending order.

namespace flowkernels {
namespace FK_TARGET {

constexpr int64_t kFar = 2048;  // so many terms of the rows of a task go through all panels before the next ones: they stay in the second-level cache

// Rows [r0, r1) of outputs [j0, j1); j0 and j1 are whole panels but for the end
template <class T>
void masked_linear_forward(const MaskedLinearArgs<T>& args, int64_t r0, int64_t r1, int64_t j0, int64_t j1, T* scratch) {
  if (r1 - r0 <= kFewRows) return few_rows(args, r0, r1, j0, j1, scratch);
  for (int64_t begin = 0; begin == 0 || begin < args.inputs; begin += kFar) {
    for (int64_t j = j0, n; j < j1; j += n) {
      n = panel_columns<T>(j1 - j);
      const int64_t end = args.visible[j + n - 1], far = smaller(begin + kFar, end);
      for (int64_t k0 = begin; k0 == 0 || k0 < far; k0 += kChunk) {
        const int64_t k1 = smaller(k0 + kChunk, end);
        const Panel<T> panel{scratch, k0, k1, n, args.visible + j};
        pack(args.weight + j, args.weight_ld, panel);
        panel_rows<false>(args, args.x, args.x_ld, panel, r0, r1, j, k0 == 0, k1 == end);
      }
    }
  }
}

template <class T>
void masked_linear_dx(const MaskedLinearArgs<T>& args, int64_t r0, int64_t r1, int64_t k0, int64_t k1, T* scratch) {
  for (int64_t start = 0; start == 0 || start < args.outputs; start += kFar) {
    for (int64_t k = k0, n; k < k1; k += n) {
      n = panel_columns<T>(k1 - k);
      const int64_t begin = args.first[k];
      for (int64_t c = start; c == start || c < smaller(start + kFar, args.outputs); c += kChunk) {
        const int64_t end = smaller(c + kChunk, args.outputs);
        const bool last = end == args.outputs;
        if (end <= begin && !last) continue;  // a column that nobody sees is written with the last chunk
        const Panel<T> panel{scratch, begin > c ? begin : c, end, n, args.first + k};
        pack_transposed(args.weight + k * args.weight_ld, args.weight_ld, panel);
        panel_rows<true>(args, args.dy, args.dy_ld, panel, r0, r1, k, begin >= c, last);
      }
    }
  }
}

// Compiled in masked_linear.cpp, called from other files too.
#ifndef FK_PRODUCTS
#define FK_PRODUCTS extern
#endif
FK_PRODUCTS template void masked_linear_forward(const MaskedLinearArgs<float>&, int64_t, int64_t, int64_t, int64_t, float*);
FK_PRODUCTS template void masked_linear_forward(const MaskedLinearArgs<double>&, int64_t, int64_t, int64_t, int64_t, double*);
FK_PRODUCTS template void masked_linear_dx(const MaskedLinearArgs<float>&, int64_t, int64_t, int64_t, int64_t, float*);
FK_PRODUCTS template void masked_linear_dx(const MaskedLinearArgs<double>&, int64_t, int64_t, int64_t, int64_t, double*);
FK_PRODUCTS template void masked_linear_dweight(const MaskedLinearArgs<float>&, int64_t, int64_t, float*);
FK_PRODUCTS template void masked_linear_dweight(const MaskedLinearArgs<double>&, int64_t, int64_t, double*);

}  // namespace FK_TARGET
}  // namespace flowkernels
