// The weights of Glow's conditioner as its convolutions read them; conv_net_kernel.h has the formulas. Included once per instruction set,
// after columns.h and staircase_kernel.h.

namespace flowkernels {
namespace FK_TARGET {

constexpr int64_t kFactors = 4, kTaps = 3;

template <class T>
int64_t packed_convolution_size(const Convolution<T>& c) {
  return whole_vectors<T>(c.outputs) * c.packed_terms();
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

// The four factors of a row of three taps, `distance` apart
template <class T>
FK_INLINE void pack_taps(const Vec<T> (&g)[3], T* to, int64_t distance) {
  const Vec<T> ends = (g[0] + g[2]) * T(0.5), middle = g[1] * T(0.5);
  store(to, g[0]);
  store(to + distance, ends + middle);
  store(to + 2 * distance, ends - middle);
  store(to + 3 * distance, g[2]);
}

// [panel][factor][row of taps][input][output], or [panel][input][output] where there is one tap; zeros behind the last output. place: from
// find_terms; scratch: [term][most outputs of a panel]
template <class T>
void pack_convolution(const Convolution<T>& c, const int64_t* place, T* scratch) {
  const int64_t terms = c.terms();
  for_each_panel(c, [&](int64_t j, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t width = V * lanes<T>;
    T* const packed = c.packed + j * c.packed_terms();
    read_columns(c.weight + j * terms, terms, smaller(width, c.outputs - j), terms, place, c.taps == 3 ? scratch : packed, width);
    if (c.taps == 1) return;
    for (int64_t row = 0; row < kTaps; ++row)
      for (int64_t i = 0; i < c.inputs * width; i += lanes<T>) {
        const T* from = scratch + row * kTaps * c.inputs * width + i;
        const Vec<T> g[] = {load(from), load(from + c.inputs * width), load(from + 2 * c.inputs * width)};
        pack_taps(g, packed + row * c.inputs * width + i, kTaps * c.inputs * width);
      }
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
      for (int v = 0; v < V; ++v) {
        const T* from = scratch + j + v * lanes<T>;
        T* const to = c.packed + j * c.packed_terms() + (k * V + v) * lanes<T>;
        if (c.taps == 1) {
          store(to, load(from));
          continue;
        }
        for (int64_t row = 0; row < kTaps; ++row) {
          const T* last = from + (taps - 1 - row * kTaps) * width;
          const Vec<T> g[] = {load(last), load(last - width), load(last - 2 * width)};
          pack_taps(g, to + row * c.inputs * V * lanes<T>, kTaps * c.inputs * V * lanes<T>);
        }
      }
    });
  }
}

template <class T>
void conv_net_gain(const T* log_gain, int64_t n, T* gain) {
  for (int64_t j = 0; j < n; j += lanes<T>) store(gain + j, exp(load_some(log_gain + j, n - j) * T(3)));
}

}  // namespace FK_TARGET
}  // namespace flowkernels
