// The gradient of Glow's conditioner. Included once per instruction set, after conv_net_kernel.h.
//
// What carries the gradient down are three convolutions like those that went up, masked where a relu was 0. The gradients of the weights are
// sums over positions of products of two runs of memory: padding is zero in the gradients, so rows need no care at their ends.

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
  for (int64_t j = 0; j < n; j += 3 * lanes<T>) {
    const auto panel = [&](auto count) FK_BODY {
      constexpr int64_t width = decltype(count)::value * lanes<T>;
      add_product_columns<decltype(count)::value>(a, a_ld, m, b + j, b_ld, positions, out + j, out_ld, smaller(width, n - j));
    };
    if (n - j > 2 * lanes<T>)
      panel(Count<3>{});
    else if (n - j > lanes<T>)
      panel(Count<2>{});
    else
      panel(Count<1>{});
  }
}

// out[j] += sum over positions of d[p][j]: short sums, of which sums are made, as terms of one sign would lose much in a long chain
template <class T>
void add_positions(const PaddedRows<T>& d, int64_t y0, int64_t positions, T* out) {
  constexpr int64_t kTerms = 16;
  for (int64_t j = 0; j < d.channels; j += lanes<T>) {
    const int64_t n = d.channels - j;
    const T* from = d.pixels(y0) + j;
    for (int64_t chunk = 0; chunk < positions; chunk += kChunk) {
      Vec<T> total = zero<T>();
      for (int64_t begin = chunk; begin < smaller(chunk + kChunk, positions); begin += kTerms) {
        Vec<T> sum = zero<T>();
        for (int64_t p = begin; p < smaller(begin + kTerms, positions); ++p) sum = sum + load_some(from + p * d.channels, n);
        total = total + sum;
      }
      store_some(out + j, load_some(out + j, n) + total, n);
    }
  }
}

template <class T>
size_t conv_net_gradient_scratch_bytes(const ConvNetGradientArgs<T>& args) {
  const auto size = [&](int64_t more, int64_t channels) { return PaddedRows<T>::size(args.rows + more, args.width, channels); };
  return (size(4, args.out.inputs) + size(2, args.in.outputs) + 2 * size(2, args.mid.outputs) + 2 * size(2, args.mid.inputs)) * sizeof(T);
}

// The gradient by x of a band, and what the band adds to `sums`
template <class T>
void conv_net_gradient_band(const ConvNetGradientArgs<T>& args, int64_t task, T* sums, T* data) {
  const Band band(args, task);
  const int64_t pixels = band.image * args.height * args.width, y0 = band.y0, n = band.y1 - y0, above = y0 - 1;
  const int64_t units = args.mid.outputs, more = args.mid.inputs;  // of the first hidden layer and of the second
  RowScratch<T> scratch{data, args.width, args.rows};
  const PaddedRows<T> dy = scratch.rows(4, args.out.inputs, above - 1), x = scratch.rows(2, args.in.outputs, above);
  const PaddedRows<T> first = scratch.rows(2, units, above), second = scratch.rows(2, more, above);
  const PaddedRows<T> dfirst = scratch.rows(2, units, above), dsecond = scratch.rows(2, more, above);
  dy.load_from(args.dy + pixels * dy.channels, args.height, n + 4, args.gain);
  x.load_from(args.x + pixels * x.channels, args.height, n + 2);
  first.load_from(args.first + pixels * units, args.height, n + 2);
  second.load_from(args.second + pixels * more, args.height, n + 2);

  // in the padding the hidden layers are 0, so are the gradients
  const int64_t all = (band.h1 - band.h0) * (args.width + 1);
  for (int64_t p = 0; p < all; p += kStrip) {
    const int64_t some = smaller(kStrip, all - p);
    T* const strip = dsecond.pixels(band.h0) + p * more;
    hidden_positions(args.out, dy.taps(band.h0) + p * dy.channels, dy.row(), some, strip, second.pixels(band.h0) + p * more);
    hidden_positions(args.mid, strip, int64_t(0), some, dfirst.pixels(band.h0) + p * units, first.pixels(band.h0) + p * units);
  }
  set_zero(dfirst.data, units);
  dfirst.zero_outside(above, args.height);
  dfirst.zero_outside(band.y1, args.height);
  output_rows(args.in, dfirst.taps(y0), args.width, n, static_cast<const T*>(nullptr), args.dx + (pixels + y0 * args.width) * x.channels);

  const auto at = args.places();
  const int64_t positions = n * (args.width + 1) - 1;  // to the last pixel: behind it, unlike between rows, is memory of any kind, which times 0 may be NaN
  for (int64_t row = 0; row < 3; ++row) {
    const int64_t k = row * 3;
    add_product(dy.pixels(y0), dy.channels, dy.channels, second.taps(y0) + row * second.row(), more, 3 * more, positions,
                sums + at.weight_out + k * more, 9 * more);
    add_product(x.taps(y0) + row * x.row(), x.channels, 3 * x.channels, dfirst.pixels(y0), units, units, positions,
                sums + at.weight_in + k * x.channels * units, units);
  }
  add_product(dsecond.pixels(y0), more, more, first.pixels(y0), units, units, positions, sums + at.weight_mid, units);
  add_positions(dy, y0, positions, sums + at.bias_out);
  add_positions(dsecond, y0, positions, sums + at.bias_mid);
  add_positions(dfirst, y0, positions, sums + at.bias_in);
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

// The gradient by the first weight, [unit][channel][tap] from [term][unit]; whole vectors are read. place: from find_terms
template <class T>
void turn_first_weight(const T* from, int64_t terms, int64_t units, const int64_t* place, T* to) {
  write_columns(from, units, units, terms, place, to, terms);
}

// That by the last one, [output][unit][tap] from [output][tap][unit]; whole vectors are read
template <class T>
void turn_last_weight(const T* from, int64_t outputs, int64_t units, T* to) {
  for (int64_t o = 0; o < outputs; ++o, from += 9 * units, to += 9 * units) write_columns(from, units, units, int64_t(9), nullptr, to, int64_t(9));
}

// dlog_gain[o] = 3 * sum of dy * y, from the gradients by the weight and the bias before the gain
template <class T>
void log_gain_gradient(const T* dweight, const T* weight, const T* dbias, const T* bias, int64_t outputs, int64_t terms, T* to) {
  for (int64_t o = 0; o < outputs; ++o) {
    Vec<T> sum = zero<T>();
    for (int64_t k = 0; k < terms; k += lanes<T>) sum = fma(load_some(dweight + o * terms + k, terms - k), load_some(weight + o * terms + k, terms - k), sum);
    to[o] = T(3) * fma(dbias[o], bias[o], horizontal_sum(sum));
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
