// The three products of a masked linear map. Included once per instruction set (for_each_target.h), after staircase_kernel.h.
//
// All three are its multiply_add; they differ in what is broadcast and what lies in the lanes:
//   forward  y[b][j]  = bias[j] + sum over k < visible[j] of x[b][k] * weight[k][j]    broadcast x,  lanes j
//   dx       dx[b][k] = sum over j >= first[k] of dy[b][j] * weight[k][j]              broadcast dy, lanes k
//   dweight  dweight[k][j] = sum over b of x[b][k] * dy[b][j], k < visible[j]          broadcast x,  lanes j
// The operand in the lanes is packed into panels of three vectors, because rows of a power of two apart would share a few sets of
// the cache. Sums have the order of staircase_kernel.h: chains of kChunk terms at absolute positions, added up in ascending order.
// A panel holds zeros outside the staircase. Times an infinity those would be NaN, so a tile in which NaN turns up is computed
// again term by term.

namespace flowkernels {
namespace FK_TARGET {

template <class T>
constexpr int64_t kPanel = kRowVectors * lanes<T>;

template <class T>
struct Panel {
  T* data;          // [k1 - k0][kPanel]
  int64_t k0, k1;   // terms of the sum
  int64_t n;        // outputs, at most kPanel
  const int32_t* limits;  // [n], ascending: output i has the terms below (from on) limits[i]
};

// n <= kPanel elements of a row, zeros behind them
template <class T>
FK_INLINE void copy_row(const T* from, int64_t n, T* to) {
  for (int v = 0; v < kRowVectors; ++v) {
    const int64_t left = n - v * lanes<T>;
    store(to + v * lanes<T>, left >= lanes<T> ? load(from + v * lanes<T>) : left > 0 ? load_partial(from + v * lanes<T>, left) : zero<T>());
  }
}

// outputs are columns of the weight, which see the terms before their limit
template <class T>
void pack(const T* weight, int64_t ld, const Panel<T>& p) {
  const int64_t everyone = p.n == kPanel<T> ? smaller(p.k1, p.limits[0]) : p.k0;
  int64_t k = p.k0;
  for (; k < everyone; ++k) copy_row(weight + k * ld, kPanel<T>, p.data + (k - p.k0) * kPanel<T>);
  for (; k < p.k1; ++k) {
    T* to = p.data + (k - p.k0) * kPanel<T>;
    copy_row(weight + k * ld, p.n, to);
    for (int64_t i = 0; i < p.n && p.limits[i] <= k; ++i) to[i] = 0;
  }
}

// outputs are rows of the weight, which see the terms from their limit on
template <class T>
void pack_transposed(const T* weight, int64_t ld, const Panel<T>& p) {
  for (int64_t i = 0; i < kPanel<T>; i += lanes<T>) {
    for (int64_t k = p.k0; k < p.k1;) {
      T* to = p.data + (k - p.k0) * kPanel<T> + i;
      if (i + lanes<T> <= p.n && k + lanes<T> <= p.k1 && p.limits[i + lanes<T> - 1] <= k) {
        Vec<T> block[lanes<T>];
        for (int l = 0; l < lanes<T>; ++l) block[l] = load(weight + (i + l) * ld + k);
        transpose(block);
        for (int l = 0; l < lanes<T>; ++l) store(to + l * kPanel<T>, block[l]);
        k += lanes<T>;
      } else {
        for (int l = 0; l < lanes<T>; ++l) to[l] = i + l < p.n && k >= p.limits[i + l] ? weight[(i + l) * ld + k] : T(0);
        ++k;
      }
    }
  }
}

// One chunk of the sums of U rows. kFrom: see limits above
template <int U, bool kFrom, class T>
FK_INLINE void panel_tile(const T* x, int64_t ld, const Panel<T>& p, T* y, int64_t y_ld) {
  alignas(FK_VECTOR_BYTES) T acc[U * kPanel<T>];
  for (int64_t i = 0; i < U * kPanel<T>; i += lanes<T>) store(acc + i, zero<T>());
  multiply_add<U, kRowVectors>(x + p.k0, ld, 1, p.data, kPanel<T>, acc, kPanel<T>, p.k1 - p.k0);
  IVec<T> bad{};
  for (int64_t i = 0; i < U * kPanel<T>; i += lanes<T>) bad |= load(acc + i) != load(acc + i);
  if (any(bad)) {
    for (int u = 0; u < U; ++u)
      for (int64_t i = 0; i < p.n; ++i) {
        T sum = 0;
        for (int64_t k = p.k0; k < p.k1; ++k)
          if ((k >= p.limits[i]) == kFrom) sum = fma(x[u * ld + k], p.data[(k - p.k0) * kPanel<T> + i], sum);
        acc[u * kPanel<T> + i] = sum;
      }
  }
  for (int u = 0; u < U; ++u) {
    T* to = y + u * y_ld;
    for (int64_t i = 0; i < p.n; i += lanes<T>) {
      const Vec<T> sum = load(acc + u * kPanel<T> + i);
      if (i + lanes<T> <= p.n)
        store(to + i, load(to + i) + sum);
      else
        store_partial(to + i, load_partial(to + i, p.n - i) + sum, p.n - i);
    }
  }
}

template <bool kFrom, class T>
void panel_rows(const T* x, int64_t ld, const Panel<T>& p, T* y, int64_t y_ld, int64_t rows) {
  int64_t r = 0;
  for (; r + kUnits <= rows; r += kUnits) panel_tile<kUnits, kFrom>(x + r * ld, ld, p, y + r * y_ld, y_ld);
  for (; r < rows; ++r) panel_tile<1, kFrom>(x + r * ld, ld, p, y + r * y_ld, y_ld);
}

// Rows [r0, r1) of outputs [j0, j1); j0 and j1 are whole panels but for the end
template <class T>
void masked_linear_forward(const MaskedLinearArgs<T>& args, int64_t r0, int64_t r1, int64_t j0, int64_t j1, T* scratch) {
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t j = j0; j < j1; ++j) args.out[r * args.outputs + j] = args.bias ? args.bias[j] : T(0);
  for (int64_t k0 = 0; k0 < args.inputs; k0 += kChunk) {
    for (int64_t j = j0; j < j1; j += kPanel<T>) {
      const int64_t n = smaller(kPanel<T>, j1 - j), k1 = smaller(smaller(k0 + kChunk, args.inputs), args.visible[j + n - 1]);
      if (k1 <= k0) continue;
      const Panel<T> panel{scratch, k0, k1, n, args.visible + j};
      pack(args.weight + j, args.weight_ld, panel);
      panel_rows<false>(args.x + r0 * args.x_ld, args.x_ld, panel, args.out + r0 * args.outputs + j, args.outputs, r1 - r0);
    }
  }
}

template <class T>
void masked_linear_dx(const MaskedLinearArgs<T>& args, int64_t r0, int64_t r1, int64_t k0, int64_t k1, T* scratch) {
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t k = k0; k < k1; ++k) args.out[r * args.inputs + k] = T(0);
  for (int64_t c = 0; c < args.outputs; c += kChunk) {
    for (int64_t k = k0; k < k1; k += kPanel<T>) {
      const int64_t n = smaller(kPanel<T>, k1 - k), begin = args.first[k] > c ? args.first[k] : c, end = smaller(c + kChunk, args.outputs);
      if (end <= begin) continue;
      const Panel<T> panel{scratch, begin, end, n, args.first + k};
      pack_transposed(args.weight + k * args.weight_ld, args.weight_ld, panel);
      panel_rows<true>(args.dy + r0 * args.dy_ld, args.dy_ld, panel, args.out + r0 * args.inputs + k, args.inputs, r1 - r0);
    }
  }
}

// [rows][kUnits] from n <= kUnits columns of x, zeros behind them
template <class T>
void pack_broadcasts(const T* x, int64_t ld, int64_t rows, int64_t n, T* to) {
  if (n == kUnits) {
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(to + r * kUnits, x + r * ld, kUnits * sizeof(T));
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t u = 0; u < kUnits; ++u) to[r * kUnits + u] = u < n ? x[r * ld + u] : T(0);
  }
}

// U rows of dweight from row k on, one chunk of the batch
template <int U, class T>
FK_INLINE void dweight_tile(const T* x, const T* dy, int64_t rows, const MaskedLinearArgs<T>& args, int64_t k, int64_t j, int64_t n) {
  alignas(FK_VECTOR_BYTES) T acc[U * kPanel<T>];
  for (int64_t i = 0; i < U * kPanel<T>; i += lanes<T>) store(acc + i, zero<T>());
  multiply_add<U, kRowVectors>(x, 1, kUnits, dy, kPanel<T>, acc, kPanel<T>, rows);
  for (int u = 0; u < U && k + u < args.visible[j + n - 1]; ++u) {
    T* to = args.out + (k + u) * args.outputs + j;
    if (n == kPanel<T> && k + u < args.visible[j]) {
      for (int64_t i = 0; i < n; i += lanes<T>) store(to + i, load(to + i) + load(acc + u * kPanel<T> + i));
    } else {
      for (int64_t i = 0; i < n; ++i)
        if (k + u < args.visible[j + i]) to[i] += acc[u * kPanel<T> + i];
    }
  }
}

// Rows [k0, k1) of dweight
template <class T>
void masked_linear_dweight(const MaskedLinearArgs<T>& args, int64_t k0, int64_t k1, T* scratch) {
  for (int64_t i = k0 * args.outputs; i < k1 * args.outputs; ++i) args.out[i] = T(0);
  T *panel = scratch, *broadcasts = scratch + kChunk * kPanel<T>;  // broadcasts: [group of kUnits inputs][row][kUnits]
  for (int64_t b = 0; b < args.batch; b += kChunk) {
    const int64_t rows = smaller(kChunk, args.batch - b);
    for (int64_t k = k0; k < k1; k += kUnits)
      pack_broadcasts(args.x + b * args.x_ld + k, args.x_ld, rows, smaller(kUnits, k1 - k), broadcasts + (k - k0) * kChunk);
    for (int64_t j = 0; j < args.outputs; j += kPanel<T>) {
      const int64_t n = smaller(kPanel<T>, args.outputs - j), end = smaller(k1, args.visible[j + n - 1]);
      if (end <= k0) continue;
      if (n == kPanel<T>)
        for (int64_t r = 0; r < rows; ++r) copy_row(args.dy + (b + r) * args.dy_ld + j, kPanel<T>, panel + r * kPanel<T>);
      else
        for (int64_t r = 0; r < rows; ++r) copy_row(args.dy + (b + r) * args.dy_ld + j, n, panel + r * kPanel<T>);
      for (int64_t k = k0; k < end; k += kUnits) dweight_tile<kUnits>(broadcasts + (k - k0) * kChunk, panel, rows, args, k, j, n);
    }
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
