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

// lanes: room for 2 * 16 * channels
template <class T>
FK_CALL void run_vector_gradients(const VectorGradients<T>& a, T* lane_sums, int64_t first, int64_t last) {
  const int64_t n = a.channels, sixteen = 16 * n;
  T *constant = lane_sums, *linear = lane_sums + sixteen;
  for (int64_t u = first; u < last; ++u) {
    const int64_t end = n * smaller((u + 1) * a.unit, a.batch);
    fill(lane_sums, 2 * sixteen, T(0));
    for (int64_t block = u * a.unit * n; block < end; block += sixteen) {
      const T *dy = a.dy + block, *kept = a.kept + block;
      T* dx = a.dx + block;
      const int64_t count = smaller(sixteen, end - block);
      auto along = [&](int64_t i, Vec<T> g, Vec<T> dold, Vec<T> v) {
        return a.from_output ? g * (v - load(a.after + i)) : dold * (v + load(a.before + i));
      };
      int64_t i = 0;
      for (; i + lanes<T> <= count; i += lanes<T>) {
        const Vec<T> g = load(dy + i), dold = g * load(a.scale + i);
        store(dx + i, dold);
        store(constant + i, load(constant + i) + g);
        store(linear + i, load(linear + i) + along(i, g, dold, load(kept + i)));
      }
      if (const int k = static_cast<int>(count - i)) {
        const Vec<T> g = load_partial(dy + i, k), dold = g * load(a.scale + i);
        store_partial(dx + i, dold, k);
        store_partial(constant + i, load(constant + i) + g, k);
        store_partial(linear + i, load(linear + i) + along(i, g, dold, load_partial(kept + i, k)), k);
      }
    }
    for (int s = 0; s < 2; ++s) {
      T* sums = lane_sums + s * sixteen;
      for (int64_t half = 8 * n; half >= n; half /= 2) {
        for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
      }
      for (int64_t c = 0; c < n; ++c) a.sums[s][u * n + c] = sums[c];
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
