// Glow's conditioner. Included once per instruction set, after conv_net_pack.h.
//
// Lanes are output channels, and what is broadcast are channels of positions. Along a row, two neighbouring sums of three taps cost four
// products for each input rather than six (Winograd 1980; Lavin and Gray 2016, arXiv 1509.09308): of the four positions d around a pair and
// the taps g,
//
//   m0 = (d0 - d2) g0,  m1 = (d1 + d2) (g0 + g1 + g2) / 2,  m2 = (d2 - d1) (g0 - g1 + g2) / 2,  m3 = (d1 - d3) g2
//   y0 = m0 + m1 + m2,  y1 = m1 - m2 - m3
//
// where the sums over inputs and over the three rows are taken of each product m. Its error in float32 is that of plain sums, but relative to
// the largest of the four d, where theirs is to the largest of the three that a sum has.
// Rows have an even number of positions, one beyond the last pixel if need be, and no padding: that is in the factors made of d.
// A strip of positions passes through the first two convolutions while it is in the first-level cache. Sums are made as in
// staircase_kernel.h: chains of up to kChunk terms, ending with a row of taps where all do not fit in one, added up in ascending order.

namespace flowkernels {
namespace FK_TARGET {

constexpr int kMostTile = 3 * kUnits / 2;  // positions, or pairs, of a tile
constexpr int64_t kStrip = 3 * kUnits;     // pairs: whole tiles of every width

// run(first, a Count of the tile's size) for tiles that cover n positions or pairs, and maybe more. With fewer than three vectors tiles are
// longer to make up for it, as weights come from the second-level cache, unless shorter ones fit.
template <int V, class F>
FK_INLINE void for_each_tile(int64_t n, const F& run) {
  for (int64_t p = 0; p < n;) {
    if (V == kRowVectors || n - p <= kUnits || n - p == 2 * kUnits) {
      run(p, Count<kUnits>{});
      p += kUnits;
    } else {
      run(p, Count<kMostTile>{});
      p += kMostTile;
    }
  }
}

// Sums over `rows` rows of x, x_row apart, and n terms of each, to `sums`, [u][v], for U positions, x_unit apart, and V vectors of outputs. A
// function of its own: where it is inlined, the loop runs out of registers for its addresses.
template <int U, int V, class T>
FK_CALL void tile_sums(const T* x, int64_t x_unit, int64_t x_row, int64_t rows, int64_t n, const T* weight, T* sums) {
  const int64_t together = rows * n <= kChunk ? rows : 1;
  for (int64_t row = 0; row < rows; row += together)
    for (int64_t k = 0; k < n; k += kChunk) {
      const int64_t terms = smaller(kChunk, n - k);
      Vec<T> sum[U][V];
      for (int u = 0; u < U; ++u)
        for (int v = 0; v < V; ++v) sum[u][v] = zero<T>();
      for (int64_t r = row; r < row + together; ++r, weight += terms * V * lanes<T>)
        multiply<U, V>(x + r * x_row + k, x_unit, 1, weight, V * lanes<T>, terms, sum);
      for (int u = 0; u < U; ++u)
        for (int v = 0; v < V; ++v) {
          T* const to = sums + (u * V + v) * lanes<T>;
          store(to, row + k == 0 ? sum[u][v] : load(to) + sum[u][v]);
        }
    }
}

// made(u, v, sum) for outputs of a convolution of one tap from j on, V vectors of them, at U positions, without bias
template <int U, int V, class T, class F>
FK_INLINE void position_sums(const Convolution<T>& c, const T* x, int64_t j, const F& made) {
  alignas(64) T sums[U * V * lanes<T>];
  tile_sums<U, V>(x, c.inputs, 0, 1, c.inputs, c.packed + j * c.packed_terms(), sums);
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < V; ++v) made(u, v, load(sums + (u * V + v) * lanes<T>));
}

// made(u, v, the sum at the first position, that at the second) for outputs of a convolution of three taps from j on, V vectors of them, at U
// pairs of positions, without bias. x: the factors of the first pair's upper neighbours, [row][pair][factor][input]; rows are x_row apart.
template <int U, int V, class T, class F>
FK_INLINE void pair_sums(const Convolution<T>& c, const T* x, int64_t x_row, int64_t j, const F& made) {
  alignas(64) T products[kFactors][U * V * lanes<T>];
  const T* weight = c.packed + j * c.packed_terms();
  for (int64_t t = 0; t < kFactors; ++t)
    tile_sums<U, V>(x + t * c.inputs, kFactors * c.inputs, x_row, kTaps, c.inputs, weight + t * kTaps * c.inputs * V * lanes<T>, products[t]);
  for (int u = 0; u < U; ++u)
    for (int v = 0; v < V; ++v) {
      const int64_t at = (u * V + v) * lanes<T>;
      const Vec<T> m1 = load(products[1] + at), m2 = load(products[2] + at);
      made(u, v, load(products[0] + at) + m1 + m2, m1 - m2 - load(products[3] + at));
    }
}

// Rows of an image, [row][2 * pairs][channels], the position beyond the last pixel, if there is one, holding anything
template <class T>
struct Rows {
  T* data;  // of a const T where the tensors' own rows are read
  int64_t width, channels, top;  // the image's row that is the first one here

  int64_t pairs() const { return (width + 1) / 2; }
  int64_t row() const { return 2 * pairs() * channels; }
  T* at(int64_t y) const { return data + (y - top) * row(); }

  // tiles read and write past the end
  static int64_t size(int64_t rows, int64_t width, int64_t channels) {
    return whole_vectors<T>((rows * (width + 1) + 2 * kMostTile) * channels + kRowVectors * lanes<T>);
  }

  // the image's rows from y0 to y1, times `factor` by channel if there is one, and zeros beyond the last pixel
  void load_from(const T* image, int64_t y0, int64_t y1, const T* factor = nullptr) const {
    for (int64_t y = y0; y < y1; ++y) {
      const T* from = image + y * width * channels;
      if (!factor)
        __builtin_memcpy(at(y), from, width * channels * sizeof(T));
      else
        for (int64_t x = 0; x < width; ++x)
          for (int64_t c = 0; c < channels; ++c) at(y)[x * channels + c] = from[x * channels + c] * factor[c];
      fill(at(y) + width * channels, row() - width * channels, T(0));
    }
  }

  void store_to(T* image, int64_t y0, int64_t y1) const {
    for (int64_t y = y0; y < y1; ++y) __builtin_memcpy(image + y * width * channels, at(y), width * channels * sizeof(T));
  }
};

// to[c] = a[c] + sign * b[c]; up to a vector more is written
template <class T>
FK_INLINE void add_channels(const T* a, const T* b, T sign, int64_t n, T* to) {
  for (int64_t c = 0; c < n; c += lanes<T>) store(to + c, fma(load_some(b + c, n - c), sign, load_some(a + c, n - c)));
}

// Factors of the pairs of rows of an image, [row][pair][factor][channel]
template <class T>
struct Factors {
  T* data;
  int64_t width, channels, top;

  int64_t pairs() const { return (width + 1) / 2; }
  int64_t row() const { return kFactors * pairs() * channels; }
  T* at(int64_t y) const { return data + (y - top) * row(); }

  static int64_t size(int64_t rows, int64_t width, int64_t channels) {
    return whole_vectors<T>((rows * ((width + 1) / 2) + kMostTile) * kFactors * channels + kRowVectors * lanes<T>);
  }

  // of rows y0 to y1 of an image whose row y is row_of(y), zeros outside of it. zeros: a pixel of them
  template <class F>
  void make(const F& row_of, int64_t height, int64_t y0, int64_t y1, const T* zeros) const {
    for (int64_t y = y0; y < y1; ++y) {  // ascending, as what is written beyond a row is of the next
      if (y < 0 || y >= height) {
        fill(at(y), row(), T(0));
        continue;
      }
      const T* const pixels = row_of(y);
      const auto pixel = [&](int64_t x) { return x >= 0 && x < width ? pixels + x * channels : zeros; };
      for (int64_t x = 0; x < width; x += 2) {
        const T *d0 = pixel(x - 1), *d1 = pixel(x), *d2 = pixel(x + 1), *d3 = pixel(x + 2);
        T* to = at(y) + x / 2 * kFactors * channels;
        add_channels(d0, d2, T(-1), channels, to);
        add_channels(d1, d2, T(1), channels, to + channels);
        add_channels(d2, d1, T(-1), channels, to + 2 * channels);
        add_channels(d1, d3, T(-1), channels, to + 3 * channels);
      }
    }
  }
};

// A convolution at n positions, or of three taps at n pairs of them, to `to`, [position][outputs]; more may be written, up to whole tiles.
// relu of it; or, where there are `values`, itself without a bias where they are positive, and 0 elsewhere. x: positions, or factors.
template <bool PAIRS, class T>
void hidden_positions(const Convolution<T>& c, const T* x, int64_t x_row, int64_t n, T* to, const T* values = nullptr) {
  for_each_panel(c, [&](int64_t j, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    Vec<T> bias[V];
    for (int v = 0; v < V; ++v) bias[v] = values ? zero<T>() : load_some(c.bias + j + v * lanes<T>, c.outputs - j - v * lanes<T>);
    const auto put = [&](int64_t position, int v, Vec<T> sum) FK_BODY {
      const int64_t output = j + v * lanes<T>, at = position * c.outputs + output, left = c.outputs - output;
      store_some(to + at, values ? select(load_some(values + at, left) > 0, sum, zero<T>()) : activate<Activation::relu>(sum + bias[v]), left);
    };
    for_each_tile<V>(n, [&](int64_t p, auto count) {
      constexpr int U = decltype(count)::value;
      if constexpr (PAIRS)
        pair_sums<U, V>(c, x + p * kFactors * c.inputs, x_row, j, [&](int u, int v, Vec<T> first, Vec<T> second) FK_BODY {
          put(2 * (p + u), v, first);
          put(2 * (p + u) + 1, v, second);
        });
      else
        position_sums<U, V>(c, x + p * c.inputs, j, [&](int u, int v, Vec<T> sum) FK_BODY { put(p + u, v, sum); });
    });
  });
}

// (a convolution + bias) * gain, or the convolution alone, at the pixels of n rows, to y, [n][width][outputs]. x: factors of the row above
template <class T>
void output_rows(const Convolution<T>& c, const T* x, int64_t width, int64_t n, const T* gains, T* y) {
  const int64_t pairs = (width + 1) / 2;
  for_each_panel(c, [&](int64_t j, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    Vec<T> bias[V], gain[V];
    for (int v = 0; v < V; ++v) {
      bias[v] = gains ? load_some(c.bias + j + v * lanes<T>, c.outputs - j - v * lanes<T>) : zero<T>();
      gain[v] = gains ? load(gains + j + v * lanes<T>) : broadcast<T>(T(1));
    }
    T* to = y + j;
    int64_t column = 0;
    for_each_tile<V>(n * pairs, [&](int64_t p, auto count) {
      constexpr int U = decltype(count)::value;
      T outputs[2 * U][V * lanes<T>];
      pair_sums<U, V>(c, x + p * kFactors * c.inputs, kFactors * pairs * c.inputs, j, [&](int u, int v, Vec<T> first, Vec<T> second) FK_BODY {
        store(outputs[2 * u] + v * lanes<T>, (first + bias[v]) * gain[v]);
        store(outputs[2 * u + 1] + v * lanes<T>, (second + bias[v]) * gain[v]);
      });
      for (int64_t i = 0; i < 2 * smaller(U, n * pairs - p); ++i) {
        if (column < width) {
          for (int v = 0; v < V; ++v) store_some(to + v * lanes<T>, load(outputs[i] + v * lanes<T>), c.outputs - j - v * lanes<T>);
          to += c.outputs;
        }
        column = column + 1 == 2 * pairs ? 0 : column + 1;
      }
    });
  });
}

// Whether the hidden layers of whole images can be read and written in their place in the tensors: no position is beyond the last pixel, and
// tiles and vectors are whole.
template <class T>
bool hidden_in_place(const ConvNetImages<T>& images, int64_t first, int64_t second) {
  const bool tiles = images.bands() == 1 && images.width % 2 == 0 && images.height * images.width / 2 % kUnits == 0;
  return tiles && first % lanes<T> == 0 && second % lanes<T> == 0;
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

// Rows and factors in scratch, one after another
template <class T>
struct RowScratch {
  T* next;
  int64_t width, most_rows;  // rows of a band

  template <class R>
  R take(int64_t more, int64_t channels, int64_t top) {
    const R made{next, width, channels, top};
    next += R::size(most_rows + more, width, channels);
    return made;
  }
  T* zeros(int64_t channels) {
    T* const made = next;
    next += whole_vectors<T>(channels);
    fill(made, channels, T(0));
    return made;
  }
};

template <class T>
size_t conv_net_scratch_bytes(const ConvNetArgs<T>& args) {
  const auto rows = [&](int64_t more, int64_t channels) { return Rows<T>::size(args.rows + more, args.width, channels); };
  const auto factors = [&](int64_t more, int64_t channels) { return Factors<T>::size(args.rows + more, args.width, channels); };
  const int64_t first = args.first ? rows(2, args.mid.inputs) : Rows<T>::size(1, 2 * kStrip, args.mid.inputs);
  const int64_t zeros = whole_vectors<T>(args.in.inputs > args.out.inputs ? args.in.inputs : args.out.inputs);
  return (factors(4, args.in.inputs) + rows(2, args.out.inputs) + factors(2, args.out.inputs) + zeros + first) * sizeof(T);
}

template <class T>
void conv_net_band(const ConvNetArgs<T>& args, int64_t task, T* data) {
  const Band band(args, task);
  const int64_t pixels = band.image * args.height * args.width;
  const bool in_place = args.first && hidden_in_place(args, args.mid.inputs, args.out.inputs);
  RowScratch<T> scratch{data, args.width, args.rows};
  const Factors<T> x = scratch.template take<Factors<T>>(4, args.in.inputs, band.h0 - 1);
  const Factors<T> spread = scratch.template take<Factors<T>>(2, args.out.inputs, band.y0 - 1);
  Rows<T> second = scratch.template take<Rows<T>>(2, args.out.inputs, band.h0);
  const T* zeros = scratch.zeros(args.in.inputs > args.out.inputs ? args.in.inputs : args.out.inputs);
  Rows<T> first{scratch.next, args.width, args.mid.inputs, band.h0};
  if (in_place) first.data = args.first + pixels * first.channels, second.data = args.second + pixels * second.channels;
  x.make([&](int64_t y) { return args.x + (pixels + y * args.width) * x.channels; }, args.height, band.h0 - 1, band.h1 + 1, zeros);

  const int64_t pairs = (band.h1 - band.h0) * x.pairs();
  for (int64_t p = 0; p < pairs; p += kStrip) {
    const int64_t n = smaller(kStrip, pairs - p);
    T* strip = first.data + (args.first ? 2 * p * first.channels : 0);
    hidden_positions<true>(args.in, x.data + p * kFactors * x.channels, x.row(), n, strip);
    hidden_positions<false>(args.mid, strip, int64_t(0), 2 * n, second.data + 2 * p * second.channels);
  }
  spread.make([&](int64_t y) { return second.at(y); }, args.height, band.y0 - 1, band.y1 + 1, zeros);
  output_rows(args.out, spread.data, args.width, band.y1 - band.y0, args.gain, args.y + (pixels + band.y0 * args.width) * args.out.outputs);
  if (!args.first || in_place) return;
  first.store_to(args.first + pixels * first.channels, band.y0, band.y1);
  second.store_to(args.second + pixels * second.channels, band.y0, band.y1);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
