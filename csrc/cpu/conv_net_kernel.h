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
FK_INLINE void set_zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = T(0);
}

template <class T>
int64_t packed_convolution_size(const Convolution<T>& c) {
  return whole_vectors<T>(c.outputs) * c.terms();
}

// run(panel's first output, a Count of its vectors) for all panels of a convolution: three vectors, or two rather than leave one
template <class T, class F>
FK_INLINE void for_each_panel(const Convolution<T>& c, const F& run) {
  static_assert(kRowVectors == 3);
  int64_t j = 0, left = (c.outputs + lanes<T> - 1) / lanes<T>;
  const auto panel = [&](auto vectors) FK_BODY {
    run(j, vectors);
    j += decltype(vectors)::value * lanes<T>;
    left -= decltype(vectors)::value;
  };
  while (left == 3 || left > 4) panel(Count<3>{});
  while (left >= 2) panel(Count<2>{});
  if (left == 1) panel(Count<1>{});
}

// place[i] = the term that element i of an output's weights is
template <class T>
void find_terms(const Convolution<T>& c, int64_t* place) {
  const int64_t taps = c.taps * c.taps;
  for (int64_t k = 0; k < c.inputs; ++k)
    for (int64_t tap = 0; tap < taps; ++tap) *place++ = tap * c.inputs + k;
}

// [panel][term][output], zeros behind the last output. place: from find_terms
template <class T>
void pack_convolution(const Convolution<T>& c, const int64_t* place) {
  const int64_t terms = c.terms();
  for_each_panel(c, [&](int64_t j, auto vectors) {
    constexpr int64_t width = decltype(vectors)::value * lanes<T>;
    read_columns(c.weight + j * terms, terms, smaller(width, c.outputs - j), terms, place, c.packed + j * terms, width);
  });
}

// The same of the convolution that carries gradients from the outputs of `weight`, [inputs][outputs][taps][taps] by what they are here, to
// its inputs: taps in reverse. scratch: [taps * taps][whole vectors of outputs]
template <class T>
void pack_reverse_convolution(const Convolution<T>& c, T* scratch) {
  const int64_t taps = c.taps * c.taps, width = whole_vectors<T>(c.outputs);
  for (int64_t k = 0; k < c.inputs; ++k) {
    read_columns(c.weight + k * c.outputs * taps, taps, c.outputs, taps, nullptr, scratch, width);
    for_each_panel(c, [&](int64_t j, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      for (int64_t tap = 0; tap < taps; ++tap) {
        T* to = c.packed + j * c.terms() + ((taps - 1 - tap) * c.inputs + k) * V * lanes<T>;
        for (int v = 0; v < V; ++v) store(to + v * lanes<T>, load(scratch + tap * width + j + v * lanes<T>));
      }
    });
  }
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
  const auto chain = [&](const T* from, int64_t n, int64_t row, int64_t rows, const auto& use) FK_BODY {
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
  const auto at = [&](int u, int v) FK_BODY { return total + (u * V + v) * lanes<T>; };
  for (int u = 0; u < U * V; ++u) store(total + u * lanes<T>, zero<T>());
  for (int64_t row = 0; row < c.taps; ++row)
    for (int64_t k = 0; k < each; k += kChunk)
      chain(x + row * x_row + k, smaller(kChunk, each - k), 0, 1, [&](int u, int v, Vec<T> sum) FK_BODY {
        store(at(u, v), load(at(u, v)) + sum);
      });
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < V; ++v) made(u, v, load(at(u, v)));
}

// Rows of an image, [row][width + 1][channels] behind one position more, zeros around the pixels. Tiles read and write past the end.
template <class T>
struct PaddedRows {
  T* data;
  int64_t width, channels, top;  // the image's row that is the first one here

  // with a position before the first, those of a last tile, and the vector that begins at the last value
  static int64_t size(int64_t rows, int64_t width, int64_t channels) {
    return whole_vectors<T>((rows * (width + 1) + kMostPositions + 3) * channels + kRowVectors * lanes<T>);
  }

  int64_t row() const { return (width + 1) * channels; }
  T* pixels(int64_t y) const { return data + (y - top) * row() + channels; }
  T* taps(int64_t y) const { return data + (y - 1 - top) * row(); }  // the first of 3 x 3 around the first pixel of row y

  // Zeros before the first pixel and after the last of each of n rows
  void zero_ends(int64_t n) const {
    for (int64_t r = 0; r <= n; ++r) set_zero(data + r * row(), channels);
  }
  // also where rows before or after the image are among them
  void zero_outside(int64_t y, int64_t height) const {
    if (y < 0 || y >= height) set_zero(pixels(y), row());
  }

  // n rows of an image, times `factor` by channel if there is one
  void load_from(const T* image, int64_t height, int64_t n, const T* factor = nullptr) const {
    for (int64_t y = top; y < top + n; ++y) {
      zero_outside(y, height);
      if (y < 0 || y >= height) continue;
      const T* from = image + y * width * channels;
      if (!factor)
        __builtin_memcpy(pixels(y), from, width * channels * sizeof(T));
      else
        for (int64_t x = 0; x < width; ++x)
          for (int64_t c = 0; c < channels; ++c) pixels(y)[x * channels + c] = from[x * channels + c] * factor[c];
    }
    zero_ends(n);
  }

  void store_to(T* image, int64_t y0, int64_t y1) const {
    for (int64_t y = y0; y < y1; ++y) __builtin_memcpy(image + y * width * channels, pixels(y), width * channels * sizeof(T));
  }
};

// A convolution at n positions, to `to`, [position][outputs]; more may be written, up to whole tiles. relu of it; or, where there are
// `values`, itself without a bias where they are positive, and 0 elsewhere.
template <class T>
void hidden_positions(const Convolution<T>& c, const T* x, int64_t x_row, int64_t n, T* to, const T* values = nullptr) {
  for_each_panel(c, [&](int64_t j, auto vectors) {
    constexpr int V = decltype(vectors)::value, U = kPositions<V>;
    Vec<T> bias[V];
    for (int v = 0; v < V; ++v) bias[v] = values ? zero<T>() : load_some(c.bias + j + v * lanes<T>, c.outputs - j - v * lanes<T>);
    for (int64_t p = 0; p < n; p += U)
      position_sums<U, V>(c, x + p * c.inputs, x_row, j, [&](int u, int v, Vec<T> sum) FK_BODY {
        const int64_t output = j + v * lanes<T>, at = (p + u) * c.outputs + output, left = c.outputs - output;
        store_some(to + at, values ? select(load_some(values + at, left) > 0, sum, zero<T>()) : activate<Activation::relu>(sum + bias[v]), left);
      });
  });
}

// (a convolution + bias) * gain, or the convolution alone, at the pixels of n rows, to y, [n][width][outputs]. x: the first taps of all
template <class T>
void output_rows(const Convolution<T>& c, const T* x, int64_t width, int64_t n, const T* gains, T* y) {
  const int64_t positions = n * (width + 1);
  for_each_panel(c, [&](int64_t j, auto vectors) {
    constexpr int V = decltype(vectors)::value, U = kPositions<V>;
    Vec<T> bias[V], gain[V];
    for (int v = 0; v < V; ++v) {
      bias[v] = gains ? load_some(c.bias + j + v * lanes<T>, c.outputs - j - v * lanes<T>) : zero<T>();
      gain[v] = gains ? load(gains + j + v * lanes<T>) : broadcast<T>(T(1));
    }
    T* to = y + j;
    for (int64_t p = 0, column = 0; p < positions; p += U) {
      T outputs[U][V * lanes<T>];
      position_sums<U, V>(c, x + p * c.inputs, (width + 1) * c.inputs, j, [&](int u, int v, Vec<T> sum) FK_BODY {
        store(outputs[u] + v * lanes<T>, (sum + bias[v]) * gain[v]);
      });
      for (int64_t u = 0; u < smaller(U, positions - p); ++u) {
        if (column == width) {
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

// A band of the output, and the rows of the hidden layers that it needs and that exist
struct Band {
  int64_t image, y0, y1, h0, h1;

  template <class T>
  Band(const ConvNetImages<T>& images, int64_t task) {
    image = task / images.bands();
    y0 = task % images.bands() * images.rows;
    y1 = smaller(y0 + images.rows, images.height);
    h0 = y0 > 0 ? y0 - 1 : 0;
    h1 = smaller(y1 + 1, images.height);
  }
};

// Padded rows in scratch, one after another
template <class T>
struct RowScratch {
  T* next;
  int64_t width, most_rows;  // rows of a band

  PaddedRows<T> rows(int64_t more, int64_t channels, int64_t top) {
    const PaddedRows<T> made{next, width, channels, top};
    next += PaddedRows<T>::size(most_rows + more, width, channels);
    return made;
  }
};

template <class T>
size_t conv_net_scratch_bytes(const ConvNetArgs<T>& args) {
  const auto size = [&](int64_t more, int64_t channels) { return PaddedRows<T>::size(args.rows + more, args.width, channels); };
  return (size(4, args.in.inputs) + size(2, args.out.inputs) + (args.first ? size(2, args.mid.inputs) : kStrip * args.mid.inputs)) * sizeof(T);
}

template <class T>
void conv_net_band(const ConvNetArgs<T>& args, int64_t task, T* data) {
  const Band band(args, task);
  const int64_t pixels = band.image * args.height * args.width;
  RowScratch<T> scratch{data, args.width, args.rows};
  const PaddedRows<T> x = scratch.rows(4, args.in.inputs, band.h0 - 1), second = scratch.rows(2, args.out.inputs, band.y0 - 1);
  const PaddedRows<T> first = args.first ? scratch.rows(2, args.mid.inputs, band.h0) : PaddedRows<T>{};
  x.load_from(args.x + pixels * x.channels, args.height, band.h1 - band.h0 + 2);

  const int64_t positions = (band.h1 - band.h0) * (args.width + 1);
  for (int64_t p = 0; p < positions; p += kStrip) {
    const int64_t n = smaller(kStrip, positions - p);
    T* strip = args.first ? first.pixels(band.h0) + p * first.channels : scratch.next;
    hidden_positions(args.in, x.taps(band.h0) + p * x.channels, x.row(), n, strip);
    hidden_positions(args.mid, strip, int64_t(0), n, second.pixels(band.h0) + p * second.channels);
  }
  second.zero_outside(band.y0 - 1, args.height);
  second.zero_outside(band.y1, args.height);
  second.zero_ends(band.y1 - band.y0 + 2);
  output_rows(args.out, second.taps(band.y0), args.width, band.y1 - band.y0, args.gain,
              args.y + (pixels + band.y0 * args.width) * args.out.outputs);
  if (!args.first) return;
  first.store_to(args.first + pixels * first.channels, band.y0, band.y1);
  second.store_to(args.second + pixels * second.channels, band.y0, band.y1);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
