// The arithmetic of the per-channel affine map on packed elements. No include guard: cpu/for_each_target.h includes this once per
// instruction set.

#include "cpu/tile_kernel.h"

namespace flowkernels {
namespace FK_TARGET {

// y = (x + before) * scale + after. parameters = {before, scale, after}; in = {x}, out = {y}.
template <class T>
FK_CALL void affine_tile(const void*, const Streams<T>& streams) {
  const T *before = streams.parameters[0], *scale = streams.parameters[1], *after = streams.parameters[2];
  for_each_vector<1, 1>(streams, [&](const Vec<T>* in, Vec<T>* out, int64_t at) FK_BODY {
    out[0] = fma(in[0] + load(before + at), load(scale + at), load(after + at));
  });
}

// in = {dy, x or y}, out = {dx}; terms = {dy, dy * (x + before) * scale}
template <class T>
FK_CALL void affine_gradient_tile(const void* told, const Streams<T>& streams) {
  const bool from_output = *static_cast<const bool*>(told);
  const T *before = streams.parameters[0], *scale = streams.parameters[1], *after = streams.parameters[2];
  T *constant = streams.terms[0], *linear = streams.terms[1];
  for_each_vector<2, 1>(streams, [&](const Vec<T>* in, Vec<T>* out, int64_t at) FK_BODY {
    const Vec<T> dold = in[0] * load(scale + at);
    out[0] = dold;
    store(constant + at, in[0]);
    store(linear + at, from_output ? in[0] * (in[1] - load(after + at)) : dold * (in[1] + load(before + at)));
  });
}

template <class T>
FK_CALL auto choose_tile(bool backward) {
  return backward ? affine_gradient_tile<T> : affine_tile<T>;
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
