// The gradient of a masked linear map's weight, from both operands packed. Included once per instruction set, after
// masked_linear_tile_kernel.h.

namespace flowkernels {
namespace FK_TARGET {

// elements from one packed group of kUnits columns to the next: an odd number of cache lines, which do not share a set
template <class T>
constexpr int64_t kGroup = kChunk * kUnits + 64 / int64_t(sizeof(T));

// [group of columns][row][kUnits] of x, zeros beyond the last column
template <class T>
void pack_broadcasts(const T* x, int64_t ld, int64_t rows, int64_t columns, T* to) {
  const int64_t whole = columns / kUnits * kUnits;
  for (int64_t r = 0; r < rows; ++r, x += ld, to += kUnits) {
    T* group = to;
    for (int64_t c = 0; c < whole; c += kUnits, group += kGroup<T>) __builtin_memcpy(group, x + c, kUnits * sizeof(T));
    for (int64_t u = 0; whole < columns && u < kUnits; ++u) group[u] = whole + u < columns ? x[whole + u] : T(0);
  }
}

constexpr int64_t kPanels = 4;  // panels of dy that are packed together: rows so long are read at the memory's rate

// elements from one packed panel to the next
template <class T>
constexpr int64_t kPackedPanel = kChunk * kPanel<T> + 5 * 64 / int64_t(sizeof(T));

// n <= kPanel elements of a row, zeros behind them in their last vector
template <class T>
FK_INLINE void copy_row(const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += lanes<T>) store(to + i, load_some(from + i, n - i));
}

struct Panels {
  int count;
  int64_t begin[kPanels + 1];  // the first column of each, and where the last ends
};

// Up to kPanels panels of columns from j on
template <class T>
FK_INLINE Panels panels_from(int64_t j, int64_t columns) {
  Panels panels{0, {j}};
  for (; panels.count < kPanels && j < columns; panels.begin[++panels.count] = j) j += panel_columns<T>(columns - j);
  return panels;
}

// [panel][kChunk rows][kPanel] of dy
template <class T>
void pack_panels(const T* dy, int64_t ld, int64_t rows, const Panels& panels, T* to) {
  for (int64_t r = 0; r < rows; ++r, dy += ld, to += kPanel<T>)
    for (int i = 0; i < panels.count; ++i) {
      const int64_t j = panels.begin[i], n = panels.begin[i + 1] - j;
      T* at = to + i * kPackedPanel<T>;
      n == kPanel<T> ? copy_row(dy + j, kPanel<T>, at) : copy_row(dy + j, n, at);
    }
}

// Stores sums of rows of dweight from row k on, or adds them to what is there; zeros outside the staircase
template <class T>
void store_inside(const Vec<T>* sum, int64_t rows, const MaskedLinearArgs<T>& args, int64_t k, int64_t j, int64_t n, bool first) {
  rows = smaller(rows, args.inputs - k);
  for (int64_t v = 0, i = 0; i < n; ++v, i += lanes<T>) {
    IVec<T> seen{};  // how many of the rows from k on each column sees
    for (int l = 0; l < lanes<T>; ++l) seen[l] = i + l < n ? args.visible[j + i + l] - k : 0;
    T* at = args.out + k * args.out_ld + j + i;
    for (int64_t u = 0; u < rows; ++u, at += args.out_ld, seen -= 1) {
      const Vec<T> inside = select(seen > 0, sum[u * kRowVectors + v], zero<T>());
      store_some(at, first ? inside : load_some(at, n - i) + inside, n - i);
    }
  }
}

// U rows of dweight from row k on, one chunk of the batch; the first one is not added to what was there
template <int U, class T>
FK_CALL void dweight_tile(const T* x, const T* dy, int64_t rows, const MaskedLinearArgs<T>& args, int64_t k, int64_t j, int64_t n, bool first) {
  constexpr int64_t L = lanes<T>;
  Vec<T> sum[U][kRowVectors];
  T* const out = args.out + k * args.out_ld + j;
  for (int u = 0; u < U && !first; ++u)  // what the sums are added to comes while they are made
    for (int v = 0; v < kRowVectors; ++v)
      __builtin_prefetch(ahead(out, u * args.out_ld + v * L), 1);
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < kRowVectors; ++v) sum[u][v] = zero<T>();
  const auto vectors = [&](auto from, auto to) FK_BODY {
    multiply<U, decltype(to)::value, decltype(from)::value>(x, 1, kUnits, dy, kPanel<T>, rows, sum);
  };
  const bool second = n > L && args.visible[j + L - 1] <= k;  // the staircase begins after the first vector, or after the second
  if (n > 2 * L && args.visible[j + 2 * L - 1] <= k)
    vectors(Count<2>{}, Count<3>{});
  else if (n > 2 * L && second)
    vectors(Count<1>{}, Count<3>{});
  else if (n > 2 * L)
    vectors(Count<0>{}, Count<3>{});
  else if (second)
    vectors(Count<1>{}, Count<2>{});
  else if (n > L)
    vectors(Count<0>{}, Count<2>{});
  else
    vectors(Count<0>{}, Count<1>{});
  const auto store_whole = [&](auto whole) FK_BODY {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 3
      for (int v = 0; v < decltype(whole)::value; ++v) {
        T* at = out + u * args.out_ld + v * L;
        store(at, first ? sum[u][v] : load(at) + sum[u][v]);
      }
  };
  if (k + U <= args.visible[j]) {
    if (n == kPanel<T>) return store_whole(Count<3>{});
    if (n == 2 * L) return store_whole(Count<2>{});
  }
  Vec<T> kept[U][kRowVectors];
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < kRowVectors; ++v) kept[u][v] = sum[u][v];
  store_inside(kept[0], U, args, k, j, n, first);
}

// Rows [k0, k1) of dweight
template <class T>
void masked_linear_dweight(const MaskedLinearArgs<T>& args, int64_t k0, int64_t k1, T* scratch) {
  T *packed = scratch, *broadcasts = scratch + kPanels * kPackedPanel<T>;
  // the first panel of which a column sees input k; none before it is written by tiles
  int64_t begin = 0;
  const auto begin_at = [&](int64_t k) {
    for (int64_t n; begin < args.outputs && args.visible[begin + (n = panel_columns<T>(args.outputs - begin)) - 1] <= k;) begin += n;
    return begin;
  };
  const int64_t j_begin = begin_at(k0);
  const bool writes = !args.finish.accumulate;
  for (int64_t k = k0; k < k1 && writes; k += kUnits) {
    const int64_t end = args.batch > 0 ? begin_at(k) : args.outputs;
    for (int64_t i = k; i < smaller(k + kUnits, k1); ++i)
      for (int64_t j = 0; j < end; ++j) args.out[i * args.out_ld + j] = T(0);
  }
  for (int64_t b = 0; b < args.batch; b += kChunk) {
    const int64_t rows = smaller(kChunk, args.batch - b);
    const bool first = b == 0 && writes;
    pack_broadcasts(args.x + b * args.x_ld + k0, args.x_ld, rows, k1 - k0, broadcasts);
    for (int64_t j0 = j_begin; j0 < args.outputs;) {
      const Panels panels = panels_from<T>(j0, args.outputs);
      pack_panels(args.dy + b * args.dy_ld, args.dy_ld, rows, panels, packed);
      for (int i = 0; i < panels.count; ++i) {
        const int64_t j = panels.begin[i], n = panels.begin[i + 1] - j, end = smaller(k1, args.visible[j + n - 1]);
        for (int64_t k = k0; k < end; k += kUnits)
          dweight_tile<kUnits>(broadcasts + (k - k0) / kUnits * kGroup<T>, packed + i * kPackedPanel<T>, rows, args, k, j, n, first);
      }
      j0 = panels.begin[panels.count];
    }
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
