// The arithmetic of the per-channel affine map on packed elements. No include guard: cpu/for_each_target.h includes this once per
// instruction set.

#include "cpu/walk.h"

namespace flowkernels {
namespace FK_TARGET {

// y = (x + before) * scale + after. parameters = {before, scale, after}; in = {x}, out = {y}.
template <class T>
FK_CALL void affine_tile(const Streams<T>& streams) {
  const int64_t n = streams.n;
  for (int64_t r = 0; r < streams.rows; ++r) {
    const T *x = streams.in[0] + r * streams.in_row[0], *before = streams.parameters[0] + r * n;
    const T *scale = streams.parameters[1] + r * n, *after = streams.parameters[2] + r * n;
    T* y = streams.out[0] + r * streams.out_row[0];
    int64_t i = 0;
    for (; i + lanes<T> <= n; i += lanes<T>) store(y + i, fma(load(x + i) + load(before + i), load(scale + i), load(after + i)));
    if (const int k = static_cast<int>(n - i)) {
      store_partial(y + i, fma(load_partial(x + i, k) + load(before + i), load(scale + i), load(after + i)), k);
    }
  }
}

// in = {dy, x or y}, out = {dx}; terms = {dy, dy * (x + before) * scale}
template <class T>
FK_CALL void affine_gradient_tile(const Streams<T>& streams, bool from_output) {
  const int64_t n = streams.n;
  for (int64_t r = 0; r < streams.rows; ++r) {
    const T *dy = streams.in[0] + r * streams.in_row[0], *kept = streams.in[1] + r * streams.in_row[1];
    const T *before = streams.parameters[0] + r * n, *scale = streams.parameters[1] + r * n, *after = streams.parameters[2] + r * n;
    T *dx = streams.out[0] + r * streams.out_row[0], *constant = streams.terms[0] + r * n, *linear = streams.terms[1] + r * n;
    for (int64_t i = 0; i < n; i += lanes<T>) {
      const bool whole = i + lanes<T> <= n;
      const int k = static_cast<int>(n - i);
      const Vec<T> g = whole ? load(dy + i) : load_partial(dy + i, k), v = whole ? load(kept + i) : load_partial(kept + i, k);
      const Vec<T> dold = g * load(scale + i);
      store(constant + i, g);
      store(linear + i, from_output ? g * (v - load(after + i)) : dold * (v + load(before + i)));
      if (whole) {
        store(dx + i, dold);
      } else {
        store_partial(dx + i, dold, k);
      }
    }
  }
}

// Both at run time: the walk around them is the larger part of the code.
template <class T>
struct ChannelAffineMap {
  bool backward, from_output;

  void operator()(const Streams<T>& streams) const { backward ? affine_gradient_tile(streams, from_output) : affine_tile(streams); }
};

template <class E>
FK_CALL void run_channel_affine(const Elementwise<E>& args, bool backward, bool from_output, compute_t<E>* columns, int64_t first,
                                int64_t last) {
  using T = compute_t<E>;
  Walk<E, ChannelAffineMap<T>>(args, {backward, from_output}, columns).run(first, last);
}

template <class T>
FK_CALL void run_lines(const DenseLines<T>& a, int64_t first, int64_t last) {
  for (int64_t line = first; line < last; ++line) {
    const int64_t begin = line * a.length, n = a.length < a.elements - begin ? a.length : a.elements - begin;
    const T* x = a.x + begin;
    T* y = a.y + begin;
    int64_t i = 0;
    if (a.one_channel) {
      const int64_t c = line % a.channels;
      const Vec<T> before = broadcast(a.before[c]), scale = broadcast(a.scale[c]), after = broadcast(a.after[c]);
      for (; i + lanes<T> <= n; i += lanes<T>) store(y + i, fma(load(x + i) + before, scale, after));
      if (const int k = static_cast<int>(n - i)) store_partial(y + i, fma(load_partial(x + i, k) + before, scale, after), k);
      continue;
    }
    const T *before = a.before, *scale = a.scale, *after = a.after;
    for (; i + lanes<T> <= n; i += lanes<T>) store(y + i, fma(load(x + i) + load(before + i), load(scale + i), load(after + i)));
    if (const int k = static_cast<int>(n - i)) {
      store_partial(y + i, fma(load_partial(x + i, k) + load_partial(before + i, k), load_partial(scale + i, k), load_partial(after + i, k)), k);
    }
  }
}

// n values: to[i] = exp(sign * from[stride * i])
template <class T>
FK_CALL void exp_of(const T* from, int64_t stride, T sign, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = exp(broadcast(sign * from[i * stride]))[0];
}

}  // namespace FK_TARGET
}  // namespace flowkernels
