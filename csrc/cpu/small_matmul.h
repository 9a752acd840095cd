// Products of small matrices that lie in the first-level cache. No include guard: kernel headers include this once per instruction set.

namespace flowkernels {
namespace FK_TARGET {

constexpr int kMostMatmulRows = 8;

// M rows and N vectors of to (+)= a b
template <class T, int M, int N, bool ADD>
FK_INLINE void matmul_block(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, T* to, int64_t to_row) {
  Vec<T> sum[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sum[m][n] = ADD ? load(to + m * to_row + n * lanes<T>) : zero<T>();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[N];
    for (int n = 0; n < N; ++n) row[n] = load(b + k * b_row + n * lanes<T>);
    for (int m = 0; m < M; ++m) {
      const Vec<T> factor = broadcast(a[m * a_row + k * a_step]);
      for (int n = 0; n < N; ++n) sum[m][n] = fma(factor, row[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) store(to + m * to_row + n * lanes<T>, sum[m][n]);
  }
}

template <class T, int M, int N, bool ADD>
FK_CALL void matmul_columns(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, T* to,
                            int64_t to_row) {
  for (int64_t m = 0; m < rows; m += M) matmul_block<T, M, N, ADD>(depth, a + m * a_row, a_row, a_step, b, b_row, to + m * to_row, to_row);
}

// to[m][n] = sum over k < depth of a[m * a_row + k * a_step] * b[k][n], or to[m][n] += it, in ascending order of k. `columns` is a whole
// number of vectors. Up to kMostMatmulRows - 1 rows beyond the last of a and `to` are read and written.
template <class T, bool ADD>
FK_INLINE void small_matmul(int64_t rows, int64_t depth, int64_t columns, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row,
                            T* to, int64_t to_row) {
  constexpr int64_t L = lanes<T>;
  for (int64_t n = 0; n < columns;) {  // as many accumulators as 16 registers can hold beside their operands
    const int64_t left = (columns - n) / L;
    if (left == 3 || left > 4) {
      matmul_columns<T, 4, 3, ADD>(rows, depth, a, a_row, a_step, b + n, b_row, to + n, to_row);
      n += 3 * L;
    } else if (left >= 2) {
      matmul_columns<T, 6, 2, ADD>(rows, depth, a, a_row, a_step, b + n, b_row, to + n, to_row);
      n += 2 * L;
    } else {
      matmul_columns<T, 8, 1, ADD>(rows, depth, a, a_row, a_step, b + n, b_row, to + n, to_row);
      n += L;
    }
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
