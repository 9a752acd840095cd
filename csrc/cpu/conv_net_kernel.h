// Glow's conditioner. Included once per instruction set, after columns.h and staircase_kernel.h.
//
// Lanes are output channels, and what is broadcast are channels of positions: images lie in rows of width + 1 positions, of which the last
// is zero, the right neighbour of the last pixel and the left one of the first pixel below. So a row of three taps is one run of memory, and
// tiles of positions go on over the ends of rows; what they find for the zero positions is thrown away.
// A strip of positions passes through the first two convolutions while it is in the first-level cache. Sums are made as in
// staircase_kernel.h: chains of up to kChunk terms, ending with a row of taps where all do not fit in one, added up in ascending order.

namespace flowkernels {
namespace FK_TARGET {

constexpr int64_t kStrip = 6 * kUnits;  // positions: whole tiles of every width
constexpr int64_t kMostPositions = 3 * kUnits / 2;

// positions of a tile of V vectors: fewer vectors make up for it, as weights come from the second-level cache
template <int V>
constexpr int kPositions = V < kRowVectors ? kMostPositions : kUnits;

template <class T>
int64_t whole_vectors(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

template <class T>
size_t packed_convolution_bytes(const Convolution<T>& c) {
  return whole_vectors<T>(c.outputs) * c.terms() * sizeof(T);
}

// run(panel's first output, a Count of its vectors) for all panels of a convolution: three vectors, or two rather than leave one
template <class T, class F>
FK_INLINE void for_each_panel(const Convolution<T>& c, const F& run) {
  static_assert(kRowVectors == 3);
  int64_t j = 0, left = (c.outputs + lanes<T> - 1) / lanes<T>;
  const auto panel = [&](auto vectors) __attribute__((always_inline)) {
    run(j, vectors);
    j += decltype(vectors)::value * lanes<T>;
    left -= decltype(vectors)::value;
  };
  while (left == 3 || left > 4) panel(Count<3>{});
  while (left >= 2) panel(Count<2>{});
  if (left == 1) panel(Count<1>{});
}

// [panel][term][output], zeros behind the last output
template <class T>
void pack_convolution(const Convolution<T>& c) {
  const int64_t terms = c.terms();
  for_each_panel(c, [&](int64_t j, auto vectors) {
    constexpr int64_t width = decltype(vectors)::value * lanes<T>;
    read_columns(c.weight + j * terms, terms, smaller(width, c.outputs - j), terms, nullptr, c.packed + j * terms, width);
  });
}

template <class T>
void conv_net_gain(const T* log_gain, int64_t n, T* gain) {
  for (int64_t j = 0; j < n; j += lanes<T>) store(gain + j, exp(load_some(log_gain + j, n - j) * T(3)));
}

// made(u, v, sum) for outputs of a convolution from j on, V vectors of them, at U positions, without bias. x: the first tap of the first
// position; a row of taps is x_row further on.
template <int U, int V, class T, class F>
FK_INLINE void position_sums(const Convolution<T>& c, const T* x, int64_t x_row, int64_t j, const F& made) {
  const int64_t each = c.row_terms();
  const T* weight = c.packed + j * c.terms();
  const auto chain = [&](const T* from, int64_t n, int64_t row, int64_t rows, const auto& use) __attribute__((always_inline)) {
    Vec<T> sum[U][V];
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < V; ++v) sum[u][v] = zero<T>();
    for (int64_t r = 0; r < rows; ++r, from += row, weight += n * V * lanes<T>)
      multiply<U, V>(from, c.inputs, 1, weight, V * lanes<T>, n, sum);
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < V; ++v) use(u, v, sum[u][v]);
  };
  if (c.terms() <= kChunk) return chain(x, each, x_row, c.taps, made);
  alignas(64) T total[U * V * lanes<T>];  // in memory, or it would take the registers of the sums
  const auto at = [&](int u, int v) __attribute__((always_inline)) { return total + (u * V + v) * lanes<T>; };
  for (int u = 0; u < U * V; ++u) store(total + u * lanes<T>, zero<T>());
  for (int64_t row = 0; row < c.taps; ++row)
    for (int64_t k = 0; k < each; k += kChunk)
      chain(x + row * x_row + k, smaller(kChunk, each - k), 0, 1, [&](int u, int v, Vec<T> sum) __attribute__((always_inline)) {
        store(at(u, v), load(at(u, v)) + sum);
      });
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < V; ++v) made(u, v, load(at(u, v)));
}

// relu of a convolution at n positions, to `to`, [position][outputs]; more may be written, up to whole tiles
template <class T>
void hidden_positions(const Convolution<T>& c, const T* x, int64_t x_row, int64_t n, T* to) {
  for_each_panel(c, [&](int64_t j, auto vectors) {
    constexpr int V = decltype(vectors)::value, U = kPositions<V>;
    Vec<T> bias[V];
    for (int v = 0; v < V; ++v) bias[v] = load_some(c.bias + j + v * lanes<T>, c.outputs - j - v * lanes<T>);
    for (int64_t p = 0; p < n; p += U)
      position_sums<U, V>(c, x + p * c.inputs, x_row, j, [&](int u, int v, Vec<T> sum) __attribute__((always_inline)) {
        const int64_t output = j + v * lanes<T>;
        store_some(to + (p + u) * c.outputs + output, activate<Activation::relu>(sum + bias[v]), c.outputs - output);
      });
  });
}

// The last convolution at the pixels of `rows` rows, to y, [rows][width][outputs]
template <class T>
void output_rows(const ConvNetArgs<T>& args, const T* hidden, int64_t rows, T* y) {
  const Convolution<T>& c = args.out;
  const int64_t row = args.width + 1;
  for_each_panel(c, [&](int64_t j, auto vectors) {
    constexpr int V = decltype(vectors)::value, U = kPositions<V>;
    Vec<T> bias[V], gain[V];
    for (int v = 0; v < V; ++v) {
      bias[v] = load_some(c.bias + j + v * lanes<T>, c.outputs - j - v * lanes<T>);
      gain[v] = load(args.gain + j + v * lanes<T>);
    }
    T* to = y + j;
    for (int64_t p = 0, column = 0; p < rows * row; p += U) {
      T outputs[U][V * lanes<T>];
      position_sums<U, V>(c, hidden + p * c.inputs, row * c.inputs, j, [&](int u, int v, Vec<T> sum) __attribute__((always_inline)) {
        store(outputs[u] + v * lanes<T>, (sum + bias[v]) * gain[v]);
      });
      for (int64_t u = 0; u < smaller(U, rows * row - p); ++u) {
        if (column == args.width) {
          column = 0;
          continue;
        }
        for (int v = 0; v < V; ++v) store_some(to + v * lanes<T>, load(outputs[u] + v * lanes<T>), c.outputs - j - v * lanes<T>);
        to += c.outputs;
        ++column;
      }
    }
  });
}

// elements of scratch: rows of x, rows of the hidden layers, a strip of the first one; tiles read and write past the ends of all
template <class T>
struct ConvNetScratch {
  int64_t x, hidden, strip;
  explicit ConvNetScratch(const ConvNetArgs<T>& args) {
    const int64_t row = args.width + 1, more = kMostPositions + 3;
    x = whole_vectors<T>(((args.rows + 4) * row + more) * args.in.inputs);
    hidden = whole_vectors<T>(((args.rows + 2) * row + more) * args.out.inputs);
    strip = kStrip * args.mid.inputs;
  }
};

template <class T>
size_t conv_net_scratch_bytes(const ConvNetArgs<T>& args) {
  const ConvNetScratch<T> sizes(args);
  return (sizes.x + sizes.hidden + sizes.strip) * sizeof(T);
}

template <class T>
FK_INLINE void set_zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = T(0);
}

// Zeros where rows of [position][channels] are padded: before the first pixel, and after the last of each row
template <class T>
void zero_ends(T* rows, int64_t n, int64_t width, int64_t channels) {
  for (int64_t r = 0; r <= n; ++r) set_zero(rows + r * (width + 1) * channels, channels);
}

template <class T>
void conv_net_band(const ConvNetArgs<T>& args, int64_t image, int64_t y0, T* scratch) {
  const ConvNetScratch<T> sizes(args);
  T *x = scratch, *hidden = x + sizes.x, *strip = hidden + sizes.hidden;
  const int64_t width = args.width, row = width + 1, channels = args.in.inputs, units = args.mid.outputs;
  const int64_t y1 = smaller(y0 + args.rows, args.height);
  // rows of the hidden layers that exist, and of x that they see
  const int64_t h0 = y0 > 0 ? y0 - 1 : 0, h1 = smaller(y1 + 1, args.height);
  for (int64_t y = h0 - 1; y <= h1; ++y) {
    T* to = x + (y - (h0 - 1)) * row * channels;
    if (y < 0 || y >= args.height)
      set_zero(to, row * channels);
    else
      __builtin_memcpy(to + channels, args.x + (image * args.height + y) * width * channels, width * channels * sizeof(T));
  }
  zero_ends(x, h1 - h0 + 2, width, channels);

  T* const first = hidden + (h0 - (y0 - 1)) * row * units;  // row h0
  const int64_t positions = (h1 - h0) * row;
  for (int64_t p = 0; p < positions; p += kStrip) {
    const int64_t n = smaller(kStrip, positions - p);
    hidden_positions(args.in, x + p * channels, row * channels, n, strip);
    hidden_positions(args.mid, strip, int64_t(0), n, first + (1 + p) * units);
  }
  if (y0 == 0) set_zero(hidden, row * units);
  if (y1 == args.height) set_zero(hidden + (y1 - (y0 - 1)) * row * units, (row + 1) * units);
  zero_ends(hidden, y1 - y0 + 2, width, units);
  output_rows(args, hidden, y1 - y0, args.y + (image * args.height + y0) * width * args.out.outputs);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
