// The loop of a map over the streams of a tile. No include guard: kernel headers include this once per instruction set.

namespace flowkernels {
namespace FK_TARGET {

// Asks for the lines that rows will need 2 KB further on, once a line: a map's arithmetic fills the window in which the processor would
// meet their loads by itself.
template <class... P>
FK_INLINE void fetch_ahead(int64_t i, const P*... rows) {
  (__builtin_prefetch(ahead(rows, i + 2048 / static_cast<int64_t>(sizeof(P)))), ...);
}

// body(in, out, at) for each vector of the first IN inputs and OUT outputs, `at` being its place in what is packed; and the copy of the rest.
// What is left of a row, fewer elements than a vector, goes the same way: a second copy of every body would double the build.
template <int IN, int OUT, class T, class Body>
FK_INLINE void for_each_vector(const Streams<T>& streams, const Body& body) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t n = streams.n;
  for (int64_t r = 0; r < streams.rows; ++r) {
    const T* from[IN];
    T* to[OUT];
    for (int k = 0; k < IN; ++k) from[k] = streams.in[k] + r * streams.in_row[k];
    for (int k = 0; k < OUT; ++k) to[k] = streams.out[k] + r * streams.out_row[k];
    for (int64_t i = 0; i < n; i += lanes<T>) {
      if (streams.far && i % line == 0) {
        for (int k = 0; k < IN; ++k) fetch_ahead(i, from[k]);
        for (int k = 0; k < OUT; ++k) fetch_ahead(i, to[k]);
        fetch_ahead(i, streams.rest_from, streams.rest_to);
      }
      const bool whole = i + lanes<T> <= n;
      const int left = static_cast<int>(n - i);
      Vec<T> in[IN], out[OUT];
      if (whole) {
        for (int k = 0; k < IN; ++k) in[k] = load(from[k] + i);
      } else {
        for (int k = 0; k < IN; ++k) in[k] = load_partial(from[k] + i, left);
      }
      body(in, out, r * n + i);
      if (whole) {
        for (int k = 0; k < OUT; ++k) store(to[k] + i, out[k]);
        if (streams.rest_from != nullptr) store(streams.rest_to + i, load(streams.rest_from + i));
      } else {
        for (int k = 0; k < OUT; ++k) store_partial(to[k] + i, out[k], left);
        if (streams.rest_from != nullptr) store_partial(streams.rest_to + i, load_partial(streams.rest_from + i, left), left);
      }
    }
  }
}

// body(in, at) for each vector of input k alone
template <class T, class Body>
FK_INLINE void for_each_vector_of(const Streams<T>& streams, int k, const Body& body) {
  const int64_t n = streams.n;
  for (int64_t r = 0; r < streams.rows; ++r) {
    const T* from = streams.in[k] + r * streams.in_row[k];
    for (int64_t i = 0; i < n; i += lanes<T>) {
      if (streams.far && i % (64 / static_cast<int64_t>(sizeof(T))) == 0) fetch_ahead(i, from);
      body(i + lanes<T> <= n ? load(from + i) : load_partial(from + i, static_cast<int>(n - i)), r * n + i);
    }
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
