// The tile kernel of masked matmuls. Lanes are batch rows in what follows, and outputs for those who call `multiply`. Included once per
// instruction set (for_each_target.h).
//
//   acc[j][r] += sum over k in [k0, k1) with k < visible[j] of weight[k][j] * h[k][r]
//
// The order of every sum is fixed: inputs come in chunks of kChunk at absolute positions; within a chunk one chain of fused
// multiply-adds in ascending k; finished chunks are added to `total`. Neither the tile's shape nor the order in which blocks of the
// staircase are visited changes it, so a row's bits depend on nothing but the row. One chain of 3,000 terms would be 4 to 8 times
// less accurate than chunks of 256.

namespace flowkernels {
namespace FK_TARGET {

constexpr int64_t kBlock = 64;  // most inputs of one pass: 64 x 96 rows of h stay in the first-level cache
constexpr int kRowVectors = 3;  // with 4 (8) units, 12 (24) independent chains hide the latency of a multiply-add
constexpr int kUnits = FK_REGISTERS >= 32 ? 8 : 4;
constexpr int kUnitsOfFour = FK_REGISTERS >= 32 ? 6 : 2;  // units that 4 vectors leave registers for

template <class T>
alignas(64) constexpr T kZeros[kRowVectors * lanes<T>] = {};

template <int N>
struct Count {
  static constexpr int value = N;
};

template <class T>
struct Tile {
  const T* h;  // [inputs][rows]
  T* acc;      // [outputs][rows]: the chunk under way; its first terms overwrite what was there
  T* total;    // [outputs][rows]: bias, context and finished chunks
  int64_t rows;
  const T* start;  // [outputs]: what totals begin with when the first chunk is finished; null where they hold it already
  bool relu;       // the last block is the last of these sums, all of which have its inputs and no chunk before: acc gets relu(start + sum)
};

// sum[u][v] += sum over k < K of a[u * a_unit + k * a_step] * b[k * b_step + v], for U values u and the vectors v from FROM to V. K >= 1: a
// loop that might not run would cost a spill of every sum. AHEAD: at every k, asks for the values of `a` so far on, which need not exist.
template <int U, int V, int FROM = 0, int AHEAD = 0, int ALL, class T>
FK_INLINE void multiply(const T* a, int64_t a_unit, int64_t a_step, const T* b, int64_t b_step, int64_t K, Vec<T> (&sum)[U][ALL]) {
  do {
    Vec<T> x[V];
    if constexpr (AHEAD > 0) __builtin_prefetch(ahead(a, AHEAD));
    for (int v = FROM; v < V; ++v) x[v] = load(b + v * lanes<T>);
    for (int u = 0; u < U; ++u) {
      const Vec<T> w = broadcast<T>(a[u * a_unit]);
      for (int v = FROM; v < V; ++v) sum[u][v] = fma(w, x[v], sum[u][v]);
    }
    a += a_step;
    b += b_step;
  } while (--K > 0);
}

// The same, added to acc[u][v] in memory, or written there by the first terms of a chunk. RELU: relu(start[u] + sum) is
template <int U, int V, int AHEAD, bool RELU, class T>
FK_INLINE void multiply_add(const T* a, int64_t a_unit, int64_t a_step, const T* b, int64_t b_step, T* acc, int64_t acc_unit, int64_t K,
                            bool first, const T* start) {
  Vec<T> sum[U][V];
  if (first) {
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < V; ++v) sum[u][v] = zero<T>();
  } else {
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < V; ++v) sum[u][v] = load(acc + u * acc_unit + v * lanes<T>);
  }
  multiply<U, V, 0, AHEAD>(a, a_unit, a_step, b, b_step, K, sum);
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < V; ++v)
      store(acc + u * acc_unit + v * lanes<T>, RELU ? activate<Activation::relu>(broadcast<T>(start[u]) + sum[u][v]) : sum[u][v]);
}

template <int U, bool RELU, class T>
void multiply_add_rows(const T* weight, int64_t ld, const T* h, T* acc, int64_t rows, int64_t K, bool first, const T* start) {
  constexpr int64_t L = lanes<T>;
  // the weights of the units of the next cache line, which rows of weights pages apart keep from coming by themselves
  constexpr int kAhead = U > 2 ? 64 / sizeof(T) : 0;
  int64_t r = 0;
  const auto vectors = [&](auto count) FK_BODY {
    constexpr int V = decltype(count)::value;
    if (U >= kUnitsOfFour && V >= kRowVectors && r > 0)  // fetched
      multiply_add<U, V, 0, RELU>(weight, 1, ld, h + r, rows, acc + r, rows, K, first, start);
    else
      multiply_add<U, V, kAhead, RELU>(weight, 1, ld, h + r, rows, acc + r, rows, K, first, start);
    r += V * L;
  };
  if constexpr (U <= 2) {  // a few units make up for it with more vectors
    while (r + 2 * kRowVectors * L <= rows) vectors(Count<2 * kRowVectors>{});
    if (rows - r == 5 * L) return vectors(Count<5>{});
  }
  if constexpr (U <= kUnitsOfFour) {
    while (rows - r >= 4 * L && (U > 2 || rows - r == 4 * L)) vectors(Count<4>{});
  }
  if constexpr (U <= kUnits) {
    // four vectors are better two and two than three and one
    while (r + kRowVectors * L <= rows && rows - r != (kRowVectors + 1) * L) vectors(Count<kRowVectors>{});
    while (r + 2 * L <= rows) vectors(Count<2>{});
  }
  while (r < rows) vectors(Count<1>{});
}

// first: the chunk is the first of its sums
template <class T>
void flush_chunk(const Tile<T>& tile, int64_t j0, int64_t j1, bool first) {
  if (first && tile.start) {
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t i = j * tile.rows; i < (j + 1) * tile.rows; i += lanes<T>) store(tile.total + i, broadcast<T>(tile.start[j]) + load(tile.acc + i));
    return;
  }
  for (int64_t i = j0 * tile.rows; i < j1 * tile.rows; i += lanes<T>) store(tile.total + i, load(tile.total + i) + load(tile.acc + i));
}

// K more inputs for n units from j on
template <class T>
FK_INLINE void push_units(const T* weight, int64_t ld, const T* h, const Tile<T>& tile, int64_t j, int n, int64_t K) {
  const auto some = [&](auto units) {
    multiply_add_rows<decltype(units)::value, false>(weight, ld, h, tile.acc + j * tile.rows, tile.rows, K, false, tile.start);
    weight += decltype(units)::value;
    j += decltype(units)::value;
  };
  if (n & 4) some(Count<4>{});
  if (n & 2) some(Count<2>{});
  if (n & 1) some(Count<1>{});
}

// K inputs from k0 for the units [j0, j1), of which unit j sees min(K, visible[j] - k0) > 0. weight: of input k0 and unit j0
template <int U, bool RELU, class T>
void push_block(const T* weight, int64_t ld, const int32_t* visible, const Tile<T>& tile, int64_t k0, int64_t K, int64_t j0, int64_t j1) {
  const T* h = tile.h + k0 * tile.rows;
  const auto some = [&](auto units, int64_t j, int64_t shared) {
    multiply_add_rows<decltype(units)::value, RELU>(weight + (j - j0), ld, h, tile.acc + j * tile.rows, tile.rows, shared, k0 % kChunk == 0,
                                                    RELU ? tile.start + j : nullptr);
  };
  for (int64_t j = j0; j < j1;) {
    const int64_t shared = visible ? smaller(K, visible[j] - k0) : K;  // what all units from j on see
    if (j + U <= j1) {
      some(Count<U>{}, j, shared);
      for (int u = 1; shared < K && u < U;) {  // the step of the staircase inside these units
        const int64_t seen = smaller(K, visible[j + u] - k0);
        int n = 1;
        while (u + n < U && smaller(K, visible[j + u + n] - k0) == seen) ++n;
        if (seen > shared) push_units(weight + shared * ld + (j + u - j0), ld, h + shared * tile.rows, tile, j + u, n, seen - shared);
        u += n;
      }
      j += U;
    } else if (U > 2 && j + 2 <= j1 && (!visible || smaller(K, visible[j + 1] - k0) == shared)) {
      some(Count<2>{}, j, shared);
      j += 2;
    } else {
      some(Count<1>{}, j, shared);
      j += 1;
    }
  }
}

// Rows of weights whole pages apart share one set of the first-level cache, which has lost a line before the next four units, or rows, want
// it: for each of those K lines come from the second level again, at 7 cycles a line on a Zen 4. Where the products take less, the lines are
// copied, once for all units in them: D=784, H=1024x2, batch 100 in 2.8 ms instead of 3.4 there.
template <class T>
bool shares_a_set(int64_t ld, int64_t K, int64_t vectors) {
  return FK_REGISTERS < 32 && ld * static_cast<int64_t>(sizeof(T)) % 4096 == 0 && K >= 16 && vectors > 1 && vectors != kRowVectors;
}

template <int U, bool RELU, class T>
void push_copied(const T* weight, int64_t ld, const int32_t* visible, const Tile<T>& tile, int64_t k0, int64_t K, int64_t j0, int64_t j1) {
  constexpr int64_t kLine = 64 / sizeof(T);
  alignas(64) T copy[kBlock * kLine];
  for (int64_t j = j0; j < j1;) {
    const int64_t begin = j / kLine * kLine, end = smaller(j1, begin + kLine), n = end - begin;
    const int64_t seen = visible ? smaller(K, visible[end - 1] - k0) : K;
    const T* from = weight - (j0 - begin);
    for (int64_t k = 0; k < seen; ++k, from += ld) {
      __builtin_prefetch(ahead(from, kLine), 0, 2);
      for (int64_t i = 0; i < n; i += lanes<T>) store(copy + k * kLine + i, load_some(from + i, n - i));
    }
    push_block<U, RELU>(copy + (j - begin), kLine, visible, tile, k0, seen, j, end);
    j = end;
  }
}

// visible null: every unit sees every input
template <class T>
void push(const T* weight, int64_t ld, const int32_t* visible, const Tile<T>& tile, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
  const int64_t vectors = tile.rows / lanes<T>;
  while (k0 < k1 && j0 < j1) {
    if (visible && visible[j0] <= k0) {  // units before the staircase reaches k0 are done
      ++j0;
      continue;
    }
    if (k0 > 0 && k0 % kChunk == 0) flush_chunk(tile, j0, j1, k0 == kChunk);
    // within a chunk, blocks of even size: a last one of a few inputs would load and store every sum for little
    const int64_t of_chunk = smaller(k1, (k0 / kChunk + 1) * kChunk) - k0, blocks = (of_chunk + kBlock - 1) / kBlock;
    const int64_t K = (of_chunk + blocks - 1) / blocks;
    const auto block = [&](auto units) {
      constexpr int U = decltype(units)::value;
      const T* first = weight + k0 * ld + j0;
      const bool relu = tile.relu && k0 + K == k1;
      if (shares_a_set<T>(ld, K, vectors))
        relu ? push_copied<U, true>(first, ld, visible, tile, k0, K, j0, j1) : push_copied<U, false>(first, ld, visible, tile, k0, K, j0, j1);
      else
        relu ? push_block<U, true>(first, ld, visible, tile, k0, K, j0, j1) : push_block<U, false>(first, ld, visible, tile, k0, K, j0, j1);
    };
    if (kUnits < 8 && vectors == 1)  // more units make up for the chains
      block(Count<8>{});
    else if (kUnits == 8 && vectors % 4 == 0 && vectors % kRowVectors > 0 && j1 - j0 > 2 * kUnits)
      block(Count<kUnitsOfFour>{});
    else
      block(Count<kUnits>{});
    k0 += K;
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
