// The gradient of Glow's conditioner. Included once per instruction set, after conv_net_kernel.h.
//
// What carries the gradient down are three convolutions like those that went up, masked where a relu was 0. The gradients of the weights are
// sums over positions of products of two runs of memory. Where there are three taps they are sums over pairs of positions, by the same four
// products for a row of taps: of the factors of the layer below, and of dy0, dy0 + dy1, dy0 - dy1, -dy1 of the gradient above. A sum M of
// these gives dg0 = M0 + (M1 + M2) / 2, dg1 = (M1 - M2) / 2 and dg2 = (M1 + M2) / 2 + M3.

namespace flowkernels {
namespace FK_TARGET {

// out[m][n] += sum over positions p of a[p][m] * b[p][n] for U values m and n values in V vectors, in chunks of kChunk positions. Whole
// vectors of b are read.
template <int U, int V, class T>
FK_INLINE void add_products(const T* a, int64_t a_ld, const T* b, int64_t b_ld, int64_t positions, T* out, int64_t out_ld, int64_t n) {
  for (int64_t p = 0; p < positions; p += kChunk) {
    Vec<T> sum[U][V];
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < V; ++v) sum[u][v] = zero<T>();
    multiply<U, V>(a + p * a_ld, 1, a_ld, b + p * b_ld, b_ld, smaller(kChunk, positions - p), sum);
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < V; ++v) {
        T* to = out + u * out_ld + v * lanes<T>;
        const int64_t left = n - v * lanes<T>;
        store_some(to, load_some(to, left) + sum[u][v], left);
      }
  }
}

template <int V, class T>
FK_CALL void add_product_columns(const T* a, int64_t a_ld, int64_t m, const T* b, int64_t b_ld, int64_t positions, T* out, int64_t out_ld,
                                 int64_t n) {
  const auto some = [&](auto count) FK_BODY {
    constexpr int U = decltype(count)::value;
    add_products<U, V>(a, a_ld, b, b_ld, positions, out, out_ld, n);
    a += U, out += U * out_ld, m -= U;
  };
  while (m >= kUnits) some(Count<kUnits>{});
  if constexpr (kUnits > 4)
    if (m >= 4) some(Count<4>{});
  if (m >= 2) some(Count<2>{});
  if (m >= 1) some(Count<1>{});
}

// The same for all m of a and n of b
template <class T>
void add_product(const T* a, int64_t a_ld, int64_t m, const T* b, int64_t b_ld, int64_t n, int64_t positions, T* out, int64_t out_ld) {
  int64_t j = 0;
  while (j < n) {
    const auto panel = [&](auto count) FK_BODY {
      constexpr int64_t width = decltype(count)::value * lanes<T>;
      add_product_columns<decltype(count)::value>(a, a_ld, m, b + j, b_ld, positions, out + j, out_ld, smaller(width, n - j));
      j += width;
    };
    const int64_t left = (n - j + lanes<T> - 1) / lanes<T>;
    if (left == 3 || left > 4)
      panel(Count<3>{});
    else if (left >= 2)
      panel(Count<2>{});
    else
      panel(Count<1>{});
  }
}

// out[j] += sum over positions of d[p][j]: short sums, of which sums are made, as terms of one sign would lose much in a long chain
template <class T>
void add_positions(const T* d, int64_t channels, int64_t positions, T* out) {
  constexpr int64_t kTerms = 16;
  for (int64_t j = 0; j < channels; j += lanes<T>) {
    const int64_t n = channels - j;
    for (int64_t chunk = 0; chunk < positions; chunk += kChunk) {
      Vec<T> total = zero<T>();
      for (int64_t begin = chunk; begin < smaller(chunk + kChunk, positions); begin += kTerms) {
        Vec<T> sum = zero<T>();
        for (int64_t p = begin; p < smaller(begin + kTerms, positions); ++p) sum = sum + load_some(d + j + p * channels, n);
        total = total + sum;
      }
      store_some(out + j, load_some(out + j, n) + total, n);
    }
  }
}

// What takes the place of the factors for a gradient dy: dy0, dy0 + dy1, dy0 - dy1 and -dy1 of each pair, to [pair][factor][channel].
// Positions beyond the last pixel must be 0. zeros: a pixel of them
template <class T>
void make_gradient_factors(const T* dy, int64_t pairs, int64_t channels, const T* zeros, T* to) {
  for (int64_t p = 0; p < pairs; ++p, dy += 2 * channels, to += kFactors * channels) {
    add_channels(dy, zeros, T(1), channels, to);
    add_channels(dy, dy + channels, T(1), channels, to + channels);
    add_channels(dy, dy + channels, T(-1), channels, to + 2 * channels);
    add_channels(zeros, dy + channels, T(-1), channels, to + 3 * channels);
  }
}

template <class T>
size_t conv_net_gradient_scratch_bytes(const ConvNetGradientArgs<T>& args) {
  const auto rows = [&](int64_t more, int64_t channels) { return Rows<T>::size(args.rows + more, args.width, channels); };
  const auto factors = [&](int64_t more, int64_t channels) { return Factors<T>::size(args.rows + more, args.width, channels); };
  const int64_t units = args.mid.outputs, more = args.mid.inputs, most = units > more ? units : more;
  const int64_t widest = most > args.out.inputs ? most : args.out.inputs, zeros = widest > args.in.outputs ? widest : args.in.outputs;
  return (rows(4, args.out.inputs) + factors(4, args.out.inputs) + factors(2, args.in.outputs) + 2 * rows(2, units) + 2 * rows(2, more) +
          factors(2, most) + whole_vectors<T>(zeros)) * sizeof(T);
}

// The gradient by x of a band, and what the band adds to `sums`, if that is not null
template <class T>
void conv_net_gradient_band(const ConvNetGradientArgs<T>& args, int64_t task, T* sums, T* data) {
  const Band band(args, task);
  const int64_t pixels = band.image * args.height * args.width, y0 = band.y0, n = band.y1 - y0, above = y0 - 1;
  const int64_t units = args.mid.outputs, more = args.mid.inputs;  // of the first hidden layer and of the second
  const int64_t most = units > more ? units : more, widest = most > args.out.inputs ? most : args.out.inputs;
  RowScratch<T> scratch{data, args.width, args.rows};
  const Rows<T> dy = scratch.template take<Rows<T>>(4, args.out.inputs, band.h0 > 0 ? band.h0 - 1 : 0);
  const Factors<T> dy_factors = scratch.template take<Factors<T>>(4, args.out.inputs, band.h0 - 1);
  const Factors<T> x = scratch.template take<Factors<T>>(2, args.in.outputs, above);
  const auto take = [&](int64_t channels) { return scratch.template take<Rows<T>>(2, channels, band.h0); };
  const Rows<T> dfirst = take(units), dsecond = take(more);
  const bool in_place = hidden_in_place(args, units, more);
  const auto hidden = [&](const T* layer, int64_t channels) -> Rows<const T> {
    layer += pixels * channels;
    const Rows<T> copy = take(channels);
    if (in_place) return {layer, args.width, channels, 0};
    copy.load_from(layer, band.h0, band.h1);
    return {copy.data, args.width, channels, copy.top};
  };
  const Rows<const T> first = hidden(args.first, units), second = hidden(args.second, more);
  const T* zeros = scratch.zeros(widest > args.in.outputs ? widest : args.in.outputs);
  T* const factors = scratch.next;  // of one layer after another
  const auto factors_of = [&](const auto& rows) {
    const Factors<T> made{factors, args.width, rows.channels, above};
    made.make([&](int64_t y) { return rows.at(y); }, args.height, above, band.y1 + 1, zeros);
    return made;
  };
  dy.load_from(args.dy + pixels * dy.channels, dy.top, smaller(band.h1 + 1, args.height), args.gain);

  dy_factors.make([&](int64_t y) { return dy.at(y); }, args.height, band.h0 - 1, band.h1 + 1, zeros);
  const int64_t all = (band.h1 - band.h0) * x.pairs();
  for (int64_t p = 0; p < all; p += kStrip) {
    const int64_t some = smaller(kStrip, all - p), at = 2 * p;
    T* const strip = dsecond.data + at * more;
    hidden_positions<true>(args.out, dy_factors.data + p * kFactors * dy.channels, dy_factors.row(), some, strip, second.data + at * more);
    hidden_positions<false>(args.mid, strip, int64_t(0), 2 * some, dfirst.data + at * units, first.data + at * units);
  }
  output_rows(args.in, factors_of(dfirst).data, args.width, n, static_cast<const T*>(nullptr),
              args.dx + (pixels + y0 * args.width) * x.channels);
  if (!sums) return;

  const auto at = args.places();
  const int64_t pairs = n * x.pairs();
  const Factors<T> below = factors_of(second);
  make_gradient_factors(dy.at(y0), pairs, dy.channels, zeros, dy_factors.data);
  for (int64_t row = 0; row < kTaps; ++row)
    for (int64_t t = 0; t < kFactors; ++t)
      add_product(dy_factors.data + t * dy.channels, kFactors * dy.channels, dy.channels, below.at(above + row) + t * more, kFactors * more, more,
                  pairs, sums + at.weight_out + (row * kFactors + t) * more, kTaps * kFactors * more);
  x.make([&](int64_t y) { return args.x + (pixels + y * args.width) * x.channels; }, args.height, above, band.y1 + 1, zeros);
  make_gradient_factors(dfirst.at(y0), pairs, units, zeros, factors);
  for (int64_t row = 0; row < kTaps; ++row)
    for (int64_t t = 0; t < kFactors; ++t)
      add_product(x.at(above + row) + t * x.channels, kFactors * x.channels, x.channels, factors + t * units, kFactors * units, units, pairs,
                  sums + at.weight_in + (row * kFactors + t) * x.channels * units, units);
  add_product(dsecond.at(y0), more, more, first.at(y0), units, units, 2 * pairs, sums + at.weight_mid, units);
  add_positions(dy.at(y0), dy.channels, 2 * pairs, sums + at.bias_out);
  add_positions(dsecond.at(y0), more, 2 * pairs, sums + at.bias_mid);
  add_positions(dfirst.at(y0), units, 2 * pairs, sums + at.bias_in);
}

// sums[i] = the sum over parts of sums[part * size + i], for i < n
template <class T>
void add_conv_net_parts(T* sums, int64_t parts, int64_t size, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes<T>) {
    Vec<T> sum = load_some(sums + i, n - i);
    for (int64_t p = 1; p < parts; ++p) sum = sum + load_some(sums + p * size + i, n - i);
    store_some(sums + i, sum, n - i);
  }
}

// The gradients of the taps, [row of taps][tap][n], from the sums of the four products, [row of taps][factor][n], in their place
template <class T>
void gather_taps(T* sums, int64_t n) {
  for (int64_t row = 0; row < kTaps; ++row)
    for (int64_t i = 0; i < n; i += lanes<T>) {
      const T* from = sums + row * kFactors * n + i;
      T* const to = sums + row * kTaps * n + i;
      const int64_t left = n - i;
      const Vec<T> m1 = load_some(from + n, left) * T(0.5), m2 = load_some(from + 2 * n, left) * T(0.5), m3 = load_some(from + 3 * n, left);
      store_some(to, load_some(from, left) + (m1 + m2), left);
      store_some(to + n, m1 - m2, left);
      store_some(to + 2 * n, (m1 + m2) + m3, left);
    }
}

// The gradient by the first weight, [unit][channel][tap] from [row of taps][factor][channel][unit], which is overwritten; whole vectors are
// read. place: from find_terms
template <class T>
void turn_first_weight(T* from, int64_t channels, int64_t units, const int64_t* place, T* to) {
  gather_taps(from, channels * units);
  write_columns(from, units, units, 9 * channels, place, to, 9 * channels);
}

// That by the last one, [output][unit][tap] from [output][row of taps][factor][unit], which is overwritten; whole vectors are read
template <class T>
void turn_last_weight(T* from, int64_t outputs, int64_t units, T* to) {
  for (int64_t o = 0; o < outputs; ++o, from += kTaps * kFactors * units, to += 9 * units) {
    gather_taps(from, units);
    write_columns(from, units, units, int64_t(9), nullptr, to, int64_t(9));
  }
}

// dlog_gain[o] = 3 * sum of dy * y, from the gradients by the weight and the bias before the gain
template <class T>
void log_gain_gradient(const T* dweight, const T* weight, const T* dbias, const T* bias, int64_t outputs, int64_t terms, T* to) {
  for (int64_t o = 0; o < outputs; ++o) {
    constexpr int count = 16 / lanes<T>;  // sums in the order of sum_16
    Vec<T> sums[count] = {};
    for (int64_t k = 0, i = 0; k < terms; k += lanes<T>, i = (i + 1) % count)
      sums[i] = fma(load_some(dweight + o * terms + k, terms - k), load_some(weight + o * terms + k, terms - k), sums[i]);
    for (int half = count / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    to[o] = T(3) * fma(dbias[o], bias[o], horizontal_sum(sums[0]));
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
